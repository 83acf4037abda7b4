"""The first step: what machine this is, whether the compiled library loads there, and its ceilings."""

import os
import subprocess
import sys
import time
from functools import partial

import torch

from timers import clock_of
from tokenops.measuring import machine
from tokenops.ops import native

from . import options, record
from .processes import ROOT, environment

PACKAGES = ("torch", "triton", "timm", "transformers", "numpy", "pytest", "pytest-xdist", "pytest-timeout")
#: of a rehearsal: numbers that no machine has
FAKE = {"fake": True, "copy_bytes_per_s": 1e10, "flops_per_s_bfloat16": 1e11, "flops_per_s_float32": 1e11}


def facts(device: str) -> dict:
    found = machine.facts(device) | {"commit": os.environ.get("GPU_COMMIT") or machine.commit()}
    found["packages"] = {name: machine.version_of(name) for name in PACKAGES}
    found["cores"] = os.cpu_count()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "capability": list(torch.cuda.get_device_capability()),
        }
        asked = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
        try:
            said = subprocess.run(
                ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=10,
            )  # fmt: skip
            found["nvidia_smi"] = f"{asked}: {said.stdout.strip() or said.stderr.strip()}"
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia_smi"] = str(error)
    return found


def library(device: str) -> tuple[str, dict]:
    """The compiled library: carried along, or built for this card alone where none loads; its outcome and account."""
    why_not = native.why_not(device)
    if why_not is None:
        return record.OK, {"library": "carried", "info": native.info()}
    environ = environment(TOKENOPS_BUILD="auto")
    if device == "cuda":
        environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=ROOT, env=environ, capture_output=True, text=True)
    load = f"from tokenops.ops import native; print(native.why_not({device!r}), end='')"  # in a process of its own
    loaded = subprocess.run([sys.executable, "-c", load], env=environ, capture_output=True, text=True)
    outcome = record.OK if loaded.stdout == "None" else record.FAILED
    return outcome, {"library": "built", "carried": why_not, "loads": loaded.stdout, "log": built.stderr[-900:]}


def ceilings() -> dict[str, float]:
    """Bytes read plus written by copying, and rates of square products of random numbers."""
    clock = clock_of("cuda")
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * source.numel() / clock.best(partial(target.copy_, source), 10)}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        found[f"flops_per_s_{str(dtype)[6:]}"] = 2 * size**3 / clock.best(partial(torch.matmul, a, b), 10)
    return found


def main() -> int:
    device, lines = options(__doc__).device, record.lines("facts")
    start = time.time()
    if device == "cuda" and not torch.cuda.is_available():
        lines.write("machine", record.FAILED, message="no GPU: torch.cuda.is_available() is false")
        return 4  # nothing else is tried
    lines.write("machine", facts=facts(device))
    found = FAKE if device == "cpu" else ceilings()
    lines.write("ceilings", ceilings=found, seconds=round(time.time() - start, 1))
    outcome, account = library(device)
    lines.write("library", outcome, **account)
    return 0


if __name__ == "__main__":
    sys.exit(main())
