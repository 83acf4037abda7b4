"""What a training tells: a bar and a line an epoch on stderr, a CSV file, TensorBoard."""

import csv
import io
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoint import write
from .evaluation import Totals

LOG = "log.csv"
NAMED = 10  # images that could not be read, in a line


class Report:
    """Of the main process; on others nothing is done.

    Args:
        output: the folder of the log, or None.
        main: whether this is the main process.
        progress: whether there is a bar and a line.
        tensorboard: whether to log for it, too.

    Raises:
        ImportError: ``tensorboard``, but it is not installed.
        ValueError: ``tensorboard`` without ``output``.
    """

    def __init__(self, output: Path | None, main: bool, progress: bool, tensorboard: bool) -> None:
        self.output, self.main, self.progress = output, main, main and progress
        self.bar: Any = None
        self.writer: Any = None
        if tensorboard and output is None:
            raise ValueError("tensorboard=True needs output, the folder of its files")
        if tensorboard and main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as missing:
                raise ImportError("tensorboard=True needs one more package: pip install tensorboard") from missing
            self.writer = SummaryWriter(str(output))

    def __enter__(self) -> "Report":
        if self.progress:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            except ImportError:
                return self
            console = Console(stderr=True)
            if not console.is_terminal:
                return self
            parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*parts, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=1.0)
            self.loss = ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, epoch: int, epochs: int, fraction: float, totals: Totals) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=f"epoch {epoch + 1}/{epochs}{self.loss}", completed=fraction)

    def epoch(self, row: dict[str, float], epochs: int, history: Any) -> None:
        """A row is complete: the whole log is written anew, so that a resumed run has no row twice."""
        if not self.main:
            return
        self.loss = f" loss {row['loss']:.3f}"
        number = int(row["epoch"])
        if self.progress:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
            self.line(f"epoch {number + 1}/{epochs}: {numbers}")
        names = history.skipped.get(number, [])
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            self.line(f"epoch {number + 1}: {len(names)} unreadable images: {', '.join(names[:NAMED])}{more}")
        if self.output is not None:
            text = io.StringIO()
            columns = list(dict.fromkeys(name for each in history.rows for name in each))
            log = csv.DictWriter(text, columns, lineterminator="\n")
            log.writeheader()
            log.writerows(history.rows)
            write(self.output / LOG, text.getvalue())
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, value, number)
            self.writer.flush()
