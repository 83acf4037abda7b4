"""masked_channel_attention on Triton: online softmax, and never a matrix of queries by keys in memory.

Forward: a program owns BLOCK_M queries of a head and walks over the keys; the program of query 0 then writes the class
scores, whose mean over the heads is torch's. The mean of k takes programs of its own in the same launch. The "received"
scores need every query's log-sum-exp first, so they are a second launch over q k^T. Backward: one kernel owns queries
(dq, and D for the other), one owns keys (dk, dv, dbias). Logits are kept times log2(e), for exp2.

Packed sequences are rows of one image, of which a program finds its own (sequences.py); those behind the last are one
more, without keys.

What has the channels of a head is a list of chunks, each loaded, multiplied and summed on its own: one, of a power of
two, or 64 channels and a tail of 16 or 32, where padding to 128 would cost more (`columns`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..schemas import heads_inside, parts_of
from . import launches
from .attention_arguments import config, layout, shared_arguments, stand_ins, tail
from .common import before_hopper, for_any, from_units, rows, tile
from .launch import Launch, launch, planned
from .sequences import longest, of_sequences, own, tiles_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, UNIT: tl.constexpr):
    """Where head h of image b begins."""
    return ptr + b * from_units(stride_b, UNIT, tl.int64) + h * from_units(stride_h, UNIT, tl.int64)


@triton.jit
def _length(lengths_ptr, b, N, HAS_LENGTHS: tl.constexpr):
    length = N
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), N).to(tl.int32)
    return length


@triton.jit
def _chunks(BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """The channels of a head."""
    chunks = [tl.arange(0, BLOCK)]
    if TAIL:
        chunks += [BLOCK + tl.arange(0, TAIL)]
    return chunks


@triton.jit
def _rows(ptr, n, cs, read, D, stride_n, stride_c, DOT: tl.constexpr, INDEX: tl.constexpr):
    """Rows n of a head (those to be read), chunk by chunk."""
    return [rows(ptr, n, c, read, D, stride_n, stride_c, DOT, INDEX) for c in cs]


@triton.jit
def _zeros(ROWS: tl.constexpr, cs, ACC: tl.constexpr):
    return [tl.zeros((ROWS, c.shape[0]), ACC) for c in cs]


@triton.jit
def _product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, the sum over all channels."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION, out_dtype=ACC)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION, out_dtype=ACC)
    return s


@triton.jit
def _plus(p, x, acc, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """p x + acc, of all channels."""
    sums = []
    for i in tl.static_range(len(acc)):
        sums += [tl.dot(p, x[i], acc[i], input_precision=PRECISION, out_dtype=ACC)]
    return sums


@triton.jit
def _channels(mask_ptr, h, c, D, ACC: tl.constexpr):
    return tl.load(mask_ptr + h * D + c, mask=c < D, other=0.0).to(ACC)


@triton.jit
def _masked(x, mask_ptr, h, cs, D, ACC: tl.constexpr, DOT: tl.constexpr, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        masked = []
        for i in tl.static_range(len(cs)):
            masked += [(x[i].to(ACC) * _channels(mask_ptr, h, cs[i], D, ACC)[None, :]).to(DOT)]
        x = masked
    return x


@triton.jit
def _store(ptr, x, b, h, n, cs, N, row, D, INDEX: tl.constexpr):
    """Rows n of head h of image b in (B,N,H,D), of so many elements a row."""
    for i in tl.static_range(len(cs)):
        offsets = n.to(INDEX)[:, None] * row + cs[i][None, :]
        inside = (n < N)[:, None] & (cs[i] < D)[None, :]
        first = b * N * row + h * D
        tl.store(ptr + first + offsets, x[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attend_keys(q, k_ptr, v_ptr, bias_ptr, scale, start, length, top, total, acc, ck, cv,
                 stride_kn, stride_kc, stride_vn, stride_vc, stride_bn, DK: tl.constexpr, DV: tl.constexpr,
                 ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
                 HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """A tile of BLOCK keys joins the softmax; a WHOLE one has no key beyond the length."""
    n = start + tl.arange(0, BLOCK)
    counts = (n >= 0) if WHOLE else n < length
    k = _rows(k_ptr, n, ck, counts, DK, stride_kn, stride_kc, DOT, INDEX)
    s = _product(q, k, ACC, PRECISION)
    if HAS_BIAS or not WHOLE:
        s = _biased(s * scale, _key_bias(bias_ptr, n, length, stride_bn, ACC, INDEX, HAS_BIAS, WHOLE)[None, :])
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = _finite(higher)
        p = tl.exp2(s - base[:, None])
    else:  # the scale, which is not negative, joins the subtraction
        higher = tl.maximum(top, tl.max(s, axis=1) * scale)
        base = higher
        p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, axis=1)
    v = _rows(v_ptr, n, cv, counts, DV, stride_vn, stride_vc, DOT, INDEX)
    acc = _plus(p.to(DOT), v, [a * shrink[:, None] for a in acc], ACC, PRECISION)
    return higher, total, acc


@triton.jit
def _key_bias(bias_ptr, n, length, stride_n, ACC: tl.constexpr, INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """What is added to the logits of keys n: -inf beyond the length, where a WHOLE tile has none."""
    if not HAS_BIAS:
        bias = tl.where(n < length, 0.0, float("-inf")).to(ACC)
    elif WHOLE:
        bias = tl.load(bias_ptr + n.to(INDEX) * stride_n).to(ACC) * LOG2E
    else:
        bias = tl.load(bias_ptr + n.to(INDEX) * stride_n, mask=n < length, other=float("-inf")).to(ACC) * LOG2E
    return bias


@triton.jit
def _biased(s, bias):
    """Logits with the keys' bias; a key with -inf does not count, be its product NaN."""
    return tl.where(bias == float("-inf"), float("-inf"), s + bias)


@triton.jit
def _finite(lse):
    """What is subtracted from a row's logits: 0 where all of them are -inf."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def _row_lse(lse_ptr, m, there, ACC: tl.constexpr):
    """Of queries m, times log2(e); +inf where there is none, which makes its probabilities 0."""
    return _finite(tl.load(lse_ptr + m, mask=there, other=float("inf")).to(ACC) * LOG2E)


@triton.jit
def _added(sums, x, ACC: tl.constexpr):
    added = []
    for i in tl.static_range(len(x)):
        added += [sums[i] + x[i].to(ACC)]
    return added


@triton.jit
def _mean_key(k_ptr, lengths_ptr, key_mean_ptr, b, tile_n, H, N, stride_b, stride_h, stride_n, stride_c,
              ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, UNIT: tl.constexpr, HAS_LENGTHS: tl.constexpr,
              DK: tl.constexpr, ck, BLOCK_N: tl.constexpr):  # fmt: skip
    """Writes the mean over the heads of a tile of keys of image b."""
    b = b.to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    length = _length(lengths_ptr, b, N, HAS_LENGTHS)
    sums = _zeros(BLOCK_N, ck, ACC)
    for h in range(H):
        head = _head(k_ptr, b, h, stride_b, stride_h, UNIT)
        sums = _added(sums, _rows(head, n, ck, n < length, DK, stride_n, stride_c, DOT, INDEX), ACC)
    _store(key_mean_ptr, [s / H for s in sums], b, 0, n, ck, N, DK, DK, INDEX)


@for_any("B", "M", "N", "stride_bb", "stride_bh", "S", "leap")
def masked_channel_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, qk_mask_ptr, v_mask_ptr, bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, out_ptr, scores_ptr,
    lse_ptr, key_mean_ptr, factor: tl.float64, B, H, M, N,
    stride_qb, stride_qh, stride_qm, stride_qc, stride_kb, stride_kh, stride_kn, stride_kc,
    stride_vb, stride_vh, stride_vn, stride_vc, stride_bb, stride_bh, stride_bn, S, leap,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, UNIT: tl.constexpr,
    HAS_QK_MASK: tl.constexpr, HAS_V_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SEQUENCES: tl.constexpr, CLASS: tl.constexpr, KEY_MEAN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, TAIL_DK: tl.constexpr, TAIL_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scale = tl.full((), factor, ACC)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if SEQUENCES:
        tiles_m = M // BLOCK_M + S + 1
    side = B * tiles_n if KEY_MEAN else 0
    stride_qm, stride_kn = from_units(stride_qm, UNIT, INDEX), from_units(stride_kn, UNIT, INDEX)
    stride_vn = from_units(stride_vn, UNIT, INDEX)

    if program < side:
        ends_ptr = cu_k_ptr + S if SEQUENCES else lengths_ptr
        _mean_key(
            k_ptr, ends_ptr, key_mean_ptr, program // tiles_n, program % tiles_n, H, N,
            stride_kb, stride_kh, stride_kn, stride_kc, ACC, DOT, INDEX, UNIT, HAS_LENGTHS or SEQUENCES, DK,
            _chunks(BLOCK_DK, TAIL_DK), BLOCK_N,
        )  # fmt: skip
    else:
        tile_m, head = (program - side) % tiles_m, (program - side) // tiles_m
        h, b = head % H, (head // H).to(tl.int64)
        q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
        k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
        v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
        bias_ptr += b * stride_bb + tl.cast(h, tl.int64) * stride_bh
        out_ptr += b * M * (H * DV)
        lse_ptr += (b * H + h) * M
        scores_ptr += (b * H + h) * N
        length = _length(lengths_ptr, b, N, HAS_LENGTHS)
        if SEQUENCES:
            tile_m, first_m, M, _, first_n, N = own(cu_q_ptr, cu_k_ptr, tile_m, M, S, leap, BLOCK_M)
            length = N
            q_ptr, k_ptr = q_ptr + first_m * stride_qm, k_ptr + first_n * stride_kn
            v_ptr, bias_ptr = v_ptr + first_n * stride_vn, bias_ptr + first_n * stride_bn
            out_ptr += first_m * (H * DV)
            lse_ptr, scores_ptr = lse_ptr + first_m, scores_ptr + first_n
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        ck, cv = _chunks(BLOCK_DK, TAIL_DK), _chunks(BLOCK_DV, TAIL_DV)

        q = _rows(q_ptr, m, ck, m < M, DK, stride_qm, stride_qc, DOT, INDEX)
        q = _masked(q, qk_mask_ptr, h, ck, DK, ACC, DOT, HAS_QK_MASK)
        top = tl.full((BLOCK_M,), float("-inf"), ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        acc = _zeros(BLOCK_M, cv, ACC)
        whole = N // BLOCK_N * BLOCK_N  # tiles without a mask, and a smaller one for the rest
        if HAS_LENGTHS:
            whole = 0
        for start in range(0, whole, BLOCK_N):
            top, total, acc = _attend_keys(
                q, k_ptr, v_ptr, bias_ptr, scale, start, length, top, total, acc, ck, cv,
                stride_kn, stride_kc, stride_vn, stride_vc, stride_bn, DK, DV, ACC, DOT, PRECISION, INDEX,
                HAS_BIAS, BLOCK_N, True,
            )  # fmt: skip
        for start in range(whole, length, BLOCK_TAIL):
            top, total, acc = _attend_keys(
                q, k_ptr, v_ptr, bias_ptr, scale, start, length, top, total, acc, ck, cv,
                stride_kn, stride_kc, stride_vn, stride_vc, stride_bn, DK, DV, ACC, DOT, PRECISION, INDEX,
                HAS_BIAS, BLOCK_TAIL, False,
            )  # fmt: skip
        some = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(some))
        tl.store(lse_ptr + m, lse * LN2, mask=m < M)
        acc = _masked([a * (1 / some)[:, None] for a in acc], v_mask_ptr, h, cv, DV, ACC, ACC, HAS_V_MASK)
        _store(out_ptr, acc, 0, h, m, cv, M, H * DV, DV, INDEX)

        if CLASS:
            if (tile_m == 0) & (M > 0):
                first = _finite(tl.sum(tl.where(m == 0, top, 0.0), axis=0))
                divisor = tl.sum(tl.where(m == 0, some, 0.0), axis=0)
                one = tl.arange(0, 16)  # a dot needs so many: behind query 0 there are zeros
                q_class = _rows(q_ptr, one, ck, one == 0, DK, stride_qm, stride_qc, DOT, INDEX)
                q_class = _masked(q_class, qk_mask_ptr, h, ck, DK, ACC, DOT, HAS_QK_MASK)
                for start in tl.range(0, N, BLOCK_N, num_stages=1):
                    n = start + tl.arange(0, BLOCK_N)
                    bias = _key_bias(bias_ptr, n, length, stride_bn, ACC, INDEX, HAS_BIAS, False)
                    k = _rows(k_ptr, n, ck, n < length, DK, stride_kn, stride_kc, DOT, INDEX)
                    s = _product(k, q_class, ACC, PRECISION) * scale
                    s = tl.sum(tl.where((one == 0)[None, :], s, 0.0), axis=1)
                    p = tl.where(bias == float("-inf"), 0.0, tl.exp2(s + bias - first) / divisor)
                    tl.store(scores_ptr + n, p, mask=n < N)


@for_any("M", "N", "stride_bb", "stride_bh", "S", "leap")
def masked_channel_attention_received_kernel(
    q_ptr, k_ptr, qk_mask_ptr, bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, lse_ptr, scores_ptr, factor: tl.float64,
    H, GROUPS, M, N,
    stride_qb, stride_qh, stride_qm, stride_qc, stride_kb, stride_kh, stride_kn, stride_kc,
    stride_bb, stride_bh, stride_bn, S, leap,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, UNIT: tl.constexpr,
    HAS_QK_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, SEQUENCES: tl.constexpr,
    DK: tl.constexpr, BLOCK_DK: tl.constexpr, TAIL_DK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The mean over the queries, and over the heads of a group (one head, or all), of the probabilities of keys."""
    scale = tl.full((), factor, ACC)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if SEQUENCES:
        tiles_n = N // BLOCK_N + S + 1
    program = tl.program_id(0)
    tile_n = program % tiles_n
    group = (program // tiles_n) % GROUPS
    b = (program // (tiles_n * GROUPS)).to(tl.int64)
    c = _chunks(BLOCK_DK, TAIL_DK)
    length = _length(lengths_ptr, b, N, HAS_LENGTHS)
    stride_qm, stride_kn = from_units(stride_qm, UNIT, INDEX), from_units(stride_kn, UNIT, INDEX)
    heads = H // GROUPS
    lse_ptr += b * H * M
    scores_ptr += (b * GROUPS + group) * N
    rows = M
    if SEQUENCES:
        tile_n, first_n, N, length, first_m, M = own(cu_k_ptr, cu_q_ptr, tile_n, N, S, leap, BLOCK_N)
        q_ptr, k_ptr = q_ptr + first_m * stride_qm, k_ptr + first_n * stride_kn
        bias_ptr, lse_ptr, scores_ptr = bias_ptr + first_n * stride_bn, lse_ptr + first_m, scores_ptr + first_n
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for h in range(group * heads, group * heads + heads):
        head_q = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
        head_k = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
        k = _rows(head_k, n, c, n < length, DK, stride_kn, stride_kc, DOT, INDEX)
        bias_row = bias_ptr + b * stride_bb + tl.cast(h, tl.int64) * stride_bh
        bias = _key_bias(bias_row, n, length, stride_bn, ACC, INDEX, HAS_BIAS, False)
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            q = _rows(head_q, m, c, m < M, DK, stride_qm, stride_qc, DOT, INDEX)
            q = _masked(q, qk_mask_ptr, h, c, DK, ACC, DOT, HAS_QK_MASK)
            s = _product(q, k, ACC, PRECISION) * scale
            lse = _row_lse(lse_ptr + tl.cast(h, tl.int64) * rows, m, m < M, ACC)[:, None]
            sums += tl.where(bias[None, :] == float("-inf"), 0.0, tl.exp2(s + bias[None, :] - lse))
    received = tl.sum(sums, axis=0) / (tl.maximum(M, 1) * heads)
    tl.store(scores_ptr + n, received, mask=n < N)


def _fwd_config(dtype, M, N, DK, DV):
    single, (wide, chunked) = dtype.itemsize > 2, layout(dtype, DK, DV)
    # operands of a tf32x3 dot are held three times
    if single:
        queries, keys, stages = 16 if wide else 32 if before_hopper() else 64, 32, 2
    else:
        queries, keys, stages = 64, 32 if chunked and before_hopper() else 64, 3
    sizes = {"BLOCK_M": tile(M, 16, queries), "BLOCK_N": tile(N, 16, keys)}
    return sizes | config(dtype, DK, DV, warps=8 if (single or wide) and M > 16 else 4, stages=stages)


def _only(constants, *names):
    """The constants without those that a kernel does not take."""
    return {name: value for name, value in constants.items() if name not in names}


class _Forward(NamedTuple):
    launch: Launch
    received: Launch | None  # of these scores


@planned
def _fwd_plan(q, k, v, qk_mask, v_mask, bias, lengths, scores, mean, key_mean, cu_q, cu_k, max_q, max_k):
    (B, H, M, DK), N, DV = q.shape, k.shape[2], v.shape[3]
    strides, bias_strides, constants = shared_arguments(q, k, v, qk_mask, v_mask, bias, lengths)
    constants |= {"SEQUENCES": cu_q is not None}
    most = longest(M, cu_q, max_q), longest(N, cu_k, max_k)
    default = _fwd_config(q.dtype, *most, DK, DV)
    given = (qk_mask is not None, v_mask is not None, bias is not None, lengths is not None)
    call = (q.dtype, B, (*most, DK, DV), default, given)
    sizes = launches.overlaid("masked_channel_attention_fwd", *call)
    own = {"CLASS": scores == "class", "KEY_MEAN": key_mean}
    own["BLOCK_TAIL"] = tail(N, sizes["BLOCK_N"], lengths is not None or cu_k is not None)
    programs = B * (triton.cdiv(N, sizes["BLOCK_N"]) * key_mean + H * tiles_of(M, sizes["BLOCK_M"], cu_q))
    scalars = (B, H, M, N, *strides[0], *strides[1], *strides[2], *bias_strides, *of_sequences(cu_q))
    first = Launch(programs, scalars, constants | sizes | own)
    if scores != "received":
        return _Forward(first, None)
    groups = 1 if mean else H
    sizes = launches.overlaid("masked_channel_attention_received", *call)
    scalars = (H, groups, M, N, *strides[0], *strides[1], *bias_strides, *of_sequences(cu_q))
    constants = _only(constants, "HAS_V_MASK", "DV") | _only(sizes, "BLOCK_DV", "TAIL_DV")
    return _Forward(first, Launch(B * groups * tiles_of(N, sizes["BLOCK_N"], cu_k), scalars, constants))


def masked_channel_attention_fwd(
    q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads=0, channels=0, keep=True, cu_q=None,
    cu_k=None, max_q=0, max_k=0,
):  # fmt: skip
    q, k, v = parts_of(q, k, v, heads, channels)
    (B, H, M, DK), N = q.shape, k.shape[2]
    if scale < 0:  # the kernels take the maximum before they scale
        q, scale = -q, -scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = heads_inside(q, M, v.shape[3]), q.new_empty(B, H, M, dtype=wide)
    groups = (B,) if mean and scores == "received" else (B, H)
    score = q.new_empty(0, dtype=wide) if scores == "none" else q.new_empty(*groups, N, dtype=wide)
    mean_k = k.new_empty(B, N, DK) if key_mean else k.new_empty(0)
    if cu_q is not None and scores == "class":  # keys of no query
        score.zero_()
    plan = _fwd_plan(q, k, v, qk_mask, v_mask, bias, lengths, scores, mean, key_mean, cu_q, cu_k, max_q, max_k)
    qk_mask, v_mask, bias, lengths, cu_q, cu_k = stand_ins(q, qk_mask, v_mask, bias, lengths, cu_q, cu_k)
    factor = (scale * LOG2E.value,)
    tensors = (q, k, v, qk_mask, v_mask, bias, lengths, cu_q, cu_k, out, score, lse, mean_k)
    launch(masked_channel_attention_fwd_kernel, plan.launch, tensors, factor)
    if scores == "class" and mean:
        score = score.mean(dim=1)
    if plan.received is not None:
        tensors = (q, k, qk_mask, bias, lengths, cu_q, cu_k, lse, score)
        launch(masked_channel_attention_received_kernel, plan.received, tensors, factor)
    return out, score, lse if keep else lse.new_empty(0), mean_k
