"""Small mutations of the kernels, each of which some test must notice; run.py runs them."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`before`, which the file has once, becomes `after`; `tests` (pytest -k) are those that should notice, or all."""

    file: str
    before: str
    after: str
    breaks: str
    tests: str = ""

    def __str__(self):
        return f"{self.file}: {self.breaks}"


def of_file(file, *mutants):
    return [Mutant(file, *mutant) for mutant in mutants]
