"""Small vision models of transformers, with weights that make attention and tokens differ."""

import torch
import transformers

from support.patched_models import applied
from support.weights import redrawn

#: 16 patches, 3 blocks
SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


def model_of(kind, **kwargs):
    torch.manual_seed(0)
    name = {"vit": "ViT", "clip": "CLIPVision", "siglip": "SiglipVision"}[kind.partition("_")[0]]
    config = getattr(transformers, f"{name}Config")(**SIZES, **kwargs)
    if kind == "vit_classifier":
        return redrawn(transformers.ViTForImageClassification(config))
    if kind == "vit_masked":
        config.encoder_stride = 8
        return redrawn(transformers.ViTForMaskedImageModeling(config))
    return redrawn(getattr(transformers, f"{name}Model")(config))


def patched(method, kind, **kwargs):
    return applied(model_of(kind, **kwargs), method)


def pooled(model, x):
    out = model(pixel_values=x)
    return out.logits if hasattr(out, "logits") else out.pooler_output
