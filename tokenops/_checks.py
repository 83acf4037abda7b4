"""The words of our errors: each names the argument, what was given and what is allowed."""

from typing import Any

import torch
from torch import Tensor

#: tensors that follow the tokens in one launch
MOST_COMPANIONS = 4
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(op: str, name: str, value: Any, shape: str, like: Tensor | None = None, floating: bool = True) -> None:
    """`value` is a tensor with the number of dimensions of `shape` ("B,N,C"), of a float dtype, on `like`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor ({shape}), but got {type(value).__name__}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({shape}), but got {tuple(value.shape)}")
    if floating and value.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, but got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but the other tensors are on {like.device}")


def same(op: str, what: str, name: str, value: int, other: str, expected: int) -> None:
    """Two sizes agree: `what` of `name` and of `other`."""
    if value != expected:
        raise ValueError(f"{op}: {name} has {value} {what}, but {other} has {expected}")


def prefix(op: str, name: str, value: Any, tokens: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, but got {value!r}")
    if value < 0 or value > tokens:
        raise ValueError(f"{op}: {name}={value}, but it must be between 0 and the {tokens} tokens there are")


def companions(op: str, given: int) -> None:
    if given > MOST_COMPANIONS:
        raise ValueError(f"{op}: companions has {given} entries, but at most {MOST_COMPANIONS} are allowed")


def companion(op: str, name: str, value: Any, shape: str, images: int, tokens: int, like: Tensor) -> None:
    """A tensor (images, tokens) of any dtype that follows the tokens."""
    tensor(op, name, value, shape, like=like, floating=False)
    if value.dtype.itemsize not in (1, 2, 4, 8) or value.is_complex():
        raise TypeError(f"{op}: {name} must be real or integer, but got {value.dtype}")
    if value.shape[0] != images or value.shape[1] != tokens:
        raise ValueError(f"{op}: {name} must have shape ({images}, {tokens}), but got {tuple(value.shape)}")
