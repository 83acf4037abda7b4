"""The one progress bar, on stderr where that is a terminal."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """`with Bar() as advance: advance("warming up", 0.1)`. Elsewhere than on a terminal nothing is drawn."""

    def __init__(self, drawn: bool = True) -> None:
        self.console = Console(stderr=True)
        parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        disable = not (drawn and self.console.is_terminal)
        self.progress = Progress(*parts, console=self.console, transient=True, disable=disable)
        self.task = self.progress.add_task("", total=1.0)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, what: str, fraction: float) -> None:
        """What is being done, and how far all of it is."""
        self.progress.update(self.task, description=what, completed=fraction)

    def line(self, text: str) -> None:
        """A line of text above the bar, as it is."""
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
