"""Packed sequences on Triton: tiles of rows of sequences of any lengths, found without a number on the host.

Tile number cu[s] // BLOCK + s is the first of sequence s: the tiles of no two sequences meet, as
floor(b / BLOCK) - floor(a / BLOCK) + 1 >= ceil((b - a) / BLOCK). So there are at most rows // BLOCK + S + 1, with those
of the rows behind the last sequence, whatever the lengths, and no prefix sum is made of them: a program finds its
sequence in the boundaries. The few tiles too many do nothing.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(cu_ptr, tile, S, leap, BLOCK: tl.constexpr):
    """The sequence that a tile of BLOCK rows is of; `leap` is the largest power of two that S is not below."""
    found = 0
    while leap > 0:
        at = found + leap
        begins = tl.load(cu_ptr + at, mask=at <= S, other=0)
        found = tl.where((at <= S) & (begins // BLOCK + at <= tile), at, found)
        leap = leap // 2
    return found


@triton.jit
def leap_of(S):
    """The power of two that a search for one of S sequences begins with."""
    leap = 1
    while 2 * leap <= S:
        leap *= 2
    return leap


@triton.jit
def extent(cu_ptr, s, S, rows, P):
    """The first row of a sequence, how many of its rows are its prefix of P, and how many are behind it.

    Of the rows behind the last sequence none is a prefix.
    """
    first = tl.load(cu_ptr + s)
    count = tl.load(cu_ptr + s + 1, mask=s < S, other=rows) - first
    before = tl.where(s < S, tl.minimum(P, count), 0)
    return first.to(tl.int64), before, count - before


@triton.jit
def own(cu_ptr, cu_other_ptr, tile, rows, S, leap, BLOCK: tl.constexpr):
    """Of a tile's sequence: the tile within it, the first row, how many there are and how many are read; and of the
    rows on the other side (keys of queries, queries of keys) the first, and how many. The rest is read by none."""
    s = sequence(cu_ptr, tile, S, leap, BLOCK)
    first, other = tl.load(cu_ptr + s), tl.load(cu_other_ptr + s)
    count = tl.load(cu_ptr + s + 1, mask=s < S, other=rows) - first
    others = tl.load(cu_other_ptr + s + 1, mask=s < S, other=0) - other
    tile = tile - (first // BLOCK + s)
    others = tl.where((s < S) & (tile * BLOCK < count), others, 0)
    return tile, first.to(tl.int64), count, tl.where(s < S, count, 0), other.to(tl.int64), others


def of_sequences(cu_q):
    """S and the power of two that the search begins with, as kernels take them."""
    S = 0 if cu_q is None else cu_q.shape[0] - 1
    return S, 1 << S.bit_length() >> 1


def tiles_of(rows, block, cu):
    """How many tiles there are at most."""
    return triton.cdiv(rows, block) if cu is None else rows // block + cu.shape[0]


def longest(rows, cu, most):
    """Rows of the longest sequence."""
    return rows if cu is None else min(rows, max(most, 1))
