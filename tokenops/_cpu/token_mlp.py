"""token_mlp on a CPU: matrix products a few images at a time, so that the hidden activations never exist as a whole."""

import torch

from ..reference import accumulation_dtype

#: images whose hidden activations exist together: enough to occupy the cores, few enough to stay in cache
TOGETHER = 4


def _column(bias, rows, like):
    """A bias along the tokens, shaped to be added to (images, rows, C)."""
    return like.new_zeros((1, rows, 1)) if bias is None else bias.reshape(1, rows, 1)


def _groups(*tensors):
    return zip(*(t.split(TOGETHER) for t in tensors)) if tensors[0].shape[0] else ()


def _each(weight, images):
    """The same weight for each image, without a copy."""
    return weight.expand(images.shape[0], -1, -1)


def token_mlp_fwd(z, w1, b1, w2, b2):
    (B, _, C), R, N = z.shape, w1.shape[0], w2.shape[0]
    b1, b2 = _column(b1, R, z), _column(b2, N, z)
    y, buffer = z.new_empty((B, N, C)), z.new_empty((min(B, TOGETHER), R, C))
    for z_g, y_g in _groups(z, y):
        hidden = buffer[: z_g.shape[0]]
        torch.baddbmm(b1, _each(w1, z_g), z_g, out=hidden)
        torch.ops.aten.gelu_(hidden)
        torch.baddbmm(b2, _each(w2, z_g), hidden, out=y_g)
    return y


def token_mlp_bwd(dy, z, w1, b1, w2):
    (B, _, C), R = z.shape, w1.shape[0]
    b1 = _column(b1, R, z)
    wide = accumulation_dtype(z.dtype)
    dz = z.new_empty(z.shape)
    dw1, db1, dw2 = (torch.zeros(shape, dtype=wide) for shape in (w1.shape, (R,), w2.shape))
    buffers = [z.new_empty((min(B, TOGETHER), R, C)) for _ in range(3)]
    for z_g, dy_g, dz_g in _groups(z, dy, dz):
        pre, hidden, dhidden = (buffer[: z_g.shape[0]] for buffer in buffers)
        torch.baddbmm(b1, _each(w1, z_g), z_g, out=pre)
        torch.ops.aten.gelu.out(pre, out=hidden)
        torch.bmm(_each(w2.t(), dy_g), dy_g, out=dhidden)
        _add_products(dw2, dy_g, hidden.transpose(1, 2))
        dpre = torch.ops.aten.gelu_backward.grad_input(dhidden, pre, grad_input=hidden)
        torch.bmm(_each(w1.t(), dpre), dpre, out=dz_g)
        _add_products(dw1, dpre, z_g.transpose(1, 2))
        db1 += dpre.sum(dim=(0, 2), dtype=wide)
    db2 = dy.sum(dim=(0, 2), dtype=wide)
    return dz, dw1.to(w1.dtype), db1.to(w1.dtype), dw2.to(w2.dtype), db2.to(w2.dtype)


def _add_products(total, a, b):
    """total += the sum of a b over the images, in total's dtype (low precision products are rounded once an image)."""
    if total.dtype == a.dtype:
        total.addbmm_(a, b)
    else:
        total += torch.bmm(a, b).sum(dim=0, dtype=total.dtype)
