"""What corners must give, as numbers that anybody can check, on every backend."""

import math

import pytest
import torch

import tokenops
from tokenops import use_backend

NAN, INF = float("nan"), float("inf")
ENGINES = ("native", "composed", "triton", "reference")


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "composed":
        monkeypatch.setattr("tokenops.ops.native.attention_isa", lambda dtype: None)
    with use_backend("native" if request.param == "composed" else request.param):
        yield request.param


def close(ours, right):
    torch.testing.assert_close(ours, torch.tensor(right, dtype=ours.dtype), rtol=1e-5, atol=1e-6)


def test_a_masked_token_may_hold_anything(engine):
    """Two tokens count, with equal logits: y is their mean, and dscale is 0."""
    x = torch.tensor([[[1.0], [3.0], [NAN]]], requires_grad=True)
    w = torch.tensor([[[2.0], [2.0], [NAN]]], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    y = tokenops.soft_aggregate(x, w, scale=scale, mask=torch.tensor([[True, True, False]]))
    y.sum().backward()
    close(y, [[[2.0]]])
    close(x.grad, [[[0.5], [0.5], [0.0]]])
    close(w.grad, [[[-0.5], [0.5], [0.0]]])
    close(scale.grad, 0.0)


def test_a_key_without_weight_may_hold_anything(engine):
    """Keys 0 and ln 3 of width 1: probabilities 1/4 and 3/4; the third does not count."""
    q = torch.tensor([[[[1.0]]]], requires_grad=True)
    k = torch.tensor([[[[0.0], [math.log(3)], [NAN]]]], requires_grad=True)
    v = torch.tensor([[[[0.0], [4.0], [8.0]]]], requires_grad=True)
    bias = torch.tensor([[[[0.0, 0.0, -INF]]]], requires_grad=True)
    mask = torch.ones(1, 1, requires_grad=True)
    for scores in ("class", "received"):
        for t in (q, k, v, bias, mask):
            t.grad = None
        out, share, lse = tokenops.masked_channel_attention(
            q, k, v, key_bias=bias, qk_mask=mask, scale=1.0, scores=scores, return_lse=True
        )
        out.sum().backward()
        close(out, [[[[3.0]]]])
        close(share, [[[0.25, 0.75, 0.0]]])
        close(lse, [[[math.log(4)]]])
        close(q.grad, [[[[0.75 * math.log(3)]]]])  # dS = P (dP - D) = (-3/4, 3/4)
        close(k.grad, [[[[-0.75], [0.75], [0.0]]]])
        close(v.grad, [[[[0.25], [0.75], [0.0]]]])
        close(bias.grad, [[[[-0.75, 0.75, 0.0]]]])
        close(mask.grad, [[0.75 * math.log(3)]])


def test_the_gradient_of_a_score_without_weight_may_be_anything(engine):
    """That of an entropy is inf there. dP = (0, 1), D = 3/4, dS = (-3/16, 3/16)."""
    q = torch.tensor([[[[1.0]]]], requires_grad=True)
    k = torch.tensor([[[[0.0], [math.log(3)], [1.0]]]], requires_grad=True)
    bias = torch.tensor([[[[0.0, 0.0, -INF]]]], requires_grad=True)
    for scores in ("class", "received"):
        share = tokenops.masked_channel_attention(q, k, torch.zeros_like(k), key_bias=bias, scale=1.0, scores=scores)[1]
        dq, dk, dbias = torch.autograd.grad(share, (q, k, bias), torch.tensor([[[0.0, 1.0, INF]]]))
        close(dq, [[[[3 / 16 * math.log(3)]]]])
        close(dk, [[[[-3 / 16], [3 / 16], [0.0]]]])
        close(dbias, [[[[-3 / 16, 3 / 16, 0.0]]]])


@pytest.mark.parametrize("logits", ((200.0, 0.0), (NAN, 0.0), (-INF, 0.0), (INF, 0.0)))
def test_what_has_no_size_does_not_count(logits, engine):
    """Its logarithm is -inf, so its logit is, however large: the other one alone is left."""
    for flip in (False, True):
        order = slice(None, None, -1 if flip else 1)
        x = torch.tensor([[[5.0], [7.0]][order]], requires_grad=True)
        weights = torch.tensor([logits[order]], requires_grad=True)
        y, sizes = tokenops.merge_neighbours(
            x, (1, 2), "horizontal", weights, prefix=0, sizes=torch.tensor([[0.0, 2.0][order]])
        )
        y.sum().backward()
        close(y, [[[7.0]]])
        close(sizes, [[2.0]])
        close(x.grad, [[[0.0], [1.0]][order]])
        close(weights.grad, [[0.0, 0.0]])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_likeness_knows_no_size(dtype, engine):
    """(3, 4) / 5 and (5, 1) / sqrt 26 beside (1, 0): the second is more alike, whatever their lengths."""
    for scale in (1e-25, 1e-38, 1.0, 1e19, 1e37):
        metric = torch.tensor([[[1, 0], [1, 0], [3 * scale, 4 * scale], [5 * scale, 1 * scale]]], dtype=dtype)
        assert tokenops.match_bipartite(metric, 1, prefix=0).tolist() == [[1, 1, 0, 2]]


def test_a_token_of_no_size_that_nothing_goes_into(engine):
    x = torch.tensor([[[1.0], [NAN]]])
    merged = tokenops.merge_bipartite(x, torch.ones(1, 2, 1), 0, prefix=0, sizes=torch.tensor([[1.0, 0.0]]))
    close(merged.tokens, [[[1.0], [0.0]]])
    close(merged.sizes, [[1.0, 0.0]])


def test_results_are_contiguous(engine):
    x, w = torch.zeros(2, 4, 3), torch.zeros(5, 4)
    assert tokenops.token_mlp(x, w, None, torch.zeros(6, 5), None).is_contiguous()
    assert tokenops.soft_scatter(x, torch.zeros(2, 4, 7).transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("autocast", (torch.bfloat16, None))
def test_autocast_changes_no_dtype(autocast, engine):
    for dtype in (torch.float32, torch.float64):
        x, w, q = (torch.ones(*shape, dtype=dtype) / 3 for shape in ((1, 4, 3), (1, 4, 2), (1, 1, 4, 3)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            results = [
                tokenops.soft_aggregate(x, w),
                tokenops.token_mlp(x, w[0].t(), None, w[0], None),
                tokenops.masked_channel_attention(q, q, q),
                tokenops.select_tokens(x, w[..., 0], 2, prefix=0, rest="weighted").tokens,
                tokenops.merge_neighbours(x, (2, 2), "vertical", prefix=0),
                tokenops.unmerge_neighbours(x, (4, 2), ("horizontal",), prefix=0),
                tokenops.unmerge_neighbours(x, (4, 2), ("horizontal",), prefix=0, mode="bilinear"),
                tokenops.merge_bipartite(x, x, 1).tokens,
            ]
        assert {y.dtype for y in results} == {dtype}
        torch.testing.assert_close(results[0], torch.ones(1, 2, 3, dtype=dtype) / 3, rtol=1e-6, atol=0)


def test_merges_that_change_nothing(engine):
    """What has become one row stays one: 40 more merges take no memory."""
    x = torch.arange(3.0).reshape(1, 3, 1)
    for mode in ("repeat", "bilinear"):
        y = tokenops.unmerge_neighbours(x, (5, 3), ("vertical",) * 40, prefix=0, mode=mode)
        assert y.reshape(5, 3).tolist() == [[0.0, 1.0, 2.0]] * 5
        for empty, grid in (
            (torch.zeros(1, 3, 0), (5, 3)),
            (torch.zeros(0, 3, 2), (5, 3)),
            (torch.zeros(1, 0, 2), (0, 3)),
        ):
            assert tokenops.unmerge_neighbours(empty, grid, ("vertical",) * 3, prefix=0, mode=mode).numel() == 0
