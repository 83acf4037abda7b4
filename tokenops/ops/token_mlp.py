"""token_mlp: an MLP along the token axis, without transposes (the heart of SiT's reverse module, RTSM)."""

import torch
from torch import Tensor

from . import checks, reference
from .autograd import Operator, gradients, needs_grad
from .backends import choose
from .schemas import kernel


def token_mlp(z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    r"""Mix tokens with a two-layer MLP along the token axis, the same for every channel.

    .. math:: y = W_2\, \mathrm{gelu}(W_1 z + b_1) + b_2

    The weights multiply from the left, so nothing is transposed, and the ``(B, R, C)`` hidden tensor never exists as a
    whole, neither forward nor backward: it is made for a few images at a time, as many as stay in cache, and made
    again by the backward pass.

    Args:
        z: tokens ``(B, M, C)``, fp16, bf16, fp32 or fp64, any strides. The result has its dtype.
        w1: ``(R, M)``. Weights and biases have ``z``'s dtype; under autocast they are cast to it.
        b1: ``(R,)``, or None.
        w2: ``(N, R)``.
        b2: ``(N,)``, or None.

    Returns:
        ``(B, N, C)`` in ``z.dtype``, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    Sums are fp32 (fp64 for fp64 tokens), the GELU is the exact (erf) one. Deterministic. Differentiable twice in every
    tensor.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.3, reverse token slimming module.

    >>> z, w1, w2 = torch.randn(2, 49, 64), torch.randn(784, 49), torch.randn(196, 784)
    >>> token_mlp(z, w1, None, w2, None).shape
    torch.Size([2, 196, 64])
    """
    op = "token_mlp"
    _, M, _ = checks.tensor(op, "z", z, "B,M,C")
    R, columns = checks.tensor(op, "w1", w1, "R,M", like=z)
    N, hidden = checks.tensor(op, "w2", w2, "N,R", like=z)
    checks.same(op, "columns", "w1", columns, "z (its tokens)", M)
    checks.same(op, "columns", "w2", hidden, "w1 (its rows)", R)
    for name, bias, shape, weight, rows in (("b1", b1, "R", "w1 (its rows)", R), ("b2", b2, "N", "w2 (its rows)", N)):
        if bias is not None:
            (elements,) = checks.tensor(op, name, bias, shape, like=z)
            checks.same(op, "elements", name, elements, weight, rows)
    if torch.is_autocast_enabled(z.device.type):
        w1, w2 = w1.to(z.dtype), w2.to(z.dtype)
        b1, b2 = (b if b is None else b.to(z.dtype) for b in (b1, b2))
    else:
        for name, t in zip(("w1", "b1", "w2", "b2"), (w1, b1, w2, b2)):
            if t is not None and t.dtype != z.dtype:
                raise TypeError(f"{op}: {name} must have z's dtype {z.dtype}, but got {t.dtype}")
    backend = choose(op, z.device.type, z.dtype)
    if backend == "reference":
        return reference.token_mlp(z, w1, b1, w2, b2)
    if needs_grad(z, w1, b1, w2, b2):
        return _TokenMlp.of(z, w1, b1, w2, b2, backend)
    return kernel("token_mlp_fwd", backend)(z, w1, b1, w2, b2)


class _TokenMlp(Operator):
    @staticmethod
    def forward(z, w1, b1, w2, b2, backend):
        return kernel("token_mlp_fwd", backend)(z, w1, b1, w2, b2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, w1, b1, w2, b2, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, w1, b1, w2, b2)

    @staticmethod
    def backward(ctx, dy):
        z, w1, b1, w2, b2 = ctx.saved_tensors
        backward = kernel("token_mlp_bwd", ctx.backend)

        def run(inputs, cotangents, constants):
            z, w1, b1, w2, _ = inputs
            return backward(*cotangents, z, w1, b1, w2)

        def plain(inputs, constants):
            return (reference.token_mlp(*inputs),)

        return tuple(gradients(ctx, run, plain, dict(enumerate((z, w1, b1, w2, b2))), (dy,)))
