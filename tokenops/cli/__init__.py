"""The command line: `python -m tokenops info`, `demo`, `bench`, `slim`, `eval`, `fidelity` and `train`."""

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
    whole = text.replace(" x ", "\xa0x\xa0")  # 9 x 1 stays on a line
    return [
        (start if i == 0 else indent) + line.replace("\xa0", " ")
        for i, line in enumerate(textwrap.wrap(whole, room, break_long_words=False, break_on_hyphens=False) or [""])
    ]


def count_of(n: int, word: str) -> str:
    """1 image, 2 images."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def paragraph(text: str) -> str:
    """Text in lines of the width."""
    return "\n".join(wrapped("", text))


def make_folder(path: Path, flag: str = "--output") -> None:
    """The folder of a file that is to be written. Raises CommandError where it cannot be, before anything is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("ab"):  # nothing else says for certain whether it can be written
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{flag}: cannot write {path}: {error.strerror}") from None
