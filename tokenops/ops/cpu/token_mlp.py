"""token_mlp on a CPU: compiled code for bfloat16 where the machine has AMX; else torch's own products and GELU, so few
images at a time that they stay in cache."""

import torch

from .. import native, token_mlp_grouped
from ..reference import accumulation_dtype
from ..token_mlp_grouped import each, groups

#: images whose hidden activations exist together: enough to occupy the cores, few enough to stay in cache
TOGETHER = 4

_kernels = torch.ops.tokenops


def _on_tiles(z, w1, w2):
    return (
        z.dtype == torch.bfloat16
        and native.attention_isa(z.dtype) == "amx"
        and min(z.numel(), w1.numel(), w2.numel()) > 0
    )


def _column(bias, rows, like):
    """A bias along the tokens, shaped to be added to (images, rows, C)."""
    return like.new_zeros((1, rows, 1)) if bias is None else bias.reshape(1, rows, 1)


def token_mlp_fwd(z, w1, b1, w2, b2):
    if _on_tiles(z, w1, w2):
        return _kernels.token_mlp_tiles_fwd(z, w1, b1, w2, b2)
    (B, _, C), R, N = z.shape, w1.shape[0], w2.shape[0]
    b1, b2 = _column(b1, R, z), _column(b2, N, z)
    y, buffer = z.new_empty((B, N, C)), z.new_empty((min(B, TOGETHER), R, C))
    for z_g, y_g in groups(TOGETHER, z, y):
        hidden = buffer[: z_g.shape[0]]
        torch.baddbmm(b1, each(w1, z_g), z_g, out=hidden)
        torch.ops.aten.gelu_(hidden)
        torch.baddbmm(b2, each(w2, z_g), hidden, out=y_g)
    return y


def token_mlp_bwd(dy, z, w1, b1, w2):
    if _on_tiles(z, w1, w2):
        return _kernels.token_mlp_tiles_bwd(dy, z, w1, b1, w2)
    (B, _, C), R = z.shape, w1.shape[0]
    b1, buffer = _column(b1, R, z), z.new_empty((min(B, TOGETHER), R, C))

    def activations(z_g, hidden, gradient):
        pre = torch.baddbmm(b1, each(w1, z_g), z_g, out=buffer[: z_g.shape[0]])
        torch.ops.aten.gelu.out(pre, out=hidden)
        torch.ops.aten.gelu_backward.grad_input(gradient, pre, grad_input=gradient)
        return gradient.sum(dim=(0, 2), dtype=accumulation_dtype(z.dtype))

    return token_mlp_grouped.token_mlp_bwd(dy, z, w1, w2, TOGETHER, activations)
