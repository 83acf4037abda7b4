"""Many calls: counted, and every one that fails named with the command that repeats it."""

import collections
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tokenops
from fuzz import refusals
from fuzz.check import Check
from fuzz.draw import Draw
from fuzz.operators import CALLS

#: another number, other calls
SEED = int(os.environ.get("TOKENOPS_FUZZ_SEED", "0"))
#: the largest size: Triton's interpreter is slow
MOST = {"native": 65, "reference": 33, "triton": 17}


class Run:
    """Counts the calls made, by operator and by way; keeps what failed."""

    def __init__(self):
        self.made, self.failed, self.began = collections.Counter(), {}, time.perf_counter()

    def __call__(self, backend, operator, seed, way=None):
        repeat = f"python -m fuzz {backend} {operator} {seed}" + f" '{way}'" * (way is not None)
        check = Check(backend, operator, seed, MOST[backend], way)
        self.made[operator] += 1
        self.guarded(repeat, check, check.run)

    def refusal(self, backend, operator, seed):
        """A call with one bad argument; none, where there is no tensor to make bad."""
        call = CALLS[operator](Draw(f"refusal {operator}:{seed}", 9))
        bad = refusals.of(call, seed, backend)
        if bad is None:
            return

        def run():
            with tokenops.use_backend(backend), pytest.raises(bad[1]):
                call.invoke(tokenops, bad[0])

        self.made[operator] += 1
        self.guarded(f"python -m fuzz {backend} {operator} {seed} refusal", call.options, run)

    def guarded(self, repeat, what, run):
        try:
            run()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # pytest.fail's is no Exception
            said = f"{type(error).__name__}: {error}"
            kind = re.sub(r"-?\d[\d.e+-]*", "#", said.splitlines()[0])
            self.failed.setdefault(kind, []).append(f"{said}\n{what}\nrepeat: PYTHONPATH=.:tests {repeat}")

    @property
    def calls(self):
        return sum(self.made.values())

    def summary(self, what):
        wrong = sum(map(len, self.failed.values()))
        each = ", ".join(f"{operator} {n}" for operator, n in self.made.items())
        return f"fuzz {what}: {self.calls} calls, {wrong} wrong, {time.perf_counter() - self.began:.0f} s ({each})"

    def verdict(self):
        if self.failed:
            first = [f"{len(calls)} times:\n{calls[0]}" for calls in self.failed.values()]
            pytest.fail("\n\n".join([self.summary("failed"), *first[:20]]), pytrace=False)


def many(run, backend, count, way=None, operators=tuple(CALLS), first=0):
    """`count` calls of each operator."""
    for operator in operators:
        for seed in range(SEED + first, SEED + first + count):
            run(backend, operator, seed, way)


def in_threads(run, backend, count, threads=4):
    """Calls of different operators at once; which backend runs is one for all threads, so they are judged after."""
    seeds = [(operator, seed) for seed in range(SEED, SEED + count) for operator in CALLS]
    checks = [Check(backend, *call, MOST[backend], "eager") for call in seeds]
    for check in checks:
        check.prepare()
    with tokenops.use_backend(backend), ThreadPoolExecutor(threads) as pool:
        found = [pool.submit(check.ours) for check in checks]
    for check, (operator, seed), ours in zip(checks, seeds, found, strict=True):
        run.made[operator] += 1
        repeat = f"python -m fuzz {backend} {operator} {seed} eager  (in threads)"
        run.guarded(repeat, check, lambda: check.judge(ours.result()))


def poisoned():
    """torch.empty is NaN, so what nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
