"""Where tokens are, as a block is told beside them: and where those are that are left."""

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """What attention knows of where the patches are: rotary tables, biases of pairs, or both.

    Attributes:
        tables: rotary tables, each ``(N, D)``, ``(H, N, D)`` where heads have their own, or ``(B, H or 1, N, D)``, of
            the patch tokens; the prefix is not turned.
        bias: ``(1 or B, H or 1, P+N, P+N)``, added to the logits: of relative positions, say; or None.
        prefix: P.
    """

    tables: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    prefix: int = 0

    def at(self, places: Tensor) -> "Positions":
        """Those of some patches, in their order: ``(n,)`` for all images, or ``(B, n)``."""
        tables = tuple(_rows(table, places) for table in self.tables)
        if self.bias is None:
            return Positions(tables, None, self.prefix)
        prefix = torch.arange(self.prefix, device=places.device).expand(*places.shape[:-1], -1)
        rows = torch.cat((prefix, places + self.prefix), dim=-1)
        bias = _rows(self.bias, rows)
        return Positions(tables, _rows(bias.transpose(-2, -1), rows).transpose(-2, -1), self.prefix)

    def mean(self, source: Tensor, tokens: int) -> "Positions":
        r"""Those of merged tokens: the mean over the patches that each stands for.

        .. math:: \bar t_m = \frac{1}{|\{n: s_n = m\}|} \sum_{n:\, s_n = m} t_n

        The mean of the rows of a rotary table makes the logit of equal merged keys the mean of their logits, which
        the row at their mean position does not. A bias is averaged over both of its sides.

        Args:
            source: ``(B, N)`` int64, the token that each patch is in; -1 for none. A token without a patch gets zeros.
            tokens: n.
        """
        into = source.unsqueeze(1) == torch.arange(tokens, device=source.device).unsqueeze(1)
        shares = into / into.sum(dim=2, keepdim=True).clamp(min=1)
        tables = tuple(shares.to(t.dtype).unsqueeze(1) @ (t if t.dim() > 2 else t.unsqueeze(0)) for t in self.tables)
        if self.bias is None:
            return Positions(tables, None, self.prefix)
        B, P = source.shape[0], self.prefix
        whole = shares.new_zeros(B, P + tokens, self.bias.shape[-1])
        whole[:, :P, :P] = torch.eye(P, device=source.device)
        whole[:, P:, P:] = shares
        whole = whole.to(self.bias.dtype).unsqueeze(1)
        return Positions(tables, whole @ self.bias @ whole.transpose(-2, -1), P)


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
