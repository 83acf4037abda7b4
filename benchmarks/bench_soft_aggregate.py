"""soft_aggregate and soft_scatter: SiT's token slimming with its class token, and its soft way back."""

import pytest
import torch

from comparison import PASSES, SIZES, nbytes
from tokenops import reference, soft_aggregate, soft_scatter


def aggregate_ours(x, w, scale):
    return soft_aggregate(x, w, scale=scale, prefix=1)


def aggregate_plain(x, w, scale):
    return reference.soft_aggregate(x, w, scale=scale, prefix=1)


def aggregate_published(x, w, scale):
    """SiT: the class token cut off, softmax over the tokens, transposed product, the class token put in front again."""
    first, tokens = x[:, :1], x[:, 1:]
    a = torch.softmax(w * scale, dim=1).transpose(2, 1)
    return torch.cat((first, torch.bmm(a, tokens)), dim=1)


def scatter_ours(z, w, scale):
    return soft_scatter(z, w, scale=scale)


def scatter_plain(z, w, scale):
    return reference.soft_scatter(z, w, scale=scale)


def scatter_naive(z, w, scale):
    return torch.bmm(torch.softmax(w * scale, dim=2), z)


#: operator -> ours, the specification, and how one writes it (for the first: how SiT's authors did)
WAYS = {
    "soft_aggregate": (aggregate_ours, aggregate_plain, "published", aggregate_published),
    "soft_scatter": (scatter_ours, scatter_plain, "naive", scatter_naive),
}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", WAYS)
def test_soft_aggregate(bench, compare, operator, size, passes):
    B, N, M, C = size.of(bench)
    rows_in, rows_out = (1 + N, 1 + M) if operator == "soft_aggregate" else (M, N)

    def inputs():
        return bench.random(B, rows_in, C), bench.random(B, N, M), bench.random(1)

    x, w, _ = inputs()
    y = x.new_empty(B, rows_out, C)
    forward, backward = nbytes(x, w, y), nbytes(y, x, w, x, w)  # backward reads dy, x, w and writes dx, dw
    product = 2 * B * N * M * C  # one forward, two backward
    ours, plain, written, as_written = WAYS[operator]
    peers = {"reference": plain, written: as_written}
    if bench.wants_compiled(size.main):
        peers["compiled"] = torch.compile(as_written, dynamic=False, fullgraph=True)
    compare(
        operator,
        passes=passes,
        shape=dict(B=B, N=N, M=M, C=C),
        inputs=inputs,
        ours=ours,
        peers=peers,
        bytes=forward + (backward if passes != "forward" else 0),
        flops=product * (1 if passes == "forward" else 3),
    )
