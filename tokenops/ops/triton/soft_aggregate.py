"""soft_aggregate on Triton: a kernel a direction, which makes the weights of a tile once for all channels.

Forward: a program owns slots of an image. Where the image's tokens fit a tile their logits are read once; else a first
walk finds each slot's largest logit and sum, and the weights are made again for every tile of channels. Backward: some
programs own slots (dw), some tokens (dx), and what an image's programs read they share in L2. Where the tokens fit a
tile, D = sum of A * dA over them needs no y. Each result is written once, without atomics.

Packed sequences are images whose tokens begin where the boundaries say; in a backward pass a program finds out which
sequence its tile is of (sequences.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launches
from .common import ALL_REGISTERS, FUSION, before_hopper, dot_options, for_any, from_units, index_type, rows, tile, unit
from .launch import Launch, launch, planned
from .sequences import extent, leap_of, sequence, tiles_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scale(scale_ptr, factor, ACC: tl.constexpr, HAS_SCALE: tl.constexpr):
    """The scale; the rate, weights being exp2(rate * w - something); the infinite logit that leaves a token out."""
    scale = tl.full((), factor, ACC)
    if HAS_SCALE:
        scale *= tl.load(scale_ptr).to(ACC)
    rate = scale * LOG2E
    rate = tl.where(rate == 0.0, tl.full((), 1e-45, ACC), rate)  # the least there is: infinity times it is infinite
    return scale, rate, tl.where(rate < 0.0, float("inf"), float("-inf"))


@triton.jit
def _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK: tl.constexpr, INDEX: tl.constexpr):
    counts = n < N
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + n.to(INDEX) * stride_mn, mask=counts, other=0) != 0)
    return counts


@triton.jit
def _logits(w_ptr, n, m, counts, M, left_out, stride_wn, stride_wm, ACC: tl.constexpr, INDEX: tl.constexpr):
    """The logits of tokens n and slots m, shaped to broadcast, `left_out` for -inf and for tokens that do not count."""
    offsets = n.to(INDEX) * stride_wn + m.to(INDEX) * stride_wm
    w = tl.load(w_ptr + offsets, mask=counts & (m < M), other=float("-inf")).to(ACC)
    return tl.where(w == float("-inf"), left_out, w)


@triton.jit
def _finite(w):
    return tl.where(tl.abs(w) == float("inf"), 0.0, w)


@triton.jit
def _powers(w, rate, top):
    """exp2(rate * w - top), the product not rounded: large logits cancel. 0 where a token is left out."""
    return tl.exp2(tl.fma(w, rate, -top))


@triton.jit
def _copy_prefix(
    tile, from_ptr, to_ptr, P, there, first, last, C, stride_n, stride_c, BLOCK_C: tl.constexpr, ALL: tl.constexpr
):
    """The rows before the tokens, channels first to last, by the programs of an image's first tile.

    Unless ALL are there, zeros stand for the others.
    """
    if tile == 0:
        for p in range(P):
            for start in range(first, last, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                offsets = tl.cast(p, tl.int64) * stride_n + c.to(tl.int64) * stride_c
                row = tl.load(from_ptr + offsets, mask=(c < C) if ALL else (c < C) & (p < there), other=0.0)
                tl.store(to_ptr + tl.cast(p, tl.int64) * C + c, row.to(to_ptr.dtype.element_ty), mask=c < C)


@for_any("B", "N", "M", "stride_wb", "stride_mb")
def soft_aggregate_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr, stats_ptr, mask_ptr, ends_ptr, factor: tl.float64,
    B, N, M, C, P, width,
    stride_xb, stride_xn, stride_xc, stride_wb, stride_wn, stride_wm, stride_mb, stride_mn,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    N_UNIT: tl.constexpr, M_UNIT: tl.constexpr, WB_UNIT: tl.constexpr, WN_UNIT: tl.constexpr, WM_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ONE_TILE_N: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    N, M = N * N_UNIT, M * M_UNIT
    stride_wb = from_units(stride_wb, WB_UNIT, tl.int64)
    stride_wn, stride_wm = from_units(stride_wn, WN_UNIT, INDEX), from_units(stride_wm, WM_UNIT, INDEX)
    shares = tl.maximum(tl.cdiv(C, width), 1)
    tiles_m = tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    program = tl.program_id(0)
    tile_m = (program // shares) % tiles_m
    first = (program % shares) * width
    last = tl.minimum(first + width, C)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (program // (shares * tiles_m)).to(tl.int64)
    own = P
    if PACKED:
        begin, own, N = extent(ends_ptr, b, B, N, P)
        x_ptr += begin * stride_xn
        w_ptr += (begin + own) * stride_wn
        mask_ptr += (begin + own) * stride_mn
    else:
        x_ptr += b * stride_xb
        w_ptr += b * stride_wb
        mask_ptr += b * stride_mb
    y_ptr += b * (P + M) * C

    _copy_prefix(tile_m, x_ptr, y_ptr, P, own, first, last, C, stride_xn, stride_xc, BLOCK_C, not PACKED)
    x_ptr += tl.cast(own, tl.int64) * stride_xn

    scale, rate, left_out = _scale(scale_ptr, factor, ACC, HAS_SCALE)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    mean = tl.zeros((BLOCK_M,), ACC)
    n = tl.arange(0, BLOCK_N)
    counts = _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK, INDEX)
    a = tl.zeros((BLOCK_M, BLOCK_N), DOT)
    for start in range(0, BLOCK_N if ONE_TILE_N else N, BLOCK_N):
        if not ONE_TILE_N:
            n = start + tl.arange(0, BLOCK_N)
            counts = _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK, INDEX)
        w = _logits(w_ptr, n[None, :], m[:, None], counts[None, :], M, left_out, stride_wn, stride_wm, ACC, INDEX)
        higher = tl.maximum(top, tl.max(w * rate, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        e = _powers(w, rate, base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(e, axis=1)
        if HAS_SCALE:
            mean = mean * shrink + tl.sum(e * _finite(w), axis=1)
        top = higher
        a = e.to(DOT)
    # a slot without any token that counts has weights exp2(-inf - 0) * 0
    top = tl.where(top == float("-inf"), 0.0, top)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    if first == 0:
        tl.store(stats_ptr + b * M + m, top, mask=m < M)
        tl.store(stats_ptr + (B + b) * M + m, inverse, mask=m < M)
        tl.store(stats_ptr + (2 * B + b) * M + m, mean * inverse, mask=m < M)

    for start_c in range(first, last, BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
        for start in range(0, BLOCK_N if ONE_TILE_N else N, BLOCK_N):
            if not ONE_TILE_N:
                n = start + tl.arange(0, BLOCK_N)
                counts = _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK, INDEX)
                w = _logits(
                    w_ptr, n[None, :], m[:, None], counts[None, :], M, left_out, stride_wn, stride_wm, ACC, INDEX
                )
                a = _powers(w, rate, top[:, None]).to(DOT)
            x = rows(x_ptr, n, c, counts, C, stride_xn, stride_xc, DOT, INDEX)
            acc = tl.dot(a, x, acc, input_precision=PRECISION, out_dtype=ACC)
        acc *= inverse[:, None]
        offsets = (P + m).to(INDEX)[:, None] * C + c[None, :]
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def _weights(w, rate, stats_ptr, b, m, B, M):
    """A again, from the logits and what the forward pass saved of each slot: largest exponent and inverse sum."""
    top = tl.load(stats_ptr + b * M + m, mask=m < M, other=0.0)
    inverse = tl.load(stats_ptr + (B + b) * M + m, mask=m < M, other=0.0)
    return _powers(w, rate, top[None, :]) * inverse[None, :]


@for_any("B", "N", "M", "stride_wb", "stride_mb", "stride_dwb")
def soft_aggregate_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, scale_ptr, y_ptr, stats_ptr, dx_ptr, dw_ptr, dscale_ptr, mask_ptr, ends_ptr,
    factor: tl.float64, B, N, M, C, P, width,
    stride_dyb, stride_dym, stride_dyc, stride_xb, stride_xn, stride_xc, stride_wb, stride_wn, stride_wm,
    stride_mb, stride_mn, stride_dwb, stride_dwn, stride_dwm,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    N_UNIT: tl.constexpr, M_UNIT: tl.constexpr, WB_UNIT: tl.constexpr, WN_UNIT: tl.constexpr, WM_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ONE_TILE_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, ONE_TILE_S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    N, M = N * N_UNIT, M * M_UNIT
    stride_wb = from_units(stride_wb, WB_UNIT, tl.int64)
    stride_wn, stride_wm = from_units(stride_wn, WN_UNIT, INDEX), from_units(stride_wm, WM_UNIT, INDEX)
    stride_dwb = from_units(stride_dwb, WB_UNIT, tl.int64)
    stride_dwn, stride_dwm = from_units(stride_dwn, WN_UNIT, INDEX), from_units(stride_dwm, WM_UNIT, INDEX)
    tiles_m, shares = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(C, width), 1)
    if PACKED:
        of_dw, of_dx = (N // BLOCK_N + B + 1) * tiles_m, (N // BLOCK_T + B + 1) * shares
        place = tl.program_id(0)
        if place < of_dw:
            tile = place // tiles_m
            found = sequence(ends_ptr, tile, B, leap_of(B), BLOCK_N)
            tile -= tl.load(ends_ptr + found) // BLOCK_N + found
        else:
            tile = (place - of_dw) // shares
            found = sequence(ends_ptr, tile, B, leap_of(B), BLOCK_T)
            tile -= tl.load(ends_ptr + found) // BLOCK_T + found
        begin, own, N = extent(ends_ptr, found, B, N, P)
        read = tl.where(found < B, N, 0)  # nothing of the rows behind the last sequence
        b = tl.minimum(found, B - 1).to(tl.int64)
        x_ptr += begin * stride_xn
        w_ptr += (begin + own) * stride_wn
        mask_ptr += (begin + own) * stride_mn
        dy_ptr += b * stride_dyb
    else:
        of_dw, of_dx = tl.cdiv(N, BLOCK_N) * tiles_m, tl.maximum(tl.cdiv(N, BLOCK_T), 1) * shares
        place = tl.program_id(0) % (of_dw + of_dx)
        b = (tl.program_id(0) // (of_dw + of_dx)).to(tl.int64)
        own, read = P, N
        dy_ptr += b * stride_dyb
        x_ptr += b * stride_xb
        w_ptr += b * stride_wb
        mask_ptr += b * stride_mb
    scale, rate, left_out = _scale(scale_ptr, factor, ACC, HAS_SCALE)

    if place < of_dw:
        x_ptr += tl.cast(own, tl.int64) * stride_xn
        dy_ptr += tl.cast(P, tl.int64) * stride_dym
        y_ptr += (b * (P + M) + P) * C
        stop = C
        if not PACKED:
            dw_ptr += b * stride_dwb
            tile = place // tiles_m
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m = place % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        if PACKED:
            dw_ptr += (begin + own) * stride_dwn
            stop = tl.where(tile * BLOCK_N < read, C, 0)
            for p in range(own if tile == 0 else 0):
                zeros = tl.zeros((BLOCK_M,), dw_ptr.dtype.element_ty)
                tl.store(dw_ptr + tl.cast(p - own, tl.int64) * stride_dwn + m * stride_dwm, zeros, mask=m < M)
        counts = _token_counts(mask_ptr, n, read, stride_mn, HAS_MASK, INDEX)
        da = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        delta = tl.zeros((BLOCK_M,), ACC)
        for start in range(0, stop, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = rows(x_ptr, n, c, counts, C, stride_xn, stride_xc, DOT, INDEX)
            dy = rows(dy_ptr, m, c, m < M, C, stride_dym, stride_dyc, DOT, INDEX)
            da = tl.dot(x, tl.trans(dy), da, input_precision=PRECISION, out_dtype=ACC)
            if not ONE_TILE_N:
                y = rows(y_ptr, m, c, m < M, C, C, 1, ACC, INDEX)
                delta += tl.sum(dy.to(ACC) * y, axis=1)
        w = _logits(w_ptr, n[:, None], m[None, :], counts[:, None], M, left_out, stride_wn, stride_wm, ACC, INDEX)
        a = _weights(w, rate, stats_ptr, b, m, B, M)
        if ONE_TILE_N:
            delta = tl.sum(a * da, axis=0)
        ds = a * (da - delta[None, :])
        if HAS_MASK or PACKED:
            ds = tl.where(counts[:, None], ds, 0.0)  # though the slot may be NaN
        if HAS_SCALE:
            dscale = tl.sum(ds * _finite(w), axis=0)
            if not ONE_TILE_N:
                # dS sums to 0 over the tokens; measured from their mean, the logits let no error of delta through
                mean = tl.load(stats_ptr + (2 * B + b) * M + m, mask=m < M, other=0.0)
                dscale -= mean * tl.sum(ds, axis=0)
            # a sum to one number here makes Triton 3.6 fail on sm_100
            share = tl.cast(place // tiles_m, tl.int64) if PACKED else b * tl.cdiv(N, BLOCK_N) + place // tiles_m
            tl.store(dscale_ptr + share * M + m, factor * dscale, mask=m < M)
        offsets = n.to(INDEX)[:, None] * stride_dwn + m.to(INDEX)[None, :] * stride_dwm
        inside = (n < N)[:, None] & (m < M)[None, :]
        tl.store(dw_ptr + offsets, (scale * ds).to(dw_ptr.dtype.element_ty), mask=inside)
    else:
        place -= of_dw
        if PACKED:
            dx_ptr += begin * C
        else:
            dx_ptr += b * (P + N) * C
            tile = place // shares
        first = place % shares * width
        last = tl.minimum(first + width, C)
        _copy_prefix(tile, dy_ptr, dx_ptr, own, own, first, last, C, stride_dym, stride_dyc, BLOCK_C, True)
        if PACKED:
            last = tl.where(tile * BLOCK_T < N, last, first)
        dy_ptr += tl.cast(P, tl.int64) * stride_dym
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        reads = _token_counts(mask_ptr, t, read, stride_mn, HAS_MASK, INDEX)
        s = tl.arange(0, BLOCK_S)
        logits = _logits(w_ptr, t[:, None], s[None, :], reads[:, None], M, left_out, stride_wn, stride_wm, ACC, INDEX)
        weights = _weights(logits, rate, stats_ptr, b, s, B, M).to(DOT)
        for start_c in range(first, last, BLOCK_C):
            c = start_c + tl.arange(0, BLOCK_C)
            acc = tl.zeros((BLOCK_T, BLOCK_C), ACC)
            for start in range(0, BLOCK_S if ONE_TILE_S else M, BLOCK_S):
                if not ONE_TILE_S:
                    s = start + tl.arange(0, BLOCK_S)
                    logits = _logits(
                        w_ptr, t[:, None], s[None, :], reads[:, None], M, left_out, stride_wn, stride_wm, ACC, INDEX
                    )
                    weights = _weights(logits, rate, stats_ptr, b, s, B, M).to(DOT)
                dy = rows(dy_ptr, s, c, s < M, C, stride_dym, stride_dyc, DOT, INDEX)
                acc = tl.dot(weights, dy, acc, input_precision=PRECISION, out_dtype=ACC)
            if HAS_MASK or PACKED:
                acc = tl.where(reads[:, None], acc, 0.0)
            offsets = (own + t).to(INDEX)[:, None] * C + c[None, :]
            tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=(t < N)[:, None] & (c < C)[None, :])


#: programs that fill a large GPU: where there are fewer, an image's channels are shared out
PROGRAMS = 264


def _fwd_config(dtype, B, N, M, C, packed):
    wide, few = dtype.itemsize > 2, B <= launches.FEW
    one_tile = not wide and N <= 256
    return {
        "BLOCK_N": tile(N, 16, (16 if before_hopper() else 32) if wide else 256 if one_tile else 64),
        "BLOCK_M": tile(M, 16, 16 if few else 64),
        "BLOCK_C": tile(C, 16, 32 if few else 64 if wide or one_tile else 128),
        # 4 spill 120 bytes there, 376 where sequences take several tiles (Triton 3.8)
        "num_warps": 8 if (one_tile and not few and 64 < N <= 128) or (packed and not wide and N > 256) else 4,
        "num_stages": 2 if one_tile else 3,
        **(ALL_REGISTERS if wide else {}),
        **FUSION,
    }


def _bwd_config(dtype, B, N, M, C):
    wide, few = dtype.itemsize > 2, B <= launches.FEW
    one_tile = not wide and N <= 256
    return {
        "BLOCK_N": tile(N, 16, 64 if wide else 256 if one_tile else 128),
        "BLOCK_M": tile(M, 16, 16 if few else 32 if wide else 64),
        "BLOCK_C": tile(C, 16, 32 if wide or few else 64),
        # tokens and slots of dx
        "BLOCK_T": tile(N, 16, 16 if few else 64 if wide or 128 < M <= 256 else 128),
        "BLOCK_S": tile(M, 16, 32 if wide else 256 if M <= 256 else 64),
        "num_warps": 8,
        "num_stages": 2 if wide else 3,
        **FUSION,
    }


def _width(C, block, programs):
    """The channels a program walks over, in whole tiles: all, unless there are too few programs."""
    tiles = max(triton.cdiv(C, block), 1)
    return triton.cdiv(tiles, min(tiles, max(PROGRAMS // max(programs, 1), 1))) * block


def _logit_layout(N, M, w, dw=None, packed=False):
    """Sizes and strides of the logits in units that the compiler knows: rows of 98 bf16 allow loads of 4 bytes, not 2.

    Returns the arguments (N, M), the strides of w and dw, and the units as constants. How many rows are packed decides
    no unit.
    """
    both = list(zip(w.stride(), (w if dw is None else dw).stride()))
    both[0] = (0, 0) if packed else both[0]
    units = [unit(*pair) for pair in both]
    n_unit, m_unit = 1 if packed else unit(N), unit(M)
    names = ("N_UNIT", "M_UNIT", "WB_UNIT", "WN_UNIT", "WM_UNIT")
    constants = dict(zip(names, (n_unit, m_unit, *units)))
    w_strides, dw_strides = zip(*((s // unit, ds // unit) for (s, ds), unit in zip(both, units)))
    return (N // n_unit, M // m_unit), w_strides, dw_strides, constants


def _shared_constants(x, w, scale, mask):
    return {**dot_options(x.dtype, w.dtype), "HAS_SCALE": scale is not None, "HAS_MASK": mask is not None}


def _images(x, w, y, ends, longest):
    """B, P, the most tokens that an image has, and the strides of x; packed rows are apart by boundaries alone."""
    (B, rows, _), (_, N, M) = y.shape, w.shape
    if ends is None:
        return B, rows - M, N, x.stride()
    return B, rows - M, max(min(longest, N) - (rows - M), 0), (0, *x.stride()[1:])


@planned
def _fwd_plan(x, w, scale, mask, y, ends, longest):
    (_, N, M), C = w.shape, x.shape[2]
    B, P, most, x_strides = _images(x, w, y, ends, longest)
    default = _fwd_config(x.dtype, B, most, M, C, ends is not None)
    config = launches.overlaid("soft_aggregate_fwd", x.dtype, B, (most, M, C), default, (mask is not None,))
    tiles = B * max(triton.cdiv(M, config["BLOCK_M"]), 1)
    width = _width(C, config["BLOCK_C"], tiles)
    sizes, w_strides, _, units = _logit_layout(N, M, w, packed=ends is not None)
    constants = _shared_constants(x, w, scale, mask) | units | config
    constants |= {"INDEX": index_type(x, w, y), "ONE_TILE_N": most <= config["BLOCK_N"], "PACKED": ends is not None}
    mask_strides = (0, 0) if mask is None else mask.stride()
    scalars = (B, *sizes, C, P, width, *x_strides, *w_strides, *mask_strides)
    return Launch(tiles * max(triton.cdiv(C, width), 1), scalars, constants, bits=2)


class _Backward(NamedTuple):
    launch: Launch
    tiles_n: int  # that leave shares of the scale's gradient


@planned
def _bwd_plan(dy, x, w, scale, mask, y, dx, dw, ends, longest):
    (_, N, M), C = w.shape, x.shape[2]
    B, P, most, x_strides = _images(x, w, y, ends, longest)
    default = _bwd_config(x.dtype, B, most, M, C)
    config = launches.overlaid("soft_aggregate_bwd", x.dtype, B, (most, M, C), default, (mask is not None,))
    if ends is None:
        tiles, tiles_n = B * max(triton.cdiv(N, config["BLOCK_T"]), 1), B * triton.cdiv(N, config["BLOCK_N"])
    else:
        tiles, tiles_n = (tiles_of(N, config[block], ends) for block in ("BLOCK_T", "BLOCK_N"))
    width = _width(C, config["BLOCK_C"], tiles)
    sizes, w_strides, dw_strides, units = _logit_layout(N, M, w, dw, ends is not None)
    constants = _shared_constants(x, w, scale, mask) | units | config
    constants |= {"INDEX": index_type(dy, x, w, y, dx, dw)}
    constants |= {"ONE_TILE_N": most <= config["BLOCK_N"], "ONE_TILE_S": M <= config["BLOCK_S"]}
    constants |= {"PACKED": ends is not None}
    mask_strides = (0, 0) if mask is None else mask.stride()
    strides = *dy.stride(), *x_strides, *w_strides, *mask_strides, *dw_strides
    programs = tiles_n * triton.cdiv(M, config["BLOCK_M"]) + tiles * max(triton.cdiv(C, width), 1)
    scalars = (B, *sizes, C, P, width, *strides)
    return _Backward(Launch(programs, scalars, constants, bits=2), tiles_n)


def soft_aggregate_fwd(x, w, scale, factor, mask, prefix, cu_seqlens=None, max_seqlen=0):
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    B, M = x.shape[0] if ends is None else ends.shape[0] - 1, w.shape[2]
    y = x.new_empty(B, prefix + M, x.shape[2])
    accumulator = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    stats = w.new_empty(3, B, M, dtype=accumulator)
    plan = _fwd_plan(x, w, scale, mask, y, ends, max_seqlen)
    scale, mask, ends = (w if t is None else t for t in (scale, mask, ends))  # w stands in for the others
    launch(soft_aggregate_fwd_kernel, plan, (x, w, scale, y, stats, mask, ends), (factor,))
    return y, stats


def soft_aggregate_bwd(dy, x, w, scale, factor, mask, y, stats, prefix, cu_seqlens=None, max_seqlen=0):
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    if ends is not None and ends.shape[0] == 1:  # no sequences
        return x.new_zeros(x.shape), torch.zeros_like(w), stats.new_zeros(0 if scale is None else ())
    dx, dw = x.new_empty(x.shape), torch.empty_like(w)
    y, stats = y.contiguous(), stats.contiguous()  # what was saved may lie otherwise
    plan = _bwd_plan(dy, x, w, scale, mask, y, dx, dw, ends, max_seqlen)
    dscale = stats.new_empty((plan.tiles_n, w.shape[2]) if scale is not None else 0)
    scale_, mask_, ends_ = (w if t is None else t for t in (scale, mask, ends))
    tensors = (dy, x, w, scale_, y, stats, dx, dw, dscale, mask_, ends_)
    launch(soft_aggregate_bwd_kernel, plan.launch, tensors, (factor,))
    return dx, dw, dscale if scale is None else dscale.sum()
