"""masked_channel_attention: attention that also says how much each token got, for pruned channels and ragged tokens."""

from typing import Any

import torch
from torch import Tensor

from . import _checks, reference
from ._backends import choose
from ._schemas import kernel, needs_grad

#: channels of a head the kernels hold in registers
WIDEST_HEAD = 128

SCORES = ("class", "received")


def masked_channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk_mask: Tensor | None = None,
    v_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    scores: str | None = None,
    heads: str = "each",
    return_lse: bool = False,
    return_key_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""Attention for token and channel pruning: scores without the matrix, uneven head dims, key bias, ragged batches.

    .. math:: S_{ij} = s \sum_c m^{qk}_c\, q_{ic} k_{jc} + b_j, \qquad P = \mathrm{softmax}_j(S), \qquad
        O_{ic} = m^v_c \sum_j P_{ij} v_{jc}

    The (Nq, Nk) matrix is never written: not for the scores, not for any gradient. ``q``, ``k`` and ``v`` may be views
    of one packed projection, ``qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)``; the result lies in
    memory as (B, Nq, H, Dv), so ``out.transpose(1, 2).flatten(2)`` is a view.

    Args:
        q: queries ``(B, H, Nq, Dk)``, fp16, bf16, fp32 or fp64, any strides.
        k: keys ``(B, H, Nk, Dk)`` in ``q``'s dtype, any strides. ``Dk`` from 1 to 128.
        v: values ``(B, H, Nk, Dv)`` in ``q``'s dtype, any strides. ``Dv`` from 1 to 128; it need not be ``Dk``.
        qk_mask: ``(H, Dk)``, any float dtype: soft mask of the channels of q and k. ``None`` is all ones.
        v_mask: ``(H, Dv)``, any float dtype: soft mask of the channels of v.
        key_bias: ``(B or 1, H or 1, 1, Nk)``, any float dtype, added to the logits: ToMe's log sizes, say. A key
            with ``-inf`` has no weight, whatever its ``k``.
        key_lengths: ``(B,)`` integers from 0 to Nk: only so many keys of an image count, the others are not read. On
            a GPU, where checking would synchronise, fewer than 0 count as 0 and more than Nk as Nk.
        scale: s; ``None`` is ``Dk ** -0.5``. Pruned channels keep the scale of the unpruned head.
        scores: ``"class"`` returns the probabilities of query 0, ``"received"`` each key's mean over the queries.
        heads: ``"each"`` gives scores ``(B, H, Nk)``, ``"mean"`` their mean over the heads, ``(B, Nk)``.
        return_lse: also return the log-sum-exp of each row of S, ``(B, H, Nq)``.
        return_key_mean: also return the mean of ``k`` over the heads, ``(B, Nk, Dk)`` (ToMe's similarity features).

    Returns:
        ``out (B, H, Nq, Dv)`` in ``q.dtype``; behind it in this order, as asked for: scores and log-sum-exp, fp32 (fp64
        for fp64 tokens), and the mean key in ``q.dtype``. A query without any key that counts gives zeros, with zero
        gradients, and a log-sum-exp of ``-inf``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, a head is wider than 128, ``scores`` or ``heads`` has another
            value, scores are asked for without a query, or (on a CPU) a length is outside of 0..Nk.

    Softmax and sums are fp32 (fp64 for fp64 tokens), under autocast too: autocast changes no dtype here. Deterministic.
    Differentiable once, every result in every float tensor.

    Source: channel masks after CAIT (Wang et al., arXiv 2309.15755), a reconstruction; class scores as in EViT (Liang
    et al., ICLR 2022) and Evo-ViT (Xu et al., AAAI 2022); ``key_bias`` as in the proportional attention of ToMe
    (Bolya et al., ICLR 2023).

    >>> q, k, v = torch.randn(2, 197, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)
    >>> out, scores = masked_channel_attention(q, k, v, scores="class")
    >>> out.shape, scores.shape
    (torch.Size([2, 6, 197, 64]), torch.Size([2, 6, 197]))
    """
    op = "masked_channel_attention"
    _check(op, q, k, v, qk_mask, v_mask, key_bias, key_lengths, scale, scores, heads)
    backend = choose(op, q.device.type, q.dtype)
    if backend == "reference":
        return reference.masked_channel_attention(
            q,
            k,
            v,
            qk_mask=qk_mask,
            v_mask=v_mask,
            key_bias=key_bias,
            key_lengths=key_lengths,
            scale=scale,
            scores=scores,
            heads=heads,
            return_lse=return_lse,
            return_key_mean=return_key_mean,
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    bias = None if key_bias is None else key_bias.expand(k.shape[0], k.shape[1], 1, k.shape[2]).squeeze(2)
    arguments = (q, k, v, qk_mask, v_mask, bias, key_lengths, scale, scores or "none", heads == "mean", return_key_mean)
    if needs_grad(q, k, v, qk_mask, v_mask, bias):
        results = _MaskedChannelAttention.apply(*arguments, backend)
    else:
        results = kernel("masked_channel_attention_fwd", backend)(*arguments)
    if scores is None and not return_lse and not return_key_mean:
        return results[0]
    asked = (True, scores is not None, return_lse, return_key_mean)
    return tuple(result for result, wanted in zip(results, asked) if wanted)


def _check(op, q, k, v, qk_mask, v_mask, key_bias, key_lengths, scale, scores, heads):
    _checks.tensor(op, "q", q, "B,H,Nq,Dk")
    _checks.tensor(op, "k", k, "B,H,Nk,Dk", like=q)
    _checks.tensor(op, "v", v, "B,H,Nk,Dv", like=q)
    if q.shape[1] == 0:
        raise ValueError(f"{op}: q has no heads")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, but got {value.dtype}")
        _checks.same(op, "images", name, value.shape[0], "q", q.shape[0])
        _checks.same(op, "heads", name, value.shape[1], "q", q.shape[1])
    _checks.same(op, "channels", "k", k.shape[3], "q", q.shape[3])
    _checks.same(op, "keys", "v", v.shape[2], "k", k.shape[2])
    for name, value in (("q", q), ("v", v)):
        if not 1 <= value.shape[3] <= WIDEST_HEAD:
            raise ValueError(
                f"{op}: {name} has heads of {value.shape[3]} channels, but 1 to {WIDEST_HEAD} are possible"
            )
    for name, mask, other, like in (("qk_mask", qk_mask, "q", q), ("v_mask", v_mask, "v", v)):
        if mask is not None:
            _checks.tensor(op, name, mask, "H,D", like=q)
            _checks.same(op, "heads", name, mask.shape[0], other, like.shape[1])
            _checks.same(op, "channels", name, mask.shape[1], other, like.shape[3])
    if key_bias is not None:
        _checks.tensor(op, "key_bias", key_bias, "B,1|H,1,Nk", like=q)
        full = (q.shape[0], q.shape[1], 1, k.shape[2])
        if any(got not in (1, size) for got, size in zip(key_bias.shape, full)) or key_bias.shape[3] != k.shape[2]:
            raise ValueError(
                f"{op}: key_bias must have shape ({full[0]} or 1, {full[1]} or 1, 1, {full[3]}), but got"
                f" {tuple(key_bias.shape)}"
            )
    if key_lengths is not None:
        _checks.tensor(op, "key_lengths", key_lengths, "B", like=q, floating=False)
        if key_lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: key_lengths must be int64 or int32, but got {key_lengths.dtype}")
        _checks.same(op, "images", "key_lengths", key_lengths.shape[0], "q", q.shape[0])
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"{op}: scale must be a number or None, but got {scale!r}")
    if scores is not None and scores not in SCORES:
        raise ValueError(f"{op}: scores={scores!r}, but it must be None, 'class' or 'received'")
    if heads not in ("each", "mean"):
        raise ValueError(f"{op}: heads={heads!r}, but it must be 'each' or 'mean'")
    if scores is not None and q.shape[2] == 0:
        raise ValueError(f"{op}: scores={scores!r} needs a query, but q has none")


class _MaskedChannelAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, backend):
        return kernel("masked_channel_attention_fwd", backend)(
            q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean
        )

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        *tensors, ctx.scale, ctx.scores, ctx.mean, ctx.key_mean, ctx.backend = inputs
        out, _, lse, _ = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dscores, dlse, dkey_mean):
        *tensors, out, lse = ctx.saved_tensors
        q, k, v, qk_mask, v_mask, bias, lengths = tensors
        dq = dk = dv = dqk_mask = dv_mask = dbias = None
        dscores = dscores if ctx.scores != "none" else None  # torch.compile makes gradients for what was not asked for
        if dout is not None or dscores is not None or dlse is not None:
            dout = torch.zeros_like(out) if dout is None else dout
            backward = kernel("masked_channel_attention_bwd", ctx.backend)
            dq, dk, dv, dqk_mask, dv_mask, dbias = backward(
                dout, dscores, dlse, *tensors, out, lse, ctx.scale, ctx.scores, ctx.mean
            )
        if dkey_mean is not None and ctx.key_mean:
            mean = (dkey_mean / k.shape[1]).unsqueeze(1)
            if lengths is not None:
                beyond = torch.arange(k.shape[2], device=k.device) >= lengths.unsqueeze(1)
                mean = mean.masked_fill(beyond[:, None, :, None], 0.0)
            dk = mean.expand_as(k) if dk is None else dk + mean
        gradients = (
            gradient if tensor is not None and wanted else None
            for gradient, tensor, wanted in zip(
                (dq, dk, dv, dqk_mask, dv_mask, dbias), (q, k, v, qk_mask, v_mask, bias), ctx.needs_input_grad
            )
        )
        return *gradients, *[None] * 6
