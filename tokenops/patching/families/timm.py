"""Blocks of timm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.attention import split_heads
from ..positions import Positions
from .base import Family, apart


class Eva(Family):
    """timm's EvaBlock: rotary positions, projections together or apart, LayerScale as parameters."""

    arguments = ("rope", "attn_mask", "is_causal")
    tables = ("rope",)
    attentions = (
        "timm.models.eva.EvaAttention",
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.AttentionRope",
    )
    parts = ("gamma_1", "drop_path1", "mlp", "gamma_2", "drop_path2")
    projections = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "num_prefix_tokens")
    packed = staticmethod(apart)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, rope=None if positions is None else positions.tables[0])

    @staticmethod
    def heads(attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        if attention.qkv is None:
            q, k, v = attention.q_proj(x[:, : ask.rows]), attention.k_proj(x), attention.v_proj(x)
        elif getattr(attention, "q_bias", None) is None:
            q, k, v = attention.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            apart = attention.qkv_bias_separate
            qkv = attention.qkv(x) + bias if apart else F.linear(x, attention.qkv.weight, bias)
            q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (split_heads(t, width=attention.head_dim) for t in (q[:, : ask.rows], k, v))
        q, k = attention.q_norm(q), attention.k_norm(k)
        if positions is not None:
            ask.look_at(k)
            q, k = (_rotated(attention, t, positions.tables[0]) for t in (q, k))
        groups = getattr(attention, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q.to(v.dtype), k.to(v.dtype), v

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


def _rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    patches = apply_rot_embed_cat(x[:, :, prefix:], rope[..., : x.shape[2] - prefix, :], **half)
    return torch.cat((x[:, :, :prefix], patches), dim=2)


ROWS: dict[str, type[Family]] = {
    "timm.models.vision_transformer.Block": Family,
    "timm.models.eva.EvaBlock": Eva,
}
