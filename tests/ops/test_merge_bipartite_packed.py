"""Bipartite merging of packed sequences: what it means, and that it is a loop over them."""

import math
import resource
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.bipartite import compare, exact_metric, random_metric
from support.cases import DTYPES, QUICK
from support.packed_bipartite import NAN, boundaries, inputs, loop, packed_metric, run
from support.runs import double
from tokenops import match_bipartite, merge_bipartite, unmerge_bipartite
from tokenops.ops import checks, match_packed, merge_packed
from tokenops.ops.backends import use_backend, why_not

OPERATOR = "match_packed"  # of the `backend` fixture
ALL = (*DTYPES, torch.float64)
ids = {"ids": lambda d: str(d)[6:]}


# What the operator means: a table to learn it from, of sequences of directions E(ast), N(orth), W(est), S(outh).

COMPASS = {"E": (1, 0), "N": (0, 1), "W": (-1, 0), "S": (0, -1), "?": (NAN, 1)}
TABLE = [
    # P  sequences          r       index                               boundaries
    (0, ("EENN", "EN"), 1, [1, 1, 0, 2, 3, 3], [0, 3, 4]),
    (0, ("EENN", "EN"), [2, 0], [0, 0, 1, 1, 2, 3], [0, 2, 4]),
    (0, ("EENN", "", "E", "EN"), 2, [0, 0, 1, 1, 2, 3, 3], [0, 2, 2, 3, 4]),  # one row has none to go to
    (1, ("?EENN", "?EN"), 1, [0, 2, 2, 3, 1, 4, 5, 5], [0, 4, 6]),
    (1, ("?", "", "?E", "?EN"), 7, [0, 1, 2, 3, 4, 4], [0, 1, 1, 3, 5]),
    (2, ("?", "??", "??SENN"), 1, [0, 1, 2, 3, 4, 5, 6, 7, 7], [0, 1, 3, 8]),
    (0, ("?EEE",), 2, [0, 0, 0, 1], [0, 2]),  # what is no number is least, and goes to the first
]


def of_letters(sequences, device):
    rows = [COMPASS[letter] for letter in "".join(sequences)] + [(NAN, NAN)]  # and a row of slack
    packed = {"cu_seqlens": boundaries([len(s) for s in sequences], device), "max_seqlen": 9}
    return torch.tensor(rows, dtype=torch.float32, device=device), packed


@pytest.mark.parametrize("prefix, sequences, r, index, ends", TABLE)
def test_table(backend, device, ran_kernels, prefix, sequences, r, index, ends):
    metric, packed = of_letters(sequences, device)
    r = torch.tensor(r, device=device) if isinstance(r, list) else r
    for dtype in (torch.float32, torch.bfloat16):
        with ran_kernels() as names:
            found = match_bipartite(metric.to(dtype), r, prefix=prefix, **packed)
        assert names == {f"match_packed_{part}.{backend}" for part in ("fwd", "places")}
        with use_backend("reference"):
            same = match_bipartite(metric.to(dtype), r, prefix=prefix, **packed)
        for matching in (found, same):
            assert matching.index.tolist() == [*index, -1] and matching.index.dtype == torch.int64
            assert matching.cu_seqlens.tolist() == ends and matching.cu_seqlens.dtype == torch.int32


def test_merging(backend, device):
    """Means by sizes, those of a prefix passed on; of nothing, and behind the last sequence, zeros."""
    metric, packed = of_letters(("?EENN", "?EN"), device)
    x = torch.tensor([9.0, 1, 2, 3, 4, 8, 5, 6, NAN], device=device).unsqueeze(1)
    sizes = torch.tensor([7.0, 3, 1, 1, 1, 0, 0, 0, NAN], device=device)
    for function in (merge_bipartite, partial(on_the_reference, merge_bipartite)):
        y = function(x, metric, 1, sizes=sizes, companions=(x[:, 0],), **packed)
        assert y.index.tolist() == [0, 2, 2, 3, 1, 4, 5, 5, -1] and y.cu_seqlens.tolist() == [0, 4, 6]
        assert y.tokens.flatten().tolist() == y.companions[0].tolist() == [9, 4, 1.25, 3, 8, 0, 0, 0, 0]
        assert y.sizes.tolist() == [7, 1, 4, 1, 0, 0, 0, 0, 0]
        torch.testing.assert_close(y.log_sizes, y.sizes.log())
        assert y.normed is None
        back = unmerge_bipartite(y.tokens, y.index)
        assert back.flatten().tolist() == [9, 1.25, 1.25, 3, 4, 8, 0, 0, 0]


def on_the_reference(function, *arguments, **options):
    with use_backend("reference"):
        return function(*arguments, **options)


CASES = [
    # lengths                    P  r
    ((12, 0, 1, 2, 33, 3), 1, 4),
    ((12, 0, 1, 2, 33, 3), 0, (3, 5, 0, 1, 90, 1)),
    ((5, 9, 1), 2, 100),
    ((3, 0, 1), 4, 1),  # all prefix
    ((7, 2), 1, 0),
    ((70, 40), 1, (20, 11)),
    ((0, 0), 1, 2),
    ((), 1, 2),
]


@pytest.mark.slow_interpreted(quick=lambda case, dtype: case == CASES[0] or (dtype in QUICK and sum(case[0]) < 50))
@pytest.mark.parametrize("dtype", ALL, **ids)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_loop_over_the_sequences(backend, device, poisoned, ran_kernels, case, dtype):
    """Values and gradients as near to fp64's as a loop of plain PyTorch; nothing is read of slack, nor its gradient."""
    lengths, prefix, r = case
    r = torch.tensor(r, dtype=torch.int32, device=device) if isinstance(r, tuple) else r
    interpreted = backend == "triton" and device == "cpu"
    for sized, normed in ((True, True), (False, False), (True, False))[: 1 if interpreted else 3]:
        tensors = inputs(lengths, 16 if interpreted else 37, 24, prefix, dtype, device, sized, normed)
        plain = partial(loop, r=r, lengths=lengths, prefix=prefix)
        truth = run(lambda x, metric, **o: plain(x, metric, **o), double(tensors))
        packed = {"cu_seqlens": boundaries(lengths, device), "max_seqlen": max(lengths, default=0) + 1}

        def ours(x, metric, **options):
            return merge_bipartite(x, metric, r, prefix=prefix, **packed, **options)

        with ran_kernels() as names:
            found = run(ours, tensors, truth[2])
        expected = run(lambda x, metric, **o: plain(x, metric, **o), tensors, truth[2])
        assert f"match_packed_fwd.{backend}" in names
        assert {name.rpartition(".")[2] for name in names} == {backend}
        assert found[0]["cu_seqlens"].tolist() == truth[0].pop("cu_seqlens").tolist()
        compare(found, expected, truth)
        slack = sum(lengths)
        assert not any(found[1][f"d{name}"][slack:].any() for name in ("x", "row", "table"))
        assert not found[0]["tokens"][found[0]["cu_seqlens"][-1] :].any()


@pytest.mark.parametrize("dtype", ALL, **ids)
def test_matching_of_any_numbers(backend, device, dtype):
    """Of sequences longer than a tile, with rows of all lengths; the reference's choice in fp64 is clear."""
    lengths, prefix, r = (150, 7, 40), 1, (30, 2, 11)
    parts = [random_metric(1, n, 40, prefix, k, dtype, device)[0] for n, k in zip(lengths, r)]
    metric = torch.cat(parts)
    packed = {"cu_seqlens": boundaries(lengths, device), "max_seqlen": 150}
    r = torch.tensor(r, device=device)
    right = match_packed.one_by_one(metric.double(), r, packed["cu_seqlens"], prefix).index
    assert torch.equal(match_bipartite(metric, r, prefix=prefix, **packed).index, right)
    if dtype in (torch.float32, torch.float64):  # products that overflow, and vanish
        scale = 2.0 ** torch.randint(-100, 101, (sum(lengths), 1), device=device).to(dtype)
        assert torch.equal(match_bipartite(metric * scale, r, prefix=prefix, **packed).index, right)


def test_of_equals_far_apart_the_first_is_taken(backend, device):
    """More odd rows than a kernel compares at a time, all alike, behind another sequence."""
    for N in (140, 300):
        packed = {"cu_seqlens": boundaries((3, N), device), "max_seqlen": N}
        found = match_bipartite(torch.ones(3 + N, 4, device=device), N // 2, prefix=0, **packed).index
        expected = torch.arange(N // 2, device=device).repeat_interleave(2)
        expected[::2] = 0
        assert found.tolist() == [0, 0, 0, *(1 + expected).tolist()]


def test_equal_lengths_are_images(backend, device):
    B, N, prefix, r = 3, 21, 1, 6
    metric, x = exact_metric(B, N, 16, prefix, device), torch.randn(B, N, 8, device=device)
    sizes = torch.randint(1, 5, (B, N), device=device).float()
    images = on_the_reference(merge_bipartite, x, metric, r, sizes=sizes)
    packed = {"cu_seqlens": boundaries([N] * B, device), "max_seqlen": N}
    y = merge_bipartite(x.flatten(0, 1), metric.flatten(0, 1), r, sizes=sizes.flatten(), **packed)
    rows = N - r
    assert y.cu_seqlens.tolist() == [rows * b for b in range(B + 1)] and not y.tokens[B * rows :].any()
    torch.testing.assert_close(y.tokens[: B * rows], images.tokens.flatten(0, 1))
    assert torch.equal(y.sizes[: B * rows], images.sizes.flatten())
    first = rows * torch.arange(B, device=device).unsqueeze(1)
    assert torch.equal(y.index.view(B, N)[:, prefix:], images.index + prefix + first)
    assert torch.equal(y.index.view(B, N)[:, :prefix], first)


def test_permuted_sequences_give_permuted_results(backend, device):
    """To the bit, wherever a sequence lies."""
    lengths, order, r = (5, 0, 150, 2, 37), (2, 4, 1, 0, 3), torch.tensor([1, 0, 40, 1, 9], device=device)
    x, metric = torch.randn(sum(lengths), 12, device=device), torch.randn(sum(lengths), 24, device=device)
    moved = [torch.cat([t.split(lengths)[s] for s in order]) for t in (x, metric)]
    packed = {"cu_seqlens": boundaries(lengths, device), "max_seqlen": 150}
    other = packed | {"cu_seqlens": boundaries([lengths[s] for s in order], device)}
    first, second = merge_bipartite(x, metric, r, **packed), merge_bipartite(*moved, r[list(order)], **other)

    def pieces(t, ends):
        return t[: ends[-1]].split(ends.diff().tolist())

    for name in ("tokens", "sizes"):
        parts = pieces(getattr(first, name), first.cu_seqlens)
        assert torch.equal(torch.cat([parts[s] for s in order]), torch.cat(pieces(getattr(second, name), second[-1])))
    within = [
        torch.cat([p - begin for p, begin in zip(y.index.split(sizes), y.cu_seqlens.tolist())]).split(sizes)
        for y, sizes in ((first, lengths), (second, [lengths[s] for s in order]))
    ]
    assert torch.equal(torch.cat([within[0][s] for s in order]), torch.cat(within[1]))


def test_the_best_do_not_depend_on_threads(backend, device):
    """Long sequences are shared by threads, and short ones dealt out to them."""
    if backend != "native" or device != "cpu":
        pytest.skip("threads are the CPU's")
    lengths = (3, 1700, 40, 41, 0, 900, 12, 300, 5)
    metric, ends = torch.randn(sum(lengths), 200), boundaries(lengths)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.tokenops.match_packed_fwd.native(metric, ends, 1700, 1))
    finally:
        torch.set_num_threads(before)
    for best, target in found[1:]:
        assert torch.equal(best, found[0][0]) and torch.equal(target, found[0][1])
    rows = metric[: 1700 + 3][3:]
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    right = (unit[2::2] @ unit[1::2].T).amax(dim=1)
    torch.testing.assert_close(found[0][0][5:1703:2].double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(why_not("match_packed", "native", "cpu", torch.float32) is not None, reason="not built")
def test_no_matrix_of_all_by_all():
    """Half of the rows by the other half would be 3.2 gigabytes. More rows than the kernels of images rank on a GPU."""
    N, D = 40_000, 8
    metric = torch.randn(N, D)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = match_bipartite(metric, N // 4, cu_seqlens=boundaries([N]), max_seqlen=N)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    images = match_bipartite(metric.unsqueeze(0), N // 4)
    assert torch.equal(found.index[1:] - 1, images[0])


def test_capacity(backend, device):
    lengths, packed = (9, 4), {"cu_seqlens": boundaries((9, 4), device), "max_seqlen": 9}
    tensors = inputs(lengths, 8, 16, 1, torch.float32, device, sized=True, normed=False)
    call = partial(merge_bipartite, tensors["x"], tensors["metric"], 3, sizes=tensors["sizes"], **packed)
    whole, exact, more = call(companions=(tensors["row"],)), call(capacity=9), call(capacity=20)
    assert whole.cu_seqlens.tolist() == [0, 6, 9]  # of the second there is one to merge
    assert torch.equal(exact.tokens, whole.tokens[:9]) and torch.equal(exact.index, whole.index)
    assert more.tokens.shape == (20, 8) and more.sizes.shape == (20,) and not more.tokens[9:].any()
    assert torch.equal(more.tokens[:9], whole.tokens[:9])
    assert (more.log_sizes[9:] == -math.inf).all()
    if device == "cpu":
        with pytest.raises(IndexError, match="merge_bipartite: capacity=8, but 9 rows are left"):
            call(capacity=8)


def test_what_does_not_fit_is_cut(device):
    """Where nothing is looked at: later sequences first."""
    index, ends = torch.tensor([0, 1, 3, 2, 1], device=device), boundaries((2, 2), device)
    with patch.object(checks, "looked_at", lambda values: False):
        cut, fewer = merge_packed._cut(index, ends, 3)
    assert cut.tolist() == [0, 1, -1, 2, 1] and fewer.tolist() == [0, 2, 3]


def test_rotary_tables_are_merged_by_their_mean(backend, device):
    """For keys that are equal the logit with a merged key is the mean of the members', rotated each by its own row."""
    n, half, r = 12, 8, 5
    angles = torch.arange(n, device=device).unsqueeze(1) * 10000.0 ** -torch.linspace(0, 1, half, device=device)
    cos, sin = angles.cos().double(), angles.sin().double()
    key, query = torch.randn(2, 2 * half, dtype=torch.float64, device=device)
    keys = key.expand(n, -1).contiguous()
    sizes = torch.randint(1, 4, (n,), device=device).double()

    def rotated(k, cos, sin):
        a, b = k.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    packed = {"cu_seqlens": boundaries((n,), device), "max_seqlen": n}
    y = merge_bipartite(keys, keys, r, prefix=0, sizes=sizes, companions=(cos, sin), **packed)
    logits, merged = rotated(keys, cos, sin) @ query, rotated(y.tokens, *y.companions) @ query
    for m in range(n - r):
        members = y.index == m
        mean = (logits * sizes)[members].sum() / sizes[members].sum()
        torch.testing.assert_close(merged[m], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y.log_sizes[m], sizes[members].sum().log())
    assert merged[n - r :].eq(0).all()


def test_merged_again_and_again(backend, device):
    """Boundaries of one merge are those of the next, and the composed index leads back through all."""
    lengths, r = (9, 3, 30), torch.tensor([2, 1, 9], device=device)
    first = torch.randn(sum(lengths), 4, device=device)
    packed = {"cu_seqlens": boundaries(lengths, device), "max_seqlen": 30}
    one = merge_bipartite(first, first, r, **packed)
    two = merge_bipartite(
        one.tokens, one.tokens, r, sizes=one.sizes, cu_seqlens=one.cu_seqlens, max_seqlen=30, capacity=30
    )
    index = two.index[one.index].masked_fill(one.index < 0, -1)
    back = unmerge_bipartite(two.tokens, index)
    assert back.shape == first.shape
    for m in range(int(two.cu_seqlens[-1])):
        members = index == m
        torch.testing.assert_close(two.tokens[m], first[members].mean(dim=0))
        assert members.sum() == two.sizes[m] and torch.equal(back[members], two.tokens[m].expand(members.sum(), -1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), **ids)
def test_unmerging_and_its_gradient(backend, device, poisoned, dtype):
    index = torch.tensor([2, 0, -1, 2, 1, 2, -1], device=device)
    y = torch.randn(4, 12, device=device).to(dtype).requires_grad_()
    x = unmerge_bipartite(y, index)
    right = torch.where((index < 0).unsqueeze(1), 0, y[index.clamp(min=0)])
    assert torch.equal(x, right)
    upstream = torch.randn_like(x)
    (dy,) = torch.autograd.grad(x, y, upstream)
    wide = torch.zeros(4, 12, device=device).index_add(0, index[index >= 0], upstream.float()[index >= 0])
    torch.testing.assert_close(dy, wide.to(dtype))


def test_gradients_are_differentiated_again(backend, device, gradcheck):
    lengths, index = (6, 1, 3), torch.tensor([1, 0, -1, 1], device=device)
    x, metric, c = (torch.randn(11, n, dtype=torch.float64, device=device) for n in (3, 4, 2))
    weight, y = (torch.rand(n, dtype=torch.float64, device=device) + 0.5 for n in (3, (3, 2)))
    sizes = torch.rand(11, dtype=torch.float64, device=device)
    packed = {"cu_seqlens": boundaries(lengths, device), "max_seqlen": 6}

    def call(x, c, weight, y):
        found = merge_bipartite(x, metric, 2, sizes=sizes, norm=(weight, None, 0.1), companions=(c,), **packed)
        end = 7  # the norm of zeros has a steep gradient
        return found.tokens, found.normed[:end], found.companions[0], unmerge_bipartite(y, index)

    leaves = tuple(t.clone().requires_grad_() for t in (x, c, weight, y))
    gradcheck(call, leaves)
    if backend == "native":
        assert torch.autograd.gradgradcheck(call, leaves)


def test_no_value_reaches_the_host(backend, device):
    """Fake tensors have none."""
    lengths = (9, 4)
    with FakeTensorMode():
        x, metric = torch.empty(16, 8, device=device), torch.empty(16, 4, device=device)
        ends, r = (torch.empty(n, dtype=torch.int32, device=device) for n in (3, 2))
        y = merge_bipartite(
            x, metric, r, sizes=x[:, 0], cu_seqlens=ends, max_seqlen=9, companions=(x[:, 1],), capacity=12
        )
        back = unmerge_bipartite(y.tokens, y.index)
        matching = match_bipartite(metric, 3, cu_seqlens=ends, max_seqlen=9)
    assert y.tokens.shape == (12, 8) and y.index.shape == (16,) and back.shape == (16, 8)
    assert y.sizes.shape == y.companions[0].shape == (12,) and y.cu_seqlens.shape == matching.cu_seqlens.shape == (3,)
    assert y.cu_seqlens.dtype == torch.int32 and y.index.dtype == torch.int64 and len(lengths) == 2


@pytest.mark.cpu_only
def test_compiled_in_one_graph(device):
    """By torch.compile, with other boundaries of the same size later."""
    tensors = inputs((9, 4, 20), 8, 16, 1, torch.float32, "cpu", sized=True, normed=True)

    def call(x, metric, ends, r):
        norm = (tensors["weight"], tensors["bias"], 1e-5)
        y = merge_bipartite(
            1.5 * x, metric, r, sizes=tensors["sizes"], norm=norm, companions=(tensors["table"],), cu_seqlens=ends,
            max_seqlen=20,
        )  # fmt: skip
        return y.normed * 2, y.companions[0], y.index, y.cu_seqlens, unmerge_bipartite(y.tokens, y.index)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths, r in (((9, 4, 20), (2, 1, 3)), ((0, 15, 18), (5, 4, 0))):
        ends, counts = boundaries(lengths), torch.tensor(r)
        metric = packed_metric(lengths, 16, 1, torch.float32, "cpu")
        leaves = [tensors["x"].clone().requires_grad_() for _ in range(2)]
        found, right = compiled(leaves[0], metric, ends, counts), call(leaves[1], metric, ends, counts)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        for made in (found, right):
            (made[0][:20].sum() + made[4].sum()).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


X, METRIC = torch.zeros(6, 3), torch.ones(6, 4)
PACKED = {"cu_seqlens": boundaries((4, 2)), "max_seqlen": 4}
BAD = [
    (match_bipartite, (METRIC.unsqueeze(0), 1), PACKED, ValueError, r"metric must have shape \(T,D\)"),
    (match_bipartite, (METRIC, 1), {"max_seqlen": 4}, ValueError, "max_seqlen=4, but it needs cu_seqlens"),
    (match_bipartite, (METRIC, 1), {"cu_seqlens": boundaries((4, 2))}, ValueError, "cu_seqlens needs max_seqlen"),
    (match_bipartite, (METRIC, 1), PACKED | {"max_seqlen": 3}, ValueError, "sequence 0 has 4 rows"),
    (match_bipartite, (METRIC, -1), PACKED, ValueError, "r=-1, but it must be 0 or more"),
    (match_bipartite, (METRIC, 1.5), PACKED, TypeError, "r must be an int, or a tensor of one for each sequence"),
    (match_bipartite, (METRIC, torch.tensor([1])), PACKED, ValueError, "r has 1 entries"),
    (match_bipartite, (METRIC, torch.tensor([1.0, 1])), PACKED, TypeError, "r must be int64 or int32"),
    (match_bipartite, (METRIC, torch.tensor([1, -2])), PACKED, ValueError, "r has -2, but it must be 0 or more"),
    (match_bipartite, (METRIC, 1), PACKED | {"prefix": -1}, ValueError, "prefix=-1, but it must be 0 or more"),
    (match_bipartite, (METRIC, 1), PACKED | {"prefix": True}, TypeError, "prefix must be an int"),
    (merge_bipartite, (X, METRIC[:5], 1), PACKED, ValueError, "metric has 5 rows, but x has 6"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"sizes": torch.ones(1, 6)}, ValueError, r"sizes must have shape \(T\)"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"sizes": torch.ones(5)}, ValueError, "sizes has 5 rows"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"capacity": -1}, ValueError, "capacity=-1"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"capacity": 2.0}, TypeError, "capacity must be an int"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"companions": X}, TypeError, "companions must be a tuple"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"companions": (X,) * 5}, ValueError, "companions has 5 entries"),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"companions": (X[:5],)}, ValueError, r"companions\[0\] has 5 rows"),
    (
        merge_bipartite,
        (X, METRIC, 1),
        PACKED | {"companions": (X.int(),)},
        TypeError,
        r"companions\[0\] must be of a f",
    ),
    (merge_bipartite, (X, METRIC, 1), PACKED | {"norm": (torch.ones(2), None, 0.1)}, ValueError, "norm's weight has 2"),
    (merge_bipartite, (X[None], METRIC[None], 1), {"capacity": 4}, ValueError, "capacity=4, but it needs cu_seqlens"),
    (
        merge_bipartite,
        (X[None], METRIC[None], 1),
        {"companions": (X,)},
        ValueError,
        "companions are given, but they need",
    ),
    (merge_bipartite, (X[None], METRIC[None], torch.tensor([1])), {}, TypeError, "r must be an int"),
    (unmerge_bipartite, (X, torch.tensor([0, 6])), {}, IndexError, r"index\[1\]=6, but it must be from -1 to 5"),
    (unmerge_bipartite, (X, torch.tensor([0, -2])), {}, IndexError, r"index\[1\]=-2"),
    (unmerge_bipartite, (X, torch.tensor([0, 1]).int()), {}, TypeError, "index must be int64"),
]


@pytest.mark.parametrize("function, arguments, options, error, words", BAD, ids=[words for *_, words in BAD])
def test_bad_input(function, arguments, options, error, words):
    for name in ("auto", "reference"):
        with use_backend(name), pytest.raises(error, match=f"^{function.__name__}: .*{words}"):
            function(*arguments, **options)


def test_vmap_calls_each_sample(backend, device):
    """Samples of the same boundaries."""
    ends, x = boundaries((7, 3), device), torch.randn(2, 10, 6, device=device)
    call = partial(match_bipartite, r=2, cu_seqlens=ends, max_seqlen=7)
    mapped = torch.vmap(lambda metric: call(metric).index)(x)
    assert torch.equal(mapped, torch.stack([call(metric).index for metric in x]))


def test_a_row_of_no_size_has_no_say(backend, device):
    """Be it NaN; the row it goes to is as without it, and one that nothing of any size goes into is 0."""
    metric, packed = of_letters(("EENN", "EN"), device)
    x = torch.arange(7.0, device=device)[:, None].clone()
    x[0], sizes = NAN, torch.tensor([0.0, 2, 1, 0, 0, 0, 1], device=device)
    found = merge_bipartite(x, metric, torch.tensor([2, 0], device=device), sizes=sizes, prefix=0, **packed)
    assert found.index.tolist() == [0, 0, 1, 1, 2, 3, -1]
    assert found.tokens.flatten().tolist() == [1, 2, 0, 0, 0, 0, 0] and found.sizes.tolist() == [2, 1, 0, 0, 0, 0, 0]
