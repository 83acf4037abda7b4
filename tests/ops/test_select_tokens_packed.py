"""select_tokens of packed sequences: what it means, and that it is a loop over them."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokenops
from support.packed_selection import boundaries, loop
from tokenops import restore_tokens, select_tokens
from tokenops.ops.select_packed import planned
from tokenops.ops.sum_rows import sorted_rows

NAN = math.nan
OPERATOR = "sum_rows"  # of the `backend` fixture


# What the operator means: tables to learn it from, of sequences of 3, 0, 1 and 2 rows and a row of slack.

LENGTHS = (3, 0, 1, 2)
TABLE = [
    # scores (those of the first rows are not looked at)  k  options  index  boundaries
    ([NAN, 1, 2, NAN, NAN, 5, NAN], 1, {}, [0, 2, 3, 4, 5], [0, 2, 2, 3, 5]),
    ([NAN, 1, 2, NAN, NAN, 5, NAN], 2, {}, [0, 2, 1, 3, 4, 5, -1], [0, 3, 3, 4, 6]),
    ([NAN, 1, 2, NAN, NAN, 5, NAN], 2, {"order": "index"}, [0, 1, 2, 3, 4, 5, -1], [0, 3, 3, 4, 6]),
    ([NAN, 1, 2, NAN, NAN, 5, NAN], 1, {"rest": "mean"}, [0, 2, -1, 3, 4, 5, -1], [0, 3, 3, 4, 6]),
    ([NAN, 1, 2, NAN, NAN, 5, NAN], 0, {"rest": "mean"}, [0, -1, 3, 4, -1, -1, -1], [0, 2, 2, 3, 5]),
    ([3, 1, 2, 4, 6, 5, NAN], 1, {"prefix": 0}, [0, 3, 4, -1], [0, 1, 1, 2, 3]),
    ([3, 1, 2, 4, 6, 5, NAN], 1, {"prefix": 2}, [0, 1, 2, 3, 4, 5, -1], [0, 3, 3, 4, 6]),
    ([3, NAN, 2, 4, 6, 5, NAN], 2, {"prefix": 0}, [0, 2, 3, 4, 5, -1, -1], [0, 2, 2, 3, 5]),
    ([0.0, -0.0, 0.0, 1, -0.0, 0.0, NAN], 2, {"prefix": 0}, [0, 1, 3, 4, 5, -1, -1], [0, 2, 2, 3, 5]),
    ([-math.inf, NAN, NAN, 1, 2, 2, NAN], 2, {"prefix": 0}, [0, 1, 3, 4, 5, -1, -1], [0, 2, 2, 3, 5]),
]


@pytest.mark.parametrize("scores, k, options, index, ends", TABLE)
def test_table(backend, device, scores, k, options, index, ends):
    x = torch.tensor([0.0, 1, 2, 3, 4, 5, NAN], device=device).unsqueeze(1)
    cu_seqlens = boundaries(LENGTHS, device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        chosen = select_tokens(
            x, torch.tensor(scores, dtype=dtype, device=device), k, cu_seqlens=cu_seqlens, max_seqlen=3, **options
        )
        rows = min(7, 4 * (options.get("prefix", 1) + k + ("rest" in options)))
        assert chosen.index.tolist() == (index + 7 * [-1])[:rows]
        assert chosen.cu_seqlens.tolist() == ends and chosen.cu_seqlens.dtype == torch.int32
        assert chosen.lengths.tolist() == [b - a for a, b in zip(ends, ends[1:])]
        kept = chosen.index >= 0
        assert torch.equal(chosen.tokens[kept, 0], chosen.index[kept].float())
        assert not chosen.tokens[ends[-1] :].any()
        if options.get("rest") == "mean":
            assert chosen.tokens[ends[1] - 1].item() == (1 if k else 1.5)
        assert chosen.companions == () and chosen.normed is None


CASES = [
    # lengths                  k  options
    ((5, 0, 1, 2, 9, 1), 3, {}),
    ((5, 0, 1, 2, 9, 1), 3, {"order": "index"}),
    ((5, 0, 1, 2, 9, 1), 3, {"rest": "mean"}),
    ((5, 0, 1, 2, 9, 1), 3, {"rest": "weighted"}),
    ((5, 0, 1, 2, 9, 1), 3, {"rest": "weighted", "normalize": False, "order": "index"}),
    ((5, 0, 1, 2, 9, 1), 3, {"prefix": 2, "rest": "mean", "counts": (0, 3, 2, 1, 2, 3)}),
    ((5, 0, 1, 2, 9, 1), 0, {"prefix": 0, "rest": "weighted"}),
    ((5, 0, 1, 2, 9, 1), 20, {"prefix": 3}),
    ((0, 0), 2, {}),
    ((), 2, {}),
]


def tensors(lengths, C, dtype, device, slack=3):
    T = sum(lengths) + slack
    x = torch.randn(T, 2 * C, device=device, dtype=dtype)[:, ::2]
    scores = torch.rand(T, 2, device=device, dtype=dtype)[:, 0]
    x[T - slack :] = scores[T - slack :] = NAN
    return x, scores, torch.rand(T, device=device), torch.randn(T, 6, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("lengths, k, options", CASES)
def test_a_loop_over_the_sequences(backend, device, lengths, k, options, dtype):
    x, scores, *companions = tensors(lengths, 12, dtype, device)
    options = dict(options)
    if "counts" in options:
        options["counts"] = torch.tensor(options["counts"], device=device)
    leaves = [t.clone().requires_grad_() for t in (x, scores, *companions)]
    weight = torch.rand(12, device=device, dtype=dtype)
    norm = (weight, None, 1e-5)
    chosen = select_tokens(
        *leaves[:2],
        k,
        cu_seqlens=boundaries(lengths, device),
        max_seqlen=20,
        companions=leaves[2:],
        norm=norm,
        **options,
    )
    others = [t.clone().requires_grad_() for t in (x, scores, *companions)]
    with tokenops.use_backend("reference"):
        tokens, followers, normed, index, made = loop(
            *others[:2], k, lengths, companions=others[2:], norm=norm, capacity=chosen.tokens.shape[0], **options
        )
    assert torch.equal(chosen.index, index) and chosen.lengths.tolist() == made
    exact = chosen.index >= 0
    assert torch.equal(chosen.tokens[exact], tokens[exact])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for ours, right in zip(
        (chosen.tokens, chosen.normed, *chosen.companions), (tokens, normed, *followers), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)
    if not lengths:
        return  # of a loop over nothing there is no graph
    upstream = [torch.randn_like(t) for t in (chosen.tokens, chosen.normed, *chosen.companions)]
    end = chosen.cu_seqlens[-1]
    upstream[1][end:] = 0  # the norm of a row of zeros has a steep gradient, which goes nowhere
    ours = torch.autograd.grad((chosen.tokens, chosen.normed, *chosen.companions), leaves, upstream, allow_unused=True)
    right = torch.autograd.grad((tokens, normed, *followers), others, upstream, allow_unused=True)
    for leaf, a, b in zip(leaves, ours, right, strict=True):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_capacity(backend, device):
    x, scores, *_ = tensors((5, 4), 3, torch.float32, device)
    options = {"cu_seqlens": boundaries((5, 4), device), "max_seqlen": 5}
    whole = select_tokens(x, scores, 2, **options)
    larger = select_tokens(x, scores, 2, capacity=9, companions=(scores,), **options)
    assert larger.tokens.shape == (9, 3) and larger.index.tolist() == [*whole.index.tolist(), -1, -1, -1]
    assert torch.equal(larger.tokens[:6], whole.tokens) and not larger.tokens[6:].any()
    assert not larger.companions[0][6:].any()
    if device == "cpu":
        with pytest.raises(IndexError, match="capacity=5, but the sequences keep 6 rows"):
            select_tokens(x, scores, 2, capacity=5, **options)


def test_permuted_sequences_give_permuted_results(backend, device):
    lengths, order = (5, 0, 300, 2, 9), (2, 4, 1, 0, 3)
    x, scores, *_ = tensors(lengths, 12, torch.float32, device, slack=0)
    pieces = x.split(lengths), scores.split(lengths)
    moved = [torch.cat([parts[s] for s in order]) for parts in pieces]
    chosen = select_tokens(x, scores, 3, cu_seqlens=boundaries(lengths, device), max_seqlen=300, rest="weighted")
    other = select_tokens(
        *moved, 3, cu_seqlens=boundaries([lengths[s] for s in order], device), max_seqlen=300, rest="weighted"
    )
    rows = chosen.tokens.split([*chosen.lengths.tolist(), len(chosen.tokens) - int(chosen.cu_seqlens[-1])])
    assert torch.equal(torch.cat([*[rows[s] for s in order], rows[-1]]), other.tokens)


@pytest.mark.parametrize("rest", ("none", "mean"))
@pytest.mark.parametrize("order", ("score", "index"))
@pytest.mark.parametrize("capacity", (0, 3, 7, 12, 30))
def test_the_order_of_rows_is_that_of_sorting(device, order, rest, capacity):
    lengths = (5, 0, 1, 9, 2)
    for k in (0, 2, 20):
        options = 1, rest != "none", order == "index", None
        plan = planned(torch.rand(19, device=device), k, boundaries(lengths, device), capacity, *options)
        rows, offsets = sorted_rows(plan.dest, capacity)
        mine, begins = plan.order
        assert torch.equal(begins, offsets)
        for m in range(capacity):  # of one place in any order
            piece = slice(int(offsets[m]), int(offsets[m + 1]))
            assert mine[piece].sort().values.tolist() == rows[piece].tolist()


@pytest.mark.parametrize("options", ({}, {"order": "index"}, {"rest": "mean"}, {"rest": "weighted", "order": "index"}))
def test_equal_lengths_are_the_batched_form(backend, device, options):
    B, n, C, k = 3, 13, 8, 5
    x, scores, size = (torch.randn(B, n, *more, device=device) for more in ((C,), (), ()))
    batched = select_tokens(x, scores[:, 1:], k, companions=(size[:, 1:],), norm=(None, None, 1e-6), **options)
    packed = select_tokens(
        x.flatten(0, 1), scores.flatten(), k, cu_seqlens=boundaries((n,) * B, device), max_seqlen=n,
        companions=(size.flatten(),), norm=(None, None, 1e-6), **options,
    )  # fmt: skip
    rows = batched.tokens.shape[1]
    index = packed.index.view(B, rows)[:, 1 : 1 + k] - 1 - n * torch.arange(B, device=device).unsqueeze(1)
    assert torch.equal(index, batched.index)
    ours, right = packed.tokens.view(B, rows, C), batched.tokens
    assert torch.equal(ours[:, : 1 + k], right[:, : 1 + k])
    torch.testing.assert_close(ours, right)  # a rest is added up in another order
    torch.testing.assert_close(packed.normed.view(B, rows, C), batched.normed)
    assert torch.equal(packed.companions[0].view(B, rows)[:, 1 : 1 + k], batched.companions[0])
    assert packed.lengths.tolist() == [rows] * B and batched.cu_seqlens is None


@pytest.mark.slow_interpreted()
@pytest.mark.parametrize("rest", ("none", "mean", "weighted"))
def test_seventy_thousand_rows(backend, device, ran_kernels, rest):
    """More than a selection of images may have, in one sequence among others, by kernels."""
    lengths = (40, 70_000, 300)
    T, C = sum(lengths) + 10, 24
    x = torch.randn(T, C, device=device)
    scores = torch.rand(T, device=device).round(decimals=3)  # with many equals
    x[-10:] = scores[-10:] = NAN
    x.requires_grad_()
    with ran_kernels() as names:
        chosen = select_tokens(
            x, scores, 9_000, cu_seqlens=boundaries(lengths, device), max_seqlen=70_000, rest=rest, order="index"
        )
        (dx,) = torch.autograd.grad(chosen.tokens.square().sum(), x)
    assert names == {f"sum_rows_fwd.{backend}", f"sum_rows_bwd.{backend}"}
    with tokenops.use_backend("reference"):
        right = select_tokens(
            x, scores, 9_000, cu_seqlens=boundaries(lengths, device), max_seqlen=70_000, rest=rest, order="index"
        )
        (dright,) = torch.autograd.grad(right.tokens.square().sum(), x)
    ranked = sorted(range(1, 70_000), key=lambda n: (-float(scores[40 + n]), n))[:9_000]
    assert chosen.index[41 : 41 + 9_000].tolist() == sorted(40 + n for n in ranked)
    assert torch.equal(chosen.index, right.index) and chosen.lengths.tolist() == [40, 9_001 + (rest != "none"), 300]
    torch.testing.assert_close(chosen.tokens, right.tokens)
    torch.testing.assert_close(dx, dright)


def arguments_of(lengths, device, dtype=torch.float32):
    x, scores, size, wide = tensors(lengths, 8, dtype, device, slack=2)
    options = {"rest": "weighted", "companions": (size, wide), "norm": (None, torch.zeros(8, device=device), 1e-5)}
    return x, scores, 2, {"cu_seqlens": boundaries(lengths, device), "max_seqlen": 9, **options}


class Unseen(TorchDispatchMode):
    """Nothing may ask for a value, or for a shape that depends on one."""

    ASK = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.ASK, f"{name} waits for a value"
        index = args[1] if name == "index" else ()
        assert not any(i is not None and i.dtype == torch.bool for i in index), "a mask as an index waits for a value"
        return func(*args, **(kwargs or {}))


def test_no_value_reaches_the_host(backend, device):
    """Forward and backward, of real and of fake tensors, which have no values: shapes are known without."""
    for order in ("score", "index"):
        x, scores, k, options = arguments_of((5, 0, 9, 1), device)
        options["order"] = order
        x, scores = x.requires_grad_(), scores.requires_grad_()
        with Unseen():
            chosen = select_tokens(x, scores, k, **options)
            chosen.tokens.sum().backward()
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = [mode.from_tensor(t) for t in (x, scores)]
            given = options | {"cu_seqlens": mode.from_tensor(options["cu_seqlens"])}
            given["companions"] = tuple(mode.from_tensor(t) for t in options["companions"])
            given["norm"] = (None, mode.from_tensor(options["norm"][1]), 1e-5)
            made = select_tokens(*fake, k, **given)
            assert made.tokens.shape == chosen.tokens.shape and made.cu_seqlens.shape == chosen.cu_seqlens.shape
            select_tokens(*fake, k, capacity=1, **given)  # too small: nobody looks
            torch.autograd.grad(made.tokens.sum(), fake[0])
            y = restore_tokens(fake[0], made.tokens, made.index)
            assert y.shape == x.shape


@pytest.mark.gpu_only
def test_cuda_graph(device):
    """Captured at a capacity, it replays of other boundaries; capturing fails where anything waits."""
    x, scores, k, options = arguments_of((9, 9, 9, 9), device)
    options["capacity"] = 30
    call = lambda: select_tokens(x, scores, k, **options)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for lengths in ((5, 0, 9, 1), (0, 0, 0, 0), (9, 9, 9, 9)):
        options["cu_seqlens"].copy_(boundaries(lengths, device))
        graph.replay()
        torch.cuda.synchronize()
        expected = call()
        for name in ("tokens", "index", "normed", "lengths", "cu_seqlens"):
            assert torch.equal(getattr(captured, name), getattr(expected, name)), (name, lengths)


def test_compiled(backend, device):
    x, scores, k, options = arguments_of((5, 0, 9, 1), device)

    def function(x, scores, cu_seqlens):
        chosen = select_tokens(x * 2, scores, k, **{**options, "cu_seqlens": cu_seqlens})
        return chosen.tokens, chosen.normed, chosen.index, chosen.lengths, *chosen.companions

    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lengths in ((5, 0, 9, 1), (0, 3, 3, 9)):
        x.nan_to_num_(), scores.nan_to_num_()
        leaves = [t.detach().clone().requires_grad_() for t in (x, scores)]
        ends = boundaries(lengths, device)
        ours, right = whole(*leaves, ends), function(*leaves, ends)
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(*(torch.autograd.grad(y[0].square().sum(), leaves) for y in (ours, right)), strict=True):
            torch.testing.assert_close(a, b)


def test_samples_of_vmap(backend, device):
    """Of tokens and scores; boundaries are those of all samples."""
    cu_seqlens = boundaries((5, 0, 9, 1), device)
    x, scores = torch.randn(3, 17, 4, device=device), torch.rand(3, 17, device=device)

    def function(x, scores):
        chosen = select_tokens(x, scores, 2, cu_seqlens=cu_seqlens, max_seqlen=9, rest="weighted", companions=(scores,))
        return chosen.tokens, chosen.index, chosen.companions[0]

    for ours, right in zip(torch.vmap(function)(x, scores), zip(*map(function, x, scores))):
        torch.testing.assert_close(ours, torch.stack(right))
    grad = torch.func.grad(lambda *given: function(*given)[0].square().sum(), argnums=(0, 1))
    for ours, right in zip(torch.vmap(grad)(x, scores), zip(*map(grad, x, scores))):
        torch.testing.assert_close(ours, torch.stack(right))


@pytest.mark.parametrize("normalize", (False, True))
def test_second_gradients(backend, device, gradcheck, normalize):
    x = torch.randn(13, 3, dtype=torch.float64, device=device, requires_grad=True)
    scores = torch.rand(13, dtype=torch.float64, device=device, requires_grad=True)
    size = torch.rand(13, 2, dtype=torch.float64, device=device, requires_grad=True)

    def function(x, scores, size):
        chosen = select_tokens(
            x, scores, 2, cu_seqlens=boundaries((6, 1, 0, 5), device), max_seqlen=6, rest="weighted",
            normalize=normalize, companions=(size,), norm=(None, None, 0.1),
        )  # fmt: skip
        return chosen.tokens.square(), chosen.normed[: 1 + 2 + 1], chosen.companions[0]

    gradcheck(function, [x, scores, size])
    first = torch.autograd.grad(
        sum(y.square().sum() for y in function(x, scores, size)), (x, scores), create_graph=True
    )
    ours = torch.autograd.grad(sum(g.square().sum() for g in first), (x, scores))
    with tokenops.use_backend("reference"):
        y = function(x, scores, size)
        first = torch.autograd.grad(sum(y.square().sum() for y in y), (x, scores), create_graph=True)
        right = torch.autograd.grad(sum(g.square().sum() for g in first), (x, scores))
    for a, b in zip(ours, right):
        torch.testing.assert_close(a, b)


BAD = [
    ({"x": torch.zeros(2, 9, 4)}, ValueError, r"x must have shape \(T,C\), but got \(2, 9, 4\)"),
    ({"scores": torch.zeros(8)}, ValueError, "scores has 8 rows, but x has 9"),
    ({"scores": torch.zeros(9).int()}, TypeError, "scores must be float16"),
    ({"k": -1}, ValueError, "k=-1, but it must be 0 or more"),
    ({"k": True}, TypeError, "k must be an int, but got True"),
    ({"prefix": -1}, ValueError, "prefix=-1, but it must be 0 or more"),
    ({"capacity": -1}, ValueError, "capacity=-1, but it must be 0 or more"),
    ({"capacity": 2.0}, TypeError, "capacity must be an int, but got 2.0"),
    ({"capacity": 3}, IndexError, "capacity=3, but the sequences keep 6 rows"),
    ({"cu_seqlens": torch.tensor([0, 4, 9])}, TypeError, "cu_seqlens must be int32"),
    (
        {"cu_seqlens": torch.tensor([0, 4, 10]).int(), "max_seqlen": 6},
        ValueError,
        r"cu_seqlens\[-1\]=10, but there are 9 rows of x",
    ),
    ({"cu_seqlens": torch.tensor([0, 4, 3]).int()}, ValueError, r"cu_seqlens\[2\]=3, but it must be at least the 4"),
    ({"max_seqlen": None}, ValueError, "cu_seqlens needs max_seqlen"),
    ({"max_seqlen": 4}, ValueError, "max_seqlen=4, but sequence 1 has 5 rows"),
    ({"cu_seqlens": None}, ValueError, "max_seqlen=5, but it needs cu_seqlens"),
    ({"cu_seqlens": None, "max_seqlen": None, "capacity": 4}, ValueError, "capacity=4, but it needs cu_seqlens"),
    ({"counts": torch.tensor([1])}, ValueError, "counts has 1 sequences, but cu_seqlens has 2"),
    ({"counts": torch.tensor([1, 3])}, IndexError, r"counts\[1\]=3, but it must be between 0 and k=2"),
    ({"counts": torch.tensor([1, 2]).int()}, TypeError, "counts must be int64"),
    ({"companions": (torch.zeros(8),)}, ValueError, r"companions\[0\] has 8 rows, but x has 9"),
    ({"companions": (torch.zeros(9, 2, 2),)}, ValueError, r"companions\[0\] must have shape \(T\)"),
    ({"companions": (torch.zeros(9),) * 5}, ValueError, "companions has 5 entries"),
    ({"companions": (torch.zeros(9, dtype=torch.complex64),)}, TypeError, r"companions\[0\] must be real or integer"),
    ({"companions": torch.zeros(9)}, TypeError, "companions must be a tuple of tensors"),
    ({"norm": (torch.zeros(5), None, 1e-6)}, ValueError, "norm's weight has 5 channels, but x has 4"),
    ({"rest": "most"}, ValueError, "rest='most', but it must be one of"),
    ({"normalize": 1}, TypeError, "normalize must be True or False"),
]


@pytest.mark.parametrize("change, error, words", BAD)
def test_what_does_not_fit(change, error, words):
    good = {"x": torch.zeros(9, 4), "scores": torch.zeros(9), "k": 2}
    good |= {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32), "max_seqlen": 5}
    select_tokens(**good)
    with pytest.raises(error, match=f"^select_tokens: .*{words}"):
        select_tokens(**{**good, **change})


def test_room_for_more_than_there_is(backend, device):
    """Of no rows at all, too."""
    x, scores = torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
    for lengths in ((), (0,), (0, 0)):
        cu = boundaries(lengths, device)
        for rest in ("none", "mean"):
            found = select_tokens(x, scores, 2, cu_seqlens=cu, max_seqlen=0, capacity=3, rest=rest)
            assert found.tokens.shape == (3, 4) and not found.tokens.any() and found.index.tolist() == [-1] * 3


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.int8], ids=str)
def test_companions_of_any_integers(dtype, device):
    x, scores = torch.randn(5, 2, device=device), torch.tensor([0.0, 2, 1, 4, 3], device=device)
    companion = torch.tensor([1, 0, 1, 1, 0], device=device).to(dtype)
    given = dict(cu_seqlens=boundaries((3, 2), device), max_seqlen=3, prefix=0, capacity=4)
    found = select_tokens(x, scores, 1, companions=(companion, companion[:, None]), **given)
    assert found.companions[0].tolist() == [0, 1, 0, 0] and found.companions[0].dtype == dtype
    assert found.companions[1].tolist() == [[0], [1], [0], [0]]
