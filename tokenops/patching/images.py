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

    Floats above 1 and whole numbers of 32 bits up to 255 count as 8 bits.

    Raises:
        ValueError: floats are not from 0 to 255, or whole numbers not from 0 to 65535.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float64)
    kind, high, most = ("floats", 1, 255) if image.mode == "F" else ("whole numbers", 255, 65535)
    if not (pixels.min() >= 0 and pixels.max() <= most):
        raise ValueError(
            f"its pixels are {kind} from {pixels.min():g} to {pixels.max():g}, but must be from 0 to {most}:"
            " convert it to 8 bits"
        )
    small = pixels.max() <= high and image.mode in ("I", "F")  # a file of 16 bits may be dark
    scale = 255 / (high if small else most)
    return Image.fromarray(np.rint(pixels * scale).astype(np.uint8)).convert("RGB")
