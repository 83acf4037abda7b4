"""Which backend runs an operator, and why the others cannot.

Backends: "native" (C++ or MKL compositions on a CPU, CUDA C++ on a GPU), "triton" (a GPU, or any machine under Triton's
interpreter) and "reference" (plain PyTorch, any device). One predicate, `why_not`, both filters and explains: the
automatic choice takes the first backend it has nothing against; an explicit choice fails loudly with its reason.
"""

import importlib.util
import os

import torch

from . import native

BACKENDS = ("native", "triton", "reference")

#: operator -> device type -> the backends that exist for it, best first. The reference exists everywhere.
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "soft_aggregate": {"cpu": ("native", "triton"), "cuda": ("triton",)},
    "soft_scatter": {"cpu": ("native", "triton"), "cuda": ("triton",)},
    "token_mlp": {"cpu": ("native", "triton"), "cuda": ("triton",)},
    "masked_channel_attention": {"cpu": ("native", "triton"), "cuda": ("triton",)},
    "select_tokens": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "restore_tokens": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "merge_neighbours": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "match_bipartite": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "match_packed": {"cpu": ("native", "triton"), "cuda": ("triton",)},
    "merge_bipartite": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "unmerge_bipartite": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "sum_rows": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
}

#: operators whose native path is compiled code on a GPU too
COMPILED = frozenset(
    "select_tokens restore_tokens merge_neighbours match_bipartite merge_bipartite unmerge_bipartite sum_rows".split()
)
#: those whose native path on a CPU is (the others compose torch's own kernels, which are always there)
COMPILED_ON_CPU = COMPILED | {"masked_channel_attention", "soft_aggregate", "soft_scatter", "match_packed"}
#: those that Triton takes in fp64 on a GPU
TRITON_FLOAT64 = COMPILED | {"match_packed"}
#: of them, those composed of torch's kernels for what is not compiled: fp64, and where there is no compiler
COMPOSED = frozenset({"masked_channel_attention"})

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_asked = os.environ.get("TOKENOPS_BACKEND") or "auto"
_forced: str | None = None if _asked == "auto" else _asked


class use_backend:
    """Run every tokenops operator in the block on one backend: `with tokenops.use_backend("reference"): ...`.

    Args:
        backend: "native", "triton", "reference", or "auto" for the automatic choice. The setting is process-wide (as
            is the TOKENOPS_BACKEND environment variable, its initial value); the choice is made in the forward pass and
            kept for the backward pass. Inside "reference" a model consists of standard ATen operators only.

    Raises:
        ValueError: the backend has no such name.
        RuntimeError: from the operators in the block, when the backend cannot run them, with the reason.
    """

    def __init__(self, backend: str) -> None:
        self.backend = _checked(backend)

    def __enter__(self) -> None:
        global _forced
        self.previous = _forced
        _forced = self.backend

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self.previous


def forced() -> str | None:
    """The backend that `use_backend` or the environment asks for; None: the automatic choice."""
    return _forced


def _checked(backend: str) -> str | None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}, but it must be one of {', '.join(('auto', *BACKENDS))}")
    return None if backend == "auto" else backend


def why_not(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason why `backend` cannot run `op` on this device type and dtype; None when it can."""
    if backend == "reference":
        return None
    if backend not in TABLE[op].get(device, ()):
        return f"{op} has no {backend} path on {device}"
    if dtype not in FLOATS:
        return f"{op} takes {', '.join(str(d)[6:] for d in FLOATS)}, not {str(dtype)[6:]}"
    if backend == "native" and op in COMPILED_ON_CPU - COMPOSED:
        return native.why_not(device)
    if backend == "triton":
        if not HAS_TRITON:
            return "triton is not installed"
        if device == "cpu" and not INTERPRETED:
            return "Triton runs on a CPU only interpreted: set TRITON_INTERPRET=1 before importing triton"
        if device == "cuda" and not INTERPRETED:
            if dtype == torch.float64 and op not in TRITON_FLOAT64:
                return "the Triton matrix kernels take no float64 on a GPU"
            if native.gpu_capability() < (8, 0):
                return f"the Triton kernels need compute capability 8.0, this GPU has {native.gpu_capability()}"
    return None


def choose(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that will run `op`: the forced one (RuntimeError where it cannot), else the first that can.

    ValueError where the environment names something unknown, which is said here and not when tokenops is imported.
    """
    check_environment()
    if _forced is not None:
        reason = why_not(op, _forced, device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: the {_forced} backend was asked for but cannot run: {reason}")
        return _forced
    for backend in TABLE[op].get(device, ()):
        if (backend != "triton" or device != "cpu") and why_not(op, backend, device, dtype) is None:
            return backend
    return "reference"


def check_environment() -> None:
    """Raises ValueError where TOKENOPS_BACKEND or TOKENOPS_CPU_ISA names something unknown."""
    if _wrong is not None:
        raise ValueError(_wrong)


def _wrong_variable() -> str | None:
    for name, known in (("TOKENOPS_BACKEND", ("auto", *BACKENDS)), ("TOKENOPS_CPU_ISA", native.CPU_ISAS)):
        value = os.environ.get(name) or known[0]
        if value not in known:
            return f"{name}={value!r}, but it must be one of {', '.join(known)}"
    return None


_wrong = _wrong_variable()
