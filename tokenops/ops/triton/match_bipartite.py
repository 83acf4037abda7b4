"""match_bipartite on Triton: a program finds for every even row of its image the odd one that is most like it.

First it measures the rows. Then these are multiplied as they come (products of 16 bits are exact in fp32) and divided
by both norms afterwards; only rows whose squares may overflow or vanish are brought near 1, by a power of two, which
rounds nothing. What was found goes through memory, where the same program ranks it.
"""

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from .common import ALL_REGISTERS, FUSION, before_hopper, dot_options, for_any, index_type, rows, tile
from .launch import Launch, launch, planned


@triton.jit
def _power(norm):
    """What brings a row of this norm near 1, if it is far from it."""
    if norm.dtype == tl.float64:
        one = tl.full(norm.shape, 1.0, tl.float64)
        return tl.where(norm > 2.0**450, one * 2.0**-600, tl.where(norm < 2.0**-400, one * 2.0**700, one))
    else:
        return tl.where(norm > 2.0**50, 2.0**-76, tl.where(norm < 2.0**-40, 2.0**90, 1.0))


@triton.jit
def _root(squares):
    return tl.sqrt(squares) if squares.dtype == tl.float64 else tl.sqrt_rn(squares)


@triton.jit
def _squares(metric_ptr, n, d, power, N, D, stride_n, stride_d, DOT: tl.constexpr, INDEX: tl.constexpr):
    values = rows(metric_ptr, n, d, n < N, D, stride_n, stride_d, DOT, INDEX).to(power.dtype) * power[:, None]
    return tl.sum(values * values, axis=1)


@triton.jit
def _measure(
    metric_ptr, powers_ptr, norms_ptr, N, D, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, POWERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the norms of all rows. If one is far from 1 also powers, with norms of rows multiplied by them: 1 then."""
    one = tl.full((BLOCK,), 1.0, ACC)
    far = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        squares = tl.zeros((BLOCK,), ACC)
        for start_d in range(0, D, BLOCK_D):
            squares += _squares(
                metric_ptr, n, start_d + tl.arange(0, BLOCK_D), one, N, D, stride_n, stride_d, DOT, INDEX
            )
        norm = _root(squares)
        tl.store(norms_ptr + n, norm, mask=n < N)
        far |= ((n < N) & (_power(norm) != 1.0)).to(tl.int32)
    scaled = 0
    if POWERS:
        scaled = tl.max(far)
        if scaled > 0:
            tl.debug_barrier()
            for start_far in range(0, N, BLOCK):
                n = start_far + tl.arange(0, BLOCK)
                power = _power(tl.load(norms_ptr + n, mask=n < N, other=1.0))
                squares = tl.zeros((BLOCK,), ACC)
                for far_d in range(0, D, BLOCK_D):
                    squares += _squares(
                        metric_ptr, n, far_d + tl.arange(0, BLOCK_D), power, N, D, stride_n, stride_d, DOT, INDEX
                    )
                tl.store(powers_ptr + n, power, mask=n < N)
                tl.store(norms_ptr + n, _root(squares), mask=n < N)
    tl.debug_barrier()
    return scaled


@triton.jit
def _likeness(
    metric_ptr, powers_ptr, norms_ptr, scaled, n, m, N, D, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, POWERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The cosines of rows n and rows m, -inf where one is none."""
    products = tl.zeros((n.shape[0], m.shape[0]), ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        of_n = rows(metric_ptr, n, d, n < N, D, stride_n, stride_d, DOT, INDEX)
        of_m = rows(metric_ptr, m, d, m < N, D, stride_n, stride_d, DOT, INDEX)
        if POWERS:
            of_n *= tl.load(powers_ptr + n, mask=(scaled > 0) & (n < N), other=1.0).to(DOT)[:, None]
            of_m *= tl.load(powers_ptr + m, mask=(scaled > 0) & (m < N), other=1.0).to(DOT)[:, None]
        products = tl.dot(of_n, tl.trans(of_m), products, input_precision=PRECISION, out_dtype=ACC)
    # their product is at least the smallest normal number; rounded as a division is
    norms = tl.load(norms_ptr + n, mask=n < N, other=0.0)[:, None] * tl.load(norms_ptr + m, mask=m < N, other=0.0)
    if ACC == tl.float64:
        cosines = products / tl.maximum(norms, 2.2250738585072014e-308)
    else:
        cosines = tl.div_rn(products, tl.maximum(norms, 1.1754943508222875e-38))
    return tl.where((cosines == cosines) & (m < N)[None, :], cosines, float("-inf"))


@for_any("N", "P", "r", "looking")
def match_bipartite_fwd_kernel(
    metric_ptr, scratch_ptr, index_ptr, N, D, P, r, looking, stride_b, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, POWERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows of which the number is even, the prefix counted, are A, the others B; `looking` of A look for one of B."""
    b = tl.program_id(0).to(tl.int64)
    first_a, first_b = P % 2, 1 - P % 2
    count_a, count_b = (N + 1 - first_a) // 2, (N + 1 - first_b) // 2
    metric_ptr += b * stride_b + tl.cast(stride_n, tl.int64) * P
    best_ptr = scratch_ptr + b * (count_a + 2 * N)
    powers_ptr = best_ptr + count_a
    norms_ptr = powers_ptr + N
    index_ptr += b * N

    scaled = 0
    if looking > 0:
        scaled = _measure(
            metric_ptr, powers_ptr, norms_ptr, N, D, stride_n, stride_d, ACC, DOT, INDEX, POWERS, BLOCK, BLOCK_D
        )
    for start in range(0, looking, BLOCK):
        i = start + tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), ACC)
        target = tl.zeros((BLOCK,), tl.int32)
        for start_b in range(0, count_b, BLOCK):
            m = first_b + 2 * (start_b + tl.arange(0, BLOCK))
            likeness = _likeness(
                metric_ptr, powers_ptr, norms_ptr, scaled, first_a + 2 * i, m, N, D, stride_n, stride_d,
                ACC, DOT, PRECISION, INDEX, POWERS, BLOCK_D,
            )  # fmt: skip
            here = tl.max(likeness, axis=1)
            equal = tl.where(likeness == here[:, None], (m // 2)[None, :], count_b)
            target = tl.where(here > best, tl.min(equal, axis=1), target)
            best = tl.maximum(best, here)
        tl.store(best_ptr + i, best, mask=i < count_a)
        tl.store(index_ptr + first_a + 2 * i, target.to(tl.int64), mask=i < count_a)
    tl.debug_barrier()

    left = 0
    for start in range(0, count_a, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        mine = tl.load(best_ptr + i, mask=i < count_a, other=0.0)
        better = tl.zeros((BLOCK_R,), tl.int32)
        for start_j in range(0, looking, BLOCK_R):
            j = start_j + tl.arange(0, BLOCK_R)
            theirs = tl.load(best_ptr + j, mask=j < count_a, other=0.0)[None, :]
            before = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (j[None, :] < i[:, None]))
            better += tl.sum((before & (j < count_a)[None, :]).to(tl.int32), axis=1)
        merged = better < r
        stays = ((i < count_a) & ~merged).to(tl.int32)
        at = index_ptr + first_a + 2 * i
        target = tl.load(at, mask=(i < count_a) & merged, other=0)
        place = tl.where(merged, count_a - r + target, left + tl.cumsum(stays, axis=0) - 1)
        tl.store(at, place, mask=i < count_a)
        left += tl.sum(stays)
    for start in range(0, count_b, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        tl.store(index_ptr + first_b + 2 * j, (count_a - r + j).to(tl.int64), mask=j < count_b)


@planned
def _plan(metric, r, prefix):
    B, given, D = metric.shape
    N = given - prefix
    even = (given + 1) // 2 - (prefix + 1) // 2
    options = dot_options(metric.dtype)
    if options["PRECISION"] == "tf32":  # which token is most alike is no matter of speed
        options["PRECISION"] = "tf32x3"
    block = tile((N + 1) // 2, 32, 64)
    # operands are in registers before Hopper, those of an fp32 dot three times
    block_d = tile(D, 16, (1 if before_hopper() else 2) * (32 if metric.dtype.itemsize == 2 else 16))
    limit = ALL_REGISTERS if before_hopper() else {}
    constants = {"INDEX": index_type(metric), "POWERS": metric.dtype != torch.float16, "BLOCK": block}
    constants |= {"BLOCK_D": block_d, "BLOCK_R": tile(even, 16, 64), "num_warps": block // 8, "num_stages": 1}
    scalars = (N, D, prefix, r, even if r else 0, *metric.stride())
    return Launch(B if N else 0, scalars, options | constants | limit | FUSION)


def match_bipartite_fwd(metric, r, prefix):
    B, given, _ = metric.shape
    N, even = given - prefix, (given + 1) // 2 - (prefix + 1) // 2
    index = metric.new_empty(B, N, dtype=torch.int64)
    scratch = metric.new_empty(B, even + 2 * N, dtype=accumulation_dtype(metric.dtype))
    launch(match_bipartite_fwd_kernel, _plan(metric, r, prefix), (metric, scratch, index))
    return index
