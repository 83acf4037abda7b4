"""select_tokens: what it means, and that every backend makes the same choice to the bit."""

import math

import pytest
import torch

import tokenops
from support.cases import DTYPES, SELECT, SELECT_LARGE
from support.runs import double
from support.selection import OPTIONS, compare, inputs, run, terms
from tokenops import reference

NAN, INF = math.nan, math.inf
select_tokens = tokenops.select_tokens


OPERATOR = "select_tokens"  # of the `backend` fixture


# What the operator means: tables to learn it from.

TABLE = [
    # scores                 k  order    index
    ([0.1, 0.4, 0.3, 0.2], 2, "score", [1, 2]),
    ([0.1, 0.3, 0.2, 0.4], 2, "score", [3, 1]),
    ([0.1, 0.3, 0.2, 0.4], 2, "index", [1, 3]),
    ([1, 2, 2, 2], 2, "score", [1, 2]),  # equal: the lower index
    ([2, 1, 2, 1], 3, "score", [0, 2, 1]),
    ([2, 1, 2, 1], 3, "index", [0, 1, 2]),
    ([0.0, -0.0, 0.0, -0.0], 3, "score", [0, 1, 2]),  # the same number
    ([NAN, -INF, NAN, 0], 3, "score", [3, 1, 0]),  # NaN behind every number
    ([NAN, NAN, NAN, NAN], 2, "index", [0, 1]),
    ([INF, NAN, INF, 3e38], 3, "index", [0, 2, 3]),
    ([-1, -2, -1e-45, -3], 2, "score", [2, 0]),  # a subnormal number
    ([-1, -1, 0, -1], 2, "index", [0, 2]),  # equal, and of bits that are all set where they are counted
    ([5, 6, 7, 8], 0, "score", []),
    ([5, 6, 7, 8], 4, "score", [3, 2, 1, 0]),
]


@pytest.mark.parametrize("scores, k, order, expected", TABLE)
def test_table(backend, device, scores, k, order, expected):
    x = torch.arange(5.0, device=device).reshape(1, 5, 1)
    for dtype in (torch.float32, torch.float64):
        chosen = select_tokens(x, torch.tensor([scores], dtype=dtype, device=device), k, order=order)
        assert chosen.index.tolist() == [expected]
        assert chosen.tokens.flatten().tolist() == [0, *(i + 1 for i in expected)]
        assert chosen.companions == () and chosen.normed is None and chosen.lengths is None


@pytest.mark.parametrize("N", (100, 2500))
@pytest.mark.parametrize("order", ("index", "score"))
def test_equals_of_many_tiles(backend, device, order, N):
    """More of them than a kernel looks at together: the first are kept."""
    scores = torch.ones(1, N, device=device)
    scores[0, [3, N - 10]] = 2
    k = N * 3 // 5
    chosen = select_tokens(torch.zeros(1, N, 1, device=device), scores, k, prefix=0, order=order).index[0].tolist()
    kept = [n for n in range(k - 1) if n != 3]
    assert chosen == ([3, N - 10, *kept] if order == "score" else sorted([3, N - 10, *kept]))


RESTS = [
    # x                        k  rest        normalize  the last token
    ([9, 10, 20, 30, 40], 2, "mean", True, 15),
    ([9, 10, 20, 30, 40], 2, "weighted", False, 10 * 1 + 20 * 2),
    ([9, 10, 20, 30, 40], 2, "weighted", True, (10 * 1 + 20 * 2) / 3),
    ([9, 10, 20, 30, 40], 0, "mean", True, 25),
    ([9, 10, 20, 30, 40], 4, "mean", True, 0),
    ([9, 10, 20, 30, 40], 4, "weighted", True, 0),
]


@pytest.mark.parametrize("x, k, rest, normalize, last", RESTS)
def test_rest(backend, device, x, k, rest, normalize, last):
    x = torch.tensor(x, dtype=torch.float32, device=device).reshape(1, -1, 1)
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=device)
    chosen = select_tokens(x, scores, k, rest=rest, normalize=normalize, order="index")
    assert chosen.tokens.shape == (1, k + 2, 1)
    assert chosen.tokens.flatten().tolist() == pytest.approx([*x[0, :1, 0].tolist(), *x[0, 5 - k :, 0].tolist(), last])


def test_weights_that_sum_to_zero_are_not_divided(backend, device):
    x = torch.tensor([0.0, 1, 2, 3], device=device).reshape(1, 4, 1)
    scores = torch.tensor([[1.0, -1.0, 5.0]], device=device, requires_grad=True)
    chosen = select_tokens(x, scores, 1, rest="weighted")
    assert chosen.tokens.flatten().tolist() == [0, 3, 1 * 1 - 1 * 2]
    chosen.tokens.sum().backward()
    assert scores.grad.tolist() == [[1, 2, 0]]


def test_counts(backend, device):
    """Images that keep different numbers: what is beyond is zeros, and the rest follows the last kept token."""
    x = torch.arange(12.0, device=device).reshape(2, 6, 1) + 1
    scores = torch.tensor([[1.0, 5, 4, 3, 2], [9, 8, 7, 6, 5]], device=device)
    counts = torch.tensor([1, 3], device=device)
    chosen = select_tokens(x, scores, 3, counts=counts, companions=(scores,))
    assert chosen.tokens[..., 0].tolist() == [[1, 3, 0, 0], [7, 8, 9, 10]]
    assert chosen.index.tolist() == [[1, -1, -1], [0, 1, 2]]
    assert chosen.companions[0].tolist() == [[5, 0, 0], [9, 8, 7]]
    assert chosen.lengths.tolist() == [2, 4]
    fused = select_tokens(x, scores, 3, counts=counts, rest="mean")
    assert fused.tokens[..., 0].tolist() == [[1, 3, (2 + 4 + 5 + 6) / 4, 0, 0], [7, 8, 9, 10, 11.5]]
    assert fused.lengths.tolist() == [3, 5]


def test_counts_go_to_attention_and_back(backend, device):
    x, scores = torch.randn(2, 7, 8, device=device), torch.rand(2, 6, device=device)
    chosen = select_tokens(x, scores, 4, counts=torch.tensor([2, 4], device=device))
    q = chosen.tokens.unsqueeze(1)
    with tokenops.use_backend("auto"):
        out = tokenops.masked_channel_attention(q, q, q, key_lengths=chosen.lengths).squeeze(1)
        alone = chosen.tokens[:1, :3].unsqueeze(1)
        torch.testing.assert_close(out[0, :3], tokenops.masked_channel_attention(alone, alone, alone)[0, 0])
    y = tokenops.restore_tokens(x, out, chosen.index)  # -1 goes nowhere
    changed = (y != x).any(dim=2).sum(dim=1)
    assert changed.tolist() == [3, 5]


def test_gradient_of_the_rest(backend, device):
    x = torch.tensor([0.0, 10, 20, 30], device=device).reshape(1, 4, 1).requires_grad_()
    scores = torch.tensor([[1.0, 3.0, 5.0]], device=device, requires_grad=True)
    y = select_tokens(x, scores, 1, rest="weighted").tokens
    assert y.flatten().tolist() == [0, 30, (10 + 60) / 4]
    y.backward(torch.tensor([[[2.0], [3.0], [4.0]]], device=device))
    assert x.grad.flatten().tolist() == [2, 1, 3, 3]
    assert scores.grad.tolist() == [[4 * (10 - 17.5) / 4, 4 * (20 - 17.5) / 4, 0]]


# Every backend against the reference.


@pytest.mark.slow_interpreted(quick=lambda case, dtype: case == SELECT[0] or dtype != torch.float64)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", (*SELECT, *SELECT_LARGE), ids=str)
def test_forward_and_backward(backend, device, poisoned, ran_kernels, case, dtype):
    slow = backend == "triton" and device == "cpu"
    if slow and case in SELECT_LARGE:
        pytest.skip("the interpreter takes minutes; its tiles are covered by smaller sizes")
    for number, option in enumerate(OPTIONS):
        if backend == "triton" and (number + case.N + case.k) % 3 != (*DTYPES, torch.float64).index(dtype) % 3:
            continue  # each case meets every option in one dtype or another: each is another compilation on a GPU
        if slow and dtype == torch.bfloat16 and option[0] != "none" and option[4]:
            continue  # the interpreter cuts bf16 off where it should round, and the norm is taken of that
        tensors = inputs(case, dtype, (torch.float32, dtype, torch.float64)[number % 3], device, *option[3:])
        with ran_kernels() as names:
            *ours, upstream = run(select_tokens, tensors, case.k, case.prefix, option)
        assert names == {f"select_tokens_fwd.{backend}", f"select_tokens_bwd.{backend}"}
        *plain, _ = run(reference.select_tokens, tensors, case.k, case.prefix, option, upstream)
        truth = run(reference.select_tokens, double(tensors), case.k, case.prefix, option, upstream)
        weighted = option[0] == "weighted" and option[1] and tensors["scores"].numel() and case.C
        compare(ours, plain, truth, terms(tensors, truth, upstream, case.prefix) if weighted else 0.0)
        *again, _ = run(select_tokens, tensors, case.k, case.prefix, option, upstream)
        for first, second in zip(ours, again, strict=True):  # deterministic
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_choice_everywhere(backend, device):
    """Indices of every backend equal the reference's to the bit, on scores full of ties and special values."""
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3e38, -NAN, 0.5], device=device)
    for dtype in (*DTYPES, torch.float64):
        scores = special[torch.randint(len(special), (3, 50), device=device)].to(dtype)
        scores[2] = scores[2].masked_fill(torch.rand(50, device=device) < 0.8, 0.25)
        x = torch.randn(3, 51, 4, device=device)
        for k in (0, 1, 20, 49, 50):
            for order in ("score", "index"):
                expected = reference.select_tokens(x, scores, k, order=order)[1]
                assert torch.equal(select_tokens(x, scores, k, order=order).index, expected), k


def test_nan_and_infinity_of_tokens_stay_where_they_are(backend, device):
    x = torch.tensor([NAN, 1.0, INF, NAN, 2.0], device=device).reshape(1, 5, 1)
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0]], device=device)
    y = select_tokens(x, scores, 2, rest="mean").tokens.flatten().tolist()
    assert str(y) == "[nan, inf, nan, 1.5]"


def test_norm_without_weight_or_bias(backend, device):
    x, scores = torch.randn(2, 6, 8, device=device, requires_grad=True), torch.rand(2, 5, device=device)
    for norm in ((None, None, 1e-6), (torch.rand(8, device=device), None, 0.1)):
        chosen = select_tokens(x, scores, 3, norm=norm)
        expected = torch.nn.functional.layer_norm(chosen.tokens, (8,), *norm)
        torch.testing.assert_close(chosen.normed, expected)
        (ours,) = torch.autograd.grad(chosen.normed.square().sum(), x, retain_graph=True)
        (plain,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16))
def test_companions_of_every_size(backend, device, dtype):
    x, scores = torch.randn(2, 6, 3, device=device), torch.rand(2, 5, device=device)
    given = torch.randint(0, 100, (2, 5), device=device).to(dtype)
    for companions in ((given,), (given, scores), (given, scores, given.t().contiguous().t()), (given,) * 4):
        chosen = select_tokens(x, scores, 3, companions=companions)
        expected = [companion.gather(1, chosen.index) for companion in companions]
        assert all(torch.equal(a, b) for a, b in zip(chosen.companions, expected, strict=True))


def test_counts_of_any_stride(backend, device):
    x, scores = torch.randn(3, 6, 2, device=device), torch.rand(3, 5, device=device)
    for counts in (torch.tensor([2], device=device).expand(3), torch.tensor([3, 9, 1, 9, 2], device=device)[::2]):
        results = []
        for given in (counts, counts.clone()):
            leaf = x.clone().requires_grad_()
            y = select_tokens(leaf, scores, 3, counts=given, rest="mean").tokens
            results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_very_small_and_very_unequal_weights(backend, device):
    """Sums below the smallest normal number, and fp64 scores that fp32 does not reach (all zeros then: not divided)."""
    x = torch.tensor([1.0, 2, 3, 4], device=device).reshape(1, 4, 1)
    for small, expected in ((1e-40, 20 / 6), (1e-30, 20 / 6)):
        scores = torch.tensor([[1.0, small, 2 * small, 3 * small]], device=device)
        leaf = x.clone().requires_grad_()
        y = select_tokens(leaf, scores, 1, prefix=0, rest="weighted").tokens
        assert y[0, 1].item() == pytest.approx(expected, rel=1e-3)
        (dx,) = torch.autograd.grad(y[0, 1], leaf)
        assert dx.flatten().tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6], rel=1e-3)
    scores = torch.tensor([[1.0, 1e-50, 2e-50, 3e-50]], dtype=torch.float64, device=device)
    for function in (select_tokens, reference.select_tokens):
        assert function(x, scores, 1, prefix=0, rest="weighted")[0].flatten().tolist() == [1, 0]


def test_the_norm_of_a_constant_row_is_zero():
    """On a GPU it is as exact as torch's, within rounding."""
    x = torch.randn(2, 40, 1).expand(2, 40, 384)
    normed = select_tokens(x, torch.rand(2, 39), 20, norm=(None, None, 1e-6)).normed
    plain = torch.nn.functional.layer_norm(x.contiguous(), (384,))
    assert normed.abs().max() <= max(2 * plain.abs().max(), 1e-6)


def test_the_eps_of_fp64_is_not_rounded(backend, device):
    """1e-12 is another number in fp32, and 1e-300 none."""
    scores = torch.rand(2, 6, device=device)
    x = 1e-6 * torch.randn(2, 7, 8, dtype=torch.float64, device=device)
    normed = tokenops.select_tokens(x, scores, 3, norm=(None, None, 1e-12)).normed
    tokens = tokenops.select_tokens(x, scores, 3).tokens
    right = torch.nn.functional.layer_norm(tokens, (8,), eps=1e-12)
    torch.testing.assert_close(normed, right, rtol=1e-12, atol=1e-12)
    constant = torch.ones_like(x)
    assert tokenops.select_tokens(constant, scores, 3, norm=(None, None, 1e-300)).normed.eq(0).all()


# What is refused, and what no gradient is asked of.


def test_counts_out_of_range(backend, device):
    x, scores = torch.randn(2, 6, 3, device=device), torch.rand(2, 5, device=device)
    counts = torch.tensor([[-3, 9], [0, 0]], device=device).t()[:, 0]
    if device == "cpu" and backend == "native":
        for path in ("native", "reference"):
            words = r"counts\[0\]=-3, but it must be between 0 and k=2"
            with tokenops.use_backend(path), pytest.raises(IndexError, match=words):
                select_tokens(x, scores, 2, counts=counts)
        return
    chosen = select_tokens(x, scores, 2, counts=counts)  # not looked at: the nearest that is allowed
    nearest = select_tokens(x, scores, 2, counts=torch.tensor([0, 2], device=device))
    assert torch.equal(chosen.tokens, nearest.tokens) and torch.equal(chosen.index, nearest.index)
    assert chosen.lengths.tolist() == [1, 3]


def test_gradients_that_nobody_asked_for(backend, device):
    """Results that depend on nothing that needs a gradient need none."""
    x, scores, weight = (
        torch.randn(2, 6, 4, device=device),
        torch.rand(2, 5, device=device),
        torch.ones(4, device=device),
    )
    size = torch.rand(2, 5, device=device, requires_grad=True)
    chosen = select_tokens(x, scores, 2, companions=(size,), norm=(weight.requires_grad_(), weight, 1e-6))
    assert not chosen.tokens.requires_grad and chosen.normed.requires_grad and chosen.companions[0].requires_grad
    chosen = select_tokens(x, scores.requires_grad_(), 2)
    assert not chosen.tokens.requires_grad


def test_as_many_tokens_as_are_allowed(device):
    x, scores = torch.randn(1, 16385, 2, device=device), torch.rand(1, 16384, device=device).bfloat16()
    with tokenops.use_backend("native"):
        for order in ("score", "index"):
            ours = select_tokens(x, scores, 5000, order=order)
            assert torch.equal(ours.index, reference.select_tokens(x, scores, 5000, order=order)[1])


def test_many_images_choose_once():
    """On Triton a program makes its image's choice: of few images several do, each for some channels."""
    plan = pytest.importorskip("tokenops.ops.triton.select_tokens")._fwd_plan
    for B, C, norm, programs in (
        (1, 384, False, 3),
        (256, 384, False, 256),
        (256, 1280, False, 768),
        (1, 384, True, 1),
    ):
        x, scores = (torch.empty(B, *size, device="meta") for size in ((197, C), (196,)))
        assert plan(x, scores, None, None, None, 98, 1, "none", False, norm).grid == (programs,)
