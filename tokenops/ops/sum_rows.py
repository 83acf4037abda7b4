"""sum_rows: the rows of packed sequences summed up where they go, by which these are selected and merged.

A row goes to at most one place, so that the gradient, and the way back, is a gather. Nothing is looked at: not on a
CPU either, since who plans where rows go has looked.
"""

from typing import Any

import torch
from torch import Tensor

from . import layer_norm, reference_packed
from .autograd import Operator, gradients, needs_grad
from .backends import choose
from .schemas import kernel


def sum_rows(
    x: Tensor,
    dest: Tensor,
    rows: int,
    *,
    weight: Tensor | None = None,
    mean: bool = False,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    most: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Sum up the rows that go to the same place.

    .. math:: y_m = \sum_{n:\, d_n = m} w_n x_n \; \Bigl(\big/ \textstyle\sum_{n:\, d_n = m} w_n\Bigr)

    Args:
        x: ``(T, C)``; fp16, bf16, fp32 or fp64, any strides.
        dest: ``(T,)`` int64: which row of the result each goes to; outside 0 to M - 1 it goes nowhere and is not read.
        rows: M.
        weight: ``(T,)`` in the accumulation dtype (fp32, fp64 for fp64 rows); None: 1.
        mean: whether a sum is divided by that of its weights; one of exactly 0 divides by 1.
        norm: ``(weight, bias, eps)``: the layer norm of the result over C is returned as well.
        order: what `sorted_rows` gives, where it is known without sorting.
        most: no more rows than that go to one place, where that is known.

    Returns:
        ``(M, C)``, zeros where nothing goes; the sums of the weights ``(M,)``, not differentiated; the norm or None.

    Deterministic: rows are added in their order. Differentiable twice in x, weight and the norm's weight and bias.
    """
    backend = choose("sum_rows", x.device.type, x.dtype)
    if backend == "reference":
        y, totals, normed = reference_packed.sum_rows(x, dest, rows, weight=weight, mean=mean, norm=norm)
        return y, totals.detach(), normed
    factor, bias, eps = (None, None, 0.0) if norm is None else norm
    places = sorted_rows(dest, rows) if order is None else order
    options = rows, x.shape[0] if most is None else most, mean, norm is not None, eps
    run = _SumRows.of if needs_grad(x, weight, factor, bias) else _run
    y, totals, normed, _ = run(x, weight, factor, bias, dest, *places, options, backend)
    return y, totals, None if norm is None else normed


def gather_rows(y: Tensor, dest: Tensor) -> Any:
    """Every row gets the one it goes to: ``(M, C)`` and ``(T,)`` to ``(T, C)``, 0 for those that go nowhere."""
    backend = choose("sum_rows", y.device.type, y.dtype)
    if backend == "reference":
        return reference_packed.gather_rows(y, dest)
    return _gathered(y, dest, backend)


def sorted_rows(dest: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows by where they go ``(T,)``, in their order within one place; where each place begins in it ``(M+1,)``."""
    places = torch.where((dest >= 0) & (dest < rows), dest, rows)
    ordered, order = places.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows + 1, device=dest.device))


class _SumRows(Operator):
    @staticmethod
    def forward(x, weight, factor, bias, dest, order, offsets, options, backend):
        return _run(x, weight, factor, bias, dest, order, offsets, options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, factor, bias, dest, order, offsets, ctx.options, ctx.backend = inputs
        y, totals, normed, statistics = output
        _, _, mean, norm, _ = ctx.options
        of_x, of_weight, *of_norm = ctx.needs_input_grad[:4]
        of_x = of_x or of_weight
        of_norm = norm and (of_x or any(of_norm))
        fixed = [t for t, wanted in ((y, of_x), (normed, of_norm)) if not wanted]
        ctx.mark_non_differentiable(totals, statistics, *fixed)
        ctx.set_materialize_grads(False)
        ctx.rows = x.shape[0]
        ctx.save_for_backward(
            dest, order, offsets, weight, totals if mean else None, x if of_weight else None,
            *((y, statistics, factor, bias) if norm else ()),
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dy, dtotals, dnormed, dstatistics):
        dest, order, offsets, weight, totals, x, *of_norm = ctx.saved_tensors
        (rows, most, mean, _, _), backend, count = ctx.options, ctx.backend, ctx.rows
        of_weight = x is not None

        def run(inputs, cotangents, constants):
            (x, weight), (dy,), (dest, order, offsets, totals) = inputs, cotangents, constants
            dx, dots = kernel("sum_rows_bwd", backend)(dy, dest, weight, totals, x if of_weight else None)
            if of_weight and mean:  # what the others of a mean lose
                options = rows, most, True, False, 0.0
                means, *_ = _run(dots.unsqueeze(1), weight, None, None, dest, order, offsets, options, backend)
                means = means.masked_fill((totals == 0).unsqueeze(1), 0.0)
                dots = dots - kernel("sum_rows_bwd", backend)(means, dest, None, None, None)[0].squeeze(1)
            return dx, dots if of_weight else None

        def plain(inputs, constants):
            return (reference_packed.sum_rows(inputs[0], constants[0], rows, weight=inputs[1], mean=mean)[0],)

        dy, dfactor, dbias = layer_norm.added(dy, dnormed, of_norm)
        if dy is not None and x is None:  # linear in it: what it is is no matter
            x = dy.new_zeros(()).expand(count, dy.shape[1])
        found = gradients(ctx, run, plain, {0: x, 1: weight}, (dy,), (dest, order, offsets, totals))
        found[2:4] = dfactor, dbias
        return tuple(found)


def _run(x, weight, factor, bias, dest, order, offsets, options, backend):
    rows, most, mean, norm, eps = options
    factor, bias = layer_norm.as_taken(x, backend, factor, bias)
    weight = None if weight is None else weight.contiguous()
    return kernel("sum_rows_fwd", backend)(
        x,
        dest.contiguous(),
        rows,
        weight,
        order.contiguous(),
        offsets.contiguous(),
        most,
        factor,
        bias,
        mean,
        norm,
        eps,
    )


def _gathered(y, dest, backend):
    if needs_grad(y):
        return _GatherRows.of(y, dest, backend)
    return kernel("sum_rows_bwd", backend)(y, dest.contiguous(), None, None, None)[0]


class _GatherRows(Operator):
    @staticmethod
    def forward(y, dest, backend):
        return kernel("sum_rows_bwd", backend)(y, dest.contiguous(), None, None, None)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, dest, ctx.backend = inputs
        ctx.rows = y.shape[0]
        ctx.save_for_backward(dest)

    @staticmethod
    def backward(ctx, dx):
        (dest,) = ctx.saved_tensors
        return _summed(dx, dest, ctx.rows, ctx.backend), None, None


def _summed(x, dest, rows, backend):
    arguments = x, None, None, None, dest, *sorted_rows(dest, rows), (rows, x.shape[0], False, False, 0.0), backend
    return (_SumRows.of if needs_grad(x) else _run)(*arguments)[0]
