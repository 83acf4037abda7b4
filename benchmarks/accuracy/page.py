"""The results as Markdown and as a picture."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .claims import ALIKE, LEVELS, STRONG, VERDICTS, Outcome
from .intervals import SEEDS, Interval

Rows = Mapping[str, Mapping[str, Any]]  # by "name, level"


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*names: str) -> list[str]:
    return [line(*names), "|" + "---|" * len(names)]


def shown(rows: Rows, name: str, level: float, key: str) -> str:
    """ "91.3 (90.9..91.7) at 0.27": the part of the multiply-adds if not near the level; seeds if not three."""
    row = rows.get(f"{name}, {level:g}")
    if row is None or row.get(key) is None:
        return ""
    interval, part = Interval(**row[key]), row["macs"] / rows["dense, 1"]["macs"]
    seeds = "" if len(interval.seeds) == SEEDS else f", {len(interval.seeds)} seed" + "s" * (len(interval.seeds) > 1)
    return f"{interval}" + (f" at {part:.2f}" if abs(part / level - 1) > ALIKE else "") + seeds


def accuracies(rows: Rows, methods: Sequence[str]) -> str:
    """A line a method: accuracy at each level; the dense models first."""
    lines = head("top-1, %", *(f"{level:g} of the multiply-adds" for level in LEVELS))
    for name in ("dense", "dense, fine-tuned"):
        if f"{name}, 1" in rows:
            lines.append(line(name, shown(rows, name, 1, "accuracy"), *[""] * (len(LEVELS) - 1)))
    for name in methods:
        lines.append(line(name, *(shown(rows, name, level, "accuracy") for level in LEVELS)))
    return "\n".join(lines)


def gains(rows: Rows, methods: Sequence[str]) -> str:
    """A line a method: how far it is above the narrower dense model, which costs as much and saw as many images."""
    lines = head("points above the narrower dense model", *(f"{level:g}" for level in LEVELS))
    for name in methods:
        found = [shown(rows, name, level, "above_narrow") for level in LEVELS]
        if any(found):
            lines.append(line(name, *found))
    return "\n".join(lines)


def speeds(rows: Rows, methods: Sequence[str], how: str, key: str) -> str:
    """A line a method: measured speed-up over the dense model, and what part of the saved multiply-adds that is."""
    lines = head(f"speed-up (quartiles), realised; {how}", *(f"{level:g}" for level in LEVELS))
    dense = rows["dense, 1"]["macs"]
    for name in methods:
        cells = []
        for level in LEVELS:
            row = rows.get(f"{name}, {level:g}")
            if row is None or row.get(key) is None:
                cells.append("")
                continue
            median, low, high = row[key]
            cells.append(f"{median:.2f} ({low:.2f}..{high:.2f}), {median * row['macs'] / dense:.2f}")
        if any(cells):
            lines.append(line(name, *cells))
    return "\n".join(lines)


def claims(found: Sequence[Outcome], trends: Mapping[str, Interval]) -> str:
    """A line a claim and level."""
    lines = head("claim", "of", "at", "difference, points", "outcome here")
    for outcome in found:
        claim = outcome.claim
        lines.append(line(claim.text, claim.source, f"{outcome.level:g}", str(outcome.difference), outcome.verdict))
    for text, interval in trends.items():
        at = f"{STRONG[0]:g} less {LEVELS[0]:g}"
        lines.append(line(text, "SiT, 4", at, str(interval), VERDICTS[interval.sign]))
    return "\n".join(lines)


def heads(rows: Rows) -> str:
    """What heads of one or of any width cost when all are as wide as their widest, and how fast that is."""
    lines = head("half of attention's channels pruned", "top-1, %", "of the multiply-adds, compacted", "speed-up")
    dense = rows["dense, 1"]["macs"]
    for name, row in rows.items():
        if name.startswith("heads ") and row.get("speed_up"):
            low, high = row["speed_up"][1:]
            speed_up = f"{row['speed_up'][0]:.2f} ({low:.2f}..{high:.2f})"
            part = f"{row['timed_macs'] / dense:.2f}"
            lines.append(line(name.rpartition(", ")[0], str(Interval(**row["accuracy"])), part, speed_up))
    return "\n".join(lines)


def fidelity(rows: Sequence[Mapping[str, float]], images: int) -> str:
    """Of ToMe without training: what `tokenops.fidelity` says without labels, beside what labels say."""
    first = f"ToMe, r (one dense model, {images} test images)"
    lines = head(first, "multiply-adds", "same class, %", "cosine", "neighbours", "top-1, %")
    for row in rows:
        alike = f"{100 * row['top1']:.1f}", f"{row['cosine']:.3f}", f"{row['neighbours']:.3f}"
        lines.append(line(f"{row['r']}", f"{row['part']:.2f}", *alike, f"{row['accuracy']:.1f}"))
    return "\n".join(lines)


def origin(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def draw(rows: Rows, methods: Sequence[str], path: Path) -> None:
    """Accuracy against multiply-adds, and against measured speed-up; a line a method, its interval as a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), dpi=110, layout="constrained")
    left, right = figure.subplots(ncols=2, sharey=True)
    dense = rows["dense, 1"]
    for axes, key in ((left, "macs"), (right, "speed_up")):
        for i, name in enumerate(methods):
            points = [rows[f"{name}, {level:g}"] for level in LEVELS if f"{name}, {level:g}" in rows]
            points = [row for row in points if row.get("speed_up")]
            if not points:
                continue
            x = [row["macs"] / dense["macs"] if key == "macs" else row["speed_up"][0] for row in points]
            mean, low, high = (np.array([row["accuracy"][part] for row in points]) for part in ("mean", "low", "high"))
            narrow = name == "narrower dense"
            axes.errorbar(
                x,
                mean,
                yerr=[mean - low, high - mean],
                fmt="osD^vP*Xh<>d"[i % 12] + ("--" if narrow else "-"),
                color="k" if narrow else f"C{i % 10}",
                lw=1.6 if narrow else 1,
                ms=6,
                elinewidth=0.7,
                label=name,
            )
        axes.plot(1, dense["accuracy"]["mean"], "k*", ms=13, label="dense")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(lw=0.3)
    left.set(xlabel="part of the dense model's multiply-adds", ylabel="top-1 on test images, %")
    left.invert_xaxis()
    right.set(xlabel="measured speed-up over the dense model, on a CPU")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle("accuracy against cost: mean of the seeds, bars 95 % intervals", fontsize=10)
    figure.savefig(path)
