"""merge_bipartite: token merging's matching and merge in one call, and with the norm that follows."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from comparison import PASSES, SIZES, nbytes
from published.vit import merge_as_published
from tokenops import match_bipartite, merge_bipartite, reference

R = {True: 3, False: 13}  # by bench.quick


def ours(x, metric, sizes, weight, bias, *, r, norm):
    merged = merge_bipartite(x, metric, r, sizes=sizes, norm=(weight, bias, 1e-6) if norm else None)
    return (merged.normed if norm else merged.tokens), merged.sizes


def as_reference(x, metric, sizes, weight, bias, *, r, norm, match=reference.match_bipartite):
    index = match(metric.detach(), r)
    given = (weight, bias, 1e-6) if norm else None
    y, totals, _, normed = reference.merge_bipartite(x, index, x.shape[1] - 1 - r, sizes=sizes, norm=given)
    return (normed if norm else y), totals


def as_matched(metric, r):
    """By the kernel's own matching: in fp64 another of two equal cosines may be the larger one."""
    return match_bipartite(metric.float(), r)


def published(x, metric, sizes, weight, bias, *, r, norm):
    y, size = merge_as_published(metric.detach().float(), r, x, sizes.to(x.dtype).unsqueeze(2))
    return (F.layer_norm(y, y.shape[-1:], weight, bias, 1e-6) if norm else y), size.squeeze(2).float()


def asked(bench, size, norm, passes):
    """What the norm adds is measured at the main size."""
    return size.main or bench.quick or not norm


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merge_bipartite(bench, compare, size, norm, passes):
    B, N, _, C = size.of(bench)
    options, D = dict(r=R[bench.quick], norm=norm), 64

    def inputs():
        sizes = torch.randint(1, 4, (B, 1 + N), device=bench.device)  # integers: no gradient is asked for
        channels = [(torch.rand(C, device=bench.device) + 0.5).to(bench.dtype) for _ in range(2)]
        return bench.random(B, 1 + N, C), torch.randn(B, 1 + N, D, device=bench.device), sizes.float(), *channels

    x, metric, sizes, *_ = inputs()
    y = x[:, options["r"] :]
    forward = nbytes(x, metric, sizes) + nbytes(y) * (1 + norm)
    peers = {"reference": partial(as_reference, **options), "published": partial(published, **options)}
    if bench.wants_compiled(size.main):
        peers["compiled"] = torch.compile(partial(published, **options), dynamic=False, fullgraph=True)
    compare(
        "merge_bipartite" + " norm" * norm,
        passes=passes,
        shape=dict(B=B, N=N, r=options["r"], C=C, D=D),
        inputs=inputs,
        ours=partial(ours, **options),
        peers=peers,
        bytes=forward + (nbytes(y) * (1 + norm) + nbytes(x) if passes != "forward" else 0),
        flops=B * 2 * D * (N // 2) ** 2,
        truth=partial(as_reference, **options, match=as_matched),
    )
