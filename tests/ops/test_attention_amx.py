"""masked_channel_attention in bfloat16 on AMX tiles, where the machine has them: results (gradients stand apart)."""

import ctypes
import math
import mmap
import random

import pytest
import torch

from support.attention import EVERYTHING, INF, attention, inputs, limited
from support.cases import Attend
from support.runs import double
from support.threads import by_threads
from support.tolerance import assert_as_good_as_plain
from tokenops import reference
from tokenops.ops import native

NAN = float("nan")


@pytest.fixture(autouse=True)
def amx():
    with limited("amx", torch.bfloat16):
        yield


def close(t, what="", **options):
    """The results of amx, which are as good as plain PyTorch's."""
    found = [f(**x, return_lse=True, **options) for f, x in (
        (attention, t), (reference.masked_channel_attention, t), (reference.masked_channel_attention, double(t)),
    )]  # fmt: skip
    for name, ours, plain, truth in zip(("out", "scores", "lse")[3 - len(found[0]) :], *found, strict=True):
        empty = truth == -INF
        assert torch.equal(ours == -INF, empty), f"{what} {name}"
        values = (x.masked_fill(empty, 0.0) for x in (ours, plain, truth))
        assert_as_good_as_plain(*values, f"{what} {name}")
    alone = attention(**t, **options)  # whose powers are as fine as its rounding
    out = alone if options.get("scores") is None else alone[0]
    assert_as_good_as_plain(out, *(results[0] for results in found[1:]), f"{what} without its log-sum-exp")
    return found[0]


def tensors(M, N, DK, DV, B=1, H=1, seed=0, everything=False):
    torch.manual_seed(seed)
    return inputs(Attend(B, H, M, N, DK, DV, ""), torch.bfloat16, "cpu", everything)


@pytest.mark.usefixtures("poisoned")
def test_every_width():
    """And masks, which round the queries: bit for bit those masked before."""
    for width in range(1, 129):
        t = tensors(19, 37, width, 129 - width, B=2, seed=width, everything=True)
        mask, half = t.pop("qk_mask"), torch.full_like(t.pop("v_mask"), 0.5)
        scores = "received" if width % 2 else "class"
        out, _, _ = close(t, f"{width} channels", scores=scores)
        masked = attention(**t | {"q": t["q"] * mask[:, None]}, scores=scores, return_lse=True)
        found = attention(**t, qk_mask=mask, scores=scores, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(found, masked, strict=True)), width
        assert torch.equal(attention(**t, v_mask=half, scores=scores, return_lse=True)[0], out / 2), width


@pytest.mark.usefixtures("poisoned")
def test_every_count_of_keys_and_queries():
    """Around tiles of 16, pairs of them, and chunks of keys."""
    for N in (*range(1, 68), 95, 97, 223, 224, 225, 449):
        close(tensors(3, N, 8, 8, H=2, seed=N), f"{N} keys", scores="received")
    for M in range(1, 68):
        close(tensors(M, 5, 8, 8, H=2, seed=M), f"{M} queries", scores="class")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(30))
def test_random_calls(seed):
    """Rows anywhere in memory, any scale, sharp logits among them."""
    draw = random.Random(seed)
    M, N, DK, DV = draw.randint(1, 150), draw.randint(1, 150), draw.randint(1, 128), draw.randint(1, 128)
    t = tensors(M, N, DK, DV, draw.randint(1, 3), draw.randint(1, 3), seed, draw.random() < 0.6)
    for name in "qkv":  # (B,N,H,D) with a gap behind every row
        B, H, rows, D = t[name].shape
        wide = torch.full((B, rows, H, D + draw.choice([0, 1, 3])), NAN, dtype=torch.bfloat16)
        t[name] = wide[..., :D].copy_(t[name].transpose(1, 2)).transpose(1, 2)
    if "key_bias" in t:
        if draw.random() < 0.5:
            t["key_bias"] = t["key_bias"].expand(-1, t["q"].shape[1], -1, -1)
        for name in ("qk_mask", draw.choice(["v_mask", "key_lengths"])):
            del t[name]
    scores, heads = draw.choice([(None, "each"), ("class", "mean"), ("received", "each")])
    scale = draw.choice([None, None, -0.3, 0.0, 0.02, 1.5])
    close(t, f"{scale=}", scores=scores, heads=heads, scale=scale)


def test_one_key_is_its_value():
    """The weight is 1 whatever the logit: not a bit is lost to rounding."""
    t = tensors(40, 1, 30, 17)
    assert torch.equal(attention(**t), t["v"].expand(1, 1, 40, 17))


def test_equal_logits_give_the_log_of_their_number():
    t = tensors(3, 64, 8, 8)
    out, scores, lse = attention(**t, scale=0.0, scores="class", return_lse=True)
    assert torch.equal(scores, torch.full((1, 1, 64), 1 / 64))
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(64)), atol=0, rtol=1.2e-7)
    torch.testing.assert_close(out[0, 0, 0].double(), t["v"][0, 0].double().mean(dim=0), atol=2**-9, rtol=2**-8)


@pytest.mark.parametrize("scores", [None, "class", "received"])
@pytest.mark.parametrize("logit", [-3e38, -500.0, -30.0, 30.0, 500.0, 3e38])
def test_logits_far_from_zero(logit, scores):
    """Powers of which overflow, or vanish: of one row among others, and of all."""
    t = tensors(70, 300, 8, 8)
    for rows in (slice(33, 34), slice(0, 70)):
        t["q"][0, 0, rows], t["k"][0, 0, :, 0] = 0.0, 1.0
        t["q"][0, 0, rows, 0] = logit
        t["q"][0, 0, rows, 1] = 1.0
        results = close(t, scores=scores, scale=1.0)
        assert all(r.isfinite().all() for r in results)


def test_negative_scale_takes_the_lowest_product():
    q, k = torch.ones(1, 1, 1, 1).bfloat16(), torch.tensor([200.0, -200.0, 0.0]).view(1, 1, 3, 1).bfloat16()
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1).bfloat16()
    out, scores, lse = attention(q, k, v, scale=-1.0, scores="class", return_lse=True)
    assert out.item() == 2.0 and scores.flatten().tolist() == [0.0, 1.0, 0.0] and lse.item() == 200.0


def test_the_least_float_as_bias():
    """Half the keys left out by torch.finfo.min, as masks are; where all are, none is."""
    t = tensors(5, 40, 8, 8, B=2)
    least = torch.finfo(torch.float32).min
    bias = torch.zeros(2, 1, 1, 40)
    bias[0, ..., 20:], bias[1] = least, least
    out = attention(**t, key_bias=bias)
    half = attention(t["q"][:1], t["k"][:1, :, :20], t["v"][:1, :, :20])
    assert torch.equal(out[:1], half)
    torch.testing.assert_close(out[1].float(), t["v"][1].float().mean(dim=1, keepdim=True).expand(1, 5, 8),
                               atol=0.004, rtol=0.01)  # fmt: skip


@pytest.mark.parametrize("scores", ["class", "received"])
def test_left_out_keys_may_hold_anything(scores):
    t = tensors(40, 80, 8, 8, B=2, H=2)
    t["key_bias"] = torch.zeros(2, 1, 1, 80)
    t["key_bias"][0, ..., [3, 70]] = -INF
    clean = attention(**t, scores=scores, return_lse=True)
    assert (clean[1][0, :, [3, 70]] == 0).all()
    for value in (NAN, INF, -INF):
        t["k"][0, :, [3, 70]] = value
        for found, right in zip(attention(**t, scores=scores, return_lse=True), clean):
            assert right.isfinite().all() and torch.equal(found, right)


@pytest.mark.parametrize("scores", ["class", "received"])
def test_keys_beyond_a_length_are_not_read(scores):
    t = tensors(40, 80, 40, 24, B=4, H=2)
    lengths = torch.tensor([0, 80, 1, 33])
    clean = attention(**t, key_lengths=lengths, scores=scores, return_lse=True)
    for b, length in enumerate(lengths.tolist()):
        t["k"][b, :, length:], t["v"][b, :, length:] = NAN, INF
    for found, right in zip(attention(**t, key_lengths=lengths, scores=scores, return_lse=True), clean):
        assert torch.equal(found, right)
    out, given, lse = clean
    assert (out[0] == 0).all() and (lse[0] == -INF).all() and (given[0] == 0).all() and (given[3, :, 33:] == 0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_stays_where_it_belongs(value):
    """In q its row, in k all rows of the head, in v its channel: as with every other instruction set."""
    for where in "qkv":
        t = tensors(40, 70, 24, 24, B=1, H=3)
        t[where][0, 1, 35, 5] = value
        with native.limit_cpu_isa("avx512bf16"):
            expected = attention(**t, scores="received", return_lse=True)
        for found, right in zip(attention(**t, scores="received", return_lse=True), expected):
            assert torch.equal(found.isfinite(), right.isfinite()) and torch.equal(found.isnan(), right.isnan())


def test_one_head_in_many_parts():
    """Bit for bit the same, however many threads share a head."""
    t = tensors(300, 70, 24, 40)
    by_threads(lambda: attention(**t, scores="class", **EVERYTHING), 1, 2, 7)


def configuration_of_tiles():
    """What this thread has them as, by one instruction: nothing in Python tells."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("c4e2794907c3"))  # sttilecfg [rdi]; ret
    found = ctypes.create_string_buffer(64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))(ctypes.addressof(found))
    return found.raw


def test_tiles_are_given_back():
    """As they were, and oneDNN's own products too, of one thread; denormal floats are floats again."""
    a = torch.randn(64, 64, dtype=torch.bfloat16)
    product, tiny = a @ a, torch.full((9,), 1e-41)
    before = configuration_of_tiles()
    attention(**tensors(40, 40, 64, 64))
    assert configuration_of_tiles() == before
    assert torch.equal(a @ a, product) and (tiny * 0.5 != 0).all()
