"""The command line: `python -m tokenops info`, `demo`, `bench`, `slim`, `eval` and `train`."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

WIDTH = 80  # characters of a line, where its parts can be divided


class CommandError(Exception):
    """What was asked for cannot be done; the message is for the user."""


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows as lines of text whose columns line up; the last cell goes on below itself where the line is full."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        line = indent + "".join(cell.ljust(width + 2) for cell, width in zip(row[:-1], widths))
        lines += wrapped(line, row[-1], " " * len(line))
    return "\n".join(line.rstrip() for line in lines)


def wrapped(start: str, text: str, indent: str = "") -> list[str]:
    """Text behind a start, in lines of the width; words are never divided, and no line is left without one."""
    room = max(WIDTH - len(indent), 20)
    return [
        (start if i == 0 else indent) + line
        for i, line in enumerate(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""])
    ]


def paragraph(text: str) -> str:
    """Text in lines of the width."""
    return "\n".join(wrapped("", text))


def make_folder(path: Path, flag: str = "--output") -> None:
    """The folder of a file that is to be written. Raises CommandError where it cannot be, before anything is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{flag}: cannot write {path}: {error}") from None
    if path.is_dir():
        raise CommandError(f"{flag}: cannot write {path}: it is a folder")
