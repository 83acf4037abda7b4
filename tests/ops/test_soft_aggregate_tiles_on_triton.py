"""soft_aggregate on Triton: the tiles it takes for other sizes, and what it does not read."""

import pytest
import torch

import tokenops
from support.aggregation import delta_terms, inputs, run
from support.cases import Aggregate
from support.tolerance import assert_as_good_as_plain
from tokenops import reference

#: images, tokens, slots and channels for which the Triton kernels take other tiles, or several
TILES = ((5, 40, 66, 80), (5, 18, 140, 33), (1, 260, 18, 24), (1, 18, 260, 24))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sizes", TILES, ids=str)
def test_other_tiles_as_good_as_plain(sizes, dtype, device):
    pytest.importorskip("triton")
    B, N, M, C = sizes
    x, w, scale, mask = inputs(Aggregate(B, N, M, C, 1, ""), dtype, device, mask=N == 40)
    dy = torch.randn(B, 1 + M, C, device=device).to(dtype)

    def of(operator):
        return lambda x, w, s: operator.soft_aggregate(x, w, scale=s, mask=mask, prefix=1)

    with tokenops.use_backend("triton"):
        ours = run(of(tokenops), (x, w, scale), dy)
    double = [t.double() for t in (x, w, scale)]
    plain, exact = run(of(reference), (x, w, scale), dy), run(of(reference), double, dy.double())
    for what, a, b, truth in zip(("y", "dx", "dw"), ours, plain, exact):
        assert_as_good_as_plain(a, b, truth, what, delta_terms(dy, exact[0]) if what == "dw" else 0.0)


def test_dscale_of_many_tiles(device):
    """D comes from the rounded y where the tokens are not one tile: its error must not reach the scale."""
    pytest.importorskip("triton")
    errors = {"ours": 0.0, "plain": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        x, w = torch.randn(1, 260, 16, device=device), 2 * torch.randn(1, 260, 3, device=device) + 20
        tensors, dy = (
            [t.bfloat16() for t in (x, w, torch.tensor(1.25, device=device))],
            torch.randn(1, 3, 16, device=device),
        )

        def dscale(operator, tensors, dy=dy):
            return run(lambda x, w, s: operator.soft_aggregate(x, w, scale=s), tensors, dy.to(tensors[0]))[3].double()

        truth = dscale(reference, [t.double() for t in tensors], dy.bfloat16())
        with tokenops.use_backend("triton"):
            errors["ours"] += (dscale(tokenops, tensors) - truth).abs().item()
        errors["plain"] += (dscale(reference, tensors) - truth).abs().item()
    assert errors["ours"] <= 2 * errors["plain"]


@pytest.mark.parametrize("prefix", (0, 1))
@pytest.mark.parametrize("poisoned", (False, True), ids=("", "beside a slot of NaN"))
def test_masked_tokens_may_hold_anything(poisoned, prefix, device):
    """NaN in the tokens and logits that are left out is not read: all is as if these tokens were not there."""
    pytest.importorskip("triton")
    x, w = torch.randn(2, prefix + 40, 24, device=device), torch.randn(2, 40, 7, device=device)
    mask = torch.zeros(2, 40, dtype=torch.bool, device=device)
    mask[:, 1::3] = True
    x[:, prefix:][~mask], w[~mask] = float("nan"), float("nan")
    if poisoned:
        w[0, 1, 3] = float("nan")  # of a token that counts: its slot is NaN
    scale, dy = torch.tensor(0.8, device=device), torch.randn(2, prefix + 7, 24, device=device)
    kept = torch.cat((torch.ones(2, prefix, dtype=torch.bool, device=device), mask), dim=1)
    with tokenops.use_backend("triton"):
        ours = run(lambda x, w, s: tokenops.soft_aggregate(x, w, scale=s, mask=mask, prefix=prefix), (x, w, scale), dy)
    without = [t[k].unflatten(0, (2, -1)) for t, k in ((x, kept), (w, mask))]
    function = reference.soft_aggregate
    y, dx, dw, dscale = run(lambda x, w, s: function(x, w, scale=s, prefix=prefix), (*without, scale), dy)
    torch.testing.assert_close(ours[0], y, equal_nan=True)
    torch.testing.assert_close(ours[1][kept], dx.flatten(0, 1), equal_nan=True)
    torch.testing.assert_close(ours[2][mask], dw.flatten(0, 1), equal_nan=True)
    torch.testing.assert_close(ours[3], dscale, equal_nan=True)
    assert (ours[1][~kept] == 0).all() and (ours[2][~mask] == 0).all()
