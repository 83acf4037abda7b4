"""What all operators have in common, on every backend: autograd, torch's modes, layouts, and which kernel runs."""

import pytest
import torch
from torch.autograd import forward_ad

import tokenops
from support.calls import CALLS
from support.layouts import EXPANDED, LAYOUTS
from tokenops.ops import backends

#: the others' kernels are these with more or with less
quick_interpreted = pytest.mark.slow_interpreted(quick=lambda call: call not in ("attention", "a norm's bias alone"))


def inputs(call, device, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in call.shapes]


def run(call, tensors, upstream=None):
    """Results and all gradients."""
    results = call.of(*tensors)
    upstream = [torch.ones_like(y) for y in results] if upstream is None else upstream
    grads = torch.autograd.grad(results, tensors, upstream, allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in results), *grads]


def close(ours, right):
    assert len(ours) == len(right)
    for mine, other in zip(ours, right):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def same(ours, right):
    assert len(ours) == len(right) and all(torch.equal(mine, other) for mine, other in zip(ours, right))


def test_every_operator_is_here():
    others = {"match_bipartite", "match_packed", "sum_rows"}
    assert {call.operator for call in CALLS.values()} == {*backends.TABLE} - others


@quick_interpreted
def test_gradcheck(gradcheck, call, backend, device):
    gradcheck(call.of, inputs(call, device, torch.float64))


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_of_the_reference(name):
    with tokenops.use_backend("reference"):
        assert torch.autograd.gradcheck(CALLS[name].of, inputs(CALLS[name], "cpu", torch.float64))


def test_the_kernel_that_was_asked_for_runs(call, backend, ran_kernels, device):
    """Forward and backward, or forward alone; and the same again gives the same bits."""
    tensors = inputs(call, device)
    with ran_kernels() as names:
        first = run(call, tensors)
    passes = ("matched", "bwd") if call.operator == "merge_bipartite" else ("fwd", "bwd")
    shared = "soft_aggregate" if call.operator == "soft_scatter" else call.operator
    assert {f"{shared}_{name}.{backend}" for name in passes} <= names
    assert {name.rpartition(".")[2] for name in names} == {backend}
    same(run(call, tensors), first)
    with ran_kernels() as inferred, torch.inference_mode():
        call.of(*(t.detach() for t in tensors))
    assert inferred and inferred < names


def test_inference_mode_func_grad_and_autocast(call, backend, device):
    tensors = inputs(call, device)

    def gradients():
        def loss(*given):
            return sum(y.square().sum() for y in call.of(*given))

        return torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)

    found, plain = run(call, tensors), gradients()
    with torch.inference_mode():
        inferred = call.of(*tensors)
    close(inferred, found[: len(inferred)])
    with torch.autocast(device, dtype=torch.bfloat16):
        same(run(call, tensors), found)
    with tokenops.use_backend("reference"):
        close(found, run(call, tensors))
        close(plain, gradients())


@quick_interpreted
def test_only_the_gradients_asked_for(call, backend, device):
    tensors = inputs(call, device)
    right = run(call, tensors)[-len(tensors) :]
    for wanted, expected in zip(tensors, right):
        given = [t if t is wanted else t.detach() for t in tensors]
        results = [y for y in call.of(*given) if y.requires_grad]
        assert bool(results) == bool(expected.any()), "results ask for gradients of what they do not depend on"
        if results:
            close(torch.autograd.grad(sum(y.sum() for y in results), wanted), [expected])


def test_forward_mode_says_that_it_cannot(call, backend, device):
    tensors = tuple(t.detach() for t in inputs(call, device))
    tangents = tuple(torch.ones_like(t) for t in tensors)
    words = "jvp|forward mode|forward AD"
    with pytest.raises(RuntimeError, match=words):
        torch.func.jvp(call.function, tensors, tangents)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=words):
        call.function(*map(forward_ad.make_dual, tensors, tangents))


@quick_interpreted
def test_layouts(call, backend, device, poisoned):
    """Each tensor, and each gradient of a result, otherwise in memory."""
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        tensors = inputs(call, device, dtype)
        upstream = [torch.randn_like(y) for y in call.of(*tensors)]
        right = run(call, tensors, upstream)
        for layout, lay in (LAYOUTS | EXPANDED if dtype == torch.float32 else LAYOUTS).items():
            laid, gradients = [lay(t.detach()).requires_grad_() for t in tensors], [lay(dy) for dy in upstream]
            found = run(call, laid, gradients)
            if layout in EXPANDED:
                right = run(call, [dense(t) for t in laid], [dense(dy) for dy in gradients])
            for ours, other in zip(found, right, strict=True):
                error, size = (ours.double() - other.double()).norm(), other.double().norm() + other.numel() ** 0.5
                assert error <= allowed * size, layout


def dense(t):
    return t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_stay_in_their_image(call, backend, device, value):
    tensors = [t.detach() for t in inputs(call, device)]
    clean, reached = call.of(*tensors), False
    for image in range(call.images):
        spoilt = [t.clone() for t in tensors]
        spoilt[image][0] = value
        results = call.of(*spoilt)
        same([y[1] for y in results], [y[1] for y in clean])
        reached |= not all(y[0].isfinite().all() for y in results)
    assert reached


@pytest.mark.parametrize("name", CALLS)
def test_the_automatic_choice(name, device, ran_kernels):
    """The first backend that can run; the reference runs no kernel of ours."""
    call = CALLS[name]
    paths = backends.TABLE[call.operator][device]
    able = [path for path in paths if backends.why_not(call.operator, path, device, torch.float32) is None]
    with ran_kernels() as names:
        run(call, inputs(call, device))
    assert {kernel.rpartition(".")[2] for kernel in names} == {*able[:1]}
    with ran_kernels() as names, tokenops.use_backend("reference"):
        run(call, inputs(call, device))
    assert names == set()
