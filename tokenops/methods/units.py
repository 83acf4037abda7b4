"""Choosing whole units of patches in towers whose images are packed in one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.packed import kept_counts
from ..ops.select_tokens import select_tokens
from ..patching.blocks import attend, feed, whole
from ..patching.engine import Flow, Record, Role
from ..patching.packed import Left
from .options import PartRole, block_indices, per_block, quarters


@dataclass(frozen=True)
class ChoosingUnits(PartRole):
    """Attention, the choice of units by its scores, and the MLP.

    Attributes:
        unit: how many rows, one behind the other, stay or go together.
        scores: "received", the mean attention that a unit's tokens receive in their image, or "random".
        longest: how many rows a window has at most; None for a block that sees whole images.
    """

    unit: int = 4
    scores: str = "received"
    longest: int | None = None

    @property
    def idle(self) -> bool:
        return self.part >= 1

    def run(self, block: Any, flow: Flow, positions: Any, record: Record | None) -> Flow:
        x, state = flow
        if positions.max_seqlen is None:
            positions = positions._replace(max_seqlen=self.longest)
        here = positions if state is None else positions.at(state.units, self.unit)
        if self.idle:
            return Flow(whole(block, x, here), state)
        cu_seqlens = here.cu_seqlens // self.unit
        lengths = cu_seqlens.diff().tolist()
        counts = kept_counts(lengths, self.part)
        if counts == lengths:
            return Flow(whole(block, x, here), state)
        x, looked_at, _ = attend(block, x, scores=None if self.scores == "random" else self.scores, positions=here)
        scores = torch.rand(x.shape[0], device=x.device) if looked_at is None else looked_at
        chosen = select_tokens(
            x.unflatten(0, (-1, self.unit)).flatten(1),
            scores.unflatten(0, (-1, self.unit)).sum(dim=1),
            max(counts),
            prefix=0,
            order="index",
            counts=kept_counts(cu_seqlens.diff(), self.part),
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths),
            capacity=sum(counts),
        )
        x = feed(block, chosen.tokens.unflatten(1, (self.unit, -1)).flatten(0, 1))
        return Flow(x, Left(chosen.index if state is None else state.units[chosen.index]))

    def left(self, block: Any, tokens: int, full: int) -> int:
        return kept_counts([tokens], self.part, multiple=self.unit)[0]


def choosing_units(
    site: Any, keep_rate: float | Sequence[float], where: Sequence[int] | None, scores: str
) -> list[Role]:
    """The roles of the blocks of a packed tower.

    Without ``where`` the blocks at a quarter, half and three quarters of the depth choose; of a tower with windows the
    blocks nearest to these whose attention is over whole images.
    """
    full = getattr(site.owner, "fullatt_block_indexes", None)
    full = [i for i in range(site.depth) if full is None or i in full]
    if where is None and full:
        where = sorted({min(full, key=lambda i: abs(i - block)) for block in quarters(site.depth, None)})
    blocks = block_indices("reduction_loc", quarters(site.depth, where), 0, site.depth)
    rates = per_block("keep_rate", keep_rate, blocks, site.depth)
    for i, rate in enumerate(rates):
        if rate < 1 and i not in full:
            raise ValueError(
                f"block {i} is to choose tokens, but attends within windows, where attention says nothing of the whole"
                f" image: choose blocks of {tuple(full)}"
            )
    unit = site.owner.spatial_merge_size**2
    side = getattr(site.owner, "window_size", 0) // site.owner.spatial_merge_size // site.owner.config.patch_size
    shares = (float(rate).as_integer_ratio() for rate in rates)
    return [
        ChoosingUnits(site.prefix, False, share, unit, scores, None if i in full else side**2 * unit)
        for i, share in enumerate(shares)
    ]
