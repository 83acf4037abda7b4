"""ToMe: the tokens that are most alike become one, in every block, between attention and MLP."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.merge_bipartite import Merged, merge_bipartite, unmerge_bipartite
from ..ops.reference import accumulation_dtype
from ..patching.blocks import attend, feed
from ..patching.engine import Flow, Method, Record, Role
from ..patching.modules import fusable
from ..patching.positions import Positions
from .options import is_number


class Merges(NamedTuple):
    """What follows merged tokens.

    Attributes:
        sizes: ``(B, P+M)`` int32, how many patches each token stands for.
        log_sizes: their logarithms, in the accumulation dtype.
        source: ``(B, N0)`` int64, the token each patch is in; None where nobody asks.
        places: ``(B, M)`` int64, the patch whose position each token has; None where it has the mean of all of its.
    """

    sizes: Tensor
    log_sizes: Tensor
    source: Tensor | None
    places: Tensor | None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What tokens of a dtype add to the logits: by sizes anew where a wrapper has cast their logarithms."""
        wide = accumulation_dtype(dtype)
        return self.log_sizes if self.log_sizes.dtype == wide else self.sizes.to(wide).log()


@dataclass(frozen=True)
class Merging(Role):
    """Attention by sizes, a merge of r tokens, and the MLP.

    Attributes:
        r: how many, at most half of the patch tokens that are left.
        prop_attn: whether a token counts by its size in attention.
        unmerge: whether every patch gets a token again where the model takes them.
        destination: whether a merged token has the position of the one that others went into.
    """

    r: int = 0
    prop_attn: bool = True
    unmerge: bool = False
    destination: bool = False

    @property
    def idle(self) -> bool:
        return self.r == 0

    @property
    def pads(self) -> bool:
        return True

    @property
    def mapped(self) -> bool:
        return self.unmerge

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        x, state = flow
        r = self._fits(x.shape[1] - self.prefix)
        bias = state.bias(x.dtype) if state is not None and self.prop_attn else None
        here = self._here(x, state, positions)
        x, _, keys = attend(block, x, key_bias=bias, key_mean=r > 0, positions=here)
        if keys is None:
            x = feed(block, x)
        else:
            x, state = self._merged(block, x, keys, r, state, record, here)
        return Flow(x, state)

    def _here(self, x: Tensor, state: Any, positions: Positions | None) -> Positions | None:
        """Where the tokens are, of where the patches are."""
        if positions is None or state is None:
            return positions
        if self.destination:
            return positions.at(state.places)
        return positions.mean(state.source, x.shape[1] - self.prefix)

    def _merged(
        self, block: Any, x: Tensor, keys: Tensor, r: int, state: Any, record: Record | None, here: Positions | None
    ) -> tuple[Tensor, Merges]:
        sizes, placed = None if state is None else state.sizes.to(torch.float32), here is not None
        if here is not None and here.hidden is not None:  # padding is of no size, and merged when nothing else is left
            sizes = (~here.hidden).to(torch.float32) if sizes is None else sizes
            keys = keys.masked_fill(here.hidden.unsqueeze(2), math.nan)
        norm = fusable(getattr(block, block.tokenops_family.norm2))
        merged = self.merge(x, keys, r, sizes, norm)
        source = places = None
        if record is not None or self.unmerge or placed:
            source = merged.index if state is None else merged.index.gather(1, state.source)
        if record is not None:
            record.note(merged.tokens, source)
        if placed and self.destination:
            tokens = merged.tokens.shape[1] - self.prefix
            places = _kept(merged.index, None if state is None else state.places, tokens, self.prefix)
        new = Merges(merged.sizes.to(torch.int32), merged.log_sizes, source, places)
        return feed(block, merged.tokens, merged.normed), new

    def merge(self, x: Tensor, keys: Tensor, r: int, sizes: Tensor | None, norm: Any) -> Merged:
        """r tokens merged, those that are most alike by the keys."""
        return merge_bipartite(x, keys, r, prefix=self.prefix, sizes=sizes, norm=norm)

    def left(self, block: Any, tokens: int, full: int) -> int:
        return tokens - self._fits(tokens - self.prefix)

    def _fits(self, patches: int) -> int:
        """r, or half of the patch tokens."""
        most = patches // 2
        return min(self.r, int(most) if isinstance(most, Tensor) else most)  # torch.jit.trace gives sizes as tensors

    def spread(self, tokens: Tensor, state: Any, finish: Any, prefix: int = 0) -> Tensor | None:
        return unmerge_bipartite(tokens, state.source, prefix=prefix)


def _kept(index: Tensor, places: Tensor | None, tokens: int, prefix: int) -> Tensor:
    """The patches ``(B, M)`` of the tokens that others went into, and of those alone: odd rows are written last."""
    if places is None:
        places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    even, odd = prefix % 2, 1 - prefix % 2
    new = places.new_zeros(places.shape[0], tokens)
    new = new.scatter(1, index[:, even::2], places[:, even::2])
    return new.scatter(1, index[:, odd::2], places[:, odd::2])


class ToMe(Method):
    """Token merging: r tokens in every block.

    Args:
        r: a number, ``(r, inflect)`` (as many in all, from ``r * (1 - inflect)`` in the first block on a line to
            ``r * (1 + inflect)`` in the last) or a list, a number a block; never more than half of the patch tokens
            that are left.
        prop_attn: whether attention counts a token by its size.
        unmerge: whether every patch gets a token again behind the last block; None where the model does not classify by
            its class token alone.
        positions: of merged tokens, where the model has rotary or relative ones: "mean", that of the rows of all their
            patches, or "destination", those of the token that the others went into. Ours: the paper has neither.

    Tokens are compared by their keys before rotary positions turn them.

    Source: Bolya et al., Token Merging: Your ViT But Faster (ICLR 2023), section 3.
    """

    name, setting = "tome", "r"

    def __init__(
        self,
        r: float | Sequence[float] | None = None,
        prop_attn: bool = True,
        unmerge: bool | None = None,
        positions: str = "mean",
    ) -> None:
        if positions not in ("mean", "destination"):
            raise ValueError(f"tome: positions={positions!r}, but it must be 'mean' or 'destination'")
        self.value, self.prop_attn, self.unmerge, self.positions = r, prop_attn, unmerge, positions

    def roles(self, site: Any) -> list[Role]:
        if site.maps is not None and self.unmerge is False:
            raise ValueError(
                f"tome: unmerge=False, but {site.maps} expects every patch token in its place: leave it out"
            )
        if self.value is None:
            raise TypeError("tome needs r, how many tokens to merge in every block: apply_patch(model, 'tome', r=8)")
        unmerge = not site.pools_class() if self.unmerge is None else self.unmerge
        far = self.positions == "destination"
        return merging_roles(site, self.value, self.prop_attn, unmerge, far)


def merging_roles(
    site: Any, r: Any, prop_attn: bool, unmerge: bool, destination: bool = False, kind: type[Merging] = Merging
) -> list[Role]:
    """A role that merges for each block; r as in `ToMe`."""
    counts = merged_per_block(r, site.depth)
    return [kind(site.prefix, False, count, prop_attn, unmerge, destination) for count in counts]


def merged_per_block(r: Any, depth: int) -> tuple[int, ...]:
    """How many tokens each block merges, from a number, ``(r, inflect)`` or one number a block.

    >>> merged_per_block(8, 3), merged_per_block((8, -1), 3), merged_per_block((8, 0.5), 3)
    ((8, 8, 8), (16, 8, 0), (4, 8, 12))
    """
    if isinstance(r, tuple) and len(r) == 2:
        mean, inflect = r
        if not is_number(mean) or not is_number(inflect) or not -1 <= inflect <= 1 or not 0 <= mean < math.inf:
            raise ValueError(f"r={r!r}, but of (r, inflect) r must be at least 0 and inflect between -1 and 1")
        first = int(mean * (1 - inflect))
        slope = 2 * (mean - first) / max(depth - 1, 1)
        return tuple(int(first + slope * i) for i in range(depth)) if depth > 1 else (int(mean),)
    given = (r,) * depth if is_number(r) else tuple(r) if isinstance(r, (list, tuple)) else ()
    if len(given) != depth or not all(is_number(value) and 0 <= value < math.inf for value in given):
        raise ValueError(
            f"r={r!r}, but it must be a number of at least 0, (r, inflect), or a list of one number for each of"
            f" {depth} blocks"
        )
    return tuple(int(value) for value in given)
