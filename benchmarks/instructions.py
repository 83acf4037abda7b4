"""Instructions of a call of every operator on a CPU, as callgrind counts them: what the host does around the kernel.

`make resources` counts them on tiny tensors, in inference mode, with one thread and AVX2, beside operators of aten,
shows what changed against the committed table of this torch and Python, benchmarks/resources/host-torch-X.Y-python-
X.Y.json, and writes it. An operator that takes more than a tenth more than its committed count is a REGRESSION (exit
code 1, and the table is written only with --accept). Unlike times, counts are the same on a machine that others use
too. Without valgrind, its header or a C compiler nothing is counted, and the reason is said.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CALLS = 20  # counted, of each
ALLOWED = 0.1
HEADER = "valgrind/callgrind.h"
SOURCE = f"""
#include <{HEADER}>
void begin(void) {{ CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }}
void end(const char *name) {{ CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }}
"""
#: valgrind knows neither AVX-512 nor AMX
HELD = dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
EMPTY = "an empty call"


def why_not() -> str | None:
    """Why nothing can be counted here."""
    missing = [program for program in ("valgrind", "cc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found"
    found = subprocess.run(["cc", "-E", "-"], input=f"#include <{HEADER}>", capture_output=True, text=True)
    return None if found.returncode == 0 else f"{HEADER} not found"


def table() -> Path:
    """Of this torch and Python, by their first two numbers."""
    versions = (".".join(v.split(".")[:2]) for v in (importlib.metadata.version("torch"), platform.python_version()))
    return ROOT / "benchmarks/resources/host-torch-{}-python-{}.json".format(*versions)


def peers() -> dict[str, Callable[[], Any]]:
    """Calls of aten, with as many arguments as ours have."""
    import torch
    import torch.nn.functional as F

    x, logits, weight = torch.randn(1, 16, 16), torch.randn(1, 16, 8), torch.randn(16)
    q, k, v = (torch.randn(1, 2, 17, 8) for _ in range(3))

    def topk_gather() -> torch.Tensor:
        index = logits[..., 0].topk(8, dim=1).indices
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, 16))

    return {
        "softmax + bmm": lambda: torch.bmm(logits.softmax(1).transpose(1, 2), x),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "topk + gather": topk_gather,
        "layer_norm": lambda: F.layer_norm(x, (16,), weight, weight),
    }


def count_all(library: str) -> None:
    """Under valgrind: every call counted into a dump of its own."""
    import torch

    from host import calls

    c = ctypes.CDLL(library)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ours = calls(torch.float32, N=16, M=8, C=16, H=2, r=4)
    everything: dict[str, Callable[[], Any]] = {EMPTY: lambda: None, **peers()}
    everything |= {f"tokenops {name}": partial(f, *args, **options) for name, (f, args, options) in ours.items()}
    gc.disable()
    with torch.inference_mode():
        for name, call in everything.items():
            for _ in range(3):
                call()
            c.begin()
            for _ in range(CALLS):
                call()
            c.end(name.encode())


def parsed(dump: str) -> tuple[str, int] | None:
    """Name and instructions of one dump; None of one that the end of the process has written."""
    name = re.search(r"^desc: Trigger: Client Request: (.+)$", dump, re.MULTILINE)
    total = re.search(r"^(?:totals|summary): (\d+)", dump, re.MULTILINE)
    return (name[1].strip(), int(total[1])) if name and total else None


def counted() -> dict[str, int]:
    """Instructions a call, by the name of the operator; a loop around nothing is taken off."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/callgrind.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", library], input=SOURCE, text=True, check=True)
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
        command = [*valgrind, sys.executable, __file__, "--library", library]
        done = subprocess.run(command, env=os.environ | HELD | paths, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind: exit code {done.returncode}: {done.stderr[-3000:]}")
        found = dict(filter(None, (parsed(path.read_text()) for path in Path(folder).glob("out*"))))
    empty = found.pop(EMPTY)
    return {name: round((total - empty) / CALLS) for name, total in found.items()}


def verdicts(counts: dict[str, int], committed: dict[str, int]) -> list[str]:
    """A line for every operator of ours that takes more than it may."""
    return [
        f"REGRESSION: {name}: {committed[name]} -> {count} instructions"
        for name, count in counts.items()
        if name.startswith("tokenops ") and name in committed and count > (1 + ALLOWED) * committed[name]
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the table in spite of regressions")
    parser.add_argument("--library", help=argparse.SUPPRESS)  # of the process that valgrind runs
    options = parser.parse_args(arguments)
    if options.library:
        count_all(options.library)
        return 0
    reason = why_not()
    if reason:
        print(f"no instructions are counted: {reason}")
        return 0
    path = table()
    committed = json.loads(path.read_text()) if path.exists() else {}
    counts = counted()
    for name, count in sorted(counts.items()):
        print(f"{name}: {committed.get(name, '-')} -> {count}")
    wrong = verdicts(counts, committed)
    print(*wrong, sep="\n") if wrong else print("nothing new is wrong")
    if wrong and not options.accept:
        print(f"{path} is left as it is: --accept writes it in spite of regressions")
        return 1
    lines = ",\n".join(f"{json.dumps(name)}: {counts[name]}" for name in sorted(counts))
    path.write_text("{\n" + lines + "\n}\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
