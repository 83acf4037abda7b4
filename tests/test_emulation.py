"""The CUDA kernels, compiled for the host and run under AddressSanitizer and UBSan, on any machine."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import RESTORE, Restore

from tokenops import reference

HERE = Path(__file__).parent / "emulation"
CXX = shutil.which("g++")
FLAGS = (
    "-std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -shared -fPIC -fvisibility=hidden"
    " -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
).split()

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++ and its sanitizers")


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """emulate(*arguments) runs driver.py on the freshly compiled module."""
    import pybind11

    folder = tmp_path_factory.mktemp("emulation")
    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    build = [CXX, *FLAGS, *include, str(HERE / "module.cpp"), "-o", str(folder / "emulated.so")]
    done = subprocess.run(build, capture_output=True, text=True)
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


# The checks can fail: each planted bug is caught, and only there.


def test_barriers_shuffles_and_atomics(emulate):
    done = emulate("planted", 0)
    assert done.returncode == 0, done.stderr
    # 64 threads hold 1 each and the first warp sums them; 16 of its lanes vote; 3 runs
    assert json.loads(done.stdout) == [3 * (64 + 16)] * 32


BUGS = {
    1: "AddressSanitizer: heap-buffer-overflow",  # a global write behind the end
    2: "AddressSanitizer: heap-buffer-overflow",  # a shared one
    3: "runtime error: member access within misaligned address",
    4: "runtime error: signed integer overflow",
    5: "deadlock: the threads of a block wait at different places",
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(emulate, bug):
    done = emulate("planted", bug)
    assert done.returncode != 0 and BUGS[bug] in done.stderr


# The kernels


def last_of_equals(index, N):
    """The indices without those that replace nothing: out of range (-1 then), or repeated later."""
    index = torch.where((index >= 0) & (index < N), index, -1)
    later = torch.ones(index.shape[1], index.shape[1]).triu(1).bool()
    return torch.where(((index[:, :, None] == index[:, None, :]) & later).any(2), -1, index)


def test_restore_tokens(emulate, tmp_path):
    random = np.random.default_rng(0)
    long = Restore(1, 600, 300, 1, 1, False, "chunks as long as the kernel's table")
    cases = [(case, bad) for case in (*RESTORE, long) for bad in (False, True) if case.B and (case.k or not bad)]
    arrays, runs = {}, []
    for case, bad in cases:
        carried = case.carried * case.prefix
        for dtype in (np.float16, np.float32, np.float64):
            for layout in ("0", "2", "4", "8", "rows apart", "channels first"):
                # a shift must keep elements aligned; the odd layouts are run in one dtype of each case
                if layout.isdigit() and int(layout) % dtype().itemsize and layout != "0":
                    continue
                index = np.stack([random.permutation(case.N)[: case.k] for _ in range(case.B)]).astype(np.int64)
                if bad:
                    index = random.integers(-2, case.N + 3, (case.B, case.k))
                    index[:, 0] = (2**62, -(2**63), case.N)[len(runs) % 3]
                number = len(runs)
                shape = (case.B, case.prefix + case.N, case.C)
                arrays[f"base{number}"] = random.standard_normal(shape).astype(dtype)
                arrays[f"tokens{number}"] = random.standard_normal((case.B, carried + case.k, case.C)).astype(dtype)
                arrays[f"dy{number}"] = random.standard_normal(shape).astype(dtype)
                arrays[f"index{number}"] = index
                runs.append((carried, case.prefix, layout, (1, 2, 8, 132)[number % 4], number % 3))
    np.savez(tmp_path / "in.npz", runs=json.dumps(runs), **arrays)
    done = emulate("restore_tokens", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr[-4000:]

    results = np.load(tmp_path / "out.npz")
    for number, (_, prefix, *_) in enumerate(runs):
        names = (f"{name}{number}" for name in ("base", "tokens", "dy", "index"))
        base, tokens, dy, index = (torch.from_numpy(arrays[name]) for name in names)
        kept = last_of_equals(index, base.shape[1] - prefix)
        base.requires_grad_(), tokens.requires_grad_()
        y = reference.restore_tokens(base, tokens, kept, prefix=prefix)
        dbase, dtokens = torch.autograd.grad(y, (base, tokens), dy, materialize_grads=True)
        for name, expected in (("y", y.detach()), ("dbase", dbase), ("dtokens", dtokens)):
            ours = torch.from_numpy(results[f"{name}{number}"])
            assert torch.equal(ours, expected), f"{name} of {tuple(base.shape)} {base.dtype} {runs[number]}"
    assert {int(results[f"width{n}"]) for n in range(len(runs))} == {2, 4, 8, 16}  # every kernel has run
