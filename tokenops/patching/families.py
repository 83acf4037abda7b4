"""The kinds of blocks that the engine knows: where each keeps its parts, and how its heads are made."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.attention import heads_of, merge_heads, packed, project, split_heads
from ..nn.watched import keeps_forward
from .modules import name_of, unwrapped

#: what to do where a patched model was changed since
PATCH_ANEW = "remove_patch, and apply_patch to the model as it is now"


def _apart(attention: Any, x: Tensor) -> None:
    """In the place of `packed` where q, k and v do not come from one projection as they are."""


class Family:
    """A kind of pre-norm block, timm's own. Classes stand for kinds, without instances, so blocks copy and pickle."""

    norm1: str = "norm1"
    attention: str = "attn"
    norm2: str = "norm2"
    #: what a model may pass to a block behind the tokens, by position
    arguments: tuple[str, ...] = ("attn_mask", "is_causal")
    #: dropout of attention weights and the factor of the logits, attributes of the attention
    dropout: str = "attn_drop"
    scale: str = "scale"
    attentions: tuple[str, ...] = (
        "timm.layers.attention.Attention",
        "timm.models.vision_transformer.Attention",
        "tokenops.nn.attention.Attention",
    )
    parts: tuple[str, ...] = ("ls1", "drop_path1", "mlp", "ls2", "drop_path2")
    projections: tuple[str, ...] = ("qkv", "proj")

    @classmethod
    def check(cls, block: Any) -> None:
        """TypeError in words where a block is not laid out as this kind's are."""
        attention = unwrapped(getattr(block, cls.attention, None))
        if name_of(attention) not in cls.attentions:
            raise TypeError(f"its attention is {name_of(attention)}, but it must be {' or '.join(cls.attentions)}")
        of_attention = [name for name in (*cls.projections, cls.dropout, cls.scale) if not hasattr(attention, name)]
        missing = [name for name in (cls.norm1, cls.norm2, *cls.parts) if not hasattr(block, name)] + of_attention
        if missing:
            raise TypeError(f"it has no {', '.join(missing)}: it is that of another version")
        for module in (block, attention):
            if not keeps_forward(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward"):
                raise TypeError("its forward was replaced, by one that a patch would undo")

    @staticmethod
    def unmasked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A block's arguments behind the tokens, without what stands for no mask."""
        return args

    @staticmethod
    def call(attention: Any, x: Tensor, rope: Tensor | None, **ask: Any) -> Tensor:
        """The block's own attention."""
        return attention(x, **ask)

    @staticmethod
    def fused(attention: Any) -> bool:
        """Whether the attention's own forward runs torch's, which writes no matrix."""
        return attention.fused_attn

    @staticmethod
    def returned(out: Tensor) -> Any:
        """The attention's result as its own forward returns it."""
        return out

    packed = staticmethod(packed)
    project = staticmethod(project)

    @staticmethod
    def heads(attention: Any, x: Tensor, rows: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, H, rows, D)`` of the first rows (all for None), k and v ``(B, H, N, D)`` of all."""
        return heads_of(attention, x, rows)

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path1(block.ls1(y))

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(y))


class Eva(Family):
    """timm's EvaBlock: rotary positions, projections together or apart, LayerScale as parameters."""

    arguments = ("rope", "attn_mask", "is_causal")
    attentions = (
        "timm.models.eva.EvaAttention",
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.AttentionRope",
    )
    parts = ("gamma_1", "drop_path1", "mlp", "gamma_2", "drop_path2")
    projections = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "num_prefix_tokens")
    packed = staticmethod(_apart)

    @staticmethod
    def call(attention: Any, x: Tensor, rope: Tensor | None, **ask: Any) -> Tensor:
        return attention(x, rope=rope, **ask)

    @staticmethod
    def heads(attention: Any, x: Tensor, rows: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if attention.qkv is None:
            q, k, v = attention.q_proj(x[:, :rows]), attention.k_proj(x), attention.v_proj(x)
        elif getattr(attention, "q_bias", None) is None:
            q, k, v = attention.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            apart = attention.qkv_bias_separate
            qkv = attention.qkv(x) + bias if apart else F.linear(x, attention.qkv.weight, bias)
            q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (split_heads(t, width=attention.head_dim) for t in (q[:, :rows], k, v))
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rope is not None:
            q, k = (_rotated(attention, t, rope) for t in (q, k))
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


class Clip(Family):
    """transformers' CLIPEncoderLayer and SiglipEncoderLayer."""

    norm1, attention, norm2 = "layer_norm1", "self_attn", "layer_norm2"
    arguments = ("attention_mask", "output_attentions")
    dropout = "dropout"
    attentions: tuple[str, ...] = (
        "transformers.models.clip.modeling_clip.CLIPAttention",
        "transformers.models.siglip.modeling_siglip.SiglipAttention",
    )
    parts: tuple[str, ...] = ("mlp",)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj", "head_dim")
    packed = staticmethod(_apart)

    @staticmethod
    def call(attention: Any, x: Tensor, rope: Tensor | None, **ask: Any) -> Tensor:
        return attention(x, attention_mask=None, **ask)[0]

    @staticmethod
    def fused(attention: Any) -> bool:
        return attention.config._attn_implementation == "sdpa"

    @staticmethod
    def returned(out: Tensor) -> Any:
        return out, None

    @staticmethod
    def heads(attention: Any, x: Tensor, rows: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.q_proj(x[:, :rows]), attention.k_proj(x), attention.v_proj(x)
        width = attention.head_dim
        return split_heads(q, width=width), split_heads(k, width=width), split_heads(v, width=width)

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.out_proj(merge_heads(out))

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return y


class HfViT(Clip):
    """transformers' ViTLayer."""

    norm1, attention, norm2 = "layernorm_before", "attention", "layernorm_after"
    dropout, scale = "attention_dropout", "scaling"
    attentions = ("transformers.models.vit.modeling_vit.ViTAttention",)
    parts = ("mlp", "dropout")
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")

    @staticmethod
    def unmasked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (None, *args[1:]) if args and args[0] is not None and args[0].shape[-1] == 0 else args

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.o_proj(merge_heads(out))

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.dropout(y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.dropout(y)


#: the blocks that can be patched: exactly these, as a class derived from one may compute something else
FAMILIES: dict[str, type[Family]] = {
    "timm.models.vision_transformer.Block": Family,
    "timm.models.eva.EvaBlock": Eva,
    "transformers.models.vit.modeling_vit.ViTLayer": HfViT,
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": Clip,
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": Clip,
}


def family_of(block: Any) -> type[Family]:
    """The kind of a block, patched or not."""
    return getattr(type(block), "tokenops_family", None) or FAMILIES[name_of(block)]


def positions(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The rotary positions among a block's arguments behind the tokens.

    Raises:
        ValueError: there is a mask among them, or attention weights are asked for.
    """
    if not args and not kwargs:  # timm's loop
        return None
    family = family_of(block)
    given = {**dict(zip(family.arguments, args)), **kwargs}
    config = getattr(getattr(block, family.attention), "config", None)
    if getattr(config, "output_attentions", False):
        raise ValueError("config.output_attentions is on, but a patched model has no attention weights of all tokens")
    for name in ("attn_mask", "attention_mask", "is_causal", "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            raise ValueError(f"{name} was given to a patched model, whose tokens change between blocks: leave it out")
    return given.get("rope")


def head_width(block: Any) -> int:
    """Channels of the widest head of a block."""
    return widest_of(unwrapped(getattr(block, family_of(block).attention)))


def widest_of(attention: Any) -> int:
    """Channels of the widest head of an attention."""
    return max(attention.head_dim, getattr(attention, "v_head_dim", 0))


def _rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    patches = apply_rot_embed_cat(x[:, :, prefix:], rope[..., : x.shape[2] - prefix, :], **half)
    return torch.cat((x[:, :, :prefix], patches), dim=2)
