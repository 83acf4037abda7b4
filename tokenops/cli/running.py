"""What the commands share that measure: where a model runs, timing in turn, the words and files of the results."""

import argparse
import contextlib
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measuring import machine
from ..measuring.timing import Spread, clock, interleaved, recorded_kernels
from . import CommandError, count_of, make_folder, paragraph

LEAST, MOST = 5, 50  # rounds of timing
UNSTEADY = 0.25  # quartiles that lie further apart than this part of the median call for a warning
FORMATS = (".csv", ".json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Running(NamedTuple):
    """Where and in what a model runs."""

    device: torch.device
    dtype: torch.dtype  # of weights and images
    amp: torch.dtype | None  # of autocast
    channels_last: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context a model is called in."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)

    def placed(self, value: Any) -> Any:
        """A model or images on the device, in the dtype."""
        layout = {"memory_format": torch.channels_last} if self.channels_last else {}
        return value.to(device=self.device, dtype=self.dtype, **layout)

    def copied(self, model: Any) -> Any:
        """A copy of a model there; the model stays where it is."""
        return self.placed(deepcopy(model))

    def call(self, model: Any, x: Tensor) -> Callable[[], Any]:
        """A call of a model on images, both in their place already."""

        def call() -> Any:
            with torch.inference_mode(), self.autocast():
                return model(x)

        return call

    def where(self, *more: str) -> str:
        """The line of a report that says what the numbers are of."""
        threads = [count_of(torch.get_num_threads(), "thread")] if self.device.type == "cpu" else []
        return ", ".join((machine.device_name(self.device.type), str(self), *more, *threads))

    def __str__(self) -> str:
        name = str(self.dtype)[6:]
        return f"{name}, autocast to {str(self.amp)[6:]}" if self.amp else name


def add_running_arguments(parser: argparse.ArgumentParser, dtype: bool = True) -> None:
    """--device, --amp, and with `dtype` --dtype."""
    add = parser.add_argument_group("running").add_argument
    add("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda where there is a GPU, else cpu)")
    add("--amp", action="store_true", help="autocast to --amp-dtype")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    if dtype:
        add("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and images (default: %(default)s)")
    add("--channels-last", action="store_true", help="images in channels-last layout")


def running(args: argparse.Namespace) -> Running:
    """--device, --dtype and --amp, checked."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}, but it must be cpu, cuda or cuda with a number: cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name} was asked for, but torch sees {torch.cuda.device_count() or 'no'} GPU")
    dtype = getattr(args, "dtype", "float32")
    if args.amp and dtype != "float32":
        raise CommandError(f"--amp and --dtype {dtype}: autocast is for float32 weights, so take one of the two")
    if device.index is not None:
        torch.cuda.set_device(device)
    return Running(device, DTYPES[dtype], DTYPES[args.amp_dtype] if args.amp else None, args.channels_last)


class Times(NamedTuple):
    """Seconds of every model in each of the interleaved rounds, and the kernels that ran."""

    seconds: dict[str, list[float]]
    kernels: set[str]

    def ms(self, name: str, images: int) -> Spread:
        """Milliseconds an image."""
        return Spread.of([1e3 * seconds / images for seconds in self.seconds[name]])


def timed(
    models: Mapping[str, Any],
    x: Tensor,
    how: Running,
    repeats: int | None,
    budget: float,
    advance: Callable[[float], Any] = lambda fraction: None,
) -> Times:
    """Models on the same images in turn, so many rounds or as fit into the seconds of the budget; all in their place.

    Raises CommandError: out of memory, or a backend that was asked for and cannot run.
    """
    of = clock(how.device.type)
    calls = {name: how.call(model, x) for name, model in models.items()}
    watched = not any(hasattr(model, "_orig_mod") for model in models.values())  # what is compiled cannot be watched
    try:
        with contextlib.ExitStack() as stack:
            kernels = stack.enter_context(recorded_kernels()) if watched else set()
            for call in calls.values():  # compiles, tunes, allocates
                call()
        one = sum(of(call) for call in calls.values())
        rounds = repeats or min(max(math.ceil(budget / one), LEAST), MOST)
        done = iter(range(1, rounds + 1))
        return Times(interleaved(calls, rounds, of, lambda: advance(next(done) / rounds)), kernels)
    except RuntimeError as error:
        raise CommandError(str(error)) from None


# ---- words


def quartiles(value: Spread, most: int = 9) -> str:
    """12.3 (12.1..12.9), behind the point as many digits as make three, at most so many."""
    digits = min(max(0, 2 - math.floor(math.log10(value.median))), most)
    return "{:.{d}f} ({:.{d}f}..{:.{d}f})".format(*value, d=digits)


def stages(tokens: Sequence[int]) -> str:
    """[197, 99, 99] -> "197 x 1, 99 x 2"; where all differ they are named."""
    different = list(dict.fromkeys(tokens))
    if len(different) == len(tokens):
        return ", ".join(map(str, tokens)) or "unknown"
    return ", ".join(f"{n} x {tokens.count(n)}" for n in different)


def remarks(times: Times, speedups: Sequence[Spread]) -> str:
    """What stands below a table of times."""
    rounds = len(next(iter(times.seconds.values())))
    lines = [f"Medians of {rounds} interleaved rounds, quartiles in brackets; realised: speed-up / FLOP ratio."]
    lines.append(f"Backends: {backends(times.kernels)}")
    if any(speedup.high - speedup.low > UNSTEADY * speedup.median for speedup in speedups):
        lines.append("The times vary much: this machine was busy with something else, so take them with care.")
    return "\n".join(map(paragraph, lines))


def backends(kernels: set[str]) -> str:
    """{"soft_aggregate_fwd.native"} -> "native (soft_aggregate)"."""
    found: dict[str, set[str]] = {}
    for kernel in kernels:
        found.setdefault(kernel.split(".")[-1], set()).add(kernel.split("_fwd")[0].split(".")[0])
    words = [f"{backend} ({', '.join(sorted(names))})" for backend, names in sorted(found.items())]
    return "; ".join(words) or "plain PyTorch (the reference), no tokenops kernel ran"


# ---- files


def check_output(path: Path | None) -> None:
    """Raises CommandError where no results could be written, before anything is measured."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise CommandError(f"--output {path}: the name must end in {' or '.join(FORMATS)}")
    make_folder(path)


def spelled(values: Mapping[str, Spread]) -> dict[str, float]:
    """Medians under their names, and quartiles behind them."""
    found: dict[str, float] = {}
    for name, value in values.items():
        found |= {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
    return found


def save(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON: the facts, and the rows under "rows". CSV: a line a row, the facts in each."""
    try:
        if path.suffix.lower() == ".json":
            path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*facts, *rows[0]])
                writer.writeheader()
                writer.writerows({**facts, **row} for row in rows)
    except OSError as error:
        raise CommandError(f"--output: cannot write {path}: {error}") from None
    print(f"\nResults: {path}")
