"""CAIT: neighbouring tokens merged, channels pruned consistently; reconstructed from the published description.

``tokenops.apply_patch(model, "cait")`` merges. Of a `prunable` model a `ChannelPruner` (or a `CompactorPruner`) chooses
channels while it trains, `compact` takes them out, `tokenops.training.Pruned` does both; `save_compressed` and
`load_compressed` keep the result, `SegmentationModel` builds on it. No code or weights were published: Wang et al.,
CAIT (arXiv 2309.15755). timm's own ``cait_*`` models are another method, CaiT.

>>> import timm, tokenops, torch
>>> model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3, num_classes=10)
>>> model = prunable(tokenops.apply_patch(model, "cait"))
>>> token_counts(model), model(torch.randn(1, 3, 64, 64)).shape
([(17, 9), (9, 5), (5, 5)], torch.Size([1, 10]))
"""

from .blocks import Mlp, prunable
from .compact import compact
from .compactors import CompactorPruner, rotate_heads
from .costs import ChannelCosts, latency_costs, mac_costs
from .losses import distillation_loss, merge_token_labels
from .merging import CAIT, unmerge_tokens
from .pruning import ChannelPruner, parameters_to_train
from .segmentation import SegmentationModel, confusion, feature_maps, mean_iou
from .structure import (
    Merge,
    Structure,
    Widths,
    load_compressed,
    macs,
    restructure,
    save_compressed,
    token_counts,
    uniform_structure,
)

__all__ = [
    "CAIT",
    "ChannelCosts",
    "ChannelPruner",
    "CompactorPruner",
    "Merge",
    "Mlp",
    "SegmentationModel",
    "Structure",
    "Widths",
    "compact",
    "confusion",
    "distillation_loss",
    "feature_maps",
    "latency_costs",
    "load_compressed",
    "mac_costs",
    "macs",
    "mean_iou",
    "merge_token_labels",
    "parameters_to_train",
    "prunable",
    "restructure",
    "rotate_heads",
    "save_compressed",
    "token_counts",
    "uniform_structure",
    "unmerge_tokens",
]
