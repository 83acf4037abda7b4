"""Pictures of a trace: what each token of an image has become, block by block."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("tokenops.visualize needs Pillow: pip install 'tokenops[plot]'") from error

if TYPE_CHECKING:
    from .engine import Step
    from .views import Trace

CELL = (8, 24)  # pixels of a patch's side, least and most
COLUMNS = 7  # panels in a row, at most
GAP, CAPTION, FONT = 8, 22, 13  # pixels between panels, of a caption and of its letters
PAPER, INK = (255, 255, 255), (40, 40, 40)
GONE, HATCH = 0.25, 0.07  # contrast a dropped patch keeps, and of the hatching over it
BORDER = 0.55  # of the region's brightness
TINT, SHADE = 0.75, 0.6  # a token's colour over the patch it draws on most, and its brightness where the image is black


def visualize(image: Any, trace: "Trace", which: int = 0) -> Image.Image:
    """What each token of an image has become: a panel a step beside the image, the step's block and tokens below it.

    Tokens that merged patches: every token's region in the mean colour of its pixels, a thin line between regions (the
    picture of token merging); where a step only drops patches, those that are left as they are. Patches that no token
    stands for are grey and hatched. Soft slimming: every patch has the colour of the token that draws on it most, the
    stronger the more it does; the strongest of the step has the full colour.

    Args:
        image: what the model saw (crop included), a PIL image or an ``(H, W, 3)`` uint8 array; it is resized to a
            multiple of the trace's grid, 8 to 24 pixels a patch.
        trace: of a batch with the image in it, from `tokenops.trace`.
        which: the image's place in that batch.

    Returns:
        An RGB image, at most 7 panels in a row. Without a step it has the image alone.

    Raises:
        TypeError: the image is neither.
        ValueError: the array's shape is another, there is no such place in the batch, or a step does not fit the grid.

    Source: Bolya et al., Token Merging: Your ViT But Faster (ICLR 2023), figure 4, for the picture of merged tokens.
    """
    panels, captions = panels_of(image, trace, which)
    return _sheet([np.rint(255 * panel).astype(np.uint8) for panel in panels], captions)


def panels_of(image: Any, trace: "Trace", which: int = 0) -> tuple[list[np.ndarray], list[str]]:
    """The image and a panel a step, ``(H, W, 3)`` from 0 to 1 each, and their captions; arguments as of `visualize`."""
    height, width = trace.grid
    for step in trace.steps:
        _check(step, height * width, which)
    if which < 0:
        raise ValueError(f"visualize: which={which}, but it must be at least 0")
    pixels = _pixels(image, height, width)
    panels, captions = [pixels], ["image"]
    for step in trace.steps:
        if step.sources is not None:
            panels.append(hard(pixels, step.sources[which].detach().cpu().view(height, width).numpy()))
        elif step.weights is not None:
            weights = step.weights[which].detach().float().cpu()
            panels.append(soft(pixels, weights.unflatten(1, (height, width)).numpy()))
        captions.append(f"block {step.block}: {step.tokens} token" + "s" * (step.tokens != 1))
    return panels, captions


def hard(pixels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Pixels ``(H, W, 3)`` from 0 to 1, each token's region in its mean colour; ``tokens`` ``(h, w)``, -1 for none."""
    owner = large(tokens, pixels)
    gone = owner < 0
    kept = tokens[tokens >= 0]
    merged = len(np.unique(kept)) < len(kept)
    out = pixels
    if merged:
        flat = np.where(gone, owner.max() + 1, owner).ravel()
        sums = np.stack([np.bincount(flat, pixels[..., c].ravel()) for c in range(3)], axis=-1)
        out = (sums / np.bincount(flat).clip(1)[:, None])[flat].reshape(pixels.shape)
        out = np.where(edges(owner)[..., None], BORDER * out, out)
    return np.where(gone[..., None], hatched(pixels), out)


def soft(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pixels ``(H, W, 3)`` under the colour of the token that draws on them most; ``weights`` ``(M, h, w)``."""
    owner, strength = weights.argmax(axis=0), weights.max(axis=0)
    opacity = TINT * strength / max(float(strength.max()), 1e-30)
    grey = pixels.mean(axis=2, keepdims=True)
    owner, opacity = large(owner, pixels), large(opacity, pixels)[..., None]
    out = (1 - opacity) * pixels + opacity * palette(len(weights))[owner] * (SHADE + (1 - SHADE) * grey)
    return np.where(edges(owner)[..., None], BORDER * out, out)


def hatched(pixels: np.ndarray) -> np.ndarray:
    """Pale and grey, with diagonal lines."""
    grey = 0.9 - GONE + GONE * pixels.mean(axis=2, keepdims=True)
    rows, columns = np.indices(pixels.shape[:2])
    return (grey - HATCH * ((rows + columns) % 6 == 0)[..., None]).repeat(3, axis=2)


def edges(owner: np.ndarray) -> np.ndarray:
    """Which pixels are the first of another region than the one above or to the left."""
    found = np.zeros(owner.shape, dtype=bool)
    found[1:] |= owner[1:] != owner[:-1]
    found[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    return found


def palette(n: int) -> np.ndarray:
    """n colours, ``(n, 3)``; the hues of neighbours are a golden angle apart."""
    hue = np.arange(n)[:, None] * 0.618034 + np.array([0.0, 2 / 3, 1 / 3])
    level = np.array([1.0, 0.8])[np.arange(n) % 2][:, None]
    return level * (0.5 + 0.5 * np.cos(2 * np.pi * hue))


def large(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """A patch's value at each of its pixels."""
    return values.repeat(pixels.shape[0] // values.shape[0], axis=0).repeat(pixels.shape[1] // values.shape[1], axis=1)


def _pixels(image: Any, height: int, width: int) -> np.ndarray:
    """The image in the grid's multiple, ``(H, W, 3)`` from 0 to 1."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"visualize: image must be (H, W, 3) uint8, but is {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"visualize: image must be a PIL image or a numpy array, but is {type(image).__name__}")
    cell = min(max(image.height // height, image.width // width, CELL[0]), CELL[1])
    size = width * cell, height * cell
    image = image.convert("RGB")
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)) / 255


def _check(step: "Step", patches: int, which: int) -> None:
    found: list[Tensor] = [values for values in (step.sources, step.weights) if values is not None]
    if len(found) != 1:
        raise ValueError(
            f"visualize: the step of block {step.block} must have sources or weights, but has {len(found)}"
        )
    (values,) = found
    wanted, ndim = ("(B, N)", 2) if step.sources is not None else ("(B, M, N)", 3)
    if values.ndim != ndim or values.shape[-1] != patches:
        shape = tuple(values.shape)
        raise ValueError(f"visualize: the step of block {step.block} must be {wanted} with N={patches}, but is {shape}")
    if not 0 <= which < len(values):
        raise ValueError(f"visualize: which={which}, but the trace is of {len(values)} images: 0 to {len(values) - 1}")
    if step.sources is not None and values.is_floating_point():
        raise ValueError(f"visualize: the sources of block {step.block} must be integers, but are {values.dtype}")


def _sheet(panels: list[np.ndarray], captions: list[str]) -> Image.Image:
    """Panels in rows, captions below them."""
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    height, width = panels[0].shape[:2]
    down, across = height + CAPTION + GAP, width + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + rows * down), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x, y = GAP + i % columns * across, GAP + i // columns * down
        sheet.paste(Image.fromarray(panel), (x, y))
        draw.text((x + width / 2, y + height + CAPTION / 2), caption, fill=INK, font=font, anchor="mm")
    return sheet
