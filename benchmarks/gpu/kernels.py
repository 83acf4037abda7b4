"""Compiles ahead what later steps launch, into Triton's cache, on cores that have nothing else to do.

`python -m gpu.kernels`: what DeiT-S launches, then all cases of kernel_cases.py, then what the sweep tries. Each is
compiled as a launch would compile it, for the GPU that is there (a rehearsal, --device cpu: for sm_90), of tensors that
have no memory. A line a case.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

from gpu.candidates import Config, Group, compiled, groups
from gpu.processes import die_with_parent
from gpu.record import FAILED, OK, lines
from gpu.sweep import capability

#: the rest of what DeiT-S launches is in kernel_cases.QUICK
DEIT_S = (
    ("masked_channel_attention", "M197-N197-D64-64-none"),
    ("masked_channel_attention", "M197-N197-D64-64-class-bias"),
    ("merge_bipartite", "N196-r13-C384-sizes-norm"),
)
SMALL = ("restore_tokens", "N196-k98-C384")


class Case(NamedTuple):
    """A case of kernel_cases.py, forward and backward."""

    operator: str
    name: str
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.operator} {self.name} {self.dtype}"

    def compile(self, target: int) -> list[Any]:
        from kernel_cases import CASES, DTYPES, compiling

        for name, run in CASES[self.operator](DTYPES[self.dtype]):
            if name == self.name:  # run now: the next case changes what it refers to
                with compiling(target) as made:
                    run()
                return [launch.binary for launch in made]
        raise KeyError(f"{self.operator} has no case {self.name}")


class Candidate(NamedTuple):
    """A configuration that the sweep tries."""

    group: Group
    launch: Config

    @property
    def key(self) -> str:
        return f"sweep {self.group.key(self.launch)}"

    def compile(self, target: int) -> list[Any]:
        return [compiled(self.group, self.launch, target)]


def jobs() -> Iterator[Case | Candidate]:
    """Everything, what is launched first and most often first."""
    from kernel_cases import CASES, QUICK, case_names

    first = [*QUICK, *DEIT_S]
    others = [(operator, name) for operator in CASES for name in case_names(operator) if (operator, name) not in first]
    for cases in (first, others):
        for dtype in ("bf16", "fp32"):
            yield from (Case(operator, name, dtype) for operator, name in cases)
    for group in groups():
        yield from (Candidate(group, launch) for launch in group.candidates)


def start(parent: int) -> None:
    """What a worker does first: it gives way to the steps it runs beside, and ends with its parent."""
    os.nice(10)
    die_with_parent()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def make_launcher(binary: Any) -> None:
    """What calls the kernel: in some versions of Triton C code, compiled once a signature and cached as kernels are."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(binary.src, binary.metadata)


def work(job: Case | Candidate, target: int, launchers: bool) -> None:
    """One line. Where a launcher cannot be made ahead the kernel is compiled all the same, and the line says why."""
    found, began, values = lines("kernels"), time.perf_counter(), {}
    try:
        binaries = job.compile(target)
    except Exception as error:
        found.write(job.key, FAILED, message=f"{type(error).__name__}: {error}")
        return
    try:
        for binary in binaries if launchers else ():
            make_launcher(binary)
    except Exception as error:
        values["launcher"] = f"{type(error).__name__}: {error}"
    found.write(job.key, OK, seconds=round(time.perf_counter() - began, 2), kernels=len(binaries), **values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--workers", type=int, default=12, help="processes")
    parser.add_argument(
        "--cases", type=int, help="so many, the first ones; default: all, and a small one in a rehearsal"
    )
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "0"  # of the workers, which import triton
    target = 90 if options.device == "cpu" else capability()
    wanted = [Case(*SMALL, "bf16")] if options.device == "cpu" and options.cases is None else list(jobs())
    done = lines("kernels").compiled()
    wanted = [job for job in wanted[: options.cases] if job.key not in done]
    if wanted:
        workers = min(options.workers, len(wanted))
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=start, initargs=(os.getpid(),)) as pool:
            waiting = [pool.submit(work, job, target, options.device == "cuda") for job in wanted]
            try:
                for job in waiting:
                    job.result()
            except BrokenProcessPool:
                sys.exit(3)  # a worker died: begin again behind what is compiled


if __name__ == "__main__":
    main()
