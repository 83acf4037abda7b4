"""How kernels are launched: what follows from the kind of a call is worked out once, and kept with its compiled kernel.

Most of the host's time for a call went into the arithmetic of launches and Triton's search for the compiled kernel
(benchmarks/host.py). A launcher asks a function that is `planned` for its `Launch`, which depends on nothing but
shapes, strides, dtypes and options, and hands it to `launch` with the tensors.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from .common import INTERPRETED, integers

P = ParamSpec("P")
R = TypeVar("R")

#: what tools replace to see launches, and what a profiler may add to them: then all of them go Triton's own way
_LAUNCH, _RUN = KernelInterface.__getitem__, JITFunction.run


class Layout(NamedTuple):
    """What a plan may know of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stride(self) -> tuple[int, ...]:
        return self.strides


class Launch:
    """All of a launch but its tensors and floats.

    Args:
        programs: how many.
        scalars: the kernel's integers, which follow its tensors and floats.
        constants: its constexprs, which come last, and options of the compiler.
        bits: so many of the tensors, the last, are passed as integers: what only moves needs to know no dtypes.
    """

    __slots__ = ("bits", "constants", "device", "grid", "kept", "scalars")

    def __init__(self, programs: int, scalars: Sequence[int], constants: dict[str, Any], bits: int = 0) -> None:
        self.grid, self.scalars, self.constants, self.bits = (programs,), tuple(scalars), constants, bits
        self.device = None if INTERPRETED else driver.active.get_current_device()
        #: (kernel, compiled kernel, its integers and constexprs) by what else a specialisation depends on
        self.kept: dict[tuple, tuple[Any, CompiledKernel, tuple]] = {}


_caches: list[Any] = []
_OPTIONS = frozenset((int, bool, str, type(None)))  # whose types these are; all else is a tensor


def planned(make: Callable[P, R]) -> Callable[P, R]:
    """A function of the layouts of tensors and of options, whose results are kept.

    It is called with tensors and gets a `Layout` for each, the tokens' first. It may ask which GPU is current, what
    precision torch wants of fp32 products, and the table of launches; it must not depend on anything else.
    """

    @functools.lru_cache(1024)
    def kept(where: tuple, *described: Any) -> R:
        return make(*(Layout(*a) if type(a) is tuple else a for a in described))  # type: ignore[arg-type, call-arg]

    def plan(*arguments: Any) -> R:
        described = [a if type(a) in _OPTIONS else (a.shape, a.stride(), a.dtype) for a in arguments]
        precision = torch.backends.cuda.matmul.fp32_precision if arguments[0].dtype is torch.float32 else None
        if INTERPRETED:
            return kept((precision,), *described)
        active = driver.active
        return kept((active, active.get_current_device(), precision), *described)

    _caches.append(kept)
    return plan  # type: ignore[return-value]


def forget() -> None:
    """No plan is kept any more: what they may ask has changed."""
    for cache in _caches:
        cache.cache_clear()


def launch(kernel: Any, plan: Launch, tensors: Sequence[Tensor], floats: tuple[float, ...] = ()) -> None:
    """Launch `kernel`: kernel[grid](*tensors, *floats, *scalars, **constants), but for the time that takes.

    Of its arguments Triton specialises a kernel for the types of all, whether 16 divides a pointer, and whether 16
    divides an integer or it is 1. A plan decides dtypes and integers, and floats are declared; so beside it only the
    pointers count, and settings of Triton that a user may change.
    """
    if plan.grid[0] == 0:
        return
    if (
        type(kernel) is not JITFunction  # interpreted, or something that stands for a kernel
        or JITFunction.__getitem__ is not _LAUNCH
        or JITFunction.run is not _RUN
        or kernel.pre_run_hooks
        or knobs.runtime.add_stages_inspection_hook is not None
    ):
        _plainly(kernel, plan, tensors, floats)
        return
    if tensors[0].is_meta:  # without memory: the kernel is compiled, and not launched
        _plainly(kernel, plan, tensors, floats, warmup=True)
        return
    pointers = [t.data_ptr() for t in tensors]
    odd = functools.reduce(operator.or_, pointers) & 15
    key = (
        odd and tuple([pointer & 15 == 0 for pointer in pointers]),
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
    )
    found = plan.kept.get(key)
    if found is None or found[0] is not kernel:
        compiled = _plainly(kernel, plan, tensors, floats)
        if isinstance(compiled, CompiledKernel):
            behind = kernel.arg_names[len(tensors) + len(floats) + len(plan.scalars) :]
            plan.kept[key] = kernel, compiled, (*plan.scalars, *[plan.constants[name] for name in behind])
        return
    _, compiled, behind = found
    stream = driver.active.get_current_stream(plan.device)
    enter, leave = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
    metadata = compiled.launch_metadata(plan.grid, stream, *tensors, *floats, *behind) if enter or leave else None
    compiled.run(
        plan.grid[0], 1, 1, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave,
        *pointers, *floats, *behind,
    )  # fmt: skip


def _hook(hook: Any) -> Any:
    """A profiler's, None for an empty chain of them."""
    return hook if getattr(hook, "calls", hook) else None


def _plainly(
    kernel: Any, plan: Launch, tensors: Sequence[Tensor], floats: tuple[float, ...], warmup: bool = False
) -> Any:
    """Triton's own way; the compiled kernel, where there is one."""
    known = len(tensors) - plan.bits
    tensors = [*tensors[:known], *map(integers, tensors[known:])]
    run = functools.partial(kernel.run, grid=plan.grid, warmup=True) if warmup else kernel[plan.grid]
    return run(*tensors, *floats, *plan.scalars, **plan.constants)
