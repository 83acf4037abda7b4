"""Every test of a run on a GPU leaves one line, whatever becomes of its process; a resumed run runs what is left."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu.outcomes import Outcomes

ROOT = Path(__file__).parents[2]
CONFTEST = """
import os

import gpu.outcomes

def pytest_addoption(parser):
    parser.addoption("--device", default="cpu")

gpu.outcomes.gpu_fault = lambda: os.environ.get("FAULT")  # of this process: the GPU's answer
"""
SUITE = """
import os

import pytest

@pytest.fixture
def broken():
    raise OSError("no such thing")

@pytest.fixture
def leaky():
    yield
    raise OSError("left open")

@pytest.mark.parametrize("i", range(8))
def test_right(i):
    pass

def test_wrong():
    assert 1 == len("ab")

def test_setup(broken):
    pass

def test_teardown(leaky):
    pass

def test_left_out():
    pytest.skip("not here")

@pytest.mark.skipif("not os.environ.get('KILL')", reason="as it says")
def test_killed():
    os._exit(9)

def test_faulty():
    os.environ["FAULT"] = "an illegal memory access"  # though no assertion fails

@pytest.mark.parametrize("i", range(8, 12))
def test_right_too(i):
    assert "FAULT" not in os.environ  # it is another process
"""
RIGHT = [f"test_right[{i}]" for i in range(8)] + [f"test_right_too[{i}]" for i in range(8, 12)]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*options, **environment):
        """The lines that this run has added, by the test's name, and how it ended."""
        path = tmp_path / "lines.jsonl"
        before = len(path.read_text().splitlines()) if path.exists() else 0
        paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": paths, "GPU_LINES": str(path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.outcomes", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, env=env | environment, capture_output=True, text=True, timeout=120)
        lines = [json.loads(text) for text in path.read_text().splitlines()[before:]]
        found = {line["key"].rpartition("::")[2]: line for line in lines}
        assert len(found) == len(lines), done.stdout  # none has two
        assert all(line["step"] == "tests" for line in lines)
        return found, done

    return run


def outcomes(found):
    return {name: line["outcome"] for name, line in found.items()}


def test_a_line_a_test_and_no_more_when_resumed(run):
    pytest.importorskip("xdist")
    processes = ("-p", "xdist", "-n", "2", "--dist", "worksteal", "--max-worker-restart", "20", "--device", "cuda")
    found, done = run(*processes, KILL="1")
    failed = ("test_wrong", "test_setup", "test_teardown", "test_killed", "test_faulty")
    expected = {**dict.fromkeys(RIGHT, "ok"), **dict.fromkeys(failed, "failed"), "test_left_out": "skipped"}
    assert outcomes(found) == expected, done.stdout
    assert "assert 1 == 2" in found["test_wrong"]["message"] and "test_suite.py:" in found["test_wrong"]["message"]
    assert found["test_setup"]["message"].startswith("in setup\n") and "no such thing" in found["test_setup"]["message"]
    assert "in teardown" in found["test_teardown"]["message"] and "died" in found["test_killed"]["message"]
    assert found["test_faulty"]["message"].startswith("sticky: an illegal memory access")
    assert "not here" in found["test_left_out"]["message"] and found["test_right[0]"]["seconds"] >= 0
    assert "message" not in found["test_right[0]"]

    found, done = run(*processes)
    assert outcomes(found) == {**dict.fromkeys(failed, "failed"), "test_killed": "skipped"}, done.stdout


def test_a_process_that_died_ends_no_session():
    """pytest-xdist may ask it for tests back before it knows."""

    def send(name, **what):
        raise OSError("cannot send (already closed?)")

    node = SimpleNamespace(workerinput={}, sendcommand=send)
    Outcomes(SimpleNamespace(done=lambda: {"a"})).pytest_configure_node(node)
    node.sendcommand("steal", indices=[3])
    assert node.workerinput == {"tests_done": ["a"]}


def test_in_one_process(run):
    found, done = run("--device", "cuda")
    assert done.returncode == 3 and "test_right_too[8]" not in found  # the GPU is lost
    assert outcomes(found)["test_right[0]"] == "ok" and found["test_faulty"]["message"].startswith("sticky")
    found, done = run("--device", "cpu")
    assert done.returncode == 1 and {"test_right_too[8]", "test_faulty"} < set(found) and "test_right[0]" not in found
    assert outcomes(found)["test_faulty"] == "ok"


def test_no_test_of_the_device_leaves_itself_out_on_a_gpu():
    """Nothing may be skipped there: what has nothing to say of a GPU is marked cpu_only."""
    left_out = re.compile(r'if device == "cuda"[^\n]*\n\s+pytest\.skip\(')
    tests = Path(__file__).parents[1]
    assert [path.name for path in sorted(tests.rglob("test_*.py")) if left_out.search(path.read_text())] == []
