"""Loads the compiled library (csrc/) and says why it, or a part of it, is not there."""

import ctypes
import functools
import json
from pathlib import Path

import torch

_HERE = Path(__file__).parent
LIBRARY = _HERE / "_C.abi3.so"
_INFO = _HERE / "_build_info.json"
_NOT_BUILT = "compiled code is missing: this source tree was not built (python setup.py build_ext --inplace)"


def _load() -> tuple[dict, str | None]:
    """What the build noted, and why the library is not loaded (None: it is)."""
    built = json.loads(_INFO.read_text()) if _INFO.exists() else {"cpu": _NOT_BUILT, "cuda": _NOT_BUILT}
    if built["cpu"] is not None:
        return built, built["cpu"]
    if not LIBRARY.exists():
        return built, _NOT_BUILT
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return built, f"the compiled library does not load: {error}"
    return built, None


def _driver() -> tuple[int, int] | None:
    """The CUDA version the GPU driver supports (asked without initialising CUDA), None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_no_cuda(built: dict) -> str | None:
    if built["cuda"] is not None:
        return f"no CUDA kernels: {built['cuda']}"
    driver = _driver() if torch.version.cuda else None
    if driver is not None and driver[0] < int(built["nvcc"].split(".")[0]):
        return f"the CUDA kernels need CUDA {built['nvcc']}, but this driver supports CUDA {driver[0]}.{driver[1]}"
    return None


_built, _why_no_cpu = _load()
_why_no_cuda_code = _why_no_cpu or _why_no_cuda(_built)
_capabilities = [tuple(map(int, name.rstrip("af+PTX").split("."))) for name in _built.get("architectures", ())]
_oldest_gpu = min(_capabilities, default=(0, 0))


@functools.lru_cache
def _capability(gpu: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(gpu)


def gpu_capability() -> tuple[int, int]:
    """Of the current GPU; a constant to torch.compile."""
    return _capability(torch.cuda.current_device())


# what torch.compiler.assume_constant_result does, without importing all of torch._dynamo (a test compares them)
gpu_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(device: str) -> str | None:
    """Why compiled code cannot serve a device type ("cpu" or "cuda"); None when it can."""
    if device != "cuda":
        return _why_no_cpu
    if _why_no_cuda_code is None and gpu_capability() < _oldest_gpu:
        return f"the CUDA kernels were built for compute capability {_oldest_gpu[0]}.{_oldest_gpu[1]} and later"
    return _why_no_cuda_code


def info() -> dict:
    """What was built: cpu and cuda (why not, or None), architectures, and by which torch, compiler and nvcc."""
    return {**_built, "cpu": _why_no_cpu, "cuda": _why_no_cuda_code}
