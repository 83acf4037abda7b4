"""How everything in this folder is measured: sides interleaved, medians with quartiles, against floors of the same run.

A row of results says of one operator at one size: its time, the bytes and operations it cannot do without, the floor
these give with the copy bandwidth and matmul rate of the same session, and how many times as fast it is as each peer.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenops.cli import machine
from tokenops.cli.timing import Spread, clock, interleaved, ratio, recorded_kernels

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
PASSES = ("forward", "forward+backward")
ROTATED_BYTES = 256 * 2**20  # on a GPU inputs rotate through more bytes than any L2 holds
QUEUED = 20  # calls a GPU sample queues at most: few enough that the launch queue never fills
RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Size(NamedTuple):
    """An operator's size: DeiT's 196 tokens slimmed to 98 at one width, for the device's whole batch or one image."""

    C: int
    whole_batch: bool = True
    main: bool = False

    def of(self, bench: "Bench") -> tuple[int, int, int, int]:
        """B, N, M, C."""
        return bench.batch(self.whole_batch), *((24, 12, self.C // 12) if bench.quick else (196, 98, self.C))

    def __str__(self) -> str:
        return f"{'batch' if self.whole_batch else 'single'}-C{self.C}"


SIZES = (Size(192), Size(384, main=True), Size(768), Size(384, whole_batch=False))


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors, each counted once."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Bench:
    """One session on one device: its settings, its ceilings, and the rows measured so far."""

    def __init__(self, device: str, dtype: torch.dtype, quick: bool, compiled: str) -> None:
        self.device, self.dtype, self.quick, self.compiled = device, dtype, quick, compiled
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.seconds = clock(device)
        self.budget = 0.02 if quick else 2.0  # seconds of timing a row
        self.rows: dict[str, dict[str, Any]] = {}

    def batch(self, whole: bool = True) -> int:
        """Images in a batch: the whole batch of this device, or one."""
        return 1 if not whole else 2 if self.quick else 256 if self.device == "cuda" else 16

    def wants_compiled(self, main: bool) -> bool:
        """Whether to take the torch.compile peer at a main size (or at another one): the option --compile."""
        return self.compiled == "all" or (self.compiled == "main" and main and not self.quick)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

    def compare(
        self,
        operator: str,
        *,
        shape: Mapping[str, int],
        inputs: Callable[[], tuple[Tensor, ...]],
        ours: Callable[..., Any],
        peers: Mapping[str, Callable[..., Any]],
        bytes: int,
        flops: int,
        passes: str = "forward",
        peer_flops: Mapping[str, int] | None = None,
        device_time: bool = True,
        truth: Callable[..., Any] | None = None,
    ) -> tuple[dict[str, Any], Callable[[], object]]:
        """Time `ours` against `peers` on the same inputs, check that they agree, and keep the row.

        Args:
            operator: its name.
            shape: sizes by name, {"B": 16, "N": 196, ...}.
            inputs: makes one set of random inputs; every side is called as side(*inputs). In "forward+backward" all
                float inputs get gradients.
            ours: our way.
            peers: the other ways by name: "reference", "compiled", "published", ...
            bytes: each input read once and each output written once, in all passes.
            flops: additions plus multiplications of the matrix products, in all passes.
            passes: one of PASSES. Inputs a side does not use get no gradient from it.
            peer_flops: of peers that do another amount of work, so compute something else: not checked for agreement,
                and the row says how much of the FLOP ratio is realised as time.
            device_time: on a GPU, time the kernels alone, the launches queued ahead (else from launch to end), and
                report the host's time a call and the time of a CUDA graph's replay beside it.
            truth: what is right; called in fp64, it gives each side's error (relative L2, of the first result), and
                each side's peak memory is measured too.

        A side gives one tensor or several; those that both sides give are compared, the first gets a gradient.

        Returns:
            The row, and one call of ours that waits for the device.
        """
        run = {"forward": _forward, "forward+backward": _forward_backward}[passes]
        copies = 1 if self.device == "cpu" else min(QUEUED, math.ceil(ROTATED_BYTES / max(bytes, 1)))
        sets = [inputs() for _ in range(copies)]
        sides = {name: [run(side, s) for s in sets] for name, side in {"ours": ours, **peers}.items()}
        with recorded_kernels() as kernels:
            expected = sides["ours"][0]()
        for name in peers:
            if name not in (peer_flops or {}):
                _assert_close(f"{operator} {dict(shape)}: {name}", sides[name][0](), expected, RELATIVE[self.dtype])
        extra = {} if truth is None else self._errors_and_memory(sides, truth, sets[0])
        times = self._interleaved(sides, _seconds_queued if self.device == "cuda" and device_time else self.seconds)
        us = {name: Spread.of([1e6 * t for t in ts]) for name, ts in times.items()}
        floor = 1e6 * max(bytes / self.copy_bytes_per_s, flops / self.flops_per_s)
        row: dict[str, Any] = {
            "operator": operator,
            "passes": passes,
            "dtype": self.dtype_name,
            "shape": dict(shape),
            "kernels": sorted(kernels),
            "us": us["ours"],
            "bytes": bytes,
            "flops": flops,
            "floor_us": floor,
            "of_floor": floor / us["ours"].median,
            "peers": {name: {"us": us[name], "ratio": ratio(times[name], times["ours"])} for name in peers},
        }
        for name, figures in extra.items():
            (row if name == "ours" else row["peers"][name]).update(figures)
        for name, theirs in (peer_flops or {}).items():
            flop_ratio = theirs / flops
            row["peers"][name] |= {
                "flop_ratio": flop_ratio,
                "realised": row["peers"][name]["ratio"].median / flop_ratio,
            }
        if self.device == "cuda" and device_time:
            row |= {"host_us": self._host_us(sides["ours"]), "graph_us": self._graph_us(sides["ours"][0])}
        row = _rounded(row)
        sizes = " ".join(f"{name}{size}" for name, size in shape.items())
        self.rows[f"{operator} {passes} {sizes} {self.dtype_name}"] = row
        return row, lambda: (sides["ours"][0](), self.synchronize())

    def lines(self) -> list[str]:
        """The rows in words: time, fraction of the floor, and how many times as fast as each peer (quartiles)."""
        return [
            f"{name}: {row['us'][0]:.4g} us, {row['of_floor']:.0%} of the floor; times as fast as "
            + ", ".join(
                "{}: {:.2f} ({:.2f}..{:.2f})".format(peer, *figures["ratio"]) for peer, figures in row["peers"].items()
            )
            + _errors_and_memory(row)
            for name, row in self.rows.items()
        ]

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _interleaved(
        self, sides: Mapping[str, Sequence[Callable[[], object]]], seconds: Callable[[Callable[[], object]], float]
    ) -> dict[str, list[float]]:
        """Seconds a call, of every side in every round; short calls are repeated until a sample takes a millisecond."""
        loops = {name: math.ceil(1e-3 / _warm(calls, self.seconds)) for name, calls in sides.items()}
        if self.device == "cuda":
            loops = {name: min(count, QUEUED) for name, count in loops.items()}
        batches = {name: partial(_loop, calls, loops[name]) for name, calls in sides.items()}
        start = time.perf_counter()
        for batch in batches.values():
            seconds(batch)
        rounds = math.ceil(self.budget / (time.perf_counter() - start))
        times = interleaved(batches, min(max(rounds, 3 if self.quick else 9), 101), seconds)
        return {name: [t / loops[name] for t in ts] for name, ts in times.items()}

    def _errors_and_memory(
        self, sides: Mapping[str, Sequence[Callable[[], Any]]], truth: Callable[..., Any], inputs: Sequence[Tensor]
    ) -> dict[str, dict[str, float]]:
        """Of every side: the first result's relative L2 error against fp64, and bytes held at the peak of a call."""
        right = _tuple(truth(*(t.double() for t in inputs)))[0]
        found = {}
        for name, calls in sides.items():
            error = (calls[0]()[0][0].double() - right).norm() / right.norm()
            found[name] = {"error": error.item(), "peak_bytes": self._peak(calls[0])}
        return found

    def _peak(self, call: Callable[[], object]) -> int:
        """What torch's allocator hands out at most during a call (on a CPU, not the scratch of compiled code)."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = held = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def _host_us(self, calls: Sequence[Callable[[], object]]) -> float:
        """Host time of one call, the device never waited for."""
        times = []
        for _ in range(11):
            torch.cuda.synchronize()
            start = time.perf_counter()
            _loop(calls, QUEUED)
            times.append((time.perf_counter() - start) / QUEUED)
        return 1e6 * Spread.of(times).median

    def _graph_us(self, call: Callable[[], object]) -> float:
        """Time of one call replayed from a CUDA graph (same inputs every time, so they may sit in L2)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()  # noqa: F841  results must outlive the capture
        times = [_seconds_queued(partial(_loop, [graph.replay], QUEUED)) / QUEUED for _ in range(11)]
        return 1e6 * Spread.of(times).median

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """Bytes read plus written by a copy of a large buffer."""
        size = 2**22 if self.quick else 2**30 if self.device == "cuda" else 2**27
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * size / self._best(lambda: target.copy_(source))

    @cached_property
    def flops_per_s(self) -> float:
        """Rate of a large square matmul of random numbers in this dtype."""
        size = 256 if self.quick else 8192 if self.device == "cuda" else 2048
        a, b = self.random(size, size), self.random(size, size)
        return 2 * size**3 / self._best(lambda: a @ b)

    def _best(self, call: Callable[[], object]) -> float:
        call()
        return min(self.seconds(call) for _ in range(3 if self.quick else 10))

    def write(self, folder: Path) -> Path:
        """Merge this session's rows into folder/<device>.json; earlier rows stay, with the run they came from."""
        path = folder / f"{machine.slug(self.device)}.json"
        kept = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": {}}
        run = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        rows = kept["rows"] | {name: {"run": run, **row} for name, row in self.rows.items()}
        runs = kept["runs"] | {run: self._run()}
        used = {row["run"] for row in rows.values()}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '{"runs": {\n'
            + ",\n".join(f"{json.dumps(key)}: {json.dumps(runs[key])}" for key in sorted(used))
            + '\n},\n"rows": {\n'
            + ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
            + "\n}}\n"
        )
        return path

    def _run(self) -> dict[str, Any]:
        ceilings = {"copy_bytes_per_s": self.copy_bytes_per_s, f"flops_per_s_{self.dtype_name}": self.flops_per_s}
        return machine.facts(self.device) | {"commit": machine.commit()} | _rounded(ceilings)


def _errors_and_memory(row: Mapping[str, Any]) -> str:
    """In words, where they were measured."""
    if "error" not in row:
        return ""
    sides = {"ours": row, **row["peers"]}
    said = (f"{name} {side['error']:.1e} {side['peak_bytes'] / 2**20:.1f}" for name, side in sides.items())
    return f"; error and peak MiB: {', '.join(said)}"


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _forward(side: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """A call that gives the results, and no gradients."""

    @torch.no_grad()
    def call():
        return _tuple(side(*tensors)), ()

    return call


def _forward_backward(side: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """A call that gives the results, and the gradients of the inputs for one of the first result."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    leaves = [t for t in tensors if t.requires_grad]
    with torch.no_grad():
        like = _tuple(side(*tensors))[0]
    dy = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=_generator(like.device))

    def call():
        results = _tuple(side(*tensors))
        gradients = torch.autograd.grad(results[0], leaves, dy, allow_unused=True)
        return tuple(result.detach() for result in results), gradients

    return call


def _generator(device: torch.device) -> torch.Generator:
    """The same upstream gradient for every side."""
    return torch.Generator(device).manual_seed(0)


def _loop(calls: Sequence[Callable[[], object]], times: int) -> None:
    for i in range(times):
        calls[i % len(calls)]()


def _warm(calls: Sequence[Callable[[], object]], seconds: Callable[[Callable[[], object]], float]) -> float:
    """Call until it is warm (and whatever compiles lazily is compiled); the best time of a call."""
    calls[0]()
    times = [seconds(calls[0])]
    while len(times) < max(3, len(calls)) and sum(times) < 0.5:
        times.append(seconds(calls[len(times) % len(calls)]))
    return min(times)


def _seconds_queued(call: Callable[[], object]) -> float:
    """Device time alone: the GPU sleeps until the host has queued everything, so it never waits for a launch."""
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
            break
    else:
        raise RuntimeError("the host could not queue a sample ahead of the GPU: its times would be launch times")
    return start.elapsed_time(end) / 1e3


def _assert_close(what: str, theirs: Any, ours: Any, tolerance: float) -> None:
    """A fast wrong answer is not worth timing. (What is right, the tests decide, with far narrower tolerances.)"""
    # results that only one side gives, and gradients of inputs that only some sides take, are not compared
    pairs = [*zip(theirs[0], ours[0]), *zip(theirs[1], ours[1], strict=True)]
    for i, (a, b) in enumerate(pairs):
        if a is None or b is None:
            continue
        if (
            a.shape == b.shape and a.numel() == 1
        ):  # a scale's gradient cancels to less than a peer's low precision holds
            continue
        error = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)
        if a.shape != b.shape or not error <= tolerance:
            raise AssertionError(f"{what} and ours differ in result {i}: {a.shape}, {b.shape}, relative L2 {error:.1e}")


def _rounded(value: Any) -> Any:
    """Floats to four digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
