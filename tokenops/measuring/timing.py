"""Timing several ways of doing one thing: interleaved, so that what slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]


class Spread(NamedTuple):
    """The median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as fast ours is, from times taken in the same rounds."""
    return Spread.of([their / our for their, our in zip(theirs, ours, strict=True)])


def interleaved(
    sides: Mapping[str, Call],
    rounds: int,
    seconds: Callable[[Call], float],
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times of every side in every round. The order rotates, so no side always runs behind the same one."""
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(sides[name]))
        after_round()
    return times


def clock(device: str) -> Callable[[Call], float]:
    """seconds(call): wall time on a CPU, on a GPU the time between two events around the call, launches included."""
    return _seconds_on_gpu if device == "cuda" else _seconds_on_cpu


def _seconds_on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class _Recorder(TorchDispatchMode):
    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What first runs in the block is compiled too; else torch.compile passes it over, in 2.11 for good."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tokenops":
            self.names.add(str(func).removeprefix("tokenops."))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_kernels() -> Iterator[set[str]]:
    """Collects the tokenops kernels that run in the block: {"soft_aggregate_fwd.triton"}; none under the reference."""
    names: set[str] = set()
    with _Recorder(names):
        yield names
