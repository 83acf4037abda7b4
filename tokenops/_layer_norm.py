"""The layer norm that some operators apply to their result in the same launch: its arguments and its gradient."""

from typing import Any

import torch
from torch import Tensor

from . import _checks


def arguments(op: str, norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps), checked; (None, None, 0.0) where no norm is asked for."""
    if norm is None:
        return None, None, 0.0
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        raise TypeError(f"{op}: norm must be (weight, bias, eps), but got {norm!r}")
    for name, value in zip(("weight", "bias"), norm[:2]):
        if value is None:
            continue
        _checks.tensor(op, f"norm's {name}", value, "C", like=x)
        _checks.same(op, "channels", f"norm's {name}", value.shape[0], "x", x.shape[2])
    if isinstance(norm[2], bool) or not isinstance(norm[2], (int, float)) or not norm[2] >= 0:
        raise ValueError(f"{op}: norm's eps must be a number of at least 0, but got {norm[2]!r}")
    return norm[0], norm[1], float(norm[2])


def backward(
    dnormed: Tensor, tokens: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """torch's own layer norm backward, in the accumulation dtype: the gradients of tokens, weight and bias."""
    wide = statistics.dtype
    mean, deviation = statistics.unsqueeze(-1)
    w, b = (None if t is None else t.to(wide) for t in (weight, bias))
    mask = [True, weight is not None, bias is not None]
    dtokens, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(wide), tokens.to(wide), tokens.shape[-1:], mean, deviation, w, b, mask
    )
    return (
        dtokens.to(tokens.dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )
