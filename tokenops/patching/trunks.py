"""What a vision transformer is around its blocks: its tokens that are not patches, and the grid of those that are."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from .modules import plain_of

#: the timm models whose loops run blocks one after another; transformers' are told by their blocks
_TIMM = (
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
    "timm.models.eva.Eva",
    "timm.models.beit.Beit",
    "timm.models.cait.Cait",
    "timm.models.naflexvit.NaFlexVit",
)
#: those whose blocks are around torch's attention: the name of the convolution that makes patches
_TORCH = {
    "torchvision.models.vision_transformer.VisionTransformer": "conv_proj",
    "open_clip.transformer.VisionTransformer": "conv1",
}
#: transformers' whose images lie one behind the other in one sequence of tokens, told apart by boundaries
_PACKED = (
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
    "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel",
    "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionModel",
)
#: parameters of embeddings that are tokens before the patches', one or more
_TOKENS = ("cls_token", "distillation_token", "register_tokens")


class Trunk(NamedTuple):
    """A vision transformer, as far as blocks and methods need to know it.

    Attributes:
        embedding: the module that makes the patch tokens.
        prefix: how many tokens before the patches' are never touched.
        has_class: whether the first of them is a class token.
        dim: C.
        img_size: height and width of the images, None where the model does not say.
        grid: rows and columns of patches, None where images may have others. Frames of a video are below each other.
        usual: the grid of img_size, None where there is none.
    """

    embedding: Any
    prefix: int
    has_class: bool
    dim: int
    img_size: tuple[int, int] | None
    grid: tuple[int, int] | None
    usual: tuple[int, int] | None


def trunk_of(owner: Any) -> Trunk:
    """What a vision transformer is, of timm, torchvision, open_clip or transformers."""
    if is_timm(owner):
        return _of_timm(owner)
    if packs(owner):
        return Trunk(owner.patch_embed, 0, False, owner.blocks[0].norm1.weight.shape[0], None, None, None)
    return _of_torch(owner, stem) if (stem := _stem_of(owner)) else _of_transformers(owner)


def is_timm(module: Any) -> bool:
    """Whether a vision transformer has the attributes and methods of timm's."""
    return (hasattr(module, "patch_embed") or _named(module, _TIMM)) and not packs(module)


def packs(module: Any) -> bool:
    """Whether a vision transformer takes all images in one sequence of tokens ``(T, C)``, told apart by boundaries."""
    return _named(module, _PACKED)


def pads(module: Any) -> bool:
    """Whether a vision transformer of timm takes images of many shapes in one batch, which are padded."""
    return hasattr(module, "embeds")


def pools_token(owner: Any) -> bool | None:
    """Whether a vision transformer, as it is now, hands on its class token alone; None: ask the model around."""
    if is_timm(owner):
        return owner.global_pool == "token" and getattr(owner, "attn_pool", None) is None
    if hasattr(owner, "pool_type"):
        return owner.pool_type == "tok" and owner.attn_pool is None and not owner.output_tokens
    return True if _stem_of(owner) else None


def _named(module: Any, names: Iterable[str]) -> bool:
    """Whether the plain class of a module is, or is derived from, one of some names."""
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in plain_of(module).__mro__)


def _stem_of(owner: Any) -> str | None:
    """The name of the convolution that makes the patches of a vision transformer around torch's attention."""
    return next((stem for name, stem in _TORCH.items() if _named(owner, (name,))), None)


def is_trunk(module: Any) -> bool | None:
    """Whether a module is a vision transformer whose loop is known; None where it embeds patches in an unknown one."""
    if is_timm(module):
        known = _named(module, _TIMM) and not plain_of(module).__module__.startswith("tokenops.")
        return True if known else None
    if _stem_of(module) or packs(module):
        return True
    return _patches_of(getattr(module, "embeddings", None)) is not None


def _of_timm(owner: Any) -> Trunk:
    late = hasattr(owner, "blocks_token_only")  # a class token behind the blocks
    if pads(owner):
        embed, size = owner.embeds, owner.embeds.default_img_size
        usual = embed.dynamic_feat_size(size) if size is not None else None
        fixed, has_class = False, embed.cls_token is not None
    else:
        embed, has_class = owner.patch_embed, owner.cls_token is not None and not late
        size, usual = getattr(embed, "img_size", None), embed.grid_size
        fixed = not getattr(owner, "dynamic_img_size", False)
    usual = None if usual is None else tuple(usual)
    prefix = 0 if late else owner.num_prefix_tokens
    return Trunk(embed, prefix, has_class, owner.embed_dim, size, usual if fixed else None, usual)


def _of_torch(owner: Any, stem: str) -> Trunk:
    embed, size = getattr(owner, stem), owner.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    grid = grid_of(embed, (3, *size))
    token = owner.class_token if hasattr(owner, "class_token") else owner.class_embedding
    return Trunk(embed, 1, True, token.shape[-1], size, grid, grid)


def _of_transformers(owner: Any) -> Trunk:
    embeddings, config = owner.embeddings, owner.config
    tokens = [getattr(embeddings, name, None) for name in _TOKENS]
    prefix = sum(token.shape[1] for token in tokens if token is not None) + hasattr(embeddings, "class_embedding")
    prefix += tail_of(owner)
    has_class = tokens[0] is not None or hasattr(embeddings, "class_embedding")
    if hasattr(embeddings, "get_shape"):  # of a spectrogram, frequencies by time
        of_sound = tuple(embeddings.get_shape(config))
        return Trunk(embeddings, prefix, has_class, config.hidden_size, None, of_sound, of_sound)
    if hasattr(_patches_of(embeddings), "in_features"):  # patches come in as rows, of images of any shape
        return Trunk(embeddings, prefix, has_class, config.hidden_size, None, None, None)
    sides = (getattr(module, "image_size", None) for module in (_patches_of(embeddings), embeddings, config))
    size = next(side for side in sides if side is not None)
    size = (size, size) if isinstance(size, int) else tuple(size)
    frames = (config.num_frames,) if tubelet_of(embeddings) else ()
    shuffled = hasattr(embeddings, "random_masking")
    grid = None if shuffled else grid_of(embeddings, (*frames, 3, *size))
    return Trunk(embeddings, prefix, has_class, config.hidden_size, size, grid, grid)


def tail_of(owner: Any) -> int:
    """How many tokens a vision transformer has behind its patches."""
    tail = getattr(getattr(owner, "embeddings", None), "detection_tokens", None)
    return 0 if tail is None else tail.shape[1]


def _patches_of(embeddings: Any) -> Any:
    """The part of embeddings that makes patches."""
    names = ("patch_embeddings", "patch_embedding", "patch_embed")
    return next((getattr(embeddings, name) for name in names if hasattr(embeddings, name)), None)


def tubelet_of(embeddings: Any) -> int:
    """How many frames of a video are one patch; 0 of images."""
    config, made = getattr(embeddings, "config", None), _patches_of(embeddings)
    size = getattr(made, "tubelet_size", getattr(config, "tubelet_size", 0))
    size = size or (made.projection.kernel_size if getattr(getattr(made, "projection", None), "kernel_size", 0) else 0)
    return size if isinstance(size, int) else size[0] if len(size) == 3 else 0


def grid_of(embedding: Any, shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the patches that a patch embedding makes of images ``(..., channels, height, width)``."""
    height, width = shape[-2:]
    if hasattr(embedding, "dynamic_feat_size"):
        return tuple(embedding.dynamic_feat_size((height, width)))
    if isinstance(embedding, (nn.Conv2d, nn.Sequential)):
        steps = [part.stride for part in embedding.modules() if isinstance(part, nn.Conv2d)]
        return height // math.prod(step[0] for step in steps), width // math.prod(step[1] for step in steps)
    config: Any = getattr(embedding, "config", None)
    if hasattr(embedding, "get_shape"):  # spectrograms (time, frequency)
        side, strides = config.patch_size, (config.frequency_stride, config.time_stride)
        return (width - side) // strides[0] + 1, (height - side) // strides[1] + 1
    holders = (_patches_of(embedding), embedding, config)
    size = next(side for holder in holders if (side := getattr(holder, "patch_size", None)) is not None)
    rows, columns = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    tubelet = tubelet_of(embedding)
    frames = shape[-4] // tubelet if tubelet else 1
    return frames * (height // rows), width // columns
