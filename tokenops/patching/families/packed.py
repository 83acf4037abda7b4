"""Blocks of towers that take all images in one sequence of tokens, told apart by boundaries."""

from typing import Any

import torch
from torch import Tensor

from ...ops.masked_channel_attention import masked_channel_attention
from ..positions import Packing
from .base import Family
from .hf import Layer, row


class Packed(Layer):
    """Qwen's vision block: tokens ``(T, C)``, boundaries of images or windows, cosines and sines of every token."""

    dropout, scale, packs = "attention_dropout", "scaling", True
    swift = told = False  # its own forward runs where nothing was left out: it cannot have an empty window
    arguments: tuple[str, ...] = ("cu_seqlens", "position_embeddings")
    parts: tuple[str, ...] = ("mlp",)
    projections: tuple[str, ...] = ("qkv", "proj", "head_dim", "num_heads")

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Packing:  # type: ignore[override]
        return Packing(tuple(given["position_embeddings"]), given["cu_seqlens"].int(), given.get("max_seqlen"))

    @staticmethod
    def returned(out: Tensor) -> Any:
        return out

    @classmethod
    def attended(cls, attention: Any, ask: Any, x: Tensor, packing: Packing) -> Tensor:
        """The attention's result ``(T, C)``, and the scores ``(T,)`` for which it is asked."""
        if attention.training and getattr(attention, cls.dropout):
            raise ValueError("attention weights are dropped in training, which no packed attention with scores does")
        heads = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        q, k, v = heads.unbind(dim=1)
        q, k = (turned(t, *packing.tables) for t in (q, k))
        found: Any = masked_channel_attention(
            q,
            k,
            v,
            scale=cls.factor(attention),
            scores=ask.scores,
            heads="mean",
            cu_seqlens=packing.cu_seqlens,
            max_seqlen=packing.longest(x.shape[0]),
        )
        out, ask.looked_at = (found, None) if ask.scores is None else found
        return attention.proj(out.flatten(1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``(T, H, D)`` turned by their positions, in fp32 as these towers do; halves of the channels go together."""
    wide = x.float()
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


ROWS: dict[str, type[Family]] = dict(
    [
        row(Packed, "qwen2_vl", "Qwen2VLVisionBlock", "VisionAttention"),
        row(Packed, "qwen2_5_vl", "Qwen2_5_VLVisionBlock", "Qwen2_5_VLVisionAttention"),
        row(Packed, "qwen3_vl", "Qwen3VLVisionBlock", "Qwen3VLVisionAttention"),
        row(Packed, "qwen3_vl_moe", "Qwen3VLMoeVisionBlock", "Qwen3VLMoeVisionAttention"),
        row(Packed, "qwen3_5", "Qwen3_5VisionBlock", "Qwen3_5VisionAttention"),
        row(Packed, "qwen3_5_moe", "Qwen3_5MoeVisionBlock", "Qwen3_5MoeVisionAttention"),
    ]
)
