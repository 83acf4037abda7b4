"""`python -m tokenops demo`: a dense model and its slimmed form side by side on photographs."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import tokenops

from .. import use_backend
from . import CommandError, columns, comparison, machine, picture
from .models import (
    Settings,
    Side,
    backends,
    caller,
    counted,
    displayed,
    load_photographs,
    make,
    prepare,
    quartiles,
    stages,
)
from .timing import Spread, clock, interleaved, ratio, recorded_kernels

if TYPE_CHECKING:
    from PIL import Image

SECONDS = 30  # of timing, when the number of repeats is not given
UNSTEADY = 0.25  # quartiles that lie further apart than this part of the median call for a warning
PICTURED = 3  # photographs in the picture, at most


class Findings(NamedTuple):
    """What both models did in the same rounds."""

    dense: Side
    slim: Side
    speedup: Spread
    repeats: int
    kernels: set[str]

    @property
    def flop_ratio(self) -> float:
        return self.dense.macs / self.slim.macs


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the picture. Raises CommandError for what cannot be done."""
    settings = checked(args)
    picture.check(args.output)
    photographs = load_photographs(args.images)
    with progress_bar() as advance:
        advance("making the models", 0.0)
        torch.manual_seed(0)
        slim, slim_weights = make(args.model, args.checkpoint, args.pretrained, slimmed=True)
        dense, dense_weights = make(args.dense, args.dense_checkpoint, args.pretrained, slimmed=False)
        if args.pretrained and not (slim_weights or dense_weights):
            names = f"{args.dense} or {args.model}"
            raise CommandError(f"--pretrained, but no weights of {names} can be downloaded: use --checkpoint")
        x = prepare(slim, photographs)

        advance("which regions the slim tokens draw on", 0.05)
        with use_backend("auto"):  # on the CPU, whichever backend was asked for
            drawn = tokenops.trace(deepcopy(slim).double(), x[:PICTURED].double())
            maps = [step.weights.unflatten(2, drawn.grid) for step in drawn.steps if step.weights is not None]

        found = measure(
            (args.dense, dense, dense_weights), (args.model, slim, slim_weights), photographs, settings, advance
        )

        advance("drawing", 0.95)
        where = f"{machine.device_name(settings.device)}, {settings.dtype}, batches of {settings.batch}"
        where += f", threads: {torch.get_num_threads()}" if settings.device == "cpu" else ""
        shown = [displayed(slim, image) for image in x[:PICTURED]]
        subtitle = f"{where}; {weights_note(found)}"
        picture.draw(args.output, summary(found), subtitle, shown, maps, (found.dense, found.slim))
    print(f"{summary(found)}\n{where}\n{weights_note(found)}\n\n{columns(table(found))}\n\n{remarks(found)}")
    for side, model in ((found.dense, dense), (found.slim, slim)):
        if side.weights:
            print(f"\ntop 5 of {side.name}\n{columns(top5(model, prepare(model, photographs)))}")
    print(f"\nPicture: {args.output}")
    if args.methods:
        with progress_bar() as advance:
            print(f"\n{comparison.run(args.methods, photographs, settings, args.output, advance)}")


def checked(args: argparse.Namespace) -> Settings:
    """The options that need no model, with their defaults."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda was asked for, but torch sees no GPU")
    for option, value in (("--batch", args.batch), ("--repeats", args.repeats)):
        if value is not None and value < 1:
            raise CommandError(f"{option}={value}, but it must be at least 1")
    if args.model == args.dense:
        raise CommandError(f"--model and --dense are both {args.model}: there is nothing to compare")
    comparison.check(args.methods)
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    return Settings(device, dtype, args.batch or (256 if device == "cuda" else 16), args.repeats)


Named = tuple[str, nn.Module, str]  # name, model, where its weights come from


def measure(
    dense: Named,
    slim: Named,
    photographs: Sequence["Image.Image"],
    settings: Settings,
    advance: Callable[[str, float], None],
) -> Findings:
    """Counts both models and times them in turn."""
    advance("warming up", 0.1)
    inputs = {name: prepare(model, photographs) for name, model, _ in (dense, slim)}
    with use_backend("auto"):
        counts = {name: counted(model, inputs[name][:1]) for name, model, _ in (dense, slim)}
    try:
        calls = {name: caller(model, inputs[name], settings) for name, model, _ in (dense, slim)}
        seconds = clock(settings.device)
        with recorded_kernels() as kernels:
            seconds(calls[slim[0]])
        seconds(calls[dense[0]])
        a_pair = sum(seconds(call) for call in calls.values())
        repeats = settings.repeats or min(max(math.ceil(SECONDS / a_pair), 5), 30)
        done = iter(range(1, repeats + 1))

        def after_round() -> None:
            advance(f"{repeats} pairs of timed runs", 0.15 + 0.75 * next(done) / repeats)

        times = interleaved(calls, repeats, seconds, after_round)
    except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
        raise CommandError(str(error)) from None
    one, other = (
        Side(name, weights, *counts[name], Spread.of([1e3 * t / settings.batch for t in times[name]]))
        for name, _, weights in (dense, slim)
    )
    return Findings(one, other, ratio(times[dense[0]], times[slim[0]]), repeats, kernels)


@torch.inference_mode()
def top5(model: nn.Module, x: Tensor) -> list[tuple[str, ...]]:
    from timm.data import ImageNetInfo

    names = ImageNetInfo()
    rows = []
    for i, p in enumerate(model(x).softmax(dim=-1)):
        best = p.topk(min(5, len(p)))
        labels = [names.index_to_description(int(j)) if len(p) == 1000 else f"class {int(j)}" for j in best.indices]
        rows.append(
            (f"photograph {i + 1}", *(f"{v:.0%} {label.split(',')[0]}" for v, label in zip(best.values, labels)))
        )
    return rows


def summary(found: Findings) -> str:
    speedup, flops = found.speedup.median, found.flop_ratio
    return (
        f"{found.slim.name}: {speedup:.2f}x as fast as {found.dense.name} with {flops:.2f}x fewer FLOPs"
        f" (realised: {speedup / flops:.2f})"
    )


def weights_note(found: Findings) -> str:
    random = [side.name for side in (found.dense, found.slim) if not side.weights]
    if not random:
        return f"weights: {found.dense.name} {found.dense.weights}, {found.slim.name} {found.slim.weights}"
    note = f"random weights ({', '.join(random)}): speed and FLOPs hold"
    return note + (", the overlay is only illustrative" if found.slim.name in random else "")


def table(found: Findings) -> list[tuple[str, ...]]:
    dense, slim, speedup = found.dense, found.slim, found.speedup

    def both(title: str, show: Callable[[Side], str], last: str = "") -> tuple[str, ...]:
        return title, show(dense), show(slim), last

    return [
        both("", lambda s: s.name, "ratio"),
        both("tokens x blocks", lambda s: stages(s.tokens)),
        both("GMACs an image (GFLOPs / 2)", lambda s: f"{s.macs / 1e9:.2f}", f"{found.flop_ratio:.2f}"),
        both("parameters", lambda s: f"{s.parameters / 1e6:.1f} M", f"{dense.parameters / slim.parameters:.2f}"),
        both("ms an image", lambda s: quartiles(s.ms), quartiles(speedup)),
        both("images a second", lambda s: quartiles(s.images_per_second)),
        both("realised: speed-up / FLOP ratio", lambda s: "", f"{speedup.median / found.flop_ratio:.2f}"),
    ]


def remarks(found: Findings) -> str:
    kernels = ", ".join(backends(found.kernels)) or "plain PyTorch (the reference), no tokenops kernel ran"
    lines = [
        f"Medians of {found.repeats} interleaved pairs, quartiles in brackets; the same attention on both sides.",
        f"Backends: {kernels}",
    ]
    if found.speedup.high - found.speedup.low > UNSTEADY * found.speedup.median:
        lines.append("The times vary much: this machine was busy with something else, so take the ratio with care.")
    return "\n".join(lines)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """advance(what, fraction): a bar on stderr where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda what, fraction: None
        return
    parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)
