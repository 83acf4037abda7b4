"""masked_channel_attention: what it means, and that every backend computes it, all results and all gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from support.attention import EVERYTHING, INF, SCORES, attention, check, inputs, run
from support.cases import ATTEND, CHUNKED, DTYPES, Attend
from support.runs import double
from support.tolerance import assert_as_good_as_plain
from tokenops import reference

OPERATOR = "masked_channel_attention"  # of the `backend` fixture


# What the operator means.


def test_equal_logits_give_the_mean_of_the_values(device):
    q, k = torch.zeros(1, 1, 2, 4, device=device), torch.randn(1, 1, 3, 4, device=device)
    v = torch.tensor([[[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]]]], device=device)
    out, scores, lse = attention(q, k, v, scores="class", return_lse=True)
    torch.testing.assert_close(out[0, 0], torch.tensor([[3.0, 30.0]] * 2, device=device))
    torch.testing.assert_close(scores[0, 0], torch.full((3,), 1 / 3, device=device))
    torch.testing.assert_close(lse[0, 0], torch.full((2,), math.log(3), device=device))


def test_a_table_of_everything(device):
    """One channel survives the mask; the bias doubles a key; the last key is beyond the length; half of v is masked."""
    q = torch.tensor([[[[math.log(2.0), 5.0]], [[0.0, 0.0]]]], device=device)
    k = torch.tensor([[[[1.0, 7.0], [0.0, 9.0], [INF, INF]], [[0.0, 0.0], [0.0, 0.0], [INF, INF]]]], device=device)
    v = torch.tensor([[[[4.0], [8.0], [INF]], [[3.0], [9.0], [INF]]]], device=device)
    out, scores = attention(
        q,
        k,
        v,
        qk_mask=torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device),
        v_mask=torch.tensor([[1.0], [0.5]], device=device),
        key_bias=torch.tensor([0.0, math.log(2.0), 0.0], device=device).reshape(1, 1, 1, 3),
        key_lengths=torch.tensor([2], device=device),
        scale=1.0,
        scores="class",
        heads="mean",
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 3.5], device=device))  # weights 1:1, and 1:2 halved
    torch.testing.assert_close(scores, torch.tensor([[5 / 12, 7 / 12, 0.0]], device=device))


def test_reference_is_scaled_dot_product_attention():
    q, k, v = inputs(ATTEND[3], torch.float64, "cpu").values()
    torch.testing.assert_close(reference.masked_channel_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    bias = torch.randn(2, 3, 1, 17, dtype=torch.float64)
    torch.testing.assert_close(
        reference.masked_channel_attention(q, k, v, key_bias=bias, scale=0.3),
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3),
    )


def test_reference_is_the_formula():
    t = inputs(ATTEND[3], torch.float64, "cpu", everything=True)
    t["key_bias"] = torch.randn(2, 1, 1, 17, dtype=torch.float64)
    out, received, lse, key_mean = reference.masked_channel_attention(
        **t, scores="received", heads="mean", **EVERYTHING
    )
    for b, length in enumerate(t["key_lengths"].tolist()):
        k, v, bias = t["k"][b, :, :length], t["v"][b, :, :length], t["key_bias"][b, 0, 0, :length]
        s = torch.einsum("hc,hic,hjc->hij", t["qk_mask"], t["q"][b], k) * 37**-0.5 + bias
        e = s.exp()
        p = e / e.sum(dim=2, keepdim=True)
        torch.testing.assert_close(out[b], torch.einsum("hij,hjc,hc->hic", p, v, t["v_mask"]))
        torch.testing.assert_close(received[b, :length], p.mean(dim=(0, 1)))
        torch.testing.assert_close(lse[b], e.sum(dim=2).log())
        torch.testing.assert_close(key_mean[b, :length], k.mean(dim=0))
        assert (received[b, length:] == 0).all() and (key_mean[b, length:] == 0).all()


def test_scores_add_up_to_one(backend, device):
    t = inputs(ATTEND[4], torch.float32, device)
    for scores, heads in SCORES[1:]:
        torch.testing.assert_close(
            attention(**t, scores=scores, heads=heads)[1].sum(dim=-1).mean(), torch.tensor(1.0, device=device)
        )


# Every backend against fp64 truth.


def quick(case, dtype):
    """Those of fp32 are run several times; fp16 takes the ways of bf16."""
    return case.N < 10 or dtype == torch.bfloat16


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow_interpreted(quick=quick)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTEND, ids=str)
def test_as_good_as_plain(case, dtype, backend, device):
    check(case, dtype, device, "class" if case.M else None, "each")


FEW = [("class", "mean"), ("received", "each")]
EVERY = [(ATTEND[i], torch.float32, *kind) for i in (0, 2, 3, 4, 7, 10) for kind in SCORES]
EVERY += [(ATTEND[i], dtype, *kind) for i in (3, 4) for dtype in DTYPES[1:] for kind in FEW]
EVERY += [(CHUNKED[0], torch.bfloat16, *kind) for kind in SCORES] + [(case, torch.float16, *FEW[0]) for case in CHUNKED]
EVERY += [(CHUNKED[1], torch.bfloat16, *kind) for kind in FEW]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow_interpreted(quick=lambda case, dtype: dtype != torch.float32 or case in (ATTEND[0], ATTEND[10]))
@pytest.mark.parametrize(("case", "dtype", "scores", "heads"), EVERY, ids=str)
def test_everything_as_good_as_plain(case, dtype, scores, heads, backend, device):
    check(case, dtype, device, scores, heads, everything=True)


@pytest.mark.parametrize("only", ["scores", "lse", "key_mean"])
def test_a_loss_on_one_result_alone(only, backend, device):
    t = inputs(ATTEND[0], torch.float32, device)

    def f(q, k, v, function=attention):
        results = function(q, k, v, scores="received", **EVERYTHING)
        return results[("scores", "lse", "key_mean").index(only) + 1].square().sum()

    leaves = [value.requires_grad_() for value in t.values()]
    ours = torch.autograd.grad(f(*leaves), leaves, allow_unused=True)
    expected = torch.autograd.grad(f(*leaves, reference.masked_channel_attention), leaves, allow_unused=True)
    for a, b in zip(ours, expected):
        b = torch.zeros_like(leaves[0]) if b is None else b
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, atol=1e-6, rtol=1e-5)


# Values at the edges.


def test_masks_of_ones_and_full_lengths_change_nothing(backend, device):
    t = inputs(ATTEND[4], torch.float32, device)
    plain, upstream = run(attention, t, scores="class")
    ones = dict(qk_mask=torch.ones(2, 40, device=device), v_mask=torch.ones(2, 52, device=device))
    full = dict(key_lengths=torch.full((1,), 70, device=device), key_bias=torch.zeros(1, 2, 1, 70, device=device))
    masked, _ = run(attention, t | ones | full, upstream, scores="class")
    for what, value in plain.items():
        torch.testing.assert_close(masked[what], value)


def test_ragged_images_are_images_cut_short(backend, device):
    """What lies beyond a length (NaN here) is not read, and gets no gradient; an empty image gives zeros."""
    t = inputs(Attend(4, 2, 6, 80, 8, 8, "lengths in different tiles"), torch.float32, device)
    lengths = torch.tensor([0, 80, 1, 65], device=device)
    clean, upstream = run(attention, t | {"key_lengths": lengths}, scores="received", return_lse=True)
    dirty = {name: value.clone() for name, value in t.items()}
    for b, length in enumerate(lengths.tolist()):
        dirty["k"][b, :, length:] = float("nan")
        dirty["v"][b, :, length:] = INF
    ragged, _ = run(attention, dirty | {"key_lengths": lengths}, upstream, scores="received", return_lse=True)
    for what, value in clean.items():
        assert torch.equal(ragged[what], value), what
    assert (clean["result 0"][0] == 0).all() and (clean["result 1"][0] == 0).all()
    assert (clean["result 2"][0] == -INF).all() and (clean["dq"][0] == 0).all()
    for b, length in enumerate(lengths.tolist()):
        assert (clean["dk"][b, :, length:] == 0).all() and (clean["dv"][b, :, length:] == 0).all()
        short = {n: value[b : b + 1, :, :length] if n != "q" else value[b : b + 1] for n, value in t.items()}
        cut, _ = run(attention, short, [u[b : b + 1, :, :length] if i == 1 else u[b : b + 1] for i, u in
                                         enumerate(upstream)], scores="received", return_lse=True)  # fmt: skip
        torch.testing.assert_close(clean["result 0"][b], cut["result 0"][0])
        torch.testing.assert_close(clean["dk"][b, :, :length], cut["dk"][0])


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_positive(scale, backend, device):
    t = inputs(Attend(1, 2, 6, 40, 8, 8, "whole tiles of keys and a rest"), torch.float32, device)
    expected, upstream = run(reference.masked_channel_attention, t, scale=scale, scores="class", return_lse=True)
    found, _ = run(attention, t, upstream, scale=scale, scores="class", return_lse=True)
    for what, right in expected.items():
        torch.testing.assert_close(found[what], right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_integer(dtype, backend, device):
    t = inputs(ATTEND[0], torch.float32, device)
    lengths = torch.tensor([2, 5], device=device)
    expected = attention(**t, key_lengths=lengths)
    assert torch.equal(attention(**t, key_lengths=lengths.to(dtype)), expected)


def test_every_key_left_out_by_the_bias(backend, device):
    t = inputs(ATTEND[0], torch.float32, device)
    bias = torch.zeros(2, 2, 1, 5, device=device)
    bias[0] = -INF
    results, _ = run(attention, t | {"key_bias": bias}, scores="class", return_lse=True)
    assert all(value.isfinite().all() for what, value in results.items() if what != "result 2")
    assert (results["result 0"][0] == 0).all() and (results["result 1"][0] == 0).all()
    assert (results["result 2"][0] == -INF).all() and (results["dq"][0] == 0).all()


@pytest.mark.parametrize("scores", ["class", "received"])
def test_keys_left_out_by_the_bias_may_be_nan(scores, backend, device):
    t = inputs(Attend(2, 2, 6, 80, 8, 8, "keys left out"), torch.float32, device)
    t["key_bias"] = torch.zeros(2, 1, 1, 80, device=device)
    t["key_bias"][0, ..., [3, 70]] = -INF
    clean = attention(**t, scores=scores, return_lse=True)
    t["k"][0, :, [3, 70]] = float("nan")
    for value, right in zip(attention(**t, scores=scores, return_lse=True), clean):
        assert right.isfinite().all() and torch.equal(value, right)


def test_keys_left_out_by_the_bias_get_no_gradient(backend, device):
    """Though they are NaN."""
    t = inputs(Attend(2, 2, 6, 80, 8, 8, "keys left out"), torch.float32, device)
    t["key_bias"] = torch.zeros(2, 1, 1, 80, device=device)
    t["key_bias"][0, ..., [3, 70]] = -INF
    clean, upstream = run(attention, t)
    t["k"][0, :, [3, 70]] = float("nan")
    spoilt, _ = run(attention, t, upstream)
    for what in ("dk", "dv"):
        assert (clean[what][0, :, [3, 70]] == 0).all() and torch.equal(spoilt[what], clean[what]), what


@pytest.mark.parametrize("dtype, ulp", ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)), ids=("bfloat16", "float16"))
def test_results_are_rounded_to_nearest(dtype, ulp, backend, device):
    """The mean of two values next to each other is a tie: to even."""
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    v = torch.tensor([[1, 1 + ulp], [1 + ulp, 1 + 2 * ulp]], dtype=dtype, device=device).reshape(1, 1, 2, 2)
    zeros = torch.zeros(1, 1, 2, 4, dtype=dtype, device=device)
    assert attention(zeros, zeros, v)[0, 0].tolist() == [[1, 1 + 2 * ulp]] * 2


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_stay_in_their_head(where, value, backend, device):
    t = inputs(ATTEND[0], torch.float32, device)
    clean, upstream = run(attention, t, scores="received")
    t[where][0, 1, 2, 3] = value
    spoilt, _ = run(attention, t, upstream, scores="received")
    assert not spoilt["result 0"][0, 1].isfinite().all()
    for what, right in clean.items():
        assert torch.equal(spoilt[what][1], right[1]) and torch.equal(spoilt[what][0, 0], right[0, 0]), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype, backend, device):
    t = inputs(ATTEND[4], dtype, device)
    t["q"] = 100 * t["q"]
    truth = reference.masked_channel_attention(**double(t), scores="class")
    logits, _ = reference.attention_logits(t["q"].double(), t["k"].double())
    plain = reference.masked_channel_attention(**t, scores="class")
    for what, ours, b, right in zip(("out", "scores"), attention(**t, scores="class"), plain, truth):
        # one rounding of the logits is allowed for: kernels keep them times log2(e)
        assert_as_good_as_plain(ours, b, right, what, logits.abs().max().item())
