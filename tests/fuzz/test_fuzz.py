"""Random calls of every public operator on every backend against the oracle; TOKENOPS_FUZZ_SEED makes others."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fuzz import suite
from fuzz.operators import CALLS
from support import emulation
from support.compiled import needs_compiled
from tokenops.ops import backends

ROOT = Path(__file__).parents[2]
#: calls of each operator: (in every run, in the long one)
COUNTS = {"native": (30, 540), "reference": (9, 130), "triton": (2, 20)}
BACKENDS = [pytest.param(b, marks=needs_compiled if b == "native" else ()) for b in COUNTS]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def run(capsys, request):
    """Calls are made through it; at the end it says how many, and fails where one was wrong."""
    made = suite.Run()
    yield made
    with capsys.disabled():
        print(f"\n{made.summary(request.node.name)}")


def test_every_operator_is_here():
    assert set(backends.TABLE) - {"match_packed", "sum_rows"} <= set(CALLS)  # which have no names of their own


@pytest.mark.parametrize("path", BACKENDS)
def test_calls(path, run):
    suite.many(run, path, COUNTS[path][0])
    assert run.calls == len(CALLS) * COUNTS[path][0] and len(run.made) == len(CALLS)
    run.verdict()


@pytest.mark.parametrize("path", BACKENDS)
def test_refusals(path, run):
    for operator in CALLS:
        for seed in range(suite.SEED, suite.SEED + 24):
            run.refusal(path, operator, seed)
    assert run.calls > 100 and len(run.made) == len(CALLS)
    run.verdict()


@needs_compiled
def test_threads(run):
    suite.in_threads(run, "native", 2)
    assert run.calls == 2 * len(CALLS)
    run.verdict()


@needs_compiled
@pytest.mark.parametrize("operator", ["soft_scatter", pytest.param("all", marks=pytest.mark.slow)])
def test_compiled(operator, run):
    """torch.compile(fullgraph=True); the tome functions choose their result in Python."""
    operators = [o for o in CALLS if o != "tome"] if operator == "all" else [operator]
    suite.many(run, "native", 6 if operator == "all" else 2, "compiled", operators)
    run.verdict()


@pytest.mark.slow
@pytest.mark.parametrize("path", BACKENDS)
def test_many_calls(path, run):
    """With the sanitized ones at least 10,000."""
    suite.many(run, path, COUNTS[path][1], first=1000)
    assert run.calls == len(CALLS) * COUNTS[path][1]
    run.verdict()


SANITIZED = 160


def test_enough_calls():
    assert sum(quick for quick, _ in COUNTS.values()) * len(CALLS) >= 490
    assert (sum(many for _, many in COUNTS.values()) + SANITIZED) * len(CALLS) >= 10_000


@emulation.needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="tiles are of x86")
def test_tiles_in_memory_compile():
    """What the sanitized package needs, which is built in long runs alone."""
    command = [emulation.CXX, "-std=c++17", "-fsyntax-only", "-DTOKENOPS_EMULATED_TILES", "-x", "c++", "-include"]
    done = subprocess.run([*command, ROOT / "csrc" / "cpu" / "tiles.h", "/dev/null"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def sanitized_package(tmp_path_factory):
    """A folder with tokenops whose compiled CPU code has AddressSanitizer and UBSan in it, and tiles in memory."""
    folder = tmp_path_factory.mktemp("sanitized")
    torch_folder = Path(torch.__file__).parent
    flags = (
        "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -fsanitize=address,undefined -fno-sanitize-recover=all".split()
    )
    defined = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTOKENOPS_EMULATED_TILES"]
    command = [emulation.CXX, *flags, *defined, f"-I{torch_folder / 'include'}"]

    def run(*arguments):
        done = subprocess.run([str(a) for a in (*command, *arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run("-c", source, "-o", folder / f"{source.name}.o"), sources))
    shutil.copytree(ROOT / "tokenops", folder / "tokenops", ignore=shutil.ignore_patterns("_C*"))
    link = ["-shared", f"-L{torch_folder / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch"]
    run(*sorted(folder.glob("*.o")), *link, "-o", folder / "tokenops" / "_C.abi3.so")
    return folder


@pytest.mark.slow
@needs_compiled
@emulation.needs_compiler
def test_sanitized(sanitized_package):
    """The compiled CPU operators, called under AddressSanitizer."""
    command = [sys.executable, "-m", "fuzz", "native", "all", str(SANITIZED)]
    path = os.pathsep.join(map(str, (sanitized_package, ROOT / "tests")))
    environment = emulation.sanitized() | {"PYTHONPATH": path, "TOKENOPS_FUZZ_SEED": str(suite.SEED + 5000)}
    done = subprocess.run(command, env=environment, cwd=sanitized_package, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"{SANITIZED * len(CALLS)} calls" in done.stdout


def test_a_planted_fault_is_seen(monkeypatch):
    """A result that is off by little, an input that is written to, a byte beside it: the check can fail."""
    from fuzz import ways

    plain = ways.eager
    for fault in ("value", "input", "beside"):

        def faulty(call, api, tensors, subset, upstream):
            results, gradients = plain(call, api, tensors, subset, upstream)
            if fault == "value":
                results["y"] = results["y"] * 1.001
            else:
                x = tensors["x"]
                storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                (x if fault == "input" else storage[: x.storage_offset()]).fill_(0.5)
            return results, gradients

        found = []
        for seed in range(60):
            check = suite.Check("reference", "unmerge_neighbours", seed, 9, "eager")
            x = check.call.tensors["x"]
            if x.dtype != torch.float64 or x.numel() < 8 or (fault == "beside" and x.storage_offset() == 0):
                continue
            monkeypatch.setitem(ways.WAYS, "eager", faulty)
            with pytest.raises(AssertionError):
                check.run()
            found.append(seed)
        assert found, fault
