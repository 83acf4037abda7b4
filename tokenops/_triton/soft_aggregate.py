"""soft_aggregate on Triton: two kernels, each reading its big tensors once.

Forward: a program owns BLOCK_M slots and BLOCK_C channels of an image. A first walk over the logits finds each slot's
largest logit and sum; the second makes the weights and multiplies. Backward: a program owns BLOCK_N tokens of an image
and walks over the slots, so dx and dw are each written once, without atomics.
"""

import torch
import triton
import triton.language as tl

from . import launches
from .common import FUSION, before_hopper, dot_options, from_units, index_type, rows, tile, unit


@triton.jit
def _scale(scale_ptr, factor, ACC: tl.constexpr, HAS_SCALE: tl.constexpr):
    scale = tl.full((), factor, ACC)
    if HAS_SCALE:
        scale *= tl.load(scale_ptr).to(ACC)
    return scale


@triton.jit
def _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK: tl.constexpr, INDEX: tl.constexpr):
    counts = n < N
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + n.to(INDEX) * stride_mn, mask=counts, other=0) != 0)
    return counts


@triton.jit
def _logits(w_ptr, n, m, counts, M, stride_wn, stride_wm, ACC: tl.constexpr, INDEX: tl.constexpr):
    """The logits of tokens n (those that count) and slots m, -inf elsewhere; n and m are shaped to broadcast."""
    offsets = n.to(INDEX) * stride_wn + m.to(INDEX) * stride_wm
    return tl.load(w_ptr + offsets, mask=counts & (m < M), other=float("-inf")).to(ACC)


@triton.jit
def _finite(w):
    return tl.where(w == float("-inf"), 0.0, w)


@triton.jit
def _scaled(w, scale):
    """scale * w, where a logit of -inf stays one whatever the scale."""
    return tl.where(w == float("-inf"), float("-inf"), _finite(w) * scale)


@triton.jit
def soft_aggregate_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, factor: tl.float64, mask_ptr, y_ptr, stats_ptr,
    B, N, M, C, P,
    stride_xb, stride_xn, stride_xc, stride_wb, stride_wn, stride_wm, stride_mb, stride_mn,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    N_UNIT: tl.constexpr, M_UNIT: tl.constexpr, WB_UNIT: tl.constexpr, WN_UNIT: tl.constexpr, WM_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    N, M = N * N_UNIT, M * M_UNIT
    stride_wb = from_units(stride_wb, WB_UNIT, tl.int64)
    stride_wn, stride_wm = from_units(stride_wn, WN_UNIT, INDEX), from_units(stride_wm, WM_UNIT, INDEX)
    tiles_c = tl.maximum(tl.cdiv(C, BLOCK_C), 1)
    tiles_m = tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    program = tl.program_id(0)
    tile_m = (program // tiles_c) % tiles_m
    c = (program % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (program // (tiles_c * tiles_m)).to(tl.int64)
    x_ptr += b * stride_xb
    w_ptr += b * stride_wb
    mask_ptr += b * stride_mb
    y_ptr += b * (P + M) * C

    if tile_m == 0:
        for p in range(P):
            row = tl.load(x_ptr + tl.cast(p, tl.int64) * stride_xn + c.to(tl.int64) * stride_xc, mask=c < C, other=0.0)
            tl.store(y_ptr + tl.cast(p, tl.int64) * C + c, row, mask=c < C)
    x_ptr += tl.cast(P, tl.int64) * stride_xn

    scale = _scale(scale_ptr, factor, ACC, HAS_SCALE)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    mean = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counts = _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK, INDEX)
        w = _logits(w_ptr, n[None, :], m[:, None], counts[None, :], M, stride_wn, stride_wm, ACC, INDEX)
        s = _scaled(w, scale)
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        e = tl.exp(s - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(e, axis=1)
        if HAS_SCALE:
            mean = mean * shrink + tl.sum(e * _finite(w), axis=1)
        top = higher
    # a slot without any token that counts has weights exp(-inf - 0) * 0
    top = tl.where(top == float("-inf"), 0.0, top)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    if program % tiles_c == 0:
        tl.store(stats_ptr + b * M + m, top, mask=m < M)
        tl.store(stats_ptr + (B + b) * M + m, inverse, mask=m < M)
        tl.store(stats_ptr + (2 * B + b) * M + m, mean * inverse, mask=m < M)

    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counts = _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK, INDEX)
        x = rows(x_ptr, n, c, counts, C, stride_xn, stride_xc, DOT, INDEX)
        s = _scaled(_logits(w_ptr, n[None, :], m[:, None], counts[None, :], M, stride_wn, stride_wm, ACC, INDEX), scale)
        a = tl.exp(s - top[:, None]) * inverse[:, None]
        acc = tl.dot(a.to(DOT), x, acc, input_precision=PRECISION, out_dtype=ACC)
    offsets = (P + m).to(INDEX)[:, None] * C + c[None, :]
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def _weights(w, stats_ptr, b, m, B, M, scale):
    """A again, from the logits and what the forward pass saved of each slot: largest scaled logit and inverse sum."""
    top = tl.load(stats_ptr + b * M + m, mask=m < M, other=0.0)
    inverse = tl.load(stats_ptr + (B + b) * M + m, mask=m < M, other=0.0)
    return tl.exp(_scaled(w, scale) - top[None, :]) * inverse[None, :]


@triton.jit
def soft_aggregate_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, scale_ptr, factor: tl.float64, mask_ptr, y_ptr, stats_ptr, dx_ptr, dw_ptr, dscale_ptr,
    B, N, M, C, P,
    stride_dyb, stride_dym, stride_dyc, stride_xb, stride_xn, stride_xc, stride_wb, stride_wn, stride_wm,
    stride_mb, stride_mn, stride_dwb, stride_dwn, stride_dwm,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    N_UNIT: tl.constexpr, M_UNIT: tl.constexpr, WB_UNIT: tl.constexpr, WN_UNIT: tl.constexpr, WM_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ONE_TILE_M: tl.constexpr,
):  # fmt: skip
    N, M = N * N_UNIT, M * M_UNIT
    stride_wb = from_units(stride_wb, WB_UNIT, tl.int64)
    stride_wn, stride_wm = from_units(stride_wn, WN_UNIT, INDEX), from_units(stride_wm, WM_UNIT, INDEX)
    stride_dwb = from_units(stride_dwb, WB_UNIT, tl.int64)
    stride_dwn, stride_dwm = from_units(stride_dwn, WN_UNIT, INDEX), from_units(stride_dwm, WM_UNIT, INDEX)
    tiles_n = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    program = tl.program_id(0)
    tile_n = program % tiles_n
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (program // tiles_n).to(tl.int64)
    dy_ptr += b * stride_dyb
    x_ptr += b * stride_xb
    w_ptr += b * stride_wb
    mask_ptr += b * stride_mb
    y_ptr += b * (P + M) * C
    dx_ptr += b * (P + N) * C
    dw_ptr += b * stride_dwb

    if tile_n == 0:
        for p in range(P):
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                offsets = tl.cast(p, tl.int64) * stride_dym + c.to(tl.int64) * stride_dyc
                row = tl.load(dy_ptr + offsets, mask=c < C, other=0.0)
                tl.store(dx_ptr + tl.cast(p, tl.int64) * C + c, row.to(dx_ptr.dtype.element_ty), mask=c < C)
    dy_ptr += tl.cast(P, tl.int64) * stride_dym
    x_ptr += tl.cast(P, tl.int64) * stride_xn
    y_ptr += tl.cast(P, tl.int64) * C
    dx_ptr += tl.cast(P, tl.int64) * C

    scale = _scale(scale_ptr, factor, ACC, HAS_SCALE)
    counts = _token_counts(mask_ptr, n, N, stride_mn, HAS_MASK, INDEX)
    dscale = tl.zeros((BLOCK_N,), ACC)
    a = tl.zeros((BLOCK_N, BLOCK_M), DOT)
    for start_m in range(0, M, BLOCK_M):
        m = start_m + tl.arange(0, BLOCK_M)
        w = _logits(w_ptr, n[:, None], m[None, :], counts[:, None], M, stride_wn, stride_wm, ACC, INDEX)
        da = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        delta = tl.zeros((BLOCK_M,), ACC)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = rows(x_ptr, n, c, counts, C, stride_xn, stride_xc, DOT, INDEX)
            dy = rows(dy_ptr, m, c, m < M, C, stride_dym, stride_dyc, DOT, INDEX)
            y = rows(y_ptr, m, c, m < M, C, C, 1, ACC, INDEX)
            da = tl.dot(x, tl.trans(dy), da, input_precision=PRECISION, out_dtype=ACC)
            delta += tl.sum(dy.to(ACC) * y, axis=1)
        weights = _weights(w, stats_ptr, b, m, B, M, scale)
        a = weights.to(DOT)
        ds = weights * (da - delta[None, :])
        if HAS_SCALE:
            # dS sums to 0 over the tokens; measured from their mean, the logits let no error of delta through
            mean = tl.load(stats_ptr + (2 * B + b) * M + m, mask=m < M, other=0.0)
            dscale += tl.sum(ds * (_finite(w) - mean[None, :]), axis=1)
        offsets = n.to(INDEX)[:, None] * stride_dwn + m.to(INDEX)[None, :] * stride_dwm
        inside = (n < N)[:, None] & (m < M)[None, :]
        tl.store(dw_ptr + offsets, (scale * ds).to(dw_ptr.dtype.element_ty), mask=inside)
    if HAS_SCALE:
        tl.store(dscale_ptr + program, factor * tl.sum(dscale, axis=0))

    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_N, BLOCK_C), ACC)
        for start_m in range(0, M, BLOCK_M):
            m = start_m + tl.arange(0, BLOCK_M)
            if not ONE_TILE_M:
                w = _logits(w_ptr, n[:, None], m[None, :], counts[:, None], M, stride_wn, stride_wm, ACC, INDEX)
                a = _weights(w, stats_ptr, b, m, B, M, scale).to(DOT)
            dy = rows(dy_ptr, m, c, m < M, C, stride_dym, stride_dyc, DOT, INDEX)
            acc = tl.dot(a, dy, acc, input_precision=PRECISION, out_dtype=ACC)
        offsets = n.to(INDEX)[:, None] * C + c[None, :]
        tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


def _fwd_config(dtype, N, M, C):
    wide = dtype.itemsize > 2
    block_c = tile(C, 16, 64 if wide else 128)
    block_m = tile(M, 16, 64 if wide else 128)
    return {
        "BLOCK_N": tile(N, 16, 16 if wide and before_hopper() else 32),  # operands of fp32 are held three times
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "num_warps": 8 if block_m * block_c > 64 * 64 else 4,
        "num_stages": 3,
        **FUSION,
    }


def _bwd_config(dtype, N, M, C):
    wide = dtype.itemsize > 2
    warps = 8 if wide or M > 32 else 4
    return {
        "BLOCK_N": tile(N, 16, 64),
        "BLOCK_M": tile(M, 16, 32 if wide else 128),
        "BLOCK_C": tile(C, 16, 32 if wide or M > 64 else 64),
        "num_warps": warps,
        "num_stages": 2 if warps == 8 else 3,
        **FUSION,
    }


def _logit_layout(N, M, w, dw=None):
    """Sizes and strides of the logits in units that the compiler knows: rows of 98 bf16 allow loads of 4 bytes, not 2.

    Returns the arguments (N, M), the strides of w and dw, and the units as constants.
    """
    both = list(zip(w.stride(), (w if dw is None else dw).stride()))
    units = [unit(*pair) for pair in both]
    n_unit, m_unit = unit(N), unit(M)
    names = ("N_UNIT", "M_UNIT", "WB_UNIT", "WN_UNIT", "WM_UNIT")
    constants = dict(zip(names, (n_unit, m_unit, *units)))
    w_strides, dw_strides = zip(*((s // unit, ds // unit) for (s, ds), unit in zip(both, units)))
    return (N // n_unit, M // m_unit), w_strides, dw_strides, constants


def _shared_arguments(x, w, scale, mask):
    """Scale, mask, the mask's strides, and what both kernels are specialised for; w stands in for a missing tensor."""
    strides = (0, 0) if mask is None else mask.stride()
    has = {"HAS_SCALE": scale is not None, "HAS_MASK": mask is not None}
    mask = w if mask is None else mask.view(torch.int8)
    return w if scale is None else scale, mask, strides, {**dot_options(x.dtype, w.dtype), **has}


def soft_aggregate_fwd(x, w, scale, factor, mask, prefix):
    B, N, M = w.shape
    C = x.shape[2]
    options = _shared_arguments(x, w, scale, mask)
    y = x.new_empty((B, prefix + M, C))
    accumulator = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    stats = w.new_empty((3, B, M), dtype=accumulator)
    scale_, mask_, mask_strides, constants = options
    default = _fwd_config(x.dtype, N, M, C)
    config = launches.overlaid("soft_aggregate_fwd", x.dtype, B, (N, M, C), default, (mask is not None,))
    tiles_m, tiles_c = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(C, config["BLOCK_C"])
    grid = (B * max(tiles_m, 1) * max(tiles_c, 1),)
    sizes, w_strides, _, units = _logit_layout(N, M, w)
    if grid[0]:
        soft_aggregate_fwd_kernel[grid](
            x, w, scale_, factor, mask_, y, stats,
            B, *sizes, C, prefix, *x.stride(), *w_strides, *mask_strides,
            **constants, **units, **config, INDEX=index_type(x, w, y),
        )  # fmt: skip
    return y, stats


def soft_aggregate_bwd(dy, x, w, scale, factor, mask, y, stats, prefix):
    B, N, M = w.shape
    C = x.shape[2]
    scale_, mask_, mask_strides, constants = _shared_arguments(x, w, scale, mask)
    default = _bwd_config(x.dtype, N, M, C)
    config = launches.overlaid("soft_aggregate_bwd", x.dtype, B, (N, M, C), default, (mask is not None,))
    programs = B * max(triton.cdiv(N, config["BLOCK_N"]), 1)
    dx, dw = x.new_empty(x.shape), torch.empty_like(w)
    dscale = stats.new_empty((programs if scale is not None else 0,))
    sizes, w_strides, dw_strides, units = _logit_layout(N, M, w, dw)
    if programs:
        soft_aggregate_bwd_kernel[(programs,)](
            dy, x, w, scale_, factor, mask_, y, stats, dx, dw, dscale,
            B, *sizes, C, prefix, *dy.stride(), *x.stride(), *w_strides, *mask_strides, *dw_strides,
            **constants, **units, **config, INDEX=index_type(dy, x, w, y, dx, dw), ONE_TILE_M=M <= config["BLOCK_M"],
        )  # fmt: skip
    return dx, dw, dscale if scale is None else dscale.sum()
