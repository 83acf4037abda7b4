"""What the run finds: one JSON line a result, on disk the moment it is there, whichever process found it."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

#: the outcome of a line: "ok" and "skipped" are not done again when a run is resumed, the others are; "started" says
#: that it was tried, and is followed by another line unless that ended the process
OK, FAILED, SKIPPED, STARTED = "ok", "failed", "skipped", "started"
LONGEST = 1500  # characters kept of a text


class Lines:
    """The file of lines, shared by all processes of a run.

    A line is {"step", "key", "outcome", "run", "t", ...}: which step found it, of what, how it ended, which run (its
    first line holds the machine's facts) and how many seconds after that began. It is appended whole under a lock; a
    line torn by a kill is closed by the next writer and passed over by readers.
    """

    def __init__(self, path: Path, step: str = "") -> None:
        self.path, self.step = Path(path), step

    def write(self, key: str, outcome: str = OK, **values: Any) -> dict[str, Any]:
        began = float(os.environ.get("GPU_BEGAN", time.time()))
        run = os.environ.get("GPU_RUN", "")
        line = {"step": self.step, "key": key, "outcome": outcome, "run": run, "t": round(time.time() - began, 2)}
        line |= {name: value[:LONGEST] if isinstance(value, str) else value for name, value in values.items()}
        text = (json.dumps(line) + "\n").encode()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                text = b"\n" + text
            os.write(file, text)
        finally:
            os.close(file)
        return line

    def read(self, step: str | None = None) -> list[dict[str, Any]]:
        """All lines (of a step), in the order they were written."""
        return [line for line in parsed(self.path)[0] if step is None or line["step"] == step]

    def done(self) -> set[str]:
        """Keys of this step that need not be done again."""
        return {line["key"] for line in self.read(self.step) if line["outcome"] in (OK, SKIPPED)}

    def compiled(self) -> set[str]:
        """As done, of runs that have compiled into the caches that are here: a machine of before had others."""
        cached = os.environ.get("GPU_CACHED", "").split()
        lines = [line for line in self.read(self.step) if line["run"] in cached]
        return {line["key"] for line in lines if line["outcome"] in (OK, SKIPPED)}

    def tried(self) -> set[str]:
        """Keys of this step that this run has begun with, however they ended."""
        return {line["key"] for line in self.read(self.step) if line["run"] == os.environ.get("GPU_RUN", "")}


def parsed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file, and how many of it are torn."""
    if not path.exists():
        return [], 0
    lines, torn = [], 0
    for text in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            torn += 1
    return lines, torn


def lines(step: str) -> Lines:
    """Those of the run this process belongs to: the file GPU_LINES."""
    return Lines(Path(os.environ["GPU_LINES"]), step)
