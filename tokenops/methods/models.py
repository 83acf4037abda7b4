"""The models by name, for timm.create_model: timm's VisionTransformer with a method in it. No weights are hosted.

`checkpoint_path=`, `load_checkpoint` and ``load_state_dict`` take published weights, and those of the dense model, as
they are: names are translated while loading.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from os import PathLike
from typing import Any, NamedTuple

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from ..patching import Method, apply_patch
from .cait.structure import Structure, restructure, uniform_structure
from .evit import EViT
from .evo_levit import EvoLeViT
from .evo_vit import EvoViT
from .evo_vit import published_names as evo_names
from .levit_layers import HEADS
from .lvvit import lv_vit
from .lvvit import published_names as sit_names
from .patch_slimming import DynamicSlimming, PatchSlimming, Schedule, published_counts
from .sit import SiT

#: the sizes of DeiT, of LV-ViT, and of Evo-LeViT
DEIT: dict[str, dict[str, int]] = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}
LVVIT: dict[str, dict[str, Any]] = {
    size: dict(mlp_ratio=3.0, qkv_bias=False, skip_lam=2.0, embed_dim=64 * heads, num_heads=heads)
    for size, heads in (("tiny", 5), ("small", 6), ("medium", 8), ("large", 12))
}
LVVIT["large"].update(skip_lam=3.0, stem="conv6", img_size=288)
LEVIT: dict[str, dict[str, Any]] = {
    "128s": dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 6, 8), depth=(2, 3, 4)),
    "128": dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 8, 12), depth=(4, 4, 4)),
    "192": dict(embed_dim=(192, 288, 384), key_dim=32, num_heads=(3, 5, 6), depth=(4, 4, 4)),
    "256": dict(embed_dim=(256, 384, 512), key_dim=32, num_heads=(4, 6, 8), depth=(4, 4, 4)),
    "384": dict(embed_dim=(384, 512, 768), key_dim=32, num_heads=(6, 9, 12), depth=(4, 4, 4), drop_path_rate=0.1),
}
#: A reconstruction: the paper's DeiT rows were not at hand, so the places and numbers of tokens are those of Haurum et
#: al., Which Tokens to Use? (ICCVW 2023), at their keeping ratio of 0.5.
SIT_DEIT = dict(stage_blocks=(3, 3, 3, 3))
#: what Evo-ViT's form for DeiT is: the mean patch is normalised and classified
POOLED: dict[str, Any] = dict(global_pool="avg", fc_norm=True)


def patched(method: Callable[..., Method], names: Sequence[str], hook: Any = None, **kwargs: Any) -> Any:
    """A VisionTransformer of timm with a method, whose options are those of the names; `hook` translates weights."""
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    model = apply_patch(VisionTransformer(**kwargs), method(**options))
    if hook is not None:
        model.register_load_state_dict_pre_hook(hook)
    return model


evit = partial(patched, EViT, ("keep_rate", "reduction_loc", "fuse_token"))
evo_vit = partial(patched, EvoViT, ("prune_ratio", "tradeoff", "stages", "stage_wise"), evo_names)


def dense(**kwargs: Any) -> VisionTransformer:
    """An LV-ViT (`lv_vit`) that takes published weights."""
    model = lv_vit(**kwargs)
    model.register_load_state_dict_pre_hook(sit_names)
    return model


def sit(stage_blocks: Sequence[int], keeping_ratio: float = 0.5, **kwargs: Any) -> VisionTransformer:
    """A SiT: behind every stage but the last a slimming, which belongs to the block that follows."""
    if min(stage_blocks) < 1:
        raise ValueError(f"stage_blocks={tuple(stage_blocks)}, but every stage needs at least one block")
    model = dense(depth=sum(stage_blocks), **kwargs)
    return apply_patch(model, SiT(keeping_ratio, tuple(accumulate(stage_blocks))[:-1]))


def slimmed(schedule: Schedule | str | PathLike[str], **kwargs: Any) -> VisionTransformer:
    """A PS-ViT. In its state dict is the schedule, ``lifespan (N,)``, which slim weights bring with them."""
    found = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    model: Any = apply_patch(dense(**kwargs), PatchSlimming(found))
    model.register_state_dict_post_hook(_save_schedule)
    model.register_load_state_dict_pre_hook(_load_schedule)
    return model


def _schedule_of(model: Any) -> Schedule | None:
    """That of a model by name, None once its patch was removed."""
    return getattr(model, "schedule", None)


def _save_schedule(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if (schedule := _schedule_of(model)) is not None:
        state[prefix + "lifespan"] = torch.tensor(schedule.lifespan)


def _load_schedule(model: Any, state: dict[str, Any], prefix: str, *others: Any) -> None:
    saved, schedule = state.pop(prefix + "lifespan", None), _schedule_of(model)
    if saved is not None and schedule is not None and not saved.is_meta:
        try:
            model.schedule = Schedule.from_lifespan(saved.tolist(), schedule.depth, schedule.grid)
        except ValueError as error:
            others[-1].append(f"{prefix}lifespan: {error}")


def ranked(counts: Sequence[int], after: int = 2, **kwargs: Any) -> VisionTransformer:
    """A DPS-ViT."""
    return apply_patch(dense(**kwargs), DynamicSlimming(counts, after))


def compressed(structure: Structure | str | PathLike[str] | None = None, **kwargs: Any) -> VisionTransformer:
    """A merged and narrower model, by a structure or its file."""
    model = dense(**kwargs)
    if structure is None:
        structure = uniform_structure(model)
    return restructure(model, structure if isinstance(structure, Structure) else Structure.load(structure))


class Named(NamedTuple):
    """A model by name.

    Attributes:
        name: timm's.
        what: its docstring.
        make: makes it.
        arguments: of `make`, which those of timm.create_model go before.
        cfg: what timm is to know beside.
        features: of feature extraction.
    """

    name: str
    what: str
    make: Callable[..., Any]
    arguments: dict[str, Any]
    cfg: dict[str, Any] = {}
    features: dict[str, Any] = {}


def _models() -> list[Named]:
    large, stem, tokens = dict(input_size=(3, 384, 384)), dict(first_conv="patch_embed.conv1"), dict(output_fmt="NLC")
    letter, linear = {"tiny": "T", "small": "S", "base": "B"}, dict(stem="linear", norm_eps=1e-6)
    found = []

    where = "139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12. Options: those of `EViT`."
    for size, kwargs in DEIT.items():
        what = f"EViT on DeiT-{letter[size]}: {where}"
        found.append(Named(f"evit_deit_{size}_patch16_224", what, evit, kwargs, {}, tokens))

    for size, gmac, pixels in (
        ("tiny", 0.818, 224),
        ("small", 3.033, 224),
        ("base", 11.66, 224),
        ("small", 9.881, 384),
        ("base", 36.11, 384),
    ):
        patches = (pixels // 16) ** 2
        at = "" if pixels == 224 else " at 384 pixels"
        what = f"Evo-ViT on DeiT-{letter[size]}{at}: {gmac} GMAC, {patches // 2} of {patches} tokens in blocks 5 to 12."
        arguments = DEIT[size] | POOLED | ({} if pixels == 224 else {"img_size": pixels})
        options = " Options: those of `EvoViT`."
        name = f"evo_deit_{size}_patch16_{pixels}"
        found.append(Named(name, what + options, evo_vit, arguments, {} if pixels == 224 else large))

    for name, size, blocks, cost in (
        ("tiny", "tiny", (1, 1, 1, 11), "T: 0.99"),
        ("xsmall", "small", (1, 1, 1, 13), "XS: 1.48"),
        ("small", "small", (9, 3, 2, 2), "S: 4.02"),
        ("medium", "medium", (10, 4, 3, 3), "M: 8.02"),
        ("large", "large", (10, 4, 3, 7), "L at 288 pixels: 34.3"),
    ):
        *ends, depth = accumulate(blocks)
        left, where = "324/162/81/40" if size == "large" else "196/98/49/24", ", ".join(map(str, ends))
        what = f"SiT-{cost} GMAC, tokens {left} after blocks {where} of {depth}."
        of_size = stem | (dict(input_size=(3, 288, 288)) if size == "large" else {})
        found.append(Named(f"sit_lvvit_{name}", what, sit, LVVIT[size] | dict(stage_blocks=blocks), of_size, tokens))
    for size, depth, what in (
        ("tiny", 14, "LV-ViT-T, dense: 3.46 GMAC, teacher of SiT-T."),
        ("small", 16, "LV-ViT-S, dense: 5.53 GMAC, teacher of SiT-XS and SiT-S."),
        ("medium", 20, "LV-ViT-M, dense: 11.8 GMAC, teacher of SiT-M."),
        ("large", 24, "LV-ViT-L at 288 pixels, dense: 56.0 GMAC, teacher of SiT-L."),
    ):
        of_size = stem | (dict(input_size=(3, 288, 288)) if size == "large" else {})
        found.append(Named(f"lvvit_{size}", what, dense, LVVIT[size] | dict(depth=depth), of_size))
    for size, kwargs in DEIT.items():
        what = f"SiT on DeiT-{letter[size]}, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."
        found.append(Named(f"sit_deit_{size}", what, sit, linear | SIT_DEIT | kwargs, {}, tokens))

    given = "``schedule``: a Schedule or its file; by default a placeholder (`centre_order`)."
    chosen = "a reconstruction. ``counts`` and ``after`` as in `DynamicSlimming`."
    for name, what in (
        ("ps_deit_tiny", f"PS-DeiT-T, 0.70 GMAC. {given}"),
        ("ps_deit_small", f"PS-DeiT-S, 2.61 GMAC. {given}"),
        ("ps_deit_base", "PS-DeiT-B with PS-DeiT-S's tokens per layer, 10.0 GMAC. ``schedule`` as there."),
        ("ps_lvvit_small", f"PS-LV-ViT-S, 4.69 GMAC. {given}"),
        ("dps_deit_tiny", f"DPS-DeiT-T, 0.60 GMAC, {chosen}"),
        ("dps_deit_small", f"DPS-DeiT-S, 2.41 GMAC, {chosen}"),
        ("dps_lvvit_small", f"DPS-LV-ViT-S, 4.48 GMAC, {chosen}"),
    ):
        kind, form, size = name.split("_")
        counts = published_counts[name]
        plan: dict[str, Any] = {"counts": counts} if kind == "dps" else {}
        if kind == "ps":
            plan = {"schedule": Schedule.from_counts(counts, (14, 14))}
        sizes = LVVIT[size] | dict(depth=16) if form == "lvvit" else linear | DEIT[size]
        of_form = stem if form == "lvvit" else dict(crop_pct=0.9)
        name += "" if form == "lvvit" else "_patch16_224"
        found.append(Named(name, what, ranked if kind == "dps" else slimmed, sizes | plan, of_form))

    given = "a reconstruction. ``structure``: a `Structure` or its file."
    for size, gmac in (("tiny", 0.63), ("small", 2.21), ("base", 8.21)):
        what = f"CAIT on DeiT-{letter[size]}, {gmac} GMAC, {given}"
        found.append(Named(f"cait_deit_{size}_patch16_224", what, compressed, linear | DEIT[size], dict(crop_pct=0.9)))
    for size, depth, gmac in (("tiny", 14, 1.80), ("small", 16, 2.75)):
        what = f"CAIT on LV-ViT-{letter[size]}, {gmac:.2f} GMAC, {given}"
        found.append(Named(f"cait_lvvit_{size}", what, compressed, LVVIT[size] | dict(depth=depth), stem))

    levit: dict[str, Any] = dict(first_conv="patch_embed.0.c", classifier=tuple(f"{name}.l" for name in HEADS))
    for size, pixels, gmac, kept in (
        ("128s", 224, 0.256, "24 and 8 patches of 49 and 16 in stages 2, 3"),
        ("128", 224, 0.305, "98, 24 and 8 patches of 196, 49 and 16"),
        ("192", 224, 0.510, "98, 24 and 8 patches of 196, 49 and 16"),
        ("256", 224, 0.880, "98, 24 and 8 patches of 196, 49 and 16"),
        ("384", 224, 1.849, "98, 24 and 8 patches of 196, 49 and 16"),
        ("128s", 384, 0.825, "72 and 18 patches of 144 and 36 in stages 2, 3"),
        ("128", 384, 0.984, "288, 72 and 18 patches of 576, 144 and 36"),
        ("192", 384, 1.654, "288, 72 and 18 patches of 576, 144 and 36"),
        ("256", 384, 2.763, "288, 72 and 18 patches of 576, 144 and 36"),
        ("384", 384, 5.622, "288, 72 and 18 patches of 576, 144 and 36"),
    ):
        small = pixels == 224
        what = f"Evo-LeViT-{size.upper()}{'' if small else ' at 384 pixels'}: {gmac:.3f} GMAC, keeps {kept}."
        name, of_size = f"evo_levit_{size}{'' if small else '_img384'}", levit | ({} if small else large)
        arguments = LEVIT[size] | dict(img_size=pixels)
        found.append(Named(name, what, EvoLeViT, arguments, of_size, dict(out_indices=(0, 1, 2))))
    return found


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


def _register(named: Named) -> None:
    """A function of this module with the name, as timm registers them."""

    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        arguments = {**named.arguments, **kwargs}
        features: dict[str, Any] = dict(feature_cls="getter", out_indices=3) | named.features
        if "stage_blocks" in arguments:
            features["out_indices"] = [end - 1 for end in accumulate(arguments["stage_blocks"])]
        return build_model_with_cfg(named.make, named.name, pretrained, feature_cfg=features, **arguments)

    entry.__name__ = entry.__qualname__ = named.name
    entry.__doc__ = named.what
    globals()[named.name] = register_model(entry)


default_cfgs = generate_default_cfgs({named.name: cfg(**named.cfg) for named in _models()})
for _named in _models():
    _register(_named)
