"""What is measured of trained models beside their accuracy: throughput, and fidelity without labels."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokenops
from timers import Frozen
from tokenops.measuring.timing import Spread, clock, interleaved, ratio
from tokenops.nn import convert_attention
from tokenops.patching.fidelity import fidelities

from . import models, recipes
from .cells import Cell, Found, model_of
from .claims import STRONG, Key
from .data import SIZE, load
from .models import Settings

TIMED = 128  # images of a timed call
COMPARED = 1000  # test images of fidelity
MERGED = (2, 4, 8, 12, 16)
HEADS = ("heads of one width", "heads with the same channels", "heads of any width")

Groups = dict[Key, dict[int, Found]]  # by seed


def throughput(groups: Groups, settings: Settings, root: Path, rounds: int) -> dict[Key, dict[str, Any]]:
    """Images a second, and how many times as fast as the dense model, of the first seed's models in the same rounds.

    In float32, eager, on one thread. The dense model is the faster of two: with SDPA, and with tokenops' attention.
    """
    images = torch.randn(TIMED, 1, SIZE, SIZE)
    names = ("dense", *recipes.METHODS, *HEADS)
    sides = {key: timed(*key, min(found), settings, root) for key, found in groups.items() if key[0] in names}
    costs = {key: models.macs(model) for key, model in sides.items()}
    times, dense = beside_dense(with_converted(sides), images, rounds)
    return {
        key: {
            "images_per_second": list(Spread.of([TIMED / t for t in ts])),
            "speed_up": list(ratio(dense, ts)),
            "timed_macs": costs[key],
        }
        for key, ts in times.items()
    }


def frozen(groups: Groups, settings: Settings, root: Path, rounds: int) -> dict[Key, list[float]]:
    """How many times as fast as the dense model those of the strong levels are, all compiled with frozen weights.

    In bfloat16, on one thread, in the same rounds; the dense model is again the faster of two. What differs from
    another row by its training alone is left out.
    """
    names = [name for name in recipes.METHODS if name not in ("SiT with FRD", "ToMe, not trained")]
    keys = [("dense", 1.0), *((name, level) for level in STRONG for name in names)]
    sides = {key: timed(*key, min(groups[key]), settings, root).bfloat16() for key in keys if key in groups}
    images, calls = torch.randn(TIMED, 1, SIZE, SIZE).bfloat16(), {}
    with torch._dynamo.config.patch(recompile_limit=8 * len(sides)), torch.inference_mode():
        for key, model in with_converted(sides).items():
            calls[key] = Frozen(model)
            torch.testing.assert_close(calls[key](images), model(images), rtol=0.1, atol=0.5)  # each is its own
        times, dense = beside_dense(calls, images, rounds)
    return {key: list(ratio(dense, ts)) for key, ts in times.items()}


def timed(name: str, level: float, seed: int, settings: Settings, root: Path) -> Any:
    """A cell's model as it would be used: blocks that no method has changed have SDPA."""
    model = model_of(Cell(name, level, seed), settings, root).eval()
    model = recipes.compacted(model) if name in HEADS else model
    for block in model.blocks:
        if hasattr(block.attn, "fused_attn"):
            block.attn.fused_attn = True
    return model


def with_converted(sides: dict[Key, Any]) -> dict[Any, Any]:
    """The sides, and the dense model with tokenops' attention."""
    converted = copy.deepcopy(sides["dense", 1.0])
    convert_attention(converted)
    return {**sides, "converted": converted}


def beside_dense(
    sides: dict[Any, Any], images: torch.Tensor, rounds: int
) -> tuple[dict[Key, list[float]], list[float]]:
    """Seconds of every side in the same rounds, and those of the faster dense model."""
    with torch.inference_mode():
        times = interleaved({key: partial(model, images) for key, model in sides.items()}, rounds, clock("cpu"))
    dense = min(times.pop("converted"), times["dense", 1.0], key=lambda ts: Spread.of(ts).median)
    return times, dense


def fidelity(settings: Settings, root: Path, seed: int) -> list[dict[str, float]]:
    """What ToMe without training keeps of a dense model, and its accuracy on the same images."""
    data = load(settings.data)
    dense = model_of(Cell("dense", 1.0, seed), settings, root).eval()
    images, labels = data.normalised(data.test_images[:COMPARED]), data.test_labels[:COMPARED]
    reduced = {r: tokenops.apply_patch(copy.deepcopy(dense), "tome", r=r) for r in MERGED}
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
