"""The models by name, for timm.create_model: built with counts that cost what was published. No weights are hosted."""

from os import PathLike
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..sit import _cfg
from .counts import published_counts
from .dynamic import DPSLVViT, DPSVisionTransformer
from .schedule import Schedule
from .slim import PSLVViT, PSVisionTransformer

_DEIT: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
}
_LVVIT_SMALL: dict[str, Any] = dict(embed_dim=384, depth=16, num_heads=6, skip_lam=2.0)
_VIT = _cfg(first_conv="patch_embed.proj", crop_pct=0.9)

default_cfgs = generate_default_cfgs(
    {
        "ps_deit_tiny_patch16_224": _VIT,
        "ps_deit_small_patch16_224": _VIT,
        "ps_deit_base_patch16_224": _VIT,
        "dps_deit_tiny_patch16_224": _VIT,
        "dps_deit_small_patch16_224": _VIT,
        "ps_lvvit_small": _cfg(),
        "dps_lvvit_small": _cfg(),
    }
)


def _create(kind: type[nn.Module], variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: Any) -> Any:
    args: dict[str, Any] = {**model_args, **kwargs}
    counts = published_counts[variant.removesuffix("_patch16_224")]
    if variant.startswith("dps"):
        args.setdefault("counts", counts)
    else:
        schedule = args.get("schedule")
        if schedule is None:
            args["schedule"] = Schedule.from_counts(counts, (14, 14))
        elif isinstance(schedule, (str, PathLike)):
            args["schedule"] = Schedule.load(schedule)
    return build_model_with_cfg(kind, variant, pretrained, feature_cfg=dict(feature_cls="getter"), **args)


@register_model
def ps_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> PSVisionTransformer:
    """PS-DeiT-T, 0.70 GMAC. ``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."""
    return _create(PSVisionTransformer, "ps_deit_tiny_patch16_224", pretrained, _DEIT["tiny"], kwargs)


@register_model
def ps_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> PSVisionTransformer:
    """PS-DeiT-S, 2.61 GMAC. ``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."""
    return _create(PSVisionTransformer, "ps_deit_small_patch16_224", pretrained, _DEIT["small"], kwargs)


@register_model
def ps_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> PSVisionTransformer:
    """PS-DeiT-B with PS-DeiT-S's tokens per layer, 10.0 GMAC. ``schedule`` as there."""
    return _create(PSVisionTransformer, "ps_deit_base_patch16_224", pretrained, _DEIT["base"], kwargs)


@register_model
def ps_lvvit_small(pretrained: bool = False, **kwargs: Any) -> PSLVViT:
    """PS-LV-ViT-S, 4.69 GMAC. ``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."""
    return _create(PSLVViT, "ps_lvvit_small", pretrained, _LVVIT_SMALL, kwargs)


@register_model
def dps_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DPSVisionTransformer:
    """DPS-DeiT-T, 0.60 GMAC, a reconstruction. ``counts`` and ``after`` as in `apply_dynamic`."""
    return _create(DPSVisionTransformer, "dps_deit_tiny_patch16_224", pretrained, _DEIT["tiny"], kwargs)


@register_model
def dps_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> DPSVisionTransformer:
    """DPS-DeiT-S, 2.41 GMAC, a reconstruction. ``counts`` and ``after`` as in `apply_dynamic`."""
    return _create(DPSVisionTransformer, "dps_deit_small_patch16_224", pretrained, _DEIT["small"], kwargs)


@register_model
def dps_lvvit_small(pretrained: bool = False, **kwargs: Any) -> DPSLVViT:
    """DPS-LV-ViT-S, 4.48 GMAC, a reconstruction. ``counts`` and ``after`` as in `apply_dynamic`."""
    return _create(DPSLVViT, "dps_lvvit_small", pretrained, _LVVIT_SMALL, kwargs)
