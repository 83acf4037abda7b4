"""merge_bipartite: tokens that are most alike become one, ToMe's way; the matching by itself, and the way back."""

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, layer_norm, match_packed, merge_packed, packed, reference
from .autograd import Operator, apart, gradients, needs_grad, zeros_like_tokens
from .backends import choose
from .match_packed import Matching
from .schemas import kernel


class Merged(NamedTuple):
    """What `merge_bipartite` gives: M = N - r tokens behind the prefix.

    Attributes:
        tokens: ``(B, P+M, C)``: the prefix, the even rows that went nowhere, the odd rows, each in their order.
        index: ``(B, N)`` int64: which of the M tokens each of the N went into.
        sizes: ``(B, P+M)``: how many each row stands for; fp32, fp64 for fp64 tokens.
        log_sizes: their logarithms: ``log_sizes[:, None, None]`` is the ``key_bias`` of proportional attention.
        normed: the layer norm of the tokens, None where none was asked for.
        companions: of packed sequences, the means of what was given, ``(capacity, ...)``.
        cu_seqlens: of packed sequences, the boundaries of the merged ones, ``(S+1,)`` int32. Then tokens are
            ``(capacity, C)``, sequences one behind the other, zeros behind the last; index is ``(T,)``, the row of
            tokens that each row went into, also those of a prefix, -1 for slack and what was cut; sizes and log_sizes
            are ``(capacity,)``, 0 and -inf behind the last.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]
    sizes: Tensor
    log_sizes: Tensor
    normed: Tensor | None
    companions: tuple[Tensor, ...] = ()
    cu_seqlens: Tensor | None = None


@overload
def match_bipartite(metric: Tensor, r: int, *, prefix: int = 1) -> Tensor: ...
@overload
def match_bipartite(
    metric: Tensor, r: int | Tensor, *, prefix: int = 1, cu_seqlens: Tensor, max_seqlen: int
) -> Matching: ...
def match_bipartite(
    metric: Tensor,
    r: int | Tensor,
    *,
    prefix: int = 1,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor | Matching:
    r"""Which token each token goes into when r of them are merged: bipartite soft matching.

    The rows behind the prefix are split by the parity of their number (the prefix counted): A has the even ones, B the
    odd ones. Each of A looks for the one of B it is most like,

    .. math:: t_i = \mathrm{argmax}_j \frac{m_i \cdot m_j}{|m_i|\,|m_j|}

    the first of equals, and the r of A whose likeness is greatest (of equals the first) go there. A likeness that is no
    number counts as the least, that of a row of zeros is 0. M = N - r are left: first what remains of A, then B.

    Args:
        metric: ``(B, P+N, D)``, of any float dtype and strides; rows of the prefix are not looked at.
        r: how many to merge, from 0 to the number of rows in A (0 if B is empty). On a GPU the CUDA
            kernels take up to 16384 tokens. Of packed sequences also ``(S,)`` int64 or int32, on the device. A sequence
            that has fewer in A merges those: an r that is too large is no error there.
        prefix: P, leading rows (class, distillation, registers) that are never merged.
        cu_seqlens: ``(S+1,)`` int32, the first row of every sequence and the end: then metric is ``(T, D)``, and every
            sequence is matched by itself, its rows counted from its first. One that is shorter than the prefix is all
            prefix. Rows behind the last sequence are slack, which is not read. There is no limit to N, and no matrix of
            N by N anywhere: the best are found tile by tile.
        max_seqlen: with them, the rows of the longest sequence or more.

    Returns:
        ``(B, N)`` int64, 0 to M - 1. Not differentiated. Of packed sequences a NamedTuple: index ``(T,)`` int64, the
        row of the merged sequences, one behind the other, that each row goes into, also those of a prefix, -1 for
        slack; cu_seqlens ``(S+1,)`` int32, their boundaries. On a GPU no value reaches the host.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape does not fit, or there are not r tokens to merge.

    The likeness is computed in fp32, fp64 for fp64. Deterministic.

    Source: Bolya et al., Token Merging: Your ViT But Faster (ICLR 2023), section 3.

    >>> metric = torch.tensor([[0.0, 0], [1, 0], [1, 0.1], [0, 1], [0, 2]]).unsqueeze(0)  # a class token and four
    >>> match_bipartite(metric, 1).tolist()  # the third of the four goes to the second
    [[1, 0, 2, 2]]
    """
    op = "match_bipartite"
    packed.not_with_boundaries(op, cu_seqlens, max_seqlen)
    if cu_seqlens is not None:
        checks.tensor(op, "metric", metric, "T,D")
        longest = match_packed.checked(op, metric, "metric", r, cu_seqlens, max_seqlen, prefix)
        return match_packed.matched(metric, r, cu_seqlens, longest, prefix)
    _, rows, _ = checks.tensor(op, "metric", metric, "B,P+N,D")
    checks.prefix(op, "prefix", prefix, rows)
    return _matched(metric, _checked_r(op, r, rows, prefix), prefix)


def _matched(metric: Tensor, r: int, prefix: int) -> Tensor:
    op = "match_bipartite"
    backend = choose(op, metric.device.type, metric.dtype)
    if backend == "reference":
        with torch.no_grad():
            return reference.match_bipartite(metric, r, prefix=prefix)
    return kernel("match_bipartite_fwd", backend)(apart(metric), r, prefix)


def merge_bipartite(
    x: Tensor,
    metric: Tensor,
    r: int | Tensor,
    *,
    prefix: int = 1,
    sizes: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int | None = None,
    companions: tuple[Tensor, ...] = (),
) -> Merged:
    r"""Merge the r tokens that are most like another one into it, by the mean of all that they stand for.

    .. math:: y_m = \frac{1}{S_m} \sum_{n:\, t_n = m} s_n\, x_n, \qquad S_m = \sum_{n:\, t_n = m} s_n

    with :math:`t` of :func:`match_bipartite` and the sizes s. Prefix rows are copied.

    Args:
        x: ``(B, P+N, C)``; fp16, bf16, fp32 or fp64, any strides.
        metric: ``(B, P+N, D)``, by which tokens are compared: ToMe's are the keys of attention, averaged over heads
            (``masked_channel_attention(..., return_key_mean=True)``).
        r: how many tokens to merge, as in :func:`match_bipartite`.
        prefix: P, how many leading tokens are copied.
        sizes: ``(B, P+N)``, how many patches each row stands for (those of the prefix are passed on), of any float
            dtype; not differentiated. None: 1.
        norm: ``(weight, bias, eps)``: the layer norm of the result over C is returned as well; weight and bias are
            ``(C,)`` or None.
        cu_seqlens, max_seqlen: of packed sequences, as in :func:`match_bipartite`: then x is ``(T, C)``, metric
            ``(T, D)`` and sizes ``(T,)``, and r may be ``(S,)``; one that is too large for a sequence merges what can
            be.
        capacity: with them, the rows of the result; by default T. On a GPU no value reaches the host: what does not fit
            is cut, later sequences first.
        companions: with them, up to 4 float tensors ``(T,)`` or ``(T, E)``, of which each token gets the mean by sizes
            too: positions, or the rows of rotary tables. The mean of these is exact for keys that are equal: of it and
            them the logit is the mean of the members' (with ``log_sizes`` as key bias).

    Returns:
        `Merged`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, or there are not r tokens to merge.
        IndexError: a capacity is too small (on a CPU).

    Sums are fp32, fp64 for fp64. Deterministic. Differentiable twice in ``x``, companions and the norm's weight and
    bias; matching and sizes are not differentiated, as in the paper.

    Source: Bolya et al., Token Merging: Your ViT But Faster (ICLR 2023), sections 3 and 3.1.

    >>> x = torch.tensor([[9.0, 9], [1, 0], [1, 0.1], [0, 1], [0, 3]]).unsqueeze(0)
    >>> y = merge_bipartite(x, x, 1)
    >>> y.tokens.tolist(), y.sizes.tolist()
    ([[[9.0, 9.0], [1.0, 0.10000000149011612], [1.0, 0.0], [0.0, 2.0]]], [[1.0, 1.0, 1.0, 2.0]])
    """
    op = "merge_bipartite"
    packed.not_with_boundaries(op, cu_seqlens, max_seqlen)
    if cu_seqlens is not None:
        longest = merge_packed.checked(
            op, x, metric, r, cu_seqlens, max_seqlen, capacity, prefix, sizes, companions, norm
        )
        return Merged(
            *merge_packed.merged(
                x, metric, r, cu_seqlens, longest, capacity, prefix=prefix, sizes=sizes, norm=norm,
                companions=tuple(companions),
            )
        )  # fmt: skip
    if capacity is not None:
        raise ValueError(f"{op}: capacity={capacity!r}, but it needs cu_seqlens")
    if not isinstance(companions, (tuple, list)) or companions:
        raise ValueError(f"{op}: companions are given, but they need cu_seqlens")
    B, rows, _ = checks.tensor(op, "x", x, "B,P+N,C")
    of_metric = checks.tensor(op, "metric", metric, "B,P+N,D", like=x)
    checks.prefix(op, "prefix", prefix, rows)
    checks.same(op, "images", "metric", of_metric[0], "x", B)
    checks.same(op, "tokens", "metric", of_metric[1], "x", rows)
    r = _checked_r(op, r, rows, prefix)
    sizes, weight, bias, eps = _arguments(op, x, sizes, norm)
    backend = choose(op, x.device.type, x.dtype)
    if backend == "reference":
        with torch.no_grad():
            index = reference.match_bipartite(metric, r, prefix=prefix)
        y, totals, logs, normed = reference.merge_bipartite(
            x, index, rows - prefix - r, prefix=prefix, sizes=sizes, norm=norm
        )
        return Merged(y, index, totals, logs, normed)
    metric, options = apart(metric), (prefix, norm is not None, eps)
    run = _MatchAndMerge.of if needs_grad(x, weight, bias) else _run_matched
    y, index, totals, logs, normed, _ = run(x, metric, r, sizes, weight, bias, options, backend)
    return Merged(y, index, totals, logs, None if norm is None else normed)


def _arguments(
    op: str, x: Tensor, sizes: Tensor | None, norm: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """Sizes, and the norm's weight, bias and eps, checked."""
    if sizes is not None:
        images, rows = checks.tensor(op, "sizes", sizes, "B,P+N", like=x)
        checks.same(op, "images", "sizes", images, "x", x.shape[0])
        checks.same(op, "tokens", "sizes", rows, "x", x.shape[1])
        sizes = apart(sizes)
    return sizes, *layer_norm.arguments(op, norm, x)


def merge_by_index(
    op: str,
    x: Tensor,
    index: Tensor,
    tokens: int,
    prefix: int,
    sizes: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The mean of the tokens that go into each of `tokens`, the sizes, their logarithms, and the norm if asked for."""
    sizes, weight, bias, eps = _arguments(op, x, sizes, norm)
    backend = choose("merge_bipartite", x.device.type, x.dtype)
    if backend == "reference":
        _check_places(op, index, tokens)
        return reference.merge_bipartite(x, index, tokens, prefix=prefix, sizes=sizes, norm=norm)
    options = (prefix, norm is not None, eps)
    run = _MergeBipartite.of if needs_grad(x, weight, bias) else _run
    y, totals, logs, normed, _ = run(x, index, tokens, sizes, weight, bias, options, backend)
    return y, totals, logs, None if norm is None else normed


def unmerge_bipartite(y: Tensor, index: Tensor, *, prefix: int = 1) -> Tensor:
    """Give every token the one it went into: the way back from `merge_bipartite`, through any number of merges at once.

    .. math:: x = [y_{1..P},\\; y_{P + index_n}]

    Args:
        y: ``(B, P+M, C)``; fp16, bf16, fp32 or fp64, any strides. Of packed sequences ``(K, C)``.
        index: ``(B, N)`` int64, 0 to M - 1: of one merge, or composed (``second.index.gather(1, first.index)``). Of
            packed sequences ``(T,)``, rows of y, 0 to K - 1, or -1, whose token is 0 (composed:
            ``second.index[first.index].masked_fill(first.index < 0, -1)``); boundaries and a prefix are in it.
        prefix: P, how many leading tokens are copied; of packed sequences not looked at.

    Returns:
        ``(B, P+N, C)``, contiguous; of packed sequences ``(T, C)``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.
        IndexError: an index is out of range (on a GPU, where looking would wait for it, that token is 0).

    Deterministic, the gradient too: each token's is the sum over those that went into it. Differentiable twice.

    Source: Bolya et al., Token Merging: Your ViT But Faster (ICLR 2023); its use for dense prediction is Bolya and
    Hoffman, Token Merging for Fast Stable Diffusion (2023).
    """
    op = "unmerge_bipartite"
    if isinstance(y, Tensor) and y.dim() == 2 and isinstance(index, Tensor) and index.dim() == 1:
        return merge_packed.unmerged(op, y, index)
    B, rows, _ = checks.tensor(op, "y", y, "B,P+M,C")
    checks.prefix(op, "prefix", prefix, rows)
    images, _ = checks.tensor(op, "index", index, "B,N", like=y, floating=False)
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be int64, but got {index.dtype}")
    checks.same(op, "images", "index", images, "y", B)
    backend = choose(op, y.device.type, y.dtype)
    if backend == "reference":
        _check_places(op, index, rows - prefix)
        return reference.unmerge_bipartite(y, index, prefix=prefix)
    return _unmerged(y, index, prefix, backend)


def sum_by_index(op: str, x: Tensor, index: Tensor, tokens: int, prefix: int) -> Tensor:
    """The sum of the tokens that go into each of `tokens`, behind the prefix: the transpose of `unmerge_bipartite`."""
    backend = choose("unmerge_bipartite", x.device.type, x.dtype)
    if backend == "reference":
        _check_places(op, index, tokens)
        return reference.sum_bipartite(x, index, tokens, prefix=prefix)
    return _summed(x, index, tokens, prefix, backend)


def most_merged(rows: int, prefix: int) -> int:
    """How many of `rows` tokens, `prefix` of them leading ones, can be merged at most."""
    even = (rows + 1) // 2 - (prefix + 1) // 2
    return even if even < rows - prefix else 0


def _checked_r(op: str, r: Any, rows: int, prefix: int) -> int:
    if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
        raise TypeError(f"{op}: r must be an int, but got {r!r}")
    most = most_merged(rows, prefix)
    if r < 0 or r > most:
        raise ValueError(
            f"{op}: r={r}, but of {rows - prefix} tokens after a prefix of {prefix} at most {most} can be merged:"
            f" 0 to {most} is allowed"
        )
    return r  # type: ignore[return-value]


def _check_places(op: str, index: Tensor, tokens: int) -> None:
    words = "it must be from 0 to {}: there are {} tokens behind the prefix"
    checks.places(op, "index", index, tokens, lambda: words.format(tokens - 1, tokens))


class _MergeBipartite(Operator):
    @staticmethod
    def forward(x, index, tokens, sizes, weight, bias, options, backend):
        return _run(x, index, tokens, sizes, weight, bias, options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs, inputs[1], inputs[2], *output)

    @staticmethod
    def backward(ctx, dy, dmerged, dlogs, dnormed, dstatistics):
        return _merge_gradients(ctx, dy, dnormed)


class _MatchAndMerge(Operator):
    """The same of tokens that are matched in the same launch."""

    @staticmethod
    def forward(x, metric, r, sizes, weight, bias, options, backend):
        return _run_matched(x, metric, r, sizes, weight, bias, options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, index, *others = output
        _keep(ctx, inputs, index, index.shape[1] - inputs[2], y, *others, index)

    @staticmethod
    def backward(ctx, dy, dindex, dmerged, dlogs, dnormed, dstatistics):
        return _merge_gradients(ctx, dy, dnormed)


def _keep(ctx, inputs, index, tokens, y, merged, logs, normed, statistics, *others):
    """What the gradients need; of the results only y and normed, and `others` not, have any."""
    _, _, _, sizes, weight, bias, (ctx.prefix, norm, _), ctx.backend = inputs
    ctx.tokens = tokens
    of_x, *of_norm = (ctx.needs_input_grad[place] for place in (0, 4, 5))
    of_norm = norm and (of_x or any(of_norm))
    fixed = [t for t, wanted in ((y, of_x), (normed, of_norm)) if not wanted]
    ctx.mark_non_differentiable(merged, logs, statistics, *others, *fixed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, sizes, merged, *((y, statistics, weight, bias) if norm else ()))


def _merge_gradients(ctx, dy, dnormed):
    index, sizes, merged, *of_norm = ctx.saved_tensors
    tokens, prefix, backward = ctx.tokens, ctx.prefix, kernel("merge_bipartite_bwd", ctx.backend)

    def run(inputs, cotangents, constants):
        return (backward(*cotangents, *constants, prefix),)

    def plain(inputs, constants):
        index, sizes, _ = constants
        return (reference.merge_bipartite(*inputs, index, tokens, prefix=prefix, sizes=sizes)[0],)

    dy, dweight, dbias = layer_norm.added(dy, dnormed, of_norm)
    x = zeros_like_tokens(dy, prefix + index.shape[1])
    dx = gradients(ctx, run, plain, {0: x}, (dy,), (index, sizes, merged))[0]
    return dx, None, None, None, dweight, dbias, None, None


def _unmerged(y, index, prefix, backend):
    if needs_grad(y):
        return _Unmerge.of(y, index, prefix, backend)
    return kernel("unmerge_bipartite_fwd", backend)(y, index, prefix)


def _summed(x, index, tokens, prefix, backend):
    if needs_grad(x):
        return _Sum.of(x, index, tokens, prefix, backend)
    return kernel("unmerge_bipartite_bwd", backend)(x, index, tokens, prefix)


class _Unmerge(Operator):
    @staticmethod
    def forward(y, index, prefix, backend):
        return kernel("unmerge_bipartite_fwd", backend)(y, index, prefix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, index, ctx.prefix, ctx.backend = inputs
        ctx.tokens = y.shape[1] - ctx.prefix
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, dx):
        (index,) = ctx.saved_tensors
        return _summed(dx, index, ctx.tokens, ctx.prefix, ctx.backend), None, None, None


class _Sum(Operator):
    @staticmethod
    def forward(x, index, tokens, prefix, backend):
        return kernel("unmerge_bipartite_bwd", backend)(x, index, tokens, prefix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, index, _, ctx.prefix, ctx.backend = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, dy):
        (index,) = ctx.saved_tensors
        return _unmerged(dy, index, ctx.prefix, ctx.backend), None, None, None, None


def _run(x, index, tokens, sizes, weight, bias, options, backend):
    weight, bias = layer_norm.as_taken(x, backend, weight, bias)
    return kernel("merge_bipartite_fwd", backend)(x, index, tokens, sizes, weight, bias, *options)


def _run_matched(x, metric, r, sizes, weight, bias, options, backend):
    weight, bias = layer_norm.as_taken(x, backend, weight, bias)
    return kernel("merge_bipartite_matched", backend)(x, metric, r, sizes, weight, bias, *options)
