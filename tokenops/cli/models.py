"""What the demo runs: photographs, the models made for inference, and what is counted of them."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import CommandError
from .timing import Spread

try:
    import timm
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    from .. import methods  # registers the models with timm, and our FLOP formulas with torch
except ImportError as missing:
    raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[demo]'") from missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Side(NamedTuple):
    """One of the two models and what was found of it."""

    name: str
    weights: str  # where they come from; "" for random ones
    macs: float  # an image
    parameters: int
    tokens: list[int]  # that enter each block, prefix included
    ms: Spread  # an image

    @property
    def images_per_second(self) -> Spread:
        return Spread(*(1e3 / t for t in (self.ms.median, self.ms.high, self.ms.low)))


class Settings(NamedTuple):
    device: str
    dtype: str
    batch: int
    repeats: int | None


def load_photographs(paths: Sequence[Path]) -> list[Image.Image]:
    """The user's pictures, or the two photographs of scikit-learn."""
    if paths:
        return [open_image(path) for path in paths]
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as missing:
        raise CommandError("give it photographs, or pip install scikit-learn, which brings two along") from missing
    return [Image.fromarray(image) for image in load_sample_images().images]


def open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}") from None
    except UnidentifiedImageError:
        raise CommandError(f"{path} is not an image that Pillow can read") from None
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error}") from None


def make(name: str, checkpoint: Path | None, pretrained: bool, slimmed: bool) -> tuple[Any, str]:
    """The model as it is for inference, and where its weights come from ("" for random ones)."""
    known = timm.list_models("sit_*")
    if slimmed and name not in known:
        raise CommandError(f"there is no slimmed model {name!r}; there are: {', '.join(known)}")
    if not timm.models.is_model(name):
        first = name.split("_")[0]
        close = (timm.list_models(f"{first}*") or timm.list_models(f"*{first}*"))[:8]
        raise CommandError(f"timm knows no model {name!r}" + (f"; near it are: {', '.join(close)}" if close else ""))
    download = pretrained and checkpoint is None and timm.models.is_model_pretrained(name)
    try:
        model = timm.create_model(name, pretrained=download)
    except (OSError, RuntimeError) as error:
        raise CommandError(f"cannot make {name}: {error}") from None
    if checkpoint is not None:
        try:
            timm.models.load_checkpoint(model, str(checkpoint), weights_only=True)
        except FileNotFoundError:
            raise CommandError(f"there is no file {checkpoint}") from None
        except Exception as error:  # torch.load and load_state_dict raise whatever a strange file provokes
            raise CommandError(f"{checkpoint} does not hold weights of {name}: {error}") from None
    model.eval()
    weights = f"{checkpoint}" if checkpoint else "published weights" if download else ""
    return methods.for_inference(model), weights


def prepare(model: nn.Module, photographs: Sequence[Image.Image]) -> Tensor:
    """The photographs as the model wants them: resized, cropped, normalised."""
    transform = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(photograph) for photograph in photographs])


def displayed(model: nn.Module, x: Tensor) -> np.ndarray:
    """What the model sees of a photograph, (H, W, 3) between 0 and 1."""
    config = resolve_data_config({}, model=model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


@torch.inference_mode()
def counted(model: nn.Module, x: Tensor) -> tuple[float, int, list[int]]:
    """Multiply-adds of an image, parameters, and the tokens that enter each block."""
    tokens: list[int] = []
    hooks = [
        getattr(block, "attn", block).register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        for block in getattr(model, "blocks", ())
    ]
    with FlopCounterMode(display=False) as counter:
        model(x)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / 2 / len(x), sum(p.numel() for p in model.parameters()), tokens


def caller(model: nn.Module, x: Tensor, settings: Settings) -> Callable[[], Tensor]:
    """A call of the model on a batch of the photographs in turn."""
    model = deepcopy(model).to(settings.device, DTYPES[settings.dtype])
    x = x[torch.arange(settings.batch) % len(x)].to(settings.device, DTYPES[settings.dtype])
    return torch.inference_mode()(lambda: model(x))


def quartiles(value: Spread) -> str:
    """12.3 (12.1..12.9)"""
    digits = max(0, 2 - math.floor(math.log10(value.median)))
    return "{:.{d}f} ({:.{d}f}..{:.{d}f})".format(*value, d=digits)


def stages(tokens: Sequence[int]) -> str:
    """[197, 99, 99] -> "197 x 1, 99 x 2"."""
    return ", ".join(f"{n} x {tokens.count(n)}" for n in dict.fromkeys(tokens)) or "unknown"


def backends(kernels: set[str]) -> list[str]:
    """{"soft_aggregate_fwd.native"} -> ["soft_aggregate on native"]."""
    return sorted({f"{kernel.split('_fwd')[0]} on {kernel.split('.')[-1]}" for kernel in kernels})
