"""soft_aggregate of packed sequences: a loop over sequences is what it means, on every backend."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tokenops
from support.aggregation import delta_terms, run
from support.cases import DTYPES
from support.compiled import needs_compiled
from support.layouts import LAYOUTS, NAN
from support.tolerance import assert_as_good_as_plain
from tokenops import reference
from tokenops.ops import packed, schemas

OPERATOR = "soft_aggregate"  # of the `backend` fixture

LENGTHS = (9, 0, 1, 40, 2, 3, 17)
SLACK = 5


def ends(lengths, device="cpu"):
    return torch.tensor((0, *lengths), device=device).cumsum(0).int()


def inputs(lengths, M, C, dtype, device, slack=SLACK):
    """x, w, scale and mask; the rows of no sequence are NaN."""
    rows = sum(lengths)
    x, w = torch.randn(rows + slack, C, device=device), 2 * torch.randn(rows + slack, M, device=device)
    x[rows:], w[rows:] = NAN, NAN
    scale = torch.tensor(1.25, device=device)
    return *(t.to(dtype) for t in (x, w, scale)), torch.rand(rows + slack, device=device) > 0.3


def loop(lengths, prefix, mask=None):
    """A call of the reference a sequence."""

    def call(x, w, scale):
        made, begin = [], 0
        for n in lengths:
            own, end = min(prefix, n), begin + n
            kept = None if mask is None else mask[None, begin + own : end]
            y = reference.soft_aggregate(
                x[None, begin:end], w[None, begin + own : end], scale=scale, mask=kept, prefix=own
            )
            made.append(torch.cat((y[0, :own], x.new_zeros(prefix - own, x.shape[1]), y[0, own:])))
            begin = end
        return torch.stack(made)

    return call


def at_once(lengths, prefix, mask=None, longest=64, operator=tokenops):
    def call(x, w, scale):
        cu_seqlens = ends(lengths, x.device)
        options = {"scale": scale, "mask": mask, "prefix": prefix}
        return operator.soft_aggregate(x, w, **options, cu_seqlens=cu_seqlens, max_seqlen=longest)

    return call


def check(lengths, prefix, M, C, dtype, device, mask=False, longest=64):
    x, w, scale, kept = inputs(lengths, M, C, dtype, device)
    kept = kept if mask else None
    dy = torch.randn(len(lengths), prefix + M, C, device=device).to(dtype)
    ours = run(at_once(lengths, prefix, kept, longest), (x, w, scale), dy)
    plain = run(loop(lengths, prefix, kept), (x, w, scale), dy)
    exact = run(loop(lengths, prefix, kept), [t.double() for t in (x, w, scale)], dy.double())
    for what, a, b, truth in zip(("y", "dx", "dw"), ours, plain, exact):
        assert_as_good_as_plain(a, b, truth, what, delta_terms(dy, exact[0]) if what == "dw" else 0.0)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=0.02, atol=0.02 * dy.numel() ** 0.5)
    rows = sum(lengths)
    assert (ours[1][rows:] == 0).all() and (ours[2][rows:] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mask", (False, True), ids=("", "mask"))
@pytest.mark.parametrize("prefix", (0, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_a_loop(dtype, prefix, mask, backend, device):
    """Of sequences that are empty, shorter than the prefix, and unequal; rows of no sequence are not read."""
    check(LENGTHS, prefix, 5, 20, dtype, device, mask)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow_interpreted(quick=lambda dtype, lengths: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("lengths", ((300, 7), (3, 30, 0, 20, 0, 66, 9)), ids=("long", "many"))
def test_several_tiles(lengths, dtype, backend, device):
    """Of tokens, slots and channels."""
    check(lengths, 1, 70, 80, dtype, device, longest=300 if 300 in lengths else 100)


def test_the_reference_is_a_loop():
    x, w, scale, mask = inputs(LENGTHS, 5, 20, torch.float64, "cpu")
    dy = torch.randn(len(LENGTHS), 7, 20, dtype=torch.float64)
    of_all = run(at_once(LENGTHS, 2, mask, operator=reference), (x, w, scale), dy)
    for a, b in zip(of_all, run(loop(LENGTHS, 2, mask), (x, w, scale), dy)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_equal_lengths_are_a_batch(dtype, backend, device):
    x, w, scale, mask = inputs((13,) * 3, 5, 24, dtype, device, slack=0)

    def batch(x, w, scale):
        x, w, kept = (t.unflatten(0, (3, 13)) for t in (x, w, mask))
        return tokenops.soft_aggregate(x, w[:, 1:], scale=scale, mask=kept[:, 1:], prefix=1)

    packed_of = at_once((13,) * 3, 1, mask, longest=13)
    for a, b in zip(run(packed_of, (x, w, scale)), run(batch, (x, w, scale))):
        torch.testing.assert_close(a, b, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_order_and_room_are_no_matter(backend, device, ran_kernels):
    """Permuted sequences give permuted results, to the bit; so does a longer `max_seqlen`, or no slack."""
    x, w, scale, mask = inputs(LENGTHS, 5, 20, torch.float32, device)
    dy = torch.randn(len(LENGTHS), 7, 20, device=device)
    with ran_kernels() as names:
        y, dx, dw, _ = run(at_once(LENGTHS, 2, mask), (x, w, scale), dy)
    runner = "native" if backend == "composed" else backend
    assert names == {f"soft_aggregate_{direction}.{runner}" for direction in ("fwd", "bwd")}
    order = [3, 6, 0, 5, 1, 4, 2]
    pieces = torch.arange(sum(LENGTHS), device=device).split(LENGTHS)
    rows = torch.cat([pieces[i] for i in order])
    lengths = [LENGTHS[i] for i in order]
    others = run(at_once(lengths, 2, mask[rows], 61), (x[rows], w[rows], scale), dy[order])
    for a, b in zip(others, (y[order], dx[rows], dw[rows])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_may_lie_anywhere(layout, backend, device):
    x, w, scale, mask = inputs((9, 3, 20), 5, 24, torch.float32, device)
    dy = torch.randn(3, 6, 24, device=device)

    def call(x, w, scale):
        return at_once((9, 3, 20), 1, LAYOUTS["every second"](mask))(LAYOUTS[layout](x), LAYOUTS[layout](w), scale)

    expected = run(loop((9, 3, 20), 1, mask), (x, w, scale), dy)
    for a, b in zip(run(call, (x, w, scale), dy), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", ((), (0, 0), (1, 2, 0)), ids=("none", "empty", "of prefixes"))
def test_nothing_behind_the_prefix(lengths, backend, device):
    """Slots of zeros, with zero gradients."""
    x, w, scale, _ = inputs(lengths, 3, 8, torch.float32, device)
    y, dx, dw, dscale = run(at_once(lengths, 2, longest=9), (x, w, scale))
    assert y.shape == (len(lengths), 5, 8) and (y[:, 2:] == 0).all()
    expected = torch.zeros(len(lengths), 2, 8, device=device)
    for s, (begin, n) in enumerate(zip(ends(lengths).tolist(), lengths)):
        expected[s, :n] = x[begin : begin + n]
    assert torch.equal(y[:, :2], expected)
    assert (dx[: sum(lengths)] == 1).all() and (dx[sum(lengths) :] == 0).all() and (dw == 0).all() and dscale == 0
    nothing = tokenops.soft_aggregate(x[:0], w[:0], prefix=2, cu_seqlens=ends((0, 0), device), max_seqlen=0)
    assert nothing.shape == (2, 5, 8) and (nothing == 0).all()


def test_padded_sequences():
    x = torch.arange(5.0)[:, None]
    apart = packed.padded(x, ends((2, 0, 1)), 3)
    assert apart[..., 0].tolist() == [[0, 1, 0], [0, 0, 0], [2, 0, 0]]


def test_one_compilation_serves_other_boundaries():
    """And other numbers of rows; nothing of a boundary's value is in it."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    def call(x, w, cu_seqlens):
        y = tokenops.soft_aggregate(x * 2, w, prefix=1, cu_seqlens=cu_seqlens, max_seqlen=64)
        return y.sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for lengths in ((9, 3, 20), (0, 30, 1), (2, 5, 40)):
        x, w, *_ = inputs(lengths, 5, 24, torch.float32, "cpu")
        found = []
        for function in (call, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            y = function(*leaves, ends(lengths))
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize("path", ("triton", "reference"))
def test_no_boundary_reaches_the_host(path, monkeypatch):
    """Fake tensors have no values: what looked at one would fail. Autograd needs the GPU they say they are on."""
    monkeypatch.setattr("tokenops.ops.soft_aggregate.choose", lambda *which: path)
    for place in ("cuda", "cpu"):
        with FakeTensorMode(), torch.set_grad_enabled(place == "cpu"):
            x, w, scale = (torch.empty(size, device=place, requires_grad=True) for size in ((20, 24), (20, 5), ()))
            mask, cu_seqlens = (torch.empty(n, device=place, dtype=t) for n, t in ((20, torch.bool), (4, torch.int32)))
            y = tokenops.soft_aggregate(x, w, scale=scale, mask=mask, prefix=1, cu_seqlens=cu_seqlens, max_seqlen=9)
            assert y.shape == (3, 6, 24)
            gradients = torch.autograd.grad(y.sum(), (x, w, scale)) if place == "cpu" else ()
    assert [g.shape for g in gradients] == [(20, 24), (20, 5), ()]


@needs_compiled
@pytest.mark.parametrize("wrong", ((0, 13), (0, 5, 4), (1, 5), ()), ids=("beyond", "falls", "late", "empty"))
def test_compiled_code_checks_boundaries(wrong):
    x, w = torch.randn(1, 12, 4), torch.randn(1, 12, 3)
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        schemas.kernel("soft_aggregate_fwd", "native")(x, w, None, 1.0, None, 0, torch.tensor(wrong).int(), 12)


BAD = [
    ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens must be int32, but got torch.int64"),
    ({"cu_seqlens": ends((2, 3))}, ValueError, r"cu_seqlens\[-1\]=5, but there are 4 rows of x"),
    ({"cu_seqlens": torch.tensor([1, 4]).int()}, ValueError, r"cu_seqlens\[0\]=1, but it must be 0"),
    ({"cu_seqlens": torch.tensor([0, 3, 2]).int()}, ValueError, r"cu_seqlens\[2\]=2, but it must be at least the 3"),
    ({"cu_seqlens": None}, ValueError, "max_seqlen=4, but it needs cu_seqlens"),
    ({"max_seqlen": None}, ValueError, "cu_seqlens needs max_seqlen"),
    ({"max_seqlen": 3}, ValueError, "max_seqlen=3, but sequence 0 has 4 rows"),
    ({"max_seqlen": 4.0}, TypeError, "max_seqlen must be an int"),
    ({"x": torch.zeros(1, 4, 3)}, ValueError, r"x must have shape \(T,C\), but got \(1, 4, 3\)"),
    ({"w": torch.zeros(3, 2)}, ValueError, "w has 3 rows, but x has 4"),
    ({"w": torch.zeros(1, 4, 2)}, ValueError, r"w must have shape \(T,M\)"),
    ({"mask": torch.ones(3) > 0}, ValueError, "mask has 3 rows, but x has 4"),
    ({"mask": torch.ones(4)}, TypeError, "mask must be bool, but got torch.float32"),
    ({"mask": torch.ones(1, 4) > 0}, ValueError, r"mask must have shape \(T\), but got \(1, 4\)"),
    ({"prefix": -1}, ValueError, "prefix=-1, but it must be 0 or more"),
    ({"prefix": 1.0}, TypeError, "prefix must be an int, but got 1.0"),
    ({"scale": torch.ones(2)}, ValueError, "scale must have one element"),
]


@pytest.mark.parametrize("change, error, words", BAD, ids=[words for _, _, words in BAD])
def test_what_does_not_fit(change, error, words):
    good = {"x": torch.zeros(4, 3), "w": torch.zeros(4, 2), "cu_seqlens": ends((4,)), "max_seqlen": 4}
    tokenops.soft_aggregate(**good)
    with pytest.raises(error, match=f"^soft_aggregate: .*{words}"):
        tokenops.soft_aggregate(**{**good, **change})


def test_a_bound_far_above_the_rows_takes_no_memory(device):
    """Nor does a prefix of more rows than there are; of the reference and gradients of gradients."""
    x, w = torch.randn(7, 5, device=device, requires_grad=True), torch.randn(7, 3, device=device, requires_grad=True)
    given = dict(cu_seqlens=ends((3, 4), device), max_seqlen=2**31 - 1)
    with tokenops.use_backend("reference"):
        expected = tokenops.soft_aggregate(x, w, **given | {"max_seqlen": 4})
        torch.testing.assert_close(tokenops.soft_aggregate(x, w, **given), expected)
        assert tokenops.soft_aggregate(x, w, **given, prefix=9).shape == (2, 12, 5)
        assert torch.equal(tokenops.soft_aggregate(x, w, **given, prefix=9)[1, :4], x[3:])
    y = tokenops.soft_aggregate(x, w, **given)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), w)[0].isfinite().all()
