"""`python -m tokenops info`: the text that belongs into a bug report, and what brings what is missing."""

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import tokenops

from ..measuring import machine
from ..ops import backends, native
from ..ops.masked_channel_attention import FASTER
from . import columns, count_of

PACKAGES = ("numpy", "triton", "timm", "torchvision", "transformers")
VARIABLES = ("TOKENOPS_BACKEND", "TOKENOPS_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
DTYPE = torch.float32
OLDEST = (2, 11)  # torch
#: the extra that brings a package, and what it is for
EXTRAS = {
    "timm": ("models", "models and apply_patch"),
    "torchvision": ("models", "models and apply_patch"),
    "matplotlib": ("plot", "pictures"),
    "PIL": ("plot", "pictures"),
    "sklearn": ("plot", "the photographs of demo and slim"),
    "rich": ("demo", "the commands demo, bench and slim"),
    "accelerate": ("train", "the commands train and eval"),
    "transformers": ("hf", "models in Hugging Face folders"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    print(text())


def text() -> str:
    sections: dict[str, Sequence[Sequence[str]]] = {
        "versions": _versions(),
        "devices": _devices(),
        "build": _build(),
        "environment": _environment(),
    }
    parts = [f"{title}\n{columns(rows)}" for title, rows in sections.items()]
    lines = [f"{what}\n    {command}" for what, command in missing()]
    doctor = "\n".join(f"  {line}" for line in lines) or "  nothing"
    return "\n\n".join([*parts, _operators(), f"missing, and the command that brings it\n{doctor}"])


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
    rows = [("cpu", f"{machine.device_name('cpu')}, {count_of(torch.get_num_threads(), 'thread')}, {simd}")]
    if not torch.cuda.is_available():
        none = "none: torch sees no GPU" if torch.version.cuda else "none: this torch was built without CUDA"
        return [*rows, ("cuda", none)]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"))
    return [*rows, ("driver", machine.driver() or "version not readable")]


def _build() -> list[tuple[str, str]]:
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


def _environment() -> list[tuple[str, str]]:
    rows = [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    absent = ", ".join(name for name in VARIABLES if name not in os.environ)
    return rows + ([("not set", absent)] if absent else [])


def _operators() -> str:
    """A row for every operator and device, a column for every backend, and a footnote for every reason."""
    notes: dict[str, str] = {}
    rows: list[Sequence[str]] = [("operator", "device", *backends.BACKENDS)]
    for op in backends.TABLE:
        for device in backends.TABLE[op]:
            if device != "cuda" or torch.cuda.is_available():
                rows.append((op, device, *(_cell(op, backend, device, notes) for backend in backends.BACKENDS)))
    below = columns([(mark, reason) for reason, mark in notes.items()]) if notes else ""
    return f"operators ({str(DTYPE)[6:]}): the backend each will use, and why not another\n{columns(rows)}\n\n{below}"


def _cell(op: str, backend: str, device: str, notes: dict[str, str]) -> str:
    """ "runs", or the letter of the reason why not."""
    try:
        chosen = backends.choose(op, device, DTYPE)
    except RuntimeError:
        chosen = "error"
    if backend == chosen:
        return "runs"
    reason = _reason(op, backend, device, chosen).replace(f"{op} has no ", "there is no ")
    return notes.setdefault(reason, chr(ord("a") + len(notes)))


def _reason(op: str, backend: str, device: str, chosen: str) -> str:
    reason = backends.why_not(op, backend, device, DTYPE)
    forced = backends.forced()
    if forced is not None and backend != forced:
        return f"TOKENOPS_BACKEND asks for {forced}"
    if reason is not None:
        return f"asked for but cannot run: {reason}" if forced is not None else reason
    if backend == "reference":
        return "plain PyTorch, for when nothing else can"
    if backend == "triton" and device == "cpu":
        return "interpreted here, which is for tests"
    return f"can too, but {chosen} comes first"


def missing() -> Iterator[tuple[str, str]]:
    """What is not there that could be, and what it is for; and the one command that brings it."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    gpu = machine.driver() is not None or Path("/dev/nvidia0").exists()
    built, tree = native.info(), Path(tokenops.__file__).parent.parent
    source = (tree / "setup.py").is_file()
    anew = "pip install --force-reinstall --no-deps --no-build-isolation --no-binary tokenops tokenops"
    build = f"(cd {tree} && python setup.py build_ext --inplace)" if source else anew
    if version < OLDEST:
        yield f"torch {torch.__version__} is older than {OLDEST[0]}.{OLDEST[1]}:", "pip install --upgrade torch"
    if gpu and torch.version.cuda is None:
        yield "an NVIDIA GPU is there, but this torch is for CPUs alone:", "pip install --force-reinstall torch"
    if built["cpu"] is not None:
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            yield "no C++ compiler, so no compiled operators:", "sudo apt-get install g++"
        yield "no compiled operators, which are the fast ones on a CPU:", build
    if (gpu or torch.cuda.is_available()) and built["cuda"] is not None:
        if shutil.which("nvcc") is None:
            release = f"=={torch.version.cuda}.*" if torch.version.cuda else ""
            yield "no nvcc, so no CUDA operators:", f"pip install 'cuda-toolkit[nvcc,cccl,cudart]{release}'"
        yield "no CUDA operators, so Triton's serve the GPU alone:", build
    if not backends.HAS_TRITON and (gpu or torch.cuda.is_available()):
        yield "no triton, so no kernels for the GPU but the compiled ones:", "pip install triton"
    wanted: dict[str, list[str]] = {}
    for package in EXTRAS:
        if importlib.util.find_spec(package) is None:
            wanted.setdefault(EXTRAS[package][0], []).append(package)
    for extra, packages in wanted.items():
        use = " and ".join(dict.fromkeys(EXTRAS[package][1] for package in packages))
        yield f"no {', '.join(packages)}, for {use}:", f"pip install 'tokenops[{extra}]'"
    table = Path(tokenops.__file__).parent / "ops" / "triton" / "launches.json"
    if not table.is_file():
        back = f"git -C {tree} checkout {table.relative_to(tree)}" if source else anew
        yield f"no {table.name}, the table of measured launches:", back
