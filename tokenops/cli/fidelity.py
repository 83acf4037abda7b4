"""`python -m tokenops fidelity`: what a method keeps of a model's answers at each of its levels, without labels."""

import argparse
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenops

from ..measuring import machine
from ..measuring.progress import Bar
from ..measuring.timing import Spread, ratio
from ..methods import for_inference
from ..patching.fidelity import Fidelity, fidelities
from ..patching.site import Site
from ..training import Images, UnlabelledImages, loader_of, open_images, transform_for
from . import CommandError, columns, count_of, models, paragraph, running
from .evaluate import Watched, unreadable
from .methods import METHODS, add_method_arguments, given, method_label, method_options, number, settings, shown, swept
from .running import quartiles

SECONDS = 20  # of timing all models
STEPS = 5  # levels of tome where none are given
#: levels where none are given, by the option they are of
LEVELS = {
    "keep_rate": (0.9, 0.8, 0.7, 0.6, 0.5),
    "keeping_ratio": (0.9, 0.8, 0.7, 0.6, 0.5),
    "prune_ratio": (0.1, 0.2, 0.3, 0.4, 0.5),
}
KEPT = (0.99, 0.95)  # of which the last lines say what keeps so much


class Row(NamedTuple):
    """A level and what was found of it."""

    name: str
    macs: float  # an image
    fidelity: Fidelity
    rate: Spread  # images a second
    speedup: Spread


class Source(NamedTuple):
    """Images, in which order, and what they are called."""

    images: Images
    order: list[int]
    name: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="IMAGE", help="images, or folders of them and of folders")
    add("--data-dir", type=Path, metavar="DIR", help="instead: a folder a split, or what datasets saved to disk")
    add("--split", default="val", metavar="NAME", help="of --data-dir (default: %(default)s)")
    add("--num-images", type=int, metavar="N", help="so many of them, spread evenly over all (default: all)")
    names = ", ".join(f"{flag.option} of {method}" for method in METHODS if (flag := swept(method)))
    add("--levels", type=number, nargs="+", metavar="X", help=f"values of {names} (default: five)")
    add("-b", "--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    add("-j", "--workers", type=int, default=2, metavar="N", help="processes that read images (default: %(default)s)")
    add("--repeats", type=int, metavar="N", help=f"rounds of timing (default: {SECONDS} seconds', at least 5)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of images, and of weights (default: 0)")
    add("--output", type=Path, metavar="FILE", help="results as .csv or .json")
    add("--plot", type=Path, metavar="FILE", help="what is kept against speed-up, as .png, .pdf, .svg or .jpg")
    models.add_model_arguments(parser)
    running.add_running_arguments(parser)
    add_method_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Compares, prints the tables, writes the results. Raises CommandError for what cannot be done."""
    how = checked(args)
    picture = drawing(args.plot)
    with Bar() as advance:
        advance("making the models", 0.0)
        reduced: dict[str, Any] = {}
        for setting in levels(args):  # all, before the first is measured: what is wrong with one is said at once
            torch.manual_seed(args.seed)
            model, weights = models.make(setting)
            if not reduced:
                dense = unreduced(model, args)
            reduced[label(setting, args)] = model
        source = opened(args, dense)
        sides = {name: for_inference(model) for name, model in {"dense": dense, **reduced}.items()}
        one = torch.zeros(1, *models.input_size(dense))
        macs = {name: models.counted(model, one).macs for name, model in sides.items()}
        sides = {name: how.placed(model) for name, model in sides.items()}
        advance("comparing", 0.05)
        loader = Watched(
            loader_of(source.images, args.batch_size, args.workers, sampler=source.order),
            lambda part: advance("comparing", 0.05 + 0.6 * part),
        )
        torch.manual_seed(args.seed)
        found = compared(sides, loader, how, source)
        first: Any = loader.images
        x = first[torch.arange(args.batch_size) % len(first)]
        times = running.timed(
            sides, how.placed(x), how, args.repeats, SECONDS, lambda part: advance("timing", 0.65 + 0.35 * part)
        )
    rates = {name: Spread.of([len(x) / seconds for seconds in times.seconds[name]]) for name in sides}
    rows = [
        Row(name, macs[name], found[name], rates[name], ratio(times.seconds["dense"], times.seconds[name]))
        for name in reduced
    ]
    dense_row = macs["dense"], rates["dense"]
    report(args, how, rows, dense_row, weights, source, times)
    if args.output:
        facts = {
            "model": args.model,
            "method": method_label(args),
            "weights": weights,
            "data": source.name,
            "images": rows[0].fidelity.images,
            "unreadable": len(source.images.skipped()),
            "running": str(how),
            "batch_size": args.batch_size,
            "dense_gmacs": macs["dense"] / 1e9,
            **running.spelled({"dense_images_per_second": rates["dense"]}),
            **machine.facts(how.device.type),
        }
        running.save(args.output, facts, [entry(row, macs["dense"]) for row in rows])
    if picture is not None:
        title = f"{args.model}, {method_label(args)}, {count_of(rows[0].fidelity.images, 'image')} of {source.name}"
        title += f"\n{how.where(f'batches of {args.batch_size}')}; weights: {weights or 'random'}"
        picture.draw_fidelity(args.plot, title, [row.name for row in rows], [row.speedup for row in rows], curves(rows))
        print(f"\nPicture: {args.plot}")


def checked(args: argparse.Namespace) -> running.Running:
    """The options that need no model."""
    how = running.running(args)
    models.at_least(1, batch_size=args.batch_size, num_images=args.num_images, repeats=args.repeats)
    models.at_least(0, workers=args.workers)
    models.check_seed(args.seed)
    running.check_output(args.output)
    if args.paths and args.data_dir:
        raise CommandError(f"--data-dir {args.data_dir} and {args.paths[0]}: give one of them")
    models.check_reduced(args)
    return how


def drawing(path: Path | None) -> Any:
    """What draws --plot, which can be written; None without."""
    if path is None:
        return None
    try:
        from . import picture
    except ImportError as missing:
        raise CommandError(f"--plot needs more packages ({missing}): pip install 'tokenops[plot]'") from None
    picture.check(path, (".png", ".pdf", ".svg", ".jpg"), "--plot")
    return picture


def levels(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments with each of --levels, or the levels of the method; alone where they have one or it has none."""
    flag = swept(args.method)
    values = args.levels
    if values is None and flag is not None and not {flag.name, "r"} & given(args).keys():
        values = LEVELS.get(flag.name) or merged_tokens(args) if flag.name in (*LEVELS, "r") else None
    found = settings(args, "--levels", values)
    for setting in found:
        method_options(setting)
    return found


def merged_tokens(args: argparse.Namespace) -> list[int]:
    """Numbers of tokens to merge a block: up to as many as there are for every block, or `STEPS` of few patches."""
    plain = {"method": "none", "checkpoint": None, "pretrained": False}
    model, _ = models.dense(argparse.Namespace(**{**vars(args), **plain}))
    try:
        site = Site(model)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--method {args.method}: {error}") from None
    if site.usual is None:
        raise CommandError(f"--levels must be given: {args.model} takes images of any size")
    patches = site.usual[0] * site.usual[1]
    most = max(patches // site.depth, min(STEPS, patches // 2), 1)
    return sorted({max(round(most * step / STEPS), 1) for step in range(1, STEPS + 1)})


def unreduced(model: Any, args: argparse.Namespace) -> Any:
    """A copy of the model without its method, of the same weights."""
    if not hasattr(model, "tokenops_patch"):
        what = f"--checkpoint {args.checkpoint}" if args.checkpoint else f"--model {args.model}"
        raise CommandError(f"{what}: there is no unreduced model of the same weights to compare with")
    return tokenops.remove_patch(deepcopy(model))


def label(setting: argparse.Namespace, args: argparse.Namespace) -> str:
    """ "r=8" of a level, the method's name where there are none."""
    new = {name: value for name, value in given(setting).items() if name not in given(args)}
    return " ".join(f"{name}={shown(value)}" for name, value in new.items()) or args.method


def opened(args: argparse.Namespace, model: Any) -> Source:
    """The user's images, as the model takes them, or the two photographs of scikit-learn."""
    transform = transform_for(model, train=False)
    try:
        if args.data_dir:
            images: Images = open_images(args.data_dir, args.split, transform)
            name = f"{args.data_dir}, {args.split}"
        elif args.paths:
            images, name = UnlabelledImages(args.paths, transform), str(args.paths[0])
            name += f" and {len(args.paths) - 1} more" if len(args.paths) > 1 else ""
        else:
            images, name = UnlabelledImages(models.photographs([]), transform), "two photographs of scikit-learn's"
    except ImportError as missing:
        raise CommandError(f"give an IMAGE or a folder, or install what is missing: {missing}") from None
    except (OSError, ValueError) as error:
        given_by = f"--data-dir {args.data_dir}, --split {args.split}: " if args.data_dir else ""
        raise CommandError(f"{given_by}{error}") from None
    return Source(images, spread(len(images), args.num_images, args.seed), name)


def spread(total: int, count: int | None, seed: int) -> list[int]:
    """So many numbers below the total, evenly spaced from a start that the seed says; all where there are no more."""
    if count is None or count >= total:
        return list(range(total))
    start = random.Random(seed).random()
    return [int((start + i) * total / count) for i in range(count)]


def compared(sides: dict[str, Any], loader: Any, how: running.Running, source: Source) -> dict[str, Fidelity]:
    """Of every side but the dense one."""

    def batches() -> Iterator[Tensor]:
        for batch in loader:
            if batch is not None:
                yield how.placed(batch[0])

    reduced = {name: model for name, model in sides.items() if name != "dense"}
    try:
        with how.autocast():
            return fidelities(sides["dense"], reduced, batches())
    except ValueError as error:
        skipped = source.images.skipped()
        none = len(skipped) == len(source.order)  # there was no image
        raise CommandError(f"{error}: {unreadable(skipped)}" if none else str(error)) from None
    except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
        raise CommandError(str(error)) from None


# ---- what is said


def report(
    args: argparse.Namespace,
    how: running.Running,
    rows: Sequence[Row],
    dense: tuple[float, Spread],
    weights: str,
    source: Source,
    times: running.Times,
) -> None:
    macs, rate = dense
    count = count_of(rows[0].fidelity.images, "image")
    print(paragraph(f"{models.named(args)}: {count} of {source.name}, against the model without the method"))
    print(paragraph(how.where(f"batches of {args.batch_size}")))
    unknown = "random, so that what is kept says nothing of a trained model"
    print(paragraph(f"weights: {weights or unknown}; {unreadable(source.images.skipped())}"))
    title, values = shortened([row.name for row in rows])
    table: list[tuple[str, ...]] = [(title, "GMACs", "part", "images/s", "speed-up", "realised")]
    table.append(("dense", f"{macs / 1e9:.3g}", "1", quartiles(rate), "1", ""))
    kept: list[tuple[str, ...]] = [(title, "speed-up", "top-1", "cosine", "neighbours", "difference", "relative")]
    for row, value in zip(rows, values):
        part = row.macs / macs
        speed = quartiles(row.rate), quartiles(row.speedup, 2), f"{row.speedup.median * part:.2f}"
        table.append((value, f"{row.macs / 1e9:.3g}", f"{part:.2f}", *speed))
        kept.append((value, f"{row.speedup.median:.2f}", *map(cell, row.fidelity[1:])))
    print(f"\n{columns(table)}")
    print(f"\n{columns(kept)}\n\n{running.remarks(times, [row.speedup for row in rows])}")
    for line in closing(rows, macs, weights):
        print(paragraph(line))


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """The title of the levels' column, and its cells: "r" and "3", "6" of "r=3", "r=6"."""
    option, equals, _ = names[0].partition("=")
    return (option, [name.removeprefix(option + "=") for name in names]) if equals else ("level", list(names))


def cell(value: float | None) -> str:
    """Four digits behind the point, fewer of large numbers; nothing of what there is not."""
    return "" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def closing(rows: Sequence[Row], macs: float, weights: str) -> Iterator[str]:
    """What the numbers carry, and no more: nothing of levels where weights are random, or that save nothing."""
    images = rows[0].fidelity.images
    if rows[0].fidelity.neighbours is None:
        yield f"neighbours: {count_of(images, 'image')}, of at least 3 that it needs"
    measure, words = ("top1", "the same class for") if models.trained(weights) else ("cosine", "a mean cosine of")
    if getattr(rows[0].fidelity, measure) is None:
        measure, words = "cosine", "a mean cosine of"
    if not weights or getattr(rows[0].fidelity, measure) is None:
        return
    for least in KEPT:
        enough = [row for row in rows if getattr(row.fidelity, measure) >= least and row.macs < macs]
        part = f"{least:.0%} of the images" if measure == "top1" else f"{least}"
        if not enough:
            yield f"No cheaper level has {words} at least {part}."
            continue
        best = min(enough, key=lambda row: row.macs)
        faster = "" if best.speedup.low > 1 else ", which is not faster for certain"
        yield (
            f"The cheapest with {words} at least {part}: {best.name}, at {best.macs / macs:.2f} of the multiply-adds"
            f" and {best.speedup.median:.2f}x the speed{faster}."
        )
    if measure == "top1" and images * (1 - KEPT[0]) < 1:
        yield f"One image of {images} is {1 / images:.1%}: show more of them before you rely on it."


def curves(rows: Sequence[Row]) -> dict[str, list[float]]:
    """What is drawn: the measures that all levels have."""
    every = {
        "top-1 agreement": [row.fidelity.top1 for row in rows],
        "cosine": [row.fidelity.cosine for row in rows],
        "neighbours": [row.fidelity.neighbours for row in rows],
        "1 - relative difference": [None if (d := row.fidelity.relative) is None else 1 - d for row in rows],
    }
    return {name: values for name, values in every.items() if None not in values}  # type: ignore[misc]


def entry(row: Row, macs: float) -> dict[str, Any]:
    cost = {"gmacs": row.macs / 1e9, "part": row.macs / macs}
    speed = running.spelled({"images_per_second": row.rate, "speedup": row.speedup})
    return {"level": row.name, **cost, **speed, **{k: v for k, v in row.fidelity._asdict().items() if k != "images"}}
