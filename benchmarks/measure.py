"""How everything in this folder is measured: sides interleaved, medians with quartiles, against floors of the same run.

A row of results says of one operator at one size: its time, the bytes and operations it cannot do without, the floor
these give with the copy bandwidth and matmul rate of the same session, and how many times as fast it is as each peer.
The same comparison can be checked against fp64 instead, or its peers only compiled (the option --do).
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comparison import (
    BATCHES,
    RELATIVE,
    Comparison,
    as_tuple,
    assert_close,
    named,
    on,
    poisoned,
    relative,
)
from result_file import rounded, slug_of, store, strongest
from timers import QUEUED, Pulse, clock_of
from tokenops.measuring import machine
from tokenops.measuring.timing import Spread, ratio, recorded_kernels
from tokenops.ops import backends

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
COMPILED = re.compile("compiled|flex")  # peers of operators
ROTATED_BYTES = 256 * 2**20  # on a GPU inputs rotate through more bytes than any L2 holds
MOVED = 0.15  # a steady row is refused where the machine's own rates differ by more within it
TRIES = 3  # of a steady row


class Unsteady(Exception):
    """The machine did not stay the same while a row was taken, as often as it was tried."""


def held() -> str:
    """To what a CPU is held, in words, behind a row's name too: "", "1 thread", "1 thread up to avx2".

    Each library has a variable of its own: oneDNN's alone would leave AMX to MKL, and to ours.
    """
    most = os.environ.get("TOKENOPS_CPU_ISA", "")
    missing = [
        name for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if bool(os.environ.get(name)) != bool(most)
    ]
    if missing:
        raise RuntimeError(f"TOKENOPS_CPU_ISA={most!r}, but it and {', '.join(missing)} are set together or not at all")
    return " ".join(["1 thread"] * (torch.get_num_threads() == 1) + [f"up to {most}"] * bool(most))


class Bench:
    """One session on one device: its settings, its ceilings, and the rows measured so far.

    With `lines` (a gpu.record.Lines) every row is written there at once, what is there is not done again, a peer that
    cannot run leaves a note in the row, and the ceilings are those that the run has measured.
    """

    def __init__(
        self, device: str, dtype: torch.dtype, quick: bool, compiled: str, task: str = "measure", lines: Any = None
    ) -> None:
        self.device, self.dtype, self.quick, self.compiled, self.task = device, dtype, quick, compiled, task
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.clock = clock_of(device)
        # seconds of timing a row, and its fewest rounds
        self.budget, self.rounds = (0.02, 3) if quick else (0.3, 5) if lines else (2.0, 9)
        self.rows: dict[str, dict[str, Any]] = {}
        self.refused: list[str] = []  # a line each
        self.lines = lines
        self.done = set() if not lines else lines.compiled() if task == "compile" else lines.done()
        self.tried = lines.tried() if lines else set()
        self.ceilings: dict[str, Any] = {}
        if lines:
            for line in lines.read("facts"):
                self.ceilings = line.get("ceilings", self.ceilings)

    def batch(self, name: str = "batch") -> int:
        """Images in a batch of this name; what is of a batch that the device has not is not collected."""
        images = BATCHES[self.device][name]
        return min(images, 2) if self.quick else images

    def wants_compiled(self, main: bool) -> bool:
        """Whether to take the torch.compile peer at a main size (or at another one): the option --compile."""
        return self.compiled == "all" or (self.compiled == "main" and main and not self.quick)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

    def compare(self, operator: str, **fields: Any) -> dict[str, Any]:
        """Do a comparison as the session's task has it: measure it, check it against fp64, or compile its peers.

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
            truth: what is right (the peer "reference", where that is None); called in fp64 it tells errors.
            tolerance: relative L2 between a peer's results and ours; default: RELATIVE of the dtype.
            errors: whether a row has each side's error (relative L2, of the first result) and peak memory.
            steady: on a CPU, take the machine's own rates beside the row, for longer than others, and refuse it where
                they moved by more than MOVED.

        A side gives one tensor or several; those that both sides give are compared, the first gets a gradient.

        Returns:
            The row.
        """
        comparison = Comparison(operator, **fields)
        sizes = " ".join(f"{name}{size}" for name, size in comparison.shape.items())
        name = f"{operator} {comparison.passes} {sizes} {self.dtype_name}"
        to = held() if self.device == "cpu" else ""
        name += f" {to}" if to else ""
        if name in self.done:
            pytest.skip("resumed: an earlier run has measured it")
        do = {"measure": self._measured, "check": self._checked, "compile": self._made}[self.task]
        try:
            row = rounded(do(comparison))
        except Unsteady as error:
            self.refused.append(f"{name}: refused, {error}")
            pytest.skip(self.refused[-1])
        row |= {"held": to} if to else {}
        self.rows[name] = row
        if self.lines:
            outcome = "failed" if row.get("wrong") else "ok"
            self.lines.write(name, outcome, row=row)
        if row.get("wrong"):
            raise AssertionError(f"{name}: {'; '.join(row['wrong'])}")
        return row

    def _measured(self, c: Comparison) -> dict[str, Any]:
        copies = 1 if self.device == "cpu" else min(QUEUED, math.ceil(ROTATED_BYTES / max(c.bytes, 1)))
        sets = [c.inputs() for _ in range(copies)]
        sides, kernels, failed = self._sides(c, sets)
        extra = self._errors_and_memory(sides, c, sets[0]) if c.errors else {}
        if c.steady and self.device == "cpu":
            times, machine_itself = self._steady(sides)
        else:
            times, machine_itself = self.clock.side_by_side(sides, self.budget, self.rounds, c.device_time), {}
        us = {name: Spread.of([1e6 * t for t in ts]) for name, ts in times.items()}
        floor = 1e6 * max(c.bytes / self.copy_bytes_per_s, c.flops / self.flops_per_s)
        row: dict[str, Any] = {
            "operator": c.operator,
            "passes": c.passes,
            "dtype": self.dtype_name,
            "shape": dict(c.shape),
            "kernels": sorted(kernels),
            "us": us["ours"],
            "bytes": c.bytes,
            "flops": c.flops,
            "floor_us": floor,
            "of_floor": floor / us["ours"].median,
            "peers": {name: {"us": us[name], "ratio": ratio(times[name], times["ours"])} for name in sides},
        }
        if machine_itself:
            row |= {"threads": torch.get_num_threads(), "rounds": len(times["ours"]), "machine": machine_itself}
        del row["peers"]["ours"]
        if c.device_time and (self.device == "cuda" or self.lines):
            for name, calls in sides.items():
                extra[name] = extra.get(name, {}) | self._host_and_graph(calls)
        for name, figures in extra.items():
            (row if name == "ours" else row["peers"][name]).update(figures)
        for name, theirs in c.peer_flops.items():
            if name in row["peers"]:
                flop_ratio = theirs / c.flops
                realised = row["peers"][name]["ratio"].median / flop_ratio
                row["peers"][name] |= {"flop_ratio": flop_ratio, "realised": realised}
        if row["peers"].keys() & c.peer_flops.keys():
            dense = times[strongest(row)]
            for name in row["peers"].keys() - c.peer_flops.keys():
                row["peers"][name]["speed_up"] = ratio(dense, times[name])
        if failed:
            row["failed"] = failed
        self.once = lambda: (sides["ours"][0](), self.clock.synchronize())
        return row

    def _steady(
        self, sides: Mapping[str, Sequence[Callable[[], Any]]]
    ) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
        """Times of every side, and the machine's own rates meanwhile."""
        budget, rounds = (self.budget, self.rounds) if self.quick else (3 * self.budget, self.rounds + 2)
        for _ in range(TRIES):
            pulse = Pulse(self.clock, self.dtype, self.quick)
            pulse.beat()
            times = self.clock.side_by_side(sides, budget, rounds, False, pulse.beat_again, settled=True)
            pulse.beat()
            found = pulse.found()
            if self.quick or self.lines or all(figures["moved"] <= MOVED for figures in found.values()):
                return times, found
        said = (f"{name} by {figures['moved']:.0%}" for name, figures in found.items())
        raise Unsteady(f"the machine's own rates moved by more than {MOVED:.0%}, {TRIES} times: {', '.join(said)}")

    def _sides(
        self, c: Comparison, sets: Sequence[tuple[Tensor, ...]]
    ) -> tuple[dict[str, list[Callable[[], Any]]], set[str], dict[str, str]]:
        """The calls of every side on every set of inputs, our kernels that ran, and why sides are left out."""
        sides = {"ours": [c.calls(c.ours, s) for s in sets]}
        with recorded_kernels() as kernels:
            expected = sides["ours"][0]()
        peers, failed = dict(c.peers), {}
        tolerance = c.tolerance or RELATIVE[self.dtype]
        if self.device == "cuda" and c.device_time and any(kernel.endswith(".native") for kernel in kernels):
            peers["triton"] = on("triton", c.ours)
        for name, side in peers.items():
            try:
                calls = [c.calls(side, s) for s in sets]
                result = calls[0]()
                if name not in c.peer_flops:
                    assert_close(f"{c.operator} {dict(c.shape)}: {name}", result, expected, tolerance)
                if self.device == "cuda" and c.device_time and self.task == "measure":
                    self.clock.queued(calls[0])
            except Exception as error:
                self.clock.check()  # an error that sticks to the device ends this session
                if not self.lines:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:300]
            else:
                sides[name] = calls
        return sides, kernels, failed

    def _made(self, c: Comparison) -> dict[str, Any]:
        """Peers that compile have compiled, and left it in the caches on disk."""
        start = time.perf_counter()
        peers = {name: side for name, side in c.peers.items() if not c.device_time or COMPILED.search(name)}
        _, _, failed = self._sides(c._replace(peers=peers), [c.inputs()])
        return {"seconds": time.perf_counter() - start} | ({"failed": failed} if failed else {})

    def _checked(self, c: Comparison) -> dict[str, Any]:
        """Every backend against fp64: twice plain PyTorch's error in this dtype is allowed, and a few roundings."""
        few = (16 if self.dtype.itemsize > 2 else 2) * torch.finfo(self.dtype).eps  # products of fp32 in three of tf32
        tensors, truth = c.inputs(), c.truth or c.peers["reference"]
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        right, plain = (named(c.calls(truth, inputs)()) for inputs in (wide, tensors))
        row: dict[str, Any] = {"operator": c.operator, "passes": c.passes, "dtype": self.dtype_name, "backends": {}}
        wrong = []
        for backend in backends.TABLE[c.op][self.device]:
            if backends.why_not(c.op, backend, self.device, self.dtype) is not None:
                continue  # Triton on a CPU that does not interpret
            with poisoned(), recorded_kernels() as kernels:
                found = named(c.calls(on(backend, c.ours), tensors)())
            if not any(kernel.endswith(f".{backend}") for kernel in kernels):
                wrong.append(f"{backend}: none of its kernels ran, but {sorted(kernels)}")
            errors = {}
            for name, value in right.items():
                if value is None or found.get(name) is None or value.numel() == 1:
                    continue  # the gradient of a scale cancels to less than its terms' roundings
                ours, theirs = (relative(x[name], value) for x in (found, plain))
                errors[name] = {"ours": ours, "plain": theirs}
                if not ours <= 2 * theirs + few:  # NaN is wrong too
                    wrong.append(f"{backend}: {name} is {ours:.1e} from fp64, plain PyTorch {theirs:.1e}")
            row["backends"][backend] = {"kernels": sorted(kernels), "errors": errors}
        if not row["backends"]:
            wrong.append("no backend could run")
        return row | ({"wrong": wrong} if wrong else {})

    def _host_and_graph(self, calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
        figures: dict[str, Any] = {"host_us": self.clock.host_us(calls)}
        try:
            figures["graph_us"] = self.clock.graph_us(calls[0])
        except Exception as error:
            self.clock.check()
            figures["no_graph"] = f"{type(error).__name__}: {error}"[:200]
        return figures

    def text(self) -> list[str]:
        """The rows in words: time, fraction of the floor, and how many times as fast as each peer (quartiles)."""
        return [
            f"{name}: {row['us'][0]:.4g} us, {row['of_floor']:.0%} of the floor; times as fast as "
            + ", ".join(
                "{}: {:.2f} ({:.2f}..{:.2f})".format(peer, *figures["ratio"]) for peer, figures in row["peers"].items()
            )
            + _errors_and_memory(row)
            for name, row in self.rows.items()
            if "us" in row
        ] + self.refused

    def _errors_and_memory(
        self, sides: Mapping[str, Sequence[Callable[[], Any]]], c: Comparison, inputs: Sequence[Tensor]
    ) -> dict[str, dict[str, float]]:
        """Of every side: the first result's relative L2 error against fp64, and bytes held at the peak of a call."""
        truth = c.truth or c.peers["reference"]
        right = as_tuple(truth(*(t.double() for t in inputs)))[0]
        return {
            name: {"error": relative(calls[0]()[0][0], right), "peak_bytes": self._peak(calls[0])}
            for name, calls in sides.items()
        }

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

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """Bytes read plus written by a copy of a large buffer."""
        if "copy_bytes_per_s" in self.ceilings:
            return self.ceilings["copy_bytes_per_s"]
        size = 2**22 if self.quick else 2**30 if self.device == "cuda" else 2**27
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * size / self.clock.best(lambda: target.copy_(source), 3 if self.quick else 10)

    @cached_property
    def flops_per_s(self) -> float:
        """Rate of a large square matmul of random numbers in this dtype."""
        if f"flops_per_s_{self.dtype_name}" in self.ceilings:
            return self.ceilings[f"flops_per_s_{self.dtype_name}"]
        size = 256 if self.quick else 8192 if self.device == "cuda" else 2048
        a, b = self.random(size, size), self.random(size, size)
        return 2 * size**3 / self.clock.best(lambda: a @ b, 3 if self.quick else 10)

    def write(self, folder: Path) -> Path:
        """Merge this session's rows into folder/<device>.json."""
        run = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        rates = {"copy_bytes_per_s": self.copy_bytes_per_s, f"flops_per_s_{self.dtype_name}": self.flops_per_s}
        facts = machine.facts(self.device) | {"commit": machine.commit()} | rounded(rates)
        path = folder / f"{slug_of(machine.device_name(self.device), self.device)}.json"
        store(path, {run: facts}, {name: {"run": run, **row} for name, row in self.rows.items()})
        return path


def _errors_and_memory(row: Mapping[str, Any]) -> str:
    """In words, where they were measured."""
    if "error" not in row:
        return ""
    sides = {"ours": row, **row["peers"]}
    said = (f"{name} {side['error']:.1e} {side['peak_bytes'] / 2**20:.1f}" for name, side in sides.items())
    return f"; error and peak MiB: {', '.join(said)}"
