"""Modules built on the operators: drop them into any vision transformer."""

from .attention import Attention, compact_channels, convert_attention
from .token_slimming import ReverseTokenSlimming, TokenSlimming

__all__ = ["Attention", "ReverseTokenSlimming", "TokenSlimming", "compact_channels", "convert_attention"]
