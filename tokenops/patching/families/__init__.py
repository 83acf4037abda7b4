"""The kinds of blocks by the names of their classes."""

from typing import Any

from ..modules import name_of, unwrapped
from ..positions import Positions
from . import hf, packed, timm, torch
from .base import PATCH_ANEW, UNNORMED, Family

#: the blocks that can be patched: exactly these, as a class derived from one may compute something else
FAMILIES: dict[str, type[Family]] = {**timm.ROWS, **torch.ROWS, **hf.ROWS, **packed.ROWS}

PADDED = timm.PADDED

#: what a patched model has none of
_REFUSED = ("attn_mask", "attention_mask", "is_causal", "output_attentions")


def family_of(block: Any) -> type[Family]:
    """The kind of a block, patched or not."""
    return getattr(type(block), "tokenops_family", None) or FAMILIES[name_of(block)]


def positions(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], prefix: int) -> Positions | None:
    """Where the patches are, of what a block is given behind the tokens.

    Raises:
        ValueError: there is a mask, or attention weights are asked for.
    """
    family = family_of(block)
    config = getattr(next(map(family.core, family.attentions_of(block)), None), "config", None)
    if getattr(config, "output_attentions", False):
        raise ValueError("config.output_attentions is on, but a patched model has no attention weights of all tokens")
    given = {**dict(zip(family.arguments, args)), **kwargs}
    for name in _REFUSED:
        if given.get(name) is not None and given[name] is not False and name not in family.tables:
            padded = " (of padded patches, by images of one size)" if name == "attn_mask" else ""
            raise ValueError(
                f"{name} was given to a patched model, whose tokens change between blocks: leave it out{padded}"
            )
    return family.positions(block, given, prefix)


def head_width(block: Any) -> int:
    """Channels of the widest head of a block."""
    family = family_of(block)
    return max(family.width(unwrapped(attention)) for attention in family.attentions_of(block) or [block])


__all__ = ["FAMILIES", "PADDED", "PATCH_ANEW", "UNNORMED", "Family", "family_of", "head_width", "positions"]
