"""Compaction: the channels that are masked taken out of the weights, for a smaller model of plain layers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import compact_channels
from ...patching.dressing import dress_as
from .blocks import Mlp, blocks_of, compact_mlp
from .compactors import drop_biases, fold_compactors


def compact(model: nn.Module) -> Any:
    """A physically smaller model with the results of a masked one: channels whose mask is 0 are gone.

    Masks that are neither 0 nor 1 are folded into the weights, compactors too. The scale of the logits stays that of
    the unpruned head; the key bias becomes 0 and the value bias part of the output bias, which changes nothing.
    `save_compressed` saves the result.

    Args:
        model: behind :func:`prunable`; it is not changed.

    Returns:
        A new model, patched if that one is, with parameters of its own and no masks (but a soft ``qk_mask`` where q is
        normalised, `qk_norm`).

    Raises:
        TypeError: the model is not prunable.
        ValueError: heads of one attention keep different numbers of channels, or none; an MLP keeps none; or a norm
            runs over the channels to be taken out.

    Source: physical compaction after CAIT (Wang et al., arXiv 2309.15755), a reconstruction.
    """
    blocks_of(model)
    small = fold_compactors(copy.deepcopy(model))
    for i, block in enumerate(blocks_of(small)):
        try:
            attn = block.attn
            keep_qk, keep_v = (_zeros_gone(mask) for mask in (attn.qk_mask, attn.v_mask))
            drop_biases(attn)  # before: pruned values' biases are masked too
            block.attn = dress_as(compact_channels(attn, keep_qk, keep_v), attn)
            if isinstance(block.mlp, Mlp):
                compact_mlp(block.mlp)
        except ValueError as error:
            raise ValueError(f"block {i}: {error}") from None
    return small


def _zeros_gone(mask: Tensor | None) -> Tensor | None:
    """What ``compact_channels`` is to keep: None where nothing goes."""
    if mask is None or bool(torch.all(mask != 0)):
        return None
    return mask != 0
