"""select_tokens on Triton: a program makes its image's choice by counting and moves the rows where they belong.

The k-th best score is found digit by digit, from counts of the scores that reach each candidate. A token's place in the
result is then a prefix sum (order "index") or its rank (order "score"), so rows are read as they lie and stored where
they go. Without a norm a program has a range of channels, with one the whole rows.
"""

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from .common import FUSION, cast, companion_strides, for_any, four, tile, write_rows
from .launch import Launch, launch, planned

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _keys(scores_ptr, n, N, stride_sn, BITS: tl.constexpr):
    """Scores as unsigned integers in their order: NaN the least of all, -0 and 0 alike. Beyond N there are zeros."""
    UNSIGNED: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    scores = tl.load(scores_ptr + n.to(tl.int64) * stride_sn, mask=n < N, other=float("nan"))
    if BITS == 64:
        value = scores.to(tl.float64) + 0.0
        bits = value.to(tl.int64, bitcast=True)
        bits ^= (bits >> 63) | -0x8000000000000000
    else:
        value = scores.to(tl.float32) + 0.0
        bits = value.to(tl.int32, bitcast=True)
        bits ^= (bits >> 31) | -0x80000000
    return tl.where(value != value, 0, bits).to(UNSIGNED, bitcast=True)


@triton.jit
def _threshold(
    scores_ptr, count, N, stride_sn,
    BITS: tl.constexpr, DIGIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The count-th best score, and how many of those that equal it are kept.

    It is found digit by digit, from how many scores reach each value of the next one.
    """
    digits = tl.arange(0, 1 << DIGIT)
    keys = _keys(scores_ptr, tl.arange(0, BLOCK), N, stride_sn, BITS)  # the first ones, all if WHOLE
    least = tl.zeros((), keys.dtype)
    greater = tl.zeros((), tl.int32)
    for i in range(0, BITS // DIGIT):
        shift = BITS - DIGIT - DIGIT * i
        bounds = least + (digits.to(keys.dtype) << shift)
        found = (keys[:, None] >= bounds[None, :]).to(tl.int32)
        if not WHOLE:
            for start in range(BLOCK, N, BLOCK):
                others = _keys(scores_ptr, start + tl.arange(0, BLOCK), N, stride_sn, BITS)
                found += (others[:, None] >= bounds[None, :]).to(tl.int32)
        counts = tl.sum(found, axis=0)
        reached = counts >= count
        least += (tl.sum(reached.to(tl.int32)) - 1).to(keys.dtype) << shift
        greater = tl.maximum(greater, tl.max(tl.where(reached, 0, counts)))
    return least, count - greater


@triton.jit
def _rank(scores_ptr, n, keys, N, stride_sn, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens are better than tokens n."""
    found = tl.zeros((n.shape[0], BLOCK), tl.int32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        others = _keys(scores_ptr, j, N, stride_sn, BITS)
        better = (others[None, :] > keys[:, None]) | ((others[None, :] == keys[:, None]) & (j[None, :] < n[:, None]))
        found += better.to(tl.int32)
    return tl.sum(found, axis=1)


@triton.jit
def _follow(from_ptr, to_ptr, b, n, slot, there, k, stride_b, stride_n):
    """A companion's values of tokens n go to their slots."""
    values = tl.load(from_ptr + b * stride_b + n.to(tl.int64) * stride_n, mask=there, other=0)
    tl.store(to_ptr + b * k + slot, values, mask=there)


@for_any("N", "k", "stride_sb", "stride_b0", "stride_b1", "stride_b2", "stride_b3", "mean_ptr", "deviation_ptr")
def select_tokens_fwd_kernel(
    x_ptr, scores_ptr, counts_ptr, weight_ptr, bias_ptr, tokens_ptr, index_ptr, others_ptr, normed_ptr, mean_ptr,
    deviation_ptr, fused_ptr, from0_ptr, from1_ptr, from2_ptr, from3_ptr, to0_ptr, to1_ptr, to2_ptr, to3_ptr,
    eps: tl.float64, N, k, C, P, slices, stride_xb, stride_xn, stride_xc, stride_sb, stride_sn,
    stride_b0, stride_n0, stride_b1, stride_n1, stride_b2, stride_n2, stride_b3, stride_n3,
    REST: tl.constexpr, BEST_FIRST: tl.constexpr, COUNTS: tl.constexpr, COMPANIONS: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr,
    DIGIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // slices).to(tl.int64)
    slice = tl.program_id(0) % slices
    c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    FUSES: tl.constexpr = REST != "none"
    rows = P + k + FUSES
    count = k
    if COUNTS:
        count = tl.minimum(tl.maximum(tl.load(counts_ptr + b), 0), k).to(tl.int32)
    scores_ptr += b * stride_sb
    x_ptr += b * stride_xb
    index_ptr += b * k
    others_ptr += b * N
    added = tl.full((), eps, ACC)

    # every program of an image lists its tokens, and reads its own list again: they write the same
    threshold, wanted = _threshold(scores_ptr, count, N, stride_sn, BITS, DIGIT, WHOLE, BLOCK)
    greater_before = 0
    level_before = 0
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        keys = _keys(scores_ptr, n, N, stride_sn, BITS)
        greater = ((keys > threshold) & (n < N)).to(tl.int32)
        level = ((keys == threshold) & (n < N)).to(tl.int32)
        levels = level_before + tl.cumsum(level, axis=0) - level
        kept = (greater > 0) | ((level > 0) & (levels < wanted))
        slot = greater_before + tl.cumsum(greater, axis=0) - greater + tl.minimum(levels, wanted)
        if FUSES:
            tl.store(others_ptr + n - slot, n, mask=(n < N) & (kept == 0))
        if BEST_FIRST:
            slot = _rank(scores_ptr, n, keys, N, stride_sn, BITS, BLOCK_J)
        greater_before += tl.sum(greater)
        level_before += tl.sum(level)
        tl.store(index_ptr + slot, n.to(tl.int64), mask=kept)
        if slice == 0:
            if COMPANIONS > 0:
                _follow(from0_ptr, to0_ptr, b, n, slot, kept, k, stride_b0, stride_n0)
            if COMPANIONS > 1:
                _follow(from1_ptr, to1_ptr, b, n, slot, kept, k, stride_b1, stride_n1)
            if COMPANIONS > 2:
                _follow(from2_ptr, to2_ptr, b, n, slot, kept, k, stride_b2, stride_n2)
            if COMPANIONS > 3:
                _follow(from3_ptr, to3_ptr, b, n, slot, kept, k, stride_b3, stride_n3)
    tl.debug_barrier()

    for start in range(0, count, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        n = tl.load(index_ptr + j, mask=j < count, other=0)
        offsets = (P + n)[:, None] * stride_xn + c[None, :] * stride_xc
        values = tl.load(x_ptr + offsets, mask=(j < count)[:, None] & (c < C)[None, :], other=0.0)
        write_rows(
            values, P + j, j < count, c, b, C, rows, added, tokens_ptr, normed_ptr, mean_ptr, deviation_ptr, weight_ptr,
            bias_ptr, NORM, WEIGHT, BIAS, ACC,
        )  # fmt: skip
    if FUSES:
        total = tl.zeros((), ACC)
        rest = tl.zeros((BLOCK_C,), ACC)
        for start in range(0, N - count, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            there = j < N - count
            n = tl.load(others_ptr + j, mask=there, other=0).to(tl.int64)
            offsets = (P + n)[:, None] * stride_xn + c[None, :] * stride_xc
            values = tl.load(x_ptr + offsets, mask=there[:, None] & (c < C)[None, :], other=0.0).to(ACC)
            if REST != "mean":
                share = cast(tl.load(scores_ptr + n * stride_sn, mask=there, other=0.0), ACC)
                total += tl.sum(share)
                values *= share[:, None]
            rest += tl.sum(values, axis=0)
        if REST == "mean":
            rest = rest / tl.maximum(N - count, 1).to(ACC)
        if REST == "normalized":
            rest = rest / tl.where(total == 0, 1.0, total).to(ACC)
            tl.store(fused_ptr + b * (1 + C) + 1 + c, rest, mask=c < C)
            if slice == 0:
                tl.store(fused_ptr + b * (1 + C), total)
        one = tl.arange(0, 1)
        write_rows(
            rest.to(tokens_ptr.dtype.element_ty)[None, :], P + count + one, one == 0, c, b, C, rows, added, tokens_ptr,
            normed_ptr, mean_ptr, deviation_ptr, weight_ptr, bias_ptr, NORM, WEIGHT, BIAS, ACC,
        )  # fmt: skip
    for start in range(0, P, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        offsets = n.to(tl.int64)[:, None] * stride_xn + c[None, :] * stride_xc
        values = tl.load(x_ptr + offsets, mask=(n < P)[:, None] & (c < C)[None, :], other=0.0)
        write_rows(
            values, n, n < P, c, b, C, rows, added, tokens_ptr, normed_ptr, mean_ptr, deviation_ptr, weight_ptr,
            bias_ptr, NORM, WEIGHT, BIAS, ACC,
        )  # fmt: skip
    if COUNTS:
        zeros = tl.zeros((BLOCK_N, BLOCK_C), tokens_ptr.dtype.element_ty)
        for start in range(count, k, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            beyond = j < k
            write_rows(
                zeros, P + FUSES + j, beyond, c, b, C, rows, added, tokens_ptr, normed_ptr, mean_ptr, deviation_ptr,
                weight_ptr, bias_ptr, NORM, WEIGHT, BIAS, ACC,
            )  # fmt: skip
            if slice == 0:
                tl.store(index_ptr + j, tl.full((BLOCK_N,), -1, tl.int64), mask=beyond)
                nothing = tl.zeros((BLOCK_N,), tl.int8)
                if COMPANIONS > 0:
                    tl.store(to0_ptr + b * k + j, nothing.to(to0_ptr.dtype.element_ty), mask=beyond)
                if COMPANIONS > 1:
                    tl.store(to1_ptr + b * k + j, nothing.to(to1_ptr.dtype.element_ty), mask=beyond)
                if COMPANIONS > 2:
                    tl.store(to2_ptr + b * k + j, nothing.to(to2_ptr.dtype.element_ty), mask=beyond)
                if COMPANIONS > 3:
                    tl.store(to3_ptr + b * k + j, nothing.to(to3_ptr.dtype.element_ty), mask=beyond)


@triton.jit
def _return(from_ptr, to_ptr, b, n, slot, N, stride_b, stride_n):
    """The gradient of a companion's values, zero where a token was not kept."""
    values = tl.load(from_ptr + b * stride_b + slot.to(tl.int64) * stride_n, mask=(n < N) & (slot >= 0), other=0)
    tl.store(to_ptr + b * N + n, values, mask=(n >= 0) & (n < N))


# P is 1 in most models: knowing that saves a third of the registers
@for_any("N", "k", "blocks", "stride_sb", "stride_ib", "stride_b0", "stride_b1", "stride_b2", "stride_b3")
def select_tokens_bwd_kernel(
    dtokens_ptr, index_ptr, scores_ptr, counts_ptr, x_ptr, fused_ptr, dx_ptr, dscores_ptr,
    from0_ptr, from1_ptr, from2_ptr, from3_ptr, to0_ptr, to1_ptr, to2_ptr, to3_ptr,
    N, k, C, P, blocks, stride_yb, stride_yn, stride_yc, stride_xb, stride_xn, stride_xc, stride_sb, stride_sn,
    stride_ib, stride_ik, stride_b0, stride_n0, stride_b1, stride_n1, stride_b2, stride_n2, stride_b3, stride_n3,
    REST: tl.constexpr, COUNTS: tl.constexpr, COMPANIONS: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of dx."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = row - P
    count = k
    if COUNTS:
        count = tl.minimum(tl.maximum(tl.load(counts_ptr + b), 0), k).to(tl.int32)
    slot = tl.full((BLOCK_N,), -1, tl.int32)  # of the kept tokens
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        place = tl.load(index_ptr + b * stride_ib + j.to(tl.int64) * stride_ik, mask=j < k, other=-1)
        hit = (place[None, :] == n.to(tl.int64)[:, None]) & (place >= 0)[None, :]
        slot = tl.maximum(slot, tl.max(tl.where(hit, j[None, :], -1), axis=1))

    WEIGHTED: tl.constexpr = (REST == "weighted") or (REST == "normalized")
    others = (n >= 0) & (n < N) & (slot < 0)
    source = tl.where(n < 0, row, P + slot)  # the row of the result that this one became
    copied = (n < N) & (others == 0)
    dtokens_ptr += b * stride_yb
    rest_ptr = dtokens_ptr + (P + count).to(tl.int64) * stride_yn
    fused_ptr += b * (1 + C)
    share = tl.zeros((BLOCK_N,), ACC) + 1.0
    divisor = tl.zeros((), ACC) + 1.0
    through_sum = tl.zeros((), ACC)
    if REST == "mean":
        divisor = tl.maximum(N - count, 1).to(ACC)
    if WEIGHTED:
        token = tl.where(others, n, 0).to(tl.int64)
        share = tl.load(scores_ptr + b * stride_sb + token * stride_sn, mask=others, other=0.0)
        share = cast(share, ACC)
    if REST == "normalized":
        total = tl.load(fused_ptr)
        if total != 0:
            divisor = total
            for start in range(0, C, BLOCK_C):
                c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
                drest = tl.load(rest_ptr + c * stride_yc, mask=c < C, other=0.0).to(ACC)
                through_sum += tl.sum(drest * tl.load(fused_ptr + 1 + c, mask=c < C, other=0.0))

    dot = tl.zeros((BLOCK_N,), ACC)
    at = (b * (P + N) + row)[:, None] * C
    source_ptr = dtokens_ptr + source.to(tl.int64)[:, None] * stride_yn
    x_ptr += b * stride_xb
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (c < C)[None, :]
        values = tl.load(source_ptr + c[None, :] * stride_yc, mask=copied[:, None] & inside, other=0.0)
        if REST != "none":
            drest = tl.load(rest_ptr + c * stride_yc, mask=c < C, other=0.0).to(ACC)
            if WEIGHTED:
                offsets = (P + token)[:, None] * stride_xn + c[None, :] * stride_xc
                x = tl.load(x_ptr + offsets, mask=others[:, None] & inside, other=0.0).to(ACC)
                dot += tl.sum(x * drest[None, :], axis=1)
            part = (share / divisor)[:, None] * drest[None, :]
            values = tl.where(others[:, None], part.to(dx_ptr.dtype.element_ty), values)
        tl.store(dx_ptr + at + c[None, :], values, mask=(n < N)[:, None] & inside)
    if WEIGHTED:
        dscores = tl.where(others, (dot - through_sum) / divisor, 0.0)
        dscores = dscores if BITS == 64 else dscores.to(tl.float32)
        tl.store(dscores_ptr + b * N + n, dscores.to(dscores_ptr.dtype.element_ty), mask=(n >= 0) & (n < N))
    if COMPANIONS > 0:
        _return(from0_ptr, to0_ptr, b, n, slot, N, stride_b0, stride_n0)
    if COMPANIONS > 1:
        _return(from1_ptr, to1_ptr, b, n, slot, N, stride_b1, stride_n1)
    if COMPANIONS > 2:
        _return(from2_ptr, to2_ptr, b, n, slot, N, stride_b2, stride_n2)
    if COMPANIONS > 3:
        _return(from3_ptr, to3_ptr, b, n, slot, N, stride_b3, stride_n3)


def _shared_constants(x, scores, counts, companions, rest):
    return {
        "REST": rest,
        "COUNTS": counts is not None,
        "COMPANIONS": len(companions),
        "BITS": 64 if scores.dtype == torch.float64 else 32,
        "ACC": _TYPES[accumulation_dtype(x.dtype)],
        **FUSION,
    }


@planned
def _fwd_plan(x, scores, counts, weight, bias, k, prefix, rest, best_first, norm, *companions):
    (B, _, C), N = x.shape, scores.shape[1]
    # every program makes its image's choice: many images have few programs each, few images many
    wide = norm or B * triton.cdiv(C, 512) >= 128
    block_c = triton.next_power_of_2(max(C, 16)) if norm else tile(C, 16, 512 if wide else 128)
    slices = 1 if norm else max(1, triton.cdiv(C, block_c))
    warps = 8 if wide and block_c > 128 else 4
    shared = _shared_constants(x, scores, counts, companions, rest)
    keys = 32768 * warps // shared["BITS"]  # a thread has 32 registers of keys, a key for each digit it may have
    digit = 4 if N <= keys >> 4 else 2
    block = tile(N, 32, keys >> digit)
    constants = shared | {
        "BEST_FIRST": best_first,
        "NORM": norm,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "DIGIT": digit,
        "WHOLE": N <= block,
        "BLOCK": block,
        "BLOCK_J": max(1, 4096 // block),
        "BLOCK_N": max(1, min(tile(N, 16, 32), 2048 * warps // block_c)),
        "BLOCK_C": block_c,
        "num_warps": warps,
    }
    scalars = (N, k, C, prefix, slices, *x.stride(), *scores.stride(), *companion_strides(companions))
    return Launch(B * slices, scalars, constants, bits=8)


@planned
def _bwd_plan(dtokens, index, scores, counts, x, prefix, rest, *dcompanions):
    (B, _, C), (_, N), k = dtokens.shape, scores.shape, index.shape[1]
    block_c = tile(C, 16, 128)
    block_n = min(32, 4096 // block_c)
    blocks = triton.cdiv(prefix + N, block_n)
    constants = _shared_constants(dtokens, scores, counts, dcompanions, rest)
    constants |= {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_K": tile(k, 16, 64), "num_warps": 4}
    strides = [stride for t in (dtokens, dtokens if x is None else x, scores, index) for stride in t.stride()]
    scalars = (N, k, C, prefix, blocks, *strides, *companion_strides(dcompanions))
    return Launch(B * blocks, scalars, constants, bits=8)


def select_tokens_fwd(x, scores, k, counts, companions, weight, bias, prefix, rest, best_first, norm, eps):
    B, _, C = x.shape
    wide = accumulation_dtype(x.dtype)
    rows = prefix + k + int(rest != "none")
    tokens = x.new_empty(B, rows, C)
    index = scores.new_empty(B, k, dtype=torch.int64)
    others = index if rest == "none" else scores.new_empty(B, scores.shape[1], dtype=torch.int32)
    normed = x.new_empty(B, rows, C) if norm else x.new_empty(0)
    statistics = x.new_empty(2, B, rows, dtype=wide) if norm else x.new_empty(0, dtype=wide)
    fused = x.new_empty(B, 1 + C, dtype=wide) if rest == "normalized" else x.new_empty(0, dtype=wide)
    made = [c.new_empty(B, k) for c in companions]
    mean, deviation = statistics if norm else (statistics, statistics)
    given = index if counts is None else counts, *(x if t is None else t for t in (weight, bias))
    tensors = x, scores, *given, tokens, index, others, normed, mean, deviation, fused, *four(index, companions, made)
    plan = _fwd_plan(x, scores, counts, weight, bias, k, prefix, rest, best_first, norm, *companions)
    launch(select_tokens_fwd_kernel, plan, tensors, (eps,))
    return tokens, index, normed, statistics, fused, made


def select_tokens_bwd(dtokens, dcompanions, index, scores, counts, x, fused, prefix, rest):
    (B, _, C), N = dtokens.shape, scores.shape[1]
    weighted = rest in ("weighted", "normalized")
    dx, dscores = dtokens.new_empty((B, prefix + N, C)), scores.new_empty((B, N) if weighted else (0,))
    made = [d.new_empty((B, N)) for d in dcompanions]
    given = index if counts is None else counts, *(dtokens if t is None else t for t in (x, fused))
    tensors = dtokens, index, scores, *given, dx, dscores, *four(index, dcompanions, made)
    plan = _bwd_plan(dtokens, index, scores, counts, x, prefix, rest, *dcompanions)
    launch(select_tokens_bwd_kernel, plan, tensors)
    return dx, dscores, made
