"""benchmarks/instructions.py: what it reads from callgrind, what it calls a regression; and the host's path itself."""

import json

import pytest

import instructions

DUMP = """version: 1
creator: callgrind-3.19.0
part: 2
desc: Trigger: Client Request: tokenops select_tokens

events: Ir
summary: 2800
fn=(1) PyObject_Call
totals: 2800
"""


def test_a_dump_is_read():
    assert instructions.parsed(DUMP) == ("tokenops select_tokens", 2800)
    assert instructions.parsed(DUMP.replace("Client Request: tokenops select_tokens", "Program termination")) is None


def test_only_ours_regress_and_only_by_more_than_a_tenth():
    committed = {"tokenops a": 100, "tokenops b": 100, "layer_norm": 100}
    counts = {"tokenops a": 110, "tokenops b": 111, "layer_norm": 200, "tokenops new": 900}
    assert instructions.verdicts(counts, committed) == ["REGRESSION: tokenops b: 100 -> 111 instructions"]


def run(monkeypatch, tmp_path, count, *arguments):
    path = tmp_path / "host.json"
    path.write_text('{"tokenops a": 100}')
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    monkeypatch.setattr(instructions, "table", lambda: path)
    monkeypatch.setattr(instructions, "counted", lambda: {"tokenops a": count, "layer_norm": 7})
    return instructions.main(list(arguments)), json.loads(path.read_text())


def test_the_table_is_written_but_for_a_regression(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, 90) == (0, {"tokenops a": 90, "layer_norm": 7})
    assert run(monkeypatch, tmp_path, 120) == (1, {"tokenops a": 100})
    assert "REGRESSION: tokenops a: 100 -> 120 instructions" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path, 120, "--accept") == (0, {"tokenops a": 120, "layer_norm": 7})


def test_without_valgrind_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert instructions.main([]) == 0
    assert capsys.readouterr().out == "no instructions are counted: valgrind and cc not found\n"


def test_there_are_tables():
    """Of every operator, in each."""
    tables = sorted(instructions.table().parent.glob("host-torch-*.json"))
    assert tables
    for path in tables:
        names = [name for name in json.loads(path.read_text()) if name.startswith("tokenops ")]
        assert len(names) == 9, path.name


@pytest.mark.slow
def test_the_host_does_what_it_did():
    """Calls of every operator on tiny tensors; a count that fell by more than a tenth belongs into the table too."""
    path = instructions.table()
    if not path.exists():
        pytest.skip(f"{path.name} is not there: `make resources` makes it for another torch or Python")
    if (reason := instructions.why_not()) is not None:
        pytest.skip(reason)
    committed, counts = json.loads(path.read_text()), instructions.counted()
    ours = {name for name in committed if name.startswith("tokenops ")}
    assert len(ours) == 9 and set(counts) == set(committed)
    for name in ours:
        assert counts[name] == pytest.approx(committed[name], rel=instructions.ALLOWED), f"{name}: `make resources`"
