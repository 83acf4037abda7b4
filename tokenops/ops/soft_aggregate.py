"""soft_aggregate: N tokens become M learned mixtures of them (SiT's token slimming module, TSM)."""

import torch
from torch import Tensor

from . import checks, reference
from .autograd import Operator, apart, gradients, needs_grad
from .backends import choose
from .schemas import kernel


def soft_aggregate(
    x: Tensor, w: Tensor, *, scale: Tensor | float | None = None, mask: Tensor | None = None, prefix: int = 0
) -> Tensor:
    r"""Aggregate tokens softly: each slim token is a softmax-weighted mean of all tokens.

    .. math:: A = \mathrm{softmax}_N(s \cdot w), \qquad y = [\,x_{:P},\; A^\top x_{P:}\,]

    One fused launch: softmax over the tokens, the weighted sums, and the copy of the prefix tokens (class,
    distillation) in front of them, so that no slice, transpose or ``cat`` is left around it.

    Args:
        x: tokens ``(B, P+N, C)``, fp16, bf16, fp32 or fp64, any strides. The result has its dtype.
        w: logits ``(B, N, M)``, any of those dtypes, any strides. ``-inf`` leaves a token out of one slot.
        scale: what the logits are multiplied with: a number, or a one-element tensor, which gets a gradient.
            ``None`` is 1.
        mask: ``(B, N)`` bool, True where a token counts. The others have no weight and are not read.
        prefix: P, how many leading tokens of ``x`` are copied through unchanged.

    Returns:
        ``(B, P+M, C)`` in ``x.dtype``, contiguous. A slot without any token that counts is zero, with zero gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    Statistics and sums are fp32 (fp64 for fp64 logits, respectively tokens), under autocast too: autocast changes no
    dtype here, ``x``'s decides. Deterministic. Differentiable twice in ``x``, ``w`` and ``scale``.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.2, token slimming module.

    >>> x, w = torch.randn(2, 197, 64), torch.randn(2, 196, 98)
    >>> soft_aggregate(x, w, prefix=1).shape
    torch.Size([2, 99, 64])
    """
    _check("soft_aggregate", x, w, scale, mask, prefix)
    return _apply("soft_aggregate", x, w, scale, mask, prefix)


def _check(op, x, w, scale, mask, prefix):
    B, rows, _ = checks.tensor(op, "x", x, "B,P+N,C")
    images, N, _ = checks.tensor(op, "w", w, "B,N,M", like=x)
    checks.prefix(op, "prefix", prefix, rows)
    checks.same(op, "images", "w", images, "x", B)
    checks.same(op, "tokens", "w", N, f"x after a prefix of {prefix}", rows - prefix)
    if mask is not None:
        images, tokens = checks.tensor(op, "mask", mask, "B,N", like=x, floating=False)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, but got {mask.dtype}")
        checks.same(op, "images", "mask", images, "x", B)
        checks.same(op, "tokens", "mask", tokens, "w", N)
    _check_scale(op, scale, x)


def _check_scale(op, scale, x):
    if isinstance(scale, Tensor):
        checks.dense(op, "scale", scale)
        if scale.numel() != 1:
            raise ValueError(f"{op}: scale must have one element, but got shape {tuple(scale.shape)}")
        if not scale.is_floating_point():
            raise TypeError(f"{op}: scale must be a float tensor or a number, but got {scale.dtype}")
        if scale.device != x.device:
            raise ValueError(f"{op}: scale is on {scale.device}, but x is on {x.device}")
    elif scale is not None:
        checks.number(op, "scale", scale, "a number, a one-element tensor or None")


def _apply(op, x, w, scale, mask, prefix):
    backend = choose(op, x.device.type, torch.promote_types(x.dtype, w.dtype))
    if backend == "reference":
        return reference.soft_aggregate(x, w, scale=scale, mask=mask, prefix=prefix)
    if isinstance(scale, Tensor):
        learned, factor = scale, 1.0
    else:
        learned, factor = None, 1.0 if scale is None else float(scale)
    if needs_grad(x, w, learned):
        return _SoftAggregate.of(x, w, learned, factor, mask, prefix, backend)[0]
    learned = None if learned is None else apart(learned)
    return kernel("soft_aggregate_fwd", backend)(apart(x), apart(w), learned, factor, mask, prefix)[0]


class _SoftAggregate(Operator):
    @staticmethod
    def forward(x, w, scale, factor, mask, prefix, backend):
        return kernel("soft_aggregate_fwd", backend)(x, w, scale, factor, mask, prefix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, scale, ctx.factor, mask, ctx.prefix, ctx.backend = inputs
        y, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        # the CPU path has no use for the result
        ctx.save_for_backward(x, w, scale, mask, None if ctx.backend == "native" else y, saved)

    @staticmethod
    def backward(ctx, dy, _):
        x, w, scale, mask, y, saved = ctx.saved_tensors
        factor, prefix, backward = ctx.factor, ctx.prefix, kernel("soft_aggregate_bwd", ctx.backend)

        def run(inputs, cotangents, constants):
            (x, w, scale), (mask, y, saved) = inputs, constants
            dx, dw, dscale = backward(*cotangents, x, w, scale, factor, mask, y, saved, prefix)
            return dx, dw, None if scale is None else dscale.reshape(scale.shape).to(scale.dtype)

        def plain(inputs, constants):
            x, w, scale = inputs
            scale = factor if scale is None else scale
            return (reference.soft_aggregate(x, w, scale=scale, mask=constants[0], prefix=prefix),)

        return tuple(gradients(ctx, run, plain, {0: x, 1: w, 2: scale}, (dy,), (mask, y, saved)))
