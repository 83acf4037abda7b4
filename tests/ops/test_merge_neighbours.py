"""merge_neighbours: what it means, that every backend is as good as plain PyTorch, and what it says to bad input."""

import math

import pytest
import torch

import tokenops
from support.cases import DTYPES, MERGE, MERGE_LARGE, QUICK, Merge
from support.compiled import ABSENT
from support.neighbours import AXES, OPTIONS, cancelling, compare, double, inputs, run
from tokenops import reference
from tokenops.ops import backends
from tokenops.ops.schemas import kernel

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


def shifted(x):
    """Not aligned to more than an element, rows apart."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 3), NAN, dtype=x.dtype, device=x.device)
    room[..., 1 : x.shape[-1] + 1] = x
    return room[..., 1 : x.shape[-1] + 1]


LAYOUTS = {
    "channels first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda x: torch.stack((x, torch.full_like(x, NAN)), dim=-1).flatten(-2)[..., ::2],
    "shifted": shifted,
    "one image for all": lambda x: x[:1].expand(x.shape),
    "one value for all": lambda x: x.flatten()[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, poisoned, layout):
    case, lay = Merge(3, 5, 4, 24, 1, "strides"), LAYOUTS[layout]
    if layout == "one value for all":  # equal rows round alike: too few elements to be judged by their mean error
        case = Merge(3, 3, 5, 16, 1, "strides")
    for option in (("channels", True, True), ("logits", True, False)):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = inputs(case, dtype, device, option)
            tensors = {
                n: lay(t) if t.dim() > 1 or layout in ("every second", "shifted") else t for n, t in tensors.items()
            }
            truth = run(reference.merge_neighbours, double(tensors), case, "horizontal", option)
            upstream = {n: lay(t) for n, t in truth[2].items()}
            truth = run(reference.merge_neighbours, double(tensors), case, "horizontal", option, upstream)
            ours, plain = (
                run(f, tensors, case, "horizontal", option, upstream)[:2]
                for f in (merge_neighbours, reference.merge_neighbours)
            )
            compare(ours, plain, truth, cancelling(tensors, upstream))


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


@pytest.mark.parametrize("axis", AXES)
def test_gradcheck(gradcheck, backend, device, axis):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    x, weight, bias, sizes = leaf(2, 7, 3), leaf(3), leaf(3), torch.rand(2, 6, device=device).double()

    for weights in ((leaf(3), leaf(3)), (leaf(1), leaf(1)), (leaf(2, 6),)):

        def f(x, weight, bias, *weights):
            given = weights if len(weights) == 2 else weights[0]
            y, _, normed = merge_neighbours(x, (2, 3), axis, given, sizes=sizes, norm=(weight, bias, 1e-3))
            return y, normed

        gradcheck(f, (x, weight, bias, *weights))


# torch's machinery


def test_opcheck(backend, device):
    x, sizes, logits = torch.randn(2, 7, 4), torch.ones(2, 6), torch.randn(2, 6)
    x, sizes, logits, w = (t.to(device) for t in (x, sizes, logits, torch.ones(4)))
    for first, second, given, some, norm in (
        (None, None, None, None, False),
        (w, w[:1], None, sizes, True),
        (None, None, logits, None, True),
    ):
        where = (2, 3, False, 1, 0.5, 0.5)
        arguments = (x, first, second, given, some, w if norm else None, None, *where, norm, 1e-5)
        torch.library.opcheck(kernel("merge_neighbours_fwd", backend), arguments)
        y, *_ = kernel("merge_neighbours_fwd", backend)(*arguments)
        for source in (x, None):
            torch.library.opcheck(
                kernel("merge_neighbours_bwd", backend), (y, source, first, second, given, some, *where)
            )


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compile(device, compiler):
    def f(x, logits, weight, height, width):
        y, sizes, normed = merge_neighbours(
            x * 2, (height, width), "horizontal", logits, sizes=logits.exp(), norm=(weight, None, 1e-6)
        )
        y = merge_neighbours(y, (height, (width + 1) // 2), "vertical", (weight, weight)).sin()
        return unmerge_neighbours(y, (height, width), ("horizontal", "vertical")), normed

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=compiler)
    for B, H, W, C in ((2, 4, 6, 4), (3, 5, 7, 8)) if compiler == "aot_eager" else ((2, 4, 6, 4),):
        made = torch.randn(B, 1 + H * W, C), torch.rand(B, H * W), torch.rand(C)
        results = []
        for function in (f, compiled):
            leaves = [t.to(device).requires_grad_() for t in (t.clone() for t in made)]
            y, normed = function(*leaves, H, W)
            results.append((y, normed, *torch.autograd.grad(y.square().sum() + normed.sum(), leaves)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_inference_mode_func_grad_and_autocast(backend, device):
    x, logits = torch.randn(2, 7, 4, device=device), torch.rand(2, 6, device=device)
    with torch.inference_mode():
        torch.testing.assert_close(
            merge_neighbours(x, (2, 3), "vertical", logits), reference.merge_neighbours(x, (2, 3), "vertical", logits)
        )
    functions = merge_neighbours, reference.merge_neighbours
    losses = [lambda x, w, f=f: f(x, (2, 3), "vertical", w).square().sum() for f in functions]
    for ours, plain in zip(*(torch.func.grad(loss, argnums=(0, 1))(x, logits) for loss in losses), strict=True):
        torch.testing.assert_close(ours, plain)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, normed = merge_neighbours(x, (2, 3), "vertical", norm=(None, None, 1e-6))
        assert y.dtype == normed.dtype == torch.float32


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
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: merge_neighbours(x, (2, 3), "vertical"), (x,), (torch.ones_like(x),))


# Bad input


def good():
    return {"x": torch.zeros(2, 7, 3), "grid": (2, 3), "axis": "horizontal"}


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor"),
    ({"x": torch.zeros(7, 3)}, ValueError, r"x must have shape \(B,P\+H\*W,C\), but got \(7, 3\)"),
    ({"x": torch.zeros(2, 7, 3, dtype=torch.int32)}, TypeError, "x must be float16"),
    ({"grid": 6}, TypeError, r"grid must be \(height, width\), but got 6"),
    ({"grid": (2, 3.0)}, TypeError, "grid must be two ints"),
    ({"grid": (-2, -3)}, ValueError, r"grid=\(-2, -3\), but its sizes must be at least 0"),
    ({"grid": (3, 3)}, ValueError, r"grid=\(3, 3\) has 9 tokens, but x has 7 tokens, 6 after a prefix of 1"),
    ({"axis": "diagonal"}, ValueError, "axis='diagonal', but it must be one of 'horizontal', 'vertical'"),
    ({"prefix": 8}, ValueError, "prefix=8"),
    ({"prefix": 0}, ValueError, "has 6 tokens, but x has 7 tokens, 7 after a prefix of 0"),
    ({"weights": 0.5}, TypeError, r"weights must be None, a pair or logits \(B,H\*W\), but got 0.5"),
    ({"weights": (0.5,)}, TypeError, "weights must be None, a pair or logits"),
    ({"weights": (0.5, "1")}, TypeError, r"weights\[1\] must be a number or a tensor, but got '1'"),
    ({"weights": (torch.ones(2), 1)}, ValueError, r"weights\[0\] must have one element or 3, but got 2"),
    ({"weights": (torch.ones(3, 2), 1)}, ValueError, r"weights\[0\] must have shape \(C\)"),
    ({"weights": (torch.ones(3).int(), 1)}, TypeError, r"weights\[0\] must be float16"),
    ({"weights": torch.zeros(2, 7)}, ValueError, r"weights must have shape \(2, 6\), but got \(2, 7\)"),
    ({"weights": torch.zeros(2, 6).int()}, TypeError, "weights must be float16"),
    ({"sizes": torch.ones(1, 6)}, ValueError, r"sizes must have shape \(2, 6\), but got \(1, 6\)"),
    ({"sizes": torch.ones(2, 6).long()}, TypeError, "sizes must be float16"),
    ({"norm": torch.ones(3)}, TypeError, r"norm must be \(weight, bias, eps\)"),
    ({"norm": (torch.ones(4), None, 1e-5)}, ValueError, "norm's weight has 4 channels, but x has 3"),
]


@pytest.mark.parametrize("change, kind, words", BAD, ids=[words for _, _, words in BAD])
def test_errors_in_words(change, kind, words):
    with pytest.raises(kind, match=f"merge_neighbours: .*{words}"):
        merge_neighbours(**{**good(), **change})


BAD_UNMERGE = [
    ({"x": torch.zeros(2, 7)}, ValueError, "x must have shape"),
    (
        {"grid": (2, 9)},
        ValueError,
        r"x has 7 tokens, 6 after a prefix of 1, but the grid \(2, 9\) merged along .* has 10",
    ),
    ({"merges": "horizontal"}, TypeError, "merges must be a tuple of axes, but got 'horizontal'"),
    ({"merges": ("horizontal", 1)}, ValueError, r"merges\[1\]=1, but it must be one of"),
    ({"mode": "cubic"}, ValueError, "mode='cubic', but it must be one of 'repeat', 'bilinear'"),
]


@pytest.mark.parametrize("change, kind, words", BAD_UNMERGE, ids=[words for _, _, words in BAD_UNMERGE])
def test_unmerge_errors_in_words(change, kind, words):
    given = {"x": torch.zeros(2, 7, 3), "grid": (2, 5), "merges": ("horizontal",), **change}
    with pytest.raises(kind, match=f"unmerge_neighbours: .*{words}"):
        unmerge_neighbours(**given)


def test_the_compiled_code_checks_again(device):
    """Called past the public function, the kernels still refuse what they cannot take."""
    if device == "cpu" and ABSENT is not None:
        pytest.skip(ABSENT)
    x, w, sizes = (t.to(device) for t in (torch.zeros(2, 7, 4), torch.zeros(4), torch.zeros(2, 6)))
    forward = dict(
        x=x, first=None, second=None, logits=None, sizes=None, weight=None, bias=None, height=2, width=3,
        vertical=False, prefix=1, alpha=0.5, beta=0.5, norm=False, eps=0.0,
    )  # fmt: skip
    changes = [
        {"x": x[0]}, {"prefix": 2}, {"prefix": -1}, {"height": -2, "width": -3}, {"first": w[:3]}, {"first": w.long()},
        {"second": sizes}, {"logits": sizes[:, :5]}, {"sizes": sizes.int()}, {"logits": sizes, "first": w},
        {"norm": True, "weight": w[:3]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(RuntimeError, match="must|exclude"):
            kernel("merge_neighbours_fwd", "native")(*{**forward, **change}.values())
    backward = {name: value for name, value in forward.items() if name not in ("weight", "bias", "norm", "eps")}
    backward = {"dy": x[:, :5], **backward}
    changes = [{"dy": x}, {"x": x[:, :5]}, {"x": x.half()}, {"sizes": sizes[:1]}, {"first": sizes}]
    for change in changes:
        with pytest.raises(RuntimeError, match="must"):
            kernel("merge_neighbours_bwd", "native")(*{**backward, **change}.values())


def test_automatic_choice(device, ran_kernels):
    with ran_kernels() as names:
        merge_neighbours(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good().items()})
    reason = backends.why_not("merge_neighbours", "native", device, torch.float32)
    assert names == ({"merge_neighbours_fwd.native"} if reason is None else set())
