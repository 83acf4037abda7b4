"""The picture of the demo: photographs, the regions slim tokens draw on, and what the slimming gains."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import CommandError

try:
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec
except ImportError as missing:
    raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[demo]'") from missing

if TYPE_CHECKING:
    from .comparison import Row
    from .models import Side

DENSE, SLIM = "#8a8f98", "#d9480f"
HOW_TO_READ = (
    "Patches of one colour are drawn on by the same slim tokens: red, green and blue are the three main directions"
    " in which patches\ndiffer by the weights slim tokens give them, each stretched to its full range, however small."
    " The heat map on the right adds up\nthe weights of all final slim tokens: bright patches survive most"
    " (below it: the least and the most a patch gets, uniform is 1)."
)


def check(path: Path) -> None:
    """Raises CommandError where no picture could be written, before anything is measured."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise CommandError(f"--output {path}: the name must end in .png, .pdf, .svg or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from None


def draw(
    path: Path,
    title: str,
    subtitle: str,
    photographs: Sequence[np.ndarray],
    maps: Sequence[Tensor],
    sides: Sequence["Side"],
) -> None:
    """Args: photographs (H, W, 3) each; maps, one (B, K, grid height, grid width) a stage; sides, dense and slim."""
    rows, stages = len(photographs), len(maps)
    figure = Figure(figsize=(2.75 * (stages + 2), 2.9 * rows + 4.4), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(4, 1, height_ratios=[0.7, 2.9 * rows, 0.7, 3.0])
    head, top, middle, bottom = parts
    head.text(0.5, 0.68, title, ha="center", va="center", fontsize=14, weight="bold")
    head.text(0.5, 0.22, subtitle, ha="center", va="center", fontsize=11)
    grid = GridSpec(rows, stages + 2, figure=top)
    for i, photograph in enumerate(photographs):
        panels = [top.add_subplot(grid[i, j]) for j in range(stages + 2)]
        for panel in panels:
            panel.set_xticks([])
            panel.set_yticks([])
        panels[0].imshow(photograph)
        for stage, (panel, weights) in enumerate(zip(panels[1:-1], maps, strict=True)):
            panel.imshow(over(photograph, region_colours(weights[i])))
            if i == 0:
                panel.set_title(f"stage {stage + 2}: {weights.shape[1]} slim tokens", fontsize=11)
        drawn = maps[-1][i].mean(dim=0) * maps[-1][i][0].numel()
        panels[-1].imshow(photograph.mean(axis=2), cmap="gray", vmin=-0.5, vmax=1.2)
        panels[-1].imshow(large(drawn.numpy(), photograph), cmap="inferno", alpha=0.65)
        panels[-1].set_xlabel(f"{drawn.min():.3f} to {drawn.max():.3f}", fontsize=9)
        if i == 0:
            panels[0].set_title("what the model sees", fontsize=11)
            panels[-1].set_title("drawn on in all", fontsize=11)
    middle.text(0.5, 0.5, HOW_TO_READ, ha="center", va="center", fontsize=10, color="#444")
    charts(bottom, sides)
    figure.savefig(path)


def charts(figure: Any, sides: Sequence["Side"]) -> None:
    """Throughput, multiply-adds, and how many tokens each block works on."""
    names, colours = [side.name for side in sides], [DENSE, SLIM]
    speed, macs, tokens = figure.subplots(1, 3)
    speeds = [side.images_per_second for side in sides]
    errors = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
    speed.bar(names, [s.median for s in speeds], yerr=errors, color=colours, capsize=5, width=0.55)
    speed.set_title("images a second (median, quartiles)", fontsize=11)
    macs.bar(names, [side.macs / 1e9 for side in sides], color=colours, width=0.55)
    macs.set_title("GMACs an image", fontsize=11)
    for i, (side, speed_of) in enumerate(zip(sides, speeds, strict=True)):
        for chart, label in ((speed, f"{speed_of.median:.3g}"), (macs, f"{side.macs / 1e9:.2f}")):
            transform = chart.get_xaxis_transform()
            chart.text(i, 0.04, label, transform=transform, ha="center", color="white", fontsize=13, weight="bold")
    for side, colour in zip(sides, colours, strict=True):
        blocks = np.arange(len(side.tokens) + 1) + 0.5
        tokens.stairs(side.tokens, blocks, fill=True, color=colour, alpha=0.85, label=side.name)
    tokens.set_title("tokens a block works on", fontsize=11)
    tokens.set_xlabel("block")
    tokens.legend(frameon=False, loc="upper right")
    tokens.set_ylim(0, 1.3 * max(max(side.tokens, default=1) for side in sides))
    for chart in (speed, macs, tokens):
        chart.spines[["top", "right"]].set_visible(False)


def draw_methods(
    path: Path,
    subtitle: str,
    overlays: Sequence[tuple[str, Sequence[np.ndarray], Sequence[Tensor]]],
    rows: Sequence["Row"],
    panels: int,
) -> None:
    """A row a method: the patches each photograph keeps after its stages; and below, speed-up against FLOP ratio.

    Args: overlays of name, photographs and maps: (B, h, w) bool; or int64, which token each patch was merged into; or
    (B, K, h, w) of slim tokens.
    """
    photographs = len(overlays[0][1])
    width = photographs * panels
    figure = Figure(figsize=(1.75 * width + 2.2, 1.85 * len(overlays) + 5), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.85 * len(overlays), 4.4])
    top, bottom = parts
    figure.suptitle(f"what each method keeps, and what it gains ({subtitle})", fontsize=13)
    grid = top.subplots(len(overlays), width, squeeze=False)
    for line, (name, shown, maps) in zip(grid, overlays, strict=True):
        for axes in line:
            axes.axis("off")
        stages = spread_out(maps, panels)
        for i, photograph in enumerate(shown):
            for axes, stage in zip(line[i * panels :], stages):
                picked = stage[i]
                if stage.dtype == torch.bool:
                    axes.imshow(dimmed(photograph, picked.numpy()))
                    axes.set_title(f"{int(picked.sum())} kept", fontsize=9)
                elif stage.dtype == torch.int64:
                    axes.imshow(mosaic(photograph, picked.numpy()))
                    axes.set_title(f"merged to {int(picked.max()) + 1}", fontsize=9)
                else:
                    axes.imshow(over(photograph, region_colours(picked)))
                    axes.set_title(f"{len(picked)} slim tokens", fontsize=9)
        line[0].text(-0.08, 0.5, name.replace("_patch16_224", ""), transform=line[0].transAxes, ha="right", va="center")
    axes = bottom.subplots()
    for i, row in enumerate(rows):
        middle, low, high = row.speedup
        error = [[middle - low], [high - middle]]
        label = f"{row.name}: realised {row.realised:.2f}"
        axes.errorbar(row.dense_macs / row.macs, middle, yerr=error, fmt="osD^vP*X"[i % 8], capsize=3, label=label)
    end = 1.1 * max(max(row.dense_macs / row.macs, row.speedup.high) for row in rows)
    axes.plot([1, end], [1, end], color="black", lw=1, label="every operation saved is time saved")
    axes.set(xlim=(1, end), xlabel="FLOPs of the dense form / FLOPs of the method", ylabel="speed-up")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def spread_out(maps: Sequence[Tensor], panels: int) -> list[Tensor]:
    """At most so many of the stages, the first and the last that keeps a patch among them."""
    there = [m for m in maps if m.dtype != torch.bool or m.any()]
    places = np.linspace(0, len(there) - 1, min(panels, len(there))).round().astype(int)
    return [there[i] for i in places]


def dimmed(photograph: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The photograph with the patches that are not kept washed out."""
    mask = large(kept[..., None].astype(float), photograph)
    return mask * photograph + (1 - mask) * (0.82 + 0.15 * photograph.mean(axis=2, keepdims=True))


def mosaic(photograph: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The photograph with every token's patches in their mean colour, and a line between tokens."""
    owner = large(tokens, photograph)
    sums = [np.bincount(owner.ravel(), photograph[..., c].ravel()) for c in range(3)]
    colours = (np.stack(sums, axis=-1) / np.bincount(owner.ravel())[:, None])[owner]
    edges = np.zeros(owner.shape, dtype=bool)
    edges[1:] |= owner[1:] != owner[:-1]
    edges[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    return np.where(edges[..., None], 1.0, 0.35 * photograph + 0.65 * colours)


def region_colours(weights: Tensor) -> np.ndarray:
    """(K, h, w) weights to (h, w, 3) colours: the three principal components of what distinguishes the patches."""
    k, h, w = weights.shape
    patches = weights.flatten(1).T.double()  # (h*w, K)
    patches = patches - patches.mean(dim=0)
    scores = torch.zeros(h * w, 3, dtype=patches.dtype)
    u, s, _ = torch.linalg.svd(patches, full_matrices=False)
    count = min(3, s.numel())
    scores[:, :count] = u[:, :count] * s[:count]
    low, high = (scores.quantile(q, dim=0) for q in (0.02, 0.98))
    return ((scores - low) / (high - low).clamp_min(1e-300)).clamp(0, 1).view(h, w, 3).numpy()


def over(photograph: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours over the grey photograph, so that both can be read."""
    grey = photograph.mean(axis=2, keepdims=True)
    return (0.35 + 0.65 * grey) * (0.2 + 0.8 * large(colours, photograph))


def large(values: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    """A patch's value at each of its pixels."""
    rows, columns = (photograph.shape[i] // values.shape[i] for i in (0, 1))
    return values.repeat(rows, axis=0).repeat(columns, axis=1)
