"""What the tests of emulated kernels share: the builds with sanitizers, and the process that they run in."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parents[1] / "emulation"
CXX = shutil.which("g++")
FLAGS = (
    "-std=c++17 -O0 -g1 -Wall -Wextra -Wno-unknown-pragmas -shared -fPIC -fvisibility=hidden"
    " -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
).split()

needs_compiler = pytest.mark.skipif(CXX is None, reason="needs g++ and its sanitizers")

#: where the seeds of all runs begin: other orders of warps and lanes
SEED = int(os.environ.get("TOKENOPS_EMULATION_SEED", "0"))
LAYOUTS = ("0", "channels first", "8", "rows apart")  # as driver.py lays arrays
MULTIPROCESSORS = (1, 2, 8, 132)


def included(source):
    """The file and all that it includes by quotes."""
    found, waiting = [], [source.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.append(file)
            waiting += [(file.parent / name).resolve() for name in re.findall(r'#include "(.+)"', file.read_text())]
    return found


def compiled(source, folder):
    """The library of a source file: built once for all processes and sessions that share the folder."""
    version = subprocess.check_output([CXX, "--version"], text=True)
    key = hashlib.sha256(repr((version, FLAGS)).encode())
    for file in included(source):
        key.update(file.read_bytes())
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    with open(folder / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for older in folder.glob(f"{source.stem}-*"):
                older.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as half:
                made = Path(half) / library.name
                done = subprocess.run([CXX, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                made.rename(library)
    return library


def sanitized():
    """The environment of a process that loads such libraries."""

    def library(name):
        return subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()

    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class Emulation:
    """What the fixture `emulate` is."""

    def __init__(self, builds, folder):
        self.builds, self.folder = builds, folder

    def process(self, module, function, *arguments):
        command = [sys.executable, HERE / "driver.py", compiled(HERE / f"{module}.cpp", self.builds), function]
        return subprocess.run([*map(str, command + list(arguments))], env=sanitized(), capture_output=True, text=True)

    def __call__(self, operator, arrays, runs):
        """What driver.py's function of that name made of the arrays."""
        source, target = self.folder / "in.npz", self.folder / "out.npz"
        np.savez(source, runs=json.dumps(runs), **arrays)
        done = self.process(operator, operator, source, target)
        if done.returncode:
            began = [line for line in done.stderr.splitlines() if line.startswith("run ")]
            pytest.fail(f"{repeat()}: {operator}, {began[-1:]}\n{done.stderr[-4000:]}")
        return np.load(target)


def repeat():
    return f"TOKENOPS_EMULATION_SEED={SEED}"


@contextlib.contextmanager
def told(*what):
    """An assertion that fails within says what of, and with which seeds."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{repeat()}: {what}\n{error}") from error


def bits(tensor):
    """As numpy has it: bfloat16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensor(array):
    return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)
