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


def die_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(
    command: Sequence[str], env: Mapping[str, str] | None = None, nice: int = 0, group: bool = False
) -> subprocess.Popen:
    """A process that is killed with its parent, in a group of its own or its parent's; its output goes to GPU_LOG."""
    parent = os.getpid()

    def before() -> None:
        if group:
            os.setpgid(0, 0)
        die_with_parent()
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)
        os.nice(nice)

    with Path(os.environ.get("GPU_LOG", os.devnull)).open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command, cwd=ROOT, env=env or environment(), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            preexec_fn=before,
        )  # fmt: skip


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def shorten(path: Path, most: int = 12 * 2**20) -> None:
    """Leaves out the middle of a file that is longer: what is brought back may be so long only."""
    if path.exists() and path.stat().st_size > most:
        with path.open("r+b") as file:
            head = file.read(most // 4)
            file.seek(most // 4 - most, os.SEEK_END)
            text = head + b"\n[...]\n" + file.read()
            file.seek(0)
            file.write(text)
            file.truncate()


def kill(process: subprocess.Popen) -> None:
    """Its whole group, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
