"""Launch configurations of the matrix kernels, tried one after another: what ops/triton/launches.json is made of.

`python -m gpu.sweep` writes a line a candidate: its time beside that of the launcher's own configuration, taken in the
same rounds. A candidate that fails, spills, or gives something else is a line too. Those that have a line are not tried
again; after an error that leaves the GPU unusable the exit code is 3, and a new process goes on.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from gpu.candidates import DTYPES, KERNELS, Config, Group, Launched, groups
from gpu.record import FAILED, OK, Lines, lines

ROUNDS = 7
BROKEN = 3  # the exit code
#: relative L2 between the results of two configurations: sums in another order, rounded
RELATIVE = {torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float32: 1e-5}


def agree(ours: Sequence[Any], default: Sequence[Any], dtype: torch.dtype) -> str | None:
    """What is different, in words. Single numbers (a scale's gradient) cancel to less than the dtype holds."""
    for i, (a, b) in enumerate(zip(ours, default, strict=True)):
        if b.numel() < 2:
            continue
        error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
        if not error <= RELATIVE[dtype]:
            return f"result {i} differs from the default configuration's: relative L2 {error:.1e}"
    return None


def capability() -> int:
    """Of the GPU that is there: 90 is 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def microseconds(sides: Mapping[str, Sequence[Callable[[], object]]], device: str) -> dict[str, float]:
    """The median time of a call of each side, taken in turns."""
    from timers import clock_of
    from tokenops.measuring.timing import Spread

    rounds = 1 if device == "cpu" else ROUNDS
    times = clock_of(device).side_by_side(sides, 0.0, rounds, device_time=True)
    return {name: 1e6 * Spread.of(ts).median for name, ts in times.items()}


def _copies(launched: Launched, device: str) -> int:
    """How many sets of tensors are rotated, so that none is in L2 when it is its turn."""
    from comparison import nbytes
    from measure import ROTATED_BYTES
    from timers import QUEUED

    size = nbytes(*{t.data_ptr(): t for t in launched.tensors}.values())
    return 1 if device == "cpu" else min(QUEUED, math.ceil(ROTATED_BYTES / max(size, 1)))


def sweep(group: Group, candidates: Iterable[Config], device: str, found: Lines) -> None:
    """A line for each of the candidates."""
    from comparison import poisoned
    from timers import clock_of

    gpu = None if device == "cpu" else capability()
    common = {"gpu": gpu, "kernel": group.kernel, "entry": None if gpu is None else group.entry(gpu)}
    defaults: list[Launched] = []
    calls: list[Callable[[], tuple]] = []
    for candidate in candidates:
        line = {**common, "launch": candidate}
        try:
            if not defaults:
                calls.append(group.prepared(device))
                with poisoned():
                    defaults.append(group.launched(calls[0], {}))
                for _ in range(_copies(defaults[0], device) - 1):
                    calls.append(group.prepared(device))
                    defaults.append(group.launched(calls[-1], {}))
            began = time.perf_counter()
            sets, wrong = defaults, None
            if candidate:
                with poisoned():
                    sets = [group.launched(calls[0], candidate)]
                    wrong = agree(sets[0].outputs, defaults[0].outputs, DTYPES[group.dtype])
                sets += [group.launched(call, candidate) for call in calls[1:]]
            line["seconds"] = round(time.perf_counter() - began, 2)
            binary = sets[0].binary
            if binary is not None:  # interpreted there is none
                spills, shared = binary.n_spills, binary.metadata.shared
                line |= {"registers": binary.n_regs, "spills": spills, "shared": shared}
            sides = {"default_us": [s.again for s in defaults], "us": [s.again for s in sets]}
            line |= {name: float(f"{us:.4g}") for name, us in microseconds(sides, device).items()}
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None:
            found.write(group.key(candidate), OK, **line)
        else:
            found.write(group.key(candidate), FAILED, message=wrong, **line)
            try:
                clock_of(device).check()
            except RuntimeError:  # the GPU takes nothing from this process any more
                sys.exit(BROKEN)


def run(device: str, dtypes: Sequence[str], kernels: Iterable[str], found: Lines) -> None:
    """Everything that has no line yet."""
    tried = {line["key"] for line in found.read("sweep")}
    for group in groups(device, dtypes, kernels):
        candidates = group.candidates[:2] if device == "cpu" else group.candidates
        missing = [candidate for candidate in candidates if group.key(candidate) not in tried]
        if missing:
            sweep(group, missing, device, found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted, at tiny sizes")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        from support.interpreter import patch_once

        patch_once()
    run(options.device, options.dtypes, options.kernels, lines("sweep"))


if __name__ == "__main__":
    main()
