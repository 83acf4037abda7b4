"""select_tokens: the better half of the tokens, compact, and what pruning methods make of the others."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from comparison import PASSES, SIZES, nbytes
from tokenops import reference, select_tokens


def ours(x, scores, weight, bias, *, k, rest, norm):
    chosen = select_tokens(
        x, scores, k, rest=rest, normalize=False, order="index", norm=(weight, bias, 1e-6) if norm else None
    )
    return (chosen.tokens, chosen.normed) if norm else chosen.tokens


def plain(x, scores, weight, bias, *, k, rest, norm):
    tokens, _, _, normed, _ = reference.select_tokens(
        x, scores, k, rest=rest, normalize=False, order="index", norm=(weight, bias, 1e-6) if norm else None
    )
    return (tokens, normed) if norm else tokens


def gathered(x, index):
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def topk(x, scores, weight, bias, *, k, rest, norm):
    """topk, sort, gather, cat; the rest by a mask; the norm by torch's."""
    index = scores.topk(k, dim=1).indices.sort(dim=1).values
    parts = [x[:, :1], gathered(x[:, 1:], index)]
    if rest == "weighted":
        others = scores.scatter(1, index, 0.0).to(x.dtype)
        parts.append(torch.bmm(others.unsqueeze(1), x[:, 1:]))
    tokens = torch.cat(parts, dim=1)
    return (tokens, F.layer_norm(tokens, tokens.shape[-1:], weight, bias, 1e-6)) if norm else tokens


def published(x, scores, weight, bias, *, k, rest, norm):
    """EViT's way: the places that are not kept are sorted out, gathered, weighted and summed; sorted to compare."""
    index = scores.topk(k, dim=1).indices.sort(dim=1).values
    parts = [x[:, :1], gathered(x[:, 1:], index)]
    if rest == "weighted":
        places = torch.arange(scores.shape[1], device=x.device).expand(scores.shape)
        left = places.scatter(1, index, 0).sort(dim=1).values[:, k:]
        weights = scores.gather(1, left).unsqueeze(-1).to(x.dtype)
        parts.append((gathered(x[:, 1:], left) * weights).sum(dim=1, keepdim=True))
    tokens = torch.cat(parts, dim=1)
    return (tokens, F.layer_norm(tokens, tokens.shape[-1:], weight, bias, 1e-6)) if norm else tokens


def asked(bench, size, what, passes):
    """What the rest and the norm add is measured at the main size."""
    return size.main or bench.quick or what == "none"


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("what", ["none", "weighted", "weighted+norm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_select_tokens(bench, compare, size, what, passes):
    B, N, k, C = size.of(bench)
    rest, _, norm = what.partition("+")
    options = dict(k=k, rest=rest, norm=bool(norm))

    def inputs():
        scores = torch.rand(B, N, device=bench.device) / N  # fp32, as attention gives them
        # the first place is always kept, so that the published way's complement, by zeros, is one
        scores[:, 0] = 1.0
        weight, bias = torch.rand(C, device=bench.device), torch.rand(C, device=bench.device)
        return bench.random(B, 1 + N, C), scores, weight.to(bench.dtype), bias.to(bench.dtype)

    x, scores, *_ = inputs()
    rows = x[:, : 1 + k + bool(norm or rest != "none")]
    read = x if rest != "none" else rows
    forward = nbytes(read, scores) + nbytes(rows) * (1 + bool(norm))
    backward = nbytes(rows) * (1 + bool(norm)) + nbytes(x) + (nbytes(x) // 2 if rest != "none" else 0)
    peers = {"reference": partial(plain, **options), "topk": partial(topk, **options)}
    if rest != "none":
        peers["published"] = partial(published, **options)
    if bench.wants_compiled(size.main):
        peers["compiled"] = torch.compile(partial(topk, **options), dynamic=False, fullgraph=True)
    compare(
        f"select_tokens {what}",
        passes=passes,
        shape=dict(B=B, N=N, k=k, C=C),
        inputs=inputs,
        ours=partial(ours, **options),
        peers=peers,
        bytes=forward + (backward if passes != "forward" else 0),
        flops=0,
    )
