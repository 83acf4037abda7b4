"""Dense prediction on a compressed backbone: maps of several depths on the patch grid, and a light head on them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .merging import unmerge_tokens


def feature_maps(model: Any, images: Tensor, blocks: Sequence[int], mode: str = "repeat") -> list[Tensor]:
    """Outputs of chosen blocks on the full patch grid, row by row whatever the layout of the tokens is.

    Every merge up to a block is undone by :func:`tokenops.unmerge_neighbours`; blocks behind the last one are not run.

    Args:
        model: a timm VisionTransformer, dense, merged or compacted.
        images: ``(B, 3, height, width)``, of the model's size.
        blocks: numbers of the blocks, from 0, increasing.
        mode: "repeat" or "bilinear", as in `unmerge_neighbours`.

    Returns:
        ``(B, C, H, W)`` of every block, not normalised; H x W patches.

    Raises:
        ValueError: a block is not there, or they do not increase.
    """
    take, depth = list(blocks), len(model.blocks)
    if not take or take != sorted(set(take)) or take[0] < 0 or take[-1] >= depth:
        raise ValueError(f"blocks={blocks}, but they must be increasing numbers from 0 to {depth - 1}")
    outputs = model.forward_intermediates(
        images, indices=take, output_fmt="NLC", stop_early=True, intermediates_only=True
    )
    grid = model.patch_embed.grid_size
    return [
        unmerge_tokens(model, tokens, block, prefix=0, mode=mode).transpose(1, 2).unflatten(2, grid)
        for block, tokens in zip(take, outputs, strict=True)
    ]


class SegmentationModel(nn.Module):
    """A backbone and a light head that says what every pixel is.

    The maps of the chosen blocks are normalised and projected to one width, added, normalised, mixed by a 3x3
    convolution and classified; the result is interpolated to the size of the images. The head is the same on a dense,
    a merged and a compacted backbone, so its weights carry over; ``backbone`` may be exchanged.

    Args:
        backbone: a timm VisionTransformer, dense, merged or compacted.
        blocks: numbers of the blocks it looks at, from 0, increasing.
        classes: how many.
        width: channels of the head.
        detail: predictions along a side of a patch.
        mode: how merges are undone, as in `feature_maps`.

    Shapes:
        images ``(B, 3, height, width)`` to logits ``(B, classes, height, width)``.

    Source: dense prediction on merged tokens is an aim of CAIT (Wang et al., arXiv 2309.15755); this head is ours.
    """

    def __init__(
        self, backbone: Any, blocks: Sequence[int], classes: int, width: int = 64, detail: int = 1, mode: str = "repeat"
    ) -> None:
        super().__init__()
        self.backbone, self.taps, self.detail, self.mode = backbone, tuple(blocks), detail, mode
        dim = backbone.embed_dim
        self.projections = nn.ModuleList(nn.Sequential(LayerNorm2d(dim), nn.Conv2d(dim, width, 1)) for _ in self.taps)
        self.mix = nn.Sequential(LayerNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU())
        self.classifier = nn.Conv2d(width, classes * detail**2, 1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the head looks at: `feature_maps` of the chosen blocks; a subclass may make them otherwise."""
        return feature_maps(self.backbone, images, self.taps, self.mode)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        first, *others = (project(x) for project, x in zip(self.projections, maps, strict=True))
        logits = self.classifier(self.mix(sum(others, first)))
        logits = F.pixel_shuffle(logits, self.detail)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (rows) were taken for each class (columns), ``(classes, classes)`` int64.

    Args:
        predicted: classes, int64, any shape.
        labels: the true ones, of the same shape; those outside of 0 to classes - 1 do not count.
    """
    counts = (labels >= 0) & (labels < classes)
    return torch.bincount(labels[counts] * classes + predicted[counts], minlength=classes**2).view(classes, classes)


def mean_iou(confusion: Tensor) -> tuple[Tensor, float]:
    r"""Intersection over union of each class, and the mean of those that are there.

    .. math:: \mathrm{IoU}_c = \frac{n_{cc}}{\sum_j n_{cj} + \sum_i n_{ic} - n_{cc}}

    Args:
        confusion: ``(classes, classes)``, see `confusion`; sum those of several batches.

    Returns:
        ``(classes,)`` fp64, NaN for a class that is neither there nor predicted; and their mean without these.

    >>> each, mean = mean_iou(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]))
    >>> each.tolist(), mean
    ([0.75, 0.5, nan], 0.625)
    """
    both = confusion.diagonal().double()
    each = both / (confusion.sum(dim=0) + confusion.sum(dim=1) - both)
    return each, each.nanmean().item()
