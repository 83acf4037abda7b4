"""SiT: learned mixtures of the tokens before a few blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..nn import TokenSlimming
from ..patching.blocks import whole
from ..patching.engine import Flow, Method, Record, Role
from ..patching.positions import Positions
from .options import block_indices, quarters


class Mixed(NamedTuple):
    """What follows slim tokens, where they have positions or somebody asks.

    Attributes:
        weights: ``(B, M, N0)``, what they draw on.
    """

    weights: Tensor


@dataclass(frozen=True)
class Slimming(Role):
    """A block with a token slimming before it, or without one.

    Attributes:
        slims: whether there is one.
    """

    slims: bool = False

    @property
    def idle(self) -> bool:
        return not self.slims

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        x, state = flow
        if self.slims:
            slimming = block.slimming
            if record is not None or positions is not None:
                drawn = slimming.aggregation(x, self.prefix).transpose(1, 2)
                state = Mixed(drawn if state is None else drawn @ state.weights)
            x = slimming(x, prefix=self.prefix)  # the weights anew: the operator never has them whole
            if record is not None:
                record.note(x, None, state.weights)
        here = positions if positions is None or state is None else positions.mixed(state.weights)
        return Flow(whole(block, x, here), state)

    def left(self, block: Any, tokens: int, full: int) -> int:
        return self.prefix + block.slimming.slim_tokens if self.slims else tokens


class SiT(Method):
    r"""Learned mixtures of the tokens before a few blocks: self-slimmed vision transformers.

    Args:
        keeping_ratio: above 0, at most 1: behind slimming i (from 1) ``int(N * keeping_ratio**i)`` of N patch tokens
            are left.
        locations: the blocks with a slimming before them, from 0; a quarter, half and three quarters of the depth if
            not given.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.2.
    """

    name, scores, entry = "sit", False, "slimming"

    def __init__(self, keeping_ratio: float = 0.5, locations: Sequence[int] | None = None) -> None:
        if isinstance(keeping_ratio, bool) or not 0 < keeping_ratio <= 1:
            raise ValueError(f"keeping_ratio={keeping_ratio}, but it must be above 0 and at most 1")
        self.keeping_ratio, self.locations = keeping_ratio, locations

    def roles(self, site: Any) -> list[Role]:
        slims = self._left(site)
        return [Slimming(site.prefix, False, i in slims) for i in range(site.depth)]

    def parts(self, site: Any) -> dict[int, tuple[str, Any]]:
        return {i: ("slimming", TokenSlimming(site.dim, tokens)) for i, tokens in self._left(site).items()}

    def _left(self, site: Any) -> dict[int, int]:
        """Tokens that are left by each slimming, by its block."""
        site.needs_no_map("sit")
        patches = site.needs_grid("sit")[0]
        where = block_indices("locations", quarters(site.depth, self.locations), 0, site.depth)
        left = [int(patches * self.keeping_ratio**i) for i in range(1, len(where) + 1)]
        if self.keeping_ratio == 1:
            return {}
        if left and left[-1] < 1:
            raise ValueError(f"keeping_ratio={self.keeping_ratio} leaves none of {patches} tokens")
        return dict(zip(where, left))
