"""`python -m tokenops slim`: makes a model cheaper by a method, says by how much, and draws what its tokens become."""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import tokenops

from .. import use_backend
from . import CommandError, columns, machine, patched, picture, results
from .demo import progress_bar, top5
from .models import backends, counted, displayed, load_photographs, methods, open_image, prepare, quartiles, stages
from .timing import Spread, ratio, recorded_kernels

if TYPE_CHECKING:
    from PIL import Image

SECONDS = 15  # of timing, when the number of repeats is not given
PICTURED = 3  # photographs in the picture, at most
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Counts(NamedTuple):
    """What `counted` finds of a model."""

    macs: float  # an image
    parameters: int
    tokens: list[int]  # that enter each block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="photographs (default: two of scikit-learn's)"
    )
    patched.add_model_arguments(parser)
    patched.add_method_arguments(parser, default="evit")
    patched.add_running_arguments(parser)
    add = parser.add_argument
    add("-b", "--batch-size", type=int, default=8, metavar="N", help="of the timing (default: %(default)s)")
    add("--repeats", type=int, metavar="N", help=f"pairs of timed runs (default: {SECONDS} seconds', at least 5)")
    add("--output", type=Path, default=Path("out/slim.png"), metavar="FILE", help="the picture (default: %(default)s)")
    add("--save", type=Path, metavar="FILE", help="the model's state dict, with a searched schedule as .json beside it")
    search = parser.add_argument_group(
        "search of a schedule (patch_slimming without --schedule or --counts)"
    ).add_argument
    search("--data-dir", type=Path, metavar="DIR", help="images to search on (default: the photographs)")
    search("--num-images", type=int, default=64, metavar="N", help="of them, at random (default: %(default)s)")
    search("--tolerance", type=float, default=0.02, metavar="X", help="error a layer may leave (default: %(default)s)")
    search("--granularity", type=int, default=16, metavar="N", help="patches a step adds (default: %(default)s)")
    search("--epochs", type=int, default=1, metavar="N", help="of tuning for each candidate (default: %(default)s)")
    search("--seed", type=int, default=0, metavar="N", help="of random weights and images (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Slims, measures, prints, draws. Raises CommandError for what cannot be done."""
    how = checked(args)
    photographs = load_photographs(args.images)
    with progress_bar() as advance:
        advance("making the model", 0.0)
        torch.manual_seed(args.seed)
        slim, weights, schedule = slimmed(args, photographs)
        if not hasattr(slim, "tokenops_patch"):
            raise CommandError("--checkpoint: of a compacted model nothing can be traced: use eval or bench")
        _, dense = patched.dense_of(slim, args)
        x = prepare(slim, photographs)
        with use_backend("auto"):
            before, after = (Counts(*counted(model, x[:1])) for model in (dense, slim))
            advance("where the patches go", 0.2)
            found = tokenops.trace(slim, x[:PICTURED])
        guesses = [top5(model, x) for model in (dense, slim)] if weights else []
        advance("timing", 0.3)
        ms, speedup, kernels = measured(args, how, dense, slim, x)
        advance("drawing", 0.95)
        draw(args.output, [displayed(slim, image) for image in x[:PICTURED]], found)
        files = saved(args.save, slim, schedule)
    flops = before.macs / after.macs
    where = f"{machine.device_name(how.device.type)}, {how}, batches of {args.batch_size}"
    where += f", threads: {torch.get_num_threads()}" if how.device.type == "cpu" else ""
    print(
        f"{patched.named(args)}: {speedup.median:.2f}x as fast as the dense model with {flops:.2f}x fewer FLOPs"
        f" (realised: {speedup.median / flops:.2f})\n{where}\n"
        f"weights: {weights or 'random, so the picture is only illustrative where a method looks at features'}\n"
        f"tokens that enter each block: {blocks(before.tokens)}; slim {blocks(after.tokens)}\n"
    )
    results.show(table(before, after, ms, speedup))
    ran = ", ".join(backends(kernels)) or "plain PyTorch (the reference), no tokenops kernel ran"
    print(f"\nMedians of interleaved pairs, quartiles in brackets.\nBackends: {ran}")
    for name, rows in zip(("the dense model", "the slim model"), guesses):
        print(f"\ntop 5 of {name}\n{columns(rows)}")
    print(f"\nPicture: {args.output}")
    for what, path in files:
        print(f"{what}: {path}")


def checked(args: argparse.Namespace) -> patched.Running:
    """The options that need no model."""
    how = patched.running(args)
    if args.method == "none":
        raise CommandError("--method none slims nothing: choose one of " + ", ".join(patched.METHODS[1:]))
    patched.at_least(1, batch_size=args.batch_size, repeats=args.repeats, num_images=args.num_images)
    patched.at_least(1, granularity=args.granularity)
    patched.at_least(0, tolerance=args.tolerance, epochs=args.epochs, seed=args.seed)
    picture.check(args.output)
    if args.output.suffix.lower() == ".svg":
        raise CommandError(f"--output {args.output}: the name must end in .png, .pdf or .jpg")
    if args.data_dir and not searching(args):
        raise CommandError("--data-dir goes with --method patch_slimming that searches its schedule")
    if args.save:
        results.make_folder(args.save, "--save")
    return how


def searching(args: argparse.Namespace) -> bool:
    return args.method == "patch_slimming" and args.schedule is None and args.counts is None


def slimmed(args: argparse.Namespace, photographs: Sequence["Image.Image"]) -> tuple[Any, str, Any]:
    """The model with its method, where its weights come from, and the schedule that was searched for it."""
    if not searching(args):
        return *patched.make(args), None
    model, weights = patched.make(argparse.Namespace(**{**vars(args), "method": "none"}))
    images = prepare(model, sample(args.data_dir, args.num_images, args.seed) if args.data_dir else photographs)
    try:
        found = methods.patch_slimming.search(
            model, images, args.tolerance, args.granularity, epochs=args.epochs, progress=False
        )
    except (TypeError, ValueError) as error:
        raise CommandError(f"--method patch_slimming: {error}") from None
    tuned = found.model.state_dict()
    model.load_state_dict({name: tuned[name] for name in model.state_dict()})
    return patched.apply(model, args, schedule=found.schedule), weights, found.schedule


def sample(folder: Path, count: int, seed: int) -> list["Image.Image"]:
    """So many of the images in a folder and the folders within, at random; those that cannot be read are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    random.Random(seed).shuffle(paths)
    found: list[Image.Image] = []
    unreadable: list[str] = []
    for path in paths:
        if len(found) == count:
            break
        try:
            found.append(open_image(path))
        except CommandError as error:
            unreadable.append(str(error))
    if not found:
        raise CommandError(f"--data-dir {folder} has no image that can be read, in {len(paths)} files")
    if unreadable:
        print(f"{len(unreadable)} images were left out: {'; '.join(unreadable[:3])}")
    return found


def measured(
    args: argparse.Namespace, how: patched.Running, dense: Any, slim: Any, x: Tensor
) -> tuple[dict[str, Spread], Spread, set[str]]:
    """Milliseconds an image of both, the speed-up, and the kernels that ran."""
    images = how.placed(x[torch.arange(args.batch_size) % len(x)])
    try:
        copies = {"dense": how.copied(dense), "slim": how.copied(slim)}
        calls = {name: results.caller(model, images, how) for name, model in copies.items()}
        with recorded_kernels() as kernels:
            calls["slim"]()
        times = results.timed(calls, how, args.repeats, SECONDS)
    except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
        raise CommandError(str(error)) from None
    ms = {name: Spread.of([1e3 * seconds / args.batch_size for seconds in times[name]]) for name in calls}
    return ms, ratio(times["dense"], times["slim"]), kernels


def table(before: Counts, after: Counts, ms: dict[str, Spread], speedup: Spread) -> list[tuple[str, ...]]:
    flops = before.macs / after.macs
    macs = [f"{side.macs / 1e9:.3g}" for side in (before, after)]
    parameters = [f"{side.parameters / 1e6:.2f} M" for side in (before, after)]
    speeds = [f"{1e3 / ms[name].median:.4g}" for name in ("dense", "slim")]
    return [
        ("", "dense", "slim", "ratio"),
        ("GMACs an image", *macs, f"{flops:.2f}"),
        ("parameters", *parameters, f"{before.parameters / after.parameters:.2f}"),
        ("ms an image", quartiles(ms["dense"]), quartiles(ms["slim"]), quartiles(speedup)),
        ("images a second", *speeds, ""),
        ("realised: speed-up / FLOP ratio", "", "", f"{speedup.median / flops:.2f}"),
    ]


def blocks(tokens: Sequence[int]) -> str:
    """[197, 99, 99] -> "197 x 1, 99 x 2"; [197, 181, 165] -> "197, 181, 165"."""
    return stages(tokens) if len(set(tokens)) < len(tokens) else ", ".join(map(str, tokens))


def draw(path: Path, images: Sequence[Any], found: Any) -> None:
    """What the tokens of each image become, one below the other."""
    from PIL import Image

    sheets = [tokenops.visualize((255 * image).round().astype("uint8"), found, i) for i, image in enumerate(images)]
    width, height = sheets[0].size
    whole = Image.new("RGB", (width, height * len(sheets)), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, i * height))
    try:
        whole.save(path)
    except OSError as error:
        raise CommandError(f"--output: cannot write {path}: {error}") from None


def saved(path: Path | None, slim: Any, schedule: Any) -> list[tuple[str, Path]]:
    """Writes the state dict and the schedule that was searched; what and where."""
    if path is None:
        return []
    files = [("Weights", path)]
    try:
        torch.save(slim.state_dict(), path)
        if schedule is not None:
            files.append(("Schedule", path.with_suffix(".json")))
            schedule.save(path.with_suffix(".json"))
    except (OSError, RuntimeError) as error:
        raise CommandError(f"--save: cannot write {path}: {error}") from None
    return files
