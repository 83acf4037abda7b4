"""The models by name, for timm.create_model: timm's VisionTransformer with a method in it. No weights are hosted.

`checkpoint_path=`, `load_checkpoint` and ``load_state_dict`` take published weights, and those of the dense model, as
they are: names are translated while loading.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from ..patching import Method, apply_patch
from .evit import EViT
from .evo_vit import EvoViT, published_names

#: the sizes of DeiT
DEIT: dict[str, dict[str, int]] = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}


def cfg(**kwargs: Any) -> dict[str, Any]:
    """What timm knows of a model beside its code."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


def create(
    variant: str,
    pretrained: bool,
    make: Callable[..., Any],
    kwargs: dict[str, Any],
    features: dict[str, Any] | None = None,
) -> Any:
    """A model as timm makes them."""
    return build_model_with_cfg(
        make,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls="getter", out_indices=3) | (features or {}),
        **kwargs,
    )


def patched(method: Callable[..., Method], names: Sequence[str], hook: Any = None, **kwargs: Any) -> Any:
    """A VisionTransformer of timm with a method, whose options are those of the names; `hook` translates weights."""
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    model = apply_patch(VisionTransformer(**kwargs), method(**options))
    if hook is not None:
        model.register_load_state_dict_pre_hook(hook)
    return model


EVIT = ("keep_rate", "reduction_loc", "fuse_token")
EVO_VIT = ("prune_ratio", "tradeoff", "stages", "stage_wise")


def _evit(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    make = partial(patched, EViT, EVIT)
    return create(variant, pretrained, make, {**DEIT[size], **kwargs}, dict(output_fmt="NLC"))


def _evo_deit(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    make = partial(patched, EvoViT, EVO_VIT, published_names)
    return create(variant, pretrained, make, {**DEIT[size], "global_pool": "avg", "fc_norm": True, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        **{f"evit_deit_{size}_patch16_224": cfg() for size in DEIT},
        **{f"evo_deit_{size}_patch16_224": cfg() for size in DEIT},
        **{f"evo_deit_{size}_patch16_384": cfg(input_size=(3, 384, 384)) for size in ("small", "base")},
    }
)


@register_model
def evit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """EViT on DeiT-T: 139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12. Options: those of `EViT`."""
    return _evit("evit_deit_tiny_patch16_224", "tiny", pretrained, kwargs)


@register_model
def evit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """EViT on DeiT-S: 139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12. Options: those of `EViT`."""
    return _evit("evit_deit_small_patch16_224", "small", pretrained, kwargs)


@register_model
def evit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """EViT on DeiT-B: 139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12. Options: those of `EViT`."""
    return _evit("evit_deit_base_patch16_224", "base", pretrained, kwargs)


@register_model
def evo_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Evo-ViT on DeiT-T: 0.818 GMAC, 98 of 196 tokens in blocks 5 to 12. Options: those of `EvoViT`."""
    return _evo_deit("evo_deit_tiny_patch16_224", "tiny", pretrained, kwargs)


@register_model
def evo_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Evo-ViT on DeiT-S: 3.033 GMAC, 98 of 196 tokens in blocks 5 to 12. Options: those of `EvoViT`."""
    return _evo_deit("evo_deit_small_patch16_224", "small", pretrained, kwargs)


@register_model
def evo_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Evo-ViT on DeiT-B: 11.66 GMAC, 98 of 196 tokens in blocks 5 to 12. Options: those of `EvoViT`."""
    return _evo_deit("evo_deit_base_patch16_224", "base", pretrained, kwargs)


@register_model
def evo_deit_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Evo-ViT on DeiT-S at 384 pixels: 9.881 GMAC, 288 of 576 tokens in blocks 5 to 12. Options: those of `EvoViT`."""
    return _evo_deit("evo_deit_small_patch16_384", "small", pretrained, dict(img_size=384, **kwargs))


@register_model
def evo_deit_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Evo-ViT on DeiT-B at 384 pixels: 36.11 GMAC, 288 of 576 tokens in blocks 5 to 12. Options: those of `EvoViT`."""
    return _evo_deit("evo_deit_base_patch16_384", "base", pretrained, dict(img_size=384, **kwargs))
