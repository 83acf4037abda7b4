"""select_tokens of packed sequences: which row goes where, worked out on the device, and rows that are summed there."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, packed
from .reference import accumulation_dtype
from .sum_rows import sum_rows


class Plan(NamedTuple):
    """Where T rows go among the rows of a result.

    Attributes:
        dest: ``(T,)`` int64, -1 for those that are left out, or cut, and for slack.
        left_out: ``(T,)`` bool: not kept.
        index: ``(rows,)`` int64, the kept row at each place, -1 for a fused one and for what is behind the last.
        cu_seqlens: ``(S+1,)`` int32 of the result.
        rows: how many there would be if none were cut, on the device.
        order: the rows by where they go, and where those of each place begin (of `sum_rows`).
    """

    dest: Tensor
    left_out: Tensor
    index: Tensor  # type: ignore[assignment]
    cu_seqlens: Tensor
    rows: Tensor
    order: tuple[Tensor, Tensor]


def ranked(scores: Tensor, group: Tensor) -> Tensor:
    """The rows by group and, within one, from the best score to the worst: of equals the first, NaN behind all."""
    missing = scores.isnan()
    if scores.dtype != torch.float64:  # one sort, by integers in the order of the numbers; 0 - -0 is 0
        bits = (0 - scores.float()).view(torch.int32).long()
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(missing, 0x7FFFFFFF)
        return (group * 2**32 + bits).sort(stable=True).indices
    by_score = (0 - scores).masked_fill(missing, float("inf")).sort(stable=True).indices
    return by_score[(2 * group + missing)[by_score].sort(stable=True).indices]


def planned(
    scores: Tensor,
    k: int,
    cu_seqlens: Tensor,
    rows: int,
    prefix: int,
    fused: bool,
    by_index: bool,
    counts: Tensor | None,
) -> Plan:
    """Keep of each sequence its prefix and the `k` best rows (`counts` of them) behind it; the others are `fused`."""
    device = scores.device
    row = torch.arange(scores.shape[0], device=device)
    sequence = packed.sequence_of(cu_seqlens, scores.shape[0])
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    heads = lengths.clamp(max=prefix)
    most = lengths - heads
    kept = most.clamp(max=k) if counts is None else torch.minimum(counts.clamp(0, k), most)
    fuses = (kept < most).long() if fused else torch.zeros_like(kept)
    ends = (heads + kept + fuses).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0))  # (S+1,), the end of all last

    def each(values: Tensor) -> Tensor:
        """Of a row's sequence, 0 of slack; in the order of rows, and that of `order`: both are sorted by sequence."""
        return torch.nn.functional.pad(values, (0, 1)).index_select(0, sequence)

    first = bounds.index_select(0, sequence)
    place = row - first  # within a sequence
    behind = (place >= each(heads)) & (sequence < lengths.shape[0])
    # a prefix and slack are not looked at; a prefix is ahead of all that is behind it
    known = torch.where(behind, scores, torch.zeros_like(scores))
    order = ranked(known, 2 * sequence + behind)
    in_order = place < each(heads + kept)
    keeps = torch.zeros_like(behind).scatter(0, order, in_order)
    so_far = keeps.long().cumsum(0)
    fused_before = torch.nn.functional.pad(fuses.cumsum(0), (1, 0))[:-1]
    if by_index:
        dest = so_far - 1 + each(fused_before)
    else:
        dest = torch.zeros_like(row).scatter(0, order, begins.index_select(0, sequence) + place)
    left_out = ~keeps & behind
    index = torch.full((rows + 1,), -1, device=device)
    index = index.scatter(0, torch.where(keeps & (dest < rows), dest, rows), row)[:rows]
    ahead = torch.arange(rows + 1, device=device)
    if fused:
        # of each sequence first what is kept, as it will lie, and then what is not, as it lies
        at = place - so_far + each(heads + kept + begins[:-1] - fused_before)
        at = torch.where(keeps, dest - begins.index_select(0, sequence), at)
        order = torch.zeros_like(row).scatter(0, torch.where(keeps | left_out, first + at, row), row)
        after = packed.sequence_of(begins, rows + 1)
        offsets = torch.minimum(bounds[after] + ahead - begins[after], bounds[-1])
        dest = torch.where(left_out, each(ends) - 1, dest)
        keeps = keeps | left_out
    else:
        order, offsets = index.clamp(min=0)[: None if row.shape[0] else 0], torch.minimum(ahead, begins[-1])
    dest = dest.masked_fill(~keeps | (dest >= rows), -1)
    return Plan(dest, left_out, index, begins.clamp(max=rows).int(), begins[-1], (order, offsets))


def followed(companion: Tensor, index: Tensor) -> Tensor:
    """Of each place what goes along with its row, 0 where there is none."""
    there = index >= 0
    if not companion.shape[0]:
        return companion.new_zeros(index.shape[0], *companion.shape[1:])
    if not companion.is_floating_point():  # torch knows little of some integers, and their bits only move
        kind = companion.dtype
        companion = companion.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize])
    else:
        kind = None
    found = companion.index_select(0, index.clamp(min=0)).masked_fill(~there.view(-1, *[1] * (companion.dim() - 1)), 0)
    return found if kind is None else found.view(kind)


def selected(
    x: Tensor,
    scores: Tensor,
    k: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    capacity: int,
    *,
    prefix: int,
    rest: str,
    normalize: bool,
    order: str,
    counts: Tensor | None,
    companions: tuple[Tensor, ...],
    norm: tuple[Tensor | None, Tensor | None, float] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, Tensor, Tensor]:
    """All of a `Selection`, of arguments that are checked."""
    with torch.no_grad():
        plan = planned(scores.detach(), k, cu_seqlens, capacity, prefix, rest != "none", order == "index", counts)
        if checks.looked_at(plan.rows) and plan.rows > capacity:
            raise IndexError(
                f"select_tokens: capacity={capacity}, but the sequences keep {plan.rows.item()} rows, and all must fit"
            )
    weight = None
    if rest == "weighted":
        weight = torch.where(plan.left_out, scores.to(accumulation_dtype(x.dtype)), 1.0)
    mean = rest == "mean" or (rest == "weighted" and normalize)
    most = 1 if rest == "none" else max_seqlen
    tokens, _, normed = sum_rows(
        x, plan.dest, capacity, weight=weight, mean=mean, norm=norm, order=plan.order, most=most
    )
    followers = tuple(followed(companion, plan.index) for companion in companions)
    return tokens, plan.index, followers, normed, plan.cu_seqlens.diff().long(), plan.cu_seqlens
