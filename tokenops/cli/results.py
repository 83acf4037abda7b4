"""What `eval`, `bench` and `slim` do with calls and rows: time them in turn, show a table, write a file."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import CommandError, columns
from .patched import Running
from .timing import clock, interleaved

LEAST, MOST = 5, 50  # rounds of timing
FORMATS = (".csv", ".json")


def caller(model: nn.Module, x: Tensor, how: Running) -> Callable[[], Any]:
    """A call of the model on images, both in their place already."""

    def call() -> Any:
        with torch.inference_mode(), how.autocast():
            return model(x)

    return call


def timed(
    calls: Mapping[str, Callable[[], Any]],
    how: Running,
    repeats: int | None,
    seconds: float,
    advance: Callable[[float], Any] = lambda fraction: None,
) -> dict[str, list[float]]:
    """Seconds of every call in each of the interleaved rounds, so many of them or as fit into the seconds."""
    of = clock(how.device.type)
    for call in calls.values():  # compiles, tunes, allocates
        call()
    one = sum(of(call) for call in calls.values())
    rounds = repeats or min(max(math.ceil(seconds / one), LEAST), MOST)
    done = iter(range(1, rounds + 1))
    return interleaved(calls, rounds, of, lambda: advance(next(done) / rounds))


def show(rows: Sequence[Sequence[str]]) -> None:
    """A table, the first row its header: drawn by rich on a terminal, else plain text, of which nothing is cut off."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(columns(rows))
        return
    console = Console()
    if not console.is_terminal or console.width < len(columns(rows).split("\n")[0]) + 3 * len(rows[0]):
        print(columns(rows))
        return
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def check_output(path: Path | None) -> None:
    """Raises CommandError where no results could be written, before anything is measured."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise CommandError(f"--output {path}: the name must end in {' or '.join(FORMATS)}")
    make_folder(path, "--output")


def make_folder(path: Path, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{flag}: cannot write {path}: {error}") from None


def save(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON: the facts, and the rows under "rows". CSV: a line a row, the facts in each."""
    try:
        if path.suffix.lower() == ".json":
            path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*facts, *rows[0]])
            writer.writeheader()
            writer.writerows({**facts, **row} for row in rows)
    except OSError as error:
        raise CommandError(f"--output: cannot write {path}: {error}") from None
