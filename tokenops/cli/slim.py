"""`python -m tokenops slim`: makes a model cheaper by a method, says by how much, and draws what its tokens become."""

import argparse
import random
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..measuring.progress import Bar
from ..measuring.timing import ratio
from ..methods import patch_slimming
from . import CommandError, columns, count_of, make_folder, models, paragraph, picture, running
from .methods import METHODS, add_method_arguments, apply, given, method_options
from .running import quartiles, stages

if TYPE_CHECKING:
    from PIL import Image

SECONDS = 15  # of timing, when the number of repeats is not given
PICTURED = 3  # photographs in the picture, at most
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_photographs(parser, "out/slim.png")
    add = parser.add_argument
    add("--repeats", type=int, metavar="N", help=f"pairs of timed runs (default: {SECONDS} seconds', at least 5)")
    add("--save", type=Path, metavar="FILE", help="the model's state dict, with a searched schedule as .json beside it")
    add("--seed", type=int, default=0, metavar="N", help="of random weights and images (default: %(default)s)")
    models.add_model_arguments(parser)
    running.add_running_arguments(parser)
    search = parser.add_argument_group(
        "search of a schedule (patch_slimming without --schedule or --counts)"
    ).add_argument
    search("--data-dir", type=Path, metavar="DIR", help="images to search on (default: the photographs)")
    search("--num-images", type=int, default=64, metavar="N", help="of them, at random (default: %(default)s)")
    search("--tolerance", type=float, default=0.02, metavar="X", help="error a layer may leave (default: %(default)s)")
    search("--granularity", type=int, default=16, metavar="N", help="patches a step adds (default: %(default)s)")
    search("--epochs", type=int, default=1, metavar="N", help="of tuning for each candidate (default: %(default)s)")
    add_method_arguments(parser, default="evit")


def add_photographs(parser: argparse.ArgumentParser, output: str) -> None:
    """What `slim` and `demo` run on, and where the picture goes."""
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE", help="photographs (default: two of scikit-learn's)")
    add("-b", "--batch-size", type=int, default=8, metavar="N", help="of the timing (default: %(default)s)")
    add("--output", type=Path, default=Path(output), metavar="FILE", help="the picture (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Slims, measures, prints, draws. Raises CommandError for what cannot be done."""
    how = checked(args)
    photographs = models.photographs(args.images)
    with Bar() as advance:
        advance("making the model", 0.0)
        torch.manual_seed(args.seed)
        slim, weights, schedule = slimmed(args, photographs)
        if not hasattr(slim, "tokenops_patch"):
            raise CommandError("--checkpoint: of a compacted model nothing can be traced: use eval or bench")
        sides = {"dense": models.dense_of(slim, args)[1], "slim": slim}
        x = models.prepared(slim, photographs)
        before, after = (models.counted(model, x[:1]) for model in sides.values())
        advance("where the patches go", 0.2)
        trace = models.traced(slim, x[:PICTURED])
        named = (
            {name: models.guesses(model, x[:PICTURED]) for name, model in sides.items()}
            if models.trained(weights)
            else {}
        )
        batch = how.placed(x[torch.arange(args.batch_size) % len(x)])
        copies = {name: how.copied(model) for name, model in sides.items()}
        times = running.timed(
            copies, batch, how, args.repeats, SECONDS, lambda part: advance("timing", 0.3 + 0.6 * part)
        )
    speedup, flops = ratio(times.seconds["dense"], times.seconds["slim"]), before.macs / after.macs
    ms = [times.ms(name, args.batch_size) for name in sides]
    first = (
        f"{models.named(args)}: {speedup.median:.2f}x as fast as the dense model with {flops:.2f}x fewer FLOPs"
        f" (realised: {speedup.median / flops:.2f})"
    )
    for line in (
        first,
        how.where(f"batches of {args.batch_size}"),
        f"weights: {weights or 'random, so the picture is only illustrative where a method looks at features'}",
        f"tokens that enter each block: {stages(before.tokens)}; slim {stages(after.tokens)}",
    ):
        print(paragraph(line))
    parameters = [f"{side.parameters / 1e6:.2f} M" for side in (before, after)]
    rows = [
        ("", "dense", "slim", "ratio"),
        ("GMACs an image", *(f"{side.macs / 1e9:.3g}" for side in (before, after)), f"{flops:.2f}"),
        ("parameters", *parameters, f"{before.parameters / after.parameters:.2f}"),
        ("ms an image", *map(quartiles, ms), quartiles(speedup, 2)),
        ("images a second", *(f"{1e3 / side.median:.4g}" for side in ms), ""),
        ("realised", "", "", f"{speedup.median / flops:.2f}"),
    ]
    print(f"\n{columns(rows)}\n\n{running.remarks(times, [speedup])}")
    for name, guesses in named.items():
        head = [f"photograph {i + 1}" for i in range(len(guesses))]
        print(f"\ntop 5 of the {name} model\n{columns([head, *zip_longest(*guesses, fillvalue='')])}")
    picture.draw_tokens(args.output, [models.displayed(slim, image) for image in x[:PICTURED]], trace)
    print(f"\nPicture: {args.output}")
    for what, path in saved(args.save, slim, schedule):
        print(f"{what}: {path}")


def checked(args: argparse.Namespace) -> running.Running:
    """The options that need no model."""
    how = running.running(args)
    if args.method == "none":
        raise CommandError("--method none slims nothing: choose one of " + ", ".join(METHODS))
    models.at_least(1, batch_size=args.batch_size, repeats=args.repeats, num_images=args.num_images)
    models.at_least(1, granularity=args.granularity)
    models.at_least(0, tolerance=args.tolerance, epochs=args.epochs)
    models.check_seed(args.seed)
    picture.check(args.output)
    if args.data_dir and not searching(args):
        raise CommandError("--data-dir goes with --method patch_slimming that searches its schedule")
    if not searching(args):
        method_options(args)
    if args.save:
        if args.save.suffix.lower() == ".json":
            raise CommandError(f"--save {args.save}: .json is for the schedule beside the weights: name these .pt, say")
        make_folder(args.save, "--save")
    return how


def searching(args: argparse.Namespace) -> bool:
    return args.method == "patch_slimming" and not given(args)


def slimmed(args: argparse.Namespace, photographs: Sequence["Image.Image"]) -> tuple[Any, str, Any]:
    """The model with its method, where its weights come from, and the schedule that was searched for it."""
    if not searching(args):
        return *models.make(args), None
    model, weights = models.make(argparse.Namespace(**{**vars(args), "method": "none"}))
    found_on = sample(args.data_dir, args.num_images, args.seed) if args.data_dir else photographs
    images = models.prepared(model, found_on)
    try:
        found = patch_slimming.search(
            model, images, args.tolerance, args.granularity, epochs=args.epochs, progress=False
        )
    except (TypeError, ValueError) as error:
        raise CommandError(f"--method patch_slimming: {error}") from None
    tuned = found.model.state_dict()
    model.load_state_dict({name: tuned[name] for name in model.state_dict()})
    return apply(model, args, schedule=found.schedule), weights, found.schedule


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
            found.append(models.open_image(path))
        except CommandError as error:
            unreadable.append(str(error))
    if not found:
        raise CommandError(f"--data-dir {folder} has no image that can be read, in {len(paths)} files")
    if unreadable:
        print(f"{count_of(len(unreadable), 'image')} left out: {'; '.join(unreadable[:3])}")
    return found


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
