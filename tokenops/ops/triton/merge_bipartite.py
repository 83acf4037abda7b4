"""merge_bipartite and unmerge_bipartite on Triton: rows summed up where they go, and rows gathered from there.

A program of the sums owns rows of the result: it counts what goes into each, then goes through them in their order, a
row of x for every row of the result at a time, so that only rows that count are read. A program that gathers owns rows
of what is gathered. Prefix rows go into themselves.
"""

import triton
import triton.language as tl

from ..reference import accumulation_dtype
from .common import FUSION, cast, for_any, tile, write_rows
from .launch import Launch, launch, planned
from .match_bipartite import match_bipartite_fwd


@triton.jit
def _goes(index_ptr, n, P, N, M, stride_in):
    """Which row of the P + M merged ones each of rows n goes into; -1 for none."""
    m = tl.load(index_ptr + (n - P).to(tl.int64) * stride_in, mask=(n >= P) & (n < P + N), other=-1)
    return tl.where(n < P, n, tl.where((m >= 0) & (m < M), P + m, -1)).to(tl.int32)


@triton.jit
def _size(sizes_ptr, n, there, stride_sn, SIZES: tl.constexpr, ACC: tl.constexpr):
    """How many tokens each of rows n stands for."""
    if SIZES:
        return cast(tl.load(sizes_ptr + n.to(tl.int64) * stride_sn, mask=there, other=0.0), ACC)
    else:
        return tl.where(there, 1.0, 0.0).to(ACC)


@triton.jit
def _next(index_ptr, row, last, P, N, M, stride_in, BLOCK_K: tl.constexpr):
    """The first of the rows behind `last` that goes into each row; P + N where there is no more."""
    found = tl.full(row.shape, 0, tl.int32) + (P + N)
    for start in range(0, P + N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        into = (_goes(index_ptr, n, P, N, M, stride_in)[None, :] == row[:, None]) & (n[None, :] > last[:, None])
        found = tl.minimum(found, tl.min(tl.where(into, n[None, :], P + N), axis=1))
    return found


@for_any("N", "M", "P", "blocks", "stride_ib", "stride_sb", "mean_ptr", "deviation_ptr")
def sum_rows_kernel(
    x_ptr, index_ptr, sizes_ptr, weight_ptr, bias_ptr, y_ptr, totals_ptr, logs_ptr, normed_ptr, mean_ptr, deviation_ptr,
    eps: tl.float64, N, M, C, P, blocks, slices,
    stride_xb, stride_xn, stride_xc, stride_ib, stride_in, stride_sb, stride_sn,
    MEAN: tl.constexpr, SIZES: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of the result: the sum of what goes into each, or its mean by sizes, which are summed up too."""
    slice, block = tl.program_id(0) % slices, tl.program_id(0) // slices
    b = (block // blocks).to(tl.int64)
    row = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    x_ptr += b * stride_xb
    index_ptr += b * stride_ib
    sizes_ptr += b * stride_sb
    there = row < P + M

    count = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, P + N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        into = _goes(index_ptr, n, P, N, M, stride_in)[None, :] == row[:, None]
        count += tl.sum(into.to(tl.int32), axis=1)
        if MEAN:
            size = _size(sizes_ptr, n, n < P + N, stride_sn, SIZES, ACC)
            total += tl.sum(tl.where(into, size[None, :], 0.0), axis=1)
    some = total != 0
    if MEAN:
        if slice == 0:
            logs = tl.where(some, tl.log(tl.where(some, total, 1.0)), float("-inf"))
            tl.store(totals_ptr + b * (P + M) + row, total, mask=there)
            tl.store(logs_ptr + b * (P + M) + row, logs, mask=there)

    sums = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    n = tl.full((BLOCK_N,), -1, tl.int32)
    for _ in range(0, tl.max(count)):
        n = _next(index_ptr, row, n, P, N, M, stride_in, BLOCK_K)
        more = n < P + N
        offsets = n.to(tl.int64)[:, None] * stride_xn + c[None, :] * stride_xc
        values = tl.load(x_ptr + offsets, mask=more[:, None] & (c < C)[None, :], other=0.0)
        if MEAN:
            # a row that goes somewhere alone has a factor of 1: it is not rounded
            size = _size(sizes_ptr, n, more, stride_sn, SIZES, ACC)
            factor = tl.where(row < P, 1.0, tl.where(some, size / tl.where(some, total, 1.0), 0.0))
            sums += cast(values, ACC) * factor[:, None]
        else:
            sums += cast(values, ACC)
    if MEAN:  # what nothing of any size goes into is 0, be it NaN
        sums = tl.where((some | (row < P))[:, None], sums, 0.0)
    write_rows(
        cast(sums, y_ptr.dtype.element_ty), row, there, c, b, C, P + M, tl.full((), eps, ACC), y_ptr, normed_ptr,
        mean_ptr, deviation_ptr, weight_ptr, bias_ptr, NORM, WEIGHT, BIAS, ACC,
    )  # fmt: skip


@for_any("N", "M", "P", "blocks", "stride_ib", "stride_sb", "stride_tb")
def gather_rows_kernel(
    y_ptr, index_ptr, sizes_ptr, totals_ptr, x_ptr, N, M, C, P, blocks, slices,
    stride_yb, stride_yn, stride_yc, stride_ib, stride_in, stride_sb, stride_sn, stride_tb, stride_tn,
    MEAN: tl.constexpr, SIZES: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every row gets the one it went into, or its share of it."""
    slice, block = tl.program_id(0) % slices, tl.program_id(0) // slices
    b = (block // blocks).to(tl.int64)
    n = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    row = _goes(index_ptr + b * stride_ib, n, P, N, M, stride_in)
    read = row >= 0
    if MEAN:
        size = _size(sizes_ptr + b * stride_sb, n, read, stride_sn, SIZES, ACC)
        total = tl.load(totals_ptr + b * stride_tb + row.to(tl.int64) * stride_tn, mask=read, other=0.0)
        factor = tl.where(n < P, 1.0, size / tl.where(total == 0, 1.0, total))
        read = read & ((n < P) | (total != 0))
    offsets = row.to(tl.int64)[:, None] * stride_yn + c[None, :] * stride_yc
    values = tl.load(y_ptr + b * stride_yb + offsets, mask=read[:, None] & (c < C)[None, :], other=0.0)
    if MEAN:
        values = cast(cast(values, ACC) * factor[:, None], x_ptr.dtype.element_ty)
    at = (b * (P + N) + n)[:, None] * C + c[None, :]
    tl.store(x_ptr + at, values, mask=(n < P + N)[:, None] & (c < C)[None, :])


def _accumulator(x):
    return tl.float64 if accumulation_dtype(x.dtype).itemsize == 8 else tl.float32


@planned
def _sum_plan(x, index, tokens, prefix, sizes, weight, bias, mean, norm):
    (B, _, C), N, rows = x.shape, index.shape[1], prefix + tokens
    wide = x.dtype.itemsize > 2
    block_c = triton.next_power_of_2(max(C, 16)) if norm else tile(C, 16, 128)
    size = min(4096, 2**21 // block_c) if norm else 1024 if wide else 2048
    block_n = max(1, min(32, size // block_c))
    blocks, slices = triton.cdiv(rows, block_n), max(1, triton.cdiv(C, block_c))
    constants = {
        "MEAN": mean,
        "SIZES": sizes is not None,
        "NORM": norm,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ACC": _accumulator(x),
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_K": min(128, 1024 // block_n),  # of any N: one that shrinks compiles nothing again
        "num_warps": 8 if norm and C > 256 and block_n > 1 else 4,
        "maxnreg": 128,  # left alone, ptxas spills to get to the next step of occupancy
    }
    strides = *x.stride(), *index.stride(), *((0, 0) if sizes is None else sizes.stride())
    return Launch(B * blocks * slices, (N, tokens, C, prefix, blocks, slices, *strides), constants | FUSION)


@planned
def _gather_plan(y, index, prefix, sizes, totals):
    (B, rows, C), N = y.shape, index.shape[1]
    block_c = tile(C, 16, 128)
    block_n = min(32, 2048 // block_c)
    blocks, slices = triton.cdiv(prefix + N, block_n), triton.cdiv(C, block_c)
    constants = {"MEAN": totals is not None, "SIZES": sizes is not None, "ACC": _accumulator(y)}
    constants |= {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4, **FUSION}
    strides = [stride for t in (sizes, totals) for stride in ((0, 0) if t is None else t.stride())]
    scalars = (N, rows - prefix, C, prefix, blocks, slices, *y.stride(), *index.stride(), *strides)
    return Launch(B * blocks * slices, scalars, constants)


def _sum_rows(x, index, tokens, prefix, sizes=None, parameters=(None, None), made=None, norm=False, eps=0.0):
    """The rows summed up; their means, with all that `made` has room for, if that is given."""
    B, _, C = x.shape
    y = x.new_empty(B, prefix + tokens, C)
    plan = _sum_plan(x, index, tokens, prefix, sizes, *parameters, made is not None, norm)
    given = [x if t is None else t for t in (sizes, *parameters)]
    launch(sum_rows_kernel, plan, (x, index, *given, y, *(made or (y,) * 5)), (eps,))
    return y


def _gather_rows(y, index, prefix, sizes=None, totals=None):
    """Every row gets the one it went into, its share by sizes if there are `totals`."""
    B, _, C = y.shape
    x = y.new_empty(B, prefix + index.shape[1], C)
    given = [y if t is None else t for t in (sizes, totals)]
    launch(gather_rows_kernel, _gather_plan(y, index, prefix, sizes, totals), (y, index, *given, x))
    return x


def merge_bipartite_fwd(x, index, tokens, sizes, weight, bias, prefix, norm, eps):
    (B, _, C), rows, wide = x.shape, prefix + tokens, accumulation_dtype(x.dtype)
    totals, logs = x.new_empty(B, rows, dtype=wide), x.new_empty(B, rows, dtype=wide)
    normed = x.new_empty(B, rows, C) if norm else x.new_empty(0)
    statistics = x.new_empty(2, B, rows, dtype=wide) if norm else x.new_empty(0, dtype=wide)
    made = totals, logs, normed, *(statistics if norm else (statistics, statistics))
    y = _sum_rows(x, index, tokens, prefix, sizes, (weight, bias), made, norm, eps)
    return y, totals, logs, normed, statistics


def merge_bipartite_matched(x, metric, r, sizes, weight, bias, prefix, norm, eps):
    index = match_bipartite_fwd(metric, r, prefix)
    y, *others = merge_bipartite_fwd(x, index, index.shape[1] - r, sizes, weight, bias, prefix, norm, eps)
    return y, index, *others


def merge_bipartite_bwd(dy, index, sizes, merged, prefix):
    return _gather_rows(dy, index, prefix, sizes, merged)


def unmerge_bipartite_fwd(y, index, prefix):
    return _gather_rows(y, index, prefix)


def unmerge_bipartite_bwd(dx, index, tokens, prefix):
    return _sum_rows(dx, index, tokens, prefix)
