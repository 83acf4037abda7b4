"""What is done when: steps one after another have the GPU to themselves, or share it with steps beside them."""

from typing import NamedTuple


class Step(NamedTuple):
    """`python -m gpu.<name>`. Seconds are of the plan; a step that ends early leaves its time to the next."""

    name: str
    seconds: float
    rehearsal: float  # seconds of it on two cores
    what: str


class Beside(NamedTuple):
    """A step that runs on the other cores, from the beginning of one step to the end of another.

    Where that other one ends early, this one "goes on" till the end in the plan; or, since it uses the GPU, whose time
    is now to be measured, it is "awaited" till then, or "stopped".
    """

    name: str
    first: str
    last: str
    what: str
    nice: int
    then: str


STEPS = (
    Step("facts", 40, 10, "the machine, the compiled library, ceilings of copies and products"),
    Step("smoke", 45, 50, "every operator forward and backward at DeiT-S sizes against fp64"),
    Step("tests", 140, 30, "the tests of the device"),
    Step("operators", 140, 30, "every operator at batches of 1, 32 and 256 beside its peers"),
    Step("models", 100, 25, "whole models: eager, compiled, as graphs"),
    Step("sweep", 85, 25, "launch configurations of the hot kernels"),
)
BESIDE = (
    Beside("kernels", "facts", "models", "compiles the Triton kernels of later steps", 10, "goes on"),
    Beside("peers", "smoke", "tests", "compiles the peers of later steps", 15, "stopped"),
    Beside("sanitize", "tests", "tests", "memcheck and racecheck on our kernels", 5, "awaited"),
)
NAMES = tuple(step.name for step in (*STEPS, *BESIDE))


def deadlines(chosen: list[str], limit: float, device: str) -> dict[str, float]:
    """When the plan has every step ended, in seconds: the chosen ones share the limit as the plan does.

    A step beside others ends with the last of its span that was chosen; alone, it has the limit.
    """
    planned = {s.name: s.rehearsal if device == "cpu" else s.seconds for s in STEPS if s.name in chosen}
    ends, now = {}, 0.0
    for name, seconds in planned.items():
        now += seconds * limit / sum(planned.values())
        ends[name] = now
    for beside in BESIDE:
        if beside.name in chosen:
            span = [name for name in spanned(beside) if name in ends]
            ends[beside.name] = ends[span[-1]] if span else limit
    return ends


def spanned(beside: Beside) -> list[str]:
    names = [step.name for step in STEPS]
    return names[names.index(beside.first) : names.index(beside.last) + 1]
