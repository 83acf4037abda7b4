"""match_bipartite of packed sequences on Triton: every even row's best odd one, tile by tile; torch ranks them.

One kernel measures all rows; in the other a program has a tile of even rows of one sequence, and walks over tiles of
the odd rows of that sequence. Rows are multiplied as they come, as in match_bipartite.py.
"""

import torch
import triton
import triton.language as tl

from ..match_packed import placed as match_packed_places  # by torch's own sort
from ..reference import accumulation_dtype
from .common import ALL_REGISTERS, FUSION, before_hopper, dot_options, for_any, index_type, tile
from .launch import Launch, Layout, launch, planned
from .match_bipartite import _likeness, _power, _root, _squares
from .sequences import of_sequences, sequence

__all__ = ["match_packed_fwd", "match_packed_places"]


@for_any("S")
def match_packed_norms_kernel(
    metric_ptr, ends_ptr, powers_ptr, norms_ptr, far_ptr, S, D, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, POWERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The norms of rows, multiplied by powers where these are far from 1; whether any is: only then powers count."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends_ptr + S)
    one = tl.full((BLOCK,), 1.0, ACC)
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        squares += _squares(metric_ptr, n, d, one, end, D, stride_n, stride_d, DOT, INDEX)
    norm = _root(squares)
    if POWERS:
        power = tl.where(n < end, _power(norm), one)
        if tl.max((power != 1.0).to(tl.int32)) > 0:
            squares = tl.zeros((BLOCK,), ACC)
            for far_d in range(0, D, BLOCK_D):
                d = far_d + tl.arange(0, BLOCK_D)
                squares += _squares(metric_ptr, n, d, power, end, D, stride_n, stride_d, DOT, INDEX)
            norm = _root(squares)
            tl.atomic_max(far_ptr, 1)
        tl.store(powers_ptr + n, power, mask=n < end)
    tl.store(norms_ptr + n, norm, mask=n < end)


@for_any("S", "leap", "P")
def match_packed_kernel(
    metric_ptr, ends_ptr, powers_ptr, norms_ptr, far_ptr, best_ptr, target_ptr, S, leap, D, P, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, POWERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The best odd row of each even one among ROWS rows of a sequence, in which every other one is even."""
    s = sequence(ends_ptr, tl.program_id(0), S, leap, ROWS)
    begin = tl.load(ends_ptr + s)
    N = tl.load(ends_ptr + s + 1, mask=s < S, other=begin) - begin  # none behind the last sequence
    part = tl.program_id(0) - (begin // ROWS + s)
    own = tl.minimum(P, N)
    first_b, end_b = own // 2, N // 2
    if (part * ROWS < N) & (first_b < end_b):
        first = begin.to(tl.int64)
        metric_ptr += first * stride_n
        powers_ptr += first
        norms_ptr += first
        scaled = 0
        if POWERS:
            scaled = tl.load(far_ptr)
        n = 2 * (part * BLOCK + tl.arange(0, BLOCK))
        best = tl.full((BLOCK,), float("-inf"), ACC)
        target = tl.zeros((BLOCK,), tl.int32) + first_b
        for start_b in range(first_b, end_b, BLOCK):
            j = start_b + tl.arange(0, BLOCK)
            likeness = _likeness(
                metric_ptr, powers_ptr, norms_ptr, scaled, n, 2 * j + 1, N, D, stride_n, stride_d,
                ACC, DOT, PRECISION, INDEX, POWERS, BLOCK_D,
            )  # fmt: skip
            here = tl.max(likeness, axis=1)
            equal = tl.where(likeness == here[:, None], j[None, :], end_b)
            target = tl.where(here > best, tl.min(equal, axis=1), target)
            best = tl.maximum(best, here)
        looks = (n >= own) & (n < N)
        tl.store(best_ptr + first + n, best, mask=looks)
        tl.store(target_ptr + first + n, first + 2 * target.to(tl.int64) + 1, mask=looks)


@planned
def _plans(metric, ends, longest, prefix):
    """Of the norms and of the matching."""
    T, D = metric.shape
    options = dot_options(metric.dtype)
    if options["PRECISION"] == "tf32":  # which token is most alike is no matter of speed
        options["PRECISION"] = "tf32x3"
    block = tile((longest + 1) // 2, 32, 64)
    # operands are in registers before Hopper, those of an fp32 dot three times
    block_d = tile(D, 16, (1 if before_hopper() else 2) * (32 if metric.dtype.itemsize == 2 else 16))
    limit = ALL_REGISTERS if before_hopper() else {}
    whole = Layout((1, T, D), (0, *metric.strides), metric.dtype)
    shared = {"INDEX": index_type(whole), "POWERS": metric.dtype != torch.float16, **FUSION}
    blocks = {"BLOCK": block, "BLOCK_D": block_d, "num_warps": block // 8, "num_stages": 1}
    precision = options.pop("PRECISION")
    norms = options | shared | {"BLOCK": 64, "BLOCK_D": tile(D, 16, 64), "num_warps": 4}
    strides, (sequences, leap) = metric.stride(), of_sequences(ends)
    return (
        Launch(triton.cdiv(T, 64), (sequences, D, *strides), norms),
        Launch(
            T // (2 * block) + sequences if T else 0,
            (sequences, leap, D, prefix, *strides),
            options | shared | blocks | limit | {"PRECISION": precision, "ROWS": 2 * block},
        ),
    )


def match_packed_fwd(metric, cu_seqlens, max_seqlen, prefix):
    rows, wide = metric.shape[0], accumulation_dtype(metric.dtype)
    ends = cu_seqlens.contiguous()
    best, target = metric.new_full((rows,), float("-inf"), dtype=wide), ends.new_full((rows,), -1, dtype=torch.int64)
    powers, norms = metric.new_empty((2, rows), dtype=wide)
    far = ends.new_zeros(1)
    measure, match = _plans(metric, ends, max_seqlen, prefix)
    launch(match_packed_norms_kernel, measure, (metric, ends, powers, norms, far))
    launch(match_packed_kernel, match, (metric, ends, powers, norms, far, best, target))
    return best, target
