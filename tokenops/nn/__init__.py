"""Modules built on the operators: drop them into any vision transformer."""

from .attention import Attention, compact_channels, convert_attention
from .neighbour_merging import NeighbourMerging, grid_order, raster_order
from .token_slimming import ReverseTokenSlimming, TokenSlimming

__all__ = [
    "Attention",
    "NeighbourMerging",
    "ReverseTokenSlimming",
    "TokenSlimming",
    "compact_channels",
    "convert_attention",
    "grid_order",
    "raster_order",
]
