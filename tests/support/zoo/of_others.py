"""torchvision's models, and open_clip's."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from support.zoo.entry import GRID, PATCH, SIDE, STAGES, Entry, images, words


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=SIDE, patch_size=PATCH, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def torchvision_model(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name)


TEXT = dict(context_length=4, vocab_size=64, width=32, heads=2, layers=1)
TOWER = dict(layers=3, width=32, head_width=16, patch_size=PATCH, image_size=SIDE)


def open_clip_tower(**given: Any) -> nn.Module:
    """CLIP's image tower in open_clip's own form."""
    from open_clip.transformer import VisionTransformer

    sizes: dict[str, Any] = dict(image_size=SIDE, patch_size=PATCH, width=32, layers=3, heads=2, mlp_ratio=2.0)
    return VisionTransformer(**sizes, output_dim=16, **given)


def open_clip_pair(kind: str, tower: dict[str, Any]) -> nn.Module:
    import open_clip

    return getattr(open_clip, kind)(embed_dim=16, vision_cfg=tower, text_cfg=TEXT)


def pair_inputs(side: int = SIDE) -> dict[str, Tensor]:
    return {**images("image", side=side), "text": words()["input_ids"]}


def entries() -> list[Entry]:
    made = [Entry("torchvision", "VisionTransformer", torchvision_vit, images)]
    refused = dict.fromkeys(("swin_t", "swin_v2_t", "maxvit_t", "convnext_tiny"), STAGES) | {"resnet18": GRID}
    made += [
        Entry("torchvision", name, partial(torchvision_model, name), images, bare=True, note=note)
        for name, note in refused.items()
    ]
    towers: dict[str, dict[str, Any]] = {
        "VisionTransformer": {},
        "VisionTransformer, LayerScale": dict(ls_init_value=0.5),
        "VisionTransformer, average": dict(pool_type="avg"),
        "VisionTransformer, attentional pool": dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
        "VisionTransformer, tokens": dict(output_tokens=True),
    }
    made += [Entry("open_clip", name, partial(open_clip_tower, **given), images) for name, given in towers.items()]
    timm_tower = dict(timm_model_name="test_vit", timm_pool="", timm_proj="linear", image_size=160)
    pairs = (
        ("CLIP", "CLIP", TOWER),
        ("CustomTextCLIP", "CustomTextCLIP", TOWER),
        ("CLIP, timm tower", "CLIP", timm_tower),
        ("CLIP, ResNet tower", "CLIP", dict(layers=[1, 1, 1, 1], width=16, image_size=SIDE, head_width=16)),
    )
    for name, kind, tower in pairs:
        make = partial(open_clip_pair, kind, tower)
        given, blocks = (partial(pair_inputs, 160), 6) if "timm" in name else (pair_inputs, 3)
        note = GRID if "ResNet" in name else ""
        results = ("0", "image_features")
        patches = 100 if "timm" in name else 16
        made.append(Entry("open_clip", name, make, given, blocks, patches, results, note=note))
    return made
