"""sum_rows: rows summed up where they go, on every backend."""

import pytest
import torch

import tokenops
from support.cases import DTYPES
from support.runs import double
from support.summed_rows import CASES, OPTIONS, compare, inputs, run
from tokenops.ops import reference_packed
from tokenops.ops.schemas import kernel
from tokenops.ops.sum_rows import gather_rows, sorted_rows, sum_rows

OPERATOR = "sum_rows"  # of the `backend` fixture


def test_literal_values(backend, device):
    x = torch.tensor([1.0, 2, 3, float("nan"), 5], device=device).unsqueeze(1)
    dest = torch.tensor([3, 0, 3, -1, 1], device=device)
    y, totals, _ = sum_rows(x, dest, 4)
    assert y.flatten().tolist() == [2, 5, 0, 4] and totals.tolist() == [1, 1, 0, 2]
    weight = torch.tensor([1.0, 2, 3, 4, 5], device=device)
    y, totals, _ = sum_rows(x, dest, 4, weight=weight)
    assert y.flatten().tolist() == [4, 25, 0, 10] and totals.tolist() == [2, 5, 0, 4]
    y, totals, _ = sum_rows(x, dest, 4, weight=weight, mean=True)
    assert y.flatten().tolist() == [2, 5, 0, 2.5] and totals.tolist() == [2, 5, 0, 4]
    assert gather_rows(y, dest).flatten().tolist() == [2.5, 2, 2.5, 0, 5]


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_forward_and_backward(backend, device, poisoned, ran_kernels, case, dtype):
    interpreted = backend == "triton" and device == "cpu"
    for number, option in enumerate(OPTIONS):
        if interpreted and (number + sum(case[:3])) % 4 != (*DTYPES, torch.float64).index(dtype):
            continue  # every case meets every option in one dtype or another
        T, M, C, kind = case
        tensors = inputs(T, M, C, kind, option, dtype, device)
        with ran_kernels() as names:
            ours = run(sum_rows, tensors, M, option[1])
        assert names == {f"sum_rows_fwd.{backend}", f"sum_rows_bwd.{backend}"}
        plain = run(reference_packed.sum_rows, tensors, M, option[1], ours[2])
        truth = run(reference_packed.sum_rows, double(tensors), M, option[1], ours[2])
        compare(ours, plain, truth, tensors)
        again = run(sum_rows, tensors, M, option[1], ours[2])
        for first, second in zip(ours[:2], again, strict=False):  # deterministic
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_gather_and_its_gradient(backend, device, ran_kernels):
    dest = torch.tensor([2, -1, 0, 2, 5], device=device)
    y = torch.randn(3, 4, device=device, requires_grad=True)
    with ran_kernels() as names:
        x = gather_rows(y, dest)
        (dy,) = torch.autograd.grad(x.square().sum(), y, create_graph=True)
    assert names == {f"sum_rows_bwd.{backend}", f"sum_rows_fwd.{backend}"}
    assert torch.equal(x, reference_packed.gather_rows(y, dest))
    torch.testing.assert_close(dy, torch.stack((2 * y[0], 0 * y[1], 4 * y[2])))
    (second,) = torch.autograd.grad(dy.sum(), y)
    assert second[:, 0].tolist() == [2, 0, 4]


def test_rows_that_go_somewhere_alone_are_not_rounded(backend, device):
    x, dest = torch.randn(40, 24, device=device), torch.randperm(40, device=device)
    y, *_ = sum_rows(x, dest, 40, weight=torch.rand(40, device=device) + 0.3, mean=True)
    if backend != "reference":
        assert torch.equal(y[dest], x)


def test_rows_in_another_company_give_the_same_bits(backend, device):
    """What goes to one place is added in the same way, wherever the rows lie."""
    x = torch.randn(500, 20, device=device)
    alone, _, _ = sum_rows(x, torch.zeros(500, dtype=torch.int64, device=device), 1)
    ahead = torch.randn(77, 20, device=device)
    dest = torch.cat((torch.arange(77) % 5, torch.full((500,), 5))).to(device)
    assert torch.equal(sum_rows(torch.cat((ahead, x)), dest, 6)[0][5:], alone)


@pytest.mark.parametrize("mean", (False, True))
def test_second_gradients(backend, device, gradcheck, mean):
    x, weight, factor = (torch.randn(shape, dtype=torch.float64, device=device) for shape in ((9, 3), (9,), (3,)))
    dest = torch.tensor([0, 2, 2, -1, 3, 0, 0, 9, 3], device=device)

    def function(x, weight, factor):
        y, _, normed = sum_rows(x, dest, 4, weight=weight + 2, mean=mean, norm=(factor, None, 0.1))
        return y.square(), normed

    leaves = [t.requires_grad_() for t in (x, weight, factor)]
    gradcheck(function, leaves)
    y, normed = function(*leaves)
    first = torch.autograd.grad(y.sum() + normed.square().sum(), leaves, create_graph=True)
    ours = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    with tokenops.use_backend("reference"):
        y, normed = function(*leaves)
        first = torch.autograd.grad(y.sum() + normed.square().sum(), leaves, create_graph=True)
        right = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    torch.testing.assert_close(ours, right)


def test_order_is_by_place_and_then_by_row():
    order, offsets = sorted_rows(torch.tensor([1, -5, 0, 1, 3, 0]), 2)
    assert order.tolist() == [2, 5, 0, 3, 1, 4] and offsets.tolist() == [0, 2, 4]


def test_samples_of_vmap(backend, device):
    x, dest = torch.randn(3, 9, 4, device=device), torch.randint(-1, 4, (9,), device=device)
    weight = torch.rand(3, 9, device=device)

    def function(x, weight):
        return sum_rows(x, dest, 4, weight=weight, mean=True)[0].square().sum()

    ours = torch.vmap(torch.func.grad(function, argnums=(0, 1)))(x, weight)
    each = [torch.func.grad(function, argnums=(0, 1))(*pair) for pair in zip(x, weight)]
    for together, parts in zip(ours, zip(*each)):
        torch.testing.assert_close(together, torch.stack(parts))


@pytest.mark.parametrize("name, place, words", (("order", 9, "is no row"), ("offsets", 7, "is no place in the order")))
def test_compiled_code_stays_within_the_rows(name, place, words):
    given = {"order": torch.tensor([0, 1]), "offsets": torch.tensor([0, 1, 2])}
    given[name][1] = place
    x, dest = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(IndexError, match=words):
        kernel("sum_rows_fwd", "native")(x, dest, 2, None, *given.values(), 2, None, None, False, False, 0.0)
