"""Bipartite merging: what it means, and that every backend is as good as plain PyTorch."""

import math
from functools import partial

import pytest
import torch

import tokenops
from support.bipartite import (
    OPTIONS,
    compare,
    exact_metric,
    inputs,
    plain_merge,
    random_metric,
    run,
    run_unmerge,
)
from support.cases import BIPARTITE, BIPARTITE_LARGE, DTYPES, QUICK, Bipartite
from support.runs import double
from tokenops import reference
from tokenops.ops.merge_bipartite import merge_by_index, sum_by_index

NAN, INF = math.nan, math.inf
ALL = (*DTYPES, torch.float64)
match_bipartite, merge_bipartite, unmerge_bipartite = (
    tokenops.match_bipartite,
    tokenops.merge_bipartite,
    tokenops.unmerge_bipartite,
)


OPERATOR = "merge_bipartite"  # of the `backend` fixture


def column(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1)


# What the operator means: tables to learn it from. A token's metric is a direction: E(ast), N(orth), W(est), S(outh); e
# is three times as long, 0 is no direction, ? is no number, * is infinite.

COMPASS = {
    "E": (1, 0), "N": (0, 1), "W": (-1, 0), "S": (0, -1), "e": (3, 0), "0": (0, 0), "?": (NAN, 1), "*": (INF, 0),
}  # fmt: skip


def compass(letters, prefix, device):
    rows = [(NAN, NAN)] * prefix + [COMPASS[letter] for letter in letters]
    return torch.tensor(rows, dtype=torch.float32, device=device).reshape(1, -1, 2)


MATCHED = [
    # P, metric, r, index
    (0, "EN", 0, [0, 1]),
    (0, "EN", 1, [0, 0]),  # both become one, however unlike
    (0, "EW", 1, [0, 0]),  # though nothing is less alike
    (1, "EN", 1, [0, 0]),
    (0, "EENN", 1, [1, 1, 0, 2]),  # of equals the first: token 0 goes into 1
    (1, "EENN", 1, [1, 1, 2, 0]),  # behind a prefix of 1 it is tokens 1 and 3 that look for tokens 0 and 2
    (2, "EENN", 1, [1, 1, 0, 2]),
    (0, "EENN", 2, [0, 0, 1, 1]),
    (0, "SENN", 1, [0, 1, 2, 2]),  # token 2 is more like token 3 than 0 is like any
    (0, "EEWE", 1, [1, 1, 0, 2]),  # of equal goals the first
    (0, "WEES", 2, [1, 0, 0, 1]),  # the best of token 0 is no more than a right angle
    (0, "EeNS", 1, [1, 1, 0, 2]),  # lengths do not count
    (0, "ENENEW", 3, [0, 0, 0, 1, 0, 2]),  # several go into one
    (0, "ENE", 1, [1, 1, 0]),  # an odd number
    (0, "ENE", 2, [0, 0, 0]),
    (1, "ENE", 1, [0, 0, 1]),
    (3, "E", 0, [0]),
    (0, "", 0, []),
    (0, "?EEE", 1, [0, 1, 1, 2]),  # what is no number is least
    (0, "?EEE", 2, [0, 0, 0, 1]),
    (0, "E?WE", 1, [2, 1, 0, 2]),
    (0, "*EEE", 1, [0, 1, 1, 2]),
    (0, "*WEE", 2, [0, 0, 1, 1]),  # of likenesses that are no numbers the first
    (0, "0EWN", 1, [1, 1, 0, 2]),  # no direction is at a right angle to all
    (0, "00SN", 1, [1, 1, 0, 2]),
]


@pytest.mark.parametrize("prefix, letters, r, expected", MATCHED)
def test_matching(backend, device, prefix, letters, r, expected):
    for dtype in (torch.float32, torch.bfloat16):
        metric = compass(letters, prefix, device).to(dtype)
        for function in (match_bipartite, reference.match_bipartite):
            assert function(metric, r, prefix=prefix).tolist() == [expected]


MERGED = [
    # P, metric, r, tokens behind the prefix, sizes of all rows, result and its sizes
    (0, "EN", 1, [1, 4], None, [2.5], [2]),
    (1, "EENN", 1, [1, 2, 3, 4], None, [4, 1.5, 3], [1, 1, 2, 1]),
    (1, "EENN", 2, [1, 2, 3, 4], [7, 3, 1, 1, 1], [1.25, 3.5], [7, 4, 2]),
    (0, "ENENEW", 3, [1, 2, 3, 4, 5, 6], [2, 1, 1, 1, 0, 5], [1.75, 4, 6], [4, 1, 5]),
    (0, "EENN", 1, [1, 2, 3, 4], [0, 0, 1, 2], [3, 0, 4], [1, 0, 2]),  # of nothing: zero
    (2, "EENN", 0, [1, 2, 3, 4], None, [1, 3, 2, 4], [1, 1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize("prefix, letters, r, tokens, sizes, expected, merged", MERGED)
def test_merging(backend, device, prefix, letters, r, tokens, sizes, expected, merged):
    ahead = [9.0, 8.0][:prefix]
    x, metric = column([*ahead, *tokens], device), compass(letters, prefix, device)
    sizes = None if sizes is None else torch.tensor([sizes], dtype=torch.float32, device=device)
    for function in (merge_bipartite, plain_merge):
        y, _, totals, logs, normed = function(x, metric, r, prefix=prefix, sizes=sizes)[:5]
        assert y.flatten().tolist() == [*ahead, *expected] and totals.tolist() == [merged] and normed is None
        torch.testing.assert_close(logs, totals.log())


UNMERGED = [
    # P, tokens, index, result
    (0, [5, 6], [1, 0, 1], [6, 5, 6]),
    (1, [9, 5, 6], [0, 0, 1, 0], [9, 5, 5, 6, 5]),
    (2, [9, 8, 5], [0, 0], [9, 8, 5, 5]),
    (1, [9, 5], [], [9]),
]


@pytest.mark.parametrize("prefix, tokens, index, expected", UNMERGED)
def test_unmerging(backend, device, prefix, tokens, index, expected):
    y = column(tokens, device).requires_grad_()
    x = unmerge_bipartite(y, torch.tensor([index], dtype=torch.int64, device=device), prefix=prefix)
    assert x.flatten().tolist() == expected
    x.sum().backward()  # each token gets as much as there are that went into it
    assert y.grad.flatten().tolist() == [1] * prefix + [index.count(m) for m in range(len(tokens) - prefix)]


def by_the_paper(x, metric, r, prefix, sizes):
    """Tokens and sizes of ToMe's section 3, in words of Python: two sides, one edge each, the r best, means by size."""
    images, totals = [], []
    for tokens, keys, counts in zip(x.double(), metric.double(), sizes.double(), strict=True):
        rows = range(prefix, len(tokens))
        A, B = [n for n in rows if n % 2 == 0], [n for n in rows if n % 2 == 1]
        goal, likeness = {}, {}
        for a in A:
            edges = {b: float(keys[a] @ keys[b] / keys[a].norm() / keys[b].norm()) for b in B}
            goal[a] = max(edges, key=edges.get)
            likeness[a] = edges[goal[a]]
        merged = sorted(A, key=likeness.get, reverse=True)[:r]
        groups = [[n] for n in [*range(prefix), *(a for a in A if a not in merged)]]
        groups += [[b, *(a for a in merged if goal[a] == b)] for b in B]
        totals.append(torch.stack([counts[g].sum() for g in groups]))
        images.append(torch.stack([(tokens[g] * counts[g, None]).sum(0) / counts[g].sum() for g in groups]))
    return torch.stack(images), torch.stack(totals)


@pytest.mark.parametrize("prefix, N, r", ((1, 20, 6), (0, 13, 7), (2, 11, 3)))
def test_it_is_the_papers(backend, device, prefix, N, r):
    for dtype in (torch.float32, torch.bfloat16):
        x, metric = torch.randn(2, prefix + N, 5), random_metric(2, prefix + N, 12, prefix, r, dtype, "cpu")
        sizes = torch.randint(1, 9, (2, prefix + N))
        y, totals = by_the_paper(x, metric, r, prefix, sizes)
        found = merge_bipartite(
            x.to(device), metric.to(device), r, prefix=prefix, sizes=sizes.to(device, torch.float32)
        )
        torch.testing.assert_close(found.tokens.cpu(), y.float())
        torch.testing.assert_close(found.sizes.cpu(), totals.float())


def test_merged_again_and_again(backend, device):
    """Each token stays the mean of the patches it stands for, which the composed indices tell, and the way back."""
    first = torch.randn(2, 1 + 23, 3, device=device)
    y, sizes, index = first, None, torch.arange(23, device=device).expand(2, -1)
    for r in (5, 8, 2, 0, 1):
        merged = merge_bipartite(y, random_metric(2, y.shape[1], 4, 1, r, torch.float32, device), r, sizes=sizes)
        y, sizes, index = merged.tokens, merged.sizes, merged.index.gather(1, index)
        assert y.shape[1] == sizes.shape[1] and torch.equal(y[:, 0], first[:, 0])
        assert sizes[:, 1:].sum(dim=1).tolist() == [23, 23] and sizes[:, 0].tolist() == [1, 1]
    assert y.shape[1] == 1 + 23 - 16
    for b in range(2):
        for m in range(y.shape[1] - 1):
            into = index[b] == m
            torch.testing.assert_close(y[b, 1 + m], first[b, 1:][into].mean(dim=0))
            assert into.sum() == sizes[b, 1 + m]
    back = unmerge_bipartite(y, index)
    assert torch.equal(back, torch.stack([torch.cat((t[:1], t[1:][i])) for t, i in zip(y, index)]))
    again, totals, _, _ = merge_by_index("merge", back, index, y.shape[1] - 1, 1)
    torch.testing.assert_close(again, y)
    assert torch.equal(totals, sizes)


def test_the_logarithm_of_any_size(backend, device):
    """Small integers are looked up on a CPU."""
    sizes = torch.tensor([[-1.0, -2.0, -0.5, 0.0, 1.0, 2.5, 256.0, 257.0, float("inf"), float("nan")]], device=device)
    x = torch.randn(1, 10, 3, device=device)
    found = merge_bipartite(x, x, 0, sizes=sizes, prefix=10).log_sizes
    torch.testing.assert_close(found, sizes.log(), equal_nan=True)


def test_nothing_merged_is_a_copy(backend, device):
    for prefix, order in ((0, [0, 2, 4, 1, 3]), (1, [0, 2, 4, 1, 3]), (3, [0, 1, 2, 4, 3])):
        x = torch.randn(2, 5, 6, device=device, dtype=torch.bfloat16)
        merged = merge_bipartite(x, x, 0, prefix=prefix)
        assert torch.equal(merged.tokens, x[:, order]) and merged.sizes.eq(1).all() and merged.log_sizes.eq(0).all()
        assert torch.equal(unmerge_bipartite(merged.tokens, merged.index, prefix=prefix), x)


def test_the_norm_is_that_of_the_result(backend, device):
    x, norm = torch.randn(2, 7, 8, device=device), (torch.rand(8, device=device), None, 0.1)
    merged = merge_bipartite(x, x, 2, norm=norm)
    torch.testing.assert_close(merged.normed, torch.nn.functional.layer_norm(merged.tokens, (8,), *norm))


# Every backend against the reference in fp64: values and gradients at most twice as far as plain PyTorch.


@pytest.mark.slow_interpreted(quick=lambda case, dtype: case == BIPARTITE[0] or dtype in QUICK)
@pytest.mark.parametrize("dtype", ALL, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", (*BIPARTITE, *BIPARTITE_LARGE), ids=str)
def test_forward_and_backward(backend, device, poisoned, ran_kernels, case, dtype):
    interpreted = backend == "triton" and device == "cpu"
    if case in BIPARTITE_LARGE and interpreted:
        pytest.skip("too large for the interpreter")
    for option in OPTIONS[::3] if interpreted else OPTIONS:
        tensors = inputs(case, dtype, device, option)
        truth = run(plain_merge, double(tensors), case.r, case.prefix)
        with ran_kernels() as names:
            *ours, _ = run(merge_bipartite, tensors, case.r, case.prefix, truth[2])
        assert names == {f"merge_bipartite_{n}.{backend}" for n in ("matched", "bwd")}
        *plain, _ = run(plain_merge, tensors, case.r, case.prefix, truth[2])
        compare(ours, plain, truth)
        *again, _ = (*ours, None) if interpreted else run(merge_bipartite, tensors, case.r, case.prefix, truth[2])
        for mine, same in zip(ours, again):
            assert all(torch.equal(mine[n], same[n]) for n in mine)  # deterministic


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: str(d)[6:])
def test_matching_of_any_numbers(backend, device, dtype):
    for B, N, D, prefix, r in ((2, 40, 24, 1, 11), (1, 67, 64, 0, 34), (3, 18, 7, 2, 4), (1, 9, 200, 1, 1)):
        metric = random_metric(B, prefix + N, D, prefix, r, dtype, device)
        found = match_bipartite(metric, r, prefix=prefix)
        assert torch.equal(found, reference.match_bipartite(metric.double(), r, prefix=prefix))


def test_metrics_without_numbers(backend, device):
    """No dimension, and zeros only: everything is equally alike, and the first are taken."""
    for D in (0, 3):
        metric = torch.zeros(2, 8, D, device=device)
        assert match_bipartite(metric, 2, prefix=0).tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]] * 2
    metric[1] = NAN
    assert match_bipartite(metric, 2, prefix=0).tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]] * 2


def test_of_tiny_differences_the_larger_is_merged(backend, device):
    """Squares that vanish in fp32."""
    metric = torch.tensor([[[1, 0], [1, 0], [3e-25, 4e-25], [5e-24, 1e-24]]], device=device)
    for function in (match_bipartite, reference.match_bipartite):
        assert function(metric, 1, prefix=0).tolist() == [[1, 1, 0, 2]]


@pytest.mark.parametrize("dtype", ALL, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("prefix", (0, 1))
def test_lengths_do_not_count(backend, device, dtype, prefix):
    """Not those of subnormal rows, nor of rows whose squares overflow."""
    exact = exact_metric(3, prefix + 41, 24, prefix, device).double()
    any_numbers = random_metric(3, prefix + 41, 24, prefix, 9, dtype, device).double()
    limits = torch.finfo(dtype)
    normal, highest = round(math.log2(limits.tiny)) + 13, round(math.log2(limits.max)) - 3
    lowest = round(math.log2(limits.tiny) + math.log2(limits.eps)) + 2  # exact_metric's smallest is then the smallest
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:  # the interpreter reads no subnormal ones
        lowest = normal
    powers = torch.randint(lowest, highest + 1, (3, prefix + 41, 1), device=device)
    powers[:, :4], powers[:, -4:] = lowest, highest

    def multiplied(metric, powers):
        for part in (powers // 2, powers - powers // 2):  # 2^1074 is no number
            metric = metric * 2.0 ** part.double()
        return metric.to(dtype)

    scaled, rounded = multiplied(exact, powers), multiplied(any_numbers, powers.clamp(min=normal))
    for function in (match_bipartite, reference.match_bipartite):
        found, expected = (function(m, 9, prefix=prefix) for m in (scaled, exact))
        assert torch.equal(found, expected)
        found = function(rounded, 9, prefix=prefix)
        assert torch.equal(found, reference.match_bipartite(any_numbers, 9, prefix=prefix))


def test_the_reference_of_one_image_at_a_time():
    metric = exact_metric(4, 12, 16, 1, "cpu")
    for r, prefix in ((0, 1), (3, 1), (4, 2)):
        match = partial(reference.match_bipartite, r=r, prefix=prefix)
        mapped = torch.vmap(lambda image, match=match: match(image.unsqueeze(0)).squeeze(0))(metric)
        assert torch.equal(mapped, match(metric))


def test_of_equals_far_apart_the_first_is_taken(backend, device):
    """More odd tokens than a kernel compares at a time, all alike."""
    for N in (140, 300):
        expected = torch.arange(N // 2, device=device).repeat_interleave(2)
        expected[::2] = 0
        assert match_bipartite(torch.ones(1, N, 4, device=device), N // 2, prefix=0).tolist() == [expected.tolist()]


def index_of(kind, B, N, M, device):
    """Maps that no single merge makes: many tokens into one, none into some."""
    index = torch.randint(0, M, (B, N), device=device)
    if kind == "one":
        index[:] = M - 1
    elif kind == "strided":
        index = torch.stack((index, torch.full_like(index, 1 << 40)), dim=2).transpose(0, 1).contiguous()
        index = index.transpose(0, 1)[..., 0]
    elif kind == "one image":
        index = index[:1].expand(B, -1)
    return index


@pytest.mark.parametrize("kind", ("random", "one", "strided", "one image"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_any_index(backend, device, poisoned, ran_kernels, kind, dtype):
    for B, N, M, C, prefix in ((2, 14, 5, 24, 1), (1, 3, 6, 13, 0), (1, 6, 1, 8, 2)):
        index, case = index_of(kind, B, N, M, device), Bipartite(B, N, 0, C, 4, prefix, "any map")
        tensors = inputs(case, dtype, device, (True, True))

        def ours(x, metric, r, index=index, M=M, **options):
            y, sizes, logs, normed = merge_by_index("merge", x, index, M, **options)
            return y, index.contiguous(), sizes, logs, normed

        def plain(x, metric, r, index=index, M=M, **options):
            y, sizes, logs, normed = reference.merge_bipartite(x, index, M, **options)
            return y, index, sizes, logs, normed

        truth = run(plain, double(tensors), 0, prefix)
        found, expected = (run(f, tensors, 0, prefix, truth[2])[:2] for f in (ours, plain))
        compare(found, expected, truth)

        y = torch.randn(B, prefix + M, C, device=device).to(dtype)
        truth = run_unmerge(reference.unmerge_bipartite, y.double(), index, prefix)
        with ran_kernels() as names:
            *found, _ = run_unmerge(unmerge_bipartite, y, index, prefix, truth[2])
        assert names == {f"unmerge_bipartite_fwd.{backend}", f"unmerge_bipartite_bwd.{backend}"}
        *expected, _ = run_unmerge(reference.unmerge_bipartite, y, index, prefix, truth[2])
        compare(found, expected, truth)
        assert torch.equal(found[0]["x"], expected[0]["x"])

        x = tensors["x"].requires_grad_()
        summed = sum_by_index("merge", x, index, M, prefix)  # the transpose, and back
        assert torch.equal(summed, run_unmerge(unmerge_bipartite, y, index, prefix, x.detach())[1]["dy"])
        (dx,) = torch.autograd.grad(summed, x, y)
        assert torch.equal(dx, found[0]["x"])


def test_sums_are_in_the_order_of_the_tokens(backend, device):
    index = torch.zeros(1, 3, dtype=torch.int64, device=device)
    for values, total in (([1, 1e8, -1e8], 0.0), ([1e8, -1e8, 1], 1.0)):
        x = column(values, device)
        assert sum_by_index("merge", x, index, 1, 0).item() == total
        assert merge_by_index("merge", x, index, 1, 0)[0].item() == pytest.approx(total / 3)


def test_sizes_and_metrics_of_other_dtypes(backend, device):
    x, metric = torch.randn(2, 9, 8, device=device), exact_metric(2, 9, 16, 1, device)
    sizes = torch.randint(0, 5, (2, 9), device=device)
    expected = merge_bipartite(x, metric, 3, sizes=sizes.float())
    for of_metric, of_sizes in zip(ALL, reversed(ALL)):
        found = merge_bipartite(x, metric.to(of_metric), 3, sizes=sizes.to(of_sizes))
        assert all(torch.equal(mine, right) for mine, right in zip(found[:4], expected[:4], strict=True))
    found = merge_bipartite(x.double(), metric, 3, sizes=sizes.half())
    assert found.sizes.dtype == found.log_sizes.dtype == torch.float64
    torch.testing.assert_close(found.tokens.float(), expected.tokens)


def test_nan_and_infinity_stay_where_they_are(backend, device):
    x = column([NAN, 1, NAN, INF, 2, 3, INF], device)
    for function in (merge_bipartite, plain_merge):  # tokens 1 and 3 go into 0, token 5 into 4
        y = function(x, compass("NENEWS", 1, device), 3)[0]
        assert str(y.flatten().tolist()) == "[nan, nan, inf, inf]"
