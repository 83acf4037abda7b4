"""Packed sequences: the tokens of S sequences of unequal lengths, one behind the other, told apart by boundaries.

``cu_seqlens`` is int32 ``(S+1,)`` on the tokens' device: sequence s has rows ``cu_seqlens[s]`` to ``cu_seqlens[s+1]``,
from 0 on, in order; sequences may be empty, and rows behind the last (slack) are of none. ``max_seqlen`` is a number on
the host that no sequence is longer than. No value of a boundary reaches the host on a GPU, so that a CUDA graph that is
captured for so many rows runs any sequences in them; the specification of attention alone looks at them, which serves
fp64 and gradients of gradients there. On a CPU boundaries are looked at, and checked.
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import checks


def boundaries(
    op: str, cu_seqlens: Any, max_seqlen: Any, rows: int, like: Tensor, of: str = "", tokens: str = "tokens"
) -> int:
    """S of `cu_seqlens` and `max_seqlen` (with "_k" behind their names, say), checked: of so many rows of `tokens`."""
    name, longest = f"cu_seqlens{of}", f"max_seqlen{of}"
    (count,) = checks.tensor(op, name, cu_seqlens, "S+1", like=like, floating=False)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, but got {cu_seqlens.dtype}")
    if count < 1:
        raise ValueError(f"{op}: {name} must have the first row of every sequence and the end, but is empty")
    if max_seqlen is None:
        raise ValueError(f"{op}: {name} needs {longest}, the rows of the longest sequence or more")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"{op}: {longest} must be an int, but got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"{op}: {longest}={max_seqlen}, but it must be 0 or more")
    if checks.looked_at(cu_seqlens):
        ends = cu_seqlens.tolist()
        for i, end in enumerate(ends):
            before = ends[i - 1] if i else 0
            if end < before or (i == 0 and end != 0):
                what = "0" if i == 0 else f"at least the {before} before it"
                raise ValueError(f"{op}: {name}[{i}]={end}, but it must be {what}")
            if i and end - before > max_seqlen:
                raise ValueError(f"{op}: {longest}={max_seqlen}, but sequence {i - 1} has {end - before} rows")
        if ends[-1] > rows:
            raise ValueError(f"{op}: {name}[-1]={ends[-1]}, but there are {rows} rows of {tokens}")
    return count - 1


def not_with_boundaries(op: str, cu_seqlens: Any, max_seqlen: Any, **others: Any) -> None:
    """What cannot be given: `max_seqlen` without boundaries, others with them."""
    if cu_seqlens is None and max_seqlen is not None:
        raise ValueError(f"{op}: max_seqlen={max_seqlen!r}, but it needs cu_seqlens")
    for name, value in others.items():
        if cu_seqlens is not None and value is not None:
            raise ValueError(f"{op}: {name} is not taken with cu_seqlens: the boundaries say how long a sequence is")


def each(cu_seqlens: Tensor) -> Iterator[slice]:
    """The rows of every sequence; looks at the boundaries."""
    ends = cu_seqlens.tolist()
    return (slice(begin, end) for begin, end in zip(ends, ends[1:]))


def sequence_of(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Which sequence each row is of, int64 (rows,): S for slack. Looks at nothing."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def padded(tensor: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """The sequences of (T, ...) apart, (S, rows, ...), zeros behind their ends. Looks at nothing, reads no slack."""
    spare = torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))
    row = cu_seqlens[:-1, None] + torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    places = row.masked_fill(row >= cu_seqlens[1:, None], tensor.shape[0])
    return spare.index_select(0, places.flatten()).unflatten(0, places.shape)


@overload
def kept_counts(lengths: Tensor, keep_rate: float, *, minimum: int = 1, multiple: int = 1) -> Tensor: ...
@overload
def kept_counts(lengths: Sequence[int], keep_rate: float, *, minimum: int = 1, multiple: int = 1) -> list[int]: ...
def kept_counts(
    lengths: Sequence[int] | Tensor, keep_rate: float, *, minimum: int = 1, multiple: int = 1
) -> list[int] | Tensor:
    r"""How many tokens of each sequence are kept at a rate: the same integers on the host and on a device.

    .. math:: \mathrm{count} = \min\bigl(n,\; m \cdot \max(\lceil \mathrm{rate} \cdot \lfloor n / m \rfloor \rceil,
        \lceil \mathrm{minimum} / m \rceil)\bigr)

    of n tokens in units of m = ``multiple``. The rate is taken as the fraction that its decimals say (0.07 is 7/100),
    so nothing depends on how a product is rounded, and who sizes a prompt before the encoder runs gets its count.

    Args:
        lengths: n of each sequence: a list (or any sequence) of ints, or an integer tensor of any shape.
        keep_rate: above 0 and at most 1.
        minimum: so many are kept at least, as far as there are.
        multiple: tokens of a unit that is kept whole: 4 for patches that a tower merges 2 x 2. Every n must be a
            multiple of it (checked on a host and a CPU).

    Returns:
        A list of ints for a list, an int64 tensor on the same device for a tensor.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a rate, minimum, multiple or length is out of range.

    >>> kept_counts([256, 64, 4, 0], 0.3, multiple=4)
    [80, 20, 4, 0]
    """
    from fractions import Fraction  # not with `import tokenops`

    op = "kept_counts"
    checks.number(op, "keep_rate", keep_rate, "a number")
    if not 0 < keep_rate <= 1:
        raise ValueError(f"{op}: keep_rate={keep_rate!r}, but it must be above 0 and at most 1")
    for name, value in (("minimum", minimum), ("multiple", multiple)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an int, but got {value!r}")
        if value < (name == "multiple"):
            raise ValueError(f"{op}: {name}={value}, but it must be {int(name == 'multiple')} or more")
    rate = Fraction(keep_rate).limit_denominator(10**6)
    rate = rate or Fraction(1, 10**6)
    least = -(-minimum // multiple)
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{op}: lengths must be integers, but got {lengths.dtype}")
        if checks.looked_at(lengths):
            _whole(op, lengths.flatten().tolist(), multiple)
        wide = lengths.long()
        units = wide // multiple
        kept = (units * rate.numerator + (rate.denominator - 1)) // rate.denominator
        return torch.minimum(kept.clamp(min=least) * multiple, wide)
    counts = list(lengths)
    _whole(op, counts, multiple)
    units_of = (n // multiple for n in counts)
    kept_of = (max(-(-units * rate.numerator // rate.denominator), least) for units in units_of)
    return [min(n, kept * multiple) for n, kept in zip(counts, kept_of)]


def _whole(op: str, lengths: list[Any], multiple: int) -> None:
    for i, n in enumerate(lengths):
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{op}: lengths[{i}] must be an int, but got {n!r}")
        if n < 0 or n % multiple:
            raise ValueError(f"{op}: lengths[{i}]={n}, but it must be a multiple of {multiple}, and 0 or more")


def split_like(index: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The boundaries of another partition of the same rows (the windows of a tower, say) over the rows that are kept.

    .. math:: \\mathrm{cu}'_s = |\\{j : 0 \\le \\mathrm{index}_j < \\mathrm{cu}_s\\}|

    Args:
        index: ``(K,)`` int64 or int32, the old row of each kept one (`tokenops.select_tokens` of packed sequences gives
            it, with ``order="index"``, in which they lie one behind the other within the other partition, too); -1, in
            padding and for a fused token, is of no sequence.
        cu_seqlens: ``(S+1,)`` int32, the partition of all rows.

    Returns:
        ``(S+1,)`` int32 on the same device: sequences of which nothing is left are empty. Nothing reaches the host.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.

    >>> split_like(torch.tensor([0, 1, 5, -1]), torch.tensor([0, 4, 8], dtype=torch.int32)).tolist()
    [0, 2, 3]
    """
    op = "split_like"
    checks.tensor(op, "index", index, "K", floating=False)
    checks.tensor(op, "cu_seqlens", cu_seqlens, "S+1", like=index, floating=False)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: index must be int64 or int32, but got {index.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be int32, but got {cu_seqlens.dtype}")
    last = torch.iinfo(torch.int64).max
    ordered = index.long().masked_fill(index < 0, last).sort().values
    return torch.searchsorted(ordered, cu_seqlens.long(), out_int32=True)
