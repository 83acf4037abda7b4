"""The pictures of `slim` and `demo`: what the tokens of photographs become, and speed-up against FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import tokenops

from ..measuring.timing import Spread
from ..patching.visualize import panels_of
from . import CommandError, make_folder

PANELS = 3  # steps shown of a photograph, at most
MARKS = "osD^vP*X"


class Gain(NamedTuple):
    """A method's gain over the dense model."""

    name: str
    flops: float  # of the dense model / of the method
    speedup: Spread

    @property
    def realised(self) -> float:
        return self.speedup.median / self.flops


def check(path: Path, suffixes: Sequence[str] = (".png", ".pdf", ".jpg")) -> None:
    """Raises CommandError where no picture could be written, before anything is measured."""
    if path.suffix.lower() not in suffixes:
        raise CommandError(f"--output {path}: the name must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    make_folder(path)


def draw_tokens(path: Path, images: Sequence[np.ndarray], trace: Any) -> None:
    """What the tokens of each image become, one below the other."""
    sheets = [tokenops.visualize(image, trace, i) for i, image in enumerate(images)]
    width, height = sheets[0].size
    whole = Image.new("RGB", (width, height * len(sheets)), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, i * height))
    _save(path, whole.save)


def draw_methods(
    path: Path, title: str, images: Sequence[np.ndarray], traces: Sequence[Any], gains: Sequence[Gain]
) -> None:
    """A row a method: the photographs, and what its tokens become; and below, speed-up against FLOP ratio."""
    rows, width = len(traces), len(images) * (1 + PANELS)
    figure = Figure(figsize=(1.6 * width + 1.6, 1.85 * rows + 5), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.85 * rows, 4.4])
    figure.suptitle(title, fontsize=13)
    for line, trace, gain in zip(parts[0].subplots(rows, width, squeeze=False), traces, gains, strict=True):
        for axes in line:
            axes.axis("off")
        for i, image in enumerate(images):
            panels, captions = panels_of(image, trace, i)
            steps = np.linspace(1, len(panels) - 1, min(PANELS, len(panels) - 1)).round().astype(int)
            for axes, j in zip(line[i * (1 + PANELS) :], (0, *steps)):
                axes.imshow(panels[j])
                axes.set_title(captions[j] if j else "", fontsize=8)
        line[0].text(-0.08, 0.5, gain.name, transform=line[0].transAxes, ha="right", va="center")
    chart(parts[1].subplots(), gains)
    _save(path, figure.savefig)


def chart(axes: Any, gains: Sequence[Gain]) -> None:
    """Speed-up against FLOP ratio, with quartiles, beside the line on which all that is saved is saved in time."""
    for i, gain in enumerate(gains):
        middle, low, high = gain.speedup
        label = f"{gain.name}: realised {gain.realised:.2f}"
        error, mark = [[middle - low], [high - middle]], MARKS[i % len(MARKS)]
        axes.errorbar(gain.flops, middle, yerr=error, fmt=mark, capsize=3, label=label)
    end = 1.1 * max(max(gain.flops, gain.speedup.high) for gain in gains)
    axes.plot([1, end], [1, end], color="black", lw=1, label="every operation saved is time saved")
    axes.set(xlim=(1, end), xlabel="FLOPs of the dense model / FLOPs of the method", ylabel="speed-up")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _save(path: Path, save: Any) -> None:
    try:
        save(path)
    except OSError as error:
        raise CommandError(f"--output: cannot write {path}: {error}") from None
