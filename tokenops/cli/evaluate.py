"""`python -m tokenops eval`: accuracy of a model, with a method or without, on images on disk; its speed beside it."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from ..measuring import machine
from ..measuring.progress import Bar
from ..measuring.timing import Spread
from ..methods import for_inference
from ..training import evaluate, loader_of, open_images, transform_for
from ..training.data import SPLITS, class_folders
from . import CommandError, columns, count_of, models, paragraph, running
from .methods import METHODS, add_method_arguments, method_label, number, swept
from .methods import settings as settings_of
from .running import quartiles

SECONDS = 10  # of timing
SHOWN = 5  # unreadable images, or classes, that are named, at most
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
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, metavar="DIR", help="a folder a split, or what datasets saved to disk")
    add("--split", default="val", metavar="NAME", help="val, train or another that is there (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("-j", "--workers", type=int, default=2, metavar="N", help="processes that read images (default: %(default)s)")
    names = ", ".join(f"{flag.option} of {method}" for method in METHODS if (flag := swept(method)))
    add("--sweep", type=number, nargs="+", metavar="X", help=f"one evaluation for each value of {names}")
    add("--output", type=Path, metavar="FILE", help="results as .csv or .json")
    models.add_model_arguments(parser)
    running.add_running_arguments(parser, dtype=False)
    add_method_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the table, writes the results. Raises CommandError for what cannot be done."""
    how = running.running(args)
    models.at_least(1, batch_size=args.batch_size)
    models.at_least(0, workers=args.workers)
    running.check_output(args.output)
    settings = settings_of(args, "--sweep", args.sweep)
    rows: list[Row] = []
    made: dict[str, Any] = {}
    with Bar() as advance:
        for setting in settings:  # all of them, before the first is evaluated: what is wrong with one is said at once
            advance(f"{method_label(setting)}: making the model", 0.0)
            torch.manual_seed(0)
            model, weights = models.make(setting)
            if weights and not models.trained(weights):
                raise CommandError(
                    f"weights: {weights}, so that its answers say nothing: leave out --num-classes, or give a"
                    " --checkpoint of the whole model, as train makes it"
                )
            made[method_label(setting)] = for_inference(model)
        for i, (name, model) in enumerate(made.items()):
            start = i / len(made)
            macs = models.counted(model, torch.zeros(1, *models.input_size(model))).macs
            images = opened(args, model)
            made[name] = model = how.placed(model)

            def step(part: float, name: str = name, start: float = start) -> None:
                advance(name, 0.9 * (start + part / len(made)))

            loader = Watched(loader_of(images, args.batch_size, args.workers), step)
            try:
                rows.append(Row(name, evaluate(model, loader, amp=AMP[how.amp]), macs))
            except ValueError as error:  # no image could be read
                raise CommandError(f"--data-dir {args.data_dir}: {error}: {unreadable(images.skipped())}") from None
            except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
                raise CommandError(str(error)) from None
        advance("timing", 0.9)
        x = how.placed(loader.images)
        times = running.timed(made, x, how, None, SECONDS)
    speeds = {name: Spread.of([len(x) / seconds for seconds in times.seconds[name]]) for name in made}
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
        running.save(args.output, facts, [entry(row, speeds[row.name]) for row in rows])


def opened(args: argparse.Namespace, model: Any) -> Any:
    """The split's images, numbered as the model's classes.

    These are the folders of the training images, if they are there, else those of the split. Folders with ImageNet's
    names (n01440764) are numbered as in ImageNet for a model of its 1000 classes.
    """
    folders = [args.data_dir / name for name in SPLITS["train"]]
    classes = next((class_folders(folder) for folder in folders if folder.is_dir()), [])
    transform = transform_for(model, train=False)
    try:
        images = open_images(args.data_dir, args.split, transform, classes=classes or None)
        if model.num_classes == 1000 > len(images.classes):
            names = [ImageNetInfo().index_to_label_name(i) for i in range(1000)]
            if set(images.classes) <= set(names):
                images = open_images(args.data_dir, args.split, transform, classes=names)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--data-dir {args.data_dir}, --split {args.split}: {error}") from None
    found = images.classes
    if model.num_classes != len(found):
        shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise CommandError(
            f"--data-dir {args.data_dir} has {len(found)} classes ({shown}), but the model {model.num_classes}, so that"
            f" its answers say nothing of them: --num-classes {len(found)} with a --checkpoint of such a model, as"
            " train makes it; or folders with ImageNet's names (n01440764) for a model of its 1000 classes"
        )
    return images


def unreadable(names: Sequence[str]) -> str:
    """ "3 images could not be read: a, b, ..."."""
    if not names:
        return "all images could be read"
    return f"{len(names)} could not be read: {', '.join(names[:SHOWN])}" + (", ..." if len(names) > SHOWN else "")


def report(
    args: argparse.Namespace,
    how: running.Running,
    rows: Sequence[Row],
    speeds: dict[str, Spread],
    weights: str,
    images: Any,
    batch: int,
) -> None:
    missing = images.skipped()
    count, scores = count_of(len(images) - len(missing), "image"), rows[0].scores
    print(
        f"{models.named(args)}: top-1 {scores['top1']:.2f} % of {count}"
        if len(rows) == 1
        else f"{args.model} with {args.method}: top-1 of {count} at {len(rows)} settings"
    )
    source = f"weights: {weights or 'random'}; {unreadable(missing)}"
    print(f"{paragraph(how.where())}\n{paragraph(source)}\n")
    table = [("method", "top-1 %", "top-5 %", "loss", "GMACs", "images/s")]
    for row in rows:
        top5 = f"{row.scores['top5']:.2f}" if "top5" in row.scores else "-"
        numbers = f"{row.scores['top1']:.2f}", top5, f"{row.scores['eval_loss']:.4f}", f"{row.macs / 1e9:.3g}"
        table.append((row.name, *numbers, quartiles(speeds[row.name])))
    print(columns(table))
    note = f"images/s of the model alone, in batches of {batch}: median of interleaved rounds, quartiles in brackets."
    print(f"\n{paragraph(note)}")


def entry(row: Row, speed: Spread) -> dict[str, Any]:
    scores = {"top1": row.scores["top1"], "top5": row.scores.get("top5"), "loss": row.scores["eval_loss"]}
    return {"method": row.name, **scores, "gmacs": row.macs / 1e9, **running.spelled({"images_per_second": speed})}
