"""Loads the compiled library (csrc/) and says why it, or a part of it, is not there."""

from pathlib import Path

import torch

_HERE = Path(__file__).parent


def why_not(device: str) -> str | None:
    return "the C++ extension is not built"
