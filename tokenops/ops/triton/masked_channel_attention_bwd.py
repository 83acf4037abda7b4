"""The backward pass of masked_channel_attention: see masked_channel_attention.py, whose helpers it shares.

dS = P * (dP - D), where dP is dO V^T plus the gradient of the scores, and D the sum of P * dP over a row. P comes from
the saved log-sum-exp; D from dO * O, and where scores have a gradient from another walk over the keys of their queries.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..reference import heads_of
from ..schemas import attention_gradients, parts_of
from . import launches
from .attention_arguments import config, layout, shared_arguments, stand_ins, tail
from .common import ALL_REGISTERS, before_hopper, for_any, from_units, tile
from .launch import Launch, launch, planned
from .masked_channel_attention import (
    _biased,
    _chunks,
    _head,
    _key_bias,
    _length,
    _masked,
    _plus,
    _product,
    _row_lse,
    _rows,
    _store,
    _zeros,
)
from .sequences import longest, of_sequences, own, tiles_of


@triton.jit
def _score_gradient(dscores_ptr, n, counts, stride_n, share, ACC: tl.constexpr):
    """The gradient of the scores of keys n, as far as they count; `share` of a query in its score."""
    return tl.load(dscores_ptr + n.to(tl.int64) * stride_n, mask=counts, other=0.0).to(ACC) * share


@triton.jit
def _of_queries(gradient, m, RECEIVED: tl.constexpr):
    """What it adds to dP of queries m, both shaped to broadcast."""
    return gradient if RECEIVED else tl.where(m == 0, gradient, 0.0)


@triton.jit
def _sum_over_channels(a, b, ACC: tl.constexpr):
    """Of the products of rows."""
    total = tl.sum(a[0].to(ACC) * b[0], axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(ACC) * b[i], axis=1)
    return total


@triton.jit
def _store_mask_gradient(ptr, x, dx, cs, D):
    """A program's share of it: the sum over the rows."""
    for i in tl.static_range(len(cs)):
        tl.store(ptr + cs[i], tl.sum(x[i] * dx[i], axis=0), mask=cs[i] < D)


@triton.jit
def _query_gradient(acc, q, dout, lse, delta, k_ptr, v_ptr, bias_ptr, dscores_ptr, scale, share, m, tile_m, start,
                    length, ck, cv, stride_kn, stride_kc, stride_vn, stride_vc, stride_bn, stride_sn,
                    DK: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                    INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DSCORES: tl.constexpr, RECEIVED: tl.constexpr,
                    BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """dq with what a tile of BLOCK keys adds; a WHOLE one has no key beyond the length."""
    n = start + tl.arange(0, BLOCK)
    counts = n >= 0
    if HAS_BIAS or not WHOLE:
        bias = _key_bias(bias_ptr, n, length, stride_bn, ACC, INDEX, HAS_BIAS, WHOLE)
        counts = bias > float("-inf")
    k = _rows(k_ptr, n, ck, counts, DK, stride_kn, stride_kc, DOT, INDEX)  # 0 * NaN were NaN in dq
    s = _product(q, k, ACC, PRECISION) * scale
    if HAS_BIAS or not WHOLE:
        s = _biased(s, bias[None, :])
    p = tl.exp2(s - lse[:, None])
    v = _rows(v_ptr, n, cv, counts, DV, stride_vn, stride_vc, DOT, INDEX)
    dp = _product(dout, v, ACC, PRECISION)
    if HAS_DSCORES:
        if RECEIVED or tile_m == 0:
            gradient = _score_gradient(dscores_ptr, n, counts, stride_sn, share, ACC)
            dp += _of_queries(gradient[None, :], m[:, None], RECEIVED)
    ds = p * (dp - delta[:, None])
    return _plus(ds.to(DOT), k, acc, ACC, PRECISION)


@for_any("M", "N", "stride_bb", "stride_bh", "stride_sb", "stride_sh", "S", "leap")
def masked_channel_attention_bwd_q_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, qk_mask_ptr, v_mask_ptr, bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, out_ptr,
    lse_ptr, dlse_ptr, dscores_ptr, row_ptr, dq_ptr, dqk_mask_ptr,
    factor: tl.float64, rate: tl.float64, share: tl.float64, H, M, N,
    stride_qb, stride_qh, stride_qm, stride_qc, stride_kb, stride_kh, stride_kn, stride_kc,
    stride_vb, stride_vh, stride_vn, stride_vc, stride_ob, stride_oh, stride_om, stride_oc,
    stride_bb, stride_bh, stride_bn, stride_sb, stride_sh, stride_sn, S, leap,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, UNIT: tl.constexpr,
    HAS_QK_MASK: tl.constexpr, HAS_V_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SEQUENCES: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_DSCORES: tl.constexpr, RECEIVED: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, TAIL_DK: tl.constexpr, TAIL_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, its share of the channel mask's gradient, and what the other kernel takes of a query."""
    scale, share = tl.full((), factor, ACC), tl.full((), share, ACC)
    tiles_m = tl.cdiv(M, BLOCK_M)
    if SEQUENCES:
        tiles_m = M // BLOCK_M + S + 1
    program = tl.program_id(0)
    tile_m, head = program % tiles_m, program // tiles_m
    h, b = head % H, (head // H).to(tl.int64)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    dout_ptr = _head(dout_ptr, b, h, stride_ob, stride_oh, UNIT)
    stride_qm, stride_kn = from_units(stride_qm, UNIT, INDEX), from_units(stride_kn, UNIT, INDEX)
    stride_vn, stride_om = from_units(stride_vn, UNIT, INDEX), from_units(stride_om, UNIT, INDEX)
    bias_ptr += b * stride_bb + tl.cast(h, tl.int64) * stride_bh
    dscores_ptr += b * stride_sb + tl.cast(h, tl.int64) * stride_sh
    row = (b * H + h) * M
    out_ptr += b * M * H * DV
    dq_ptr += b * M * (H * (2 * DK + DV) if PACKED else H * DK)
    length, there = _length(lengths_ptr, b, N, HAS_LENGTHS), M
    if SEQUENCES:
        tile_m, first_m, M, there, first_n, N = own(cu_q_ptr, cu_k_ptr, tile_m, M, S, leap, BLOCK_M)
        length = N
        q_ptr, k_ptr = q_ptr + first_m * stride_qm, k_ptr + first_n * stride_kn
        v_ptr, dout_ptr = v_ptr + first_n * stride_vn, dout_ptr + first_m * stride_om
        bias_ptr, dscores_ptr = bias_ptr + first_n * stride_bn, dscores_ptr + first_n * stride_sn
        out_ptr += first_m * (H * DV)
        dq_ptr += first_m * (H * (2 * DK + DV) if PACKED else H * DK)
        row += first_m
        if RECEIVED:
            share = share / tl.maximum(M, 1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ck, cv = _chunks(BLOCK_DK, TAIL_DK), _chunks(BLOCK_DV, TAIL_DV)

    dout = _rows(dout_ptr, m, cv, m < M, DV, stride_om, stride_oc, DOT, INDEX)
    out = _rows(out_ptr + h * DV, m, cv, m < M, DV, H * DV, 1, ACC, INDEX)
    delta = _sum_over_channels(dout, out, ACC)
    dout = _masked(dout, v_mask_ptr, h, cv, DV, ACC, DOT, HAS_V_MASK)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row + m, mask=m < M, other=0.0).to(ACC)
    q = _rows(q_ptr, m, ck, m < M, DK, stride_qm, stride_qc, DOT, INDEX)
    q = _masked(q, qk_mask_ptr, h, ck, DK, ACC, DOT, HAS_QK_MASK)
    lse = _row_lse(lse_ptr + row, m, m < M, ACC)
    if HAS_DSCORES:
        if RECEIVED or tile_m == 0:
            for start in range(0, length, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                bias = _key_bias(bias_ptr, n, length, stride_bn, ACC, INDEX, HAS_BIAS, False)
                counts = bias > float("-inf")
                k = _rows(k_ptr, n, ck, n < length, DK, stride_kn, stride_kc, DOT, INDEX)
                s = _product(q, k, ACC, PRECISION) * scale
                s = _biased(s, bias[None, :])
                gradient = _score_gradient(dscores_ptr, n, counts, stride_sn, share, ACC)
                gradient = _of_queries(gradient[None, :], m[:, None], RECEIVED)
                delta += tl.sum(tl.exp2(s - lse[:, None]) * gradient, axis=1)
    tl.store(row_ptr + (row + m) * 2, delta, mask=m < M)
    tl.store(row_ptr + (row + m) * 2 + 1, lse, mask=m < M)

    acc = _zeros(BLOCK_M, ck, ACC)
    whole = N // BLOCK_N * BLOCK_N if SPLIT else 0  # tiles without a mask, and a smaller one for the rest
    for start in range(0, whole, BLOCK_N):
        acc = _query_gradient(
            acc, q, dout, lse, delta, k_ptr, v_ptr, bias_ptr, dscores_ptr, scale, share, m, tile_m, start, length,
            ck, cv, stride_kn, stride_kc, stride_vn, stride_vc, stride_bn, stride_sn,
            DK, DV, ACC, DOT, PRECISION, INDEX, HAS_BIAS, HAS_DSCORES, RECEIVED, BLOCK_N, True,
        )  # fmt: skip
    for start in range(whole, length, BLOCK_TAIL):
        acc = _query_gradient(
            acc, q, dout, lse, delta, k_ptr, v_ptr, bias_ptr, dscores_ptr, scale, share, m, tile_m, start, length,
            ck, cv, stride_kn, stride_kc, stride_vn, stride_vc, stride_bn, stride_sn,
            DK, DV, ACC, DOT, PRECISION, INDEX, HAS_BIAS, HAS_DSCORES, RECEIVED, BLOCK_TAIL, False,
        )  # fmt: skip
    rate = tl.full((), rate, ACC)
    acc = [a * rate for a in acc]
    if HAS_QK_MASK:
        q = _rows(q_ptr, m, ck, m < there, DK, stride_qm, stride_qc, ACC, INDEX)
        _store_mask_gradient(dqk_mask_ptr + program.to(tl.int64) * DK, q, acc, ck, DK)
    acc = _masked(acc, qk_mask_ptr, h, ck, DK, ACC, ACC, HAS_QK_MASK)
    _store(dq_ptr, acc, 0, h, m, ck, M, H * (2 * DK + DV) if PACKED else H * DK, DK, INDEX)


@triton.jit
def _key_gradients(dk, dv, dbias, k, v, bias, gradient, q_ptr, dout_ptr, qk_mask_ptr, row_ptr, scale, start, h, M,
                   ck, cv, stride_qm, stride_qc, stride_om, stride_oc,
                   DK: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                   INDEX: tl.constexpr, HAS_QK_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DSCORES: tl.constexpr,
                   RECEIVED: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """dk, dv and dbias with what a tile of BLOCK queries adds; a WHOLE one has all of them, and not query 0.

    dbias is a number a key if SUMS, else a tile that is summed behind the loop.
    """
    m = start + tl.arange(0, BLOCK)
    there = (m >= 0) if WHOLE else m < M
    q = _rows(q_ptr, m, ck, there, DK, stride_qm, stride_qc, DOT, INDEX)
    q = _masked(q, qk_mask_ptr, h, ck, DK, ACC, DOT, HAS_QK_MASK)
    s = _product(k, q, ACC, PRECISION) * scale
    if HAS_BIAS:
        s += bias[:, None]
    both = row_ptr + m[:, None] * 2 + tl.arange(0, 2)[None, :]
    delta, lse = tl.split(tl.load(both, mask=there[:, None], other=0.0))
    if not WHOLE:
        lse = tl.where(there, lse, float("inf"))  # its probabilities are 0
    p = tl.exp2(s - lse[None, :])
    dout = _rows(dout_ptr, m, cv, there, DV, stride_om, stride_oc, DOT, INDEX)
    dv = _plus(p.to(DOT), dout, dv, ACC, PRECISION)
    dp = _product(v, dout, ACC, PRECISION)
    if HAS_DSCORES:
        if RECEIVED or not WHOLE:
            dp += _of_queries(gradient[:, None], m[None, :], RECEIVED)
    ds = p * (dp - delta[None, :])
    if HAS_BIAS:
        dbias += tl.sum(ds, axis=1) if SUMS else ds
    dk = _plus(ds.to(DOT), q, dk, ACC, PRECISION)
    return dk, dv, dbias


@for_any("M", "N", "stride_bb", "stride_bh", "stride_sb", "stride_sh", "S", "leap")
def masked_channel_attention_bwd_kv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, qk_mask_ptr, v_mask_ptr, bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, row_ptr,
    dscores_ptr, dk_ptr, dv_ptr, dv_mask_ptr, dbias_ptr,
    factor: tl.float64, rate: tl.float64, share: tl.float64, H, M, N,
    stride_qb, stride_qh, stride_qm, stride_qc, stride_kb, stride_kh, stride_kn, stride_kc,
    stride_vb, stride_vh, stride_vn, stride_vc, stride_ob, stride_oh, stride_om, stride_oc,
    stride_bb, stride_bh, stride_bn, stride_sb, stride_sh, stride_sn, S, leap,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, UNIT: tl.constexpr,
    HAS_QK_MASK: tl.constexpr, HAS_V_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SEQUENCES: tl.constexpr, HAS_DSCORES: tl.constexpr, RECEIVED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, TAIL_DK: tl.constexpr, TAIL_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias of a tile of keys, and its share of the value mask's gradient."""
    scale, share = tl.full((), factor, ACC), tl.full((), share, ACC)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if SEQUENCES:
        tiles_n = N // BLOCK_N + S + 1
    program = tl.program_id(0)
    tile_n, head = program % tiles_n, program // tiles_n
    h, b = head % H, (head // H).to(tl.int64)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    dout_ptr = _head(dout_ptr, b, h, stride_ob, stride_oh, UNIT)
    stride_qm, stride_kn = from_units(stride_qm, UNIT, INDEX), from_units(stride_kn, UNIT, INDEX)
    stride_vn, stride_om = from_units(stride_vn, UNIT, INDEX), from_units(stride_om, UNIT, INDEX)
    bias_ptr += b * stride_bb + tl.cast(h, tl.int64) * stride_bh
    dscores_ptr += b * stride_sb + tl.cast(h, tl.int64) * stride_sh
    row_ptr += (b * H + h) * M * 2
    dbias_ptr += (b * H + h) * N
    dk_ptr += b * N * (H * (2 * DK + DV) if PACKED else H * DK)
    dv_ptr += b * N * (H * (2 * DK + DV) if PACKED else H * DV)
    length = _length(lengths_ptr, b, N, HAS_LENGTHS)
    if SEQUENCES:
        tile_n, first_n, N, length, first_m, M = own(cu_k_ptr, cu_q_ptr, tile_n, N, S, leap, BLOCK_N)
        q_ptr, k_ptr = q_ptr + first_m * stride_qm, k_ptr + first_n * stride_kn
        v_ptr, dout_ptr = v_ptr + first_n * stride_vn, dout_ptr + first_m * stride_om
        bias_ptr, dscores_ptr = bias_ptr + first_n * stride_bn, dscores_ptr + first_n * stride_sn
        row_ptr, dbias_ptr = row_ptr + first_m * 2, dbias_ptr + first_n
        dk_ptr += first_n * (H * (2 * DK + DV) if PACKED else H * DK)
        dv_ptr += first_n * (H * (2 * DK + DV) if PACKED else H * DV)
        if RECEIVED:
            share = share / tl.maximum(M, 1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ck, cv = _chunks(BLOCK_DK, TAIL_DK), _chunks(BLOCK_DV, TAIL_DV)

    bias = _key_bias(bias_ptr, n, length, stride_bn, ACC, INDEX, HAS_BIAS, False)
    counts = bias > float("-inf")
    k = _rows(k_ptr, n, ck, counts, DK, stride_kn, stride_kc, DOT, INDEX)
    v = _rows(v_ptr, n, cv, n < length, DV, stride_vn, stride_vc, DOT, INDEX)
    v = _masked(v, v_mask_ptr, h, cv, DV, ACC, DOT, HAS_V_MASK)
    gradient = 0.0
    if HAS_DSCORES:
        gradient = _score_gradient(dscores_ptr, n, counts, stride_sn, share, ACC)
    dk, dv = _zeros(BLOCK_N, ck, ACC), _zeros(BLOCK_N, cv, ACC)
    # sums in the loop took Triton 3.6 from 193 registers of fp32's tiles to 255, and spilled
    SUMS: tl.constexpr = SPLIT or BLOCK_N * BLOCK_M > 2048
    dbias = tl.zeros((BLOCK_N,) if SUMS else (BLOCK_N, BLOCK_M), ACC)
    queries = tl.where(tile_n * BLOCK_N < length, M, 0)  # none of a tile beyond the length
    # tiles without a mask, and before them a smaller one for the rest, which has query 0
    rest = tl.minimum(queries, (M - 1) % BLOCK_M + 1) if SPLIT else queries
    for start in range(0, rest, BLOCK_TAIL):
        dk, dv, dbias = _key_gradients(
            dk, dv, dbias, k, v, bias, gradient, q_ptr, dout_ptr, qk_mask_ptr, row_ptr, scale, start, h, rest, ck, cv,
            stride_qm, stride_qc, stride_om, stride_oc,
            DK, DV, ACC, DOT, PRECISION, INDEX, HAS_QK_MASK, HAS_BIAS, HAS_DSCORES, RECEIVED, SUMS, BLOCK_TAIL, False,
        )  # fmt: skip
    for start in range(rest, queries, BLOCK_M):
        dk, dv, dbias = _key_gradients(
            dk, dv, dbias, k, v, bias, gradient, q_ptr, dout_ptr, qk_mask_ptr, row_ptr, scale, start, h, M, ck, cv,
            stride_qm, stride_qc, stride_om, stride_oc,
            DK, DV, ACC, DOT, PRECISION, INDEX, HAS_QK_MASK, HAS_BIAS, HAS_DSCORES, RECEIVED, SUMS, BLOCK_M, True,
        )  # fmt: skip
    # keys without weight: what the bias or the length says, and no NaN of a query
    dk = [tl.where(counts[:, None], d, 0.0) for d in dk]
    dv = [tl.where(counts[:, None], d, 0.0) for d in dv]
    if HAS_BIAS:
        dbias = tl.where(counts, dbias if SUMS else tl.sum(dbias, axis=1), 0.0)
        tl.store(dbias_ptr + n, dbias.to(dbias_ptr.dtype.element_ty), mask=n < N)
    rate = tl.full((), rate, ACC)
    dk = [d * rate for d in dk]
    _store(dk_ptr, dk, 0, h, n, ck, N, H * (2 * DK + DV) if PACKED else H * DK, DK, INDEX)
    if HAS_V_MASK:
        v = _rows(v_ptr, n, cv, n < length, DV, stride_vn, stride_vc, ACC, INDEX)
        _store_mask_gradient(dv_mask_ptr + program.to(tl.int64) * DV, v, dv, cv, DV)
    dv = _masked(dv, v_mask_ptr, h, cv, DV, ACC, ACC, HAS_V_MASK)
    _store(dv_ptr, dv, 0, h, n, cv, N, H * (2 * DK + DV) if PACKED else H * DV, DV, INDEX)


def _bwd_configs(dtype, M, N, DK, DV, qk_masked, biased):
    """Of the kernel that owns queries and walks over keys, and of the one that does the reverse."""
    single, (wide, chunked) = dtype.itemsize > 2, layout(dtype, DK, DV)
    if single:
        owned, walked, warps, stages = (16, 16, 8, 1) if wide else (16, 32, 8, 2)
    elif wide:
        owned, walked, warps, stages = (32, 32, 8, 2) if before_hopper() else (64, 32, 8, 2)
    else:
        owned, walked, warps, stages = (32, 32, 4, 2) if before_hopper() else (64, 64, 4, 2)
    shared = config(dtype, DK, DV, warps, stages)
    of_queries = {"BLOCK_M": tile(M, 16, owned), "BLOCK_N": tile(N, 16, walked), **shared}
    of_keys = {"BLOCK_M": tile(M, 16, walked), "BLOCK_N": tile(N, 16, owned), **shared}
    if single and not wide:
        of_queries |= {"num_warps": 4, **ALL_REGISTERS}  # a tile of 16 x 32 leaves 8 warps nothing to share
        of_keys |= ALL_REGISTERS
    if chunked:  # two accumulators, of up to 96 columns: with larger tiles they spill
        if before_hopper():
            of_keys["BLOCK_M"] = 16
        elif qk_masked:
            of_keys |= {"BLOCK_M": tile(M, 16, 32), "num_stages": 1}
        elif biased or max(DK, DV) > 80:
            of_keys["BLOCK_M"] = tile(M, 16, 32)
    return of_queries, of_keys


def _mask_gradient(partial, mask, q):
    """(B,H,tiles,D) shares summed to the mask's (H,D)."""
    return q.new_empty((0,)) if mask is None else partial.sum(dim=(0, 2)).to(mask.dtype)


class _Backward(NamedTuple):
    of_queries: Launch
    of_keys: Launch
    tiles_m: int  # that leave shares of the masks' gradients
    tiles_n: int


@planned
def _bwd_plan(
    dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, lengths, out, lse, scores, mean, packed, cu_q, cu_k, max_q,
    max_k,
):  # fmt: skip
    (B, H, M, DK), N, DV = q.shape, k.shape[2], v.shape[3]
    most = longest(M, cu_q, max_q), longest(N, cu_k, max_k)
    of_queries, of_keys = _bwd_configs(q.dtype, *most, DK, DV, qk_mask is not None, bias is not None)
    received = dscores is not None and scores == "received"
    optional = (qk_mask is not None, v_mask is not None, bias is not None, lengths is not None, received)
    call = (q.dtype, B, (*most, DK, DV))
    of_queries = launches.overlaid("masked_channel_attention_bwd_q", *call, of_queries, optional)
    of_keys = launches.overlaid("masked_channel_attention_bwd_kv", *call, of_keys, optional)
    strides, bias_strides, constants = shared_arguments(q, k, v, qk_mask, v_mask, bias, lengths, dout)
    split = qk_mask is None and not layout(q.dtype, DK, DV)[0]  # two loops take more registers
    tiles_m, tiles_n = tiles_of(M, of_queries["BLOCK_M"], cu_q), tiles_of(N, of_keys["BLOCK_N"], cu_k)
    score_strides = (0, 0, 0)
    if dscores is not None:
        score_strides = (dscores.stride()[0], 0, dscores.stride()[1]) if mean else dscores.stride()
    scalars = (H, M, N, *(stride for of_one in strides for stride in of_one), *bias_strides, *score_strides)
    scalars += of_sequences(cu_q)
    constants |= {
        "SEQUENCES": cu_q is not None,
        "HAS_DSCORES": dscores is not None,
        "RECEIVED": scores == "received",
        "PACKED": packed,
    }
    of_queries = of_queries | {
        "HAS_DLSE": dlse is not None,
        "SPLIT": split and lengths is None,
        "BLOCK_TAIL": tail(N, of_queries["BLOCK_N"], not split or lengths is not None or cu_k is not None),
    }
    of_keys = of_keys | {
        "SPLIT": split,
        "BLOCK_TAIL": tile(
            (M - 1) % of_keys["BLOCK_M"] + 1 if split and cu_q is None else of_keys["BLOCK_M"], 16, of_keys["BLOCK_M"]
        ),
    }
    return _Backward(
        Launch(B * H * tiles_m, scalars, constants | of_queries),
        Launch(B * H * tiles_n, scalars, constants | of_keys),
        tiles_m,
        tiles_n,
    )


def masked_channel_attention_bwd(
    dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, lengths, out, lse, scale, scores, mean, heads=0, channels=0,
    cu_q=None, cu_k=None, max_q=0, max_k=0,
):  # fmt: skip
    made, packed = attention_gradients(q, k, v), k is None
    dq, dk, dv = heads_of(made[0], heads, channels) if packed else made
    q, k, v = parts_of(q, k, v, heads, channels)
    (B, H, M, DK), DV = q.shape, v.shape[3]
    given = dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, lengths, out, lse
    plan = _bwd_plan(*given, scores, mean, packed, cu_q, cu_k, max_q, max_k)
    # what was saved may lie otherwise: under vmap, or from where hooks of saved tensors put it
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    of_rows = lse.new_empty((*lse.shape, 2))  # D, and the log-sum-exp as the kernels subtract it
    dqk_partial = lse.new_empty((B, H, plan.tiles_m, DK) if qk_mask is not None else (0,))
    dv_partial = lse.new_empty((B, H, plan.tiles_n, DV) if v_mask is not None else (0,))
    dbias = q.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
    # of sequences a kernel knows how many queries there are
    share = 1 / ((M if scores == "received" and cu_q is None else 1) * (H if mean else 1))
    floats = (float(scale) * math.log2(math.e), float(scale), share)
    given = (dout, q, k, v, *stand_ins(q, qk_mask, v_mask, bias, lengths, cu_q, cu_k))
    dscores_, dlse_ = lse if dscores is None else dscores, lse if dlse is None else dlse.contiguous()
    tensors = (*given, out, lse, dlse_, dscores_, of_rows, dq, dqk_partial)
    launch(masked_channel_attention_bwd_q_kernel, plan.of_queries, tensors, floats)
    tensors = (*given, of_rows, dscores_, dk, dv, dv_partial, dbias)
    launch(masked_channel_attention_bwd_kv_kernel, plan.of_keys, tensors, floats)
    return *made, _mask_gradient(dqk_partial, qk_mask, q), _mask_gradient(dv_partial, v_mask, q), dbias
