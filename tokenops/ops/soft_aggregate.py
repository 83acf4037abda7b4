"""soft_aggregate: N tokens become M learned mixtures of them (SiT's token slimming module, TSM)."""

import torch
from torch import Tensor

from . import checks, packed, reference
from .autograd import Operator, apart, gradients, needs_grad
from .backends import choose
from .schemas import kernel


def soft_aggregate(
    x: Tensor, w: Tensor, *, scale: Tensor | float | None = None, mask: Tensor | None = None, prefix: int = 0,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    r"""Aggregate tokens softly: each slim token is a softmax-weighted mean of all tokens.

    .. math:: A = \mathrm{softmax}_N(s \cdot w), \qquad y = [\,x_{:P},\; A^\top x_{P:}\,]

    One fused launch: softmax over the tokens, the weighted sums, and the copy of the prefix tokens (class,
    distillation) in front of them, so that no slice, transpose or ``cat`` is left around it.

    Packed sequences (``x`` ``(T, C)``, ``w`` ``(T, M)``, ``mask`` ``(T,)``) give as many slim tokens each, whatever
    their lengths: the result is dense. The first P rows of a sequence are its prefix (zeros stand for those that a
    shorter one lacks), whose rows of ``w`` and ``mask`` are not read, nor are rows behind the last sequence.

    Args:
        x: tokens ``(B, P+N, C)``, fp16, bf16, fp32 or fp64, any strides. The result has its dtype.
        w: logits ``(B, N, M)``, any of those dtypes, any strides. ``-inf`` leaves a token out of one slot.
        scale: what the logits are multiplied with: a number, or a one-element tensor, which gets a gradient.
            ``None`` is 1.
        mask: ``(B, N)`` bool, True where a token counts. The others have no weight and are not read.
        prefix: P, how many leading tokens of ``x`` are copied through unchanged.
        cu_seqlens: int32 ``(S+1,)``, where packed sequences begin, and the end of the last.
        max_seqlen: no sequence has more rows. Nothing about lengths reaches the host on a GPU.

    Returns:
        ``(B, P+M, C)``, of packed sequences ``(S, P+M, C)``, in ``x.dtype``, contiguous. A slot without any token that
        counts is zero, with zero gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    Statistics and sums are fp32 (fp64 for fp64 logits, respectively tokens), under autocast too: autocast changes no
    dtype here, ``x``'s decides. Deterministic. Differentiable twice in ``x``, ``w`` and ``scale``.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.2, token slimming module.

    >>> x, w = torch.randn(2, 197, 64), torch.randn(2, 196, 98)
    >>> soft_aggregate(x, w, prefix=1).shape
    torch.Size([2, 99, 64])
    >>> ends = torch.tensor([0, 197, 240], dtype=torch.int32)
    >>> soft_aggregate(x.flatten(0, 1), torch.randn(394, 98), prefix=1, cu_seqlens=ends, max_seqlen=256).shape
    torch.Size([2, 99, 64])
    """
    op = "soft_aggregate"
    packed.not_with_boundaries(op, cu_seqlens, max_seqlen)
    if cu_seqlens is None:
        _check(op, x, w, scale, mask, prefix)
    else:
        _check_packed(op, x, w, scale, mask, prefix, cu_seqlens, max_seqlen)
    return _apply(op, x, w, scale, mask, prefix, cu_seqlens, max_seqlen)


def _check_packed(op, x, w, scale, mask, prefix, cu_seqlens, max_seqlen):
    T, _ = checks.tensor(op, "x", x, "T,C")
    rows, _ = checks.tensor(op, "w", w, "T,M", like=x)
    packed.boundaries(op, cu_seqlens, max_seqlen, T, like=x, tokens="x")
    checks.prefix(op, "prefix", prefix, None)
    checks.same(op, "rows", "w", rows, "x", T)
    if mask is not None:
        (rows,) = checks.tensor(op, "mask", mask, "T", like=x, floating=False)
        _check_mask_dtype(op, mask)
        checks.same(op, "rows", "mask", rows, "x", T)
    _check_scale(op, scale, x)


def _check(op, x, w, scale, mask, prefix):
    B, rows, _ = checks.tensor(op, "x", x, "B,P+N,C")
    images, N, _ = checks.tensor(op, "w", w, "B,N,M", like=x)
    checks.prefix(op, "prefix", prefix, rows)
    checks.same(op, "images", "w", images, "x", B)
    checks.same(op, "tokens", "w", N, f"x after a prefix of {prefix}", rows - prefix)
    if mask is not None:
        images, tokens = checks.tensor(op, "mask", mask, "B,N", like=x, floating=False)
        _check_mask_dtype(op, mask)
        checks.same(op, "images", "mask", images, "x", B)
        checks.same(op, "tokens", "mask", tokens, "w", N)
    _check_scale(op, scale, x)


def _check_mask_dtype(op, mask):
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, but got {mask.dtype}")


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


def _apply(op, x, w, scale, mask, prefix, cu_seqlens=None, max_seqlen=None):
    backend = choose(op, x.device.type, torch.promote_types(x.dtype, w.dtype))
    if backend == "reference":
        options = {"scale": scale, "mask": mask, "prefix": prefix}
        return reference.soft_aggregate(x, w, **options, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    if isinstance(scale, Tensor):
        learned, factor = scale, 1.0
    else:
        learned, factor = None, 1.0 if scale is None else float(scale)
    if cu_seqlens is not None:  # packed rows are one image to the kernels
        x, w, mask = (None if t is None else t.unsqueeze(0) for t in (x, w, mask))
    ends = () if cu_seqlens is None else (cu_seqlens, max_seqlen)
    if needs_grad(x, w, learned):
        return _SoftAggregate.of(x, w, learned, factor, mask, prefix, backend, *ends)[0]
    learned = None if learned is None else apart(learned)
    return kernel("soft_aggregate_fwd", backend)(apart(x), apart(w), learned, factor, mask, prefix, *ends)[0]


class _SoftAggregate(Operator):
    @staticmethod
    def forward(x, w, scale, factor, mask, prefix, backend, *ends):
        return kernel("soft_aggregate_fwd", backend)(x, w, scale, factor, mask, prefix, *ends)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, scale, ctx.factor, mask, ctx.prefix, ctx.backend, *ends = inputs
        y, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        cu_seqlens, ctx.max_seqlen = ends or (None, None)
        # the CPU path has no use for the result
        ctx.save_for_backward(x, w, scale, mask, None if ctx.backend == "native" else y, saved, cu_seqlens)

    @staticmethod
    def backward(ctx, dy, _):
        x, w, scale, *constants = ctx.saved_tensors
        factor, prefix, longest = ctx.factor, ctx.prefix, ctx.max_seqlen
        backward = kernel("soft_aggregate_bwd", ctx.backend)

        def run(inputs, cotangents, constants):
            (x, w, scale), (mask, y, saved, cu_seqlens) = inputs, constants
            ends = () if cu_seqlens is None else (cu_seqlens, longest)
            dx, dw, dscale = backward(*cotangents, x, w, scale, factor, mask, y, saved, prefix, *ends)
            return dx, dw, None if scale is None else dscale.reshape(scale.shape).to(scale.dtype)

        def plain(inputs, constants):
            (x, w, scale), (mask, _, _, cu_seqlens) = inputs, constants
            scale = factor if scale is None else scale
            if cu_seqlens is not None:
                x, w, mask = (None if t is None else t.squeeze(0) for t in (x, w, mask))
            options = {"scale": scale, "mask": mask, "prefix": prefix}
            return (reference.soft_aggregate(x, w, **options, cu_seqlens=cu_seqlens, max_seqlen=longest),)

        return tuple(gradients(ctx, run, plain, {0: x, 1: w, 2: scale}, (dy,), constants))
