"""restore_tokens on Triton: a program copies BLOCK_N rows of one image, and finds by comparison which token owns each.

Copies move integers of the dtype's size, so the kernels know no dtypes. Where indices repeat the last token wins; the
others, and those whose index is out of range, replace nothing and get a gradient of zero.
"""

import triton
import triton.language as tl

from .common import FUSION, companion_strides, for_any, four, tile
from .launch import Launch, launch, planned


@triton.jit
def _place(index_ptr, j, k, N, stride_ik):
    """Where tokens j go among the N behind the prefix; N where that is out of range (or j is)."""
    n = tl.load(index_ptr + j.to(tl.int64) * stride_ik, mask=j < k, other=-1)
    return tl.where((n >= 0) & (n < N), n, N).to(tl.int32)


@triton.jit
def _owner(index_ptr, n, k, N, P, carried, stride_ik, BLOCK_K: tl.constexpr):
    """The row of tokens that replaces each of rows n, or -1."""
    owner = tl.where(n < carried, n, -1)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        place = _place(index_ptr, j, k, N, stride_ik)
        hit = ((place + P)[None, :] == n[:, None]) & (place < N)[None, :]
        owner = tl.maximum(owner, tl.max(tl.where(hit, (carried + j)[None, :], -1), axis=1))
    return owner


@triton.jit
def _replace(old_ptr, new_ptr, y_ptr, b, n, j, N, stride_ob, stride_on, stride_nb, stride_nn):
    """Of a companion what is at places n: the old value, or that of token j where it is not below 0."""
    there, new = (n >= 0) & (n < N), j >= 0
    at = tl.where(there, n, 0).to(tl.int64)
    old = tl.load(old_ptr + b * stride_ob + at * stride_on, mask=there & (new == 0), other=0)
    fresh = tl.load(new_ptr + b * stride_nb + tl.where(new, j, 0).to(tl.int64) * stride_nn, mask=there & new, other=0)
    tl.store(y_ptr + b * N + n, tl.where(new, fresh, old), mask=there)


@triton.jit
def _return(dy_ptr, old_ptr, new_ptr, b, n, replaced, j, place, wins, N, k, stride_b, stride_n):
    """The gradient of a companion, for places n, and for tokens j whose places are given."""
    there = (n >= 0) & (n < N)
    at = tl.where(there, n, 0).to(tl.int64)
    kept = tl.load(dy_ptr + b * stride_b + at * stride_n, mask=there & (replaced == 0), other=0)
    tl.store(old_ptr + b * N + n, kept, mask=there)
    mine = (j >= 0) & (j < k)
    new = tl.load(dy_ptr + b * stride_b + place.to(tl.int64) * stride_n, mask=mine & wins, other=0)
    tl.store(new_ptr + b * k + j, new, mask=mine)


@for_any(
    "N", "k", "P", "carried", "stride_ib", "stride_ob0", "stride_ob1", "stride_ob2", "stride_ob3",
    "stride_nb0", "stride_nb1", "stride_nb2", "stride_nb3",
)  # fmt: skip
def restore_tokens_fwd_kernel(
    base_ptr, tokens_ptr, index_ptr, y_ptr,
    old0_ptr, old1_ptr, old2_ptr, old3_ptr, new0_ptr, new1_ptr, new2_ptr, new3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    N, k, C, P, carried,
    stride_bb, stride_bn, stride_bc, stride_tb, stride_tn, stride_tc, stride_ib, stride_ik,
    stride_ob0, stride_on0, stride_ob1, stride_on1, stride_ob2, stride_on2, stride_ob3, stride_on3,
    stride_nb0, stride_nn0, stride_nb1, stride_nn1, stride_nb2, stride_nn2, stride_nb3, stride_nn3,
    COMPANIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = P + N
    blocks = tl.cdiv(rows, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    owner = _owner(index_ptr + b * stride_ib, n, k, N, P, carried, stride_ik, BLOCK_K)

    j = owner - carried
    if COMPANIONS > 0:
        _replace(old0_ptr, new0_ptr, y0_ptr, b, n - P, j, N, stride_ob0, stride_on0, stride_nb0, stride_nn0)
    if COMPANIONS > 1:
        _replace(old1_ptr, new1_ptr, y1_ptr, b, n - P, j, N, stride_ob1, stride_on1, stride_nb1, stride_nn1)
    if COMPANIONS > 2:
        _replace(old2_ptr, new2_ptr, y2_ptr, b, n - P, j, N, stride_ob2, stride_on2, stride_nb2, stride_nn2)
    if COMPANIONS > 3:
        _replace(old3_ptr, new3_ptr, y3_ptr, b, n - P, j, N, stride_ob3, stride_on3, stride_nb3, stride_nn3)

    inside, replaced = n < rows, owner >= 0
    base_ptr += b * stride_bb + n.to(tl.int64)[:, None] * stride_bn
    tokens_ptr += b * stride_tb + tl.where(replaced, owner, 0).to(tl.int64)[:, None] * stride_tn
    y_ptr += (b * rows + n)[:, None] * C
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        old = tl.load(base_ptr + c * stride_bc, mask=(inside & ~replaced)[:, None] & (c < C), other=0)
        new = tl.load(tokens_ptr + c * stride_tc, mask=(inside & replaced)[:, None] & (c < C), other=0)
        tl.store(y_ptr + c, tl.where(replaced[:, None], new, old), mask=inside[:, None] & (c < C))


@for_any("N", "k", "P", "carried", "blocks", "stride_ib", "stride_b0", "stride_b1", "stride_b2", "stride_b3")
def restore_tokens_bwd_kernel(
    dy_ptr, index_ptr, dbase_ptr, dtokens_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, old0_ptr, old1_ptr, old2_ptr, old3_ptr, new0_ptr, new1_ptr, new2_ptr, new3_ptr,
    N, k, C, P, carried, blocks,
    stride_yb, stride_yn, stride_yc, stride_ib, stride_ik,
    stride_b0, stride_n0, stride_b1, stride_n1, stride_b2, stride_n2, stride_b3, stride_n3,
    COMPANIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows of dbase and BLOCK_N rows of dtokens."""
    rows, given = P + N, carried + k
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    index_ptr += b * stride_ib
    dy_ptr += b * stride_yb
    replaced = _owner(index_ptr, n, k, N, P, carried, stride_ik, BLOCK_K) >= 0

    # the row whose gradient each token gets: none where a later token has the same place
    place = _place(index_ptr, tl.maximum(n - carried, 0), k, N, stride_ik)
    source = tl.where(n < carried, n, P + place)
    wins = (n < carried) | ((n < given) & (place < N))
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        later = (j[None, :] > (n - carried)[:, None]) & (j < k)[None, :]
        same = later & (_place(index_ptr, j, k, N, stride_ik)[None, :] == place[:, None]) & (n >= carried)[:, None]
        wins = wins & (tl.max(same.to(tl.int32), axis=1) == 0)

    j = n - carried
    if COMPANIONS > 0:
        _return(y0_ptr, old0_ptr, new0_ptr, b, n - P, replaced, j, place, wins, N, k, stride_b0, stride_n0)
    if COMPANIONS > 1:
        _return(y1_ptr, old1_ptr, new1_ptr, b, n - P, replaced, j, place, wins, N, k, stride_b1, stride_n1)
    if COMPANIONS > 2:
        _return(y2_ptr, old2_ptr, new2_ptr, b, n - P, replaced, j, place, wins, N, k, stride_b2, stride_n2)
    if COMPANIONS > 3:
        _return(y3_ptr, old3_ptr, new3_ptr, b, n - P, replaced, j, place, wins, N, k, stride_b3, stride_n3)

    dbase_ptr += (b * rows + n)[:, None] * C
    dtokens_ptr += (b * given + n)[:, None] * C
    old_ptr = dy_ptr + n.to(tl.int64)[:, None] * stride_yn
    new_ptr = dy_ptr + source.to(tl.int64)[:, None] * stride_yn
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        old = tl.load(old_ptr + c * stride_yc, mask=((n < rows) & ~replaced)[:, None] & (c < C), other=0)
        tl.store(dbase_ptr + c, old, mask=(n < rows)[:, None] & (c < C))
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        new = tl.load(new_ptr + c * stride_yc, mask=wins[:, None] & (c < C), other=0)
        tl.store(dtokens_ptr + c, new, mask=(n < given)[:, None] & (c < C))


def _blocks(C: int, k: int) -> dict:
    block_c = tile(C, 16, 256)
    blocks = {"BLOCK_N": min(32, 2048 // block_c), "BLOCK_C": block_c, "BLOCK_K": tile(k, 16, 32)}
    return {**blocks, "num_warps": 4, **FUSION}


@planned
def _fwd_plan(base, tokens, index, prefix, *companions):
    (B, rows, C), k, count = base.shape, index.shape[1], len(companions) // 2
    blocks = _blocks(C, k)
    scalars = (
        rows - prefix, k, C, prefix, tokens.shape[1] - k, *base.stride(), *tokens.stride(), *index.stride(),
        *companion_strides(companions[:count]), *companion_strides(companions[count:]),
    )  # fmt: skip
    return Launch(B * triton.cdiv(rows, blocks["BLOCK_N"]), scalars, {"COMPANIONS": count, **blocks}, bits=16)


@planned
def _bwd_plan(dy, index, prefix, carried, *dcompanions):
    (B, rows, C), k = dy.shape, index.shape[1]
    blocks = _blocks(C, k)
    programs = triton.cdiv(max(rows, carried + k), blocks["BLOCK_N"])
    strides = *dy.stride(), *index.stride(), *companion_strides(dcompanions)
    scalars = (rows - prefix, k, C, prefix, carried, programs, *strides)
    return Launch(B * programs, scalars, {"COMPANIONS": len(dcompanions), **blocks}, bits=16)


def restore_tokens_fwd(base, tokens, index, prefix, olds, news):
    y, made = base.new_empty(*base.shape), [old.new_empty(old.shape) for old in olds]
    plan = _fwd_plan(base, tokens, index, prefix, *olds, *news)
    launch(restore_tokens_fwd_kernel, plan, (base, tokens, index, y, *four(index, olds, news, made)))
    return y, made


def restore_tokens_bwd(dy, index, prefix, carried, dcompanions):
    (B, _, C), k = dy.shape, index.shape[1]
    dbase, dtokens = dy.new_empty(dy.shape), dy.new_empty((B, carried + k, C))
    dolds, dnews = [d.new_empty(d.shape) for d in dcompanions], [d.new_empty((B, k)) for d in dcompanions]
    plan = _bwd_plan(dy, index, prefix, carried, *dcompanions)
    launch(restore_tokens_bwd_kernel, plan, (dy, index, dbase, dtokens, *four(index, dcompanions, dolds, dnews)))
    return dbase, dtokens, dolds, dnews
