"""restore_tokens: processed tokens go back to their places among those that were left out."""

from typing import Any

import torch
from torch import Tensor

from . import checks, reference, reference_packed
from .autograd import Operator, gradients, needs_grad, zeros_like_tokens
from .backends import choose
from .schemas import kernel
from .sum_rows import gather_rows

#: kernels on a GPU compare every row with every index: of more a map is made before
MOST_COMPARED = 2**26


def restore_tokens(
    base: Tensor,
    tokens: Tensor,
    index: Tensor,
    *,
    prefix: int = 1,
    companions: tuple[tuple[Tensor, Tensor], ...] | None = None,
) -> Any:
    r"""Put tokens back at their indices: a copy of ``base`` with the rows at ``index`` replaced.

    .. math:: y_{b,\,P + \mathrm{index}_{b,j}} = \mathrm{tokens}_{b,j}, \qquad y = \mathrm{base} \text{ elsewhere}

    Args:
        base: ``(B, P+N, C)``, fp16, bf16, fp32 or fp64, any strides. The result has its dtype. Or rows of packed
            sequences ``(T, C)``: then tokens are ``(K, C)`` and index ``(K,)``, the rows of base themselves (as
            :func:`tokenops.select_tokens` of packed sequences gives them), whatever prefix is, and companions are pairs
            of ``(T,)`` and ``(K,)`` or of ``(T, E)`` and ``(K, E)``.
        tokens: ``(B, k, C)`` in that dtype, any strides; or ``(B, P+k, C)``, whose first P rows replace the prefix.
        index: ``(B, k)`` int64, the place of each token among the N behind the prefix, unique within an image; -1 for
            a token that goes nowhere (as :func:`tokenops.select_tokens` marks what is beyond an image's count).
        prefix: P, how many leading tokens of ``base`` the indices do not count.
        companions: up to 4 pairs of ``(B, N)`` and ``(B, k)``, of any dtype but one in a pair: what follows the tokens
            (scores, sizes), put back in the same launch.

    Returns:
        ``(B, P+N, C)``, contiguous; where companions are given, this and a tuple of them, each ``(B, N)``. Or like the
        packed ones given.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.
        IndexError: an index is not between -1 and N-1, or is there twice in an image (on a CPU; on a GPU, where
            looking would synchronise, a token out of range is dropped, the last of several at one place wins, and
            nothing is read or written out of bounds).

    Deterministic. Differentiable twice in ``base``, ``tokens`` and float companions.

    Source: slow-fast token updating of Xu et al., Evo-ViT (AAAI 2022), section 3.3; the way back to a dense grid.

    >>> base, tokens = torch.zeros(1, 4, 2), torch.ones(1, 1, 2)
    >>> restore_tokens(base, tokens, torch.tensor([[1]]))[0, :, 0]
    tensor([0., 0., 1., 0.])
    """
    op = "restore_tokens"
    two = isinstance(base, Tensor) and base.dim() == 2
    if two and any(isinstance(t, Tensor) and t.dim() == dims for t, dims in ((tokens, 2), (index, 1))):
        return _packed(op, base, tokens, index, prefix, companions)
    B, rows, C = checks.tensor(op, "base", base, "B,P+N,C")
    of_tokens = checks.tensor(op, "tokens", tokens, "B,k,C", like=base)
    images, k = checks.tensor(op, "index", index, "B,k", like=base, floating=False)
    checks.prefix(op, "prefix", prefix, rows)
    _check_dtypes(op, base, tokens, index)
    checks.same(op, "images", "tokens", of_tokens[0], "base", B)
    checks.same(op, "images", "index", images, "base", B)
    checks.same(op, "channels", "tokens", of_tokens[2], "base", C)
    if of_tokens[1] != k and of_tokens[1] != prefix + k:
        raise ValueError(
            f"{op}: tokens has {of_tokens[1]} rows, but index has {k} an image:"
            f" {k} rows are allowed, or {prefix + k} with the prefix"
        )
    pairs = _pairs(op, companions, base, index, prefix)
    backend = choose(op, base.device.type, base.dtype)
    if backend == "reference":
        N = rows - prefix
        words = "base has {} tokens after a prefix of {}: 0 to {} is allowed (and -1, which goes nowhere)"
        checks.places(op, "index", index, N, lambda: words.format(N, prefix, N - 1), lowest=-1, unique=True)
        return reference.restore_tokens(base, tokens, index, prefix=prefix, companions=companions)
    flat = [t for pair in pairs for t in pair]
    if torch.jit.is_tracing():  # TorchScript makes one of equal lists, and torch empties a list that a call took
        flat = [t.view_as(t) for t in flat]
    if needs_grad(base, tokens, *flat):
        y, *found = _RestoreTokens.of(base, tokens, index, prefix, backend, *flat)
    else:
        y, found = kernel("restore_tokens_fwd", backend)(base, tokens, index, prefix, flat[::2], flat[1::2])
    return y if companions is None else (y, tuple(found))


def _packed(op: str, base: Tensor, tokens: Any, index: Any, prefix: Any, companions: Any) -> Any:
    """The rows of packed sequences, as one image without a prefix."""
    rows, C = checks.tensor(op, "base", base, "T,C")
    count, channels = checks.tensor(op, "tokens", tokens, "K,C", like=base)
    (k,) = checks.tensor(op, "index", index, "K", like=base, floating=False)
    checks.same(op, "channels", "tokens", channels, "base", C)
    checks.same(op, "rows", "tokens", count, "index", k)
    _check_dtypes(op, base, tokens, index)
    if isinstance(prefix, bool) or not isinstance(prefix, (int, torch.SymInt)):
        raise TypeError(f"{op}: prefix must be an int, but got {prefix!r}")
    pairs = _pairs_of_rows(op, companions, base, index)
    backend = choose(op, base.device.type, base.dtype)
    if rows * k > MOST_COMPARED and (base.is_cuda or backend == "triton") and backend != "reference":
        owner = reference_packed.owners(index, rows)
        y = torch.where((owner >= 0).unsqueeze(1), gather_rows(tokens, owner), base)
        if companions is None:
            return y
        return y, tuple(
            reference_packed.replaced_rows(old.reshape(rows, -1), new.reshape(k, -1), index).view(old.shape)
            for old, new in pairs
        )
    # those with columns are rows like base; the kernels take the others along
    narrow = [i for i, (old, _) in enumerate(pairs) if old.dim() == 1]
    together = tuple((pairs[i][0].unsqueeze(0), pairs[i][1].unsqueeze(0)) for i in narrow)
    y, found = restore_tokens(base.unsqueeze(0), tokens.unsqueeze(0), index.unsqueeze(0), prefix=0, companions=together)
    if companions is None:
        return y.squeeze(0)
    taken = iter(found)
    return y.squeeze(0), tuple(
        next(taken).squeeze(0) if old.dim() == 1 else reference_packed.replaced_rows(old, new, index)
        for old, new in pairs
    )


def _pairs_of_rows(op: str, companions: Any, base: Tensor, index: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    if companions is None:
        return ()
    _check_pairs(op, companions)
    for i, pair in enumerate(companions):
        for j, (value, shape, like, other) in enumerate(zip(pair, "TK", (base, index), ("base", "index"))):
            checks.companion_rows(op, f"companions[{i}][{j}]", value, shape, like.shape[0], other, base)
        if pair[0].shape[1:] != pair[1].shape[1:]:
            raise ValueError(
                f"{op}: companions[{i}] must be two of (T,) and (K,) or of (T, E) and (K, E), but got"
                f" {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
            )
        _check_one_dtype(op, i, pair)
    return tuple((old, new) for old, new in companions)


def _check_dtypes(op: str, base: Tensor, tokens: Tensor, index: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be int64, but got {index.dtype}")
    if tokens.dtype != base.dtype:
        raise TypeError(f"{op}: tokens must have base's dtype {base.dtype}, but got {tokens.dtype}")


def _check_pairs(op: str, companions: Any) -> None:
    if not isinstance(companions, (tuple, list)) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in companions
    ):
        raise TypeError(f"{op}: companions must be a tuple of pairs (old, new), but got {type(companions).__name__}")
    checks.companions(op, len(companions))


def _check_one_dtype(op: str, i: int, pair: Any) -> None:
    if pair[0].dtype != pair[1].dtype:
        raise TypeError(f"{op}: companions[{i}] must have one dtype, but got {pair[0].dtype} and {pair[1].dtype}")


def _pairs(op: str, companions: Any, base: Tensor, index: Tensor, prefix: int) -> tuple[tuple[Tensor, Tensor], ...]:
    if companions is None:
        return ()
    _check_pairs(op, companions)
    sizes = (base.shape[0], base.shape[1] - prefix), (index.shape[0], index.shape[1])
    for i, pair in enumerate(companions):
        for j, (companion, (images, tokens), shape) in enumerate(zip(pair, sizes, ("B,N", "B,k"))):
            checks.companion(op, f"companions[{i}][{j}]", companion, shape, images, tokens, base)
        _check_one_dtype(op, i, pair)
    return tuple((old, new) for old, new in companions)


class _RestoreTokens(Operator):
    @staticmethod
    def forward(base, tokens, index, prefix, backend, *pairs):
        y, found = kernel("restore_tokens_fwd", backend)(
            base, tokens, index, prefix, list(pairs[::2]), list(pairs[1::2])
        )
        return y, *found

    @staticmethod
    def setup_context(ctx, inputs, output):
        base, tokens, index, ctx.prefix, ctx.backend, *pairs = inputs
        ctx.carried = tokens.shape[1] - index.shape[1]
        ctx.floating = [old.dtype.is_floating_point for old in pairs[::2]]
        ctx.mark_non_differentiable(*(y for y, floating in zip(output[1:], ctx.floating) if not floating))
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, dy, *dfound):
        (index,) = ctx.saved_tensors
        prefix, carried, backward = ctx.prefix, ctx.carried, kernel("restore_tokens_bwd", ctx.backend)

        def run(inputs, cotangents, constants):
            dy, *dfound = cotangents
            dbase, dtokens, dolds, dnews = backward(dy, *constants, prefix, carried, dfound)
            return dbase, dtokens, *(d for pair in zip(dolds, dnews) for d in pair)

        def plain(inputs, constants):
            base, tokens, *pairs = inputs
            pairs = tuple(zip(pairs[::2], pairs[1::2]))
            y, found = reference.restore_tokens(base, tokens, *constants, prefix=prefix, companions=pairs)
            return y, *found

        # linear in all that has a gradient: what these are is no matter
        inputs = {0: zeros_like_tokens(dy, dy.shape[1]), 1: zeros_like_tokens(dy, carried + index.shape[1])}
        given = [(i, d) for i, d in enumerate(dfound) if ctx.floating[i]]
        for i, d in given:
            zero = d.new_zeros(())
            inputs |= {5 + 2 * i: zero.expand(d.shape), 6 + 2 * i: zero.expand(index.shape)}
        return tuple(gradients(ctx, run, plain, inputs, (dy, *(d for _, d in given)), (index,)))
