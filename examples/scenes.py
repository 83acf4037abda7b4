"""Scenes with exact masks, made as they are asked for: real handwritten digits on crops of two photographs."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("background", *map(str, range(10)))
HELD_OUT = 0.3  # part of the digits, and of the photographs' width, that only the test scenes use
DIGITS = (3, 6)  # fewest and most in a scene
SIZES = (16, 24)  # pixels, at 64 pixels a scene
PLACES = 8  # tried for each, so that digits rarely cover each other
CONTRASTS = (0.4, 0.9)  # of a digit to its surroundings, black to white being 1


class Sources(NamedTuple):
    """What the scenes of one kind are composed of."""

    digits: Tensor  # (n, 8, 8) ink, 0 to 1
    labels: Tensor  # (n,) 1 to 10
    photographs: list[Tensor]  # (3, H, W) each, 0 to 1


@cache
def sources(train: bool) -> Sources:
    """Scikit-learn's 1797 digits and two photographs, of which training and test have different parts."""
    found = load_digits()
    digits, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target) + 1
    first = round(len(digits) * (1 - HELD_OUT))
    part = slice(first) if train else slice(first, None)
    photographs = []
    for image in load_sample_images().images:
        column = round(image.shape[1] * (1 - HELD_OUT))
        of_width = slice(column) if train else slice(column, None)
        photographs.append(torch.tensor(image[:, of_width]).permute(2, 0, 1) / 255)
    return Sources(digits[part], labels[part], photographs)


class Scenes(Dataset):
    """Digits of random size, place and contrast on photographs, and which pixel belongs to what.

    A scene is ``image (3, size, size)`` float32 between -1 and 1 and ``labels (size, size)`` int64: 0 where the
    photograph is seen, 1 to 10 where the ink of the digits 0 to 9 is. Scene i of a seed is always the same. Training
    and test scenes share neither digits nor parts of the photographs.

    Args:
        count: how many scenes.
        train: made of what is for training, or of what is held out.
        size: pixels of a side.
        seed: another one gives other scenes.
    """

    def __init__(self, count: int, train: bool, size: int = 64, seed: int = 0) -> None:
        self.count, self.train, self.size, self.seed = count, train, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"Scenes: there is no scene {index} of {self.count}")
        random = np.random.default_rng([self.seed, self.train, index])
        of, size = sources(self.train), self.size
        image = crop(of.photographs[random.integers(len(of.photographs))], size, random)
        labels = torch.zeros(size, size, dtype=torch.int64)
        for _ in range(random.integers(DIGITS[0], DIGITS[1] + 1)):
            side = round(random.uniform(*SIZES) * size / 64)
            rows, across = free_place(labels, side, random)
            which = random.integers(len(of.digits))
            ink = F.interpolate(of.digits[which][None, None], (side, side), mode="bicubic")[0, 0]
            ink = ((ink - 0.25) * 4).clamp(0, 1)  # a firm stroke with a soft edge
            behind = image[:, rows, across]
            behind.copy_(torch.lerp(behind, colour(behind, random), ink))
            labels[rows, across][ink > 0.5] = of.labels[which]
        return image * 2 - 1, labels


def free_place(labels: Tensor, side: int, random: np.random.Generator) -> tuple[slice, slice]:
    """Of a few random squares of a scene the one with the least ink of other digits."""
    places = []
    for top, left in random.integers(len(labels) - side + 1, size=(PLACES, 2)).tolist():
        places.append((slice(top, top + side), slice(left, left + side)))
    return min(places, key=lambda place: int(labels[place].count_nonzero()))


def crop(photograph: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """A square of half to twice the size from a random place, made as large as asked for, maybe mirrored."""
    side = min(int(size * random.uniform(0.5, 2)), *photograph.shape[1:])
    top, left = (int(random.integers(length - side + 1)) for length in photograph.shape[1:])
    square = photograph[None, :, top : top + side, left : left + side]
    image = F.interpolate(square, (size, size), mode="bilinear")[0]
    return image.flip(-1) if random.random() < 0.5 else image


def colour(behind: Tensor, random: np.random.Generator) -> Tensor:
    """A random colour that stands out from what is behind it, (3, 1, 1)."""
    grey = behind.mean().item()
    contrast = random.uniform(*CONTRASTS)
    brighter = random.random() < 0.5 if contrast <= min(grey, 1 - grey) else grey < 0.5
    tint = torch.tensor(random.uniform(-0.15, 0.15, 3), dtype=torch.float32)
    return (grey + (contrast if brighter else -contrast) + tint).clamp(0, 1).view(3, 1, 1)
