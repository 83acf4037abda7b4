"""The CUDA kernels of bipartite merging, compiled for the host and run under AddressSanitizer and UBSan."""

import itertools

import numpy as np
import torch

from support import bipartite
from support.cases import BIPARTITE, BIPARTITE_LARGE, Bipartite
from support.emulation import LAYOUTS, MULTIPROCESSORS, SEED, bits, needs_compiler, tensor, told
from support.runs import double
from tokenops import reference

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN, INF = float("nan"), float("inf")


def match(emulate, metrics):
    """Compares the matching of (metric, r, prefix), in every layout in turn."""
    runs = []
    for n, (_, r, prefix) in enumerate(metrics):
        runs.append((r, prefix, LAYOUTS[n // 4 % 4], MULTIPROCESSORS[n // 3 % 4], SEED + n))
    results = emulate(
        "match_bipartite", {f"metric{n}": bits(m.contiguous()) for n, (m, *_) in enumerate(metrics)}, runs
    )
    for n, (metric, r, prefix) in enumerate(metrics):
        expected = reference.match_bipartite(metric.double(), r, prefix=prefix)
        with told(n, runs[n], metric.shape, metric.dtype):
            assert torch.equal(torch.from_numpy(results[f"index{n}"]), expected)
    return [[int(results[f"{name}{n}"]) for n in range(len(runs))] for name in ("width", "blocks")]


def test_match_exactly(emulate):
    """Metrics whose likeness has no rounding and many equals, in every dtype."""
    torch.manual_seed(0)
    metrics = []
    for case, dtype in itertools.product(BIPARTITE, DTYPES):
        metric = bipartite.exact_metric(case.B, case.prefix + case.N, case.D, case.prefix, "cpu").to(dtype)
        metrics.append((metric, case.r, case.prefix))
    for case, dtype in itertools.product(BIPARTITE_LARGE, DTYPES):
        metric = bipartite.exact_metric(case.B, case.prefix + case.N, case.D, case.prefix, "cpu")
        metrics.append((metric.to(dtype), case.r, case.prefix))
    widths, blocks = match(emulate, metrics)
    assert set(widths) >= {2, 4, 8, 16} and max(blocks) > 1 and blocks.count(1) > 4


def test_match_random_metrics(emulate):
    """More than one part of D in shared memory, and one that is not full."""
    torch.manual_seed(1)
    metrics = []
    for D, dtype in itertools.product((3, 40, 96), DTYPES):
        metrics.append((bipartite.random_metric(2, 71, D, 1, 20, dtype, "cpu"), 20, 1))
    match(emulate, metrics)


def test_match_rows_of_any_length(emulate):
    """Subnormal ones, and those whose squares overflow."""
    torch.manual_seed(5)
    metrics = []
    for dtype, (r, D) in itertools.product(DTYPES, ((1, 24), (9, 96))):
        metric = bipartite.exact_metric(2, 41, D, 1, "cpu").double()
        lowest, highest = {torch.float16: (-12, 12), torch.float64: (-1000, 1000)}.get(dtype, (-130, 120))
        metrics.append(((metric * 2.0 ** torch.randint(lowest, highest, (2, 41, 1)).double()).to(dtype), r, 1))
    match(emulate, metrics)


def test_match_what_is_no_number(emulate):
    """Rows of NaN, of infinities and of zeros, and vectors of no length."""
    torch.manual_seed(2)
    metrics = []
    for dtype, r in itertools.product(DTYPES, (1, 5, 10)):
        metric = bipartite.exact_metric(3, 21, 4, 1, "cpu")
        for value in (NAN, INF, 0.0):
            metric[torch.rand(3, 21) < 0.2] = value
        metric[0, 1::2] = NAN
        metric[1, 2::2, 0] = INF
        metrics += [(metric.to(dtype), r, 1), (torch.zeros(2, 21, 0, dtype=dtype), r, 1)]
    match(emulate, metrics)


def maps(case):
    """(index, M): of a match, of anything (out of range, more tokens than before), of all in one, of two merges."""
    B, N, r, _, D, prefix, _ = case
    metric = bipartite.exact_metric(B, prefix + N, D, prefix, "cpu")
    first, M = reference.match_bipartite(metric, r, prefix=prefix), N - r
    anything = torch.randint(-2, N + 5, (B, N))
    anything[:, :3] = torch.tensor([2**62, -(2**63), N + 3])[:N]
    several = torch.randint(0, max(M // 4, 1), (B, N))
    return (first, M), (anything, N + 3), (torch.full((B, N), M - 1), M), (several, M // 4), (anything, 0)


def expected(tensors, index, M, prefix, dy):
    """The merge and its gradient, the way back from dy, and its gradient."""
    x, y = tensors["x"].detach().requires_grad_(), dy.detach().requires_grad_()
    norm = (tensors["weight"], tensors["bias"], bipartite.EPS) if "weight" in tensors else None
    tokens, sizes, logs, normed = reference.merge_bipartite(
        x, index, M, prefix=prefix, sizes=tensors.get("sizes"), norm=norm
    )
    unmerged = reference.unmerge_bipartite(y, index, prefix=prefix)
    results = {"tokens": tokens, "sizes": sizes, "log_sizes": logs, "unmerged": unmerged}
    if norm is not None:
        results["normed"] = normed
    (dx,) = torch.autograd.grad(tokens, x, dy)
    (sums,) = torch.autograd.grad(unmerged, y, tensors["x"])
    return {name: t.detach() for name, t in results.items()}, {"dx": dx, "sums": sums}


NAMES = {"tokens": "y", "sizes": "totals", "log_sizes": "logs"}  # results of the driver


def test_merge(emulate):
    """Every kind of map, with and without sizes and norm, in every dtype, accesses of 16 bytes and of one element."""
    torch.manual_seed(3)
    long = Bipartite(1, 2100, 9, 2, 4, 1, "rows that fill a block's table")
    wide = Bipartite(2, 9, 2, 1000, 4, 1, "more channels than lanes hold")
    arrays, runs, kept = {}, [], []
    for start, case in enumerate((*BIPARTITE, *BIPARTITE_LARGE, long, wide)):
        every = itertools.product(maps(case)[: 2 if case is long else None], bipartite.OPTIONS)
        for (index, M), option in itertools.islice(every, start % 3, None, 3):
            n, prefix = len(runs), case.prefix
            dtype = DTYPES[(n + n // 4) % 4]
            tensors = bipartite.inputs(case, dtype, "cpu", option)
            if option[0]:
                tensors["sizes"] = tensors["sizes"].to((torch.float32, dtype, torch.float64)[n % 3])
            dy = torch.randn(case.B, prefix + M, case.C).to(dtype)
            kept.append((tensors, index, M, prefix, dy))
            accumulated = reference.accumulation_dtype(dtype)
            given = {name: t.to(accumulated) if name in ("weight", "bias") else t for name, t in tensors.items()}
            given |= {"dy": dy, "index": index}
            del given["metric"]
            arrays |= {f"{name}{n}": bits(t.contiguous()) for name, t in given.items()}
            grid = LAYOUTS[n // 2 % 4], 1 if case is long else MULTIPROCESSORS[n // 3 % 4], SEED + n
            runs.append((prefix, bipartite.EPS, option[1], *grid))
    results = emulate("merge_bipartite", arrays, runs)
    for n, (tensors, index, M, prefix, dy) in enumerate(kept):
        with told(n, runs[n], dy.shape, dy.dtype):
            plain = expected(tensors, index, M, prefix, dy)
            truth = expected(double(tensors), index, M, prefix, dy.double())
            ours = {name: tensor(results[f"{NAMES.get(name, name)}{n}"]) for name in (plain[0] | plain[1])}
            if dy.dtype == torch.float64:  # the truth itself is rounded
                torch.testing.assert_close(ours, plain[0] | plain[1], rtol=1e-12, atol=1e-12)
            else:
                bipartite.compare((ours, {}), plain, truth)
            if "normed" in ours and dy.numel():  # statistics are of the tokens as rounded
                y = ours["tokens"].double()
                mean, deviation = (torch.from_numpy(results[f"{name}{n}"]).double() for name in ("mean", "deviation"))
                torch.testing.assert_close(mean, y.mean(dim=2), rtol=1e-5, atol=1e-6)
                inverse = (y.var(dim=2, correction=0) + bipartite.EPS).rsqrt()
                torch.testing.assert_close(deviation, inverse, rtol=1e-5, atol=1e-6)
    assert {int(results[f"width{n}"]) for n in range(len(runs))} >= {2, 4, 8, 16}
    assert {int(results[f"threads{n}"]) for n in range(len(runs))} >= {8, 16, 32}


def test_any_order_of_threads_gives_the_same_bits(emulate):
    torch.manual_seed(4)
    index = torch.randint(0, 5, (2, 50))
    given = {"x": torch.randn(2, 51, 24), "dy": torch.randn(2, 6, 24), "sizes": torch.rand(2, 51), "index": index}
    arrays = {f"{name}{n}": bits(t) for name, t in given.items() for n in range(5)}
    results = emulate("merge_bipartite", arrays, [(1, 1e-5, True, "0", 2, SEED + n) for n in range(5)])
    for name, n in itertools.product(("y", "totals", "normed", "dx", "sums"), range(1, 5)):
        with told(name, n):
            assert np.array_equal(results[f"{name}{n}"], results[f"{name}0"])
