"""Everything for a GPU machine in one command, offline, with the python and torch that are there: `make gpu`.

Parts, each callable alone: build (the compiled library, in place), test (the whole suite with the kernels on the GPU),
sanitize (compute-sanitizer's memcheck and racecheck on the CUDA kernels), bench (benchmarks in bf16, plots, tables).
Logs, JUnit results and the benchmark results go to one folder; the last lines say what passed and how long it took.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "test", "sanitize", "bench")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def commands(part: str, out: Path) -> list[tuple[str, ...]]:
    if part == "build":
        return [(sys.executable, "setup.py", "build_ext", "--inplace"), (sys.executable, "-m", "tokenops", "info")]
    if part == "test":
        workers = (
            ("-n", "6", "--dist", "loadfile", "--no-loadscope-reorder") if importlib.util.find_spec("xdist") else ()
        )
        return [(*PYTEST, *workers, "--device", "cuda", f"--junitxml={out / 'tests.xml'}", "tests")]
    if part == "sanitize":
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        kernels = (
            *PYTEST,
            "--device",
            "cuda",
            "-k",
            "native and not compile and not opcheck",
            "tests/ops/test_restore_tokens.py",
            "tests/ops/test_select_tokens.py",
            "tests/ops/test_merge_neighbours.py",
            "tests/ops/test_merge_bipartite.py",
        )
        # no caching allocator: an access one element past a tensor has to be one past its allocation
        return [
            (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *kernels)
            for tool in ("memcheck", "racecheck")
        ]
    return [
        (*PYTEST, "--device", "cuda", "--results", str(out), "benchmarks"),
        (sys.executable, "benchmarks/report.py", "--results", str(out)),
    ]


def run(command: tuple[str, ...], log: Path, limit: float) -> str:
    """Runs a command with its output in a file; returns "passed", or what went wrong."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if "sanitizer" in command[0]:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("a") as file:
        print("$", " ".join(command), file=file, flush=True)
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except FileNotFoundError as error:
            return f"FAILED: {error}"
        except subprocess.TimeoutExpired:
            return f"FAILED: not done after {limit:.0f} s"
    return "passed" if code == 0 else f"FAILED with {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder for logs and results")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything together")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"part {part!r} is not one of {', '.join(PARTS)}")

    import torch

    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    start, summary = time.monotonic(), []
    for part in arguments.parts or PARTS:
        log = arguments.out / f"{part}.log"
        log.unlink(missing_ok=True)
        for command in commands(part, arguments.out.resolve()):
            began = time.monotonic()
            said = run(command, log, max(1.0, arguments.limit - (began - start)))
            summary.append((part, said, time.monotonic() - began))
        print("".join(f"  {line}\n" for line in log.read_text().splitlines()[-12:]), flush=True)
    for part, said, seconds in summary:
        print(f"{part:9} {said:24} {seconds:6.1f} s   {arguments.out / part}.log")
    return int(any(said != "passed" for _, said, _ in summary))


if __name__ == "__main__":
    sys.exit(main())
