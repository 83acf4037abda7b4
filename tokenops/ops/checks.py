"""The words of our errors: each names the argument, what was given and what is allowed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

#: tensors that follow the tokens in one launch
MOST_COMPANIONS = 4
_OWN_DISPATCH = Tensor.__torch_dispatch__  # none
_STRIDED = torch.strided
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dense(op: str, name: str, value: Tensor) -> None:
    """`value` is a plain tensor that lies in memory by strides; how far apart is no matter."""
    if value.layout is not _STRIDED or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)[6:]
        raise TypeError(f"{op}: {name} must be a dense tensor, but got a {kind.removeprefix('_')} one")
    if type(value) is not Tensor and type(value).__torch_dispatch__ is not _OWN_DISPATCH:
        if not isinstance(value, (FakeTensor, FunctionalTensor)):  # torch.compile and torch.export see these
            raise TypeError(
                f"{op}: {name} must be a plain tensor, but {type(value).__name__} has a dispatch of its own"
            )


def tensor(op: str, name: str, value: Any, shape: str, like: Tensor | None = None, floating: bool = True) -> torch.Size:
    """`value` is a tensor with the number of dimensions of `shape` ("B,N,C"), of a float dtype, on `like`'s device.

    Returns its sizes: to ask a tensor for one costs as much as a check.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor ({shape}), but got {type(value).__name__}")
    dense(op, name, value)
    sizes = value.shape
    if len(sizes) != shape.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({shape}), but got {tuple(sizes)}")
    if floating and value.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, but got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but the other tensors are on {like.device}")
    return sizes


def number(op: str, name: str, value: Any, what: str) -> None:
    """An int or a float that a float can hold; a symbolic one under torch.compile."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be {what}, but got {value!r}")
    try:
        float(value) if type(value) is int else None
    except OverflowError:
        raise ValueError(f"{op}: {name} is an int of {len(str(value))} digits, more than a float can hold") from None


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, but got {value!r}")


def same(op: str, what: str, name: str, value: int, other: str, expected: int) -> None:
    """Two sizes agree: `what` of `name` and of `other`."""
    if value != expected:
        raise ValueError(f"{op}: {name} has {value} {what}, but {other} has {expected}")


def prefix(op: str, name: str, value: Any, tokens: int | None) -> None:
    """An int that is at most the tokens there are; of packed sequences, which may be shorter, `tokens` is None."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, but got {value!r}")
    if tokens is None:
        if value < 0:
            raise ValueError(f"{op}: {name}={value}, but it must be 0 or more")
        return
    if value < 0 or value > tokens:
        raise ValueError(f"{op}: {name}={value}, but it must be between 0 and the {tokens} tokens there are")


def companions(op: str, given: int) -> None:
    if given > MOST_COMPANIONS:
        raise ValueError(f"{op}: companions has {given} entries, but at most {MOST_COMPANIONS} are allowed")


def companion(op: str, name: str, value: Any, shape: str, images: int, tokens: int, like: Tensor) -> None:
    """A tensor (images, tokens) of any dtype that follows the tokens."""
    sizes = tensor(op, name, value, shape, like=like, floating=False)
    if value.dtype.itemsize not in (1, 2, 4, 8) or value.is_complex():
        raise TypeError(f"{op}: {name} must be real or integer, but got {value.dtype}")
    if sizes[0] != images or sizes[1] != tokens:
        raise ValueError(f"{op}: {name} must have shape ({images}, {tokens}), but got {tuple(sizes)}")


def companion_rows(op: str, name: str, value: Any, shape: str, rows: int, other: str, like: Tensor) -> None:
    """A tensor `shape` (rows,) or (rows, E) of any dtype that follows the rows of `other`, packed sequences."""
    wide = isinstance(value, Tensor) and value.dim() == 2
    sizes = tensor(op, name, value, f"{shape},E" if wide else shape, like=like, floating=False)
    if value.dtype.itemsize not in (1, 2, 4, 8) or value.is_complex():
        raise TypeError(f"{op}: {name} must be real or integer, but got {value.dtype}")
    same(op, "rows", name, sizes[0], other, rows)


def looked_at(values: Tensor) -> bool:
    """Whether a tensor's values may be looked at: on a CPU, where that waits for nothing, while nothing is traced.

    Compiled code looks for itself; this is for the reference.
    """
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(values, (FakeTensor, FunctionalTensor))
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
    )


def lengths(op: str, name: str, values: Tensor | None, most: int) -> None:
    """Each is from 0 to `most` keys."""
    if values is None or not looked_at(values) or values.numel() == 0:
        return
    low, high = (value.item() for value in values.aminmax())
    if low < 0 or high > most:
        raise ValueError(
            f"{op}: {name} has {low if low < 0 else high}, but it must be between 0 and the {most} keys there are"
        )


def places(
    op: str, name: str, index: Tensor, below: int, allowed: Callable[[], str], lowest: int = 0, unique: bool = False
) -> None:
    """Each is from `lowest` to `below` - 1, and there once if `unique` (but what is negative goes nowhere).

    The words are a function: written before they are needed they would tie what is compiled to one size.
    """
    if not looked_at(index):
        return
    for at in ((index < lowest) | (index >= below)).nonzero()[:1].tolist():
        raise IndexError(f"{op}: {name}{at}={index[tuple(at)].item()}, but {allowed()}")
    if unique and index.shape[1] > 1:
        ordered, order = index.sort(dim=1, stable=True)
        again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        for b, j in again.nonzero()[:1].tolist():
            place = f"{name}[{b}, {order[b, j + 1].item()}]={ordered[b, j].item()}"
            raise IndexError(f"{op}: {place} is there twice, but the indices of an image must be unique")
