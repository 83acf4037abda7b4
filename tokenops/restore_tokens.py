"""restore_tokens: processed tokens go back to their places among those that were left out."""

import torch
from torch import Tensor

from . import _checks, reference
from ._backends import choose
from ._schemas import kernel, needs_grad


def restore_tokens(base: Tensor, tokens: Tensor, index: Tensor, *, prefix: int = 1) -> Tensor:
    r"""Put tokens back at their indices: a copy of ``base`` with the rows at ``index`` replaced.

    .. math:: y_{b,\,P + \mathrm{index}_{b,j}} = \mathrm{tokens}_{b,j}, \qquad y = \mathrm{base} \text{ elsewhere}

    Args:
        base: ``(B, P+N, C)``, fp16, bf16, fp32 or fp64, any strides. The result has its dtype.
        tokens: ``(B, k, C)`` in that dtype, any strides; or ``(B, P+k, C)``, whose first P rows replace the prefix.
        index: ``(B, k)`` int64, the place of each token among the N behind the prefix, unique within an image.
        prefix: P, how many leading tokens of ``base`` the indices do not count.

    Returns:
        ``(B, P+N, C)``, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.
        IndexError: an index is not between 0 and N-1, or is there twice in an image (on a CPU; on a GPU, where
            looking would synchronise, a token out of range is dropped, the last of several at one place wins, and
            nothing is read or written out of bounds).

    Deterministic. Differentiable once in ``base`` and ``tokens``.

    Source: slow-fast token updating of Xu et al., Evo-ViT (AAAI 2022), section 3.3; the way back to a dense grid.

    >>> base, tokens = torch.zeros(1, 4, 2), torch.ones(1, 1, 2)
    >>> restore_tokens(base, tokens, torch.tensor([[1]]))[0, :, 0]
    tensor([0., 0., 1., 0.])
    """
    op = "restore_tokens"
    _checks.tensor(op, "base", base, "B,P+N,C")
    _checks.tensor(op, "tokens", tokens, "B,k,C", like=base)
    _checks.tensor(op, "index", index, "B,k", like=base, floating=False)
    _checks.prefix(op, "prefix", prefix, base.shape[1])
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be int64, but got {index.dtype}")
    if tokens.dtype != base.dtype:
        raise TypeError(f"{op}: tokens must have base's dtype {base.dtype}, but got {tokens.dtype}")
    _checks.same(op, "images", "tokens", tokens.shape[0], "base", base.shape[0])
    _checks.same(op, "images", "index", index.shape[0], "base", base.shape[0])
    _checks.same(op, "channels", "tokens", tokens.shape[2], "base", base.shape[2])
    if tokens.shape[1] != index.shape[1] and tokens.shape[1] != prefix + index.shape[1]:
        raise ValueError(
            f"{op}: tokens has {tokens.shape[1]} rows, but index has {index.shape[1]} an image:"
            f" {index.shape[1]} rows are allowed, or {prefix + index.shape[1]} with the prefix"
        )
    backend = choose(op, base.device.type, base.dtype)
    if backend == "reference":
        return reference.restore_tokens(base, tokens, index, prefix=prefix)
    if needs_grad(base, tokens):
        return _RestoreTokens.apply(base, tokens, index, prefix, backend)
    return kernel("restore_tokens_fwd", backend)(base, tokens, index, prefix)


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(base, tokens, index, prefix, backend):
        return kernel("restore_tokens_fwd", backend)(base, tokens, index, prefix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        base, tokens, index, ctx.prefix, ctx.backend = inputs
        ctx.carried = tokens.shape[1] - index.shape[1]
        ctx.save_for_backward(index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (index,) = ctx.saved_tensors
        dbase, dtokens = kernel("restore_tokens_bwd", ctx.backend)(dy, index, ctx.prefix, ctx.carried)
        return dbase, dtokens, None, None, None
