"""merge_neighbours: two neighbours of the token grid become one, along one axis; and the way back."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, layer_norm, reference
from .autograd import Operator, gradients, needs_grad, zeros_like_tokens
from .backends import choose
from .schemas import kernel

AXES = ("horizontal", "vertical")
MODES = ("repeat", "bilinear")


def merge_neighbours(
    x: Tensor,
    grid: tuple[int, int],
    axis: str,
    weights: Tensor | tuple[Tensor | float, Tensor | float] | None = None,
    *,
    prefix: int = 1,
    sizes: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Any:
    r"""Halve one axis of the token grid: every two neighbours along it become one token.

    .. math:: y = [x_{1..P},\; w_a\, a + w_b\, b], \qquad
        (w_a, w_b) = (\tfrac12, \tfrac12),\; (\alpha, \beta) \;\text{or}\; \mathrm{softmax}(l_a, l_b)

    for the neighbours a and b, a being on the left or on top. The last column or row of an odd axis is passed through
    as it is, to the bit (the sign of a zero apart). With sizes s, the tokens count by them: :math:`\alpha` and
    :math:`\beta` are multiplied by :math:`2 s_a / (s_a + s_b)` and :math:`2 s_b / (s_a + s_b)` (so that without weights
    y is the mean of all that a and b are means of), and their logarithms are added to the logits.

    Args:
        x: ``(B, P+H*W, C)``, the grid row by row behind the prefix; fp16, bf16, fp32 or fp64, any strides.
        grid: (H, W).
        axis: "horizontal" merges the columns 2j and 2j+1, "vertical" the rows 2i and 2i+1.
        weights: None for the average; or a pair, :math:`\alpha` and :math:`\beta`, each a number, a tensor with one
            element or a tensor ``(C,)``; or the logits :math:`l`, ``(B, H*W)``. Tensors are of any float dtype; a logit
            of -inf does not count, and of two such the result is 0.
        prefix: P, how many leading tokens (class, distillation) are copied.
        sizes: ``(B, H*W)``, how many patches each token stands for, of any float dtype; not differentiated. Two sizes
            of 0 count as equal.
        norm: ``(weight, bias, eps)``: the layer norm of the result over C is returned as well; weight and bias are
            ``(C,)`` or None.

    Returns:
        ``(B, P+M, C)``, contiguous, M being ``H * ceil(W/2)`` or ``ceil(H/2) * W``; or a tuple of this and, as asked
        for, the new sizes ``(B, M)`` and the layer norm, in this order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, or an option has no such value.

    Sums are fp32, fp64 for fp64. Deterministic. Differentiable twice in ``x``, ``weights`` and the norm's weight and
    bias.

    Source: asymmetric token merging of CAIT (Wang et al., arXiv 2309.15755), reconstructed from the published
    description: the weights and the treatment of odd axes and sizes are ours.

    >>> x = torch.arange(7.0).reshape(1, 7, 1)  # a class token and a grid of 2 x 3
    >>> merge_neighbours(x, (2, 3), "horizontal").flatten().tolist()
    [0.0, 1.5, 3.0, 4.5, 6.0]
    """
    op = "merge_neighbours"
    B, rows, _ = checks.tensor(op, "x", x, "B,P+H*W,C")
    checks.prefix(op, "prefix", prefix, rows)
    height, width = _grid(op, grid)
    if rows != prefix + height * width:
        raise ValueError(
            f"{op}: grid={tuple(grid)} has {height * width} tokens, but x has {rows} tokens,"
            f" {rows - prefix} after a prefix of {prefix}"
        )
    _option(op, "axis", axis, AXES)
    _weights(op, weights, x, height * width)
    if sizes is not None:
        checks.tensor(op, "sizes", sizes, "B,H*W", like=x)
        _shape(op, "sizes", sizes, (B, height * width))
    weight, bias, eps = layer_norm.arguments(op, norm, x)
    backend = choose(op, x.device.type, x.dtype)
    if backend == "reference":
        return reference.merge_neighbours(x, grid, axis, weights, prefix=prefix, sizes=sizes, norm=norm)
    logits = first = second = None
    alpha = beta = 0.5
    if isinstance(weights, Tensor):
        logits = weights
    elif weights is not None:
        (first, alpha), (second, beta) = map(_factor, weights)
    options = (height, width, axis == "vertical", prefix, alpha, beta)
    run = _MergeNeighbours.of if needs_grad(x, first, second, logits, weight, bias) else _run
    arguments = x, first, second, logits, sizes, weight, bias, options, (norm is not None, eps), backend
    y, merged, normed, _ = run(*arguments)
    if sizes is None and norm is None:
        return y
    return y, *(t for t, asked in ((merged, sizes), (normed, norm)) if asked is not None)


@reference.keeps_dtypes
def unmerge_neighbours(
    x: Tensor, grid: tuple[int, int], merges: tuple[str, ...], *, prefix: int = 1, mode: str = "repeat"
) -> Tensor:
    """Bring merged tokens back to the full grid, for dense prediction: through any number of merges at once.

    Args:
        x: ``(B, P+M, C)``, tokens that went through the merges.
        grid: (H, W), the grid before the first of them.
        merges: the axes, "horizontal" or "vertical", of every merge in between, in any order.
        prefix: P, how many leading tokens are copied.
        mode: "repeat" gives every place the token it went into; "bilinear" interpolates between their centres
            (``torch.nn.functional.interpolate``, corners not aligned; on odd axes the grid is taken as continued).

    Returns:
        ``(B, P+H*W, C)``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit together, or an option has no such value.

    Deterministic on a CPU; made of torch's own operators, so differentiable as often as these are.

    >>> x = torch.tensor([9.0, 1.0, 2.0]).reshape(1, 3, 1)
    >>> unmerge_neighbours(x, (2, 3), ("horizontal", "vertical")).flatten().tolist()
    [9.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0]
    """
    op = "unmerge_neighbours"
    checks.tensor(op, "x", x, "B,P+M,C")
    checks.prefix(op, "prefix", prefix, x.shape[1])
    height, width = _grid(op, grid)
    if isinstance(merges, str) or not isinstance(merges, (tuple, list)):
        raise TypeError(f"{op}: merges must be a tuple of axes, but got {merges!r}")
    for i, axis in enumerate(merges):
        _option(op, f"merges[{i}]", axis, AXES)
    _option(op, "mode", mode, MODES)
    down, across = (_halvings(merges.count(axis), size) for axis, size in (("vertical", height), ("horizontal", width)))
    small = (height + 2**down - 1) // 2**down, (width + 2**across - 1) // 2**across
    if x.shape[1] != prefix + small[0] * small[1]:
        raise ValueError(
            f"{op}: x has {x.shape[1]} tokens, {x.shape[1] - prefix} after a prefix of {prefix}, but the grid"
            f" {tuple(grid)} merged along {tuple(merges)} has {small[0] * small[1]}"
        )
    if not merges:
        return x
    tokens = x[:, prefix:].unflatten(1, small)
    if mode == "repeat" or tokens.numel() == 0:
        tokens = tokens.repeat_interleave(2**down, dim=1)[:, :height].repeat_interleave(2**across, dim=2)[:, :, :width]
    else:
        full = small[0] * 2**down, small[1] * 2**across
        image = F.interpolate(tokens.permute(0, 3, 1, 2), full, mode="bilinear", align_corners=False)
        tokens = image[:, :, :height, :width].permute(0, 2, 3, 1)
    return torch.cat((x[:, :prefix], tokens.flatten(1, 2)), dim=1)


def _halvings(merges: int, size: int) -> int:
    """How many of the merges along an axis change anything: what has become one stays one."""
    while merges and 2 ** (merges - 1) >= size:
        merges -= 1
    return merges


def _grid(op: str, grid: Any) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"{op}: grid must be (height, width), but got {grid!r}")
    for size in grid:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{op}: grid must be two ints, but got {grid!r}")
        if size < 0:
            raise ValueError(f"{op}: grid={tuple(grid)}, but its sizes must be at least 0")
    return grid[0], grid[1]


def _option(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")


def _shape(op: str, name: str, value: Tensor, shape: tuple[int, int]) -> None:
    if value.shape[0] != shape[0] or value.shape[1] != shape[1]:
        raise ValueError(f"{op}: {name} must have shape {shape}, but got {tuple(value.shape)}")


def _weights(op: str, weights: Any, x: Tensor, tokens: int) -> None:
    if weights is None:
        return
    if isinstance(weights, Tensor):
        checks.tensor(op, "weights", weights, "B,H*W", like=x)
        return _shape(op, "weights", weights, (x.shape[0], tokens))
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise TypeError(f"{op}: weights must be None, a pair or logits (B,H*W), but got {weights!r}")
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        if isinstance(weight, Tensor):
            checks.dense(op, name, weight)
            flat = weight.reshape(-1) if weight.numel() == 1 else weight
            checks.tensor(op, name, flat, "C", like=x)
            if weight.numel() != 1 and flat.shape[0] != x.shape[2]:
                raise ValueError(f"{op}: {name} must have one element or {x.shape[2]}, but got {flat.shape[0]}")
        else:
            checks.number(op, name, weight, "a number or a tensor")
    return None


def _factor(weight: Tensor | float) -> tuple[Tensor | None, float]:
    """As a kernel takes one of a pair of weights: a tensor, or none and a number."""
    return (weight.reshape(-1), 1.0) if isinstance(weight, Tensor) else (None, float(weight))


class _MergeNeighbours(Operator):
    @staticmethod
    def forward(x, first, second, logits, sizes, weight, bias, options, norm, backend):
        return _run(x, first, second, logits, sizes, weight, bias, options, norm, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, first, second, logits, sizes, weight, bias, ctx.options, (norm, _), ctx.backend = inputs
        y, merged, normed, statistics = output
        learned = any(ctx.needs_input_grad[1:4])
        of_x = ctx.needs_input_grad[0] or learned
        of_norm = norm and (of_x or any(ctx.needs_input_grad[5:7]))
        fixed = [t for t, wanted in ((y, of_x), (normed, of_norm)) if not wanted]
        ctx.mark_non_differentiable(merged, statistics, *fixed)
        ctx.set_materialize_grads(False)
        of_norm = (y, statistics, weight, bias) if norm else ()
        ctx.save_for_backward(x if learned else None, first, second, logits, sizes, *of_norm)

    @staticmethod
    def backward(ctx, dy, dmerged, dnormed, dstatistics):
        x, first, second, logits, sizes, *of_norm = ctx.saved_tensors
        height, width, vertical, prefix, alpha, beta = options = ctx.options
        backward, learned = kernel("merge_neighbours_bwd", ctx.backend), x is not None

        def run(inputs, cotangents, constants):
            x, *weights = inputs
            return backward(*cotangents, x if learned else None, *weights, *constants, *options)

        def plain(inputs, constants):
            x, first, second, logits = inputs
            pair = (alpha if first is None else first, beta if second is None else second)
            axis = "vertical" if vertical else "horizontal"
            weights = pair if logits is None else logits
            y = reference.merge_neighbours(x, (height, width), axis, weights, prefix=prefix, sizes=constants[0])
            return (y if constants[0] is None else y[0],)

        dy, dweight, dbias = layer_norm.added(dy, dnormed, of_norm)
        x = x if learned else zeros_like_tokens(dy, prefix + height * width)
        dx, dfirst, dsecond, dlogits, *_ = gradients(
            ctx, run, plain, {0: x, 1: first, 2: second, 3: logits}, (dy,), (sizes,)
        )
        return dx, dfirst, dsecond, dlogits, None, dweight, dbias, None, None, None


def _run(x, first, second, logits, sizes, weight, bias, options, norm, backend):
    weight, bias = layer_norm.as_taken(x, backend, weight, bias)
    sizes = None if sizes is None else sizes.detach()
    return kernel("merge_neighbours_fwd", backend)(x, first, second, logits, sizes, weight, bias, *options, *norm)
