"""merge_bipartite of packed sequences: matched, then every row is summed where it goes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import checks, layer_norm, match_packed, packed
from .match_packed import matched
from .reference import accumulation_dtype
from .sum_rows import gather_rows, sorted_rows, sum_rows


def checked(
    op: str, x: Any, metric: Any, r: Any, cu_seqlens: Any, max_seqlen: Any, capacity: Any, prefix: Any, sizes: Any,
    companions: Any, norm: Any,
) -> int:  # fmt: skip
    """How long the longest sequence may be; all arguments checked."""
    rows, _ = checks.tensor(op, "x", x, "T,C")
    of_metric = checks.tensor(op, "metric", metric, "T,D", like=x)
    checks.same(op, "rows", "metric", of_metric[0], "x", rows)
    longest = match_packed.checked(op, x, "x", r, cu_seqlens, max_seqlen, prefix)
    if capacity is not None:
        match_packed.count(op, "capacity", capacity)
    if sizes is not None:
        (of_sizes,) = checks.tensor(op, "sizes", sizes, "T", like=x)
        checks.same(op, "rows", "sizes", of_sizes, "x", rows)
    if isinstance(companions, Tensor) or not isinstance(companions, (tuple, list)):
        raise TypeError(f"{op}: companions must be a tuple of tensors, but got {type(companions).__name__}")
    checks.companions(op, len(companions))
    for i, companion in enumerate(companions):
        name = f"companions[{i}]"
        checks.companion_rows(op, name, companion, "T", rows, "x", x)
        if not companion.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a float dtype, since means are taken, but got {companion.dtype}")
    layer_norm.arguments(op, norm, x)
    return longest


def unmerged(op: str, y: Tensor, index: Any) -> Tensor:
    """`unmerge_bipartite` of packed sequences."""
    rows, _ = checks.tensor(op, "y", y, "K,C")
    checks.tensor(op, "index", index, "T", like=y, floating=False)
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be int64, but got {index.dtype}")
    checks.places(op, "index", index, rows, lambda: f"it must be from -1 to {rows - 1}", lowest=-1)
    return gather_rows(y, index)


def merged(
    x: Tensor,
    metric: Tensor,
    r: int | Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    capacity: int | None,
    *,
    prefix: int,
    sizes: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    companions: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...], Tensor]:
    """All of a `Merged`, of arguments that are checked."""
    rows = x.shape[0] if capacity is None else capacity
    index, ends = matched(metric, r, cu_seqlens, max_seqlen, prefix)
    if capacity is not None:
        index, ends = _cut(index, ends, rows)
    weight, shares, head, goes = None, None, None, index
    if sizes is not None:
        shares = sizes.detach().to(accumulation_dtype(x.dtype))
        head = _heads(cu_seqlens, x.shape[0], prefix)
        weight = torch.where(head, 1.0, shares)  # the rows of a prefix are copied
        goes = index.masked_fill(weight == 0, -1)  # nothing, whatever it holds

    order = sorted_rows(goes, rows) if companions else None  # once for all
    most = (max_seqlen + 1) // 2 + 1

    def means(values: Tensor, norm: tuple[Tensor | None, Tensor | None, float] | None = None):
        wide = None if weight is None else weight.to(accumulation_dtype(values.dtype))
        return sum_rows(values, goes, rows, weight=wide, mean=True, norm=norm, order=order, most=most)

    tokens, totals, normed = means(x, norm)
    if head is not None and shares is not None and prefix:  # whose sizes are passed on
        totals = pad(totals, (0, 1)).scatter(0, torch.where(head & (index >= 0), index, rows), shares)[:rows]
    followers = tuple(means(c.unsqueeze(1))[0].squeeze(1) if c.dim() == 1 else means(c)[0] for c in companions)
    return tokens, index, totals, totals.log(), normed, followers, ends


def _cut(index: Tensor, ends: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """To so many rows of the result; on a CPU what does not fit is an error."""
    if checks.looked_at(ends) and ends[-1] > capacity:
        raise IndexError(f"merge_bipartite: capacity={capacity}, but {ends[-1].item()} rows are left, and all must fit")
    return index.masked_fill(index >= capacity, -1), ends.clamp(max=capacity)


def _heads(cu_seqlens: Tensor, rows: int, prefix: int) -> Tensor:
    """Which rows are of the prefix of a sequence, (rows,) bool."""
    sequence = packed.sequence_of(cu_seqlens, rows)
    place = torch.arange(rows, device=cu_seqlens.device) - cu_seqlens.long()[sequence]
    return (place < prefix) & (sequence < cu_seqlens.shape[0] - 1)
