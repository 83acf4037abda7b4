"""`make gpu`: the steps of plan.py, each in its own process under its own time limit, offline.

What is found is in the folder the moment it is found (lines.jsonl, one result a line; log.txt, what processes
printed), so that nothing is lost when the run is killed. Run again with the same folder, it does what is not done.
"""

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from . import plan, processes, record

LIMIT, REHEARSAL = 560, 175  # seconds for everything
GRACE = 5  # seconds kept of the limit for the summary
LOST = 3  # exit code of a step that has lost the device to an error: a new process goes on
NO_GPU = 4  # of the first step, where there is no GPU: nothing else is tried


class Running(NamedTuple):
    process: subprocess.Popen
    nice: int
    began: float
    lines: int  # there were, when it began


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = ", ".join(plan.NAMES)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"some of {steps}; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder of lines.jsonl and log.txt")
    parser.add_argument("--resume", type=Path, help="a lines.jsonl of before: what it has is not done again")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal at tiny sizes")
    parser.add_argument("--limit", type=float, help=f"seconds for everything; default: {LIMIT}")
    parser.add_argument("--commit", help="what the results are of, where the source is no git repository")
    options = parser.parse_args()
    for step in options.steps:
        if step not in plan.NAMES:
            parser.error(f"step {step!r} is not one of {steps}")
    return options


def main() -> int:
    options = arguments()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = record.Lines(out / "lines.jsonl", "run")
    if options.resume and not lines.path.exists():
        shutil.copyfile(options.resume, lines.path)
    began = time.time()
    os.environ |= {
        "GPU_LINES": str(lines.path),
        "GPU_LOG": str(out / "log.txt"),
        "GPU_BEGAN": str(began),
        "GPU_RUN": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "GPU_COMMIT": options.commit or "",
    }
    caches = processes.ROOT / "build/gpu"  # not in the folder: compiled kernels are no results
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except OSError:  # of a tree that only reads
        caches = Path(tempfile.gettempdir(), f"tokenops-gpu-{os.getuid()}")
        caches.mkdir(exist_ok=True)
    with (caches / "runs").open("a+") as file:
        file.write(os.environ["GPU_RUN"] + "\n")
        file.seek(0)
        os.environ["GPU_CACHED"] = file.read()
    os.environ.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    if options.device == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    chosen = options.steps or list(plan.NAMES)
    limit = options.limit or (REHEARSAL if options.device == "cpu" else LIMIT)
    run(chosen, options.device, limit - GRACE, lines, began)
    print(summary(lines, os.environ["GPU_RUN"]), flush=True)
    ran = [line for line in lines.read() if line["run"] == os.environ["GPU_RUN"]]
    return int(any(line["outcome"] == record.FAILED for line in ran))


def run(chosen: list[str], device: str, limit: float, lines: record.Lines, began: float) -> None:
    ends = plan.deadlines(chosen, limit, device)
    names = [step.name for step in plan.STEPS if step.name in chosen]
    waiting = [beside for beside in plan.BESIDE if beside.name in chosen]
    running: dict[str, Running] = {}

    def launch(name: str, nice: int = 0) -> None:
        left = ends[name] - (time.time() - began)
        lines.write(f"{name} begins", seconds=round(left, 1))
        print(f"{time.time() - began:5.0f} s  {name} begins", flush=True)
        command = processes.python("-m", f"gpu.{name}", "--device", device)
        command += ["--seconds", f"{left - 3:.0f}"] if name == "sanitize" else []
        running[name] = Running(processes.start(command, nice=nice, group=True), nice, time.time(), len(lines.read()))

    def settle(name: str, stop: bool = False) -> None:
        """Take note of a step that has ended; it is made to, at its deadline or if `stop`."""
        step, now = running[name], time.time() - began
        code = step.process.poll()
        if code is None and now < ends[name] and not stop:
            return
        processes.kill(step.process)  # and what it started
        processes.shorten(Path(os.environ["GPU_LOG"]))
        stopped = "stopped with what it was beside" if stop else "stopped at its limit"
        said = stopped if code is None else "done" if code == 0 else f"exit code {code}"
        outcome = record.SKIPPED if code is None else record.OK if code == 0 else record.FAILED
        again = code == LOST and len(lines.read()) > step.lines
        lines.write(f"{name} ends", outcome, message=said, seconds=round(time.time() - step.began, 1))
        print(f"{now:5.0f} s  {name}: {said}{', and begins again' * again}", flush=True)
        del running[name]
        if again:
            launch(name, step.nice)
        if name == "facts" and code == NO_GPU:
            names.clear()
            waiting.clear()
            for other in list(running):
                settle(other, stop=True)

    while names or waiting or running:
        current = names.pop(0) if names else None
        for step in [b for b in waiting if current is None or current in plan.spanned(b)]:
            waiting.remove(step)
            launch(step.name, step.nice if device == "cuda" else 0)  # two cores would starve it
        if current:
            launch(current)
        over = [beside for beside in plan.BESIDE if not any(name in plan.spanned(beside) for name in names)]
        awaited = {current, *(beside.name for beside in over if beside.then == "awaited")}
        while any(name in running for name in awaited) or (running and not names):
            for name in [*running]:
                if name in running:
                    settle(name)
            time.sleep(0.05)
        for beside in over:
            if beside.name in running and beside.then == "stopped":
                settle(beside.name, stop=True)


def summary(lines: record.Lines, run: str) -> str:
    """What this run found, for one who sees only the end of what it printed."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    final: dict[tuple[str, str], dict] = {}
    for line in lines.read():
        if line["run"] == run:
            final[line["step"], line["key"]] = line
    for line in final.values():
        counts[line["step"]][line["outcome"]] += 1
    text = [
        f"{step:10} " + ", ".join(f"{n} {outcome}" for outcome, n in found.items()) for step, found in counts.items()
    ]
    failed = [line for line in final.values() if line["outcome"] in (record.FAILED, record.STARTED)]
    text += [f"{line['step']}: {line['key']}: {line.get('message', line['outcome'])}"[:300] for line in failed[:30]]
    rows = [line["row"] for line in final.values() if "of_floor" in line.get("row", {})]
    far = sorted((row for row in rows if row["flops"] or row["bytes"]), key=lambda row: row["of_floor"])[:12]
    text += [
        f"{row['of_floor']:5.0%} of its floor: {row['operator']} {row['passes']} {row['shape']}, {row['us'][0]:.4g} us"
        for row in far
        if set(row["shape"]) != {"B"}
    ]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
