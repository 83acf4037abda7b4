"""Every Triton kernel compiles for sm_90: within shared memory and registers, its products on the matrix unit.

Spills are facts of one compiler version: `make resources` compares them with its table.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tokenops._triton
from kernel_cases import PRODUCTS, SHARED_LIMIT

SCRIPT = Path(__file__).parents[2] / "benchmarks/kernel_cases.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A row a kernel, in bf16 and DeiT-S's sizes, compiled in a process that does not interpret."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_once(compiled):
    package = tokenops._triton
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert sorted(row["kernel"] for row in compiled) == sorted(kernels)


def test_blocks_fit(compiled):
    for row in compiled:
        assert row["shared"] <= SHARED_LIMIT[row["sm"]], f"too much shared memory: {row}"
        assert 0 < row["registers"] * row["warps"] * 32 <= 65536, f"too many registers for one block: {row}"


def test_matrix_unit(compiled):
    """Every matrix product of a DeiT-S layer runs on Hopper's own instructions."""
    kernels = [row for row in compiled if row["operator"] in PRODUCTS]
    assert {row["operator"] for row in kernels} == set(PRODUCTS)
    assert [row["kernel"] for row in kernels if not row["matrix"]] == []
