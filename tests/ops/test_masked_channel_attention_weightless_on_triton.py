"""masked_channel_attention on Triton: keys that do not count, by bias or length, have no say in a gradient."""

import pytest
import torch

import tokenops
from support.attention import EVERYTHING, INF, SCORES, attention, inputs, run
from support.cases import Attend
from tokenops import reference

pytest.importorskip("triton")

NAN = float("nan")


@pytest.fixture(autouse=True)
def on_triton():
    with tokenops.use_backend("triton"):
        yield


def keys_left_out(device, q=6):
    """Inputs whose first image has two keys with -inf, and whose second is cut; and which keys do not count."""
    t = inputs(Attend(2, 2, q, 40, 8, 8, "keys in two tiles"), torch.float32, device)
    t["qk_mask"], t["v_mask"] = torch.rand(2, 8, device=device), torch.rand(2, 8, device=device)
    t["key_bias"] = torch.randn(2, 1, 1, 40, device=device)
    t["key_bias"][0, ..., [3, 35]] = -INF
    t["key_lengths"] = torch.tensor([40, 33], device=device)
    left_out = t["key_bias"].isinf().flatten(1)
    left_out[1, 33:] = True
    return t, left_out


@pytest.mark.parametrize("value", [NAN, INF])
def test_gradients_by_hand(value, device):
    """Two keys share the weight; the third has none, whatever its k."""
    q, k = torch.zeros(1, 1, 1, 1, device=device), torch.tensor([1.0, 3.0, value], device=device)
    v, bias = torch.tensor([0.0, 2.0, 5.0], device=device), torch.tensor([0.0, 0.0, -INF], device=device)
    leaves = [q, *(t.reshape(1, 1, 3, 1) for t in (k, v)), bias.reshape(1, 1, 1, 3)]
    q, k, v, bias = [leaf.requires_grad_() for leaf in leaves]
    out, scores = attention(q, k, v, key_bias=bias, scale=1.0, scores="class")
    assert (out.item(), scores.flatten().tolist()) == (1.0, [0.5, 0.5, 0.0])
    dq, dk, dv, dbias = torch.autograd.grad(out.sum(), leaves)
    assert dq.item() == 1.0  # 0.5 * (0 - 1) * 1 + 0.5 * (2 - 1) * 3
    assert dk.flatten().tolist() == [0.0, 0.0, 0.0]
    assert dv.flatten().tolist() == [0.5, 0.5, 0.0]
    assert dbias.flatten().tolist() == [-0.5, 0.5, 0.0]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("scores", "heads"), SCORES)
def test_k_of_a_key_that_does_not_count_changes_nothing(scores, heads, value, device):
    t, left_out = keys_left_out(device)
    clean, upstream = run(attention, t, scores=scores, heads=heads, return_lse=True)
    t["k"] = t["k"].masked_fill(left_out[:, None, :, None], value)
    spoilt, _ = run(attention, t, upstream, scores=scores, heads=heads, return_lse=True)
    for what, right in clean.items():
        assert right.isfinite().all() and torch.equal(spoilt[what], right), what
    for what in ("dk", "dv"):
        assert (spoilt[what].transpose(1, 2)[left_out] == 0).all(), what
    assert (spoilt["dkey_bias"].flatten(1)[left_out] == 0).all()


def test_the_mean_key_is_that_of_all_keys_within_the_length(device):
    """It is no weighted sum: -inf takes no key from it."""
    t, _ = keys_left_out(device)
    t["k"][0, :, 3] = NAN
    *_, key_mean = attention(**t, **EVERYTHING)
    assert key_mean[0, 3].isnan().all() and key_mean.isnan().sum() == 8
    assert (key_mean[1, 33:] == 0).all()


@pytest.mark.parametrize(("scores", "heads"), SCORES[1:])
def test_a_broken_query_breaks_no_key_that_does_not_count(scores, heads, device):
    t, left_out = keys_left_out(device)
    t["q"][:, :, 0] = NAN
    found, _ = run(attention, t, scores=scores, heads=heads)
    for what in ("dk", "dv"):
        gradient = found[what].transpose(1, 2)
        assert (gradient[left_out] == 0).all() and gradient[~left_out].isnan().all(), what
    assert (found["dkey_bias"].flatten(1)[left_out] == 0).all()
    score = found["result 1"] if heads == "mean" else found["result 1"].transpose(1, 2)
    assert (score[left_out] == 0).all() and score[~left_out].isnan().all()


@pytest.mark.parametrize(("scores", "heads"), SCORES[1:])
def test_gradients_of_their_scores_are_not_read(scores, heads, device):
    """A score of 0 has an infinite gradient under an entropy, say."""
    t, left_out = keys_left_out(device, q=20)
    clean, upstream = run(attention, t, scores=scores, heads=heads)
    at = left_out if heads == "mean" else left_out[:, None].expand(2, 2, 40)
    again, _ = run(attention, t, [upstream[0], upstream[1].masked_fill(at, -INF)], scores=scores, heads=heads)
    for what, right in clean.items():
        assert right.isfinite().all() and torch.equal(again[what], right), what
    expected, _ = run(reference.masked_channel_attention, t, upstream, scores=scores, heads=heads)
    for what, right in expected.items():
        torch.testing.assert_close(clean[what], right, atol=1e-4, rtol=1e-4)
