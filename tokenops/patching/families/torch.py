"""Blocks around torch's own nn.MultiheadAttention: torchvision's and open_clip's."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...nn.attention import merge_heads, split_heads
from ..positions import Positions
from .base import Family


class MultiHead(Family):
    """What they share: q, k and v by one packed projection, and a result in a pair."""

    norm1, norm2 = "ln_1", "ln_2"
    attentions = ("torch.nn.modules.activation.MultiheadAttention",)
    dropout, scale = "dropout", ""
    projections = ("in_proj_weight", "in_proj_bias", "out_proj", "head_dim", "batch_first")
    swift = False

    @classmethod
    def check(cls, block: Any) -> None:
        super().check(block)
        attention = cls.core(cls.attentions_of(block)[0])
        if not attention.batch_first:
            raise TypeError("its attention has batch_first=False, but tokens must come as (B, N, C)")
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise TypeError("its attention has keys beside the tokens' (add_bias_kv, add_zero_attn), or kdim or vdim")

    @classmethod
    def factor(cls, attention: Any) -> float:
        return attention.head_dim**-0.5

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, x, x, need_weights=False)[0]

    @staticmethod
    def returned(out: Tensor) -> Any:
        return out, None

    @staticmethod
    def packed(attention: Any, x: Tensor) -> Tensor:
        return F.linear(x, attention.in_proj_weight, attention.in_proj_bias)

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(t, attention.num_heads) for t in cls.packed(attention, x).chunk(3, dim=-1))
        return q[:, :, : ask.rows], k, v

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.out_proj(merge_heads(out))


class Encoder(MultiHead):
    """torchvision's EncoderBlock."""

    attention, arguments = "self_attention", ()
    parts = ("dropout", "mlp")

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.dropout(y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return y


class Residual(MultiHead):
    """open_clip's ResidualAttentionBlock, of one sequence."""

    arguments = ("k_x", "v_x", "attn_mask")
    parts = ("ls_1", "mlp", "ls_2")

    @classmethod
    def check(cls, block: Any) -> None:
        super().check(block)
        if hasattr(block, "ln_1_kv"):
            raise TypeError("it attends to another sequence (is_cross_attention)")

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.ls_1(y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.ls_2(y)


ROWS: dict[str, type[Family]] = {
    "torchvision.models.vision_transformer.EncoderBlock": Encoder,
    "open_clip.transformer.ResidualAttentionBlock": Residual,
}
