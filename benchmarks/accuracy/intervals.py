"""Means and differences over seeds and test images, with bootstrap intervals."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

DRAWS = 4000
LEVEL = 0.95
SEEDS = 3  # that a verdict needs

Scores = Mapping[int, np.ndarray]  # of every seed, of every test image


class Interval(NamedTuple):
    """A mean in per cent, what 95 % of the draws lie between, and the mean of every seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def sign(self) -> int:
        """1 or -1 where 0 is outside of the interval, and of Student's over the seeds, too; else 0: nothing is shown.

        The bootstrap of three seeds alone is too sure of itself where seeds differ by more than images do; fewer than
        three show nothing.
        """
        if len(self.seeds) < SEEDS or self.low <= 0 <= self.high:
            return 0
        error = float(np.std(self.seeds, ddof=1)) / math.sqrt(len(self.seeds))
        reach = error * float(student.ppf((1 + LEVEL) / 2, len(self.seeds) - 1))
        return 0 if abs(self.mean) <= reach else 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f}..{self.high:.1f})"


def interval(scores: Iterable[np.ndarray]) -> Interval:
    r"""Of ``(seeds, images)`` scores between 0 and 1: the mean, and percentiles of it in data drawn anew.

    A draw takes as many seeds, and as many images, with replacement; the same images for every seed.
    """
    table = 100 * np.stack(list(scores)).astype(np.float64)
    seeds, images = table.shape
    random = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        counts = np.bincount(random.integers(images, size=images), minlength=images)
        of_seeds = table @ counts / images
        means[draw] = of_seeds[random.integers(seeds, size=seeds)].mean()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(table.mean()), float(low), float(high), tuple(table.mean(1).tolist()))


def paired(ours: Scores, theirs: Scores) -> dict[int, np.ndarray]:
    """Ours less theirs, image by image, of every seed that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def difference(ours: Scores, theirs: Scores) -> Interval:
    """Of two models' scores, seed by seed and image by image."""
    return interval(paired(ours, theirs).values())
