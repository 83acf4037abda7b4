"""Blocks of transformers: few layouts, under many names."""

from typing import Any

import torch
from torch import Tensor

from ...nn.attention import merge_heads, split_heads
from ..modules import unwrapped
from ..positions import Positions
from .base import Family, apart, padding


class Layer(Family):
    """What layers of transformers share: q, k and v by projections of their own, and results in tuples."""

    arguments: tuple[str, ...] = ("attention_mask",)
    packed: Any = staticmethod(apart)
    #: the projections of the attention's core: q, k, v, and of the attention: the result
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, attention_mask=None)[0]

    @staticmethod
    def unmasked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {name: None if _is_no_mask(value) else value for name, value in kwargs.items()}
        return tuple(None if _is_no_mask(value) else value for value in args), named

    @classmethod
    def fused(cls, attention: Any) -> bool:
        return cls.core(attention).config._attn_implementation == "sdpa"

    @staticmethod
    def returned(out: Tensor) -> Any:
        return out, None

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        core, width = cls.core(attention), cls.width(attention)
        q, k, v = (getattr(core, name) for name in cls.qkv)
        made = q(x[:, : ask.rows]), k(x), v(x)
        return tuple(split_heads(t, width=width) for t in made)  # type: ignore[return-value]

    @classmethod
    def project(cls, attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return getattr(attention, cls.out)(merge_heads(out))

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return y


def _is_no_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[-1] == 0


class Clip(Layer):
    """CLIP's encoder layer and its like."""

    norm1, attention, norm2 = "layer_norm1", "self_attn", "layer_norm2"
    dropout, out = "dropout", "out_proj"
    parts: tuple[str, ...] = ("mlp",)
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "head_dim")


class ViT(Layer):
    """ViT's layer and its like: dropout behind attention and MLP, LayerScale as parameters, stochastic depth."""

    norm1, attention, norm2 = "layernorm_before", "attention", "layernorm_after"
    dropout, scale = "attention_dropout", "scaling"
    parts: tuple[str, ...] = ("mlp", "dropout")

    @classmethod
    def after_attention(cls, block: Any, y: Tensor) -> Tensor:
        return _scaled(block, block.dropout(y), "lambda_1")

    @classmethod
    def after_mlp(cls, block: Any, y: Tensor) -> Tensor:
        return _scaled(block, block.dropout(y), "lambda_2")


def _scaled(block: Any, y: Tensor, scale: str) -> Tensor:
    """LayerScale and stochastic depth, where a layer has them."""
    factor, drop_path = getattr(block, scale, None), getattr(block, "drop_path", None)
    y = y if factor is None else factor * y
    return y if drop_path is None else drop_path(y)


class Dino(Layer):
    """DINOv2's layer: LayerScale as modules."""

    attention, dropout, scale = "attention", "attention_dropout", "scaling"
    parts: tuple[str, ...] = ("layer_scale1", "drop_path", "mlp", "layer_scale2")

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path(block.layer_scale1(y))

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path(block.layer_scale2(y))


class Dino3(Dino):
    """DINOv3's layer: the cosines and sines of rotary positions are given beside the tokens."""

    dropout = "dropout"
    arguments = ("attention_mask", "position_embeddings")
    tables = ("position_embeddings",)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        tables = None if positions is None else positions.tables
        return attention(x, attention_mask=None, position_embeddings=tables)[0]

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(attention, x, ask, positions)
        if positions is not None:
            ask.look_at(k)
            prefix = k.shape[2] - positions.tables[0].shape[-2]
            q, k = (_turned(t, prefix, *positions.tables).to(v.dtype) for t in (q, k))  # of wider tables
        return q, k, v


def _turned(x: Tensor, prefix: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads whose patch tokens are turned by their positions: halves of the channels go together."""
    patches = x[:, :, prefix:]
    cos, sin = (table[..., : patches.shape[2], :] for table in (cos, sin))
    a, b = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((x[:, :, :prefix], turned), dim=2)


class Beit(ViT):
    """BEiT's layer: a bias for every two positions, of the layer or of all layers."""

    arguments = ("attention_mask", "interpolate_pos_encoding", "resolution")
    tables = ("attention_mask",)  # the mask is a bias, where layers share one
    swift = False
    parts: tuple[str, ...] = ("mlp", "dropout", "relative_position_bias", "patch_size", "lambda_1", "lambda_2")

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        return _relative(block.relative_position_bias, block.patch_size, given.get("attention_mask"), given, prefix)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, attention_mask=None if positions is None else positions.bias)[0]


def _relative(own: Any, size: int, shared: Tensor | None, given: dict[str, Any], prefix: int) -> Positions | None:
    """A layer's bias of relative positions, of patches of a size, and that of all layers."""
    if own is None:
        return None if shared is None else Positions((), shared, prefix)
    rows, columns = (side // size for side in given["resolution"])
    bias = own((rows, columns), bool(given.get("interpolate_pos_encoding")), dim_size=1 + rows * columns)
    return Positions((), bias if shared is None else bias + shared, prefix)


class Nested(Layer):
    """The older layout: an attention within the attention, and the MLP as two modules, the second of which adds."""

    norm1, attention, norm2 = "layernorm_before", "attention", "layernorm_after"
    dropout, scale = "dropout_prob", "scaling"
    arguments: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("intermediate", "output")
    qkv = ("query", "key", "value")
    projections: tuple[str, ...] = ("query", "key", "value", "attention_head_size")

    @staticmethod
    def core(attention: Any) -> Any:
        return attention.attention

    @staticmethod
    def width(attention: Any) -> int:
        return attention.attention.attention_head_size

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x)

    @staticmethod
    def returned(out: Tensor) -> Any:
        return out

    @classmethod
    def project(cls, attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.output(merge_heads(out), x)

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        return block.output(block.intermediate(normed), x)


class Flava(Nested):
    """FLAVA's layer: results in tuples."""

    dropout, scale, swift = "dropout", "", False
    arguments: tuple[str, ...] = ("attention_mask", "output_attentions")

    @classmethod
    def factor(cls, attention: Any) -> float:
        return cls.width(attention) ** -0.5

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x)[0]

    @staticmethod
    def returned(out: Tensor) -> Any:
        return (out,)

    @staticmethod
    def handed(out: Any) -> Any:
        return (out,)


class Data2Vec(Flava):
    """data2vec's layer: as BEiT's in the older layout, with the bias of its own in the attention."""

    arguments = ("output_attentions", "relative_position_bias", "interpolate_pos_encoding", "resolution")
    tables = ("relative_position_bias",)
    told = False
    parts = ("intermediate", "output", "drop_path", "lambda_1", "lambda_2")

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        core, shared = unwrapped(block.attention).attention, given.get("relative_position_bias")
        own = core.relative_position_bias if core.has_relative_position_bias else None
        return _relative(own, core.config.patch_size, shared, given, prefix)

    @classmethod
    def after_attention(cls, block: Any, y: Tensor) -> Tensor:
        return _scaled(block, y, "lambda_1")

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        return x + _scaled(block, block.output(block.intermediate(normed)), "lambda_2")


class Pose(Nested):
    """ViTPose's layer, with one MLP for all data sets."""

    parts: tuple[str, ...] = ("mlp",)

    @classmethod
    def check(cls, block: Any) -> None:
        super().check(block)
        if block.num_experts != 1:
            raise TypeError("its MLP has experts, which are chosen by an index that is given beside the tokens")

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        return x + block.mlp(normed)


class Blip2(Clip):
    """BLIP-2's layer: q, k and v by one projection."""

    dropout = "attention_dropout"
    arguments = ()
    projections: tuple[str, ...] = ("qkv", "projection", "head_dim")

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x)[0]

    @staticmethod
    def packed(attention: Any, x: Tensor) -> Tensor:
        return attention.qkv(x)

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(t, width=attention.head_dim) for t in attention.qkv(x).chunk(3, dim=-1))
        return q[:, :, : ask.rows], k, v

    @classmethod
    def project(cls, attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.projection(merge_heads(out))


class Blip(Blip2):
    """BLIP's layer, whose attention writes its matrix."""

    dropout = "dropout"

    @classmethod
    def fused(cls, attention: Any) -> bool:
        return False


class Padded(Clip):
    """A layer like CLIP's of images of many shapes, which are padded: a mask hides the padding."""

    tables = ("attention_mask",)

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        return padding(given.get("attention_mask"), prefix)

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x, attention_mask=None if positions is None else positions.hiding(x.dtype))[0]


class Janus(Clip):
    """Janus' layer: q and k may be normalised, a head at a time."""

    dropout = "attention_dropout"
    projections = ("q_proj", "k_proj", "v_proj", "projection_layer", "projection_dropout", "q_norm", "k_norm")

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(attention, x, ask, positions)
        return attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v

    @classmethod
    def project(cls, attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.projection_dropout(attention.projection_layer(merge_heads(out)))


class InternVL(ViT):
    """InternVL's layer: q and k may be normalised over all heads, and dropout is in the attention."""

    scale, arguments = "scale", ()
    parts: tuple[str, ...] = ("mlp", "dropout", "lambda_1", "lambda_2")
    projections: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "projection_layer",
        "projection_dropout",
        "q_norm",
        "k_norm",
    )

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        return attention(x)[0]

    @classmethod
    def heads(cls, attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.q_proj(x[:, : ask.rows]), attention.k_proj(x), attention.v_proj(x)
        normed = attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v
        return tuple(split_heads(t, width=attention.head_dim) for t in normed)  # type: ignore[return-value]

    @classmethod
    def project(cls, attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.projection_dropout(attention.projection_layer(merge_heads(out)))

    @classmethod
    def after_attention(cls, block: Any, y: Tensor) -> Tensor:
        return block.lambda_1 * y


class Aim(Clip):
    """AIMv2's layer."""

    norm1, attention, norm2 = "rms_norm1", "attention", "rms_norm2"
    parts: tuple[str, ...] = ("ffn",)

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        return x + block.ffn(normed)


def row(layout: type[Layer], model: str, layer: str, attention: str, part: str = "") -> tuple[str, type[Family]]:
    """A layer of a model, by the names of its class and its attention's: a layout with that attention."""
    module = f"transformers.models.{model}.modeling_{model}{part}"
    kind = type(layer, (layout,), {"attentions": (f"{module}.{attention}",), "__module__": __name__})
    globals()[layer] = kind  # by which it pickles
    return f"{module}.{layer}", kind


ROWS: dict[str, type[Family]] = dict(
    [
        row(Aim, "aimv2", "Aimv2EncoderLayer", "Aimv2Attention"),
        row(Beit, "beit", "BeitLayer", "BeitAttention"),
        row(Blip, "blip", "BlipEncoderLayer", "BlipAttention"),
        row(Blip2, "blip_2", "Blip2EncoderLayer", "Blip2Attention"),
        row(Blip2, "instructblip", "InstructBlipEncoderLayer", "InstructBlipAttention"),
        row(Blip2, "instructblipvideo", "InstructBlipVideoEncoderLayer", "InstructBlipVideoAttention"),
        row(Clip, "altclip", "AltCLIPEncoderLayer", "AltCLIPAttention"),
        row(Clip, "chinese_clip", "ChineseCLIPVisionLayer", "ChineseCLIPVisionAttention"),
        row(Clip, "clip", "CLIPEncoderLayer", "CLIPAttention"),
        row(Clip, "clipseg", "CLIPSegEncoderLayer", "CLIPSegAttention"),
        row(Clip, "git", "GitVisionEncoderLayer", "GitVisionAttention"),
        row(Padded, "idefics2", "Idefics2EncoderLayer", "Idefics2VisionAttention"),
        row(Padded, "idefics3", "Idefics3EncoderLayer", "Idefics3VisionAttention"),
        row(Clip, "kosmos2", "Kosmos2VisionEncoderLayer", "Kosmos2VisionAttention"),
        row(Clip, "metaclip_2", "MetaClip2EncoderLayer", "MetaClip2Attention"),
        row(Clip, "owlv2", "Owlv2EncoderLayer", "Owlv2Attention"),
        row(Clip, "owlvit", "OwlViTEncoderLayer", "OwlViTAttention"),
        row(Clip, "siglip", "SiglipEncoderLayer", "SiglipAttention"),
        row(Padded, "siglip2", "Siglip2EncoderLayer", "Siglip2Attention"),
        row(Padded, "smolvlm", "SmolVLMEncoderLayer", "SmolVLMVisionAttention"),
        row(Data2Vec, "data2vec", "Data2VecVisionLayer", "Data2VecVisionAttention", "_vision"),
        row(Flava, "flava", "FlavaLayer", "FlavaAttention"),
        row(Janus, "janus", "JanusVisionEncoderLayer", "JanusVisionAttention"),
        row(Dino, "dinov2", "Dinov2Layer", "Dinov2Attention"),
        row(Dino, "dinov2_with_registers", "Dinov2WithRegistersLayer", "Dinov2WithRegistersAttention"),
        row(Dino3, "dinov3_vit", "DINOv3ViTLayer", "DINOv3ViTAttention"),
        row(InternVL, "internvl", "InternVLVisionLayer", "InternVLVisionAttention"),
        row(Nested, "dpt", "DPTViTLayer", "DPTViTAttention"),
        row(Nested, "videomae", "VideoMAELayer", "VideoMAEAttention"),
        row(Nested, "yolos", "YolosLayer", "YolosAttention"),
        row(Pose, "vitpose_backbone", "VitPoseBackboneLayer", "VitPoseBackboneAttention"),
        row(ViT, "audio_spectrogram_transformer", "ASTLayer", "ASTAttention"),
        row(ViT, "deit", "DeiTLayer", "DeiTAttention"),
        row(ViT, "ijepa", "IJepaLayer", "IJepaAttention"),
        row(ViT, "pixio", "PixioLayer", "PixioAttention"),
        row(ViT, "vit", "ViTLayer", "ViTAttention"),
        row(ViT, "vit_mae", "ViTMAELayer", "ViTMAEAttention"),
        row(ViT, "vit_msn", "ViTMSNLayer", "ViTMSNAttention"),
        row(ViT, "vivit", "VivitLayer", "VivitAttention"),
    ]
)
