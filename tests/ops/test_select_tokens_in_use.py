"""select_tokens in use: torch's machinery, what it says to bad input, which kernel runs."""

import pytest
import torch

import tokenops
from support.compiled import ABSENT
from tokenops import reference
from tokenops.ops import backends
from tokenops.ops.schemas import kernel

select_tokens = tokenops.select_tokens

OPERATOR = "select_tokens"  # of the `backend` fixture


# torch's machinery


def test_opcheck(backend, device):
    x, scores, size = torch.randn(2, 6, 4, device=device), torch.rand(2, 5, device=device), torch.rand(2, 5)
    size, counts = size.to(device), torch.tensor([1, 3], device=device)
    weight = torch.ones(4, device=device)
    for rest, norm in (("none", False), ("normalized", True), ("mean", False)):
        arguments = (x, scores, 3, counts, [size], weight, None, 1, rest, True, norm, 1e-5)
        torch.library.opcheck(kernel("select_tokens_fwd", backend), arguments)
        tokens, index, _, _, fused, (followed,) = kernel("select_tokens_fwd", backend)(*arguments)
        given = (x, fused) if rest == "normalized" else (None, None)
        arguments = (tokens, [followed], index, scores, counts, *given, 1, rest)
        torch.library.opcheck(kernel("select_tokens_bwd", backend), arguments)


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compile(device, compiler):
    def f(x, scores, weight, k):
        chosen = select_tokens(
            x * 2, scores, k, rest="weighted", companions=(scores,), norm=(weight, None, 1e-6), order="index"
        )
        return chosen.tokens.sin() + chosen.normed, chosen.companions[0]

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=compiler)
    for B, N, k, C in ((2, 6, 2, 4), (3, 9, 5, 8)) if compiler == "aot_eager" else ((2, 6, 2, 4),):
        made = torch.randn(B, 1 + N, C), torch.rand(B, N), torch.rand(C)
        results = []
        for function in (f, compiled):
            leaves = [t.to(device).requires_grad_() for t in (t.clone() for t in made)]
            y, followed = function(*leaves, k)
            results.append((y, followed, *torch.autograd.grad(y.square().sum() + followed.sum(), leaves)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_inference_mode_func_grad_and_autocast(backend, device):
    x, scores = torch.randn(2, 6, 4, device=device), torch.rand(2, 5, device=device)
    with torch.inference_mode():
        assert torch.equal(select_tokens(x, scores, 2).tokens, reference.select_tokens(x, scores, 2)[0])
    functions = select_tokens, reference.select_tokens
    losses = [lambda x, s, f=f: f(x, s, 2, rest="weighted")[0].square().sum() for f in functions]
    for ours, plain in zip(*(torch.func.grad(loss, argnums=(0, 1))(x, scores) for loss in losses), strict=True):
        torch.testing.assert_close(ours, plain)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert select_tokens(x, scores, 2, norm=(None, None, 1e-6)).normed.dtype == torch.float32


def test_only_the_gradients_asked_for(backend, device):
    x, scores = torch.randn(2, 6, 4, device=device), torch.rand(2, 5, device=device, requires_grad=True)
    chosen = select_tokens(x, scores, 2, companions=(scores,))
    chosen.companions[0].sum().backward()  # by way of the companion alone
    assert scores.grad.sum(dim=1).tolist() == [2, 2] and x.grad is None


# Bad input


def good():
    return {"x": torch.zeros(2, 6, 3), "scores": torch.zeros(2, 5), "k": 2}


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor"),
    ({"x": torch.zeros(6, 3)}, ValueError, r"x must have shape \(B,P\+N,C\), but got \(6, 3\)"),
    ({"x": torch.zeros(2, 6, 3, dtype=torch.int32)}, TypeError, "x must be float16"),
    ({"scores": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "scores must be float16"),
    ({"scores": torch.zeros(3, 5)}, ValueError, "scores has 3 images, but x has 2"),
    ({"scores": torch.zeros(2, 6)}, ValueError, "scores has 6 tokens, but x has 6 tokens, 5 after a prefix of 1"),
    ({"k": 300}, ValueError, "k=300, but x has 5 tokens after a prefix of 1: 0 to 5 is allowed"),
    ({"k": -1}, ValueError, "k=-1"),
    ({"k": 2.0}, TypeError, "k must be an int, but got 2.0"),
    ({"k": True}, TypeError, "k must be an int"),
    ({"prefix": 7}, ValueError, "prefix=7"),
    ({"rest": "sum"}, ValueError, "rest='sum', but it must be one of 'none', 'weighted', 'mean'"),
    ({"order": "best"}, ValueError, "order='best', but it must be one of 'score', 'index'"),
    ({"normalize": None}, TypeError, "normalize must be True or False"),
    ({"counts": [1, 2]}, TypeError, "counts must be a tensor"),
    ({"counts": torch.zeros(2)}, TypeError, "counts must be int64"),
    ({"counts": torch.zeros(3, dtype=torch.int64)}, ValueError, "counts has 3 images"),
    ({"companions": torch.zeros(2, 5)}, TypeError, "companions must be a tuple of tensors, but got Tensor"),
    ({"companions": (torch.zeros(2, 5),) * 5}, ValueError, "companions has 5 entries, but at most 4"),
    ({"companions": (torch.zeros(2, 6),)}, ValueError, r"companions\[0\] must have shape \(2, 5\), but got \(2, 6\)"),
    ({"companions": (torch.zeros(2, 5, dtype=torch.complex64),)}, TypeError, r"companions\[0\] must be real"),
    ({"norm": torch.ones(3)}, TypeError, r"norm must be \(weight, bias, eps\)"),
    ({"norm": (torch.ones(4), None, 1e-5)}, ValueError, "norm's weight has 4 channels, but x has 3"),
    ({"norm": (None, torch.ones(1, 3), 1e-5)}, ValueError, "norm's bias must have shape"),
    ({"norm": (None, None, -1.0)}, ValueError, "norm's eps must be a number of at least 0"),
    ({"x": torch.zeros(1, 16386, 1), "scores": torch.zeros(1, 16385)}, ValueError, "at most 16384 are allowed"),
]


@pytest.mark.parametrize("change, kind, words", BAD, ids=[words for _, _, words in BAD])
def test_errors_in_words(change, kind, words):
    with pytest.raises(kind, match=f"select_tokens: .*{words}"):
        select_tokens(**{**good(), **change})


def test_counts_out_of_range(backend, device):
    x, scores = torch.randn(2, 6, 3, device=device), torch.rand(2, 5, device=device)
    counts = torch.tensor([[-3, 9], [0, 0]], device=device).t()[:, 0]
    if device == "cpu" and backend == "native":
        with pytest.raises(IndexError, match=r"counts\[0\]=-3, but it must be between 0 and k=2"):
            select_tokens(x, scores, 2, counts=counts)
        return
    chosen = select_tokens(x, scores, 2, counts=counts)  # not looked at: the nearest that is allowed
    nearest = select_tokens(x, scores, 2, counts=torch.tensor([0, 2], device=device))
    assert torch.equal(chosen.tokens, nearest.tokens) and torch.equal(chosen.index, nearest.index)
    assert chosen.lengths.tolist() == [1, 3]


def test_gradients_that_nobody_asked_for(backend, device):
    """Results that depend on nothing that needs a gradient need none, and forward mode is refused, not ignored."""
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
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: select_tokens(x, scores.detach(), 2).tokens, (x,), (torch.ones_like(x),))


def test_as_many_tokens_as_are_allowed(device):
    x, scores = torch.randn(1, 16385, 2, device=device), torch.rand(1, 16384, device=device).bfloat16()
    with tokenops.use_backend("native"):
        for order in ("score", "index"):
            ours = select_tokens(x, scores, 5000, order=order)
            assert torch.equal(ours.index, reference.select_tokens(x, scores, 5000, order=order)[1])


def test_the_compiled_code_checks_again(device):
    """Called past the public function, the kernels still refuse what they cannot take."""
    if device == "cpu" and ABSENT is not None:
        pytest.skip(ABSENT)
    x, scores = torch.zeros(2, 6, 4, device=device), torch.zeros(2, 5, device=device)
    forward = dict(
        x=x, scores=scores, k=2, counts=None, companions=[], weight=None, bias=None, prefix=1, rest="none",
        best_first=True, norm=False, eps=0.0,
    )  # fmt: skip
    changes = [
        {"x": x[0]}, {"scores": scores[:, :4]}, {"scores": scores.long()}, {"k": 6}, {"k": -1}, {"prefix": 9},
        {"rest": "some"}, {"counts": torch.zeros(3, dtype=torch.int64, device=device)}, {"companions": [scores] * 5},
        {"companions": [scores[:1]]}, {"norm": True, "weight": torch.zeros(3, device=device)},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(RuntimeError, match="must"):
            kernel("select_tokens_fwd", "native")(*{**forward, **change}.values())
    index = torch.zeros(2, 2, dtype=torch.int64, device=device)
    backward = dict(
        dtokens=x[:, :3], dcompanions=[], index=index, scores=scores, counts=None, x=None, fused=None, prefix=1,
        rest="none",
    )  # fmt: skip
    changes = [{"dtokens": x}, {"index": index.int()}, {"rest": "weighted"}, {"dcompanions": [scores]}, {"prefix": -1}]
    for change in changes:
        with pytest.raises(RuntimeError, match="must"):
            kernel("select_tokens_bwd", "native")(*{**backward, **change}.values())


def test_automatic_choice(device, ran_kernels):
    with ran_kernels() as names:
        select_tokens(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good().items()})
    reason = backends.why_not("select_tokens", "native", device, torch.float32)
    assert names == ({"select_tokens_fwd.native"} if reason is None else set())


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
