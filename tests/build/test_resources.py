"""benchmarks/resources.py: what it calls a change, a regression and a finding, and which files it writes."""

import json

import pytest

import resources
from resources import TABLES, Row, bound_changes, changes, excess, read, read_bounds, verdicts, write

BACKWARD = Row("token_mlp", "M98-N196-C384", "token_mlp_kernel#2", "fp32", 100)
FORWARD = Row("token_mlp", "M98-N196-C384", "token_mlp_kernel", "bf16", 90)
MOVING = Row("restore_tokens", "N196-k98-C384", "restore_tokens_fwd_kernel", "bf16", 80)
BOUND = {"token_mlp, forward: token_mlp_kernel": {"bound": 272.7, "limit": "stalls"}}
GOOD = {"registers": 168, "spills": 0, "shared": 49152, "warps": 8, "matrix": True, "mma": 12}


def test_a_spill_is_a_regression_on_a_known_triton_and_a_finding_on_a_new_one():
    rows, before = {BACKWARD: {**GOOD, "spills": 12}, FORWARD: GOOD}, {BACKWARD: GOOD, FORWARD: GOOD}
    name = "token_mlp M98-N196-C384 token_mlp_kernel#2 fp32 sm_100"
    assert verdicts(rows, before) == [f"REGRESSION: {name}: 12 bytes spilled"]
    assert verdicts(rows, {FORWARD: GOOD}) == [f"REGRESSION: {name}: 12 bytes spilled"]  # a new row of a known table
    assert verdicts(rows, None) == [f"FINDING: {name}: 12 bytes spilled"]


@pytest.mark.parametrize("before, regressions", ((8, 1), (12, 0), (24, 0)))
def test_a_spill_as_large_as_the_committed_one_is_none(before, regressions):
    rows, committed = {BACKWARD: {**GOOD, "spills": 12}}, {BACKWARD: {**GOOD, "spills": before}}
    assert len(verdicts(rows, committed)) == regressions


@pytest.mark.parametrize(
    "row, worse, what",
    (
        (FORWARD, {"shared": 227 * 1024 + 1}, "bytes of shared memory too many"),
        (MOVING, {"shared": 163 * 1024 + 4}, "4 bytes of shared memory too many"),
        (FORWARD, {"registers": 255, "warps": 16}, "registers too many for one block"),
        (FORWARD, {"matrix": False}, "matrix unit not used"),
        (FORWARD._replace(case="M49-N196-C192"), {"matrix": False, "mma": 0}, "matrix unit not used"),
    ),
)
def test_what_else_is_wrong(row, worse, what):
    rows = {row: {**GOOD, **worse}}
    for committed, word in (({row: GOOD}, "REGRESSION: "), (None, "FINDING: ")):
        (line,) = verdicts(rows, committed)
        assert line.startswith(word) and line.endswith(what)
    assert verdicts(rows, rows) == []


def test_where_no_matrix_unit_is_asked_for():
    without = {**GOOD, "matrix": False, "mma": 0}
    assert not any(excess(MOVING, without).values()) and not any(excess(BACKWARD, without).values())
    assert not any(excess(FORWARD._replace(case="M24-N196-C768"), {**GOOD, "matrix": False}).values())


def test_changes_are_shown():
    before = {FORWARD: GOOD, MOVING: GOOD}
    rows = {FORWARD: {**GOOD, "registers": 150, "slots": 7}, BACKWARD: {"registers": 96, "spills": 0}}
    assert changes(rows, before) == [
        "gone: restore_tokens N196-k98-C384 restore_tokens_fwd_kernel bf16 sm_80",
        "token_mlp M98-N196-C384 token_mlp_kernel bf16 sm_90: registers 168 -> 150, slots - -> 7",
        "added: token_mlp M98-N196-C384 token_mlp_kernel#2 fp32 sm_100: registers 96, spills 0",
    ]
    assert changes(before, before) == []


def test_a_table_is_a_sorted_row_a_line(tmp_path):
    file = tmp_path / "new/table.json"
    write(file, "3.8", {FORWARD: GOOD, BACKWARD: GOOD, MOVING: GOOD}, True)
    assert read(file) == ({MOVING: GOOD, BACKWARD: GOOD, FORWARD: GOOD}, True)
    assert json.loads(file.read_text())["triton"] == "3.8"
    lines = [line.split('"')[1] for line in file.read_text().splitlines() if "registers" in line]
    assert lines == [str(MOVING), str(FORWARD), str(BACKWARD)]
    assert read_bounds(file) == read_bounds(tmp_path / "none.json") == {}


def test_bounds_that_changed_or_are_not_known_are_told():
    (name,) = BOUND
    assert bound_changes(BOUND, BOUND) == []
    assert bound_changes(BOUND, {}) == [f"bound: {name}: - -> 272.7 us by stalls"]
    assert bound_changes({name: {"unknown": "3 loops"}}, BOUND) == [f"UNKNOWN BOUND: {name}: 3 loops"]


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """The tool where Triton 3.8 is in use and has a whole table of two rows; compiling gives the rows passed."""
    table = tmp_path / "triton-3.8.json"
    write(table, "3.8", {FORWARD: GOOD, MOVING: GOOD}, True)
    monkeypatch.setattr(resources, "TABLES", tmp_path)

    filled = []

    def run(rows, *arguments, version="3.8.1", bounds=BOUND):
        monkeypatch.setattr(resources.triton, "__version__", version)
        monkeypatch.setattr(resources, "compile_all", lambda *selection: rows)
        monkeypatch.setattr(resources, "compute_bounds", lambda before: bounds)
        monkeypatch.setattr(resources.bounds, "fill_notes", filled.append)
        code = resources.main(arguments)
        return code, capsys.readouterr().out, read(table)[0]

    run.filled = filled
    return run


def test_a_whole_run_writes_its_table_unless_it_regressed(tool):
    better, worse = {**GOOD, "registers": 96}, {**GOOD, "spills": 8}
    code, said, table = tool({FORWARD: better, MOVING: GOOD})
    assert code == 0 and "registers 168 -> 96" in said and "REGRESSION" not in said and table[FORWARD] == better
    code, said, table = tool({FORWARD: worse, MOVING: GOOD})
    assert code == 1 and "8 bytes spilled" in said and "left as it is" in said and table[FORWARD] == better
    code, said, table = tool({FORWARD: worse, MOVING: GOOD}, "--accept")
    assert code == 1 and "REGRESSION" in said and table[FORWARD] == worse
    code, said, table = tool({FORWARD: worse, MOVING: GOOD})
    assert code == 0 and "REGRESSION" not in said


def test_a_new_triton_gets_a_table_and_findings(tool, tmp_path):
    rows = {FORWARD: {**GOOD, "spills": 8}, MOVING: GOOD}
    code, said, table = tool(rows, version="3.10.0")
    assert code == 0 and f"FINDING: {FORWARD}: 8 bytes spilled" in said and table[FORWARD] == GOOD
    assert read(tmp_path / "triton-3.10.json") == (rows, True)


def test_a_part_is_not_written_over_a_whole(tool, tmp_path):
    part = {FORWARD: {**GOOD, "registers": 96}}
    code, said, table = tool(part, "--operators", "token_mlp")
    assert code == 0 and "1 changed" in said and "gone" not in said and "is left as it is" in said
    assert table == {FORWARD: GOOD, MOVING: GOOD}
    with pytest.raises(SystemExit):
        tool(part, "--operators", "token_mlp", "--out", str(tmp_path / "triton-3.8.json"))
    assert read(tmp_path / "triton-3.8.json") == ({FORWARD: GOOD, MOVING: GOOD}, True)
    code, said, _ = tool(part, "--targets", "90", "--dtypes", "bf16", "--out", str(tmp_path / "part.json"))
    assert code == 0 and read(tmp_path / "part.json") == (part, False)


def test_bounds_alone_leave_the_rows(tool, tmp_path):
    (name,) = BOUND
    code, said, table = tool({}, "--bounds")
    assert code == 0 and f"bound: {name}: - -> 272.7 us" in said and table == {FORWARD: GOOD, MOVING: GOOD}
    assert read_bounds(tmp_path / "triton-3.8.json") == BOUND and tool.filled == []
    code, said, _ = tool({}, "--bounds", bounds={name: {"unknown": "3 loops found, 2 known"}})
    assert code == 1 and f"UNKNOWN BOUND: {name}: 3 loops found, 2 known" in said
    with pytest.raises(SystemExit):
        tool({}, "--bounds", version="3.10.0")  # which has no rows yet


def test_a_whole_run_has_bounds_and_those_of_one_triton_go_into_the_notes(tool, tmp_path):
    tool({FORWARD: GOOD, MOVING: GOOD})
    assert read_bounds(tmp_path / "triton-3.8.json") == BOUND and tool.filled == []
    tool({FORWARD: GOOD, MOVING: GOOD}, version=f"{resources.OF_NOTES}.0")
    assert read_bounds(tmp_path / f"triton-{resources.OF_NOTES}.json") == BOUND and tool.filled == [BOUND]
    tool({FORWARD: GOOD}, "--operators", "token_mlp", "--out", str(tmp_path / "part.json"))
    assert read_bounds(tmp_path / "part.json") == {} and tool.filled == [BOUND]


def test_no_committed_table_spills():
    """As the README says of them."""
    tables = sorted(TABLES.glob("triton-*.json"))
    assert tables
    for file in tables:
        rows, whole = read(file)
        assert whole and {row.sm for row in rows} == {80, 90, 100} and {row.dtype for row in rows} == {"bf16", "fp32"}
        assert [str(row) for row, values in rows.items() if values["spills"]] == []
