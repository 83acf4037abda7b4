"""masked_channel_attention: attention that also says how much each token got, for pruned channels and ragged tokens."""

from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, native, reference
from .autograd import Operator, gradients, needs_grad
from .backends import choose
from .schemas import kernel

#: channels of a head the kernels hold in registers
WIDEST_HEAD = 128

_sdpa = reference.keeps_dtypes(F.scaled_dot_product_attention)

SCORES = ("class", "received")

#: how many times as fast as torch's own attention ours runs a plain call on a CPU, where it is faster: measured, by
#: dtype and instruction set (benchmarks/NOTES.md)
FASTER: dict[tuple[torch.dtype, str | None], float] = {
    (torch.bfloat16, "amx"): 2.2,
    (torch.bfloat16, "avx512"): 1.4,
    (torch.float32, "avx512"): 1.1,
    (torch.float16, "avx512"): 1.1,
}


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

    Softmax and sums are fp32 (fp64 for fp64 tokens), under autocast too: autocast changes no dtype here. Deterministic;
    in bfloat16 on AMX the last bit of ``out`` may be another where gradients, scores or the log-sum-exp are asked for.
    Differentiable twice, every result in every float tensor. On a GPU a call without masks, bias and lengths that asks
    for ``out`` alone is ``torch.nn.functional.scaled_dot_product_attention``, with what that says of determinism and
    second gradients, unless a backend is forced; on a CPU too, without gradients, where that was measured to be faster.

    Source: channel masks after CAIT (Wang et al., arXiv 2309.15755), a reconstruction; class scores as in EViT (Liang
    et al., ICLR 2022) and Evo-ViT (Xu et al., AAAI 2022); ``key_bias`` as in the proportional attention of ToMe
    (Bolya et al., ICLR 2023).

    >>> q, k, v = torch.randn(2, 197, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)
    >>> out, scores = masked_channel_attention(q, k, v, scores="class")
    >>> out.shape, scores.shape
    (torch.Size([2, 6, 197, 64]), torch.Size([2, 6, 197]))
    """
    op = "masked_channel_attention"
    sizes = _sizes(op, q, k, v)
    given = _Given(qk_mask, v_mask, key_bias, key_lengths, scale, scores, heads, return_lse, return_key_mean)
    given.check(op, q, *sizes)
    return _attended(op, q, k, v, sizes, given)


def masked_channel_attention_qkv(
    qkv: Tensor,
    num_heads: int,
    *,
    head_dim: int | None = None,
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
    """:func:`masked_channel_attention` of a packed projection as it is: no views before it, one gradient behind.

    What a compiler makes the projection of stays one contiguous tensor: of three views it makes three.

    Args:
        qkv: ``(B, N, H * (2 * Dk + Dv))``: of each token all heads of q, then of k, then of v.
        num_heads: H.
        head_dim: Dk; ``None`` where heads of v are as wide.
        **others: as in :func:`masked_channel_attention`.

    Returns:
        As there.

    Raises:
        TypeError, ValueError: as there, or the channels of ``qkv`` are no such heads.

    >>> out, scores = masked_channel_attention_qkv(torch.randn(2, 197, 3 * 384), 6, scores="class", heads="mean")
    >>> out.shape, scores.shape
    (torch.Size([2, 6, 197, 64]), torch.Size([2, 197]))
    """
    op = "masked_channel_attention_qkv"
    B, N, channels = checks.tensor(op, "qkv", qkv, "B,N,C")
    for name, value in (("num_heads", num_heads), ("head_dim", head_dim)):
        whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        if not whole and (value is not None or name == "num_heads"):
            raise TypeError(f"{op}: {name} must be an int, but got {value!r}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"{op}: num_heads={num_heads} does not divide the {channels} channels of qkv")
    of_head = channels // num_heads
    if head_dim is None and of_head % 3:
        raise ValueError(
            f"{op}: qkv has {of_head} channels a head, which are not q, k and v of one width: give head_dim"
        )
    Dk = of_head // 3 if head_dim is None else head_dim
    if Dk < 1 or 2 * Dk >= of_head:
        raise ValueError(f"{op}: head_dim={Dk} leaves {of_head - 2 * Dk} of {of_head} channels a head for v")
    _widths(op, ("qkv", Dk), ("qkv", of_head - 2 * Dk))
    sizes = B, num_heads, N, N, Dk, of_head - 2 * Dk
    given = _Given(qk_mask, v_mask, key_bias, key_lengths, scale, scores, heads, return_lse, return_key_mean)
    given.check(op, qkv, *sizes, of_q="qkv", of_v="qkv")
    return _attended(op, qkv, None, None, sizes, given)


def _attended(op: str, q: Tensor, k: Any, v: Any, sizes: Any, given: "_Given") -> Any:
    """By whoever serves; q alone is the packed projection."""
    B, H, _, Nk, Dk, _ = sizes
    packed = (0, 0) if k is not None else (H, Dk)
    served = given.plain and sdpa_serves(q, k, v, sizes)
    backend = "reference" if served else choose("masked_channel_attention", q.device.type, q.dtype)
    if backend == "reference":
        apart = (q, k, v) if k is not None else reference.heads_of(q, H, Dk)
        if served:
            out = _sdpa(*apart, scale=None if given.scale is None else float(given.scale))
            return out.transpose(1, 2).contiguous().transpose(1, 2)
        checks.lengths(op, "key_lengths", given.key_lengths, Nk)
        return reference.masked_channel_attention(*apart, **given._asdict())
    scale = Dk**-0.5 if given.scale is None else given.scale
    bias = None if given.key_bias is None else given.key_bias.expand(B, H, 1, Nk).squeeze(2)
    tensors = q, k, v, given.qk_mask, given.v_mask, bias
    options = scale, given.scores or "none", given.heads == "mean", given.return_key_mean, *packed
    if backend == "native":
        checks.lengths(op, "key_lengths", given.key_lengths, Nk)
        if native.attention_isa(q.dtype) is None:
            backend = "composed"
    if needs_grad(*tensors):
        results = _MaskedChannelAttention.of(*tensors, given.key_lengths, *options, backend)
    else:
        arguments = *tensors, given.key_lengths, *options, given.return_lse
        results = kernel("masked_channel_attention_fwd", backend)(*arguments)
    asked = given.scores is not None, given.return_lse, given.return_key_mean
    return tuple(compress(results, (True, *asked))) if any(asked) else results[0]


def sdpa_serves(q: Tensor, k: Any, v: Any, sizes: Any) -> bool:
    """Whether torch's own attention runs a call that asks for nothing else: where ours is not known to be faster.

    On a CPU without gradients alone, as its own cannot be differentiated again.
    """
    Dk, Dv = sizes[4:]
    if Dk != Dv or 0 in sizes or backends.forced() is not None or faster(q):
        return False
    return q.device.type != "cpu" or not needs_grad(q, k, v)


def faster(x: Tensor) -> float:
    """How many times as fast as torch's own attention ours runs tokens as these, in a plain call; 0 where it is not
    known to be faster, or a backend is forced."""
    if x.device.type != "cpu" or backends.forced() is not None:
        return 0.0
    return FASTER.get((x.dtype, native.attention_isa(x.dtype)), 0.0)


class _Given(NamedTuple):
    """All but the tokens."""

    qk_mask: Tensor | None
    v_mask: Tensor | None
    key_bias: Tensor | None
    key_lengths: Tensor | None
    scale: Any
    scores: str | None
    heads: str
    return_lse: bool
    return_key_mean: bool

    @property
    def plain(self) -> bool:
        """Whether nothing but the result is asked for, of q, k and v alone."""
        masked = self.qk_mask is not None or self.v_mask is not None or self.key_bias is not None
        return not (masked or self.key_lengths is not None or self.scores or self.return_lse or self.return_key_mean)

    def check(
        self, op: str, q: Tensor, B: int, H: int, Nq: int, Nk: int, Dk: int, Dv: int, of_q: str = "q", of_v: str = "v"
    ) -> None:
        for name, mask, other, channels in (("qk_mask", self.qk_mask, of_q, Dk), ("v_mask", self.v_mask, of_v, Dv)):
            if mask is not None:
                sizes = checks.tensor(op, name, mask, "H,D", like=q)
                checks.same(op, "heads", name, sizes[0], other, H)
                checks.same(op, "channels", name, sizes[1], other, channels)
        if self.key_bias is not None:
            sizes, full = checks.tensor(op, "key_bias", self.key_bias, "B,1|H,1,Nk", like=q), (B, H, 1, Nk)
            if any(got not in (1, size) for got, size in zip(sizes, full)) or sizes[3] != Nk:
                raise ValueError(
                    f"{op}: key_bias must have shape ({full[0]} or 1, {full[1]} or 1, 1, {full[3]}), but got"
                    f" {tuple(sizes)}"
                )
        if self.key_lengths is not None:
            (images,) = checks.tensor(op, "key_lengths", self.key_lengths, "B", like=q, floating=False)
            if self.key_lengths.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{op}: key_lengths must be int64 or int32, but got {self.key_lengths.dtype}")
            checks.same(op, "images", "key_lengths", images, of_q, B)
        if self.scale is not None:
            checks.number(op, "scale", self.scale, "a number or None")
        if self.scores is not None and self.scores not in SCORES:
            raise ValueError(f"{op}: scores={self.scores!r}, but it must be None, 'class' or 'received'")
        checks.flag(op, "return_lse", self.return_lse)
        checks.flag(op, "return_key_mean", self.return_key_mean)
        if self.heads not in ("each", "mean"):
            raise ValueError(f"{op}: heads={self.heads!r}, but it must be 'each' or 'mean'")
        if self.scores is not None and Nq == 0:
            raise ValueError(f"{op}: scores={self.scores!r} needs a query, but {of_q} has none")


def _sizes(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int]:
    """B, H, Nq, Nk, Dk, Dv, checked."""
    B, H, Nq, Dk = checks.tensor(op, "q", q, "B,H,Nq,Dk")
    of_k = checks.tensor(op, "k", k, "B,H,Nk,Dk", like=q)
    of_v = checks.tensor(op, "v", v, "B,H,Nk,Dv", like=q)
    if H == 0:
        raise ValueError(f"{op}: q has no heads")
    for name, value, sizes in (("k", k, of_k), ("v", v, of_v)):
        if value.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, but got {value.dtype}")
        checks.same(op, "images", name, sizes[0], "q", B)
        checks.same(op, "heads", name, sizes[1], "q", H)
    checks.same(op, "channels", "k", of_k[3], "q", Dk)
    checks.same(op, "keys", "v", of_v[2], "k", of_k[2])
    _widths(op, ("q", Dk), ("v", of_v[3]))
    return B, H, Nq, of_k[2], Dk, of_v[3]


def _widths(op: str, *widths: tuple[str, int]) -> None:
    for name, channels in widths:
        if not 1 <= channels <= WIDEST_HEAD:
            raise ValueError(f"{op}: {name} has heads of {channels} channels, but 1 to {WIDEST_HEAD} are possible")


class _MaskedChannelAttention(Operator):
    @staticmethod
    def forward(q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads, channels, backend):
        return kernel("masked_channel_attention_fwd", backend)(
            q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads, channels
        )

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        *tensors, ctx.scale, ctx.scores, ctx.mean, ctx.key_mean, heads, channels, ctx.backend = inputs
        ctx.packed = heads, channels
        out, _, lse, _ = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)

    @staticmethod
    def backward(ctx, dout, dscores, dlse, dkey_mean):
        *tensors, out, lse = ctx.saved_tensors
        scale, scores, mean, packed = ctx.scale, ctx.scores, ctx.mean, ctx.packed
        backward = kernel("masked_channel_attention_bwd", ctx.backend)
        # torch.compile makes gradients for what was not asked for
        dscores, dkey_mean = dscores if scores != "none" else None, dkey_mean if ctx.key_mean else None

        def run(inputs, cotangents, constants):
            (dout, dscores, dlse, dkey_mean), (lengths, out, lse) = cotangents, constants
            found = [None] * len(inputs)
            if dout is not None or dscores is not None or dlse is not None:
                dout = torch.zeros_like(out) if dout is None else dout
                found = list(backward(dout, dscores, dlse, *inputs, lengths, out, lse, scale, scores, mean, *packed))
            if dkey_mean is not None and inputs[1] is None:
                found[0] = _with_key_mean(found[0], dkey_mean, inputs[0], lengths, *packed)
            elif dkey_mean is not None:
                found[1] = _with_key_mean(found[1], dkey_mean, inputs[1], lengths)
            found = [None if t is None else g for t, g in zip(inputs, found)]
            return [torch.zeros_like(t) if t is not None and g is None else g for t, g in zip(inputs, found)]

        def plain(inputs, constants):
            q, k, v, qk_mask, v_mask, bias = inputs
            q, k, v = (q, k, v) if k is not None else reference.heads_of(q, *packed)
            made = reference.masked_channel_attention(
                q, k, v, qk_mask=qk_mask, v_mask=v_mask, key_bias=None if bias is None else bias.unsqueeze(2),
                key_lengths=constants[0], scale=scale, scores=None if scores == "none" else scores,
                heads="mean" if mean else "each", return_lse=True, return_key_mean=True,
            )  # fmt: skip
            return made if scores != "none" else (made[0], None, *made[1:])

        inputs, constants = dict(enumerate(tensors[:6])), (tensors[6], out, lse)
        return tuple(gradients(ctx, run, plain, inputs, (dout, dscores, dlse, dkey_mean), constants))


def _with_key_mean(dk, dkey_mean, k, lengths, heads=0, channels=0):
    """The gradient of the keys with that of their mean over the heads, which knows nothing beyond a length.

    With a number of heads, which have so many channels, the keys are the second part of a packed projection.
    """
    mean = dkey_mean / (heads or k.shape[1])
    if lengths is not None:
        beyond = torch.arange(mean.shape[1], device=k.device) >= lengths.unsqueeze(1)
        mean = mean.masked_fill(beyond.unsqueeze(2), 0.0)
    if heads:
        wide = heads * channels
        mean = F.pad(mean.repeat(1, 1, heads), (wide, k.shape[2] - 2 * wide))
    else:
        mean = mean.unsqueeze(1).expand_as(k)
    return mean if dk is None else dk + mean
