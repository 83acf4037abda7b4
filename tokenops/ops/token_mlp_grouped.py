"""token_mlp as torch's matrix products of some images at a time: the hidden activations never exist as a whole."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .reference import accumulation_dtype


def groups(together: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' images, so many at a time."""
    if 0 < tensors[0].shape[0] <= together:
        return iter((tensors,))
    return zip(*(t.split(together) for t in tensors)) if tensors[0].shape[0] else iter(())


def each(weight: Tensor, images: Tensor) -> Tensor:
    """The same weight for each image, without a copy."""
    return weight.expand(images.shape[0], -1, -1)


def token_mlp_bwd(
    dy: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    together: int,
    activations: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of z, w1, b1, w2 and b2.

    `activations(z, hidden, gradient)` computes the hidden activations of some images again, into `hidden`, takes
    `gradient`, which is theirs, to that of what the GELU was applied to, and returns its sum, b1's gradient.
    """
    (B, M, C), (N, R) = z.shape, w2.shape
    wide = accumulation_dtype(z.dtype)
    dz = z.new_empty(z.shape)
    # dw1 is summed transposed: rows of M numbers may lie anywhere, on a GPU those of R are mostly aligned
    dw1, db1, dw2 = (z.new_zeros(shape, dtype=wide) for shape in ((M, R), (R,), (N, R)))
    buffers = [z.new_empty((min(B, together), R, C)) for _ in range(2)]
    for z_g, dy_g, dz_g in groups(together, z, dy, dz):
        hidden, gradient = (buffer[: z_g.shape[0]] for buffer in buffers)
        torch.bmm(each(w2.t(), dy_g), dy_g, out=gradient)
        db1 += activations(z_g, hidden, gradient)
        torch.bmm(each(w1.t(), gradient), gradient, out=dz_g)
        _add_products(dw1, z_g, gradient.transpose(1, 2))
        _add_products(dw2, dy_g, hidden.transpose(1, 2))
    db2 = dy.sum(dim=(0, 2), dtype=wide)
    return dz, dw1.t().to(w1.dtype).contiguous(), db1.to(w1.dtype), dw2.to(w2.dtype), db2.to(w2.dtype)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += the sum of a b over the images, in total's dtype (low precision products are rounded once an image)."""
    if total.dtype == a.dtype and total.device.type == "cpu":  # on a GPU that is a launch an image
        total.addbmm_(a, b)
    else:
        total += torch.bmm(a, b).sum(dim=0, dtype=total.dtype)
