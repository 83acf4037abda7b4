"""The models by name, for timm.create_model: merged and uniformly narrower. No weights are hosted."""

from functools import partial
from os import PathLike
from typing import Any

import torch
from timm.layers import Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..models import DEIT, LVVIT, _lv_vit, cfg
from .blocks import _points, merges_of, unmerge_tokens
from .structure import Merge, Structure, Widths, restructure


def uniform_structure(model: Any) -> Structure:
    """The structure of the registered models: default merge points, averages, and the same widths in every block.

    Of a head 3/4 of the channels are left, of an MLP 7/8 of its hidden ones, rounded up to multiples of 16 and 128,
    which vector and matrix units take whole. These are ours: `ChannelPruner` finds which channels, and other widths
    of the same cost.

    Args:
        model: a dense timm VisionTransformer or LVViT.

    Raises:
        ValueError: it has fewer than 3 blocks.
    """

    def part(channels: Any, eighths: int, multiple: int) -> int:
        return min(channels, -(-channels * eighths // (8 * multiple)) * multiple)

    widths = []
    for block in model.blocks:
        head_dim = block.attn.head_dim
        hidden = part(block.mlp.fc1.out_features, 7, 128) if type(block.mlp) is Mlp else None
        widths.append(Widths(part(head_dim, 6, 16), part(head_dim, 6, 16), hidden))
    points = _points(None, len(model.blocks))
    return Structure(tuple(Merge(block, axis) for block, axis in points.items()), widths=tuple(widths))


def merged_maps(model: Any, images: Tensor) -> list[Tensor]:
    """Which token each patch went into, for every merge of a model: the same for all images.

    Args:
        model: behind `merge_tokens`.
        images: the maps are on their device.

    Returns:
        For every merge ``(H, W)`` int64: the number of the token, from 0, among the patch tokens behind the merge.
    """
    maps = []
    for i, merge in enumerate(merges_of(model)):
        if merge is not None:
            tokens = torch.arange(merge.merged_grid[0] * merge.merged_grid[1], device=images.device)
            places = unmerge_tokens(model, tokens.double().reshape(1, -1, 1), i, prefix=0)
            maps.append(places.long().reshape(model.patch_embed.grid_size))
    return maps


_VIT = cfg(crop_pct=0.9)

default_cfgs = generate_default_cfgs(
    {
        "cait_deit_tiny_patch16_224": _VIT,
        "cait_deit_small_patch16_224": _VIT,
        "cait_deit_base_patch16_224": _VIT,
        "cait_lvvit_tiny": cfg(first_conv="patch_embed.conv1"),
        "cait_lvvit_small": cfg(first_conv="patch_embed.conv1"),
    }
)


def _build(kind: Any, structure: Structure | str | PathLike[str] | None = None, **kwargs: Any) -> Any:
    model = kind(**kwargs)
    if structure is None:
        structure = uniform_structure(model)
    elif not isinstance(structure, Structure):
        structure = Structure.load(structure)
    return restructure(model, structure)


def _create(kind: Any, variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    args: dict[str, Any] = {**model_args, **kwargs}
    features: dict[str, Any] = dict(feature_cls="getter", out_indices=3)
    return build_model_with_cfg(partial(_build, kind), variant, pretrained, feature_cfg=features, **args)


@register_model
def cait_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on DeiT-T, 0.63 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _create(VisionTransformer, "cait_deit_tiny_patch16_224", pretrained, DEIT["tiny"], kwargs)


@register_model
def cait_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on DeiT-S, 2.21 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _create(VisionTransformer, "cait_deit_small_patch16_224", pretrained, DEIT["small"], kwargs)


@register_model
def cait_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on DeiT-B, 8.21 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _create(VisionTransformer, "cait_deit_base_patch16_224", pretrained, DEIT["base"], kwargs)


@register_model
def cait_lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on LV-ViT-T, 1.80 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _create(_lv_vit, "cait_lvvit_tiny", pretrained, dict(LVVIT["tiny"], depth=14), kwargs)


@register_model
def cait_lvvit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on LV-ViT-S, 2.75 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _create(_lv_vit, "cait_lvvit_small", pretrained, dict(LVVIT["small"], depth=16), kwargs)
