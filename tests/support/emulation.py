"""What the tests of emulated kernels share: the build with sanitizers, and the process that they run in."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parents[1] / "emulation"
CXX = shutil.which("g++")
FLAGS = (
    "-std=c++17 -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -shared -fPIC -fvisibility=hidden"
    " -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
).split()


def build(source, folder):
    """Compiles the module; run(*arguments) of what is returned gives driver.py on it."""
    import pybind11

    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [CXX, *FLAGS, *include, str(HERE / source), "-o", str(folder / "emulated.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def library(name):
        return subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()

    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

    def run(*arguments):
        command = [sys.executable, str(HERE / "driver.py"), str(folder), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def bits(tensor):
    """As numpy has it: bfloat16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensor(array):
    return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)
