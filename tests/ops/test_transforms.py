"""torch.func and autograd over every operator: vmap, gradients of samples and of gradients."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenops
from support.calls import CALLS, UNMERGED, B, C, N
from tokenops import use_backend

SAMPLES = 3
CASES = CALLS | {"unmerge_neighbours": UNMERGED}


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(params=("native", pytest.param("triton", marks=pytest.mark.slow), "reference"))
def engine(request):
    yield from using(request.param)


@pytest.fixture(params=("native fp64", "native fp32", "triton fp64"))
def dtype_of_kernels(request):
    """For tests that are quick enough for all; compiled attention takes no fp64."""
    backend, dtype = request.param.split()
    for _ in using(backend):
        yield {"fp64": torch.float64, "fp32": torch.float32}[dtype]


def using(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    with use_backend(backend):
        yield backend


@pytest.fixture(params=CASES)
def case(request):
    return made(request.param)


def made(name, dtype=torch.float64):
    """(function of tensors to a tuple, tensors, how many of these have images)."""
    call = CASES[name]
    return call.of, [numbers(*shape, dtype=dtype) for shape in call.shapes], call.images


def loss(function, *tensors):
    return sum((y * torch.arange(1.0, y.numel() + 1).cos().reshape(y.shape)).square().sum() for y in function(*tensors))


def samples_of(tensors, images):
    """SAMPLES of what has images; what is shared once."""
    given = [numbers(SAMPLES, *t.shape, dtype=t.dtype) if i < images else t for i, t in enumerate(tensors)]
    return given, tuple(0 if i < images else None for i in range(len(tensors)))


def sample(given, dims, s):
    return [t if dim is None else t[s] for t, dim in zip(given, dims)]


def assert_same(ours, right):
    assert len(ours) == len(right)
    for i, (a, b) in enumerate(zip(ours, right)):
        rtol, atol = (1e-9, 1e-11) if b.dtype == torch.float64 else (1e-3, 1e-4)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text: f"{i}: {text}")


def test_vmap_gives_what_a_loop_gives(case, engine):
    function, tensors, images = case
    given, dims = samples_of(tensors, images)
    right = [torch.stack(y) for y in zip(*(function(*sample(given, dims, s)) for s in range(SAMPLES)))]
    assert_same(torch.vmap(function, dims)(*given), right)


def test_vmap_of_triton_kernels():
    """One of each kind in a short run: a gradient that samples share, a list, a head's layout."""
    for name in ("soft_aggregate", "restore_tokens", "attention, received"):
        with use_backend("triton"):
            check_gradients_through_vmap(*made(name))


@pytest.mark.parametrize(
    "name", ("soft_aggregate", "token_mlp", "attention", "select_tokens, weighted", "merge_bipartite")
)
def test_samples_that_share_nothing(name, dtype_of_kernels):
    """Those of masks, scales and norms too: a call each, forward and backward."""
    function, tensors, _ = made(name, dtype_of_kernels)
    check_gradients_of_each_sample(function, *samples_of(tensors, len(tensors)))


def test_heads_lie_side_by_side_under_vmap(dtype_of_kernels):
    q, qk_mask = (numbers(SAMPLES, *shape, dtype=dtype_of_kernels) for shape in ((B, 2, N, C), (2, C)))
    out = torch.vmap(lambda q, qk_mask: tokenops.masked_channel_attention(q, q, q, qk_mask=qk_mask))(q, qk_mask)
    assert out.transpose(2, 3).is_contiguous()


def test_attention_alone_of_tensors_that_lie_otherwise(dtype_of_kernels):
    """Forward and backward: torch's kernel on a CPU reads channels side by side."""
    leaves = [numbers(B, 2, N, C, dtype=dtype_of_kernels).requires_grad_() for _ in range(3)]
    dout = numbers(B, 2, N, C, dtype=dtype_of_kernels)
    with use_backend("reference"):
        right = torch.autograd.grad(tokenops.masked_channel_attention(*leaves), leaves, dout)
    for laid in (turned, apart):
        otherwise = [laid(t).requires_grad_() for t in leaves]
        ours = torch.autograd.grad(tokenops.masked_channel_attention(*otherwise), otherwise, laid(dout))
        assert_same(ours, right)


def dense(t):
    return t.detach().clone(memory_format=torch.contiguous_format)


def turned(t):
    return dense(t.permute(*reversed(range(t.dim())))).permute(*reversed(range(t.dim())))


def apart(t):
    """With room between its elements, of NaN where there may be one."""
    nothing = float("nan") if t.is_floating_point() else 0
    room = t.detach().new_full([2 * size for size in t.shape], nothing)
    return room[(slice(None, None, 2),) * t.dim()].copy_(t.detach())


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_may_lie_otherwise_in_memory(name, dtype_of_kernels):
    """Offloading, compression and other hooks give it back with the strides they please."""
    function, tensors, _ = made(name, dtype_of_kernels)
    leaves = [t.requires_grad_() for t in tensors]
    right = torch.autograd.grad(loss(function, *leaves), leaves, materialize_grads=True)
    for laid in (dense, turned, apart):
        with torch.autograd.graph.saved_tensors_hooks(laid, lambda t: t):
            of_all = loss(function, *leaves)
        assert_same(torch.autograd.grad(of_all, leaves, materialize_grads=True), right)


def test_saved_weights_of_one_slot_may_lie_otherwise():
    """Their stride between slots means nothing."""
    leaves = [torch.randn(B, 40, n).bfloat16().requires_grad_() for n in (C, 1)]
    right = torch.autograd.grad(loss(tokenops.soft_aggregate, *leaves), leaves)
    with torch.autograd.graph.saved_tensors_hooks(apart, lambda t: t):
        of_all = loss(tokenops.soft_aggregate, *leaves)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(of_all, leaves), right, strict=True))


class Ran(TorchDispatchMode):
    """How often each of our kernels runs in the block."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, kernel, types, arguments=(), options=None):
        if kernel.namespace == "tokenops" and kernel._overloadname:
            self.times[kernel._opname, kernel._overloadname] += 1
        return kernel(*arguments, **(options or {}))


def test_samples_are_one_call_where_they_share_nothing():
    """And a call each where the gradient of what they share is asked for."""
    x, w, scale = numbers(SAMPLES, B, N, C), numbers(SAMPLES, B, N, 3), numbers(1)

    def of_each(x, w, scale):
        return tokenops.soft_aggregate(x, w, scale=scale).square().sum()

    forward, backward = ("soft_aggregate_fwd", "native"), ("soft_aggregate_bwd", "native")
    with use_backend("native"), Ran() as ran:
        torch.vmap(torch.func.grad(of_each), (0, 0, None))(x, w, None)
    assert ran.times == {forward: 1, backward: 1}
    with use_backend("native"), Ran() as ran:
        torch.vmap(torch.func.grad(of_each, 2), (0, 0, None))(x, w, scale)
    assert ran.times == {forward: 1, backward: SAMPLES}


def test_gradients_go_through_vmap(case, engine):
    check_gradients_through_vmap(*case)


def check_gradients_through_vmap(function, tensors, images):
    given, dims = samples_of(tensors, images)
    leaves = [t.clone().requires_grad_() for t in given]
    right = torch.autograd.grad(
        sum(loss(function, *sample(leaves, dims, s)) for s in range(SAMPLES)), leaves, materialize_grads=True
    )

    def together(*tensors):
        return torch.vmap(partial(loss, function), dims)(*tensors).sum()

    assert_same(torch.func.grad(together, tuple(range(len(given))))(*given), right)
    together(*leaves).backward()
    assert_same([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves], right)


def test_gradients_of_each_sample(case, engine):
    function, tensors, images = case
    check_gradients_of_each_sample(function, *samples_of(tensors, images))


def check_gradients_of_each_sample(function, given, dims):
    of_one = torch.func.grad(partial(loss, function), tuple(range(len(given))))
    right = [torch.stack(g) for g in zip(*(of_one(*sample(given, dims, s)) for s in range(SAMPLES)))]
    assert_same(torch.vmap(of_one, dims)(*given), right)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)  # compiled attention takes no fp64
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_sample_whatever_they_share(name, dtype, engine):
    """Each tensor has samples, or is the same for all: what is saved for the gradient may lie in another order."""
    function, tensors, _ = made(name, dtype)
    for shared in range(len(tensors)):
        for alone in (True, False):  # that tensor alone, or all others
            dims = tuple(None if (i == shared) is alone else 0 for i in range(len(tensors)))
            if all(dim is None for dim in dims):
                continue
            given = [t if d is None else numbers(SAMPLES, *t.shape, dtype=dtype) for t, d in zip(tensors, dims)]
            check_gradients_of_each_sample(function, given, dims)


def test_weights_of_each_sample_and_vmap_within_vmap(case, engine):
    function, tensors, _ = case
    given = [numbers(2, SAMPLES, *t.shape) for t in tensors]
    results = [[function(*(t[i, s] for t in given)) for s in range(SAMPLES)] for i in range(2)]
    right = [torch.stack([torch.stack([one[n] for one in row]) for row in results]) for n in range(len(results[0][0]))]
    assert_same(torch.vmap(torch.vmap(function))(*given), right)


def test_gradients_of_gradients(case, engine):
    function, tensors, _ = case
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(partial(loss, function), leaves, fast_mode=True)


def test_a_second_order_beside_another_path_is_not_lost(case, engine):
    """`autograd.grad` follows only what leads to its inputs: a path that ends without a word would be zero."""
    function, tensors, _ = case
    leaves = [t.requires_grad_() for t in tensors]

    def second(function):
        first = torch.autograd.grad(loss(function, *leaves) ** 2, leaves, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum((g + t).square().sum() for g, t in zip(first, leaves)), leaves)

    ours = second(function)
    with use_backend("reference"):
        assert_same(ours, second(function))
    assert not torch.equal(ours[0], 2 * leaves[0])  # what the other path alone gives


TWICE = {
    "soft_aggregate": (lambda x: tokenops.soft_aggregate(x, x), (2, 6, 6)),
    "soft_scatter": (lambda x: tokenops.soft_scatter(x, x), (2, 6, 6)),
    "token_mlp": (lambda x: tokenops.token_mlp(x.unsqueeze(0), x, x[0], x, x[0]), (6, 6)),
    "token_mlp's weights": (lambda x: tokenops.token_mlp(x.unsqueeze(0), w := x * 2, b := x[0], w, b), (6, 6)),
    "attention": (lambda x: tokenops.masked_channel_attention(x, x, x), (2, 2, 5, 8)),
    "attention's masks": (
        lambda x: tokenops.masked_channel_attention(x, x, x, qk_mask=(m := x[0, :, 0]), v_mask=m),
        (2, 2, 5, 8),
    ),
    "select_tokens": (
        lambda x: tokenops.select_tokens(
            x, s := x[:, 1:, 0], 2, rest="weighted", companions=(s, s), norm=(x[0, 0], x[0, 0], 1e-5)
        ).companions[0],
        (2, 5, 8),
    ),
    "restore_tokens": (
        lambda x: tokenops.restore_tokens(x, x, torch.arange(4).expand(2, 4), companions=((x[:, 1:, 0],) * 2,))[0],
        (2, 5, 8),
    ),
    "restore_tokens' companions": (
        lambda x: tokenops.restore_tokens(
            x, x, torch.arange(4).expand(2, 4), companions=((s := x[:, 1:, 0], s), (s, s * 2))
        )[1][1],
        (2, 5, 8),
    ),
    "merge_neighbours": (
        lambda x: tokenops.merge_neighbours(x, (2, 3), "vertical", (w := x[0, 0], w), prefix=0, norm=(w, w, 1e-5))[0],
        (2, 6, 8),
    ),
    "merge_neighbours' logits and sizes": (
        lambda x: tokenops.merge_neighbours(x, (2, 3), "vertical", s := x[:, :, 0].exp(), prefix=0, sizes=s)[0],
        (2, 6, 8),
    ),
    "merge_bipartite": (lambda x: tokenops.merge_bipartite(x, x, 2, norm=(w := x[0, 0], w, 1e-5)).normed, (2, 6, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_a_tensor_given_twice(name):
    function, shape = TWICE[name]
    x = torch.randn(shape, requires_grad=True)
    right = torch.autograd.grad(function(x).square().sum(), x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), right, rtol=1e-4, atol=1e-4)
    with use_backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(function(x).square().sum(), x), right, rtol=1e-4, atol=1e-4)


def test_compiled_transforms_run_as_they_are():
    """torch.compile would take the forward pass alone, and the gradient would be zero."""

    def first(x, w):
        return torch.func.grad(lambda x: torch.vmap(tokenops.soft_aggregate)(x, w).square().sum())(x)

    x, w = numbers(SAMPLES, B, N, C), numbers(SAMPLES, B, N, 3)
    torch.testing.assert_close(torch.compile(first, backend="aot_eager")(x, w), first(x, w))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="within torch.func operators|User-inserted graph break"):
        torch.compile(first, backend="aot_eager", fullgraph=True)(x, w)
