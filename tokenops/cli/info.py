"""`python -m tokenops info`: the text that belongs into a bug report."""

import os
import platform
from collections.abc import Sequence

import torch

import tokenops

from ..ops import backends, native
from ..ops.masked_channel_attention import FASTER
from . import columns, machine

PACKAGES = ("numpy", "triton", "timm", "torchvision")
VARIABLES = ("TOKENOPS_BACKEND", "TOKENOPS_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
DTYPE = torch.float32


def text() -> str:
    sections: dict[str, Sequence[Sequence[str]]] = {
        "versions": _versions(),
        "devices": _devices(),
        "compiled code": _compiled(),
        "environment": [(name, os.environ.get(name, "not set")) for name in VARIABLES],
        f"operators ({str(DTYPE)[6:]}): the backend each will use, and why not another": _operators(),
    }
    return "\n\n".join(f"{title}\n{columns(rows)}" for title, rows in sections.items())


def _versions() -> list[tuple[str, str]]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [
        ("tokenops", " ".join(filter(None, (tokenops.__version__, machine.commit())))),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {cuda}"),
        *((package, machine.version_of(package) or "not installed") for package in PACKAGES),
    ]


def _devices() -> list[tuple[str, str]]:
    simd = torch.backends.cpu.get_cpu_capability()
    rows = [("cpu", f"{machine.device_name('cpu')}, {torch.get_num_threads()} threads, {simd}")]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", _no_gpu())]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"))
    return [*rows, ("driver", machine.driver() or "version not readable")]


def _no_gpu() -> str:
    return "none: torch sees no GPU" if torch.version.cuda else "none: this torch was built without CUDA"


def _compiled() -> list[tuple[str, str]]:
    built = native.info()
    cpu = f"built with {built.get('compiler')} against torch {built.get('torch')}"
    cuda = f"built by nvcc {built.get('nvcc')} for {', '.join(built.get('architectures', ()))}"
    return [
        ("C++", cpu if built["cpu"] is None else f"not there: {built['cpu']}"),
        ("CUDA", cuda if built["cuda"] is None else f"not there: {built['cuda']}"),
        *_attention(),
    ]


def _attention() -> list[tuple[str, str]]:
    """By which instruction set attention runs on this CPU, and who runs what asks for no scores, bias or masks."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        isa = native.attention_isa(dtype)
        times = FASTER.get((dtype, isa), 0.0)
        plain = f"{times} times as fast as torch's own where it was measured" if times else "plain calls are torch's"
        if isa is not None:
            rows.append((f"attention, {str(dtype)[6:]}", f"{isa}: {plain}"))
    return rows


def _operators() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for op in backends.TABLE:
        for device in backends.TABLE[op]:
            if device == "cuda" and not torch.cuda.is_available():
                rows.append((op, device, "-", _no_gpu()))
                continue
            try:
                chosen = backends.choose(op, device, DTYPE)
            except RuntimeError as error:
                rows.append((op, device, "error", str(error)))
                continue
            rest = [(b, _reason(op, b, device, chosen)) for b in backends.BACKENDS if b != chosen]
            rows += [
                (*((op, device, chosen) if i == 0 else ("", "", "")), f"not {backend}: {reason}")
                for i, (backend, reason) in enumerate(rest)
            ]
    return rows


def _reason(op: str, backend: str, device: str, chosen: str) -> str:
    reason = backends.why_not(op, backend, device, DTYPE)
    if reason is not None:
        return reason
    if os.environ.get("TOKENOPS_BACKEND", "auto") != "auto":
        return f"TOKENOPS_BACKEND asks for {chosen}"
    if backend == "reference":
        return "plain PyTorch, for when nothing else can"
    if backend == "triton" and device == "cpu":
        return "interpreted here, which is for tests"
    return f"can too, but {chosen} comes first"
