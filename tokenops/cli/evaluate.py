"""`python -m tokenops eval`: accuracy of a model, with a method or without, on images on disk; its speed beside it."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import use_backend
from . import CommandError, machine, patched, results
from .demo import progress_bar
from .models import counted, quartiles
from .timing import Spread

try:
    from ..training import evaluate, loader_of, open_images, transform_for
    from ..training.data import SPLITS, class_folders
except ImportError as missing:
    raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[train]'") from missing

SECONDS = 10  # of timing
SHOWN = 5  # unreadable images that are named, at most
#: what --sweep sets
SWEPT = {"tome": "r", "evit": "keep_rate", "evo_vit": "prune_ratio", "sit": "keeping_ratio"}
AMP = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Row(NamedTuple):
    """A model and what was found of it."""

    name: str
    scores: dict[str, float]  # eval_loss, top1, top5
    macs: float  # an image


class Watched:
    """A loader that tells how far it is, and keeps the first of its batches."""

    def __init__(self, loader: Any, advance: Callable[[float], Any]) -> None:
        self.loader, self.advance = loader, advance
        self.images: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.loader):
            if batch is not None and self.images is None:
                self.images = batch[0]
            yield batch
            self.advance((i + 1) / len(self.loader))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    patched.add_model_arguments(parser)
    patched.add_method_arguments(parser)
    patched.add_running_arguments(parser, dtype=False)
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, metavar="DIR", help="a folder a split, or what datasets saved to disk")
    add("--split", default="val", metavar="NAME", help="val, train or another that is there (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("-j", "--workers", type=int, default=2, metavar="N", help="processes that read images (default: %(default)s)")
    names = ", ".join(f"--{option.replace('_', '-')} of {method}" for method, option in SWEPT.items())
    add("--sweep", type=patched.number, nargs="+", metavar="X", help=f"one evaluation for each value of {names}")
    add("--output", type=Path, metavar="FILE", help="results as .csv or .json")


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the table, writes the results. Raises CommandError for what cannot be done."""
    how = patched.running(args)
    patched.at_least(1, batch_size=args.batch_size)
    patched.at_least(0, workers=args.workers)
    results.check_output(args.output)
    settings = swept(args)
    rows: list[Row] = []
    calls: dict[str, Callable[[], Any]] = {}
    with progress_bar() as advance:
        for i, setting in enumerate(settings):
            name, start = patched.method_label(setting), i / len(settings)
            advance(f"{name}: making the model", 0.9 * start)
            torch.manual_seed(0)
            model, weights = patched.make(setting)
            model = patched.for_inference(model)
            with use_backend("auto"):
                macs = counted(model, torch.zeros(1, *patched.input_size(model)))[0]
            images = opened(args, model)
            model = how.placed(model)

            def step(part: float, name: str = name, start: float = start) -> None:
                advance(name, 0.9 * (start + part / len(settings)))

            loader = Watched(loader_of(images, args.batch_size, args.workers), step)
            try:
                rows.append(Row(name, evaluate(model, loader, amp=AMP[how.amp]), macs))
            except ValueError as error:  # no image could be read
                raise CommandError(f"--data-dir {args.data_dir}: {error}: {unreadable(images.skipped())}") from None
            except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
                raise CommandError(str(error)) from None
            x = how.placed(loader.images)
            calls[name] = results.caller(model, x, how)
        advance("timing", 0.9)
        times = results.timed(calls, how, None, SECONDS)
    speeds = {name: Spread.of([len(x) / seconds for seconds in times[name]]) for name in calls}
    report(args, how, rows, speeds, weights, images, len(x))
    if args.output:
        facts = {
            "model": args.model,
            "weights": weights,
            "data": str(args.data_dir),
            "split": args.split,
            "images": len(images) - len(images.skipped()),
            "unreadable": len(images.skipped()),
            "running": str(how),
            **machine.facts(how.device.type),
        }
        results.save(args.output, facts, [entry(row, speeds[row.name]) for row in rows])
        print(f"\nResults: {args.output}")


def swept(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments, or those with each of --sweep's values."""
    if args.sweep is None:
        return [args]
    if args.method not in SWEPT:
        raise CommandError(f"--sweep goes with --method {', '.join(SWEPT)}, not with {args.method}")
    name = SWEPT[args.method]
    if getattr(args, name) is not None:
        raise CommandError(f"--sweep sets --{name.replace('_', '-')}: give one of them")
    found = []
    for value in dict.fromkeys(args.sweep):
        given = [value] if name in ("r", "keep_rate") else value
        found.append(argparse.Namespace(**{**vars(args), name: given}))
    return found


def opened(args: argparse.Namespace, model: Any) -> Any:
    """The split's images, their classes numbered as those of the training images, if these are there."""
    folders = [args.data_dir / name for name in SPLITS["train"]]
    classes = next((class_folders(folder) for folder in folders if folder.is_dir()), [])
    try:
        images = open_images(args.data_dir, args.split, transform_for(model, train=False), classes=classes or None)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--data-dir {args.data_dir}, --split {args.split}: {error}") from None
    if model.num_classes < len(images.classes):
        raise CommandError(
            f"--data-dir {args.data_dir} has {len(images.classes)} classes, but the model {model.num_classes}:"
            f" --num-classes {len(images.classes)} with a --checkpoint of such a model"
        )
    return images


def unreadable(names: Sequence[str]) -> str:
    """ "3 images could not be read: a, b, ..."."""
    if not names:
        return "all images could be read"
    return f"{len(names)} could not be read: {', '.join(names[:SHOWN])}" + (", ..." if len(names) > SHOWN else "")


def report(
    args: argparse.Namespace,
    how: patched.Running,
    rows: Sequence[Row],
    speeds: dict[str, Spread],
    weights: str,
    images: Any,
    batch: int,
) -> None:
    missing = images.skipped()
    first = rows[0]
    print(
        f"{patched.named(args)}: top-1 {first.scores['top1']:.2f} % of {len(images) - len(missing)} images"
        if len(rows) == 1
        else f"{args.model} with {args.method}: top-1 of {len(images) - len(missing)} images at {len(rows)} settings"
    )
    print(f"{machine.device_name(how.device.type)}, {how}; weights: {weights or 'random'}; {unreadable(missing)}\n")
    results.show(
        [
            ("method", "top-1 %", "top-5 %", "loss", "GMACs", "images/s"),
            *(
                (
                    row.name,
                    f"{row.scores['top1']:.2f}",
                    f"{row.scores['top5']:.2f}" if "top5" in row.scores else "-",
                    f"{row.scores['eval_loss']:.4f}",
                    f"{row.macs / 1e9:.3g}",
                    quartiles(speeds[row.name]),
                )
                for row in rows
            ),
        ]
    )
    print(f"\nimages/s of the model alone, in batches of {batch}: median of interleaved rounds, quartiles in brackets.")


def entry(row: Row, speed: Spread) -> dict[str, Any]:
    scores = {"top1": row.scores["top1"], "top5": row.scores.get("top5"), "loss": row.scores["eval_loss"]}
    speeds = {
        "images_per_second": speed.median,
        "images_per_second_low": speed.low,
        "images_per_second_high": speed.high,
    }
    return {"method": row.name, **scores, "gmacs": row.macs / 1e9, **speeds}
