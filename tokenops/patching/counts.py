"""How many tokens a patched model has behind every block, told from its roles without running it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .packed import units_left
from .readers import passed_by
from .site import Site
from .trunks import grid_of, tubelet_of


class TokensLeft(NamedTuple):
    """How many tokens each image has.

    Attributes:
        layers: behind every block, the prefix (class token, registers) included.
        output: those that the model takes. Of a language model what its projector gets of an image, or of a crop of
            one: behind ``vision_feature_layer``, without the token that its ``vision_feature_select_strategy`` leaves
            out. Of others all behind the last block.
    """

    layers: tuple[int, ...]
    output: int


def tokens_left(model: Any, image_size: int | tuple[int, int] | None = None) -> TokensLeft:
    """How many tokens a model leaves of each image, told without running it.

    One number for all images of a size, as every method's choice is of which tokens, not of how many. It is that of
    evaluation, and follows what was set on the model (``model.r``) when it is asked again.

    Args:
        model: behind `apply_patch`, or one that could be patched: all its tokens then.
        image_size: height and width of the images in pixels, one int for both; None for the model's own.

    Raises:
        TypeError: the model has no blocks that can be patched, or ``image_size`` is no size.
        ValueError: the model has no size of its own, does not take images of the size, or was changed since the patch.

    >>> import timm, tokenops
    >>> model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3)
    >>> tokenops.tokens_left(tokenops.apply_patch(model, "evit", keep_rate=0.5, reduction_loc=(1, 2)))
    TokensLeft(layers=(17, 10, 7), output=7)
    """
    site = Site(model)
    full = tokens = site.prefix + _patches(site, image_size)
    patched = hasattr(site.owner, "tokenops_patch")
    if patched:
        site.refuse_others()
    layers = []
    for block in site.blocks:
        role = block.tokenops_role if patched else None
        tokens = tokens if role is None else role.left(block, tokens, full)
        layers.append(full if role is not None and role.taken and role.mapped else tokens)
    taken = layers[-1] if site.speaker is None else (full, *layers)[site.taken[-1] + 1]
    return TokensLeft(tuple(layers), taken - passed_by(site.speaker))


def image_tokens_left(model: Any, grid_thw: Sequence[Sequence[int]] | Tensor) -> list[int]:
    """How many image tokens a tower that packs its images leaves of each, told without running it.

    For who sizes prompts before the tower runs. Every frame of a video keeps its share, and a token is made of a unit
    of 2 x 2 patches; of a tower or a whole model that is not patched they are all.

    Args:
        model: one of Qwen's, Qwen2-VL to Qwen3.5, or the tower of one, behind `apply_patch` or not.
        grid_thw: ``(S, 3)`` integers: frames, rows and columns of patches of each image. A tensor on a GPU is
            waited for.

    Raises:
        TypeError: the model has no such tower, or a grid is not three ints.
        ValueError: a grid has no whole units.

    >>> import tokenops
    >>> from transformers.models.qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel
    >>> tower = Qwen3VLVisionModel(Qwen3VLVisionConfig(depth=4, hidden_size=32, num_heads=2, intermediate_size=32))
    >>> tower = tokenops.apply_patch(tower, "evit", keep_rate=0.5, reduction_loc=(1, 2), fuse_token=False)
    >>> image_tokens_left(tower, [[1, 16, 24], [1, 8, 8]])
    [24, 4]
    """
    site = Site(model)
    if not site.packs:
        raise TypeError(f"image_tokens_left is of towers that pack their images, not of {type(site.owner).__name__}")
    merge = site.owner.spatial_merge_size
    if hasattr(site.owner, "tokenops_patch"):
        site.refuse_others()
    grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else list(grid_thw)
    for i, grid in enumerate(grids):
        sides = tuple(grid) if isinstance(grid, (tuple, list)) else ()
        if len(sides) != 3 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise TypeError(f"grid_thw[{i}]={grid!r}, but it must be three ints: frames, rows and columns of patches")
        if min(sides) < 1 or sides[1] % merge or sides[2] % merge:
            raise ValueError(f"grid_thw[{i}]={sides}, but rows and columns must be multiples of {merge}, all 1 or more")
    return units_left(site.owner, grids)


def _patches(site: Site, image_size: Any) -> int:
    """How many patches of an image come into the first block; ValueError where the model does not take it."""
    embedding, grid = site.embedding, site.grid
    if image_size is not None or grid is None:
        grid = _grid(site, image_size)
    patches = math.prod(grid)
    if hasattr(embedding, "random_masking"):  # MAE's encoder, also in evaluation
        patches = int(patches * (1 - embedding.config.mask_ratio))
    return patches


def _grid(site: Site, image_size: Any) -> tuple[int, int]:
    """Rows and columns of the patches of images of a size."""
    embedding = site.embedding
    if not site.timm and site.img_size is None and site.grid is None:
        raise ValueError(
            f"{type(site.owner).__name__} takes patches as rows, so the size of an image does not say how many: "
            + ("give tokenops.patching.image_tokens_left their grids" if site.packs else "count these")
        )
    size = _size(image_size, site.img_size)
    frames = (site.owner.config.num_frames,) if not site.timm and tubelet_of(embedding) else ()
    grid, said = grid_of(embedding, (*frames, 3, *size)), f"image_size={image_size}, but"
    if min(grid) < 1:
        raise ValueError(f"{said} that is less than one patch")
    fixed = getattr(embedding, "tokenops_grid", site.grid if site.timm else None)
    if fixed is not None and grid != tuple(fixed):
        which = "the method was fitted" if hasattr(embedding, "tokenops_grid") else "the model is made"
        raise ValueError(
            f"{said} it gives {grid[0]} x {grid[1]} patches, and {which} for {fixed[0]} x {fixed[1]}: leave it out, or"
            " make the model for this size"
        )
    ratio = embedding.feat_ratio(as_scalar=False) if site.timm else (1, 1)
    if not getattr(embedding, "dynamic_img_pad", False) and any(side % patch for side, patch in zip(size, ratio)):
        raise ValueError(f"{said} it must be a multiple of the patches' {ratio[0]} x {ratio[1]}")
    return grid


def _size(given: Any, own: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width; the model's own for None."""
    if given is None:
        if own is None:
            raise ValueError("image_size must be given, as the model has none of its own")
        return own
    sides = (given, given) if isinstance(given, int) else tuple(given) if isinstance(given, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"image_size={given!r}, but it must be a number of pixels, or two: height and width")
    if min(sides) < 1:
        raise ValueError(f"image_size={given}, but height and width must be at least 1")
    return sides
