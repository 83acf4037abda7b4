"""`python -m tokenops segment`: a small model, dense and compressed by CAIT, finds digits in photographs."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import CommandError, columns, machine, picture
from .demo import progress_bar
from .models import backends, counted, quartiles, stages
from .scenes import CLASSES, Scenes
from .timing import Spread, clock, interleaved, ratio, recorded_kernels

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from .. import apply_patch
    from ..methods import for_inference, lv_vit
    from ..methods.cait.blocks import prunable
    from ..methods.cait.pruning import ChannelPruner
    from ..methods.cait.segmentation import SegmentationModel, confusion, mean_iou
    from ..methods.cait.structure import Structure, token_counts
    from ..training import Pruned, fit
except ImportError as missing:
    raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[demo,train]'") from missing

SIZE = 128  # pixels of a scene
BATCH = 16  # in training
SHARE = 0.4  # steps of either fine-tuning, as a part of the dense model's
RATES = {"dense": 2e-3, "fine": 1e-3}
BETAS = (0.9, 0.95)  # with so few steps far better than AdamW's own
TIMED = 8  # images in a timed batch
ROUNDS = 15  # of timing
PICTURED = 8  # scenes in the picture
#: what kept channels are multiples of: heads have only 32, an MLP 288
MULTIPLES = {"qk": 8, "v": 8, "hidden": 32}


class Row(NamedTuple):
    """A model and what was found of it."""

    name: str
    steps: str  # of training
    tokens: list[int]  # patch tokens that enter each block
    iou: Tensor  # of each class
    mean: float
    macs: float  # an image, head included
    parameters: int
    ms: Spread  # an image
    speedup: Spread


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints the table, writes the picture. Raises CommandError for what cannot be done."""
    device = checked(args)
    picture.check(args.output)
    test = Scenes(args.scenes, train=False, size=SIZE, seed=args.seed)
    with progress_bar() as advance:
        models = trained(args, device, advance)
        advance("the test scenes", 0.9)
        found = {name: scored(model, test, device) for name, model in models.items()}
        advance("timing", 0.95)
        rows, kernels = measured(args, models, found, test, device)
        advance("drawing", 0.98)
        where = f"{machine.device_name(device)}, float32, batches of {TIMED}"
        where += f", threads: {torch.get_num_threads()}" if device == "cpu" else ""
        draw(args.output, where, rows, models, test, device)
    widths = Structure.of(models["merged, pruned"].backbone).widths or ()
    print(
        f"{args.scenes} test scenes of digits and parts of photographs that training never saw\n{where}\n\n"
        f"{columns(table(rows))}\n\n"
        f"Intersection over union of each class:\n{columns(by_class(rows))}\n\n"
        f"Channels of q and k, of v (a head's), and hidden ones left in each block:"
        f" {', '.join(f'{w.qk}/{w.v}/{w.hidden}' for w in widths)}\n"
        f"Medians of {ROUNDS} interleaved rounds, quartiles in brackets.\n"
        f"Backends: {', '.join(backends(kernels)) or 'plain PyTorch (the reference), no tokenops kernel ran'}\n\n"
        f"Picture: {args.output}"
    )


def checked(args: argparse.Namespace) -> str:
    """The device; the other options are in range."""
    for option, value, least in (("--steps", args.steps, 20), ("--scenes", args.scenes, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise CommandError(f"{option}={value}, but it must be at least {least}")
    if not 0 < args.keep <= 1:
        raise CommandError(f"--keep={args.keep}, but it must be above 0 and at most 1")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda was asked for, but torch sees no GPU")
    try:
        pruning(apply_patch(small_model().backbone, "cait"), args)
    except ValueError as error:
        raise CommandError(f"--keep={args.keep}: {error}") from None
    return device


def small_model() -> SegmentationModel:
    """LV-ViT's convolutional stem, which learns from few images, and 6 blocks; a map of each of the three grids."""
    backbone = lv_vit(img_size=SIZE, num_classes=0, embed_dim=96, depth=6, num_heads=3, mlp_ratio=3.0)
    return SegmentationModel(backbone, (0, 2, 5), len(CLASSES), detail=8)


def pruning(backbone: nn.Module, args: argparse.Namespace) -> ChannelPruner:
    """Of merged tokens' backbone, over the first half of the fine-tuning."""
    steps = fine_tuning(args)
    return ChannelPruner(
        prunable(backbone), args.keep, steps=(steps // 20, steps // 2), every=max(steps // 40, 1), multiples=MULTIPLES
    )


def fine_tuning(args: argparse.Namespace) -> int:
    return round(SHARE * args.steps)


def trained(args: argparse.Namespace, device: str, advance: Callable[[str, float], None]) -> dict[str, Any]:
    """The dense model; and begun from its weights, on scenes it saw, the merged one and the one that is pruned too."""
    plan = {"dense": args.steps, "merged": fine_tuning(args), "merged, pruned": fine_tuning(args)}
    done, everything = 0, sum(plan.values())

    def train(name: str, model: nn.Module, **options: Any) -> Any:
        nonlocal done
        steps, start = plan[name], done
        scenes = Scenes(steps * BATCH, train=True, size=SIZE, seed=args.seed)
        objective = Pruned(model, **{"pruner": None, **options})
        fit(
            objective,
            DataLoader(scenes, BATCH),
            epochs=1,
            lr=RATES["fine" if "teacher" in options else "dense"],
            betas=BETAS,
            warmup_epochs=0.1,
            min_lr=0.0,
            clip=1.0,
            progress=lambda step, _: advance(f"training: {name}", 0.9 * (start + step) / everything),
            seed=args.seed,
            device="cpu" if device == "cpu" else None,
        )
        done += steps
        return objective.model.eval()

    torch.manual_seed(args.seed)
    dense = train("dense", small_model().to(device))
    merged, pruned = deepcopy(dense), deepcopy(dense)
    for model in (merged, pruned):
        apply_patch(model.backbone, "cait", kind=args.kind)
    return {
        "dense": dense,
        "merged": train("merged", merged, teacher=dense),
        "merged, pruned": train("merged, pruned", pruned, teacher=dense, pruner=pruning(pruned.backbone, args)),
    }


@torch.inference_mode()
def scored(model: nn.Module, test: Scenes, device: str) -> Tensor:
    """Pixels of each class (rows) that were taken for each class."""
    counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for images, labels in DataLoader(test, BATCH):
        counts += confusion(model(images.to(device)).argmax(1).cpu(), labels, len(CLASSES))
    return counts


def measured(
    args: argparse.Namespace, models: Mapping[str, Any], found: Mapping[str, Tensor], test: Scenes, device: str
) -> tuple[list[Row], set[str]]:
    """A row a model, and the kernels that ran."""
    images = torch.stack([test[i % len(test)][0] for i in range(TIMED)]).to(device)
    fused = {name: deepcopy(model) for name, model in models.items()}
    for model in fused.values():
        for_inference(model.backbone)
    calls = {name: torch.inference_mode()(lambda model=model: model(images)) for name, model in fused.items()}
    with recorded_kernels() as kernels:
        for call in calls.values():
            call()
    times = interleaved(calls, ROUNDS, clock(device))
    rows = []
    for name, model in models.items():
        tokens = [into - model.backbone.num_prefix_tokens for into, _ in token_counts(model.backbone)]
        macs, parameters, _ = counted(model, images[:1])
        steps = f"{args.steps}" if name == "dense" else f"{args.steps} + {fine_tuning(args)}"
        iou, mean = mean_iou(found[name])
        ms = Spread.of([1e3 * t / TIMED for t in times[name]])
        rows.append(Row(name, steps, tokens, iou, mean, macs, parameters, ms, ratio(times["dense"], times[name])))
    return rows, kernels


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    costs = ("GMACs", "parameters", "ms an image", "speed-up", "FLOP ratio")
    return [
        ("model", "steps", "patch tokens x blocks", "mIoU", *costs),
        *(
            (
                row.name,
                row.steps,
                stages(row.tokens),
                f"{row.mean:.3f}",
                f"{row.macs / 1e9:.3f}",
                f"{row.parameters / 1e6:.2f} M",
                quartiles(row.ms),
                quartiles(row.speedup),
                f"{rows[0].macs / row.macs:.2f}",
            )
            for row in rows
        ),
    ]


def by_class(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        ("", *CLASSES),
        *((row.name, *("-" if value.isnan() else f"{value:.2f}" for value in row.iou)) for row in rows),
    ]


@torch.inference_mode()
def draw(
    path: Path, where: str, rows: Sequence[Row], models: Mapping[str, nn.Module], test: Scenes, device: str
) -> None:
    """A column a scene: what the models see, the truth, and what each of them says."""
    count = min(PICTURED, len(test))
    images, labels = (torch.stack(parts) for parts in zip(*(test[i] for i in range(count))))
    photographs = ((images + 1) / 2).permute(0, 2, 3, 1).numpy()
    lines = {"scene": photographs, "truth": masked(photographs, labels)}
    for row in rows:
        title = f"{row.name}\nmIoU {row.mean:.3f}\n{row.macs / 1e9:.3f} GMACs\n{quartiles(row.ms)} ms"
        lines[title] = masked(photographs, models[row.name](images.to(device)).argmax(1).cpu())
    figure = Figure(figsize=(1.5 * count + 1.9, 1.5 * len(lines) + 1.2), dpi=110, layout="constrained")
    figure.suptitle(f"digits found by a model, dense and compressed ({where})", fontsize=11)
    grid = figure.subplots(len(lines), count, squeeze=False)
    for line, (title, shown) in zip(grid, lines.items(), strict=True):
        for axes, image in zip(line, shown, strict=True):
            axes.axis("off")
            axes.imshow(image)
        line[0].text(-0.08, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    patches = [Patch(color=tuple(colour), label=name) for name, colour in zip(CLASSES[1:], palette()[1:])]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path)


def palette() -> np.ndarray:
    """A colour of each class, (11, 3); the background's is not shown, so black stands in for the grey of tab10."""
    colours = np.array([(0.0, 0.0, 0.0), *(matplotlib.colormaps["tab10"](i)[:3] for i in range(10))])
    return np.where(np.ptp(colours, axis=1, keepdims=True) == 0, 0.0, colours)


def masked(photographs: np.ndarray, labels: Tensor) -> np.ndarray:
    """Photographs (n, H, W, 3), grey where the labels (n, H, W) say background, else in the colour of the class."""
    grey = 0.35 + 0.45 * photographs.mean(axis=3, keepdims=True)
    found = labels.numpy()
    return np.where(found[..., None] > 0, palette()[found], grey.repeat(3, axis=3))
