"""merge_neighbours: half of a 14 x 14 grid's tokens, by every kind of weights; and with the norm that follows."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from comparison import PASSES, SIZES, nbytes
from tokenops import merge_neighbours, reference

GRIDS = {True: (4, 6), False: (14, 14)}  # by bench.quick
KINDS = ("average", "channels", "logits", "average+norm")


def weights_of(kind, first, second, logits):
    return {"average": None, "channels": (first, second), "logits": logits}[kind]


def ours(x, first, second, logits, weight, bias, *, grid, axis, kind, norm, merge=merge_neighbours):
    return merge(x, grid, axis, weights_of(kind, first, second, logits), norm=(weight, bias, 1e-6) if norm else None)


def eager(x, first, second, logits, weight, bias, *, grid, axis, kind, norm):
    """Strided slices, weighted and added in the tokens' dtype, behind the class token."""
    dim = 2 if axis == "horizontal" else 1
    a, b = x[:, 1:].unflatten(1, grid).unflatten(dim, (-1, 2)).unbind(dim + 1)
    if kind == "average":
        y = (a + b) * 0.5
    elif kind == "channels":
        y = first.to(x.dtype) * a + second.to(x.dtype) * b
    else:
        one, other = logits.unflatten(1, grid).unflatten(dim, (-1, 2)).softmax(dim + 1).to(x.dtype).unbind(dim + 1)
        y = one.unsqueeze(-1) * a + other.unsqueeze(-1) * b
    y = torch.cat((x[:, :1], y.flatten(1, 2)), dim=1)
    return (y, F.layer_norm(y, y.shape[-1:], weight, bias, 1e-6)) if norm else y


def asked(bench, size, kind, axis, passes):
    """Kinds and axes are compared at the main size; the others show how an average scales."""
    return size.main or bench.quick or (kind, axis) == ("average", "horizontal")


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("axis", ("horizontal", "vertical"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merge_neighbours(bench, compare, size, kind, axis, passes):
    B, _, _, C = size.of(bench)
    grid = GRIDS[bench.quick]
    name, _, norm = kind.partition("+")
    options = dict(grid=grid, axis=axis, kind=name, norm=bool(norm))
    N = grid[0] * grid[1]

    def inputs():
        channels = [(torch.rand(C, device=bench.device) + 0.5).to(bench.dtype) for _ in range(2)]
        weights = [torch.rand(C, device=bench.device) for _ in range(2)]
        return bench.random(B, 1 + N, C), *weights, torch.randn(B, N, device=bench.device), *channels

    x = inputs()[0]
    y = x[:, : 1 + N // 2]
    forward = nbytes(x) + nbytes(y) * (1 + bool(norm))
    backward = nbytes(y) * (1 + bool(norm)) + nbytes(x) * (1 if name == "average" else 2)
    peers = {
        "reference": partial(ours, **options, merge=reference.merge_neighbours),
        "eager": partial(eager, **options),
    }
    if bench.wants_compiled(size.main):
        peers["compiled"] = torch.compile(partial(eager, **options), dynamic=False, fullgraph=True)
    compare(
        f"merge_neighbours {axis} {kind}",
        passes=passes,
        shape=dict(B=B, H=grid[0], W=grid[1], C=C),
        inputs=inputs,
        ours=partial(ours, **options),
        peers=peers,
        bytes=forward + (backward if passes != "forward" else 0),
        flops=0,
    )
