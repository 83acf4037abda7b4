"""EViT: in a few blocks the tokens the class token looks at stay, the others become one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.select_tokens import select_tokens
from ..patching.blocks import attend, feed, whole
from ..patching.engine import Flow, Method, Record, Role, sources_of
from ..patching.modules import fusable
from ..patching.positions import Positions, at
from .options import PartRole, block_indices, per_block, quarters
from .units import choosing_units


class Kept(NamedTuple):
    """What follows chosen tokens, where they have positions or somebody asks.

    Attributes:
        places: ``(B, N)`` int64, the patch of each token, -1 for a fused one.
        source: ``(B, N0)`` int64, the token that each patch is in; None where fused tokens have no use for it.
    """

    places: Tensor
    source: Tensor | None

    def positions(self, positions: Positions | None) -> Positions | None:
        """Those of the tokens, of those of the patches."""
        if positions is None or self.source is None:
            return at(positions, self.places)
        return positions.mean(self.source, self.places.shape[1])


@dataclass(frozen=True)
class Choosing(PartRole):
    """Attention, the choice by its scores, and the MLP.

    Attributes:
        fuse_token: whether those that do not become one.
        scores: "class", the class token's attention, "received", the mean attention a token receives, or "random".
    """

    fuse_token: bool = True
    scores: str = "class"

    @property
    def idle(self) -> bool:
        return self.part >= 1

    @property
    def pads(self) -> bool:
        return self.scores != "random"

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        x, state = flow
        here = positions if state is None else state.positions(positions)
        N = x.shape[1] - self.prefix
        k = self._kept(N)
        if k >= N:
            return Flow(whole(block, x, here), state)
        kind = None if self.scores == "random" else self.scores
        x, looked_at, _ = attend(block, x, scores=kind, positions=here)
        if looked_at is None:
            looked_at = torch.rand(x.shape[:2], device=x.device)
        if state is None and (record is not None or positions is not None):
            places = torch.arange(N, device=x.device).repeat(x.shape[0], 1)
            state = Kept(places, places if self.fuse_token and positions is not None else None)
        chosen = select_tokens(
            x,
            looked_at[:, self.prefix :],
            k,
            prefix=self.prefix,
            rest="weighted" if self.fuse_token else "none",
            normalize=False,
            order="index",  # the set alone matters: no sort
            companions=() if state is None else (state.places,),
            norm=fusable(getattr(block, block.tokenops_family.norm2)),
        )
        if state is not None:
            source = None if state.source is None else _fused(chosen.index, N).gather(1, state.source)
            places = F.pad(chosen.companions[0], (0, int(self.fuse_token)), value=-1)
            if record is not None:
                record.note(chosen.tokens, sources_of(places, record.patches))
            state = Kept(places, source)
        return Flow(feed(block, chosen.tokens, chosen.normed), state)

    def left(self, block: Any, tokens: int, full: int) -> int:
        N = tokens - self.prefix
        k = self._kept(N)
        return tokens if k >= N else self.prefix + k + int(self.fuse_token)

    def _kept(self, patches: int) -> int:
        return math.ceil(self.part * patches)


def _fused(index: Tensor, tokens: int) -> Tensor:
    """Rows ``(B, k)`` that stay, to the new row ``(B, tokens)`` of every one: the others are in row k."""
    k = index.shape[1]
    new = index.new_full((index.shape[0], tokens), k)
    return new.scatter(1, index, torch.arange(k, device=index.device).expand_as(index))


class EViT(Method):
    r"""Drops, in a few blocks, the patch tokens the class token attends to least, or fuses them into one.

    In such a block, with :math:`a` the class token's attention to the N patch tokens, its mean over the heads, and
    :math:`k = \lceil r N \rceil` of them kept:

    .. math:: x \leftarrow x + \mathrm{Attention}(x), \qquad
        x \leftarrow [x_{cls},\; x_i\, (i \in \mathrm{top}_k(a)),\;
        \sum_{j \notin \mathrm{top}_k(a)} a_j x_j], \qquad
        x \leftarrow x + \mathrm{MLP}(x)

    The fused token is one more patch token for the blocks that follow; its rotary or relative position is the mean of
    those of all patches in it, which is ours. Choice, gather, fusion and the MLP's norm are one launch. Without a class
    token the mean attention that tokens receive is the score, which is ours.

    In towers that pack their images whole units of 2 x 2 patches are chosen, by the sum of what they receive:
    :math:`\lceil r u \rceil` of the u units of every image (`tokenops.kept_counts`), in blocks that see whole images.

    Args:
        keep_rate: r, above 0 and at most 1: a number for the blocks of ``reduction_loc``, or one number a block.
        reduction_loc: the blocks that drop tokens, from 0; a quarter, half and three quarters of the depth if None.
        fuse_token: whether the dropped tokens are fused into one; without, they are gone. Packed towers take no other.

    Source: Liang et al., EViT: Expediting Vision Transformers via Token Reorganizations (ICLR 2022), section 3.
    """

    name, setting = "evit", "keep_rate"
    packs = True

    def __init__(
        self,
        keep_rate: float | Sequence[float] = 0.7,
        reduction_loc: Sequence[int] | None = None,
        fuse_token: bool = True,
    ) -> None:
        self.value, self.reduction_loc, self.fuse_token = keep_rate, reduction_loc, fuse_token

    def roles(self, site: Any) -> list[Role]:
        if site.packs:
            return self._units(site)
        site.needs_no_map(self.name)
        where = block_indices("reduction_loc", quarters(site.depth, self.reduction_loc), 0, site.depth)
        rates = per_block("keep_rate", self.value, where, site.depth)
        shares = [float(rate).as_integer_ratio() for rate in rates]
        return [Choosing(site.prefix, False, share, self.fuse_token, self.scored_by(site)) for share in shares]

    def _units(self, site: Any) -> list[Role]:
        if self.fuse_token:
            raise ValueError(
                f"{self.name}: fuse_token=True, but {type(site.owner).__name__} makes one token of every 2 x 2 patches,"
                " which a fused one is not among: give fuse_token=False"
            )
        return choosing_units(site, self.value, self.reduction_loc, self.scored_by(site))

    def scored_by(self, site: Any) -> str:
        return "class" if site.has_class else "received"


def keep_rate_at(epoch: float, base: float, start: float, end: float) -> float:
    r"""The rate of EViT's published training at an epoch: 1 until ``start``, down a cosine to ``base`` at ``end``.

    .. math:: r = base + (1 - base) (1 + \cos(\pi t)) / 2, \qquad t = (epoch - start) / (end - start)

    Args:
        epoch: which, counted from 0; fractions for steps within it.
        base: the rate in the end, above 0 and at most 1.
        start: the epoch at which the rate begins to shrink.
        end: the epoch at which it has shrunk, not before ``start``.

    Raises:
        ValueError: ``base`` or ``end`` is out of range.

    >>> [round(keep_rate_at(epoch, 0.7, start=10, end=110), 3) for epoch in (0, 10, 60, 110, 300)]
    [1.0, 1.0, 0.85, 0.7, 0.7]
    """
    if not 0 < base <= 1:
        raise ValueError(f"base={base}, but it must be above 0 and at most 1")
    if not start <= end:
        raise ValueError(f"end={end}, but it must not be before start={start}")
    if epoch < start:
        return 1.0
    if epoch >= end:
        return float(base)
    return base + (1 - base) * (1 + math.cos(math.pi * (epoch - start) / (end - start))) / 2
