"""The models by name, for timm.create_model: timm's VisionTransformer with a method in it. No weights are hosted.

`checkpoint_path=`, `load_checkpoint` and ``load_state_dict`` take published weights, and those of the dense model, as
they are: names are translated while loading.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from os import PathLike
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from ..patching import Method, apply_patch
from .cait.structure import Structure, restructure, uniform_structure
from .evit import EViT
from .evo_vit import EvoViT
from .evo_vit import published_names as evo_names
from .lvvit import lv_vit
from .lvvit import published_names as sit_names
from .patch_slimming import DynamicSlimming, PatchSlimming, Schedule, published_counts
from .sit import SiT

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


#: the sizes of LV-ViT
LVVIT: dict[str, dict[str, Any]] = {
    size: dict(mlp_ratio=3.0, qkv_bias=False, skip_lam=2.0, embed_dim=64 * heads, num_heads=heads)
    for size, heads in (("tiny", 5), ("small", 6), ("medium", 8), ("large", 12))
}
LVVIT["large"].update(skip_lam=3.0, stem="conv6", img_size=288)
#: A reconstruction: the paper's DeiT rows were not at hand, so the places and numbers of tokens are those of Haurum et
#: al., Which Tokens to Use? (ICCVW 2023), at their keeping ratio of 0.5.
SIT_DEIT: dict[str, Any] = dict(stem="linear", norm_eps=1e-6, stage_blocks=(3, 3, 3, 3))

EVIT = ("keep_rate", "reduction_loc", "fuse_token")
EVO_VIT = ("prune_ratio", "tradeoff", "stages", "stage_wise")


def _evit(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    make = partial(patched, EViT, EVIT)
    return create(variant, pretrained, make, {**DEIT[size], **kwargs}, dict(output_fmt="NLC"))


def _evo_deit(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    make = partial(patched, EvoViT, EVO_VIT, evo_names)
    return create(variant, pretrained, make, {**DEIT[size], "global_pool": "avg", "fc_norm": True, **kwargs})


def _lv_vit(**kwargs: Any) -> VisionTransformer:
    model = lv_vit(**kwargs)
    model.register_load_state_dict_pre_hook(sit_names)
    return model


def _lvvit(variant: str, size: str, depth: int, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    return create(variant, pretrained, _lv_vit, {**LVVIT[size], "depth": depth, **kwargs})


def _slimmed(stage_blocks: Sequence[int], keeping_ratio: float = 0.5, **kwargs: Any) -> VisionTransformer:
    """A SiT: behind every stage but the last a slimming, which belongs to the block that follows."""
    if min(stage_blocks) < 1:
        raise ValueError(f"stage_blocks={tuple(stage_blocks)}, but every stage needs at least one block")
    model = _lv_vit(depth=sum(stage_blocks), **kwargs)
    return apply_patch(model, SiT(keeping_ratio, tuple(accumulate(stage_blocks))[:-1]))


def _sit(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    ends = [end - 1 for end in accumulate(kwargs["stage_blocks"])]
    return create(variant, pretrained, _slimmed, kwargs, dict(out_indices=ends, output_fmt="NLC"))


def _sit_lvvit(variant: str, size: str, stage_blocks: Sequence[int], pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return _sit(variant, pretrained, {**LVVIT[size], "stage_blocks": stage_blocks, **kwargs})


def _sit_deit(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return _sit(variant, pretrained, {**SIT_DEIT, **DEIT[size], **kwargs})


def _ps(lvvit: bool, schedule: Schedule | str | PathLike[str], **kwargs: Any) -> VisionTransformer:
    """With ``lifespan (N,)``, the schedule, in the state dict: weights bring theirs with them, dense ones none."""
    found = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    model: Any = apply_patch(_lv_vit(**kwargs) if lvvit else VisionTransformer(**kwargs), PatchSlimming(found))
    model.register_state_dict_post_hook(_save_schedule)
    model.register_load_state_dict_pre_hook(_load_schedule)
    return model


def _save_schedule(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[prefix + "lifespan"] = torch.tensor(model.schedule.lifespan)


def _load_schedule(model: Any, state: dict[str, Any], prefix: str, *others: Any) -> None:
    saved, schedule = state.pop(prefix + "lifespan", None), model.schedule
    if saved is not None and not saved.is_meta:
        try:
            model.schedule = Schedule.from_lifespan(saved.tolist(), schedule.depth, schedule.grid)
        except ValueError as error:
            others[-1].append(f"{prefix}lifespan: {error}")


def _dps(lvvit: bool, counts: Sequence[int], after: int = 2, **kwargs: Any) -> VisionTransformer:
    return apply_patch(_lv_vit(**kwargs) if lvvit else VisionTransformer(**kwargs), DynamicSlimming(counts, after))


def _slim(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    """PS-ViT or DPS-ViT, with the counts that cost what was published."""
    lvvit, counts = "lvvit" in variant, published_counts[variant.removesuffix("_patch16_224")]
    sizes: dict[str, Any] = {**LVVIT[size], "depth": 16} if lvvit else {**DEIT[size], "depth": 12}
    if variant.startswith("dps"):
        return create(variant, pretrained, partial(_dps, lvvit), {**sizes, "counts": counts, **kwargs})
    return create(
        variant,
        pretrained,
        partial(_ps, lvvit),
        {**sizes, "schedule": Schedule.from_counts(counts, (14, 14)), **kwargs},
    )


def _compressed(
    lvvit: bool, structure: Structure | str | PathLike[str] | None = None, **kwargs: Any
) -> VisionTransformer:
    model = _lv_vit(**kwargs) if lvvit else VisionTransformer(**kwargs)
    if structure is None:
        structure = uniform_structure(model)
    return restructure(model, structure if isinstance(structure, Structure) else Structure.load(structure))


def _cait(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    lvvit = "lvvit" in variant
    sizes: dict[str, Any] = {**LVVIT[size], "depth": 14 if size == "tiny" else 16} if lvvit else {**DEIT[size]}
    return create(variant, pretrained, partial(_compressed, lvvit), {**sizes, **kwargs})


_STEM = dict(first_conv="patch_embed.conv1")
default_cfgs = generate_default_cfgs(
    {
        **{f"{kind}_{size}": cfg(**_STEM) for kind in ("sit_lvvit", "lvvit") for size in ("tiny", "small", "medium")},
        "sit_lvvit_xsmall": cfg(**_STEM),
        **{f"{kind}_large": cfg(**_STEM, input_size=(3, 288, 288)) for kind in ("sit_lvvit", "lvvit")},
        **{f"sit_deit_{size}": cfg() for size in DEIT},
        **{f"ps_deit_{size}_patch16_224": cfg(crop_pct=0.9) for size in DEIT},
        **{f"dps_deit_{size}_patch16_224": cfg(crop_pct=0.9) for size in ("tiny", "small")},
        **{f"{kind}_lvvit_small": cfg(**_STEM) for kind in ("ps", "dps")},
        **{f"cait_deit_{size}_patch16_224": cfg(crop_pct=0.9) for size in DEIT},
        **{f"cait_lvvit_{size}": cfg(**_STEM) for size in ("tiny", "small")},
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


@register_model
def sit_lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT-T: 0.99 GMAC, tokens 196/98/49/24 after blocks 1, 2, 3 of 14."""
    return _sit_lvvit("sit_lvvit_tiny", "tiny", (1, 1, 1, 11), pretrained, kwargs)


@register_model
def sit_lvvit_xsmall(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT-XS: 1.48 GMAC, tokens 196/98/49/24 after blocks 1, 2, 3 of 16."""
    return _sit_lvvit("sit_lvvit_xsmall", "small", (1, 1, 1, 13), pretrained, kwargs)


@register_model
def sit_lvvit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT-S: 4.02 GMAC, tokens 196/98/49/24 after blocks 9, 12, 14 of 16."""
    return _sit_lvvit("sit_lvvit_small", "small", (9, 3, 2, 2), pretrained, kwargs)


@register_model
def sit_lvvit_medium(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT-M: 8.02 GMAC, tokens 196/98/49/24 after blocks 10, 14, 17 of 20."""
    return _sit_lvvit("sit_lvvit_medium", "medium", (10, 4, 3, 3), pretrained, kwargs)


@register_model
def sit_lvvit_large(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT-L at 288 pixels: 34.3 GMAC, tokens 324/162/81/40 after blocks 10, 14, 17 of 24."""
    return _sit_lvvit("sit_lvvit_large", "large", (10, 4, 3, 7), pretrained, kwargs)


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LV-ViT-T, dense: 3.46 GMAC, teacher of SiT-T."""
    return _lvvit("lvvit_tiny", "tiny", 14, pretrained, kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LV-ViT-S, dense: 5.53 GMAC, teacher of SiT-XS and SiT-S."""
    return _lvvit("lvvit_small", "small", 16, pretrained, kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LV-ViT-M, dense: 11.8 GMAC, teacher of SiT-M."""
    return _lvvit("lvvit_medium", "medium", 20, pretrained, kwargs)


@register_model
def lvvit_large(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LV-ViT-L at 288 pixels, dense: 56.0 GMAC, teacher of SiT-L."""
    return _lvvit("lvvit_large", "large", 24, pretrained, kwargs)


@register_model
def sit_deit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT on DeiT-T, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."""
    return _sit_deit("sit_deit_tiny", "tiny", pretrained, kwargs)


@register_model
def sit_deit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT on DeiT-S, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."""
    return _sit_deit("sit_deit_small", "small", pretrained, kwargs)


@register_model
def sit_deit_base(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SiT on DeiT-B, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."""
    return _sit_deit("sit_deit_base", "base", pretrained, kwargs)


@register_model
def ps_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """PS-DeiT-T, 0.70 GMAC. ``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."""
    return _slim("ps_deit_tiny_patch16_224", "tiny", pretrained, kwargs)


@register_model
def ps_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """PS-DeiT-S, 2.61 GMAC. ``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."""
    return _slim("ps_deit_small_patch16_224", "small", pretrained, kwargs)


@register_model
def ps_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """PS-DeiT-B with PS-DeiT-S's tokens per layer, 10.0 GMAC. ``schedule`` as there."""
    return _slim("ps_deit_base_patch16_224", "base", pretrained, kwargs)


@register_model
def ps_lvvit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """PS-LV-ViT-S, 4.69 GMAC. ``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."""
    return _slim("ps_lvvit_small", "small", pretrained, kwargs)


@register_model
def dps_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DPS-DeiT-T, 0.60 GMAC, a reconstruction. ``counts`` and ``after`` as in `DynamicSlimming`."""
    return _slim("dps_deit_tiny_patch16_224", "tiny", pretrained, kwargs)


@register_model
def dps_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DPS-DeiT-S, 2.41 GMAC, a reconstruction. ``counts`` and ``after`` as in `DynamicSlimming`."""
    return _slim("dps_deit_small_patch16_224", "small", pretrained, kwargs)


@register_model
def dps_lvvit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DPS-LV-ViT-S, 4.48 GMAC, a reconstruction. ``counts`` and ``after`` as in `DynamicSlimming`."""
    return _slim("dps_lvvit_small", "small", pretrained, kwargs)


@register_model
def cait_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on DeiT-T, 0.63 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _cait("cait_deit_tiny_patch16_224", "tiny", pretrained, kwargs)


@register_model
def cait_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on DeiT-S, 2.21 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _cait("cait_deit_small_patch16_224", "small", pretrained, kwargs)


@register_model
def cait_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on DeiT-B, 8.21 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _cait("cait_deit_base_patch16_224", "base", pretrained, kwargs)


@register_model
def cait_lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on LV-ViT-T, 1.80 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _cait("cait_lvvit_tiny", "tiny", pretrained, kwargs)


@register_model
def cait_lvvit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """CAIT on LV-ViT-S, 2.75 GMAC, a reconstruction. ``structure``: a `Structure` or its file."""
    return _cait("cait_lvvit_small", "small", pretrained, kwargs)
