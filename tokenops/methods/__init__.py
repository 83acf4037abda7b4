"""Whole methods on timm-style models. Importing this package registers its models with `timm.create_model`.

>>> import timm, torch
>>> model = timm.create_model("sit_lvvit_xsmall", num_classes=10).for_inference()
>>> model(torch.randn(1, 3, 224, 224)).shape
torch.Size([1, 10])
"""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError("tokenops.methods needs timm: pip install 'tokenops[models]'") from error

from . import cait, new_evit, new_evo, new_sit, patch_slimming, tome  # noqa: E402,F401
from .cait import merging  # noqa: F401
from .checkpoint import init_from_teacher, load_checkpoint
from .evit import EViT
from .evo_levit import EvoLeViT, evo_levit_loss
from .evo_vit import EvoViT, evo_vit_loss
from .lvvit import LVViT
from .patch_slimming import method  # noqa: F401
from .sit import SiT

__all__ = [
    "EViT",
    "EvoLeViT",
    "EvoViT",
    "LVViT",
    "SiT",
    "cait",
    "evo_levit_loss",
    "evo_vit_loss",
    "init_from_teacher",
    "load_checkpoint",
    "patch_slimming",
]
