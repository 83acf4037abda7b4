"""Blocks of timm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.attention import merge_heads, split_heads
from ..positions import Positions
from .base import UNNORMED, Family, apart, padding


class Eva(Family):
    """timm's EvaBlock: rotary positions, projections together or apart, LayerScale as parameters."""

    arguments: tuple[str, ...] = ("rope", "attn_mask", "is_causal")
    tables: tuple[str, ...] = ("rope",)
    attentions: tuple[str, ...] = (
        "timm.models.eva.EvaAttention",
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.AttentionRope",
    )
    parts: tuple[str, ...] = ("gamma_1", "drop_path1", "mlp", "gamma_2", "drop_path2")
    projections: tuple[str, ...] = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "num_prefix_tokens")
    packed = staticmethod(apart)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, rope=None if positions is None else positions.tables[0])

    @staticmethod
    def heads(attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        if attention.qkv is None:
            q, k, v = attention.q_proj(x[:, : ask.rows]), attention.k_proj(x), attention.v_proj(x)
        else:
            q, k, v = _packed(attention, x).chunk(3, dim=-1)
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


def _packed(attention: Any, x: Tensor) -> Tensor:
    """q, k and v of all tokens side by side, of an attention that may keep their biases by themselves."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    return attention.qkv(x) + bias if attention.qkv_bias_separate else F.linear(x, attention.qkv.weight, bias)


def _rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    patches = apply_rot_embed_cat(x[:, :, prefix:], rope[..., : x.shape[2] - prefix, :], **half)
    return torch.cat((x[:, :, :prefix], patches), dim=2)


class PostNorm(Family):
    """timm's ResPostBlock: what attention and MLP give is normalised, not what they take."""

    norm1 = norm2 = UNNORMED
    parts: tuple[str, ...] = ("norm1", "drop_path1", "mlp", "norm2", "drop_path2")
    linear = False

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path1(block.norm1(y))

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path2(block.norm2(y))


class EvaPostNorm(Eva):
    """timm's EvaBlockPostNorm."""

    norm1 = norm2 = UNNORMED
    parts, linear = PostNorm.parts, False
    after_attention, after_mlp = staticmethod(PostNorm.after_attention), staticmethod(PostNorm.after_mlp)


class SideBySide(Family):
    """timm's ParallelThingsBlock: several attentions, and several MLPs behind them, whose results are added up.

    Scores and mean keys are the means of those of its attentions.
    """

    norm1 = norm2 = UNNORMED
    attention, parts, linear = "attns", ("attns", "ffns"), False

    @classmethod
    def attentions_of(cls, block: Any) -> list[Any]:
        return [path.attn for path in getattr(block, "attns", ())]

    @classmethod
    def attend(cls, block: Any, normed: Tensor, run: Callable[[Any, Tensor], Tensor]) -> Tensor:
        paths = (path.drop_path(path.ls(run(path.attn, path.norm(normed)))) for path in block.attns)
        return torch.stack(list(paths)).sum(dim=0)

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        return x + torch.stack([path(normed) for path in block.ffns]).sum(dim=0)


class Scaling(Family):
    """timm's ParallelScalingBlock: attention and MLP see the same tokens, so these become fewer behind both."""

    norm1, attention, norm2 = "in_norm", "", UNNORMED
    parts = ("mlp_act", "mlp_drop", "ls", "drop_path")
    projections = ("in_proj", "in_split", "mlp_bias", "q_norm", "k_norm", "out_proj", "attn_out_proj", "mlp_out_proj")
    packed, linear = staticmethod(apart), False

    @classmethod
    def attend(cls, block: Any, normed: Tensor, run: Callable[[Any, Tensor], Tensor]) -> Tensor:
        return block.drop_path(block.ls(run(block, block.in_proj(normed))))

    @staticmethod
    def heads(attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        _, q, k, v = x.split(attention.in_split, dim=-1)
        q, k, v = (split_heads(t, width=attention.head_dim) for t in (q[:, : ask.rows], k, v))
        return attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        hidden = x[..., : attention.in_split[0]]
        hidden = hidden if attention.mlp_bias is None else hidden + attention.mlp_bias
        hidden, out = attention.mlp_drop(attention.mlp_act(hidden)), merge_heads(out)
        if attention.out_proj is not None:
            return attention.out_proj(torch.cat((out, hidden), dim=-1))
        return attention.attn_out_proj(out) + attention.mlp_out_proj(hidden)

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        return x


class Beit(Eva):
    """timm's BEiT: a bias for every two positions, of the block or of all blocks."""

    arguments = tables = ("shared_rel_pos_bias",)
    attentions = ("timm.models.beit.Attention",)
    projections = ("qkv", "proj", "num_heads", "q_bias", "k_bias", "v_bias", "relative_position_bias_table")
    told, swift = False, False

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x)

    @staticmethod
    def width(attention: Any) -> int:
        return attention.qkv.out_features // 3 // attention.num_heads

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        bias = given.get("shared_rel_pos_bias")
        if bias is not None:
            bias = bias.unsqueeze(0) if bias.dim() == 3 else bias
        if block.attn.relative_position_bias_table is not None:
            of_block = block.attn._get_rel_pos_bias()
            bias = of_block if bias is None else of_block + bias
        return None if bias is None else Positions((), bias, prefix)

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(t, attention.num_heads) for t in _packed(attention, x).chunk(3, dim=-1))
        return q[:, :, : ask.rows], k, v


class Relative(Family):
    """timm's RelPosBlock: as BEiT's, where the bias may be made by a small network."""

    arguments: tuple[str, ...] = ("shared_rel_pos",)
    tables: tuple[str, ...] = ("shared_rel_pos",)
    attentions = ("timm.models.vision_transformer_relpos.RelPosAttention",)
    projections = ("qkv", "proj", "q_norm", "k_norm", "rel_pos")
    told, swift = False, False

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        own = block.attn.rel_pos
        bias = given.get("shared_rel_pos") if own is None else own.get_bias()
        return None if bias is None else Positions((), bias, prefix)


class RelativePostNorm(Relative):
    """timm's ResPostRelPosBlock."""

    norm1 = norm2 = UNNORMED
    parts, linear = PostNorm.parts, False
    after_attention, after_mlp = staticmethod(PostNorm.after_attention), staticmethod(PostNorm.after_mlp)


class Talking(Family):
    """timm's block of CaiT before the class token comes in: heads are mixed before and behind the softmax."""

    attentions = ("timm.models.cait.TalkingHeadAttn",)
    parts = ("gamma_1", "drop_path", "mlp", "gamma_2")
    projections = ("qkv", "proj", "proj_l", "proj_w", "proj_drop")
    mixes, swift = True, False

    @staticmethod
    def width(attention: Any) -> int:
        return attention.qkv.out_features // 3 // attention.num_heads

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(t, attention.num_heads) for t in attention.qkv(x).chunk(3, dim=-1))
        return q[:, :, : ask.rows], k, v

    @staticmethod
    def mixed_logits(attention: Any, logits: Tensor) -> Tensor:
        return attention.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @staticmethod
    def mixed_weights(attention: Any, weights: Tensor) -> Tensor:
        return attention.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path(block.gamma_1 * y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path(block.gamma_2 * y)


class Padded(Family):
    """The plain block in a model of images of many shapes, where a mask hides padding."""

    tables = ("attn_mask",)

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        return padding(given.get("attn_mask"), prefix)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, attn_mask=None if positions is None else positions.hiding(x.dtype))


class EvaPadded(Eva):
    """timm's EvaBlock there."""

    tables = ("rope", "attn_mask")

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        hidden, rope = padding(given.get("attn_mask"), prefix), given.get("rope")
        if rope is None:
            return hidden
        return Positions((rope,), None, prefix, None if hidden is None else hidden.hidden)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        if positions is None:
            return attention(x)
        rope = positions.tables[0] if positions.tables else None
        return attention(x, rope=rope, attn_mask=positions.hiding(x.dtype))


#: the kinds of blocks where images may be padded
PADDED: dict[type[Family], type[Family]] = {Family: Padded, Eva: EvaPadded}

ROWS: dict[str, type[Family]] = {
    "timm.models.vision_transformer.Block": Family,
    "timm.models.vision_transformer.ResPostBlock": PostNorm,
    "timm.models.vision_transformer.ParallelThingsBlock": SideBySide,
    "timm.models.vision_transformer.ParallelScalingBlock": Scaling,
    "timm.models.eva.EvaBlock": Eva,
    "timm.models.eva.EvaBlockPostNorm": EvaPostNorm,
    "timm.models.beit.Block": Beit,
    "timm.models.vision_transformer_relpos.RelPosBlock": Relative,
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": RelativePostNorm,
    "timm.models.cait.LayerScaleBlock": Talking,
}
