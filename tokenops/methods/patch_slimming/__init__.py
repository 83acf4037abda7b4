"""Patch Slimming: PS-ViT, which drops the same patches of every image layer by layer, and DPS-ViT, dynamic.

`search` finds a :class:`Schedule` for a trained model, ``tokenops.apply_patch(model, "patch_slimming", schedule=...)``
runs a model by it; "dps" lets each image choose (a reconstruction).
Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022). No official code
or weights were released. "PS-ViT" is also Progressive Sampling, another method.

>>> import timm, torch
>>> dense = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3)
>>> found = search(dense, torch.randn(4, 3, 64, 64), tolerance=0.1, granularity=8, epochs=1, progress=False)
>>> found.model(torch.randn(1, 3, 64, 64)).shape
torch.Size([1, 1000])
"""

from .counts import published_counts, published_for, uniform_pyramid
from .dynamic import DynamicSlimming, TokenScorer, ranking_loss, scored, teacher_lifespans
from .impact import impact_scores
from .method import PatchSlimming
from .schedule import Schedule, centre_order
from .search import Candidate, SearchResult, search

__all__ = [
    "Candidate",
    "DynamicSlimming",
    "PatchSlimming",
    "Schedule",
    "SearchResult",
    "TokenScorer",
    "centre_order",
    "impact_scores",
    "published_counts",
    "published_for",
    "ranking_loss",
    "scored",
    "search",
    "teacher_lifespans",
    "uniform_pyramid",
]
