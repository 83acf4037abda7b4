"""Compaction: the channels that are masked taken out of the weights, for a smaller model of plain layers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import Attention, compact_channels
from ...patching.engine import dress_as
from .blocks import Mlp, blocks_of, compact_mlp


def compact(model: nn.Module) -> Any:
    """A physically smaller model with the results of a masked one: channels whose mask is 0 are gone.

    Masks that are neither 0 nor 1 are folded into the weights. The scale of the logits stays that of
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
    small = copy.deepcopy(model)
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


@torch.no_grad()
def drop_biases(attention: Attention) -> None:
    r"""Zero the key bias and fold the value bias into the output bias, in place and exactly, where they allow it.

    :math:`q \cdot b_k` is constant along a softmax row, whose probabilities sum to 1; so :math:`b_o + W_o b_v` replaces
    b_v. A norm of k keeps the one, a norm of the result, a gate or a projection without bias the other.
    """
    qkv: Any = attention.qkv
    proj: Any = attention.proj
    if qkv.bias is None:
        return
    wide = attention.num_heads * attention.head_dim
    if isinstance(attention.k_norm, nn.Identity):
        qkv.bias[wide : 2 * wide].zero_()
    if isinstance(attention.norm, nn.Identity) and attention.gate is None and proj.bias is not None:
        values = qkv.bias[2 * wide :]
        masked = values.double() if attention.v_mask is None else values.double() * attention.v_mask.flatten()
        proj.bias.copy_(proj.bias + proj.weight.double() @ masked)
        values.zero_()


def _zeros_gone(mask: Tensor | None) -> Tensor | None:
    """What ``compact_channels`` is to keep: None where nothing goes."""
    if mask is None or bool(torch.all(mask != 0)):
        return None
    return mask != 0
