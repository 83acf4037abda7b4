"""restore_tokens: what it means, that every backend does it to the bit, and what it says to bad input."""

import pytest
import torch

import tokenops
from support.cases import DTYPES, QUICK, RESTORE
from support.compiled import ABSENT
from tokenops import reference
from tokenops.ops import backends
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


def wide(x):
    """Every second channel of a tensor with twice as many."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1).flatten(2)[..., ::2]


def shifted(x):
    """Not aligned to more than an element, rows apart."""
    room = torch.full((*x.shape[:2], x.shape[2] + 3), torch.nan, dtype=x.dtype, device=x.device)
    room[..., 1 : x.shape[2] + 1] = x
    return room[..., 1 : x.shape[2] + 1]


LAYOUTS = {
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "images last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every second channel": wide,
    "shifted": shifted,
    "some rows of more": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "one image for all": lambda x: x[:1].expand(x.shape),
    "one value for all": lambda x: x[:1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.slow_interpreted(quick=lambda layout, dtype: dtype == torch.float32)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, poisoned, layout, dtype):
    base, tokens, index = inputs(3, 13, 6, 24, device, dtype=dtype)
    dy = torch.randn_like(base)
    lay = LAYOUTS[layout]
    for arranged in ((lay(base), tokens, dy), (base, lay(tokens), dy), (base, tokens, lay(dy))):
        base_, tokens_, dy_ = arranged
        expected = gradients(reference.restore_tokens, base_, tokens_, index, 1, dy_)
        for index_ in (index, index.t().contiguous().t(), torch.stack((index, index + 100), -1)[..., 0]):
            assert_same(gradients(tokenops.restore_tokens, base_, tokens_, index_, 1, dy_), expected)


def test_nan_and_infinity_are_values_like_others(backend, device):
    base = torch.tensor([torch.nan, torch.inf, 1.0, 2.0], device=device).reshape(1, 4, 1)
    tokens = torch.tensor([-torch.inf, torch.nan], device=device).reshape(1, 2, 1)
    y = tokenops.restore_tokens(base, tokens, torch.tensor([[1, 2]], device=device))
    assert str(y.flatten().tolist()) == "[nan, inf, -inf, nan]"


def test_gradcheck(gradcheck, backend, device):
    base = torch.randn(2, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    index = places(2, 4, 2, device)
    gradcheck(lambda b, t: tokenops.restore_tokens(b, t, index, prefix=2), (base, tokens))


def test_many_images_in_parallel(backend, device):
    base, tokens, index = inputs(40, 32, 8, 64, device)
    assert_same((tokenops.restore_tokens(base, tokens, index),), (reference.restore_tokens(base, tokens, index),))


# torch's machinery


@pytest.mark.parametrize("carried", (0, 1))
def test_opcheck(backend, device, carried):
    base, tokens, index = inputs(2, 5, 2, 3, device, carried=carried)
    base = LAYOUTS["images last"](base)
    olds, news = [torch.randn(2, 5, device=device)], [torch.randn(2, 2, device=device)]
    torch.library.opcheck(kernel("restore_tokens_fwd", backend), (base, tokens, index, 1, olds, news))
    torch.library.opcheck(kernel("restore_tokens_bwd", backend), (base, index, 1, carried, olds))


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compile(device, compiler):
    def f(base, tokens, index):
        return tokenops.restore_tokens(base * 2, tokens, index).sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=compiler)
    sizes = ((2, 6, 2, 4), (3, 9, 5, 8)) if compiler == "aot_eager" else ((2, 6, 2, 4),)
    for B, N, k, C in sizes:
        base, tokens, index = inputs(B, N, k, C, device)
        results = []
        for function in (f, compiled):
            leaves = base.clone().requires_grad_(), tokens.clone().requires_grad_()
            y = function(*leaves, index)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_compile_with_a_tensor_given_twice(device):
    def f(base, scores, index):
        y, (first, second) = tokenops.restore_tokens(
            base, base[:, 1:], index, companions=((scores, scores), (scores, scores * 2))
        )
        return y + first.sum() + second.sum()

    torch._dynamo.reset()
    base, scores = torch.randn(2, 4, 3, device=device), torch.rand(2, 3, device=device, requires_grad=True)
    index = places(2, 3, 3, device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients_ = [torch.autograd.grad(g(base, scores, index).sum(), scores)[0] for g in (f, compiled)]
    torch.testing.assert_close(*gradients_)


def test_compiled_errors_are_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: tokenops.restore_tokens(*a), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"index\[0, 1\]=5"):
        compiled(torch.zeros(1, 6, 2), torch.zeros(1, 2, 2), torch.tensor([[0, 5]]))


def test_inference_mode_and_func_grad(backend, device):
    base, tokens, index = inputs(2, 4, 2, 3, device)
    with torch.inference_mode():
        assert_same((tokenops.restore_tokens(base, tokens, index),), (reference.restore_tokens(base, tokens, index),))
    functions = tokenops.restore_tokens, reference.restore_tokens
    losses = [lambda b, t, f=f: f(b, t, index).square().sum() for f in functions]
    assert_same(*(torch.func.grad(loss, argnums=(0, 1))(base, tokens) for loss in losses))


def test_only_the_gradients_asked_for(backend, device):
    base, tokens, index = inputs(2, 4, 2, 3, device)
    y = tokenops.restore_tokens(base, tokens.requires_grad_(), index)
    y.sum().backward()
    assert tokens.grad.eq(1).all() and base.grad is None


# Bad input


def test_indices_out_of_range_or_repeated_on_a_cpu():
    base, tokens = torch.zeros(2, 6, 3), torch.zeros(2, 2, 3)
    for bad in (5, -2, 2**62, -(2**63)):
        with pytest.raises(IndexError, match=rf"index\[1, 0\]={bad}, but .*: 0 to 4 is allowed") as error:
            tokenops.restore_tokens(base, tokens, torch.tensor([[0, 1], [bad, 1]]))
        assert ".cpp" not in str(error.value)
    with pytest.raises(IndexError, match=r"index\[0, 1\]=3 is there twice, but the indices of an image must be unique"):
        tokenops.restore_tokens(base, tokens, torch.tensor([[3, 3], [0, 1]]))
    with pytest.raises(IndexError, match=r"index\[0, 0\]=0"):
        tokenops.restore_tokens(base[:, :1], tokens, torch.tensor([[0, 1], [0, 1]]))  # nothing behind the prefix
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


def good():
    base, tokens, index = torch.zeros(2, 6, 3), torch.zeros(2, 2, 3), torch.tensor([[0, 1], [2, 3]])
    return {"base": base, "tokens": tokens, "index": index, "prefix": 1}


BAD = [
    ({"base": [1.0]}, TypeError, "base must be a tensor"),
    ({"base": torch.zeros(6, 3)}, ValueError, r"base must have shape \(B,P\+N,C\), but got \(6, 3\)"),
    ({"base": torch.zeros(2, 6, 3, dtype=torch.int32)}, TypeError, "base must be float16, bfloat16, float32"),
    ({"tokens": torch.zeros(2, 2, 3, dtype=torch.float16)}, TypeError, "tokens must have base's dtype"),
    ({"tokens": torch.zeros(3, 2, 3)}, ValueError, "tokens has 3 images, but base has 2"),
    ({"tokens": torch.zeros(2, 2, 4)}, ValueError, "tokens has 4 channels, but base has 3"),
    ({"tokens": torch.zeros(2, 5, 3)}, ValueError, "tokens has 5 rows, but index has 2"),
    ({"index": torch.zeros(2, 2)}, TypeError, "index must be int64"),
    ({"index": torch.zeros(2, 2, dtype=torch.int32)}, TypeError, "index must be int64, but got torch.int32"),
    ({"index": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "index has 3 images"),
    ({"prefix": 7}, ValueError, "prefix=7, but it must be between 0 and the 6 tokens"),
    ({"prefix": -1}, ValueError, "prefix=-1"),
    ({"prefix": 1.0}, TypeError, "prefix must be an int"),
    ({"companions": torch.zeros(2, 5)}, TypeError, r"companions must be a tuple of pairs \(old, new\), but got Tensor"),
    (
        {"companions": ((torch.zeros(2, 5), torch.zeros(2, 2)),) * 5},
        ValueError,
        "companions has 5 entries, but at most 4",
    ),
    (
        {"companions": ((torch.zeros(2, 6), torch.zeros(2, 2)),)},
        ValueError,
        r"companions\[0\]\[0\] must have shape \(2, 5\)",
    ),
    (
        {"companions": ((torch.zeros(2, 5), torch.zeros(2, 3)),)},
        ValueError,
        r"companions\[0\]\[1\] must have shape \(2, 2\)",
    ),
    (
        {"companions": ((torch.zeros(2, 5), torch.zeros(2, 2).long()),)},
        TypeError,
        r"companions\[0\] must have one dtype",
    ),
]


@pytest.mark.parametrize("change, kind, words", BAD, ids=[words for _, _, words in BAD])
def test_errors_in_words(change, kind, words):
    with pytest.raises(kind, match=f"restore_tokens: .*{words}"):
        tokenops.restore_tokens(**{**good(), **change})


def test_the_compiled_code_checks_again(device):
    """Called past the public function, the kernels still refuse what they cannot take."""
    if device == "cpu" and ABSENT is not None:
        pytest.skip(ABSENT)
    forward, backward = kernel("restore_tokens_fwd", "native"), kernel("restore_tokens_bwd", "native")
    a = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in good().items()}
    changes = [
        {"base": a["base"][0]},
        {"tokens": a["tokens"].half()},
        {"tokens": a["tokens"][:1]},
        {"tokens": a["tokens"][:, :1]},
        {"index": a["index"].int()},
        {"index": a["index"][:1]},
        {"index": a["index"][0]},
        {"prefix": 7},
        {"prefix": -1},
        {"olds": [a["base"][..., 0]], "news": [a["tokens"][..., 0]]},
        {"olds": [a["base"][:, 1:, 0]], "news": []},
        {"olds": [a["base"][:, 1:, 0]], "news": [a["index"]]},
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="must"):
            forward(*{**a, "olds": [], "news": [], **change}.values())
    for index, prefix, carried in ((a["index"], 1, 2), (a["index"].int(), 1, 0), (a["index"], 9, 0)):
        with pytest.raises(RuntimeError, match="must"):
            backward(a["base"], index, prefix, carried, [])


def test_automatic_choice(device, ran_kernels):
    with ran_kernels() as names:
        tokenops.restore_tokens(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good().items()})
    reason = backends.why_not("restore_tokens", "native", device, torch.float32)
    assert names == ({"restore_tokens_fwd.native"} if reason is None else set())
