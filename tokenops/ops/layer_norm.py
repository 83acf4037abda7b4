"""The layer norm that some operators apply to their result in the same launch: its arguments and its gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .reference import accumulation_dtype


def arguments(op: str, norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps), checked; (None, None, 0.0) where no norm is asked for."""
    if norm is None:
        return None, None, 0.0
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        raise TypeError(f"{op}: norm must be (weight, bias, eps), but got {norm!r}")
    for name, value in zip(("weight", "bias"), norm[:2]):
        if value is None:
            continue
        (channels,) = checks.tensor(op, f"norm's {name}", value, "C", like=x)
        checks.same(op, "channels", f"norm's {name}", channels, "x", x.shape[-1])
    checks.number(op, "norm's eps", norm[2], "a number of at least 0")
    if not norm[2] >= 0:
        raise ValueError(f"{op}: norm's eps must be a number of at least 0, but got {norm[2]!r}")
    return norm[0], norm[1], float(norm[2])


def as_taken(x: Tensor, backend: str, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """Weight and bias as kernels take them: compiled code on a CPU as they are, others in the accumulation dtype."""
    if backend == "native" and x.device.type == "cpu":
        return parameters
    wide = accumulation_dtype(x.dtype)
    return [None if t is None else t.detach().to(wide).contiguous() for t in parameters]


def added(
    dtokens: Tensor | None, dnormed: Tensor | None, saved: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of the tokens with what comes through their norm, and those of its weight and bias.

    `saved` is what `backward` takes behind the gradient; nothing where no norm was asked for.
    """
    if dnormed is None or not saved:
        return dtokens, None, None
    through, dweight, dbias = backward(dnormed, *saved)
    return through if dtokens is None else dtokens + through, dweight, dbias


def backward(
    dnormed: Tensor, tokens: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """torch's own layer norm backward, in the accumulation dtype: the gradients of tokens, weight and bias."""
    wide = statistics.dtype
    mean, deviation = statistics.contiguous().unsqueeze(-1)  # what was saved may lie otherwise, and torch trusts it
    w, b = (None if t is None else t.to(wide) for t in (weight, bias))
    alone = weight is None and bias is not None  # torch has no second gradient of a bias without a weight
    mask = [True, weight is not None, bias is not None and not alone]
    dtokens, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(wide), tokens.to(wide), tokens.shape[-1:], mean, deviation, w, None if alone else b, mask
    )
    if alone:
        dbias = dnormed.to(wide).flatten(0, -2).sum(dim=0)
    return (
        dtokens.to(tokens.dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )
