"""What a vision transformer is around its blocks: its tokens that are not patches, and the grid of those that are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .modules import plain_of

#: the timm models whose loops run blocks one after another; transformers' are told by their blocks
_TIMM = ("timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva")
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
    """

    embedding: Any
    prefix: int
    has_class: bool
    dim: int
    img_size: tuple[int, int] | None
    grid: tuple[int, int] | None


def trunk_of(owner: Any) -> Trunk:
    """What a vision transformer is, of timm or transformers."""
    return _of_timm(owner) if hasattr(owner, "patch_embed") else _of_transformers(owner)


def is_trunk(module: Any) -> bool | None:
    """Whether a module is a vision transformer whose loop is known; None where it embeds patches in an unknown one."""
    if hasattr(module, "patch_embed"):
        plain = plain_of(module)
        known = any(f"{kind.__module__}.{kind.__name__}" in _TIMM for kind in plain.__mro__)
        return True if known and not plain.__module__.startswith("tokenops.") else None
    return _patches_of(getattr(module, "embeddings", None)) is not None


def _of_timm(owner: Any) -> Trunk:
    embed = owner.patch_embed
    fixed = not getattr(owner, "dynamic_img_size", False) and embed.grid_size is not None
    return Trunk(
        embed,
        owner.num_prefix_tokens,
        owner.cls_token is not None,
        owner.embed_dim,
        getattr(embed, "img_size", None),
        tuple(embed.grid_size) if fixed else None,
    )


def _of_transformers(owner: Any) -> Trunk:
    embeddings, config = owner.embeddings, owner.config
    tokens = [getattr(embeddings, name, None) for name in _TOKENS]
    prefix = sum(token.shape[1] for token in tokens if token is not None) + hasattr(embeddings, "class_embedding")
    prefix += tail_of(owner)
    has_class = tokens[0] is not None or hasattr(embeddings, "class_embedding")
    if hasattr(embeddings, "get_shape"):  # of a spectrogram, frequencies by time
        return Trunk(embeddings, prefix, has_class, config.hidden_size, None, tuple(embeddings.get_shape(config)))
    if hasattr(_patches_of(embeddings), "in_features"):  # patches come in as rows, of images of any shape
        return Trunk(embeddings, prefix, has_class, config.hidden_size, None, None)
    sides = (getattr(module, "image_size", None) for module in (_patches_of(embeddings), embeddings, config))
    size = next(side for side in sides if side is not None)
    size = (size, size) if isinstance(size, int) else tuple(size)
    frames = (config.num_frames,) if tubelet_of(embeddings) else ()
    shuffled = hasattr(embeddings, "random_masking")
    grid = None if shuffled else grid_of(embeddings, (*frames, 3, *size))
    return Trunk(embeddings, prefix, has_class, config.hidden_size, size, grid)


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
