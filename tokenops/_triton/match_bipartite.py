"""match_bipartite on Triton: a program finds for every even row of its image the odd one that is most like it.

Rows are multiplied as they come (products of 16 bits are exact in fp32) and divided by both norms afterwards. What was
found goes through memory, where the same program ranks it.
"""

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from .common import FUSION, before_hopper, dot_options, index_type, rows, tile


@triton.jit
def _cosines(products, squares_n, squares_m):
    """Products over both norms, whose product is at least the smallest normal number; rounded as a division is."""
    if products.dtype == tl.float64:
        norms = tl.sqrt(squares_n)[:, None] * tl.sqrt(squares_m)[None, :]
        return products / tl.maximum(norms, 2.2250738585072014e-308)
    else:
        norms = tl.sqrt_rn(squares_n)[:, None] * tl.sqrt_rn(squares_m)[None, :]
        return tl.div_rn(products, tl.maximum(norms, 1.1754943508222875e-38))


@triton.jit
def _likeness(
    metric_ptr, n, m, N, D, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The cosines of rows n and rows m, -inf where one is none."""
    products = tl.zeros((n.shape[0], m.shape[0]), ACC)
    squares_n = tl.zeros(n.shape, ACC)
    squares_m = tl.zeros(m.shape, ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        of_n = rows(metric_ptr, n, d, n < N, D, stride_n, stride_d, DOT, INDEX)
        of_m = rows(metric_ptr, m, d, m < N, D, stride_n, stride_d, DOT, INDEX)
        products = tl.dot(of_n, tl.trans(of_m), products, input_precision=PRECISION, out_dtype=ACC)
        squares_n += tl.sum(of_n.to(ACC) * of_n.to(ACC), axis=1)
        squares_m += tl.sum(of_m.to(ACC) * of_m.to(ACC), axis=1)
    cosines = _cosines(products, squares_n, squares_m)
    return tl.where((cosines == cosines) & (m < N)[None, :], cosines, float("-inf"))


@triton.jit
def match_bipartite_fwd_kernel(
    metric_ptr, best_ptr, index_ptr, N, D, P, r, looking, stride_b, stride_n, stride_d,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows of which the number is even, the prefix counted, are A, the others B; `looking` of A look for one of B."""
    b = tl.program_id(0).to(tl.int64)
    first_a, first_b = P % 2, 1 - P % 2
    count_a, count_b = (N + 1 - first_a) // 2, (N + 1 - first_b) // 2
    metric_ptr += b * stride_b + tl.cast(stride_n, tl.int64) * P
    best_ptr += b * count_a
    index_ptr += b * N

    for start in range(0, looking, BLOCK):
        i = start + tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), ACC)
        target = tl.zeros((BLOCK,), tl.int32)
        for start_b in range(0, count_b, BLOCK):
            m = first_b + 2 * (start_b + tl.arange(0, BLOCK))
            likeness = _likeness(
                metric_ptr, first_a + 2 * i, m, N, D, stride_n, stride_d, ACC, DOT, PRECISION, INDEX, BLOCK_D
            )
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


def match_bipartite_fwd(metric, r, prefix):
    B, given, D = metric.shape
    N = given - prefix
    index = metric.new_empty((B, N), dtype=torch.int64)
    even = (given + 1) // 2 - (prefix + 1) // 2
    if B * N == 0:
        return index
    options = dot_options(metric.dtype)
    if options["PRECISION"] == "tf32":  # which token is most alike is no matter of speed
        options["PRECISION"] = "tf32x3"
    best = metric.new_empty((B, even), dtype=accumulation_dtype(metric.dtype))
    block = tile((N + 1) // 2, 32, 64)
    # operands of an fp32 dot are held three times, in registers before Hopper
    block_d = tile(D, 16, 64 if metric.element_size() == 2 else 16 if before_hopper() else 32)
    match_bipartite_fwd_kernel[B,](
        metric, best, index, N, D, prefix, r, even if r else 0, *metric.stride(),
        **options, INDEX=index_type(metric), BLOCK=block, BLOCK_D=block_d, BLOCK_R=tile(even, 16, 64),
        num_warps=block // 8, num_stages=1, **FUSION,
    )  # fmt: skip
    return index
