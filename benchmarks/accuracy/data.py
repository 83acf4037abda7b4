"""Labelled images: Fashion-MNIST where it is found or can be downloaded, and scikit-learn's digits for a quick run."""

import gzip
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
SIZE = 28
#: where Debian's package dataset-fashion-mnist has its files
PACKAGE = Path("/usr/share/datasets/fashion-mnist")
FOLDER = ROOT / "out/data"
CLASSES = 10


class Data(NamedTuple):
    """Training and test images ``(n, 1, 28, 28)`` uint8 with their labels; how they are augmented."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    deviation: float
    shift: int  # pixels, either way
    mirrored: bool  # every other one, left to right

    def normalised(self, images: Tensor) -> Tensor:
        return images.float().div(255).sub(self.mean).div(self.deviation)


@cache
def load(name: str) -> Data:
    """ "fashion" or "digits"."""
    found = {"fashion": fashion, "digits": digits}[name]()
    pixels = found[0].float() / 255
    return Data(*found, pixels.mean().item(), pixels.std().item(), 2, name == "fashion")


def fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """60,000 and 10,000: those of Debian's package, of an earlier download, or of a new one."""
    from torchvision.datasets import FashionMNIST

    for packed in PACKAGE.glob("*.gz"):
        unpack(packed, FOLDER / "FashionMNIST/raw" / packed.stem)
    try:
        sets = [FashionMNIST(str(FOLDER), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SystemExit(
            "Fashion-MNIST is neither here nor can it be downloaded; Debian's package dataset-fashion-mnist has it, and"
            f" --quick does without ({error})"
        ) from None
    first, second = ((each.data.unsqueeze(1), each.targets) for each in sets)
    return *first, *second


def unpack(packed: Path, file: Path) -> None:
    """Unless it is there; whole or not at all, whoever else does so at the same time."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, delete=False) as target, gzip.open(packed) as source:
            shutil.copyfileobj(source, target)
        os.replace(target.name, file)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1347 and 450, of 8 x 8 pixels."""
    images, labels, train, test = split_digits()
    wide = F.interpolate(images.mul(255 / 16), (SIZE, SIZE), mode="bilinear", align_corners=False).round().byte()
    return wide[train], labels[train], wide[test], labels[test]


def split_digits() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Scikit-learn's 1797, ``(n, 1, 8, 8)`` from 0 to 16, their labels, and which are for training and for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    train, test = train_test_split(np.arange(1797), test_size=0.25, stratify=found.target, random_state=0)
    return torch.from_numpy(found.images).float().unsqueeze(1), torch.from_numpy(found.target), train, test


class Batches:
    """Augmented batches for `tokenops.training.fit`, whole ones at once; an epoch is so many of them.

    Epochs go through one permutation of the images after another. What a batch holds depends on the seed, the epoch and
    its number alone.
    """

    def __init__(self, data: Data, batch: int, steps: int, seed: int) -> None:
        self.data, self.batch_size, self.steps, self.seed, self.epoch = data, batch, steps, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self.epoch * self.steps * self.batch_size
        chosen = self.chosen(begin, self.steps * self.batch_size)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for now in chosen.split(self.batch_size):
            yield self.augmented(now, random), self.data.labels[now]

    def chosen(self, first: int, count: int) -> Tensor:
        """The next so many images behind the first ones, by permutations of all."""
        length, found = len(self.data.labels), []
        for turn in range(first // length, (first + count - 1) // length + 1):
            order = torch.from_numpy(np.random.default_rng((self.seed, turn)).permutation(length))
            found.append(order[max(0, first - turn * length) : first + count - turn * length])
        return torch.cat(found)

    def augmented(self, chosen: Tensor, random: torch.Generator) -> Tensor:
        """Moved by up to ``shift`` pixels, each in its way, what comes in being empty; mirrored."""
        data, images = self.data, self.data.images[chosen]
        if data.mirrored:
            flips = torch.rand(len(images), generator=random) < 0.5
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        margin = data.shift
        wide = F.pad(images, (margin,) * 4)
        moves = torch.randint(0, 2 * margin + 1, (2, len(images), 1), generator=random)
        rows, columns = (moves[i] + torch.arange(SIZE) for i in (0, 1))
        moved = wide[torch.arange(len(images)).view(-1, 1, 1), 0, rows.unsqueeze(2), columns.unsqueeze(1)]
        return data.normalised(moved.unsqueeze(1))
