"""Where tokens are, as a block is told beside them: and where those are that are left."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.packed import split_like
from ..ops.reference import accumulation_dtype, keeps_dtypes


class Positions(NamedTuple):
    """What attention knows of where the patches are: rotary tables, biases of pairs, or both; and which are none.

    Attributes:
        tables: rotary tables, each ``(N, D)``, ``(H, N, D)`` where heads have their own, or ``(B, H or 1, N, D)``, of
            the patch tokens; the prefix is not turned.
        bias: ``(1 or B, H or 1, P+N, P+N)``, added to the logits: of relative positions, say; or None.
        prefix: P.
        hidden: ``(B, P+N)`` bool: tokens that are padding, which nobody attends to; None without. A merged token is
            where all of its patches are.
    """

    tables: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    prefix: int = 0
    hidden: Tensor | None = None

    def at(self, places: Tensor) -> "Positions":
        """Those of some patches, in their order: ``(n,)`` for all images, or ``(B, n)``."""
        tables = tuple(_rows(table, places) for table in self.tables)
        if self.bias is None and self.hidden is None:
            return Positions(tables, None, self.prefix)
        prefix = torch.arange(self.prefix, device=places.device).expand(*places.shape[:-1], -1)
        rows = torch.cat((prefix, places + self.prefix), dim=-1)
        bias, hidden = self.bias, self.hidden
        if bias is not None:
            bias = _rows(_rows(bias, rows).transpose(-2, -1), rows).transpose(-2, -1)
        if hidden is not None:
            hidden = hidden.gather(1, rows.expand(hidden.shape[0], -1))
        return Positions(tables, bias, self.prefix, hidden)

    def mean(self, source: Tensor, tokens: int) -> "Positions":
        r"""Those of merged tokens: the mean over the patches that each stands for.

        .. math:: \bar t_m = \frac{1}{|\{n: s_n = m\}|} \sum_{n:\, s_n = m} t_n

        The size-weighted mean over the tokens that were merged, and for one patch its row to the bit.

        Args:
            source: ``(B, N)`` int64, or ``(1, N)`` where it is that of all images: the token that each patch is in; -1
                for none. A token without a patch gets zeros.
            tokens: n.
        """
        into = source.unsqueeze(1) == torch.arange(tokens, device=source.device).unsqueeze(1)
        if self.hidden is not None:
            into = into & ~self.hidden[:, None, self.prefix :]  # padding is of no size
        known = self.tables[0] if self.tables else self.bias
        into = into.to(torch.float32 if known is None else accumulation_dtype(known.dtype))
        return self.mixed(into / into.sum(dim=2, keepdim=True).clamp(min=1))

    @keeps_dtypes
    def mixed(self, weights: Tensor) -> "Positions":
        r"""Those of mixtures of patches: the weighted mean :math:`\bar t_m = \sum_n w_{mn} t_n` of their rows.

        Logits are linear in the rows, so patches of equal keys in a mixture get the mean of their logits, which the
        row at their mean place would not give. A bias is averaged over both of its sides.

        Args:
            weights: ``(B or 1, n, N)``, 1 in sum over N.
        """
        tables = tuple(weights.to(t.dtype).unsqueeze(1) @ (t if t.dim() > 2 else t.unsqueeze(0)) for t in self.tables)
        P, hidden = self.prefix, self.hidden
        if hidden is not None:
            seen = ((weights > 0) & ~hidden[:, None, P:]).any(dim=2)
            hidden = torch.cat((hidden[:, :P], ~seen), dim=1)
        if self.bias is None:
            return Positions(tables, None, P, hidden)
        whole = torch.cat((weights.new_zeros(*weights.shape[:2], P), weights), dim=2)
        first = torch.eye(P, whole.shape[2], dtype=whole.dtype, device=whole.device)
        whole = torch.cat((first.expand(whole.shape[0], -1, -1), whole), dim=1)
        whole = whole.to(self.bias.dtype).unsqueeze(1)
        return Positions(tables, whole @ self.bias @ whole.transpose(-2, -1), P, hidden)

    def hiding(self, dtype: torch.dtype) -> Tensor | None:
        """What keeps padding from being attended to: ``(B, 1, 1, P+N)``, to be added to the logits; None without."""
        if self.hidden is None:
            return None
        zero = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
        return zero.masked_fill(self.hidden, float("-inf"))[:, None, None]


class Packing(NamedTuple):
    """What attention knows of packed tokens: their rotary tables, and which are of one image or window.

    Attributes:
        tables: cosines and sines, each ``(T, D)``.
        cu_seqlens: ``(S+1,)`` int32, the first row of every image or window, and the end.
        max_seqlen: a number that none has more rows than, or None.
        hidden: None: nothing is padding.
    """

    tables: tuple[Tensor, ...]
    cu_seqlens: Tensor
    max_seqlen: int | None = None
    hidden: None = None

    def at(self, units: Tensor, size: int) -> "Packing":
        """Those of some units of ``size`` rows each, by ascending number; the images or windows that they are in."""
        tables = tuple(t.unflatten(0, (-1, size)).index_select(0, units).flatten(0, 1) for t in self.tables)
        return Packing(tables, split_like(units, self.cu_seqlens // size) * size, self.max_seqlen)

    def longest(self, rows: int) -> int:
        """What none of the sequences of so many rows is longer than."""
        return rows if self.max_seqlen is None else min(rows, self.max_seqlen)


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """Rows of a table ``(..., N, D)``, the same of all images, or those of each: ``(B, H or 1, n, D)``."""
    if places.dim() == 1:
        return table.index_select(-2, places)
    B = places.shape[0]
    full = table.expand(B, *table.shape[-3:]) if table.dim() > 2 else table.expand(B, 1, *table.shape)
    index = places[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
    return full.gather(2, index)


def at(positions: Positions | None, places: Tensor | None) -> Positions | None:
    """The positions of some patches; as they are where none are known, or all patches are there."""
    return positions if positions is None or places is None else positions.at(places)
