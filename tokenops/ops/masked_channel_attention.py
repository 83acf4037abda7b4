"""masked_channel_attention: attention that also says how much each token got, for pruned channels and ragged tokens."""

import functools
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, native, packed, reference, reference_packed
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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
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
        cu_seqlens: ``(S+1,)`` int32, where each of S packed sequences begins and the last ends, on the tokens' device:
            every sequence attends to itself. Tokens are then ``(T, H, D)``, ``key_bias`` is ``(T,)`` or ``(H, T)``,
            without ``key_lengths``, and the results are ``(T, H, Dv)``, scores ``(H, T)`` or ``(T,)``, log-sum-exp
            ``(H, T)`` and mean key ``(T, Dk)``. "class" is a sequence's first query, "received" the mean over its own
            queries, so that a sequence's scores sum to 1 (to 0 without a query). Rows behind the last sequence are not
            read; their results and gradients are 0. Windows are boundaries, too.
        max_seqlen: no sequence has more rows; where it is larger than that nothing but speed may depend on it.
        cu_seqlens_k: the same of keys and values that are other rows, as many sequences; None: ``cu_seqlens``.
        max_seqlen_k: of ``cu_seqlens_k``.

    Returns:
        ``out (B, H, Nq, Dv)`` in ``q.dtype``; behind it in this order, as asked for: scores and log-sum-exp, fp32 (fp64
        for fp64 tokens), and the mean key in ``q.dtype``. A query without any key that counts gives zeros, with zero
        gradients, and a log-sum-exp of ``-inf``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, a head is wider than 128, ``scores`` or ``heads`` has another
            value, scores are asked for without a query, or (on a CPU) a length is outside of 0..Nk, boundaries do not
            begin with 0, fall, end behind the rows or are further apart than ``max_seqlen``.

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
    bounds = _Bounds(cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    given = _Given(qk_mask, v_mask, key_bias, key_lengths, scale, scores, heads, return_lse, return_key_mean)
    if bounds.given(op, key_lengths):
        return _of_sequences(op, q, k, v, bounds, given)
    sizes = _sizes(op, q, k, v)
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


class _Bounds(NamedTuple):
    """Boundaries of packed sequences, of queries and of keys, and their longest, as the kernels take them."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: Any
    max_k: Any

    def given(self, op: str, key_lengths: Any) -> bool:
        packed.not_with_boundaries(op, self.cu_q, self.max_q, key_lengths=key_lengths)
        if self.cu_q is None and self.cu_k is not None:
            raise ValueError(f"{op}: cu_seqlens_k needs cu_seqlens, the boundaries of the queries")
        if self.cu_k is None and self.max_k is not None:
            raise ValueError(f"{op}: max_seqlen_k={self.max_k!r}, but it needs cu_seqlens_k")
        return self.cu_q is not None

    def checked(self, op: str, q: Tensor, k: Tensor) -> "_Bounds":
        """With those of the keys, for queries (T,H,Dk) and keys."""
        sequences = packed.boundaries(op, self.cu_q, self.max_q, q.shape[0], q, tokens="q")
        if self.cu_k is None:
            checks.same(op, "rows", "k", k.shape[0], "q", q.shape[0])
            return _Bounds(self.cu_q, self.cu_q, self.max_q, self.max_q)
        of_keys = packed.boundaries(op, self.cu_k, self.max_k, k.shape[0], q, "_k", "k")
        checks.same(op, "sequences", "cu_seqlens_k", of_keys, "cu_seqlens", sequences)
        return self


def _of_sequences(op: str, q: Tensor, k: Tensor, v: Tensor, bounds: _Bounds, given: "_Given") -> Any:
    """Tokens (T,H,D) are one image, of which the kernels get the boundaries besides."""
    for name, tokens, shape in (("q", q, "T,H,Dk"), ("k", k, "T,H,Dk"), ("v", v, "T,H,Dv")):
        checks.tensor(op, name, tokens, shape)
    bounds = bounds.checked(op, q, k)
    bias, (rows, H, _) = given.key_bias, k.shape
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dim() not in (1, 2):
            got = f"shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
            raise (ValueError if isinstance(bias, Tensor) else TypeError)(
                f"{op}: key_bias must be a tensor ({rows},) or ({H}, {rows}) with cu_seqlens, but got {got}"
            )
        given = given._replace(
            key_bias=bias.reshape(1, *(bias.shape[:1] if bias.dim() == 2 else (1,)), 1, bias.shape[-1])
        )
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    sizes = _sizes(op, q, k, v)
    given.check(op, q, *sizes, queries=max(1, sizes[2]))
    results = _attended(op, q, k, v, sizes, given, bounds)
    if isinstance(results, Tensor):
        return results[0].transpose(0, 1)
    return results[0][0].transpose(0, 1), *(t[0] for t in results[1:])


def _attended(op: str, q: Tensor, k: Any, v: Any, sizes: Any, given: "_Given", bounds: _Bounds | tuple[()] = ()) -> Any:
    """By whoever serves; q alone is the packed projection."""
    B, H, _, Nk, Dk, _ = sizes
    side_by_side = (0, 0) if k is not None else (H, Dk)
    served = not bounds and given.plain and sdpa_serves(q, k, v, sizes)
    backend = "reference" if served else choose("masked_channel_attention", q.device.type, q.dtype)
    if backend == "reference":
        apart = (q, k, v) if k is not None else reference.heads_of(q, H, Dk)
        if served:
            out = _sdpa(*apart, scale=None if given.scale is None else float(given.scale))
            return out.transpose(1, 2).contiguous().transpose(1, 2)
        checks.lengths(op, "key_lengths", given.key_lengths, Nk)
        if bounds:
            return reference_packed.masked_channel_attention(*apart, bounds[:2], **given._asdict())
        return reference.masked_channel_attention(*apart, **given._asdict())
    scale = Dk**-0.5 if given.scale is None else given.scale
    bias = None if given.key_bias is None else given.key_bias.expand(B, H, 1, Nk).squeeze(2)
    tensors = q, k, v, given.qk_mask, given.v_mask, bias
    options = scale, given.scores or "none", given.heads == "mean", given.return_key_mean, *side_by_side
    if backend == "native":
        checks.lengths(op, "key_lengths", given.key_lengths, Nk)
        if native.attention_isa(q.dtype) is None:
            backend = "composed"
    if needs_grad(*tensors):
        results = _MaskedChannelAttention.of(*tensors, given.key_lengths, *options, backend, *bounds)
    else:
        arguments = *tensors, given.key_lengths, *options, given.return_lse, *bounds
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
        self, op: str, q: Tensor, B: int, H: int, Nq: int, Nk: int, Dk: int, Dv: int, of_q: str = "q",
        of_v: str = "v", queries: int | None = None,
    ) -> None:  # fmt: skip
        """For `queries`, if that is not Nq."""
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
        if self.scores is not None and (Nq if queries is None else queries) == 0:
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
    def forward(
        q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads, channels, backend, *bounds
    ):
        return kernel("masked_channel_attention_fwd", backend)(
            q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads, channels,
            *((True, *bounds) if bounds else ()),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        *tensors, ctx.scale, ctx.scores, ctx.mean, ctx.key_mean, heads, channels, ctx.backend = inputs[:14]
        ctx.side_by_side, (*boundaries, ctx.max_q, ctx.max_k) = (heads, channels), inputs[14:] or (0, 0)
        out, _, lse, _ = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse, *boundaries)

    @staticmethod
    def backward(ctx, dout, dscores, dlse, dkey_mean):
        saved = ctx.saved_tensors  # once: what checkpointing computes again is there for one look
        tensors, (out, lse, *boundaries) = saved[:7], saved[7:]
        scale, scores, mean, side_by_side = ctx.scale, ctx.scores, ctx.mean, ctx.side_by_side
        longest = (ctx.max_q, ctx.max_k) if boundaries else ()
        backward = kernel("masked_channel_attention_bwd", ctx.backend)
        # torch.compile makes gradients for what was not asked for
        dscores, dkey_mean = dscores if scores != "none" else None, dkey_mean if ctx.key_mean else None

        def run(inputs, cotangents, constants):
            (dout, dscores, dlse, dkey_mean), (lengths, out, lse, *boundaries) = cotangents, constants
            found = [None] * len(inputs)
            if dout is not None or dscores is not None or dlse is not None:
                dout = torch.zeros_like(out) if dout is None else dout
                options = scale, scores, mean, *side_by_side, *boundaries, *longest
                found = list(backward(dout, dscores, dlse, *inputs, lengths, out, lse, *options))
            if boundaries:
                lengths = boundaries[1][-1:]
            if dkey_mean is not None and inputs[1] is None:
                found[0] = _with_key_mean(found[0], dkey_mean, inputs[0], lengths, *side_by_side)
            elif dkey_mean is not None:
                found[1] = _with_key_mean(found[1], dkey_mean, inputs[1], lengths)
            found = [None if t is None else g for t, g in zip(inputs, found)]
            return [torch.zeros_like(t) if t is not None and g is None else g for t, g in zip(inputs, found)]

        def plain(inputs, constants):
            q, k, v, qk_mask, v_mask, bias = inputs
            q, k, v = (q, k, v) if k is not None else reference.heads_of(q, *side_by_side)
            boundaries = constants[3:]
            specified = reference.masked_channel_attention
            if boundaries:
                specified = functools.partial(reference_packed.masked_channel_attention, boundaries=boundaries)
            made = specified(
                q, k, v, qk_mask=qk_mask, v_mask=v_mask, key_bias=None if bias is None else bias.unsqueeze(2),
                key_lengths=constants[0], scale=scale, scores=None if scores == "none" else scores,
                heads="mean" if mean else "each", return_lse=True, return_key_mean=True,
            )  # fmt: skip
            return made if scores != "none" else (made[0], None, *made[1:])

        inputs, constants = dict(enumerate(tensors[:6])), (tensors[6], out, lse, *boundaries)
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
