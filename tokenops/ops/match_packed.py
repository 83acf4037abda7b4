"""match_bipartite of packed sequences: every row's best one, found tile by tile, then which are merged, and into what.

What is found is the most for a row; a matrix of all rows by all is nowhere. Which of a sequence's rows are merged is
worked out on the device, by torch's own sort.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import checks, packed, reference
from .autograd import apart
from .backends import choose
from .schemas import kernel
from .select_packed import ranked


class Matching(NamedTuple):
    """Which row of the merged sequences each row goes into, ``(T,)`` int64, and their boundaries, ``(S+1,)`` int32."""

    index: Tensor  # type: ignore[assignment]
    cu_seqlens: Tensor


def count(op: str, name: str, value: Any) -> None:
    """`value` is an int, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, but got {value!r}")
    if value < 0:
        raise ValueError(f"{op}: {name}={value}, but it must be 0 or more")


def checked(op: str, like: Tensor, of: str, r: Any, cu_seqlens: Any, max_seqlen: Any, prefix: Any) -> int:
    """How long the longest sequence of `like`, the argument `of`, may be; boundaries, prefix and r checked."""
    sequences = packed.boundaries(op, cu_seqlens, max_seqlen, like.shape[0], like, tokens=of)
    count(op, "prefix", prefix)
    if not isinstance(r, Tensor):
        if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
            raise TypeError(f"{op}: r must be an int, or a tensor of one for each sequence, but got {r!r}")
        count(op, "r", r)
        return max_seqlen
    (counts,) = checks.tensor(op, "r", r, "S", like=like, floating=False)
    if r.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: r must be int64 or int32, but got {r.dtype}")
    checks.same(op, "entries", "r", counts, "cu_seqlens less 1", sequences)
    if checks.looked_at(r) and counts and r.min() < 0:
        raise ValueError(f"{op}: r has {r.min().item()}, but it must be 0 or more")
    return max_seqlen


def matched(metric: Tensor, r: int | Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: int) -> Matching:
    """`match_bipartite` of packed sequences, of arguments that are checked."""
    backend = choose("match_packed", metric.device.type, metric.dtype)
    with torch.no_grad():
        if backend == "reference":
            return one_by_one(metric, r, cu_seqlens, prefix)
        counts = merged_counts(r, cu_seqlens, prefix)
        best, target = kernel("match_packed_fwd", backend)(apart(metric), cu_seqlens, max_seqlen, prefix)
        index = kernel("match_packed_places", backend)(best, target, counts, cu_seqlens, prefix)
        return Matching(index, merged_ends(counts, cu_seqlens).int())


def one_by_one(metric: Tensor, r: int | Tensor, cu_seqlens: Tensor, prefix: int) -> Matching:
    """The specification: every sequence by the reference, a loop that looks at the boundaries."""
    counts = merged_counts(r, cu_seqlens, prefix).tolist()
    index = torch.full(metric.shape[:1], -1, device=metric.device)
    ends = [0]
    for rows, count in zip(packed.each(cu_seqlens), counts):
        begin, length = ends[-1], rows.stop - rows.start
        head = min(prefix, length)
        index[rows.start : rows.start + head] = begin + torch.arange(head, device=index.device)
        behind = reference.match_bipartite(metric[rows].unsqueeze(0), count, prefix=head).squeeze(0)
        index[rows.start + head : rows.stop] = begin + head + behind
        ends.append(begin + length - count)
    return Matching(index, torch.tensor(ends, dtype=torch.int32, device=cu_seqlens.device))


def merged_counts(r: int | Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    """How many rows of each sequence are merged: r, or as many as can be, (S,) int64. Looks at nothing."""
    lengths = cu_seqlens.long().diff()
    most = _Sides(lengths, prefix).most
    if isinstance(r, Tensor):
        return torch.minimum(r.to(most.dtype).clamp(min=0), most)
    return most.clamp(max=r)


def merged_ends(counts: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The boundaries of sequences of which so many rows are merged, (S+1,) int64."""
    return pad((cu_seqlens.long().diff() - counts).cumsum(0), (1, 0))


class _Sides:
    """Of every length the rows of the prefix, and how many even and odd ones are behind it."""

    def __init__(self, lengths: Tensor, prefix: int) -> None:
        self.heads = lengths.clamp(max=prefix)
        self.evens = (lengths + 1) // 2 - (self.heads + 1) // 2
        self.odds = lengths // 2 - self.heads // 2
        self.most = torch.where(self.odds > 0, self.evens, 0)


def placed(best: Tensor, target: Tensor, counts: Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    """Where rows go of which the likeness to the best other, and that one's row, are known, (T,). Looks at nothing.

    Args:
        best: ``(T,)``, not NaN; only those of even rows behind a prefix are looked at.
        target: ``(T,)`` int64, a row of the same sequence; likewise.
        counts: ``(S,)`` int64, how many are merged, not more than can be.
        cu_seqlens, prefix: as `match_bipartite` takes them.
    """
    rows = best.shape[0]
    row = torch.arange(rows, device=best.device)
    sequence = packed.sequence_of(cu_seqlens, rows)
    bounds = cu_seqlens.long()
    lengths, ends = bounds.diff(), merged_ends(counts, cu_seqlens)
    sides = _Sides(lengths, prefix)
    left = sides.evens - counts

    def each(values: Tensor) -> Tensor:
        """Of a row's sequence; what it is of slack is no matter."""
        return pad(values, (0, 1))[sequence]

    def before(values: Tensor) -> Tensor:
        """What the sequences before have together."""
        return (values.cumsum(0) - values) if values.shape[0] else values

    place = row - bounds[sequence]  # within a sequence
    head, inside = each(sides.heads), sequence < lengths.shape[0]
    looks = inside & (place >= head) & (place % 2 == 0)
    order = ranked(best.masked_fill(~looks, 0.0), torch.where(looks, sequence, lengths.shape[0]))
    rank = torch.empty_like(row).scatter(0, order, row) - each(before(sides.evens))
    merged = looks & (rank < each(counts))
    stays = looks & ~merged
    goal = torch.where(merged, target - bounds[sequence], place)  # an odd one
    odd = each(left) + goal // 2 - head // 2
    even = stays.long().cumsum(0) - 1 - each(before(left))
    index = torch.where(place < head, place, head + torch.where(stays, even, odd)) + ends[sequence]
    return index.masked_fill(~inside, -1)
