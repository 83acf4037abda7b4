"""Tokens chosen at random: what a choice by attention is to be better than."""

from collections.abc import Sequence
from typing import Any

from .evit import EViT


class Random(EViT):
    """As `EViT`, but the tokens that stay are drawn anew for every image, by torch's random numbers; others are gone.

    Args:
        keep_rate, reduction_loc: as in `EViT`.
        fuse_token: whether the others are fused into one, by random weights.

    Source: the baseline of Haurum et al., Which Tokens to Use? (ICCVW 2023).
    """

    name = "random"

    def __init__(
        self,
        keep_rate: float | Sequence[float] = 0.7,
        reduction_loc: Sequence[int] | None = None,
        fuse_token: bool = False,
    ) -> None:
        super().__init__(keep_rate, reduction_loc, fuse_token)

    def scored_by(self, site: Any) -> str:
        return "random"
