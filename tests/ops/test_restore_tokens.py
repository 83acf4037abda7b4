"""restore_tokens: what it means, that every backend does it to the bit, and what it says to bad input."""

import pytest
import torch

import tokenops
from support.cases import DTYPES, QUICK, RESTORE
from tokenops import reference
from tokenops.ops.schemas import kernel

ALL = (*DTYPES, torch.float64)


OPERATOR = "restore_tokens"  # of the `backend` fixture


def places(B, N, k, device):
    return torch.rand(B, N, device=device).argsort(dim=1)[:, :k]


def inputs(B, N, k, C, device, prefix=1, carried=0, dtype=torch.float32):
    base = torch.randn(B, prefix + N, C, dtype=dtype, device=device)
    tokens = torch.randn(B, carried + k, C, dtype=dtype, device=device)
    return base, tokens, places(B, N, k, device)


def gradients(function, base, tokens, index, prefix, dy):
    base, tokens = base.detach().requires_grad_(), tokens.detach().requires_grad_()
    y = function(base, tokens, index, prefix=prefix)
    return y.detach(), *torch.autograd.grad(y, (base, tokens), dy, materialize_grads=True)


def assert_same(ours, expected):
    for mine, right in zip(ours, expected, strict=True):
        assert mine.dtype == right.dtype and mine.shape == right.shape and mine.is_contiguous()
        assert torch.equal(mine, right)


# What the operator means: tables to learn it from.

TABLE = [
    # base                 tokens         index     P  result
    ([0, 1, 2, 3], [-1, -2], [2, 0], 1, [0, -2, 2, -1]),
    ([0, 1, 2, 3], [-9, -1, -2], [2, 0], 1, [-9, -2, 2, -1]),
    ([0, 1, 2, 3], [-1, -2], [3, 0], 0, [-2, 1, 2, -1]),
    ([0, 1, 2, 3], [-8, -9, -1], [1], 2, [-8, -9, 2, -1]),
    ([0, 1, 2, 3], [], [], 1, [0, 1, 2, 3]),
]


@pytest.mark.parametrize("base, tokens, index, prefix, expected", TABLE)
def test_table(backend, device, base, tokens, index, prefix, expected):
    def column(values):
        return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1)

    index = torch.tensor(index, dtype=torch.int64, device=device).reshape(1, -1)
    y = tokenops.restore_tokens(column(base), column(tokens), index, prefix=prefix)
    assert y.flatten().tolist() == expected


def test_gradient_goes_where_the_value_came_from(backend, device):
    base = torch.zeros(1, 4, 1, device=device, requires_grad=True)
    tokens = torch.zeros(1, 2, 1, device=device, requires_grad=True)
    y = tokenops.restore_tokens(base, tokens, torch.tensor([[2, 0]], device=device))
    y.backward(torch.tensor([[[10.0], [20.0], [30.0], [40.0]]], device=device))
    assert base.grad.flatten().tolist() == [10, 0, 30, 0]
    assert tokens.grad.flatten().tolist() == [40, 20]


def test_companions_are_put_back_in_the_same_launch(backend, device, ran_kernels):
    base, tokens = torch.zeros(1, 4, 1, device=device), torch.ones(1, 2, 1, device=device)
    index = torch.tensor([[2, 0]], device=device)
    scores = torch.tensor([[0.1, 0.2, 0.3]], device=device), torch.tensor([[0.8, 0.9]], device=device)
    places = torch.tensor([[7, 8, 9]], device=device), torch.tensor([[5, 6]], device=device)
    with ran_kernels() as names:
        y, found = tokenops.restore_tokens(base, tokens, index, companions=(scores, places))
    assert names == {f"restore_tokens_fwd.{backend}"}
    assert y.flatten().tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(found[0], torch.tensor([[0.9, 0.2, 0.8]], device=device))
    assert found[1].tolist() == [[6, 8, 5]]
    assert tokenops.restore_tokens(base, tokens, index, companions=())[1] == ()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=lambda d: str(d)[6:])
def test_companions_forward_and_backward(backend, device, poisoned, dtype):
    for B, N, k, carried in ((2, 40, 17, 1), (3, 5, 5, 0), (2, 6, 0, 1), (0, 4, 2, 0)):
        base, tokens, index = inputs(B, N, k, 3, device, carried=carried)
        index = torch.where(torch.arange(k, device=device) % 4 == 3, -1, index)  # some go nowhere
        old = torch.randn(B, 2 * N, device=device).to(dtype)[:, ::2]
        new = torch.randn(k, B, device=device).to(dtype).t()
        upstream = torch.randn_like(base), torch.randn(B, N, device=device).to(dtype)
        results = []
        for function in (tokenops.restore_tokens, reference.restore_tokens):
            leaves = [t.detach().requires_grad_() for t in (base, tokens, old, new)]
            mask = (leaves[2].isnan(), leaves[3].isnan())
            y, (found, flags) = function(*leaves[:2], index, companions=((leaves[2], leaves[3]), mask))
            gradients = torch.autograd.grad((y, found), leaves, upstream, materialize_grads=True, allow_unused=True)
            results.append((y.detach(), found.detach(), flags, *gradients))
        assert_same(*results)


def test_tokens_that_go_nowhere(backend, device):
    base, tokens, index = inputs(2, 6, 3, 4, device)
    index[0, 1] = index[1, 0] = index[1, 2] = -1
    dy = torch.randn_like(base)
    ours = gradients(tokenops.restore_tokens, base, tokens, index, 1, dy)
    assert_same(ours, gradients(reference.restore_tokens, base, tokens, index, 1, dy))
    assert torch.equal(ours[0][1, 1:], base[1, 1:].clone().index_copy(0, index[1, 1:2], tokens[1, 1:2]))


# Every backend against the reference. It only copies, so it must agree to the bit.


@pytest.mark.slow_interpreted(quick=lambda case, dtype: case == RESTORE[0] or dtype in QUICK and case.N < 196)
@pytest.mark.parametrize("dtype", ALL, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", RESTORE, ids=str)
def test_forward_and_backward(backend, device, poisoned, ran_kernels, case, dtype):
    B, N, k, C, prefix, carried, _ = case
    base, tokens, index = inputs(B, N, k, C, device, prefix, carried * prefix, dtype)
    dy = torch.randn_like(base)
    with ran_kernels() as names:
        ours = gradients(tokenops.restore_tokens, base, tokens, index, case.prefix, dy)
    assert names == {f"restore_tokens_fwd.{backend}", f"restore_tokens_bwd.{backend}"}
    assert_same(ours, gradients(reference.restore_tokens, base, tokens, index, case.prefix, dy))
    if backend == "native" or device == "cuda":  # the interpreter knows one order
        assert_same(ours, gradients(tokenops.restore_tokens, base, tokens, index, case.prefix, dy))


def test_nan_and_infinity_are_values_like_others(backend, device):
    base = torch.tensor([torch.nan, torch.inf, 1.0, 2.0], device=device).reshape(1, 4, 1)
    tokens = torch.tensor([-torch.inf, torch.nan], device=device).reshape(1, 2, 1)
    y = tokenops.restore_tokens(base, tokens, torch.tensor([[1, 2]], device=device))
    assert str(y.flatten().tolist()) == "[nan, inf, -inf, nan]"


def test_many_images_in_parallel(backend, device):
    base, tokens, index = inputs(40, 32, 8, 64, device)
    assert_same((tokenops.restore_tokens(base, tokens, index),), (reference.restore_tokens(base, tokens, index),))


def test_compiled_errors_are_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: tokenops.restore_tokens(*a), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"index\[0, 1\]=5"):
        compiled(torch.zeros(1, 6, 2), torch.zeros(1, 2, 2), torch.tensor([[0, 5]]))


# Bad input


@pytest.mark.parametrize("path", ("native", "reference"))
def test_indices_out_of_range_or_repeated_on_a_cpu(path):
    base, tokens = torch.zeros(2, 6, 3), torch.zeros(2, 2, 3)
    with tokenops.use_backend(path):
        for bad in (5, -2, 2**62, -(2**63)):
            words = rf"index\[1, 0\]={bad}, but base has 5 tokens after a prefix of 1: 0 to 4 is allowed"
            with pytest.raises(IndexError, match=words) as error:
                tokenops.restore_tokens(base, tokens, torch.tensor([[0, 1], [bad, 1]]))
            assert ".cpp" not in str(error.value)
        words = r"index\[0, 1\]=3 is there twice, but the indices of an image must be unique"
        with pytest.raises(IndexError, match=words):
            tokenops.restore_tokens(base, tokens, torch.tensor([[3, 3], [0, 1]]))
        with pytest.raises(IndexError, match=r"index\[0, 0\]=0"):
            tokenops.restore_tokens(base[:, :1], tokens, torch.tensor([[0, 1], [0, 1]]))  # nothing behind the prefix
        assert torch.equal(tokenops.restore_tokens(base + 1, tokens, torch.full((2, 2), -1)), base + 1)
    with pytest.raises(IndexError, match=r"index\[0, 0\]=9"):
        kernel("restore_tokens_bwd", "native")(base, torch.tensor([[9], [0]]), 1, 0, [])


@pytest.mark.parametrize("carried", (0, 2))
def test_where_indices_are_not_looked_at_bad_ones_do_no_harm(backend, device, poisoned, carried):
    if device == "cpu" and backend == "native":
        pytest.skip("the C++ path raises")
    index = torch.tensor([[1, 4, 1, -1, 7, 1, 2**62], [2, 6, 6, -(2**63), 0, 3, 5]], device=device)
    # the last of equals wins
    kept = torch.tensor([[-1, 4, -1, -1, -1, 1, -1], [2, -1, -1, -1, 0, 3, 5]], device=device)
    base, tokens = torch.randn(2, 8, 5, device=device), torch.randn(2, carried + 7, 5, device=device)
    dy = torch.randn_like(base)
    ours = gradients(tokenops.restore_tokens, base, tokens, index, 2, dy)
    assert_same(ours, gradients(reference.restore_tokens, base, tokens, kept, 2, dy))
