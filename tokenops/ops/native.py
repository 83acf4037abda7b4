"""Loads the compiled library (csrc/) and says why it, or a part of it, is not there."""

import ctypes
import functools
import json
from pathlib import Path

import torch

_HERE = Path(__file__).parent.parent
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


#: the best first; what kernels on a CPU may run by (csrc/cpu/isa.cpp)
CPU_ISAS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _isas() -> dict[torch.dtype, str]:
    if _why_no_cpu is not None:
        return {}
    library = ctypes.CDLL(str(LIBRARY))
    library.tokenops_attention_isa.restype = ctypes.c_char_p
    return {dtype: library.tokenops_attention_isa(i).decode() for i, dtype in enumerate(_TYPES)}


_isa_of = _isas()


def attention_isa(dtype: torch.dtype) -> str | None:
    """The instruction set that attention of a dtype runs by on this CPU, the best that TOKENOPS_CPU_ISA allows; None
    where it is not compiled code. A constant to torch.compile."""
    return _isa_of.get(dtype)


attention_isa._dynamo_marked_constant = True  # type: ignore[attr-defined]


class limit_cpu_isa:
    """In the block no CPU kernel that chooses runs by a better instruction set than this one, process-wide; for tests.

    Attention, soft_aggregate and token_mlp choose, and matching whether to use tiles; what else is compiled for several
    is chosen by the loader.

    Args:
        most: one of CPU_ISAS.
    """

    def __init__(self, most: str) -> None:
        self.most = most

    def __enter__(self) -> None:
        self.previous = self._set(self.most)

    def __exit__(self, *exc: object) -> None:
        self._set(self.previous)

    def _set(self, most: str) -> str:
        library = ctypes.CDLL(str(LIBRARY))
        library.tokenops_limit_cpu_isa.restype = ctypes.c_char_p
        before = library.tokenops_limit_cpu_isa(most.encode())
        if before is None:
            raise ValueError(f"limit_cpu_isa: most={most!r}, but it must be one of {', '.join(CPU_ISAS)}")
        _isa_of.update(_isas())
        return before.decode()


def info() -> dict:
    """What was built: cpu and cuda (why not, or None), architectures, and by which torch, compiler and nvcc."""
    return {**_built, "cpu": _why_no_cpu, "cuda": _why_no_cuda_code}
