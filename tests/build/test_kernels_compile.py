"""Every Triton kernel compiles for every architecture: no spills, within shared memory, on the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resources import CASES, SHARED_LIMIT, TARGETS

SCRIPT = Path(__file__).parents[2] / "benchmarks/resources.py"


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, tmp_path_factory):
    """All kernels for one architecture, compiled in a process that does not interpret."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    run = subprocess.run([sys.executable, SCRIPT, str(request.param)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    return request.param, [json.loads(line) for line in run.stdout.splitlines()]


def test_resources(compiled):
    capability, rows = compiled
    assert {row["operator"] for row in rows} == set(CASES)
    for row in rows:
        assert row["spills"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[capability], f"too much shared memory: {row}"
        assert row["registers"] * row["warps"] * 32 <= 65536, f"too many registers for one block: {row}"


def test_matrix_units(compiled):
    """In bf16 every matrix product of a DeiT-S layer runs on the architecture's own matrix instructions."""
    capability, rows = compiled
    moving = ("select_tokens", "restore_tokens", "merge_neighbours", "merge_bipartite", "unmerge_bipartite")
    kernels = [r for r in rows if r["operator"] not in moving and r["dtype"] == "bf16"]
    assert all(r["mma"] for r in kernels)
    if capability == 90:
        large = [
            r
            for r in kernels
            if r["case"] in ("N196-M98-C384", "M98-N196-C384", "M197-N197-D64-64-class", "N196-D64-r13")
        ]
        assert {r["operator"] for r in large} == {
            "soft_aggregate",
            "token_mlp",
            "masked_channel_attention",
            "match_bipartite",
        }
        assert all(r["matrix"] for r in large), [r for r in large if not r["matrix"]]
