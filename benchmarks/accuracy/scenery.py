"""The segmentation task: digits on photographs, as in examples/scenes.py, by tokens that keep the grid or leave it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader

import tokenops
from scenes import CLASSES, Scenes
from tokenops import training
from tokenops.methods.cait.segmentation import SegmentationModel, confusion, mean_iou

from . import models
from .models import GRID, TOKENS
from .recipes import Run

PIXELS, BATCH, TESTED = 56, 32, 500
SHAPE = (3, PIXELS, PIXELS)
TAPS = (0, 2, 5)


class Segmenter(SegmentationModel):
    """With maps of whatever method keeps or restores them."""

    def maps(self, images: Tensor) -> list[Tensor]:
        options: dict[str, Any] = dict(indices=list(self.taps), output_fmt="NCHW", intermediates_only=True)
        return self.backbone.forward_intermediates(images, **options)


def model(run: Run) -> Any:
    settings, width = run.settings, run.settings.width
    shape: dict[str, Any] = dict(embed_dim=width, depth=settings.depth, num_heads=settings.heads, num_classes=0)
    backbone: Any = VisionTransformer(
        PIXELS, PIXELS // GRID, **shape, mlp_ratio=settings.mlp_ratio, weight_init="jax", fc_norm=False
    )
    backbone.patch_embed.proj = models.stem((3, width // 4, width // 2, width), (2, 2, 2))
    for block in backbone.blocks:
        block.attn.fused_attn = False
    return Segmenter(backbone, TAPS, len(CLASSES), detail=PIXELS // GRID)


def train(objective: Any, run: Run, steps: int, lr: float) -> Any:
    scenes = Scenes(steps * BATCH, train=True, size=PIXELS, seed=run.seed)
    return models.fit(objective, DataLoader(scenes, BATCH), run.settings, run.seed, steps, lr, run.folder)


def dense(run: Run) -> Any:
    torch.manual_seed(run.seed)
    return train(models.Plain(model(run)), run, run.settings.scene_steps, run.settings.lr)


def fine_tuned(run: Run, method: str, choices: Sequence[dict[str, Any]]) -> Any:
    """From the dense model's weights, by the choice whose backbone costs the level most nearly, on scenes it saw."""

    def made(options: dict[str, Any]) -> Any:
        found = copy.deepcopy(run.dense)
        tokenops.apply_patch(found.backbone, method, **options)
        return found

    target = run.level * models.macs(run.dense.backbone, SHAPE)
    tried = map(made, choices)
    nearest = min(tried, key=lambda found: abs(models.macs(found.backbone, SHAPE) - target))
    return train(training.Plain(nearest), run, run.settings.scene_steps // 3, run.settings.fine_lr)


def merged(run: Run) -> Any:
    """CAIT's merges: one along the rows, and one along the columns at least as deep."""
    pairs = [(i, j) for i in range(run.settings.depth - 1) for j in range(i + 1, run.settings.depth)]
    return fine_tuned(run, "cait", [dict(points={i: "horizontal", j: "vertical"}) for i, j in pairs])


def dropped(run: Run) -> Any:
    """Tokens that attention leaves out stay behind, and are put back as they were (Evo-ViT's, with one stage)."""
    return fine_tuned(run, "evo_vit", [dict(prune_ratio=kept / TOKENS, stages=(1,)) for kept in range(2, TOKENS)])


def likeness(run: Run) -> Any:
    return fine_tuned(run, "tome", [dict(r=r) for r in range(1, TOKENS // 2)])


RECIPES: dict[str, Callable[[Run], Any]] = {
    "scenes, dense": dense,
    "scenes, merged on the grid": merged,
    "scenes, dropped": dropped,
    "scenes, merged by likeness": likeness,
}
TEACHERS: dict[str, str | None] = {name: "scenes, dense" for name in RECIPES} | {"scenes, dense": None}


@torch.inference_mode()
def scores(model: Any) -> np.ndarray:
    """Mean intersection over union of every test scene, over the classes in it or seen in it."""
    found = []
    for images, labels in DataLoader(Scenes(TESTED, train=False, size=PIXELS, seed=0), 50):
        for guess, truth in zip(model(images).argmax(1), labels):
            found.append(mean_iou(confusion(guess, truth, len(CLASSES)))[1])
    return np.array(found)
