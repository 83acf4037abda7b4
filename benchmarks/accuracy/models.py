"""The vision transformer that everything begins with, its settings, and what it costs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenops import training
from tokenops.measuring import machine

from .data import CLASSES, SIZE, Batches, Data, load

GRID = 7
TOKENS = GRID * GRID
EPOCH = 40  # steps; schedules of methods and checkpoints go by it


class Settings(NamedTuple):
    """What all cells share; a part of what a cell is kept under."""

    data: str = "fashion"
    width: int = 64
    depth: int = 6
    heads: int = 2
    mlp_ratio: float = 3.0
    batch: int = 128
    dense_steps: int = 2040  # 4.4 times all images
    steps: int = 120  # of fine-tuning
    scene_steps: int = 600  # of the segmentation task, a third of them in fine-tuning
    lr: float = 4e-3
    fine_lr: float = 5e-4
    weight_decay: float = 0.05
    smoothing: float = 0.1

    @classmethod
    def quick(cls) -> "Settings":
        return cls(data="digits", width=48, depth=6, batch=32, dense_steps=300, steps=24, scene_steps=30)


def vit(settings: Settings, width: int | None = None, **options: Any) -> Any:
    """A model that learns fast from few images: convolutions make the patches, and places weigh as much as they."""
    width = settings.width if width is None else width
    sizes: dict[str, Any] = dict(img_size=SIZE, patch_size=SIZE // GRID, in_chans=1, num_classes=CLASSES)
    shape: dict[str, Any] = dict(embed_dim=width, depth=settings.depth, num_heads=settings.heads)
    model: Any = VisionTransformer(**sizes, **shape, mlp_ratio=settings.mlp_ratio, weight_init="jax", **options)
    model.patch_embed.proj = stem((1, width // 6, width // 3, width), (2, 1, 2))
    model.pos_embed.data.mul_(3)
    for block in model.blocks:
        block.attn.fused_attn = False  # in training on a CPU in bfloat16 SDPA takes as long as all the rest
    return model


def stem(channels: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """Convolutions that make the patches, from few images better ones than a single projection does."""
    layers: list[nn.Module] = []
    for before, after, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers[:-2])


class Muon:
    """An objective's mixin: Muon trains the matrices of the blocks; it needs far fewer steps than AdamW."""

    model: Any
    parameter_groups: Callable[..., list[dict[str, Any]]]
    matrix_lr = 0.014

    def optimizers(self, lr: float, weight_decay: float, betas: tuple[float, float]) -> list[torch.optim.Optimizer]:
        groups = self.parameter_groups(lr, weight_decay)
        matrices = {id(p): p for name, p in self.model.named_parameters() if p.ndim == 2 and "blocks." in name}
        others = [{**group, "params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
        scale = self.matrix_lr / lr
        muon = [{"params": list(matrices.values()), "lr": self.matrix_lr, "lr_scale": scale}]
        return [
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas),
            torch.optim.Muon(muon, lr=self.matrix_lr, weight_decay=weight_decay),
        ]


class Plain(Muon, training.Plain):
    """Cross entropy, from scratch."""


class SlowFast(Muon, training.SlowFast):
    """Evo-ViT's training, from scratch."""


def macs(model: Any, shape: Sequence[int] = (1, SIZE, SIZE)) -> float:
    """Multiply-adds of one image, in millions."""
    was_training = model.training
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(2, *shape))
    model.train(was_training)
    return counter.get_total_flops() / 4e6


def reached(make: Callable[[float], Any], target: float) -> Any:
    """The model whose multiply-adds come nearest to the target; the more, the larger what `make` is given (0 to 1)."""
    low, high, found = 0.0, 1.0, []
    for _ in range(9):
        middle = (low + high) / 2
        model = make(middle)
        cost = macs(model)
        found.append((abs(cost - target), len(found), model))
        low, high = (middle, high) if cost < target else (low, middle)
    return min(found)[2]


def narrow(settings: Settings, target: float) -> Any:
    """The dense model of another width, of even heads, that costs the target most nearly."""
    step = 2 * settings.heads
    widths = range(4 * step, settings.width + 1, step)
    return min((vit(settings, width) for width in widths), key=lambda model: abs(macs(model) - target))


def amp() -> str:
    """bf16 where the processor multiplies it."""
    return "bf16" if machine.instructions() in ("AMX", "AVX-512-bf16") else "no"


def train(objective: Any, settings: Settings, seed: int, steps: int, lr: float, output: Path | None = None) -> Any:
    """The objective's model, trained on augmented images."""
    loader = Batches(load(settings.data), settings.batch, min(EPOCH, steps), seed)
    return fit(objective, loader, settings, seed, steps, lr, output)


def fit(objective: Any, loader: Any, settings: Settings, seed: int, steps: int, lr: float, output: Path | None) -> Any:
    """The objective's model, trained; from the last checkpoint in ``output``, if there is one."""
    loop: dict[str, Any] = dict(clip=1.0, progress=False, device="cpu", amp=amp(), betas=(0.9, 0.98))
    history = training.fit(
        objective,
        loader,
        steps=steps,
        lr=lr,
        min_lr=lr / 100,
        warmup_epochs=steps / len(loader) / 10,
        weight_decay=settings.weight_decay,
        seed=seed,
        output=output,
        resume=None if output is None else "auto",
        **loop,
    )
    if output is not None:
        (output / "speed").write_text(str(steps * loader.batch_size / history.seconds))
    return objective.model


def speed(output: Path) -> float:
    """Images a second of the training there; 0 where nothing was trained."""
    file = output / "speed"
    return float(file.read_text()) if file.is_file() else 0.0


@torch.inference_mode()
def right(model: Any, data: Data) -> torch.Tensor:
    """Which test images a model classifies as they are labelled, ``(n,)`` bool."""
    model.eval()
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=amp() == "bf16"):
        for images, labels in zip(data.test_images.split(500), data.test_labels.split(500)):
            found.append(model(data.normalised(images)).argmax(1) == labels)
    return torch.cat(found)
