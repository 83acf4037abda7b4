"""Whole methods, plug-ins of `tokenops.apply_patch`, and the models by name: importing this registers them with timm.

>>> import timm, torch
>>> model = timm.create_model("evit_deit_tiny_patch16_224", num_classes=10).eval()
>>> model(torch.randn(1, 3, 224, 224)).shape
torch.Size([1, 10])
"""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError("tokenops.methods needs timm: pip install 'tokenops[models]'") from error

from . import cait, models, patch_slimming
from .cait.merging import CAIT
from .checkpoint import init_from_teacher, load_checkpoint
from .evit import EViT, keep_rate_at
from .evo_levit import EvoLeViT, evo_levit_loss
from .evo_vit import EvoViT, evo_vit_loss, stage_wise_at
from .lvvit import for_inference, lv_vit
from .patch_slimming.method import PatchSlimming
from .random import Random
from .sit import SiT
from .tome import ToMe

__all__ = [
    "CAIT",
    "EViT",
    "EvoLeViT",
    "EvoViT",
    "PatchSlimming",
    "Random",
    "SiT",
    "ToMe",
    "cait",
    "evo_levit_loss",
    "evo_vit_loss",
    "for_inference",
    "init_from_teacher",
    "keep_rate_at",
    "load_checkpoint",
    "lv_vit",
    "models",
    "patch_slimming",
    "stage_wise_at",
]
