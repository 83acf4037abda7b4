"""Calls of every operator as a function of tensors, for what all of them have in common."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import tokenops

B, N, C = 2, 6, 24  # rows of 48 bytes in fp16 and bf16
GRID = (2, 3)


def attended(scores, heads, q, k, v, bias, qk_mask, v_mask):
    return tokenops.masked_channel_attention(
        q, k, v, qk_mask=qk_mask, v_mask=v_mask, key_bias=bias, key_lengths=torch.tensor([N, 4], device=q.device),
        scores=scores, heads=heads, return_lse=True, return_key_mean=True,
    )  # fmt: skip


def selected(rest, normalize, x, scores, companion, weight, bias):
    counts = torch.tensor([3, 2], device=x.device) if rest == "mean" else None
    chosen = tokenops.select_tokens(
        x, scores, 3, prefix=1, rest=rest, normalize=normalize, companions=(companion,), norm=(weight, bias, 1e-5),
        counts=counts,
    )  # fmt: skip
    return chosen.tokens, chosen.normed, *chosen.companions


def shifted(x, bias):
    """Norms that have a bias alone."""
    norm, scores = (None, bias, 1e-5), torch.arange(2.0 * N, device=x.device).cos().reshape(B, N)
    chosen = tokenops.select_tokens(x, scores, 3, norm=norm, prefix=0).normed
    y = tokenops.merge_neighbours(x, GRID, "vertical", prefix=0, norm=norm)[1]
    return chosen, y, tokenops.merge_bipartite(x, x.detach(), 2, prefix=0, norm=norm).normed


def restored(base, tokens, old, new):
    index = torch.tensor([[4, 2], [0, 1], [-1, 5]], device=base.device).t()
    y, (companion,) = tokenops.restore_tokens(base, tokens, index, companions=((old, new),))
    return y, companion


def sizes(x):
    return torch.tensor([[1.0, 1], [2, 1], [0, 1], [0, 1], [3, 1], [1, 1]], device=x.device).t()


def merged(x, logits, first, second, weight, bias):
    y, normed = tokenops.merge_neighbours(x, GRID, "horizontal", (first, second), prefix=0, norm=(weight, bias, 1e-5))
    return y, normed, tokenops.merge_neighbours(x, GRID, "vertical", logits, prefix=0, sizes=sizes(x))[0]


def merged_bipartite(x, weight, bias):
    y = tokenops.merge_bipartite(x, x.detach(), 2, prefix=0, sizes=1 + sizes(x), norm=(weight, bias, 1e-5))
    return y.tokens, y.normed


def unmerged(y):
    return tokenops.unmerge_bipartite(y, torch.tensor([[1, 0, 2, 2], [0, 0, 1, 1]], device=y.device), prefix=1)


def summed(x):
    metric = torch.arange(2.0 * N * C, device=x.device).cos().reshape(2, N, C)
    merge, _ = tokenops.tome.bipartite_soft_matching(metric, 2)
    return merge(x, mode="sum")


def masked(x, w, scale):
    mask = torch.arange(N, device=x.device)[:, None] < torch.tensor([6, 4], device=x.device)
    return tokenops.soft_aggregate(x, w, scale=scale, mask=mask.t())


def packed(x, w, scale):
    """Sequences of 3, 0, 1 and 6 rows, and 2 rows of none."""
    ends = torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32, device=x.device)
    mask = torch.arange(12, device=x.device) != 2
    return tokenops.soft_aggregate(x, w, scale=scale, mask=mask, prefix=1, cu_seqlens=ends, max_seqlen=7)


class Call(NamedTuple):
    operator: str
    function: object
    #: of what it is differentiated in, and how many of the first of them have images
    shapes: tuple[tuple[int, ...], ...]
    images: int

    def of(self, *tensors):
        """The results that have gradients, as a tuple."""
        y = self.function(*tensors)
        return (y,) if isinstance(y, Tensor) else tuple(y)


ATTENDED = ((B, 2, 3, C), (B, 2, N, C), (B, 2, N, 5), (B, 2, 1, N), (2, C), (2, 5))
SELECTED = ((B, 1 + N, C), (B, N), (B, N), (C,), (C,))
CALLS = {
    "soft_aggregate": Call("soft_aggregate", masked, ((B, N, C), (B, N, 3), (1,)), 2),
    "soft_aggregate without a scale": Call(
        "soft_aggregate", partial(tokenops.soft_aggregate, prefix=1), ((B, 1 + N, C), (B, N, 3)), 2
    ),
    "soft_aggregate, packed": Call("soft_aggregate", packed, ((12, C), (12, 3), (1,)), 2),
    "soft_scatter": Call(
        "soft_scatter", lambda z, w, s: tokenops.soft_scatter(z, w, scale=s), ((B, 3, C), (B, N, 3), (1,)), 2
    ),
    "token_mlp": Call("token_mlp", tokenops.token_mlp, ((B, N, C), (5, N), (5,), (3, 5), (3,)), 1),
    "attention": Call("masked_channel_attention", partial(attended, "class", "mean"), ATTENDED, 4),
    "attention, received": Call("masked_channel_attention", partial(attended, "received", "each"), ATTENDED, 4),
    "attention alone": Call(
        "masked_channel_attention", tokenops.masked_channel_attention, ((B, 2, 3, C), *[(B, 2, N, C)] * 2), 3
    ),
    "select_tokens, none": Call("select_tokens", partial(selected, "none", True), SELECTED, 3),
    "select_tokens, mean": Call("select_tokens", partial(selected, "mean", True), SELECTED, 3),
    "select_tokens, weighted": Call("select_tokens", partial(selected, "weighted", True), SELECTED, 3),
    "select_tokens, summed": Call("select_tokens", partial(selected, "weighted", False), SELECTED, 3),
    "a norm's bias alone": Call("select_tokens", shifted, ((B, N, C), (C,)), 1),
    "restore_tokens": Call("restore_tokens", restored, ((B, 1 + N, C), (B, 3, C), (B, N), (B, 3)), 4),
    "merge_neighbours": Call("merge_neighbours", merged, ((B, N, C), (B, N), (C,), (1,), (C,), (C,)), 2),
    "merge_bipartite": Call("merge_bipartite", merged_bipartite, ((B, N, C), (C,), (C,)), 1),
    "unmerge_bipartite": Call("unmerge_bipartite", unmerged, ((B, 4, C),), 1),
    "tome's sum": Call("unmerge_bipartite", summed, ((B, N, C),), 1),
}
#: made of torch's own operators
UNMERGED = Call(
    "unmerge_neighbours",
    lambda x: tokenops.unmerge_neighbours(x, (3, 4), ("horizontal", "vertical"), prefix=0, mode="bilinear"),
    ((B, 4, C),),
    1,
)
