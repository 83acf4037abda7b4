"""Clocks: what a call costs the device, what it costs the host, and what is left of both in a CUDA graph; modules made
faster in ways that begin with the first call; and the pulse of a machine that others use too."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from tokenops.measuring.timing import Call, Spread, clock, interleaved

SETTLING, SETTLED_AFTER = 4, 0.05  # calls, and seconds
QUEUED = 20  # calls a GPU sample queues at most: few enough that the launch queue never fills


def loop(calls: Sequence[Call], times: int) -> None:
    for i in range(times):
        calls[i % len(calls)]()


def median(sample: Callable[[], float]) -> float:
    """Of eleven samples, or of as many as 0.2 seconds take, three at least."""
    start, samples = time.perf_counter(), [sample()]
    while len(samples) < 3 or len(samples) < 11 and time.perf_counter() - start < 0.2:
        samples.append(sample())
    return Spread.of(samples).median


class Clock:
    """The clocks of a CPU: a call's time is its time on the wall, and there are no graphs."""

    device = "cpu"

    def __init__(self) -> None:
        self.seconds = clock(self.device)

    def synchronize(self) -> None:
        pass

    def check(self) -> None:
        """RuntimeError: what went wrong before has left this process unable to go on."""
        self.synchronize()

    def queued(self, call: Call) -> float:
        """Seconds of the device alone."""
        return self.seconds(call)

    def graphed(self, call: Call) -> Call:
        """The call as a graph that is replayed: same tensors every time."""
        return call

    def host_us(self, calls: Sequence[Call]) -> float:
        """Host time of one call, the device never waited for."""

        def sample() -> float:
            self.synchronize()
            start = time.perf_counter()
            loop(calls, QUEUED)
            return time.perf_counter() - start

        return 1e6 * median(sample) / QUEUED

    def graph_us(self, call: Call) -> float:
        """Time of one call replayed from a graph (its inputs are the same every time, so they may sit in L2)."""
        replay = self.graphed(call)
        times = self.repeats(self.queued(replay))
        return 1e6 * median(lambda: self.queued(partial(loop, [replay], times))) / times

    def best(self, call: Call, times: int) -> float:
        """The least seconds of a call."""
        call()
        return min(self.seconds(call) for _ in range(times))

    def warm(self, calls: Sequence[Call]) -> float:
        """Call until it is warm (and whatever compiles lazily is compiled); the best time of a call."""
        calls[0]()
        times = [self.seconds(calls[0])]
        while len(times) < max(3, len(calls)) and sum(times) < 0.5:
            times.append(self.seconds(calls[len(times) % len(calls)]))
        return min(times)

    def side_by_side(
        self,
        sides: Mapping[str, Sequence[Call]],
        budget: float,
        fewest: int,
        device_time: bool,
        after_round: Call = lambda: None,
        settled: bool = False,
    ) -> dict[str, list[float]]:
        """Seconds a call, of every side in every round, in about `budget` seconds and no fewer rounds than `fewest`;
        short calls are repeated until a sample takes a millisecond. `settled`: behind calls that are not timed."""
        seconds = self.queued if device_time else self.settled if settled else self.seconds
        loops = {name: self.repeats(self.warm(calls)) for name, calls in sides.items()}
        batches = {name: partial(loop, calls, loops[name]) for name, calls in sides.items()}
        start = time.perf_counter()
        for batch in batches.values():
            seconds(batch)
        rounds = math.ceil(budget / (time.perf_counter() - start))
        times = interleaved(batches, min(max(rounds, fewest), 101), seconds, after_round)
        return {name: [t / loops[name] for t in ts] for name, ts in times.items()}

    def settled(self, call: Call) -> float:
        """Seconds of a call behind a few that are not timed, until its weights are in the caches that another side has
        filled: who runs one model finds them there (benchmarks/NOTES.md)."""
        start, times = time.perf_counter(), 0
        while times < SETTLING and time.perf_counter() - start < SETTLED_AFTER:
            call()
            times += 1
        return self.seconds(call)

    def repeats(self, seconds: float) -> int:
        return math.ceil(1e-3 / seconds)


class GpuClock(Clock):
    device = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def check(self) -> None:
        super().check()
        torch.rand(1, device="cuda")  # after a capture that broke the generator believes that it goes on

    def best(self, call: Call, times: int) -> float:
        start = time.perf_counter()
        while time.perf_counter() - start < 0.2:  # until the card has left its idle clocks
            call()
            torch.cuda.synchronize()
        return super().best(call, times)

    def repeats(self, seconds: float) -> int:
        return min(super().repeats(seconds), QUEUED)

    def queued(self, call: Call) -> float:
        """The GPU sleeps until the host has queued everything, so it never waits for a launch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for cycles in (4 * 10**6, 4 * 10**7, 4 * 10**8):
            torch.cuda.synchronize()
            torch.cuda._sleep(cycles)
            start.record()
            call()
            end.record()
            in_time = not start.query()  # still asleep: all of it was queued
            end.synchronize()
            if in_time:
                return start.elapsed_time(end) / 1e3
        raise RuntimeError("the host could not queue a sample ahead of the GPU: its times would be launch times")

    def graphed(self, call: Call) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
            torch.cuda.set_sync_debug_mode("error")  # what waits for the device would break the capture, for good
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()

        def replay() -> object:
            graph.replay()
            return results  # they must outlive the capture

        return replay


def clock_of(device: str) -> Clock:
    return GpuClock() if device == "cuda" else Clock()


class Graphed:
    """A module for inference as a CUDA graph: captured at the first call, then the input is copied in and it is
    replayed."""

    def __init__(self, module: Callable, clock: Clock) -> None:
        self.module, self.clock = module, clock
        self.replay: Call | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.replay is None:
            self.x = x.clone()

            def call() -> None:
                self.y = self.module(self.x)

            self.replay = self.clock.graphed(call)
        self.x.copy_(x)
        self.replay()
        return self.y


class Frozen:
    """A module for inference compiled with its weights as constants, at the first call: a copy, as they are packed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.compiled = torch.compile(copy.deepcopy(module), dynamic=False)
        self.made = False

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.made:
            return self.compiled(x)
        with torch._inductor.config.patch(freezing=True):
            y = self.compiled(x)
        self.made = True
        return y


class Pulse:
    """What the machine itself does, taken before, while and after something is timed.

    A beat copies a buffer and multiplies two matrices a few times each, some 20 ms in all. How far the rates moved is
    the largest over the smallest of the medians of each third of the time: what comes and goes within it the sides of
    a comparison share, as they are interleaved.
    """

    EVERY = 0.5  # seconds at least between beats
    TIMES = 5

    def __init__(self, clock: Clock, dtype: torch.dtype, quick: bool = False) -> None:
        size, n = (2**16, 64) if quick else (2**25, 1024 if dtype.itemsize < 4 else 768)
        source = torch.empty(size, dtype=torch.uint8).random_()
        target, a, b = torch.empty_like(source), torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        self.seconds = clock.seconds
        self.work = {
            "copy_bytes_per_s": (2 * size, lambda: target.copy_(source)),
            "flops_per_s": (2 * n**3, lambda: torch.mm(a, b)),
        }
        self.rates: dict[str, list[float]] = {name: [] for name in self.work}
        self.last = -math.inf

    def beat(self) -> None:
        for name, (amount, call) in self.work.items():
            call()
            self.rates[name].append(amount / Spread.of([self.seconds(call) for _ in range(self.TIMES)]).median)
        self.last = time.perf_counter()

    def beat_again(self) -> None:
        """Unless the last one was just now."""
        if time.perf_counter() - self.last > self.EVERY:
            self.beat()

    def found(self) -> dict[str, dict[str, float]]:
        """Of each rate the median, and by which part of it the beats differ."""
        figures = {}
        for name, rates in self.rates.items():
            n = len(rates)
            thirds = [Spread.of(part).median for i in range(3) if (part := rates[i * n // 3 : (i + 1) * n // 3])]
            figures[name] = {"median": Spread.of(rates).median, "moved": max(thirds) / min(thirds) - 1}
        return figures
