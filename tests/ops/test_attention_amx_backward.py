"""Gradients of masked_channel_attention in bfloat16 on AMX tiles, where the machine has them."""

import random

import pytest
import torch

from support.attention import INF, attention, compared, inputs, limited, run
from support.cases import Attend
from support.threads import by_threads
from support.tolerance import assert_as_good_as_plain

NAN = float("nan")


@pytest.fixture(autouse=True)
def amx():
    with limited("amx", torch.bfloat16):
        yield


def tensors(M, N, DK, DV, B=1, H=1, seed=0, **more):
    torch.manual_seed(seed)
    return inputs(Attend(B, H, M, N, DK, DV, ""), torch.bfloat16, "cpu", **more)


def check_gradients(case, scores, heads, everything):
    for what, (ours, plain, truth, cancels) in compared(case, torch.bfloat16, "cpu", scores, heads, everything).items():
        if what.startswith("d"):
            assert_as_good_as_plain(ours, plain, truth, what, cancels)


CASES = (
    (Attend(1, 2, 33, 17, 33, 31, "a second tile of queries and of keys that holds one"), None),
    (Attend(2, 2, 16, 16, 32, 64, "tiles that are full"), "class"),
    (Attend(2, 1, 49, 48, 63, 1, "widths of half a word"), "class"),
    (Attend(1, 1, 31, 65, 127, 128, "the widest"), "received"),
    (Attend(3, 2, 197, 197, 64, 64, "a DeiT image; in other images fewer keys, or none"), "class"),
    (Attend(1, 1, 300, 1100, 9, 40, "more queries than wait together for dk and dv"), "received"),
)  # fmt: skip


@pytest.mark.parametrize("everything", [True, False], ids=["everything", "plain"])
@pytest.mark.parametrize(("case", "scores"), CASES, ids=str)
def test_as_good_as_plain(case, scores, everything):
    torch.manual_seed(0)
    check_gradients(case, scores, "mean" if scores == "class" else "each", everything)


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [draw.randint(1, 3), draw.randint(1, 3), *(draw.randint(1, 90) for _ in range(2))]
    case = Attend(*sizes, draw.randint(1, 128), draw.randint(1, 128), "random")
    scores, heads = draw.choice([(None, "each"), ("class", "mean"), ("received", "each")])
    check_gradients(case, scores, heads, everything=draw.random() < 0.7)


def test_one_key():
    """The softmax is 1 whatever the logit: all of dout goes to the value, nothing to q and k."""
    t = {name: torch.full((1, 1, rows, 3), 2.0).bfloat16() for name, rows in (("q", 2), ("k", 1), ("v", 1))}
    upstream = [torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 4.0]]).view(1, 1, 2, 3)]
    found, _ = run(attention, t, upstream)
    assert found["dv"].flatten().tolist() == [1.5, 1.0, 7.0]
    assert max(found["dq"].abs().max(), found["dk"].abs().max()) < 1e-5  # of dP up to 12


def test_two_keys_by_hand():
    """Equal logits: P is 1/2 and 1/2, dP = dout v is 4 and 0, D = 2, so dS is 1 and -1; lse adds P of its gradient."""
    t = dict(q=torch.tensor([1.0, 2.0]), k=torch.tensor([2.0, 1.0, 0.0, 2.0]), v=torch.tensor([4.0, 0.0]))
    t = {name: x.bfloat16().view(1, 1, -1, 1 if name == "v" else 2) for name, x in t.items()}
    found, _ = run(attention, t, [torch.ones(1, 1, 1, 1)], scale=0.0)
    assert found["dv"].flatten().tolist() == [0.5, 0.5]
    assert not found["dq"].any() and not found["dk"].any()  # 0 times what is not
    t["k"] = torch.tensor([2.0, 1.0, 4.0, 0.0]).bfloat16().view(1, 1, 2, 2)  # both give 4
    found, _ = run(attention, t, [torch.ones(1, 1, 1, 1)], scale=-0.5)
    assert found["dq"].flatten().tolist() == [1.0, -0.5]  # -0.5 * (k0 - k1)
    assert found["dk"].flatten().tolist() == [-0.5, -1.0, 0.5, 1.0]
    found, _ = run(attention, t, [torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), 2.0)], scale=-0.5, return_lse=True)
    assert found["dq"].flatten().tolist() == [-3.0, -0.5]  # -0.5 * (k0 + k1)
    assert found["dk"].flatten().tolist() == [-0.5, -1.0, -0.5, -1.0]


@pytest.mark.parametrize("scores", ["class", "received"])
def test_what_does_not_count_may_be_anything(scores):
    """Keys of bias -inf or beyond the length: their gradients are zero, and nothing they hold reaches another."""
    t = tensors(40, 37, 24, 20, B=2, H=2)
    t["key_bias"] = torch.randn(2, 1, 1, 37).bfloat16()
    t["key_bias"][..., 3:20:4] = -INF
    t["key_lengths"] = torch.tensor([30, 37])
    out = (t["key_bias"] == -INF).expand(2, 2, 1, 37)[:, :, 0] | (torch.arange(37) >= t["key_lengths"][:, None, None])
    found = []
    for fill in (0.0, NAN):
        t["k"][out] = fill
        t["v"][1, :, 30:] = 1.0
        t["v"][:1, :, 30:] = fill
        leaves = [t[name].requires_grad_() for name in ("q", "k", "v", "key_bias")]
        results = attention(**t, scores=scores)
        upstream = [torch.randn(results[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()]
        upstream += [torch.where(out, fill, 0.5)]
        found += [torch.autograd.grad(results, leaves, upstream)]
        t = {name: x.detach() for name, x in t.items()}
    for what, zeros, nans in zip(("q", "k", "v", "bias"), *found):
        assert torch.equal(zeros, nans), what
    assert not found[0][1][out].any() and found[0][1][~out].abs().amax(dim=-1).gt(0).all()
    assert not found[0][2][out].any() and found[0][2][~out].abs().amax(dim=-1).gt(0).all()


@pytest.mark.parametrize("why", ["bias", "length", "no keys"])
def test_queries_without_a_key(why):
    t = tensors(35, 0 if why == "no keys" else 20, 24, 40, H=2, everything=True)
    t["key_lengths"] = torch.tensor([0 if why == "length" else t["k"].shape[2]])
    if why == "bias":
        t["key_bias"][:] = -INF
    leaves = [x.requires_grad_() for name, x in t.items() if name != "key_lengths"]
    out, scores, lse = attention(**t, scores="class", return_lse=True)
    assert (lse == -INF).all()
    grads = torch.autograd.grad((out, scores, lse), leaves, [torch.ones_like(out), torch.ones_like(scores), lse * NAN])
    assert all(not grad.any() for grad in grads)


def test_logits_far_below_zero():
    """Five keys of logit -256, and behind them the zeros that fill up a tile: exp(0 + 256) would be infinite."""
    t = {name: torch.full((1, 1, rows, 1), 16.0).bfloat16() for name, rows in (("q", 1), ("k", 5), ("v", 5))}
    t["v"] = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]).bfloat16().view(1, 1, 5, 1)
    found, _ = run(attention, t, [torch.ones(1, 1, 1, 1)], scale=-1.0)
    dk = torch.tensor([[3.2], [3.2], [3.2], [3.2], [-12.8]])  # -16 P (dP - D), P = 1/5, D = 1
    torch.testing.assert_close(found["dk"].float()[0, 0], dk, rtol=5e-3, atol=0.0)
    torch.testing.assert_close(found["dv"].float(), torch.full((1, 1, 5, 1), 0.2), rtol=5e-3, atol=0.0)
    assert found["dq"].abs().item() < 0.1  # the sum of 16 dS, which cancels


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_scales(scale):
    """A scale of 1 with q times it; what cannot be told from 3 times the scale is rounded another way."""
    t = tensors(50, 45, 32, 32, H=2)
    found, upstream = run(attention, t, scale=scale, scores="received")
    t = {name: x.double() for name, x in t.items()}
    right, _ = run(lambda q, k, v, **o: attention(q * scale, k, v, scale=1.0, **o), t, upstream, scores="received")
    for what in ("dq", "dk", "dv"):
        error = (found[what].double() - right[what]).norm() / right[what].norm().clamp_min(1e-9)
        assert error < 6e-3, what
    assert scale or not found["dq"].any() and not found["dk"].any()


@pytest.mark.parametrize("gap", [3, 8])
def test_rows_at_any_stride(gap):
    """Heads in rows with something between them, odd strides too: the same gradients, bit for bit."""
    t = tensors(45, 39, 37, 66, B=2, H=3)
    expected, upstream = run(attention, t, scores="class")
    strided = {}
    for name, x in t.items():
        B, H, rows, D = x.shape
        room = torch.full((B, rows, H, D + gap), NAN, dtype=x.dtype)
        strided[name] = room.transpose(1, 2)[..., :D]
        strided[name].copy_(x)
        strided[name].requires_grad_()
    room = torch.full((2, 45, 3, 66 + gap), NAN, dtype=torch.bfloat16).transpose(1, 2)[..., :66]
    dout = room.copy_(upstream[0])
    results = attention(**strided, scores="class")
    found = torch.autograd.grad(results, list(strided.values()), [dout, upstream[1]])
    for name, value in zip(strided, found):
        assert torch.equal(value, expected[f"d{name}"]), name


def test_threads_change_nothing():
    t = tensors(150, 70, 24, 40, B=1, H=3, everything=True)
    _, upstream = run(attention, t, scores="received", return_lse=True)
    by_threads(lambda: run(attention, t, upstream, scores="received", return_lse=True)[0].values(), 1, 3)


def test_tiles_leave_torchs_products_as_they_were():
    """oneDNN keeps a configuration of tiles of its own."""
    a, t = torch.randn(70, 90).bfloat16(), tensors(20, 20, 16, 16)
    before = a @ a.mT
    run(attention, t)
    assert torch.equal(a @ a.mT, before)
