"""The command line: `python -m tokenops info`, `demo`, `segment`, `train`, `eval`, `bench` and `slim`."""

from collections.abc import Sequence


class CommandError(Exception):
    """What was asked for cannot be done; the message is for the user."""


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows as lines of text whose columns line up; nothing is lost when pasted."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)
