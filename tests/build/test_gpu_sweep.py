"""The sweep of launch configurations rehearsed, resumed, and what it makes of its lines; kernels compiled ahead."""

import json

import pytest
import torch

pytest.importorskip("triton")

from gpu import candidates, kernels, results, sweep
from gpu.record import FAILED, OK, Lines
from kernel_cases import CASES, case_names
from support.process import python
from tokenops.ops.triton import launches

GROUP = candidates.Group("soft_aggregate_fwd", candidates.TINY, "bf16")


def step(*arguments, lines, **environment):
    return python(*arguments, GPU_LINES=lines, **environment)


# Lines of a sweep.


@pytest.fixture
def found(tmp_path):
    return Lines(tmp_path / "lines.jsonl", "sweep")


def test_a_rehearsal_is_resumed(found):
    rehearse = ("cpu", ["bf16"], ["soft_aggregate_fwd", "token_mlp_fwd"], found)
    sweep.run(*rehearse)
    before = found.read()
    groups = [candidates.Group(kernel, candidates.TINY, "bf16") for kernel in rehearse[2]]
    assert [line["key"] for line in before] == [group.key(c) for group in groups for c in group.candidates[:2]]
    assert all(line["outcome"] == OK and line["us"] > 0 and line["default_us"] > 0 for line in before)
    missing = before.pop(1)
    before[0]["outcome"] = FAILED  # which is not tried again either
    found.path.write_text("".join(json.dumps(line) + "\n" for line in before))
    sweep.run(*rehearse)
    assert found.read()[:-1] == before and found.read()[-1]["key"] == missing["key"]


@pytest.mark.slow
def test_a_whole_rehearsal(found):
    step("-m", "gpu.sweep", "--device", "cpu", lines=found.path, TRITON_INTERPRET=None)
    assert [line["kernel"] for line in found.read()] == [kernel for kernel in candidates.KERNELS for _ in range(2)]
    assert {line["outcome"] for line in found.read()} == {OK}


def test_a_sweep_goes_on_behind_a_failure(found):
    sweep.sweep(GROUP, [{}, {"BLOCK_N": 48}, {"BLOCK_N": 32}], "cpu", found)
    default, failed, other = found.read()
    assert [default["outcome"], failed["outcome"], other["outcome"]] == [OK, FAILED, OK]
    assert "BLOCK_N cannot be 48" in failed["message"] and failed["launch"] == {"BLOCK_N": 48}
    assert other["key"] == "soft_aggregate_fwd bf16 B2 N6 M4 C8 BLOCK_N=32"


def test_a_gpu_that_is_lost_ends_the_process(found, monkeypatch):
    def lost(clock):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("timers.Clock.check", lost)
    with pytest.raises(SystemExit) as ended:
        sweep.sweep(GROUP, [{"BLOCK_N": 48}, {"BLOCK_N": 32}], "cpu", found)
    assert ended.value.code == 3 and [line["outcome"] for line in found.read()] == [FAILED]


@pytest.mark.parametrize("spoil", (lambda y: y.mul_(1.05), lambda y: y[0, 0, 0].fill_(float("nan"))))
def test_another_result_is_a_failure(found, monkeypatch, spoil):
    original = candidates.Group.launched

    def launched(group, call, candidate, **options):
        made = original(group, call, candidate, **options)
        if candidate == {"BLOCK_N": 32}:
            spoil(made.outputs[0])
        return made

    monkeypatch.setattr(candidates.Group, "launched", launched)
    sweep.sweep(GROUP, [{}, {"BLOCK_N": 32}, {"BLOCK_N": 64}], "cpu", found)
    assert [line["outcome"] for line in found.read()] == [OK, FAILED, OK]
    assert "result 0 differs from the default configuration's" in found.read()[1]["message"]


def test_what_was_not_written_is_a_failure(found, monkeypatch):
    """Though memory that is handed out again may hold the right numbers."""
    from tokenops.ops.triton import soft_aggregate

    original = soft_aggregate.triton.cdiv
    monkeypatch.setattr(soft_aggregate.triton, "cdiv", lambda size, block: 0 if block == 64 else original(size, block))
    size = candidates.TINY._replace(B=1, M=70)
    sweep.sweep(GROUP._replace(size=size), [{}, {"BLOCK_M": 64}], "cpu", found)
    assert [line["outcome"] for line in found.read()] == [OK, FAILED]


def test_the_launch_that_is_timed():
    """Both passes are one kernel; the sum of what its programs leave of b1's gradient belongs to the work."""
    group = candidates.Group("token_mlp_bwd", candidates.TINY, "bf16")
    made = group.launched(group.prepared("cpu"), {})
    launch, added = made.again.args
    assert launch.keywords["BACKWARD"]
    torch.testing.assert_close(added().to(torch.bfloat16), made.outputs[2])


# The table that lines make.

ENTRY = "sm_90 soft_aggregate_fwd bfloat16 many N256 M128 C512"


def line(us, launch, *, default_us=100.0, entry=ENTRY, outcome=OK, **values):
    values = {"spills": 0, **values} | ({"us": us, "default_us": default_us} if us else {})
    return {"step": "sweep", "key": "", "outcome": outcome, "gpu": 90, "entry": entry, "launch": launch, **values}


A, B, C = {"BLOCK_N": 64}, {"BLOCK_N": 64, "num_stages": 2}, {"num_warps": 4}


@pytest.mark.parametrize(
    "measured, chosen",
    (
        ([line(100.0, {}), line(90.0, A), line(80.0, B), line(85.0, C)], B),
        ([line(100.0, {}), line(97.5, A)], None),
        ([line(96.5, A)], A),
        ([line(50.0, {})], None),  # the default against itself
        ([line(90.0, A, default_us=91.0), line(95.0, B)], B),
        ([line(50.0, A, spills=8), line(95.0, B)], B),
        ([line(50.0, A, outcome=FAILED), line(95.0, B)], B),
        ([line(None, A, outcome=FAILED, message="out of resources")], None),
        ([line(80.0, A), line(99.0, A), line(95.0, B), line(94.0, B)], B),  # two sizes of one entry: the worse counts
        ([line(80.0, A), line(None, A, outcome=FAILED)], None),
        ([line(80.0, A) | {"gpu": None, "entry": None}], None),  # of a rehearsal
        ([line(80.0, A) | {"step": "bench"}], None),
    ),
)
def test_best(measured, chosen):
    for lines in (measured, measured[::-1]):
        table = results.launches(lines)
        assert table == ({} if chosen is None else {ENTRY: chosen})
        launches.parsed(table)


def test_best_by_entry_is_the_file():
    other = ENTRY.replace("sm_90", "sm_100").replace("many", "few")
    measured = [line(80.0, A), line(70.0, C, entry=other), line(90.0, C)]
    text = results.launches_text(results.launches(measured))
    assert text == f'{{\n"{other}": {{"num_warps": 4}},\n"{ENTRY}": {{"BLOCK_N": 64}}\n}}\n'


# Kernels compiled ahead.


def test_everything_is_compiled_ahead_once():
    jobs = list(kernels.jobs())
    assert len({job.key for job in jobs}) == len(jobs)
    keys = [job.key for job in jobs]
    assert keys[0] == "soft_aggregate N196-M98-C384 bf16" and keys.index("token_mlp M98-N196-C384 fp32") < 30
    cases = {(operator, name) for operator in CASES for name in case_names(operator)}
    for dtype in ("bf16", "fp32"):
        assert {(job.operator, job.name) for job in jobs if getattr(job, "dtype", None) == dtype} == cases
    tried = [job for job in jobs if isinstance(job, kernels.Candidate)]
    assert [(job.group, job.launch) for job in tried] == [(g, c) for g in candidates.groups() for c in g.candidates]
    assert tried == jobs[-len(tried) :]


#: compiles as a GPU's launch would: of tensors with memory, which is aligned as torch aligns it, or with `off` is not
LAUNCH = """
import sys
from unittest.mock import patch
import torch, kernel_cases
from gpu import candidates
from triton.runtime import driver
from triton.runtime.jit import JITFunction

def launch(kernel, grid):
    return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

def real(*shape, dtype=torch.bfloat16):
    size = torch.Size(shape).numel()
    return torch.empty(size + 1, dtype=dtype)[off:][:size].view(shape)

off = int("off" in sys.argv)
kernel_cases._meta = real
with patch.object(JITFunction, "__getitem__", launch), patch.object(driver, "_active", kernel_cases.PretendDriver(90)):
    next(iter(kernel_cases.CASES["restore_tokens"](torch.bfloat16)))[1]()
    group = candidates.Group("soft_aggregate_fwd", candidates.DEIT_S_ALONE, "bf16")
    group.launched(group.prepared("cpu"), group.candidates[1], compile_only=True)
"""

AHEAD = """
from gpu import candidates, kernels
group = candidates.Group("soft_aggregate_fwd", candidates.DEIT_S_ALONE, "bf16")
kernels.work(kernels.Candidate(group, group.candidates[1]), 90, False)
"""


@pytest.mark.slow
def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path):
    cache, lines = tmp_path / "cache", tmp_path / "lines.jsonl"

    def kept():
        return {str(file.relative_to(cache)): file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}

    step("-m", "gpu.kernels", "--device", "cpu", lines=lines, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="1")
    assert len([file for file in kept() if file.endswith(".cubin")]) == 2
    step("-c", AHEAD, lines=lines, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0")
    found = Lines(lines, "kernels").read()
    assert [one["outcome"] for one in found] == [OK, OK] and all(one["seconds"] > 0 for one in found)
    ahead = kept()
    assert len([file for file in ahead if file.endswith(".cubin")]) == 3
    step("-c", LAUNCH, lines=lines, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0")
    assert kept() == ahead
    step("-c", LAUNCH, "off", lines=lines, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0")
    assert kept() != ahead, "a launch that differs compiles: the comparison above can fail"


@pytest.mark.slow
def test_a_case_that_does_not_compile_is_a_line(tmp_path):
    found = tmp_path / "lines.jsonl"
    wrong = AHEAD.replace("group.candidates[1]", "{'BLOCK_N': 48}")
    step("-c", wrong, lines=found, TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_INTERPRET="0")
    (one,) = Lines(found, "kernels").read()
    assert one["outcome"] == FAILED and "BLOCK_N cannot be 48" in one["message"]
