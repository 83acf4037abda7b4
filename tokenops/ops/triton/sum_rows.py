"""sum_rows on Triton: rows that are sorted by where they go, and the gather that is its gradient.

A program of the sums owns rows of the result and goes through those that go there, in their order. Of a row that TILE
or more go to, whole tiles are summed up before, each by a program of its own: the tile that begins among TILE places of
the order, of which there is at most one. It holds the last of these places, which says what row it is of.
"""

import triton
import triton.language as tl

from ..reference import accumulation_dtype
from .common import FUSION, cast, for_any, tile, write_rows
from .launch import Launch, launch, planned

TILE = 128
UNROLLED = 4


@triton.jit
def _weight(weight_ptr, n, there, WEIGHT: tl.constexpr, ACC: tl.constexpr):
    if WEIGHT:
        return tl.load(weight_ptr + n, mask=there, other=0.0)
    else:
        return tl.where(there, 1.0, 0.0).to(ACC)


@for_any("M", "windows")
def packed_tiles_kernel(
    x_ptr, order_ptr, offsets_ptr, dest_ptr, weight_ptr, parts_ptr, shares_ptr, M, C, windows, stride_n, stride_c,
    WEIGHT: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    window, slice = tl.program_id(0) % windows, tl.program_id(0) // windows
    last = (window + 1).to(tl.int64) * TILE - 1
    m = tl.load(dest_ptr + tl.load(order_ptr + last))
    inside = (m >= 0) & (m < M)
    begin = tl.load(offsets_ptr + m, mask=inside, other=0)
    end = tl.load(offsets_ptr + m + 1, mask=inside, other=0)
    first = begin + (last - begin) // TILE * TILE
    if first + TILE <= end:
        c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
        sums = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        share = tl.zeros((BLOCK_R,), ACC)
        every = tl.full((BLOCK_R,), 1, tl.int1)
        for start in range(0, TILE, BLOCK_R):
            n = tl.load(order_ptr + first + start + tl.arange(0, BLOCK_R))
            weight = _weight(weight_ptr, n, every, WEIGHT, ACC)
            x = tl.load(x_ptr + n[:, None] * stride_n + c[None, :] * stride_c, mask=(c < C)[None, :], other=0.0)
            sums += cast(x, ACC) * weight[:, None]
            share += weight
        tl.store(parts_ptr + window.to(tl.int64) * C + c, tl.sum(sums, axis=0), mask=c < C)
        if slice == 0:
            tl.store(shares_ptr + window, tl.sum(share, axis=0))


@for_any("M", "blocks", "mean_ptr", "deviation_ptr")
def packed_sums_kernel(
    x_ptr, order_ptr, offsets_ptr, weight_ptr, parts_ptr, shares_ptr, factor_ptr, bias_ptr, y_ptr, totals_ptr,
    normed_ptr, mean_ptr, deviation_ptr, eps: tl.float64, M, C, blocks, stride_n, stride_c,
    MEAN: tl.constexpr, WEIGHT: tl.constexpr, TILED: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, UNROLLED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, slice = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    there = row < M
    begin = tl.load(offsets_ptr + row, mask=there, other=0)
    end = tl.load(offsets_ptr + row + 1, mask=there, other=0)
    count = (end - begin).to(tl.int32)
    sums = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    single = begin
    left = count
    if TILED:
        window, tiles = begin // TILE, count // TILE
        for start in range(0, tl.max(tiles), UNROLLED):
            for i in tl.static_range(UNROLLED):
                more = start + i < tiles
                at = window + start + i
                total += tl.load(shares_ptr + at, mask=more, other=0.0)
                sums += tl.load(
                    parts_ptr + at[:, None] * C + c[None, :], mask=more[:, None] & (c < C)[None, :], other=0.0
                )
        single += tiles * TILE
        left -= tiles * TILE
    for start in range(0, tl.max(left), UNROLLED):
        for i in tl.static_range(UNROLLED):
            more = start + i < left
            n = tl.load(order_ptr + single + start + i, mask=more, other=0)
            weight = _weight(weight_ptr, n, more, WEIGHT, ACC)
            at = n[:, None] * stride_n + c[None, :] * stride_c
            x = tl.load(x_ptr + at, mask=more[:, None] & (c < C)[None, :], other=0.0)
            total += weight
            if MEAN and WEIGHT:  # a row that goes somewhere alone is not rounded
                weight = tl.where((count == 1) & (weight != 0), 1.0, weight)
            sums += cast(x, ACC) * weight[:, None]
    if MEAN:
        sums = sums / tl.where((total == 0) | (count == 1), 1.0, total)[:, None]
    if slice == 0:
        tl.store(totals_ptr + row, total, mask=there)
    write_rows(
        cast(sums, y_ptr.dtype.element_ty), row, there, c, 0, C, M, tl.full((), eps, ACC), y_ptr, normed_ptr,
        mean_ptr, deviation_ptr, factor_ptr, bias_ptr, NORM, FACTOR, BIAS, ACC,
    )  # fmt: skip


@for_any("M", "T")
def packed_gather_kernel(
    dy_ptr, dest_ptr, weight_ptr, totals_ptr, x_ptr, dx_ptr, dots_ptr, T, M, C, stride_dn, stride_dc, stride_xn,
    stride_xc, WEIGHT: tl.constexpr, MEAN: tl.constexpr, DOTS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every row gets its share of the one it went to, and its product with that."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.load(dest_ptr + n, mask=n < T, other=-1)
    goes = (m >= 0) & (m < M)
    n = n.to(tl.int64)
    factor = _weight(weight_ptr, n, goes, WEIGHT, ACC)
    inverse = goes.to(ACC)
    if MEAN:
        total = tl.load(totals_ptr + m, mask=goes, other=1.0)
        inverse = 1 / tl.where(total == 0, 1.0, total)
        factor = factor / tl.where(total == 0, 1.0, total)
    dot = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        read = goes[:, None] & (c < C)
        dy = tl.load(dy_ptr + m[:, None] * stride_dn + c * stride_dc, mask=read, other=0.0)
        if DOTS:
            x = tl.load(x_ptr + n[:, None] * stride_xn + c * stride_xc, mask=read, other=0.0)
            dot += tl.sum(cast(x, ACC) * cast(dy, ACC), axis=1)
        if WEIGHT or MEAN:
            dy = cast(cast(dy, ACC) * factor[:, None], dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + n[:, None] * C + c, dy, mask=(n < T)[:, None] & (c < C))
    if DOTS:
        tl.store(dots_ptr + n, dot * inverse, mask=n < T)


def _accumulator(x):
    return tl.float64 if accumulation_dtype(x.dtype).itemsize == 8 else tl.float32


@planned
def _tiles_plan(x, windows, rows, weight):
    C = x.shape[1]
    block_c = tile(C, 16, 128)
    slices = triton.cdiv(C, block_c)
    constants = {"WEIGHT": weight is not None, "ACC": _accumulator(x), "TILE": TILE}
    constants |= {"BLOCK_R": min(32, 2048 // block_c), "BLOCK_C": block_c, "num_warps": 4, **FUSION}
    return Launch(windows * slices, (rows, C, windows, *x.stride()), constants)


@planned
def _sum_plan(x, rows, weight, factor, bias, mean, tiled, norm):
    C = x.shape[1]
    block_c = triton.next_power_of_2(max(C, 16)) if norm else tile(C, 16, 128)
    block_n = max(1, min(32, (min(4096, 2**21 // block_c) if norm else 1024) // block_c))
    blocks, slices = triton.cdiv(rows, block_n), max(1, triton.cdiv(C, block_c))
    constants = {
        "MEAN": mean,
        "WEIGHT": weight is not None,
        "TILED": tiled,
        "NORM": norm,
        "FACTOR": factor is not None,
        "BIAS": bias is not None,
        "ACC": _accumulator(x),
        "TILE": TILE,
        "UNROLLED": UNROLLED if block_n * block_c <= 2048 else 1,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "num_warps": 8 if norm and C > 256 and block_n > 1 else 4,
        "maxnreg": 128,  # left alone, ptxas spills to get to the next step of occupancy
    }
    return Launch(blocks * slices, (rows, C, blocks, *x.stride()), constants | FUSION)


@planned
def _gather_plan(dy, x, rows, weight, totals):
    (M, C), dots = dy.shape, x is not None
    block_c = tile(C, 16, 128)
    constants = {"WEIGHT": weight is not None, "MEAN": totals is not None, "DOTS": dots, "ACC": _accumulator(dy)}
    constants |= {"BLOCK_N": min(32, 2048 // block_c), "BLOCK_C": block_c, "num_warps": 4, **FUSION}
    scalars = (rows, M, C, *dy.stride(), *(x.stride() if dots else (0, 0)))
    return Launch(triton.cdiv(rows, constants["BLOCK_N"]), scalars, constants)


def sum_rows_fwd(x, dest, rows, weight, order, offsets, most, factor, bias, mean, norm, eps):
    C, wide = x.shape[1], accumulation_dtype(x.dtype)
    y, totals = x.new_empty(rows, C), x.new_empty(rows, dtype=wide)
    normed = x.new_empty(rows, C) if norm else x.new_empty(0)
    statistics = x.new_empty(2, rows, dtype=wide) if norm else x.new_empty(0, dtype=wide)
    means, deviations = statistics if norm else (statistics, statistics)
    windows, weights = order.shape[0] // TILE if most >= TILE else 0, x if weight is None else weight
    parts = shares = totals
    if windows:
        parts, shares = x.new_empty(windows, C, dtype=wide), x.new_empty(windows, dtype=wide)
        tensors = (x, order, offsets, dest, weights, parts, shares)
        launch(packed_tiles_kernel, _tiles_plan(x, windows, rows, weight), tensors)
    given = [x if t is None else t for t in (factor, bias)]
    tensors = (x, order, offsets, weights, parts, shares, *given, y, totals, normed, means, deviations)
    launch(packed_sums_kernel, _sum_plan(x, rows, weight, factor, bias, mean, windows > 0, norm), tensors, (eps,))
    return y, totals, normed, statistics


def sum_rows_bwd(dy, dest, weight, totals, x):
    T, C = dest.shape[0], dy.shape[1]
    dx = dy.new_empty(T, C)
    dots = dy.new_empty(0 if x is None else T, dtype=accumulation_dtype(dy.dtype))
    given = [dy if t is None else t for t in (weight, totals, x)]
    launch(packed_gather_kernel, _gather_plan(dy, x, T, weight, totals), (dy, dest, *given, dx, dots))
    return dx, dots
