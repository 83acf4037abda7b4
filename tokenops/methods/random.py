"""Tokens chosen at random: what a choice by attention, or by likeness, is to be better than."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ops.match_sides import match_random
from ..ops.merge_bipartite import Merged, merge_by_index
from ..patching.engine import Role
from .evit import EViT
from .tome import Merging, merging_roles


@dataclass(frozen=True)
class RandomMerging(Merging):
    """As `Merging`, but r tokens are drawn, and each goes into the one of the others it is most like."""

    def merge(self, x: Tensor, keys: Tensor, r: int, sizes: Tensor | None, norm: Any) -> Merged:
        index = match_random(keys[:, self.prefix :], r)
        tokens = x.shape[1] - self.prefix - r
        y, totals, logs, normed = merge_by_index("merge_bipartite", x, index, tokens, self.prefix, sizes, norm)
        return Merged(y, index, totals, logs, normed)


class Random(EViT):
    """Tokens drawn anew for every image, by torch's random numbers, are gone; or, with ``r``, are merged.

    Without ``r``, as `EViT`: the others of a few blocks' tokens stay. With ``r``, as `ToMe`: in every block as many
    tokens are merged as ToMe merges with that r, weighted by sizes, with proportional attention, and brought back
    where ToMe brings them back; but which ones is drawn, and each goes into the one of the others whose key is most
    like its own.

    Args:
        keep_rate: as in `EViT`; 0.7 if neither it nor ``r`` is given.
        reduction_loc: as in `EViT`.
        fuse_token: whether the others are fused into one, by random weights.
        r: how many tokens to merge, in place of dropping: a number, ``(r, inflect)`` or one number a block, as in
            `ToMe`.

    Source: the baseline of Haurum et al., Which Tokens to Use? (ICCVW 2023); the random sides are an ablation of Bolya
    et al., Token Merging (ICLR 2023).
    """

    name = "random"

    def __init__(
        self,
        keep_rate: float | Sequence[float] | None = None,
        reduction_loc: Sequence[int] | None = None,
        fuse_token: bool = False,
        r: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__(0.7 if keep_rate is None else keep_rate, reduction_loc, fuse_token)
        if r is None:
            return
        if keep_rate is not None or reduction_loc is not None or fuse_token:
            raise ValueError(
                f"random: r={r!r} merges in every block, but keep_rate, reduction_loc and fuse_token are of dropping:"
                " give r or these"
            )
        self.setting, self.value = "r", r

    def roles(self, site: Any) -> list[Role]:
        if self.setting == "keep_rate":
            return super().roles(site)
        if site.packs:
            raise ValueError("random: r merges patches one by one, before a packed tower's units: give keep_rate")
        return merging_roles(site, self.value, True, not site.pools_class(), kind=RandomMerging)

    def scored_by(self, site: Any) -> str:
        return "random"
