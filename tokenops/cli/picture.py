"""The pictures of `slim`, `demo` and `fidelity`: what tokens become, speed-up against FLOPs, and what is kept."""

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


def check(path: Path, suffixes: Sequence[str] = (".png", ".pdf", ".jpg"), flag: str = "--output") -> None:
    """Raises CommandError where no picture could be written, before anything is measured."""
    if path.suffix.lower() not in suffixes:
        raise CommandError(f"{flag} {path}: the name must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    make_folder(path, flag)


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


def draw_fidelity(
    path: Path, title: str, names: Sequence[str], speedups: Sequence[Spread], kept: dict[str, Sequence[float]]
) -> None:
    """What is kept at each level against its speed-up, with quartiles: a line a measure, levels named along the top."""
    figure = Figure(figsize=(7.5, 4.8), dpi=110, layout="constrained")
    axes: Any = figure.subplots()
    error = [[each.median - each.low for each in speedups], [each.high - each.median for each in speedups]]
    for mark, (label, values) in zip(MARKS, kept.items()):
        x = [each.median for each in speedups]
        axes.errorbar(x, values, xerr=error, fmt=f"{mark}-", capsize=3, label=label)
    for i, name in enumerate(names):
        at = speedups[i].median, max(values[i] for values in kept.values())
        axes.annotate(name, at, xytext=(0, 8), textcoords="offset points", rotation=45, fontsize=8)
    lowest = min([0.98, *(value for values in kept.values() for value in values)])
    margin = 0.2 * (1 - lowest)
    axes.margins(x=0.08)
    axes.set(xlabel="speed-up", ylabel="kept of the unreduced model", ylim=(lowest - margin / 2, 1 + margin))
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(path, figure.savefig, "--plot")


def _save(path: Path, save: Any, flag: str = "--output") -> None:
    try:
        save(path)
    except OSError as error:
        raise CommandError(f"{flag}: cannot write {path}: {error}") from None
