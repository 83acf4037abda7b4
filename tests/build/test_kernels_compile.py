"""Every Triton kernel compiles for sm_90: within shared memory and registers, its products on the matrix unit.

Spills are facts of one compiler version: `make resources` compares them with its table.
"""

import importlib
import json
import pkgutil
from functools import partial

import pytest

import kernel_cases
import resources
import tokenops.ops.triton
from kernel_cases import PRODUCTS, SHARED_LIMIT
from resources import Row, read
from support.process import python


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Runs a process that compiles and does not interpret."""
    return partial(python, TRITON_CACHE_DIR=tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiled(real):
    """A row a kernel, in bf16 and DeiT-S's sizes."""
    return [json.loads(line) for line in real(kernel_cases.__file__).splitlines()]


def test_every_kernel_once(compiled):
    package = tokenops.ops.triton
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
    assert [row["matrix"] for row in compiled if row["kernel"] == "match_packed_kernel"] == [True]


NUMBERS = """
from kernel_cases import QUICK, launches
done = set()
for operator, case in QUICK:
    for one in launches(operator, case, "bf16", 90, done):
        for name, kind in one.binary.src.signature.items():
            if kind in ("fp32", "fp64"):
                print(one.kernel, name, kind)
"""


def test_numbers_are_taken_in_fp64(compiled, real):
    """An eps of fp64 tokens too: compiled, a float is fp32 unless the kernel says more (interpreted it is not)."""
    numbers = [line.split() for line in real("-c", NUMBERS).splitlines() if line]
    assert ["select_tokens_fwd_kernel", "eps", "fp64"] in numbers and len(numbers) > 8
    assert [n for n in numbers if n[2] != "fp64"] == []


@pytest.mark.slow
def test_the_tool_compiles_what_it_is_asked_for(compiled, real, tmp_path):
    out = tmp_path / "part.json"
    options = "--operators restore_tokens --targets 90 --dtypes bf16 --workers 1 --out".split()
    real(resources.__file__, *options, out)
    rows, whole = read(out)
    passes = [f"restore_tokens_{direction}_kernel" for direction in ("bwd", "fwd")]
    cases = ("N196-k98-C384", "N576-k288-C193")
    assert sorted(rows) == [Row("restore_tokens", case, kernel, "bf16", 90) for case in cases for kernel in passes]
    assert not whole
    once = {row["kernel"]: row for row in compiled}
    for row, values in rows.items():
        if row.case == cases[0]:
            assert values == {name: once[row.kernel][name] for name in values}
