"""What is measured of trained models beside their accuracy: throughput, and fidelity without labels."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokenops
from tokenops.measuring.timing import Spread, clock, interleaved, ratio
from tokenops.nn import convert_attention
from tokenops.patching.fidelity import fidelities

from . import models, recipes
from .cells import Cell, Found, model_of
from .data import SIZE, load
from .models import Settings

TIMED = 128  # images of a timed call
COMPARED = 1000  # test images of fidelity
MERGED = (2, 4, 8, 12, 16)
HEADS = ("heads of one width", "heads with the same channels", "heads of any width")

Key = tuple[str, float]  # name and level
Groups = dict[Key, dict[int, Found]]  # by seed


def throughput(groups: Groups, settings: Settings, root: Path, rounds: int) -> dict[Key, dict[str, Any]]:
    """Images a second, and how many times as fast as the dense model, of the first seed's models in the same rounds.

    In float32, eager, on one thread. The dense model is the faster of two: with SDPA, and with tokenops' attention.
    Blocks that no method has changed have SDPA in all models.
    """
    images, sides = torch.randn(TIMED, 1, SIZE, SIZE), {}
    for (name, level), found in groups.items():
        if name in ("dense", *recipes.METHODS, *HEADS):
            model = model_of(Cell(name, level, min(found)), settings, root).eval()
            model = recipes.compacted(model) if name in HEADS else model
            for block in model.blocks:
                if hasattr(block.attn, "fused_attn"):
                    block.attn.fused_attn = True
            sides[name, level] = model
    converted = models.copied(sides["dense", 1.0])
    convert_attention(converted)
    costs = {key: models.macs(model) for key, model in sides.items()}
    calls: dict[Any, Any] = {key: partial(model, images) for key, model in sides.items()}
    with torch.inference_mode():
        times = interleaved(calls | {"converted": partial(converted, images)}, rounds, clock("cpu"))
    dense = min(times.pop("converted"), times["dense", 1.0], key=lambda ts: Spread.of(ts).median)
    return {
        key: {
            "images_per_second": list(Spread.of([TIMED / t for t in ts])),
            "speed_up": list(ratio(dense, ts)),
            "timed_macs": costs[key],
        }
        for key, ts in times.items()
    }


def fidelity(settings: Settings, root: Path, seed: int) -> list[dict[str, float]]:
    """What ToMe without training keeps of a dense model, and its accuracy on the same images."""
    data = load(settings.data)
    dense = model_of(Cell("dense", 1.0, seed), settings, root).eval()
    images, labels = data.normalised(data.test_images[:COMPARED]), data.test_labels[:COMPARED]
    reduced = {r: tokenops.apply_patch(models.copied(dense), "tome", r=r) for r in MERGED}
    found = fidelities(dense, {str(r): model for r, model in reduced.items()}, images.split(250))
    whole = models.macs(dense)
    return [
        {"r": r, "part": models.macs(model) / whole, "accuracy": accuracy(model, images, labels)}
        | {name: value for name, value in found[str(r)]._asdict().items() if value is not None}
        for r, model in reduced.items()
    ]


@torch.inference_mode()
def accuracy(model: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Per cent."""
    return 100 * (model(images).argmax(1) == labels).double().mean().item()
