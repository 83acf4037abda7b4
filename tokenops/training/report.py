"""What a training tells: a bar and a line an epoch on stderr, a CSV file, TensorBoard."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..measuring.progress import Bar
from .checkpoint import write

LOG = "log.csv"
NAMED = 10  # images that could not be read, in a line


class Report:
    """Of the main process; on others nothing is done.

    Args:
        output: the folder of the log, or None.
        main: whether this is the main process.
        progress: whether there is a bar and a line; or what to call behind every update.
        tensorboard: whether to log for it, too.

    Raises:
        ImportError: ``tensorboard``, but it is not installed.
        ValueError: ``tensorboard`` without ``output``.
    """

    def __init__(
        self, output: Path | None, main: bool, progress: bool | Callable[[int, Tensor], object], tensorboard: bool
    ) -> None:
        self.call = progress if callable(progress) else None
        self.output, self.main, self.progress = output, main, main and self.call is None and bool(progress)
        self.bar, self.loss = Bar(drawn=self.progress), ""
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
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, value, trace)
        if self.writer is not None:
            self.writer.close()

    def advance(self, epoch: str, done: float, update: int, loss: Tensor) -> None:
        self.bar(f"{epoch}{self.loss}", done)
        if self.call is not None:
            self.call(update, loss)

    def epoch(self, row: dict[str, float], epochs: int, history: Any) -> None:
        """A row is complete: the whole log is written anew, so that a resumed run has no row twice."""
        if not self.main:
            return
        self.loss = f" loss {row['loss']:.3f}"
        number = int(row["epoch"])
        if self.progress:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
            self.bar.line(f"epoch {number + 1}/{epochs}: {numbers}")
        names = history.skipped.get(number, [])
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            self.bar.line(f"epoch {number + 1}: {len(names)} unreadable images: {', '.join(names[:NAMED])}{more}")
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
