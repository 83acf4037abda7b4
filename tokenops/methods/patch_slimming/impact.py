"""The impact score: how much a patch's features reach the final layer's effective outputs, over all paths of heads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.attention import heads_of
from .blocks import check_model, embed_tokens, rows_of, run_dense, slim_block, with_class
from .counts import counts_for


def attention_matrix(attention: Any, x: Tensor, n_out: int) -> Tensor:
    """P = softmax(q k^T scale) of the first rows in fp64, ``(B, H, n_out, n_in)``."""
    q, k, _ = heads_of(attention, x, n_out)
    if getattr(attention, "qk_mask", None) is not None:
        q = q * attention.qk_mask.unsqueeze(1)
    return torch.softmax(q.double() @ k.double().transpose(2, 3) * attention.scale, dim=3)


def impact(blocks: Sequence[Any], z: Tensor, layer: int, counts: Sequence[int], order: Tensor) -> Tensor:
    """`impact_scores` from the tokens ``z (B, 1+N, C)`` that go into block ``layer`` (from 1)."""
    block = blocks[layer - 1]
    weights = attention_matrix(block.attn, block.norm1(z), z.shape[1])
    energy = (weights @ z.abs().double().unsqueeze(1)).square().sum(3).mean(1)

    x = rows_of(block(z), order)
    paths = []
    for later, n in zip(blocks[layer:], counts[layer:]):
        paths.append(attention_matrix(later.attn, later.norm1(x), n))
        x = slim_block(later, x, n)

    # rows and columns of G are the tokens alive, so that masks are slices
    G = torch.eye(counts[-1], dtype=torch.float64, device=z.device)
    reach = torch.ones_like(energy)
    for k, P in reversed(list(enumerate(paths))):
        H, flat, through = P.shape[1], P.flatten(1, 2), (G.unsqueeze(-3) @ P).flatten(1, 2)
        if k == 0:  # the diagonal is all that is asked for
            reach = (flat * through).sum(1) / H
        else:
            G = flat.transpose(1, 2) @ through / H
    rows = with_class(order).expand_as(reach)
    reach = torch.zeros_like(reach).scatter(1, rows, reach) if paths else reach
    return (energy * reach)[:, 1:]


@torch.no_grad()
def impact_scores(
    model: nn.Module, images: Tensor, layer: int, counts: Sequence[int], order: Tensor | None = None
) -> Tensor:
    r"""Impact of every patch in one layer on the outputs the last layer keeps, for each image.

    .. math:: s_{t,i} = \mathrm{mean}_{paths} \|A_t[:, i]\, U_t[i, :]\|_F^2, \quad
        A_t = \prod_{l=t+1}^{L} \mathrm{diag}(m_l) P_l^{h_l}, \quad U_t^h = P_t^h |Z_{t-1}|

    The mean over the :math:`H^{L-t}` paths of heads is exact, by the recursion :math:`G_L = I`,
    :math:`G_{k-1} = \mathrm{mean}_h P_k^{hT} m_k G_k m_k P_k^h`, then :math:`s_{t,i} = (G_t)_{ii}\,
    \mathrm{mean}_h \sum_c (U_t^h)_{ic}^2`. The paper sums over the heads instead: a constant factor. All in fp64.

    Layers up to t are dense, those behind it slim. Use it in eval mode.

    Args:
        model: a dense VisionTransformer of timm.
        images: ``(B, 3, height, width)``.
        layer: t, from 1 to L.
        counts: tokens per layer, class token included; those of layers up to t are not used.
        order: patch positions, the longest-lived first, ``(N,)`` or per image ``(B, N)``; None is row by row.

    Returns:
        ``(B, N)`` fp64. The static method takes the mean over the images.

    Source: Tang et al. (CVPR 2022), theorem 1 and equation 6 [P]; the recursion is a re-implementation's [D].
    """
    check_model("impact_scores", model)
    m: Any = model
    if not 1 <= layer <= len(m.blocks):
        raise ValueError(f"layer={layer}, but it must be 1 to {len(m.blocks)}, the number of blocks")
    z = embed_tokens(m, images)
    counts = checked_for(m, counts)
    order = torch.arange(z.shape[1] - 1, device=z.device) if order is None else order
    return impact(m.blocks, run_dense(m.blocks[: layer - 1], z), layer, counts, order)


def checked_for(model: Any, counts: Sequence[int]) -> tuple[int, ...]:
    """Counts that fit a model: one for each block, no more than it has tokens."""
    grid = model.patch_embed.grid_size
    return counts_for(counts, grid[0] * grid[1], len(model.blocks))
