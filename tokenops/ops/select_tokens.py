"""select_tokens: from scores to compact tokens, and with them all that goes along, in one launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, layer_norm, packed, reference, select_packed
from .autograd import Operator, gradients, needs_grad, zeros_like_tokens
from .backends import choose
from .schemas import kernel

MOST_TOKENS = 16384
RESTS = ("none", "weighted", "mean")
ORDERS = ("score", "index")


class Selection(NamedTuple):
    """What :func:`select_tokens` returns; boundaries where it was given some."""

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple's own method of that name is not missed
    companions: tuple[Tensor, ...]
    normed: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None = None


def select_tokens(
    x: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    rest: str = "none",
    normalize: bool = True,
    order: str = "score",
    counts: Tensor | None = None,
    companions: tuple[Tensor, ...] = (),
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int | None = None,
) -> Selection:
    r"""Keep the k best tokens of each image, and fuse the others into one if asked.

    .. math::
        y = [x_{1..P},\; x_{P+i}\; (i \in K),\; \sum_{j \notin K} a_j x_{P+j}], \qquad K = \mathrm{top}_k(s)

    The choice is exact and the same on every backend: a larger score first, of equal scores the lower index, and NaN
    behind every number (-0 equals 0).

    Args:
        x: ``(B, P+N, C)``, fp16, bf16, fp32 or fp64, any strides. N is at most 16384.
        scores: ``(B, N)``, of any of these dtypes, any strides.
        k: how many tokens to keep, 0 to N; an int, or a symbolic one under ``torch.compile``.
        prefix: P, how many leading tokens (class, distillation) are copied and not counted.
        rest: the last token: "none", or "weighted", the others' sum with their scores as weights :math:`a`, or "mean",
            their mean. Zeros where nothing is left out.
        normalize: for "weighted", whether the weights are divided by their sum (Evo-ViT) or not (EViT). A sum of
            exactly 0 divides by 1. Weights are fp32, unless x is fp64.
        order: of the kept tokens, "score" (best first) or "index" (as they were).
        counts: ``(B,)`` int64, 0 to k, for methods that keep another number in each image: rows behind an image's
            tokens are zeros. ``lengths`` then go to :func:`tokenops.masked_channel_attention` as ``key_lengths``.
        companions: up to 4 tensors ``(B, N)`` of any dtype that follow the tokens (sizes, sources, scores).
        norm: ``(weight, bias, eps)``: the layer norm of the result over C is returned as well; weight and bias are
            ``(C,)`` or None.
        cu_seqlens: ``(S+1,)`` int32, the first row of every sequence and the end: then x is ``(T, C)``, scores are
            ``(T,)`` (those of prefix rows are not looked at), counts ``(S,)``, and companions ``(T,)`` or ``(T, E)``. A
            sequence that is shorter keeps what it has: min(P, n) and min(k, n - P) rows, and a rest token only where
            something is left out, so that none grows. There is no limit to N. Rows behind the last sequence are slack.
        max_seqlen: with them, the rows of the longest sequence or more.
        capacity: with them, the rows of the result; by default min(T, S * (P + k + rest)), which is enough. On a GPU no
            value reaches the host: what does not fit is cut, later sequences first.

    Returns:
        A NamedTuple: tokens ``(B, P+k, C)``, or ``(B, P+k+1, C)`` with a rest (it follows an image's last kept token);
        index ``(B, k)`` int64, the places among the N, -1 beyond a count; companions, each ``(B, k)``, 0 beyond a
        count; normed, like tokens, or None; lengths ``(B,)`` int64, how many rows of tokens count, or None without
        counts; cu_seqlens, None.

        Of packed sequences: tokens ``(capacity, C)``, sequences one behind the other, zeros behind the last; index
        ``(capacity,)``, the row of x at each place, also of prefix rows, -1 for a rest and behind the last; companions
        ``(capacity, ...)``, 0 there; normed; lengths ``(S,)``; cu_seqlens ``(S+1,)`` int32, the new boundaries.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together; an option has no such value.
        IndexError: a count is not between 0 and k (on a CPU; on a GPU, where looking would synchronise, it is taken for
            the nearest that is), or a capacity is too small (on a CPU).

    Deterministic. Differentiable twice in ``x``, float ``companions``, the norm's weight and bias, and, by way of a
    "weighted" rest, in ``scores``; the choice itself is not differentiated.

    Source: Xu et al., Evo-ViT (AAAI 2022), section 3.2 (representative token); Liang et al., EViT (ICLR 2022),
    section 3 (fused token).

    >>> x, scores = torch.arange(5.0).reshape(1, 5, 1), torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    >>> chosen = select_tokens(x, scores, 2, rest="mean")
    >>> chosen.tokens.flatten().tolist(), chosen.index.tolist()
    ([0.0, 2.0, 3.0, 2.5], [[1, 2]])

    Two packed sequences, of 3 and 2 rows:

    >>> x, scores = torch.arange(5.0).unsqueeze(1), torch.tensor([9, 0.1, 0.4, 9, 0.3])
    >>> chosen = select_tokens(x, scores, 1, cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32), max_seqlen=3)
    >>> chosen.index.tolist(), chosen.cu_seqlens.tolist()
    ([0, 2, 3, 4], [0, 2, 4])
    """
    op = "select_tokens"
    packed.not_with_boundaries(op, cu_seqlens, max_seqlen)
    if cu_seqlens is not None:
        return _packed(
            op, x, scores, k, cu_seqlens, max_seqlen, capacity, prefix, rest, normalize, order, counts, companions, norm
        )
    if capacity is not None:
        raise ValueError(f"{op}: capacity={capacity!r}, but it needs cu_seqlens")
    B, rows, _ = checks.tensor(op, "x", x, "B,P+N,C")
    images, tokens = checks.tensor(op, "scores", scores, "B,N", like=x)
    checks.prefix(op, "prefix", prefix, rows)
    N = rows - prefix
    checks.same(op, "images", "scores", images, "x", B)
    if tokens != N:
        raise ValueError(f"{op}: scores has {tokens} tokens, but x has {rows} tokens, {N} after a prefix of {prefix}")
    if N > MOST_TOKENS:
        raise ValueError(f"{op}: x has {N} tokens after a prefix of {prefix}, but at most {MOST_TOKENS} are allowed")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{op}: k must be an int, but got {k!r}")
    if k < 0 or k > N:
        raise ValueError(f"{op}: k={k}, but x has {N} tokens after a prefix of {prefix}: 0 to {N} is allowed")
    _options(op, rest, order, normalize)
    companions = _companions(op, companions, x, scores)
    if counts is not None:
        counts = _counts(op, counts, x, B)
    weight, bias, eps = layer_norm.arguments(op, norm, x)
    backend = choose(op, x.device.type, x.dtype)
    if backend == "reference":
        if counts is not None:
            checks.places(op, "counts", counts, k + 1, lambda: f"it must be between 0 and k={k}")
        return Selection(
            *reference.select_tokens(
                x,
                scores,
                k,
                prefix=prefix,
                rest=rest,
                normalize=normalize,
                order=order,
                counts=counts,
                companions=companions,
                norm=norm,
            )
        )
    kind = "normalized" if rest == "weighted" and normalize else rest
    options = (prefix, kind, order == "score", norm is not None, eps)
    if needs_grad(x, scores, weight, bias, *companions):
        tokens, index, normed, _, _, *followers = _SelectTokens.of(
            x, scores, k, counts, weight, bias, options, backend, *companions
        )
    else:
        tokens, index, normed, _, _, followers = _run(x, scores, k, counts, companions, weight, bias, options, backend)
    return Selection(
        tokens,
        index,
        tuple(followers),
        None if norm is None else normed,
        None if counts is None else counts.clamp(0, k) + (prefix + int(rest != "none")),
    )


def _options(op: str, rest: Any, order: Any, normalize: Any) -> None:
    for name, value, allowed in (("rest", rest, RESTS), ("order", order, ORDERS)):
        if value not in allowed:
            raise ValueError(f"{op}: {name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")
    checks.flag(op, "normalize", normalize)


def _packed(
    op, x, scores, k, cu_seqlens, max_seqlen, capacity, prefix, rest, normalize, order, counts, companions, norm
) -> Selection:
    """`select_tokens` of packed sequences."""
    rows, _ = checks.tensor(op, "x", x, "T,C")
    (tokens,) = checks.tensor(op, "scores", scores, "T", like=x)
    checks.same(op, "rows", "scores", tokens, "x", rows)
    sequences = packed.boundaries(op, cu_seqlens, max_seqlen, rows, x, tokens="x")
    for name, value in (("prefix", prefix), ("k", k), *([] if capacity is None else [("capacity", capacity)])):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int, but got {value!r}")
        if value < 0:
            raise ValueError(f"{op}: {name}={value}, but it must be 0 or more")
    _options(op, rest, order, normalize)
    if isinstance(companions, Tensor) or not isinstance(companions, (tuple, list)):
        raise TypeError(f"{op}: companions must be a tuple of tensors, but got {type(companions).__name__}")
    checks.companions(op, len(companions))
    for i, companion in enumerate(companions):
        checks.companion_rows(op, f"companions[{i}]", companion, "T", rows, "x", x)
    if counts is not None:
        counts = _counts(op, counts, x, sequences)
        checks.places(op, "counts", counts, k + 1, lambda: f"it must be between 0 and k={k}")
    layer_norm.arguments(op, norm, x)
    if capacity is None:
        capacity = min(rows, sequences * (prefix + k + int(rest != "none")))
    return Selection(
        *select_packed.selected(
            x, scores, k, cu_seqlens, max_seqlen, capacity, prefix=prefix, rest=rest, normalize=normalize, order=order,
            counts=counts, companions=tuple(companions), norm=norm,
        )
    )  # fmt: skip


def _companions(op: str, companions: Any, x: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    if isinstance(companions, Tensor) or not isinstance(companions, (tuple, list)):
        raise TypeError(f"{op}: companions must be a tuple of tensors, but got {type(companions).__name__}")
    checks.companions(op, len(companions))
    for i, companion in enumerate(companions):
        checks.companion(op, f"companions[{i}]", companion, "B,N", scores.shape[0], scores.shape[1], x)
    return tuple(companions)


def _counts(op: str, counts: Any, x: Tensor, images: int) -> Tensor:
    checks.tensor(op, "counts", counts, "B" if x.dim() == 3 else "S", like=x, floating=False)
    if counts.dtype != torch.int64:
        raise TypeError(f"{op}: counts must be int64, but got {counts.dtype}")
    what, of = ("images", "x") if x.dim() == 3 else ("sequences", "cu_seqlens")
    checks.same(op, what, "counts", counts.shape[0], of, images)
    return counts.contiguous()


class _SelectTokens(Operator):
    @staticmethod
    def forward(x, scores, k, counts, weight, bias, options, backend, *companions):
        *results, followers = _run(x, scores, k, counts, companions, weight, bias, options, backend)
        return *results, *followers

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scores, ctx.k, counts, weight, bias, ctx.options, ctx.backend, *companions = inputs
        tokens, index, normed, statistics, fused, *followers = output
        _, rest, _, norm, _ = ctx.options
        ctx.floating = [c.dtype.is_floating_point for c in companions]
        weighted = rest in ("weighted", "normalized")
        # what depends on nothing that needs a gradient does not ask for one either
        needs = ctx.needs_input_grad
        of_x = needs[0] or (needs[1] and weighted)
        of_norm = of_x or any(needs[4:6])
        given = ((tokens, of_x), (normed, of_norm), *zip(followers, needs[8:]))
        ctx.mark_non_differentiable(index, statistics, fused, *(t for t, wanted in given if not wanted))
        ctx.set_materialize_grads(False)
        ctx.zeros = [(t.shape, t.dtype) for t in (tokens, *followers)]
        ctx.save_for_backward(
            index,
            scores,
            counts,
            x if weighted else None,
            fused if rest == "normalized" else None,
            *((tokens, statistics, weight, bias) if norm else ()),
        )

    @staticmethod
    def backward(ctx, dtokens, dindex, dnormed, dstatistics, dfused, *dfollowers):
        index, scores, counts, x, fused, *of_norm = ctx.saved_tensors
        k, (prefix, rest, best_first, _, _) = ctx.k, ctx.options
        backward, weighted = kernel("select_tokens_bwd", ctx.backend), x is not None

        def run(inputs, cotangents, constants):
            (x, *_), (dtokens, *dfollowers), (index, scores, *others) = inputs, cotangents, constants
            x = x if weighted else None
            counts, fused = (None if t is None else t.contiguous() for t in others)  # what was saved may lie otherwise
            dx, dscores, found = backward(dtokens, dfollowers, index, scores, counts, x, fused, prefix, rest)
            return dx, *((dscores,) if weighted else ()), *found

        def plain(inputs, constants):
            x, *companions = inputs
            scores = companions.pop(0) if weighted else constants[1]
            tokens, _, found, _, _ = reference.select_tokens(
                x, scores, k, prefix=prefix, rest="weighted" if weighted else rest, normalize=rest == "normalized",
                order="score" if best_first else "index", counts=constants[2], companions=tuple(companions),
            )  # fmt: skip
            return tokens, *found

        dtokens, dweight, dbias = layer_norm.added(dtokens, dnormed, of_norm)
        given = [(i, d) for i, d in enumerate((dtokens, *dfollowers)) if ctx.zeros[i][1].is_floating_point]
        given = [(i, index.new_zeros(ctx.zeros[i][0], dtype=ctx.zeros[i][1]) if d is None else d) for i, d in given]
        (_, dtokens), *followers = given
        inputs = {0: x if weighted else zeros_like_tokens(dtokens, prefix + scores.shape[1])}
        if weighted:
            inputs[1] = scores
        inputs |= {7 + i: d.new_zeros(()).expand(scores.shape) for i, d in followers}
        cotangents, constants = [d for _, d in given], (index, scores, counts, fused)
        found = gradients(ctx, run, plain, inputs, cotangents, constants)
        found[4:6] = dweight, dbias
        return tuple(found)


def _run(x, scores, k, counts, companions, weight, bias, options, backend):
    weight, bias = layer_norm.as_taken(x, backend, weight, bias)
    return kernel("select_tokens_fwd", backend)(x, scores, k, counts, list(companions), weight, bias, *options)
