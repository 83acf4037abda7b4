"""`python examples/segment.py`: a small vision transformer, dense and compressed by CAIT, finds digits in photographs.

Trains it to say which digit, if any, each pixel of generated scenes belongs to; then the same with neighbouring tokens
merged, and with channels pruned as well. Prints what each gets right and what it costs. Minutes on two CPU cores; needs
the packages of tokenops[demo,train].
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scenes import CLASSES, Scenes
from tokenops import apply_patch
from tokenops.cli import CommandError, columns, paragraph, picture
from tokenops.cli.models import at_least, check_seed, counted
from tokenops.cli.running import Running, quartiles, remarks, running, stages, timed
from tokenops.measuring.progress import Bar
from tokenops.measuring.timing import Spread, ratio
from tokenops.methods import for_inference, lv_vit
from tokenops.methods.cait.blocks import prunable
from tokenops.methods.cait.pruning import ChannelPruner
from tokenops.methods.cait.segmentation import SegmentationModel, confusion, mean_iou
from tokenops.methods.cait.structure import Structure, token_counts
from tokenops.nn.neighbour_merging import KINDS
from tokenops.training import Pruned, fit

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


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="segment.py", description=" ".join((__doc__ or "").split("\n\n")[1].split()))
    add = found.add_argument
    add("--steps", type=int, default=1000, metavar="N", help="training steps of the dense model (default: %(default)s)")
    add("--keep", type=float, default=0.7, metavar="PART", help="of the merged multiply-adds (default: %(default)s)")
    add("--kind", choices=KINDS, default="average", help="how tokens are merged (default: %(default)s)")
    add("--scenes", type=int, default=300, metavar="N", help="test scenes (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and scenes (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add("--output", type=Path, default=Path("out/segment.png"), metavar="FILE", help="picture (default: %(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 when what was asked for cannot be done."""
    try:
        run(parser().parse_args(arguments))
    except CommandError as error:
        print(f"segment.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints the table, writes the picture. Raises CommandError for what cannot be done."""
    how = checked(args)
    device = how.device.type
    test = Scenes(args.scenes, train=False, size=SIZE, seed=args.seed)
    with Bar() as advance:
        models = trained(args, device, advance)
        advance("the test scenes", 0.9)
        found = {name: scored(model, test, device) for name, model in models.items()}
        advance("timing", 0.95)
        rows, below = measured(args, models, found, test, how)
        advance("drawing", 0.98)
        where = how.where(f"batches of {TIMED}")
        draw(args.output, where, rows, models, test, device)
    widths = Structure.of(models["merged, pruned"].backbone).widths or ()
    left = ", ".join(f"{w.qk}/{w.v}/{w.hidden}" for w in widths)
    first = f"{args.scenes} test scenes of digits and parts of photographs that training never saw"
    print(f"{paragraph(first)}\n{paragraph(where)}\n\n{columns(table(rows))}\n")
    print(f"Intersection over union of each class:\n{columns(by_class(rows))}\n")
    print(paragraph(f"Channels of q and k, of v (a head's), and hidden ones left in each block: {left}"))
    print(f"{below}\n\nPicture: {args.output}")


def checked(args: argparse.Namespace) -> Running:
    """Where it runs; the options are in range."""
    at_least(20, steps=args.steps)
    at_least(1, scenes=args.scenes)
    check_seed(args.seed)
    if not 0 < args.keep <= 1:
        raise CommandError(f"--keep={args.keep}, but it must be above 0 and at most 1")
    how = running(argparse.Namespace(device=args.device, amp=False, amp_dtype="bfloat16", channels_last=False))
    picture.check(args.output)
    try:
        pruning(apply_patch(small_model().backbone, "cait"), args)
    except ValueError as error:
        raise CommandError(f"--keep={args.keep}: {error}") from None
    return how


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
    args: argparse.Namespace, models: Mapping[str, Any], found: Mapping[str, Tensor], test: Scenes, how: Running
) -> tuple[list[Row], str]:
    """A row a model, and what is to be said of the times."""
    images = how.placed(torch.stack([test[i % len(test)][0] for i in range(TIMED)]))
    fused = {name: deepcopy(model) for name, model in models.items()}
    for model in fused.values():
        for_inference(model.backbone)
    times = timed(fused, images, how, ROUNDS, 0.0)
    rows = []
    for name, model in models.items():
        tokens = [into - model.backbone.num_prefix_tokens for into, _ in token_counts(model.backbone)]
        macs, parameters, _ = counted(model, images[:1])
        steps = f"{args.steps}" if name == "dense" else f"{args.steps} + {fine_tuning(args)}"
        iou, mean = mean_iou(found[name])
        speedup = ratio(times.seconds["dense"], times.seconds[name])
        rows.append(Row(name, steps, tokens, iou, mean, macs, parameters, times.ms(name, TIMED), speedup))
    return rows, remarks(times, [row.speedup for row in rows])


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A column a model."""
    lines = {
        "": lambda row: row.name,
        "steps": lambda row: row.steps,
        "tokens": lambda row: stages(row.tokens),
        "mIoU": lambda row: f"{row.mean:.3f}",
        "GMACs": lambda row: f"{row.macs / 1e9:.3f}",
        "parameters": lambda row: f"{row.parameters / 1e6:.2f} M",
        "ms an image": lambda row: quartiles(row.ms),
        "speed-up": lambda row: quartiles(row.speedup, 2),
        "FLOP ratio": lambda row: f"{rows[0].macs / row.macs:.2f}",
        "realised": lambda row: f"{row.speedup.median * row.macs / rows[0].macs:.2f}",
    }
    return [(name, *(shown(row) for row in rows)) for name, shown in lines.items()]


def by_class(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines = zip(CLASSES, *(row.iou for row in rows), strict=True)
    values = [(name, *("-" if value.isnan() else f"{value:.2f}" for value in iou)) for name, *iou in lines]
    return [("", *(row.name for row in rows)), *values]


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


if __name__ == "__main__":
    sys.exit(main())
