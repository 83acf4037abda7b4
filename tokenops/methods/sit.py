"""SiT, self-slimmed vision transformers: the five published LV-ViT models, SiT on DeiT, and the dense LV-ViT teachers.

All are registered with timm. No weights are hosted: `checkpoint_path=` (or `load_checkpoint`) takes published ones.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..nn import ReverseTokenSlimming, TokenSlimming
from .lvvit import LVViT


class SiT(LVViT):
    """Self-slimmed vision transformer: after every stage but the last, a TokenSlimming halves the patch tokens.

    Args:
        stage_blocks: blocks per stage. After stage i (from 1) ``int(N * keeping_ratio**i)`` of N patch tokens are left.
        keeping_ratio: the part of the tokens each slimming keeps.
        rtsm: whether there are the reverse modules (one for each block that has fewer tokens than the grid), which
            training's feature distillation needs (`forward_distill`) and inference does not. Without them an official
            state dict still loads with strict=True: its RTSM entries are left out.
        **kwargs: those of `LVViT`, except ``depth``.

    Raises:
        ValueError: a stage has no block, or no token is left.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022).
    """

    def __init__(
        self,
        stage_blocks: Sequence[int] = (1, 1, 1, 13),
        keeping_ratio: float = 0.5,
        rtsm: bool = True,
        **kwargs: Any,
    ) -> None:
        if min(stage_blocks) < 1:
            raise ValueError(f"stage_blocks={tuple(stage_blocks)}, but every stage needs at least one block")
        if not 0 < keeping_ratio <= 1:
            raise ValueError(f"keeping_ratio={keeping_ratio}, but it must be above 0 and at most 1")
        super().__init__(depth=sum(stage_blocks), **kwargs)
        self.tokens_per_stage = [int(self.num_patches * keeping_ratio**i) for i in range(len(stage_blocks))]
        self.slim_after = [sum(stage_blocks[:i]) - 1 for i in range(1, len(stage_blocks))]
        dim = self.embed_dim
        self.tsm = nn.ModuleList(TokenSlimming(dim, k) for k in self.tokens_per_stage[1:])
        self.rtsm: nn.ModuleList | None = None
        if rtsm:
            left = [self.tokens_per_stage[sum(i >= end for end in self.slim_after)] for i in range(len(self.blocks))]
            self.rtsm = nn.ModuleList(
                ReverseTokenSlimming(dim, k, self.num_patches) if k < self.num_patches else nn.Identity() for k in left
            )
        self.register_load_state_dict_pre_hook(_leave_rtsm_out)

    def slim(self, i: int, x: Tensor) -> Tensor:
        """What goes on to the block after ``i``: fewer tokens, where a stage ends."""
        if i not in self.slim_after:
            return x
        return self.tsm[self.slim_after.index(i)](x, prefix=self.num_prefix_tokens)

    def restore(self, i: int, tokens: Tensor) -> Tensor:
        """The RTSM of block ``i``: all N patch tokens from those that are left."""
        if self.rtsm is None:
            raise RuntimeError("forward_distill needs the reverse modules: make the model with rtsm=True")
        return self.rtsm[i](tokens)

    @torch.no_grad()
    def aggregation_maps(self, x: Tensor) -> list[Tensor]:
        """Which image patches the slim tokens of each stage draw on: ``(B, K, grid height, grid width)`` a slimming.

        The aggregation weights of the slimmings are composed, so each map sums to 1 over the grid. What attention mixes
        in between is not followed: a token stands for its own place.
        """
        x = self.embed(x)
        maps: list[Tensor] = []
        for i in range(max(self.slim_after, default=-1) + 1):
            x = self.run_block(i, x)
            if i in self.slim_after:
                tsm: Any = self.tsm[len(maps)]
                drawn = tsm.aggregation(x, self.num_prefix_tokens).transpose(1, 2)
                maps.append(drawn @ maps[-1] if maps else drawn)
            x = self.slim(i, x)
        return [m.unflatten(2, self.grid_size) for m in maps]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates at `indices` do not need; returns the indices counted from 0."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.slim_after = [i for i in self.slim_after if i < len(self.blocks) - 1]
        self.tsm = self.tsm[: len(self.slim_after)]
        self.drop_rtsm()
        return take

    def drop_rtsm(self) -> "SiT":
        """Drop the reverse modules, which inference has no use for. Returns the model."""
        self.rtsm = None
        return self

    def for_inference(self) -> "SiT":
        """Everything inference can do without is dropped or folded: `drop_rtsm`, `fuse`. Load weights before."""
        super().for_inference()
        return self.drop_rtsm()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: a slimming belongs to the block before it."""
        groups = super().group_matcher(coarse)
        slimmings = [(rf"^tsm\.{j}\.", (block,)) for j, block in enumerate(self.slim_after)]
        groups["blocks"] += [(r"^rtsm\.(\d+)", None), *slimmings]
        return groups


def _leave_rtsm_out(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if module.rtsm is None:
        for key in [key for key in state_dict if key.startswith(prefix + "rtsm.")]:
            del state_dict[key]


def _cfg(**kwargs: Any) -> dict[str, Any]:
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
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
        **kwargs,
    }


_LVVIT: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=320, num_heads=5, skip_lam=2.0),
    "small": dict(embed_dim=384, num_heads=6, skip_lam=2.0),
    "medium": dict(embed_dim=512, num_heads=8, skip_lam=2.0),
    "large": dict(embed_dim=768, num_heads=12, skip_lam=3.0, stem="conv6", img_size=288),
}
#: A reconstruction: the paper's DeiT rows were not at hand, so the places and numbers of tokens are those of Haurum et
#: al., Which Tokens to Use? (ICCVW 2023), at their keeping ratio of 0.5.
_DEIT: dict[str, Any] = dict(
    stem="linear", mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, aux_head=False, stage_blocks=(3, 3, 3, 3)
)
_LARGE = _cfg(input_size=(3, 288, 288))
_VIT = _cfg(first_conv="patch_embed.proj")

default_cfgs = generate_default_cfgs(
    {
        "sit_lvvit_tiny": _cfg(),
        "sit_lvvit_xsmall": _cfg(),
        "sit_lvvit_small": _cfg(),
        "sit_lvvit_medium": _cfg(),
        "sit_lvvit_large": _LARGE,
        "sit_deit_tiny": _VIT,
        "sit_deit_small": _VIT,
        "sit_deit_base": _VIT,
        "lvvit_tiny": _cfg(),
        "lvvit_small": _cfg(),
        "lvvit_medium": _cfg(),
        "lvvit_large": _LARGE,
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    args = {**model_args, **kwargs}
    features: dict[str, Any] = dict(feature_cls="getter", out_indices=3)
    if "stage_blocks" in args:  # the end of every stage, as tokens: slim tokens form no grid
        features.update(out_indices=[end - 1 for end in accumulate(args["stage_blocks"])], output_fmt="NLC")
    model_cls = SiT if "stage_blocks" in args else LVViT
    return build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=features, **args)


@register_model
def sit_lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-T: 0.99 GMAC, tokens 196/98/49/24 after blocks 1, 2, 3 of 14."""
    return _create("sit_lvvit_tiny", pretrained, dict(_LVVIT["tiny"], stage_blocks=(1, 1, 1, 11)), kwargs)


@register_model
def sit_lvvit_xsmall(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-XS: 1.48 GMAC, tokens 196/98/49/24 after blocks 1, 2, 3 of 16."""
    return _create("sit_lvvit_xsmall", pretrained, dict(_LVVIT["small"], stage_blocks=(1, 1, 1, 13)), kwargs)


@register_model
def sit_lvvit_small(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-S: 4.02 GMAC, tokens 196/98/49/24 after blocks 9, 12, 14 of 16."""
    return _create("sit_lvvit_small", pretrained, dict(_LVVIT["small"], stage_blocks=(9, 3, 2, 2)), kwargs)


@register_model
def sit_lvvit_medium(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-M: 8.02 GMAC, tokens 196/98/49/24 after blocks 10, 14, 17 of 20."""
    return _create("sit_lvvit_medium", pretrained, dict(_LVVIT["medium"], stage_blocks=(10, 4, 3, 3)), kwargs)


@register_model
def sit_lvvit_large(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT-L at 288 pixels: 34.3 GMAC, tokens 324/162/81/40 after blocks 10, 14, 17 of 24."""
    return _create("sit_lvvit_large", pretrained, dict(_LVVIT["large"], stage_blocks=(10, 4, 3, 7)), kwargs)


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T, dense: 3.46 GMAC, teacher of SiT-T."""
    return _create("lvvit_tiny", pretrained, dict(_LVVIT["tiny"], depth=14), kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S, dense: 5.53 GMAC, teacher of SiT-XS and SiT-S."""
    return _create("lvvit_small", pretrained, dict(_LVVIT["small"], depth=16), kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M, dense: 11.8 GMAC, teacher of SiT-M."""
    return _create("lvvit_medium", pretrained, dict(_LVVIT["medium"], depth=20), kwargs)


@register_model
def lvvit_large(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L at 288 pixels, dense: 56.0 GMAC, teacher of SiT-L."""
    return _create("lvvit_large", pretrained, dict(_LVVIT["large"], depth=24), kwargs)


@register_model
def sit_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT on DeiT-T, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."""
    return _create("sit_deit_tiny", pretrained, dict(_DEIT, embed_dim=192, num_heads=3), kwargs)


@register_model
def sit_deit_small(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT on DeiT-S, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."""
    return _create("sit_deit_small", pretrained, dict(_DEIT, embed_dim=384, num_heads=6), kwargs)


@register_model
def sit_deit_base(pretrained: bool = False, **kwargs: Any) -> SiT:
    """SiT on DeiT-B, a reconstruction: slimmed to 98/49/24 tokens after blocks 3, 6, 9 of 12."""
    return _create("sit_deit_base", pretrained, dict(_DEIT, embed_dim=768, num_heads=12), kwargs)
