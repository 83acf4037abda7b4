"""token_mlp on a CPU: matrix products one image at a time, so that the hidden activations stay in cache."""

import torch

from ..reference import accumulation_dtype


def _column(bias, rows, like):
    """A bias along the tokens, shaped to be added to (rows, C)."""
    return like.new_zeros((rows, 1)) if bias is None else bias.unsqueeze(1)


def token_mlp_fwd(z, w1, b1, w2, b2):
    (B, _, C), R, N = z.shape, w1.shape[0], w2.shape[0]
    b1, b2 = _column(b1, R, z), _column(b2, N, z)
    y, hidden = z.new_empty((B, N, C)), z.new_empty((R, C))
    for z_b, y_b in zip(z, y):
        torch.addmm(b1, w1, z_b, out=hidden)
        torch.ops.aten.gelu_(hidden)
        torch.addmm(b2, w2, hidden, out=y_b)
    return y


def token_mlp_bwd(dy, z, w1, b1, w2):
    C, R = z.shape[2], w1.shape[0]
    b1 = _column(b1, R, z)
    wide = accumulation_dtype(z.dtype)
    dz = z.new_empty(z.shape)
    dw1, db1, dw2 = (torch.zeros(shape, dtype=wide) for shape in (w1.shape, (R,), w2.shape))
    pre, hidden, dhidden = (z.new_empty((R, C)) for _ in range(3))
    for z_b, dy_b, dz_b in zip(z, dy, dz):
        torch.addmm(b1, w1, z_b, out=pre)
        torch.ops.aten.gelu.out(pre, out=hidden)
        torch.mm(w2.t(), dy_b, out=dhidden)
        _add_product(dw2, dy_b, hidden.t())
        dpre = torch.ops.aten.gelu_backward.grad_input(dhidden, pre, grad_input=hidden)
        torch.mm(w1.t(), dpre, out=dz_b)
        _add_product(dw1, dpre, z_b.t())
        db1 += dpre.sum(dim=1, dtype=wide)
    db2 = dy.sum(dim=(0, 2), dtype=wide)
    return dz, dw1.to(w1.dtype), db1.to(w1.dtype), dw2.to(w2.dtype), db2.to(w2.dtype)


def _add_product(total, a, b):
    """total += a b, in total's dtype (the product of low precision factors is rounded once an image)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
