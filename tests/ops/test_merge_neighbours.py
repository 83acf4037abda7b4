"""merge_neighbours: what it means, that every backend is as good as plain PyTorch, and what it says to bad input."""

import math

import pytest
import torch

import tokenops
from support.cases import DTYPES, MERGE, MERGE_LARGE, QUICK
from support.neighbours import AXES, OPTIONS, cancelling, compare, inputs, run
from support.runs import double
from tokenops import reference

NAN, INF = math.nan, math.inf
merge_neighbours, unmerge_neighbours = tokenops.merge_neighbours, tokenops.unmerge_neighbours


OPERATOR = "merge_neighbours"  # of the `backend` fixture


def column(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1)


# What the operator means: tables to learn it from. The grid is  1 2 3
#                                                                4 5 6  behind a class token of 9.

TABLE = [
    # axis          weights                       result
    ("horizontal", None, [9, 1.5, 3, 4.5, 6]),
    ("vertical", None, [9, 2.5, 3.5, 4.5]),
    ("horizontal", (1, 0), [9, 1, 3, 4, 6]),  # the one that is alone is not weighted
    ("horizontal", (0.25, 2.0), [9, 4.25, 3, 11, 6]),
    ("vertical", (-1.0, 1.0), [9, 3, 3, 3]),
    ("horizontal", [0, 0, 5, -INF, 0, 5], [9, 1.5, 3, 5, 6]),  # logits
    ("horizontal", [-INF, -INF, -INF, 0, -INF, 0], [9, 0, 3, 4, 6]),  # none counts: zero, unless alone
    ("vertical", [1e4, 0, 0, 0, 1e4, 0], [9, 1, 5, 4.5]),
]


@pytest.mark.parametrize("axis, weights, expected", TABLE)
def test_table(backend, device, axis, weights, expected):
    if isinstance(weights, list):
        weights = torch.tensor([weights], device=device, dtype=torch.float32)
    x = column([9, 1, 2, 3, 4, 5, 6], device)
    for function in (merge_neighbours, reference.merge_neighbours):
        assert function(x, (2, 3), axis, weights).flatten().tolist() == expected


SIZED = [
    # weights      sizes              result and its sizes, of the grid  1 2 3
    (None, [1, 3, 2], [1.75, 3], [4, 2]),
    (None, [0, 2, 1], [2, 3], [2, 1]),
    (None, [0, 0, 0], [1.5, 3], [0, 0]),  # as if equal
    ((1.0, 1.0), [1, 3, 2], [3.5, 3], [4, 2]),  # 2 (1/4 + 2 * 3/4)
    ("log 3", [3, 1, 1], [1.5, 3], [4, 1]),  # logits 0 and log 3
]


@pytest.mark.parametrize("weights, sizes, expected, merged", SIZED)
def test_sizes(backend, device, weights, sizes, expected, merged):
    if weights == "log 3":
        weights = torch.tensor([[0, math.log(3), 0]], device=device)
    for function in (merge_neighbours, reference.merge_neighbours):
        sizes_ = torch.tensor([sizes], dtype=torch.float32, device=device)
        y, found = function(column([1, 2, 3], device), (1, 3), "horizontal", weights, prefix=0, sizes=sizes_)
        torch.testing.assert_close(y.flatten().tolist(), [float(v) for v in expected])
        assert found.flatten().tolist() == merged


def test_merging_with_sizes_gives_the_mean_of_all(backend, device):
    """Whatever the order and however odd the grid: each token stays the mean of the patches it stands for."""
    x, sizes, grid = torch.randn(1, 5 * 7, 3, device=device), torch.ones(1, 5 * 7, device=device), [5, 7]
    y = x
    for axis in ("horizontal", "vertical", "horizontal", "vertical", "vertical", "horizontal"):
        y, sizes = merge_neighbours(y, tuple(grid), axis, prefix=0, sizes=sizes)
        grid[axis == "horizontal"] = (grid[axis == "horizontal"] + 1) // 2
    assert grid == [1, 1] and sizes.item() == 35
    torch.testing.assert_close(y[:, 0], x.mean(dim=1))


def test_the_norm_is_that_of_the_result(backend, device):
    x, norm = torch.randn(2, 7, 8, device=device), (torch.rand(8, device=device), None, 0.1)
    y, normed = merge_neighbours(x, (2, 3), "vertical", norm=norm)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(y, (8,), *norm))


UNMERGED = [
    # merges                    tokens         mode        full grid of 2 x 5
    ((), range(10), "repeat", [*range(10)]),
    (("horizontal",), range(6), "repeat", [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]),
    (("vertical",), range(5), "repeat", [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]),
    (("horizontal", "vertical", "horizontal"), [0, 8], "repeat", [0, 0, 0, 0, 8] * 2),
    (("horizontal", "vertical", "horizontal"), [0, 8], "bilinear", [0, 0, 1, 3, 5] * 2),
    (("vertical", "vertical"), range(5), "bilinear", [0, 1, 2, 3, 4] * 2),
]


@pytest.mark.parametrize("merges, tokens, mode, expected", UNMERGED)
def test_unmerge(device, merges, tokens, mode, expected):
    y = unmerge_neighbours(column([9, *tokens], device), (2, 5), merges, mode=mode)
    torch.testing.assert_close(y.flatten().tolist(), [9.0, *map(float, expected)])


def test_unmerge_is_the_way_back(device):
    """Merging what was repeated changes nothing; of a constant image neither does anything else."""
    for merges in (("horizontal", "vertical"), ("vertical",), ("horizontal",) * 3):
        small = 5 if "vertical" not in merges else 3, -(-7 // 2 ** merges.count("horizontal"))
        x = torch.randn(2, 1 + small[0] * small[1], 4, device=device, requires_grad=True)
        y, grid = unmerge_neighbours(x, (5, 7), merges), (5, 7)
        for axis in merges:
            y = merge_neighbours(y, grid, axis)
            grid = ((grid[0] + 1) // 2, grid[1]) if axis == "vertical" else (grid[0], (grid[1] + 1) // 2)
        torch.testing.assert_close(y, x)
        flat = torch.ones_like(x)
        torch.testing.assert_close(unmerge_neighbours(flat, (5, 7), merges, mode="bilinear").unique().item(), 1.0)
    assert torch.autograd.gradcheck(lambda t: unmerge_neighbours(t, (5, 7), merges), (x[..., :1].double(),))


# Every backend against the reference in fp64: values and gradients at most twice as far as plain PyTorch.


@pytest.mark.slow_interpreted(quick=lambda case, dtype: case == MERGE[0] or dtype in QUICK)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", (*MERGE, *MERGE_LARGE), ids=str)
def test_forward_and_backward(backend, device, poisoned, ran_kernels, case, dtype):
    if case in MERGE_LARGE and backend == "triton" and device == "cpu":
        pytest.skip("too large for the interpreter")
    for number, option in enumerate(OPTIONS):
        few = case.B * case.H * case.W < 40 and (backend == "native" or device == "cpu")  # each is compiled on a GPU
        for axis in AXES if few else AXES[(number + (dtype == torch.float32)) % 2 :][:1]:
            tensors = inputs(case, dtype, device, option)
            truth = run(reference.merge_neighbours, double(tensors), case, axis, option)
            with ran_kernels() as names:
                *ours, _ = run(merge_neighbours, tensors, case, axis, option, truth[2])
            assert names == {f"merge_neighbours_fwd.{backend}", f"merge_neighbours_bwd.{backend}"}
            *plain, _ = run(reference.merge_neighbours, tensors, case, axis, option, truth[2])
            compare(ours, plain, truth, cancelling(tensors, truth[2]))
            if backend == "triton" and device == "cpu":
                continue  # the interpreter knows one order
            *again, _ = run(merge_neighbours, tensors, case, axis, option, truth[2])
            for mine, same in zip(ours, again):
                assert all(torch.equal(mine[n], same[n]) for n in mine)  # deterministic


@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64), ids=lambda d: str(d)[6:]
)
def test_weights_and_sizes_of_other_dtypes(backend, device, dtype):
    x = torch.randn(2, 7, 8, device=device)
    for kind in ("channels", "scalars", "logits"):
        shape = {"channels": (8,), "scalars": (1,), "logits": (2, 6)}[kind]
        given = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)]
        sizes = torch.randint(1, 4, (2, 6), device=device).to(dtype)
        results = []
        for function in (merge_neighbours, reference.merge_neighbours):
            y, merged = function(x, (2, 3), "horizontal", given[0] if kind == "logits" else tuple(given), sizes=sizes)
            used = given[:1] if kind == "logits" else given
            results.append((y, merged, *torch.autograd.grad(y.square().sum(), used)))
        for ours, plain in zip(*results, strict=True):
            assert ours.dtype == plain.dtype
            wide = ours.dtype == torch.float64  # of what was made in fp32
            torch.testing.assert_close(*((t.float() if wide else t) for t in (ours, plain)))


def test_a_number_and_a_tensor(backend, device):
    x, w = torch.randn(2, 7, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    for weights in ((w, 0.5), (0.25, w), (w, w), (w[:1], w), (w[0], 2)):
        results = []
        for function in (merge_neighbours, reference.merge_neighbours):
            y = function(x, (2, 3), "vertical", weights)
            results.append((y, *torch.autograd.grad(y.square().sum(), w)))
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)


def test_nan_and_infinity_stay_where_they_are(backend, device):
    x = column([NAN, 1, NAN, INF, 2, 3, INF], device)
    for weights in (None, torch.zeros(1, 6, device=device)):
        y = merge_neighbours(x, (2, 3), "horizontal", weights)
        assert str(y.flatten().tolist()) == "[nan, nan, inf, 2.5, inf]"
    logits = torch.tensor([[0, NAN, NAN, INF, 0, 0]], device=device)
    assert str(merge_neighbours(x, (2, 3), "horizontal", logits).flatten().tolist()) == "[nan, nan, inf, nan, inf]"


@pytest.mark.parametrize("dtype, ulp", ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)), ids=("bfloat16", "float16"))
def test_ties_are_rounded_to_even(backend, device, dtype, ulp):
    x = column([0, 1, 1 + ulp, 1 + ulp, 1 + 2 * ulp], device).to(dtype)
    for tokens in (x, x.expand(1, 5, 20), x.expand(1, 5, 20).contiguous()):
        y = merge_neighbours(tokens, (1, 4), "horizontal")
        assert y[0].T.tolist() == [[0, 1, 1 + 2 * ulp]] * tokens.shape[2]


def test_gradients_that_nobody_asked_for(backend, device):
    x, w = torch.randn(2, 7, 4, device=device), torch.rand(4, device=device)
    sizes = torch.ones(2, 6, device=device, requires_grad=True)
    y, merged = merge_neighbours(x, (2, 3), "vertical", sizes=sizes)
    assert not y.requires_grad and not merged.requires_grad
    y, normed = merge_neighbours(x, (2, 3), "vertical", norm=(w.requires_grad_(), None, 1e-6))
    assert not y.requires_grad and normed.requires_grad
    y = merge_neighbours(x, (2, 3), "vertical", (w, 0.5))
    y.sum().backward()
    assert x.grad is None
