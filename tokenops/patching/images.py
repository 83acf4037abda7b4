"""Image files as models take them: one way to read them, for the commands and for training."""

from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile


def open_rgb(file: Path | IO[bytes]) -> Image.Image:
    """An image file in RGB, whole: half an image is none.

    Raises:
        OSError: there is no such file, or Pillow cannot read it.
        ValueError: its pixels have no meaning in 8 bits.
    """
    allowed, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(file) as image:
            return rgb(image)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def rgb(image: Any) -> Image.Image:
    """A PIL image in RGB. 16 bits are scaled to 8, and floats from 0 to 1; Pillow's own conversion cuts both off.

    Raises:
        ValueError: floats are not from 0 to 1, or whole numbers not from 0 to 65535.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float64)
    most = 1 if image.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= most):
        kind = "floats" if image.mode == "F" else "whole numbers"
        raise ValueError(
            f"its pixels are {kind} from {pixels.min():g} to {pixels.max():g}, but must be from 0 to {most}:"
            " convert it to 8 bits"
        )
    return Image.fromarray(np.rint(pixels * (255 / most)).astype(np.uint8)).convert("RGB")
