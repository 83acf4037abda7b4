"""Compiles what later steps compare with, in as many processes as there are spare cores; the caches are on disk."""

import importlib.util
import os
import sys

from . import options, sessions


def main() -> int:
    device = options(__doc__).device
    workers = min(10, (os.cpu_count() or 1) // 2)
    spread = ("-n", str(workers), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    only = ("-k", "M98-C384-forward and not backward") if device == "cpu" else ()
    every = ("--compile", "all") if device == "cpu" else ()  # a rehearsal's sizes have no compiled peers
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # of each, not as many as there are cores
    choice = ("--do", "compile", *spread, *only, *every)
    for files in (sessions.OPERATORS, (sessions.MODELS,)):
        sessions.run("peers", sessions.command("peers", device, *choice, *files, timeout=200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
