"""restore_tokens: the processed half of the tokens goes back among the others (Evo-ViT's slow-fast updating)."""

import pytest
import torch

from comparison import PASSES, SIZES, nbytes
from tokenops import reference, restore_tokens


def ours(base, tokens, index, fast, rest):
    return restore_tokens(base, tokens, index, prefix=1)


def plain(base, tokens, index, fast, rest):
    return reference.restore_tokens(base, tokens, index, prefix=1)


def scatter(base, tokens, index, fast, rest):
    rows = (index + 1).unsqueeze(-1).expand(-1, -1, base.shape[2])
    return torch.cat((tokens[:, :1], base.scatter(1, rows, tokens[:, 1:])[:, 1:]), dim=1)


def published(base, tokens, index, fast, rest):
    """Evo-ViT: the others behind the processed ones, and all gathered back into the order of their indices."""
    order = torch.cat((index, rest), dim=1).argsort(dim=1) + 1
    order = torch.cat((torch.zeros_like(order[:, :1]), order), dim=1).unsqueeze(-1)
    return torch.cat((tokens, fast), dim=1).gather(1, order.expand(-1, -1, base.shape[2]))


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_restore_tokens(bench, compare, size, passes):
    B, N, M, C = size.of(bench)

    def inputs():
        base, tokens = bench.random(B, 1 + N, C), bench.random(B, 1 + M, C)
        index, rest = torch.rand(B, N, device=bench.device).argsort(dim=1).split((M, N - M), dim=1)
        index, rest = index.contiguous(), rest.contiguous()
        fast = base[:, 1:].gather(1, rest.unsqueeze(-1).expand(-1, -1, C))
        return base, tokens, index, fast, rest

    base, tokens, index, fast, _ = inputs()
    forward = nbytes(tokens, index, fast, base)  # the rows that stay are read, all are written
    backward = nbytes(base, index, base, tokens)  # dy is read, dbase and dtokens are written
    peers = {"reference": plain, "scatter": scatter, "published": published}
    if bench.wants_compiled(size.main):
        peers["compiled"] = torch.compile(scatter, dynamic=False, fullgraph=True)
    compare(
        "restore_tokens",
        passes=passes,
        shape=dict(B=B, N=N, k=M, C=C),
        inputs=inputs,
        ours=ours,
        peers=peers,
        bytes=forward + (backward if passes != "forward" else 0),
        flops=0,
    )
