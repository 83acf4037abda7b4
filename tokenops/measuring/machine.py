"""What a result or a bug report must say of the machine: device, driver, versions, commit."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import tokenops


def version_of(package: str) -> str | None:
    """The installed version of a package, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """The name of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def instructions() -> str | None:
    """The widest that this processor has of those that matter here: AVX2, AVX-512, with bf16, AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512-bf16", "avx512bw": "AVX-512", "avx2": "AVX2"}
    return next((name for flag, name in names.items() if flag in flags), None)


def driver() -> str | None:
    """The NVIDIA driver's version, None without one (or where its file is not visible)."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
    return found[0] if found else None


def commit() -> str | None:
    """The commit of the source tree this package runs from, "-dirty" behind it where files differ; None of others."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix") != "tokenops/measuring/":  # installed within another project
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12", "--match=")
    except (OSError, subprocess.CalledProcessError):
        return None


def facts(device: str) -> dict[str, Any]:
    """Device and versions, as the benchmarks store them."""
    return {
        "device": device_name(device),
        "instructions": instructions() if device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "driver": driver() if device == "cuda" else None,
        "tokenops": tokenops.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
