"""Modules built on the operators: drop them into any vision transformer."""

from .token_slimming import ReverseTokenSlimming, TokenSlimming

__all__ = ["ReverseTokenSlimming", "TokenSlimming"]
