"""restore_tokens on Triton: a program copies BLOCK_N rows of one image, and finds by comparison which token owns each.

Copies move integers of the dtype's size, so the kernels know no dtypes. Where indices repeat the last token wins; the
others, and those whose index is out of range, replace nothing and get a gradient of zero.
"""

import torch
import triton
import triton.language as tl

from .common import FUSION, tile

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
def restore_tokens_fwd_kernel(
    base_ptr, tokens_ptr, index_ptr, y_ptr,
    N, k, C, P, carried,
    stride_bb, stride_bn, stride_bc, stride_tb, stride_tn, stride_tc, stride_ib, stride_ik,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = P + N
    blocks = tl.cdiv(rows, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    owner = _owner(index_ptr + b * stride_ib, n, k, N, P, carried, stride_ik, BLOCK_K)

    inside, replaced = n < rows, owner >= 0
    base_ptr += b * stride_bb + n.to(tl.int64)[:, None] * stride_bn
    tokens_ptr += b * stride_tb + tl.where(replaced, owner, 0).to(tl.int64)[:, None] * stride_tn
    y_ptr += (b * rows + n)[:, None] * C
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        old = tl.load(base_ptr + c * stride_bc, mask=(inside & ~replaced)[:, None] & (c < C), other=0)
        new = tl.load(tokens_ptr + c * stride_tc, mask=(inside & replaced)[:, None] & (c < C), other=0)
        tl.store(y_ptr + c, tl.where(replaced[:, None], new, old), mask=inside[:, None] & (c < C))


@triton.jit
def restore_tokens_bwd_kernel(
    dy_ptr, index_ptr, dbase_ptr, dtokens_ptr,
    N, k, C, P, carried, blocks,
    stride_yb, stride_yn, stride_yc, stride_ib, stride_ik,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
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


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(_INTEGERS[x.element_size()])


def restore_tokens_fwd(base, tokens, index, prefix):
    B, rows, C = base.shape
    y = base.new_empty((B, rows, C))
    if y.numel() == 0:
        return y
    k, blocks = index.shape[1], _blocks(C, index.shape[1])
    restore_tokens_fwd_kernel[B * triton.cdiv(rows, blocks["BLOCK_N"]),](
        _bits(base), _bits(tokens), index, _bits(y),
        rows - prefix, k, C, prefix, tokens.shape[1] - k,
        *base.stride(), *tokens.stride(), *index.stride(), **blocks,
    )  # fmt: skip
    return y


def restore_tokens_bwd(dy, index, prefix, carried):
    B, rows, C = dy.shape
    k, blocks = index.shape[1], _blocks(C, index.shape[1])
    dbase, dtokens = dy.new_empty((B, rows, C)), dy.new_empty((B, carried + k, C))
    if dbase.numel() == 0 and dtokens.numel() == 0:
        return dbase, dtokens
    programs = triton.cdiv(max(rows, carried + k), blocks["BLOCK_N"])
    restore_tokens_bwd_kernel[B * programs,](
        _bits(dy), index, _bits(dbase), _bits(dtokens),
        rows - prefix, k, C, prefix, carried, programs,
        *dy.stride(), *index.stride(), **blocks,
    )  # fmt: skip
    return dbase, dtokens
