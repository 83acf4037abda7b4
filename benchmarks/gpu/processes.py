"""Processes of a run: none outlives the one that started it, however that ends."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1


def environment(**values: str) -> dict[str, str]:
    """This process's, with the repository's packages in front."""
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "benchmarks", ROOT / "tests"))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **values}


def start(
    command: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None, nice: int = 0
) -> subprocess.Popen:
    """A process in a group of its own that is killed with its parent; what it prints is appended to the log."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def before() -> None:
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)
        os.nice(nice)

    log = log or Path(os.environ.get("GPU_LOG", os.devnull))
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command, cwd=ROOT, env=env or environment(), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            preexec_fn=before,
        )  # fmt: skip


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def kill(process: subprocess.Popen) -> None:
    """Its whole group, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
