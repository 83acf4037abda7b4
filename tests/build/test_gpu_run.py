"""The evidence run, rehearsed on this machine's processor: whole, resumed, killed in every step, and reported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("timm")

from gpu import plan, processes, record, results
from support.process import PATHS, ROOT

COMMAND = (sys.executable, "-m", "gpu", "--device", "cpu", "--out")


def environment(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_", "PYTEST_"))}
    return {**kept, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}


def rehearse(out, *arguments):
    done = subprocess.run(
        [*COMMAND, str(out), *arguments], cwd=ROOT, env=environment(out.parent), capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def whole_lines(out):
    """All lines of the file, each of which is whole."""
    text = (out / "lines.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def processes_of(out):
    """Of this run, by what they have in their environment."""
    mark, found = f"GPU_LINES={out.resolve() / 'lines.jsonl'}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:  # it has ended
            continue
    return found


def killed_in(step, out, first=None):
    """A rehearsal of one step, killed with its first line (or that of `first`); the lines it left."""
    process = subprocess.Popen(
        [*COMMAND, str(out), step], cwd=ROOT, env=environment(out.parent), stdout=subprocess.DEVNULL
    )
    lines, deadline = record.Lines(out / "lines.jsonl"), time.monotonic() + 120
    while not lines.read(first or step):
        assert process.poll() is None and time.monotonic() < deadline, (out / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(lines.read())
    while alive := processes_of(out):
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)
    after = whole_lines(out)
    assert len(after) <= left + 1, "its processes went on without it"  # one may have been on its way
    return after


def test_a_killed_run_has_left_whole_lines_and_goes_on(tmp_path):
    before = killed_in("facts", tmp_path / "out", first="run")
    assert before[0]["key"] == "facts begins"
    code, said, _ = rehearse(tmp_path / "out", "facts")
    after = whole_lines(tmp_path / "out")
    assert code == 0 and after[: len(before)] == before
    assert {line["key"] for line in after if line["step"] == "facts"} == {"machine", "ceilings", "library"}
    assert "facts      3 ok" in said
    ceilings = next(line["ceilings"] for line in after if line["key"] == "ceilings")
    assert ceilings["fake"] is True


@pytest.mark.slow
@pytest.mark.parametrize("step", plan.NAMES)
def test_killed_in_every_step(step, tmp_path):
    lines = killed_in(step, tmp_path / "out")
    assert lines[0]["key"] == f"{step} begins"
    assert all({"step", "key", "outcome", "run", "t"} <= set(line) for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_tried(tmp_path):
    command = (*COMMAND[:4], "cuda", *COMMAND[5:], str(tmp_path / "out"))
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "facts: machine: no GPU: torch.cuda.is_available() is false" in done.stdout
    assert not {line["key"] for line in whole_lines(tmp_path / "out")} & {
        "smoke begins",
        "tests begins",
        "sweep begins",
    }


def test_a_step_is_stopped_at_its_limit(tmp_path):
    code, _, _ = rehearse(tmp_path / "out", "operators", "--limit", "7")
    lines = whole_lines(tmp_path / "out")
    assert lines[-1]["key"] == "operators ends" and lines[-1]["message"] == "stopped at its limit"
    assert lines[-1]["t"] < 10 and code == 0
    assert not processes_of(tmp_path / "out")


@pytest.mark.slow
def test_the_whole_rehearsal_is_done_resumed_and_drawn(tmp_path):
    out = tmp_path / "out"
    code, said, error = rehearse(out, "--limit", "1500")  # alone on two cores it takes less than 180 seconds
    lines = whole_lines(out)
    assert code == 0, said + error
    ends = {line["key"].removesuffix(" ends"): line for line in lines if line["key"].endswith(" ends")}
    assert set(ends) == set(plan.NAMES)
    said_of = {step: line["message"] for step, line in ends.items()}
    assert said_of.pop("peers") in ("done", "stopped with what it was beside")
    assert set(said_of.values()) == {"done"}
    assert {line["step"] for line in lines} == {"run", *plan.NAMES}
    assert sorted(path.name for path in out.iterdir()) == ["lines.jsonl", "log.txt"]

    found = results.results(lines)
    assert found.rehearsal and found.name.startswith("rehearsal-")
    operators = {row["operator"].split()[0] for row in found.rows.values()}
    assert {"attention", "select_tokens", "soft_aggregate", "token_mlp", "merge_bipartite"} <= operators
    assert any(set(row["shape"]) == {"B"} for row in found.rows.values())
    assert all(row["host_us"] > 0 and row["graph_us"] > 0 for row in found.rows.values() if "M" in row["shape"])
    for step in ("smoke", "tests", "sanitize"):
        assert found.evidence[step]["counts"]["ok"] > 0 and not found.evidence[step]["failed"]

    report = [sys.executable, "benchmarks/report.py", "--lines", str(out / "lines.jsonl"), "--results", str(tmp_path)]
    subprocess.run(report, cwd=ROOT, env=environment(tmp_path), check=True)
    assert {path.name.rpartition("-")[2] for path in out.glob("*.png")} == {"operators.png", "models.png"}
    assert not list(tmp_path.glob("*.json")), "a rehearsal is no result"

    code, said, error = rehearse(out, "operators", "models", "--limit", "1500")
    again = whole_lines(out)[len(lines) :]
    assert code == 0, said + error
    assert not [line for line in again if "row" in line], "what was found is not done again"


def session_with(plugin, tmp_path, monkeypatch):
    """The lines of a session over some of select_tokens' benchmarks, with a plugin that disturbs it."""
    from gpu import sessions

    (tmp_path / "disturbance.py").write_text(plugin)
    lines = record.Lines(tmp_path / "lines.jsonl", "operators")
    ours = {"GPU_LINES": str(lines.path), "GPU_LOG": str(tmp_path / "log.txt"), "GPU_RUN": "now"}
    for name, value in (environment(tmp_path) | ours | {"PYTHONPATH": f"{PATHS}:{tmp_path}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sessions.processes, "environment", lambda: None)  # as it is
    file = str(sessions.FOLDER / "bench_select_tokens.py")
    choice = ("-p", "disturbance", "--compile", "none", "-k", "single and (none or weighted-forward)", file)
    sessions.run("operators", sessions.command("operators", "cpu", *choice))
    return lines


#: a benchmark that fails, and a device that is lost by it, once
LOST = """
import os, pytest, timers

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if "none-forward+backward" in item.nodeid:
        with open(os.environ["TOUCHED"], "a") as file:
            file.write("x")
        timers.Clock.synchronize = lambda self: lost()
        raise RuntimeError("an illegal memory access")

def lost():
    raise RuntimeError("an illegal memory access, and it sticks")
"""


@pytest.mark.slow
def test_a_session_goes_on_behind_what_lost_the_device(tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    monkeypatch.setenv("TOUCHED", str(touched))
    lines = session_with(LOST, tmp_path, monkeypatch)
    last = {line["key"].rpartition("::")[2]: line for line in lines.read() if "::" in line["key"]}
    assert {key: line["outcome"] for key, line in last.items()} == {
        "test_select_tokens[single-C384-none-forward] float32": "ok",
        "test_select_tokens[single-C384-none-forward+backward] float32": "failed",
        "test_select_tokens[single-C384-weighted-forward] float32": "ok",
        "test_select_tokens[single-C384-weighted-forward+backward] float32": "ok",
    }
    assert "the device is lost" in last["test_select_tokens[single-C384-none-forward+backward] float32"]["message"]
    assert touched.read_text() == "x", "it was tried once"
    assert sum("row" in line for line in lines.read()) == 3


#: as pytest-timeout ends a session
TIMED_OUT = """
import os, pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if "none-forward+backward" in item.nodeid:
        os._exit(1)
    if "weighted-forward" in item.nodeid:
        raise RuntimeError("only this one")
"""


@pytest.mark.slow
def test_a_session_goes_on_behind_what_took_too_long(tmp_path, monkeypatch):
    lines = session_with(TIMED_OUT, tmp_path, monkeypatch)
    last = {line["key"].rpartition("C384-")[2]: line["outcome"] for line in lines.read() if "::" in line["key"]}
    assert last == {
        "none-forward] float32": "ok",
        "none-forward+backward] float32": "started",
        "weighted-forward] float32": "failed",
        "weighted-forward+backward] float32": "failed",
    }
    ended = [line["message"] for line in lines.read() if line["key"] == "session 0 ended"]
    assert len(ended) == 1 and ended[0].startswith("exit code 1 "), "failures end no session"


def test_a_log_that_is_too_long_loses_its_middle(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"a" * 30 + b"b" * 1000 + b"c" * 70)
    processes.shorten(tmp_path / "log.txt", 100)
    left = (tmp_path / "log.txt").read_bytes()
    assert left == b"a" * 25 + b"\n[...]\n" + b"b" * 5 + b"c" * 70


def test_what_was_compiled_elsewhere_is_compiled_again(tmp_path, monkeypatch):
    lines = record.Lines(tmp_path / "lines.jsonl", "kernels")
    for run in ("there", "here"):
        monkeypatch.setenv("GPU_RUN", run)
        lines.write(f"of {run}")
    monkeypatch.setenv("GPU_CACHED", "here\nnow\n")
    assert lines.done() == {"of there", "of here"} and lines.compiled() == {"of here"}


def test_the_plan_shares_the_limit():
    ends = plan.deadlines(list(plan.NAMES), 550, "cuda")
    assert [round(ends[step.name]) for step in plan.STEPS] == [40, 85, 225, 365, 465, 550]
    assert ends["peers"] == ends["sanitize"] == ends["tests"] and ends["kernels"] == ends["models"]
    assert plan.deadlines(["models", "sweep"], 300, "cuda") == {"models": pytest.approx(162.16, abs=0.01), "sweep": 300}
    assert plan.deadlines(["sanitize"], 100, "cuda") == {"sanitize": 100}


def line(step, key, outcome="ok", run="1", **values):
    return {"step": step, "key": key, "outcome": outcome, "run": run, "t": 0.0, **values}


def test_results_are_the_last_of_every_line():
    row = {"operator": "o", "passes": "forward", "shape": {"B": 1, "C": 2}}
    lines = [
        line("facts", "machine", facts={"device": "NVIDIA H200", "commit": "a"}),
        line("facts", "ceilings", ceilings={"copy_bytes_per_s": 4e12}),
        line("tests", "t1", "failed", message="first"),
        line("tests", "t2", "started"),
        line("operators", "o forward", row=row | {"us": [1, 1, 1]}),
        line("operators", "p forward", "failed", row=row),
        line("facts", "machine", run="2", facts={"device": "NVIDIA H200", "commit": "b"}),
        line("facts", "ceilings", run="2", ceilings={"copy_bytes_per_s": 5e12}),
        line("tests", "t1", run="2"),
        line("operators", "o forward", run="2", row=row | {"us": [2, 2, 2]}),
        line("operators", "q forward", run="3", row=row),
    ]
    found = results.results(lines)
    assert found.name == "nvidia-h200" and not found.rehearsal
    assert found.runs["2"] == {"device": "NVIDIA H200", "commit": "b", "copy_bytes_per_s": 5e12}
    assert found.runs["3"] == found.runs["2"], "some steps later on that machine"
    assert found.rows == {"o forward": {"run": "2", **row, "us": [2, 2, 2]}, "q forward": {"run": "3", **row}}
    assert found.evidence == {
        "tests": {"run": "1", "counts": {"ok": 1, "failed": 1}, "failed": {"t2": "it ended the process"}}
    }
    with pytest.raises(ValueError, match="no line of the step facts"):
        results.results(lines[2:4])


def model_row(how, ours, dense, sdpa, published):
    def peer(us, **more):
        return {"us": [us] * 3, "ratio": [us / ours] * 3, **more}

    return {
        "operator": f"deit_small tome{how}",
        "passes": "forward",
        "dtype": "bfloat16",
        "shape": {"B": 256},
        "us": [ours] * 3,
        "flops": 2e12,
        "of_floor": 0.5,
        "peers": {
            "deit_small": peer(dense, flop_ratio=2.0, realised=dense / ours / 2),
            "sdpa": peer(sdpa, flop_ratio=2.0, realised=sdpa / ours / 2),
            "published": peer(published),
        },
    }


def test_a_report_of_a_gpu(tmp_path, monkeypatch):
    import report

    monkeypatch.setattr(report, "LAUNCHES", tmp_path / "launches.json")
    kept = "sm_80 soft_aggregate_fwd bfloat16 many N256 M128 C512"
    report.LAUNCHES.write_text(json.dumps({kept: {"num_warps": 4}}))
    swept = {"gpu": 90, "kernel": "token_mlp_fwd", "entry": "sm_90 token_mlp_fwd bfloat16 many M128 R1024 C512"}
    facts = {"device": "NVIDIA H200", "commit": "a", "driver": "580", "torch": "2.11", "triton": "3.6", "threads": 1}
    lines = [
        line("facts", "machine", facts=facts),
        line("facts", "ceilings", ceilings={"copy_bytes_per_s": 4e12, "flops_per_s_bfloat16": 8e14}),
        line("tests", "t1"),
        line("tests", "t2", "failed", message="E assert\nfile"),
        line("models", "eager", row=model_row("", 800.0, 1000.0, 900.0, 1200.0)),
        line("models", "graph", row=model_row(" compiled graph", 500.0, 700.0, 600.0, 550.0)),
        line("sweep", "1", launch={}, us=10.0, default_us=10.0, spills=0, **swept),
        line("sweep", "2", launch={"num_warps": 8}, us=8.0, default_us=10.0, spills=0, **swept),
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not report.take(path, tmp_path / "results")
    result = json.loads((tmp_path / "results/nvidia-h200.json").read_text())
    assert set(result["rows"]) == {"eager", "graph"} and result["evidence"]["tests"]["counts"] == {"ok": 1, "failed": 1}
    launches = json.loads(report.LAUNCHES.read_text())
    assert launches == {kept: {"num_warps": 4}, swept["entry"]: {"num_warps": 8}}
    text = "<!-- results:nvidia evidence -->\n<!-- /results -->\n<!-- results:nvidia strongest -->\n<!-- /results -->\n"
    text = report.filled(text, {"nvidia-h200": result})
    assert "- tests on NVIDIA H200, commit a: 1 failed, 1 ok\n  - t2: E assert file" in text
    # the fastest dense form is SDPA's, compiled, as a graph
    assert (
        "| deit_small tome | 256 | bfloat16 | 5.12e+05 | compiled graph | compiled graph | 1.20 | 2.00 | 0.60 | 1.10 |"
        in text
    )


def test_lines_are_appended_whole_and_a_torn_one_is_closed(tmp_path):
    lines = record.Lines(tmp_path / "lines.jsonl", "tests")
    lines.write("a")
    with lines.path.open("a") as file:
        file.write('{"step": "tests", "key": "to')
    lines.write("b", record.FAILED, message="x" * 10_000)
    read, torn = record.parsed(lines.path)
    assert [line["key"] for line in read] == ["a", "b"] and torn == 1
    assert len(read[1]["message"]) == record.LONGEST and lines.done() == {"a"}
