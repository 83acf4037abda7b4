"""What the launchers share: dtypes and precision of the dots, and the sizes of tiles."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

#: the interpreter cuts fp32 off to bf16 where a GPU rounds
CUTS_OFF = tl.constexpr(INTERPRETED)

#: a * b + c rounded once, said at every launch because Triton's default is about to change
FUSION = {"enable_fp_fusion": True}
#: for kernels that ptxas, left alone, makes spill to get to the next step of occupancy
ALL_REGISTERS = {"maxnreg": 255}

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


#: how many companions the kernels have arguments for
MOST_COMPANIONS = 4

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def integers(x: torch.Tensor) -> torch.Tensor:
    """The same bits as integers: what only moves needs to know no dtypes."""
    return x.view(_INTEGERS[x.element_size()])


def four(spare: torch.Tensor, *groups: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Companions as the kernels take them: always four in a group, `spare` where none is."""
    return [t for group in groups for t in (*group, *[spare] * (MOST_COMPANIONS - len(group)))]


def companion_strides(group: Sequence[torch.Tensor]) -> list[int]:
    """Those of a group of four."""
    return [stride for t in group for stride in t.stride()] + [0, 0] * (MOST_COMPANIONS - len(group))


def dot_options(*dtypes: torch.dtype) -> dict:
    """ACC, DOT and PRECISION for tensors of these dtypes (the first is the tokens').

    Sums are fp32, fp64 where fp64 takes part. Operands of a dot have the tokens' dtype; interpreted they have the
    accumulator's, because the interpreter's bf16 arithmetic works on raw bits. fp32 dots follow torch's own switch.
    """
    accumulator = tl.float64 if torch.float64 in dtypes else tl.float32
    tf32 = dtypes[0] == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "ACC": accumulator,
        "DOT": accumulator if INTERPRETED else _TYPES[dtypes[0]],
        "PRECISION": "tf32" if tf32 else "tf32x3" if dtypes[0] == torch.float32 else "ieee",
    }


def architecture() -> int:
    """Of the GPU in use, 90 for compute capability 9.0, which the interpreter takes too."""
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def before_hopper() -> bool:
    """Whether the operands of a dot take registers."""
    return architecture() < 90


def tile(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers `size`, between two limits (a dot needs at least 16)."""
    return max(smallest, min(largest, triton.next_power_of_2(max(size, 1))))


def index_type(*tensors: torch.Tensor) -> tl.dtype:
    """The integers that offsets within one image fit in (registers are short): 32 bits, or 64 for huge strides."""
    reach = max(sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) for t in tensors)
    # tiles reach past the end (masked), so half of the range is kept free
    return tl.int32 if reach < 2**30 else tl.int64


def unit(*sizes: int) -> int:
    """The largest power of two, up to 8, that divides all of them; 1 where one of them is 1.

    The compiler knows of arguments only whether 16 divides them: sizes and strides are passed in units.
    """
    return 1 if 1 in sizes else math.gcd(8, *sizes)


def for_any(*arguments: str) -> Callable[[Callable], Any]:
    """triton.jit, that compiles nothing again for other values of these arguments: sizes that vary in use.

    What loads of several elements follow from (strides and channels that 16 divides, strides of 1) is not among them.
    """
    return triton.jit(do_not_specialize=arguments)


@triton.jit
def from_units(stride, UNIT: tl.constexpr, INDEX: tl.constexpr):
    """A stride that was passed in units, in integers it fits in."""
    return tl.cast(stride, INDEX) * UNIT


@triton.jit
def rows(ptr, n, c, read, C, stride_n, stride_c, DOT: tl.constexpr, INDEX: tl.constexpr):
    """Rows n (those to be read) and channels c of a matrix, 0 elsewhere."""
    offsets = n.to(INDEX)[:, None] * stride_n + c.to(INDEX)[None, :] * stride_c
    return tl.load(ptr + offsets, mask=read[:, None] & (c < C)[None, :], other=0.0).to(DOT)


@triton.jit
def cast(values, TYPE: tl.constexpr):
    """By way of fp32, unless both are fp64: the interpreter knows no other way between bf16 and fp64, and cuts off."""
    if values.dtype == tl.float64 and TYPE == tl.float64:
        return values
    else:
        narrow = values.to(tl.float32)
        if CUTS_OFF and TYPE == tl.bfloat16 and values.dtype != tl.bfloat16:
            bits = narrow.to(tl.int32, bitcast=True)
            even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            narrow = tl.where(narrow == narrow, even.to(tl.float32, bitcast=True), narrow)
        return narrow.to(TYPE)


@triton.jit
def write_rows(
    values, row, there, c, b, C, rows, eps, tokens_ptr, normed_ptr, mean_ptr, deviation_ptr, weight_ptr, bias_ptr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store rows of the result, and their layer norm (c are all channels then)."""
    at = (b * rows + row.to(tl.int64))[:, None] * C + c[None, :]
    mask = there[:, None] & (c < C)[None, :]
    tl.store(tokens_ptr + at, values, mask=mask)
    if NORM:
        wide = cast(values, ACC)
        mean = tl.sum(wide, axis=1) / C
        off = tl.where((c < C)[None, :], wide - mean[:, None], 0.0)
        deviation = 1 / tl.sqrt(tl.sum(off * off, axis=1) / C + eps)
        wide = off * deviation[:, None]
        if WEIGHT:
            wide *= tl.load(weight_ptr + c, mask=c < C, other=0.0)[None, :]
        if BIAS:
            wide += tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
        tl.store(normed_ptr + at, cast(wide, normed_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + b * rows + row, mean, mask=there)
        tl.store(deviation_ptr + b * rows + row, deviation, mask=there)
