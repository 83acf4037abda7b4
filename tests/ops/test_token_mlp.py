"""token_mlp: what it means, and that every backend computes it, values and gradients, without the hidden tensor."""

from importlib import import_module

import pytest
import torch

import tokenops
from support.cases import DTYPES, TOKEN_MLP, TokenMlp
from support.compiled import needs_amx
from support.made import Sizes
from support.threads import threads
from support.tolerance import assert_as_good_as_plain
from tokenops import reference
from tokenops.ops import native

NAMES = ("dz", "dw1", "db1", "dw2", "db2")


OPERATOR = "token_mlp"  # of the `backend` fixture


def inputs(case, dtype, device):
    """z, w1, b1, w2, b2, with activations where the GELU bends."""
    B, M, R, N, C = case[:5]
    z = torch.randn(B, M, C, device=device)
    w1, b1 = torch.randn(R, M, device=device) / max(M, 1) ** 0.5, torch.randn(R, device=device) / 2
    w2, b2 = torch.randn(N, R, device=device) / max(R, 1) ** 0.5, torch.randn(N, device=device)
    return [t.to(dtype) for t in (z, w1, b1, w2, b2)]


def run(function, tensors, dy):
    """The result and the gradients of the tensors that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))


def test_a_table(device):
    """Identity weights: two tokens through a GELU, their sum and difference out."""
    z = torch.tensor([[[1.0, -1.0], [0.0, 2.0]]], device=device)
    w1, w2 = torch.eye(2, device=device), torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
    y = tokenops.token_mlp(z, w1, None, w2, torch.tensor([0.0, 10.0], device=device))
    expected = [[0.8413447, -0.1586553 + 1.9544997], [10.8413447, 10 - 0.1586553 - 1.9544997]]
    torch.testing.assert_close(y[0], torch.tensor(expected, device=device))


def test_reference_is_the_papers_formula():
    z, w1, b1, w2, b2 = inputs(TOKEN_MLP[0], torch.float64, "cpu")
    pre = torch.einsum("rm,bmc->brc", w1, z) + b1[:, None]
    hidden = pre * 0.5 * (1 + torch.erf(pre / 2**0.5))
    expected = torch.einsum("nr,brc->bnc", w2, hidden) + b2[:, None]
    torch.testing.assert_close(reference.token_mlp(z, w1, b1, w2, b2), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow_interpreted(quick=lambda case, dtype: dtype == torch.bfloat16 or case.R < 20)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TOKEN_MLP, ids=str)
def test_as_good_as_plain(case, dtype, backend, device):
    check_as_good_as_plain(case, dtype, device)


def check_as_good_as_plain(case, dtype, device):
    tensors = inputs(case, dtype, device)
    dy = torch.randn(case.B, case.N, case.C, device=device).to(dtype)
    results = (
        run(tokenops.token_mlp, tensors, dy),
        run(reference.token_mlp, tensors, dy),
        run(reference.token_mlp, [t.double() for t in tensors], dy.double()),
    )
    for what, ours, plain, truth in zip(("y", *NAMES), *results):
        assert_as_good_as_plain(ours, plain, truth, what)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_images_that_do_not_fit_at_once(dtype, backend, device, monkeypatch):
    """Two, two and one."""
    case = TokenMlp(5, 17, 12, 7, 9, "w1's rows are no multiple of what the kernel reads")
    if backend == "triton":
        monkeypatch.setattr("tokenops.ops.triton.token_mlp.HIDDEN_BYTES", 2 * case.R * case.C * dtype.itemsize)
    check_as_good_as_plain(case, dtype, device)


@pytest.mark.usefixtures("poisoned")
def test_one_image_on_tiles_of_many_threads():
    """Each has some of the hidden rows."""
    with threads(3):
        check_as_good_as_plain(TOKEN_MLP[3], torch.bfloat16, "cpu")


@needs_amx
def test_bfloat16_runs_on_tiles():
    """Where the machine has them: what the GELU takes is then not rounded."""
    tensors = [torch.randn(shape).bfloat16() for shape in ((2, 40, 64), (48, 40), (48,), (33, 48), (33,))]
    on_tiles = tokenops.token_mlp(*tensors)
    with native.limit_cpu_isa("avx512bf16"):
        without = tokenops.token_mlp(*tensors)
    assert not torch.equal(on_tiles, without) and torch.equal(on_tiles, tokenops.token_mlp(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gelu(dtype, backend, device):
    """Of single numbers, those that overflow and those that are none too.

    The CPU's, but on tiles, is torch's own, whose digits and infinities depend on the processor.
    """
    points = [*torch.linspace(-14, 14, 225).tolist(), -1e4, 1e4, float("nan")]
    if dtype in (torch.float16, torch.bfloat16):  # a GPU takes a product of float32 apart
        points += [float("inf"), float("-inf")]
    z = torch.tensor(points, dtype=dtype, device=device)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    y, dz, *_ = run(
        lambda z: tokenops.token_mlp(z, one, None, one, None), [z[None, None]], torch.ones_like(z)[None, None]
    )
    tiles = dtype == torch.bfloat16 and native.attention_isa(dtype) == "amx"
    own = device == "cpu" and backend == "native" and not tiles
    truth, slope = run(torch.nn.functional.gelu, [z if own else z.double()], torch.ones_like(z))
    rtol, atol = 2 * torch.finfo(dtype).eps, {torch.float64: 1e-12, torch.float32: 3e-7}.get(dtype, 2e-6)
    for ours, right in ((y, truth), (dz, slope)):
        right = right.double() if own else right.masked_fill(z == float("-inf"), float("nan"))  # as on a GPU
        torch.testing.assert_close(ours[0, 0].double(), right, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_without_biases(dtype, backend, device):
    z, w1, _, w2, _ = inputs(TOKEN_MLP[0], dtype, device)
    dy = torch.randn(z.shape[0], w2.shape[0], z.shape[2], device=device).to(dtype)

    def f(z, w1, w2, op=tokenops.token_mlp):
        return op(z, w1, None, w2, None)

    results = (
        run(f, (z, w1, w2), dy),
        run(lambda *t: f(*t, reference.token_mlp), (z, w1, w2), dy),
        run(lambda *t: f(*t, reference.token_mlp), (z.double(), w1.double(), w2.double()), dy.double()),
    )
    for what, ours, plain, truth in zip(("y", "dz", "dw1", "dw2"), *results):
        assert_as_good_as_plain(ours, plain, truth, what)


def test_the_hidden_tensor_never_exists(backend, device, monkeypatch):
    """No tensor of B * R * C elements is made, forward or backward, where that is much; plain PyTorch makes several."""
    case = TokenMlp(16, 3, 40, 5, 64, "the hidden tensor is by far the largest")
    tensors = inputs(case, torch.float32, device)
    dy = torch.randn(case.B, case.N, case.C, device=device)
    implementation = import_module(f"tokenops.ops.{'cpu' if backend == 'native' else 'triton'}.token_mlp")
    if backend == "triton":
        monkeypatch.setattr(implementation, "HIDDEN_BYTES", 4 * case.B * case.R * case.C // 6)
    with Sizes() as sizes:
        implementation.token_mlp_fwd(*tensors)
        implementation.token_mlp_bwd(dy, *tensors[:4])
    assert 0 < max(sizes.found) <= case.B * case.R * case.C // 4
    with Sizes() as sizes:
        reference.token_mlp(*tensors)
    assert max(sizes.found) == case.B * case.R * case.C


def test_autocast(backend, device):
    """The dtype of the tokens decides: autocast computes in it, and casts weights of another dtype to it."""
    z, *weights = inputs(TOKEN_MLP[0], torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokenops.token_mlp(z, *weights)
        low = tokenops.token_mlp(z.bfloat16(), *(w.requires_grad_() for w in weights))
    assert torch.equal(inside, tokenops.token_mlp(z, *(w.detach() for w in weights)))
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in weights)
    with pytest.raises(TypeError, match="token_mlp: w1 must have z's dtype torch.bfloat16, but got torch.float32"):
        tokenops.token_mlp(z.bfloat16(), *weights)


def test_nan_stays_in_its_image(backend, device):
    z, *weights = inputs(TOKEN_MLP[0], torch.float32, device)
    clean = tokenops.token_mlp(z, *weights)
    z[0, 1, 2] = float("nan")
    y = tokenops.token_mlp(z, *weights)
    assert y[0, :, 2].isnan().all() and torch.equal(y[1], clean[1])
    assert not y[0, :, 3].isnan().any()


@pytest.mark.slow_interpreted
def test_deterministic(backend, device):
    tensors = inputs(TOKEN_MLP[2], torch.float32, device)
    dy = torch.randn(TOKEN_MLP[2].B, TOKEN_MLP[2].N, TOKEN_MLP[2].C, device=device)
    first, second = run(tokenops.token_mlp, tensors, dy), run(tokenops.token_mlp, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
