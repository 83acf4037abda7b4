"""The list of mutants is in order, and what runs them tells a wrong kernel from one that is only written otherwise."""

from pathlib import Path

import pytest

from mutants import Mutant
from mutants.listed import MUTANTS
from mutants.run import ROOT, Broken, main, mutated, run, suite, summary

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")

HELPERS = {"__init__.py", "attention.h", "launches.py", "matching.h"}  # which have no kernel


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_applies_once(file):
    text = (ROOT / file).read_text()
    for mutant in MUTANTS:
        if mutant.file == file:
            assert mutated(mutant, text) != text, mutant


def test_there_are_enough_everywhere():
    assert len(MUTANTS) >= 60 and len(set(map(str, MUTANTS))) == len(MUTANTS)
    patterns = ("csrc/cuda/*.cuh", "csrc/cpu/*.cpp", "csrc/cpu/*.h", "tokenops/ops/triton/*.py")
    files = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    files = {file for file in files if Path(file).name not in HELPERS}
    assert files == {mutant.file for mutant in MUTANTS}


def test_every_mutant_has_tests():
    """Without a module pytest would run all there are."""
    for module in {module for mutant in MUTANTS for module in suite(mutant)[0]}:
        assert list((ROOT / "tests/ops").glob(module)), module


def test_a_mutant_that_does_not_apply_is_an_error():
    file = "tokenops/ops/triton/restore_tokens.py"
    for before in ("no such text", "tl.load("):  # never, and more than once
        with pytest.raises(Broken, match=f"{file} has '{before[:4]}.* [0-9]+ times"):
            mutated(Mutant(file, before, "", "nothing"), (ROOT / file).read_text())


def test_patterns_choose(capsys):
    assert main(["--list", "select_tokens.cuh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("csrc/cuda/select_tokens.cuh: " in line for line in lines)


@pytest.mark.slow
def test_wrong_kernels_are_killed_and_others_survive(tmp_path):
    file, before, tests = "tokenops/ops/triton/restore_tokens.py", "(n >= 0) & (n < N), n, N)", "test_table"
    planted = [
        Mutant(file, before, "(n >= 0) & (n < N - 1), n, N)", "the last place is out of range", tests),
        Mutant(file, before, f"{before}  # a comment", "nothing", tests),
        Mutant(file, before, "(n >= 0) & (n < N, n, N)", "the syntax", tests),
        Mutant(file, before, before.replace("N)", "M)"), "a test that is not there", "no_such_test"),
    ]
    results = run(planted[:3], jobs=1, out=tmp_path / "out")
    assert [result.verdict for result in results] == ["killed", "survived", "error"]
    assert "test_table" in results[0].reason and "does not compile" in results[2].reason
    assert summary(results).startswith("3 mutants: 1 killed, 1 survived, 1 errors\nsurvived: " + str(planted[1]))
    assert len((tmp_path / "out").read_text().splitlines()) == 3
    with pytest.raises(Broken, match="without any mutation"):
        run(planted[3:], jobs=1)
