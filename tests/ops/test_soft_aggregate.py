"""soft_aggregate and soft_scatter: what they mean, and that every backend computes it, values and gradients."""

import subprocess
import sys

import pytest
import torch

import tokenops
from support.aggregation import delta_terms, inputs, run
from support.cases import AGGREGATE, DTYPES, QUICK
from support.compiled import needs_amx
from support.threads import by_threads
from support.tolerance import assert_as_good_as_plain
from tokenops import reference
from tokenops.ops import native

INF = float("inf")


OPERATOR = "soft_aggregate"  # of the `backend` fixture


# What the operators mean: tables to learn them from.


def test_a_slot_is_a_weighted_mean_of_the_tokens(device):
    x = torch.tensor([[[100.0], [1.0], [2.0], [4.0]]], device=device)  # a class token and three tokens
    w = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, INF]]], device=device).nan_to_num(posinf=1e4)
    y = tokenops.soft_aggregate(x, w, prefix=1)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([100.0, 7 / 3, 4.0], device=device))


def test_scale_sharpens(device):
    x = torch.tensor([[[0.0], [1.0]]], device=device)
    w = torch.tensor([[[0.0], [1.0]]], device=device).log1p()  # weights 1 : 2, and 1 : 8 at scale 3
    for scale, expected in ((None, 2 / 3), (3, 8 / 9), (torch.tensor(3.0, device=device), 8 / 9)):
        y = tokenops.soft_aggregate(x, w, scale=scale)
        torch.testing.assert_close(y.item(), expected, atol=1e-6, rtol=0)


def test_a_token_is_a_mixture_of_slots(device):
    z = torch.tensor([[[3.0], [9.0]]], device=device)
    w = torch.tensor([[[0.0, 0.0], [-INF, 0.0], [2.0, -INF]]], device=device)
    torch.testing.assert_close(tokenops.soft_scatter(z, w)[0, :, 0], torch.tensor([6.0, 9.0, 3.0], device=device))


def test_reference_is_the_papers_formula():
    x, w = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(2, 8, 3, dtype=torch.float64)
    e = torch.exp(0.7 * w)
    expected = torch.einsum("bnm,bnc->bmc", e / e.sum(dim=1, keepdim=True), x[:, 1:])
    y = reference.soft_aggregate(x, w, scale=0.7, prefix=1)
    torch.testing.assert_close(y, torch.cat((x[:, :1], expected), dim=1))


# Every backend against fp64 truth.

#: the large cases take the extras in one dtype
EVERY = [
    (extras, case, dtype)
    for extras in ("plain", "scale", "mask")
    for case in AGGREGATE
    for dtype in DTYPES
    if extras == "plain" or case.N <= 100 or dtype == torch.float32
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow_interpreted(quick=lambda case, dtype: case == AGGREGATE[0] or dtype in QUICK)
@pytest.mark.parametrize(("extras", "case", "dtype"), EVERY, ids=str)
def test_as_good_as_plain(case, dtype, extras, backend, device):
    x, w, scale, mask = inputs(case, dtype, device, mask=extras == "mask")
    scale = None if extras == "plain" else scale
    dy = torch.randn(case.B, case.prefix + case.M, case.C, device=device)

    def ours(x, w, scale):
        return tokenops.soft_aggregate(x, w, scale=scale, mask=mask, prefix=case.prefix)

    def plain(x, w, scale):
        return reference.soft_aggregate(x, w, scale=scale, mask=mask, prefix=case.prefix)

    double = [t if t is None else t.double() for t in (x, w, scale)]
    results = (run(ours, (x, w, scale), dy), run(plain, (x, w, scale), dy), run(plain, double, dy.to(dtype).double()))
    for what, a, b, truth in zip(("y", "dx", "dw", "dscale"), *results):
        if what == "dscale":  # one number, the sum of many that cancel: its error is measured against theirs
            torch.testing.assert_close(a.double(), truth, rtol=0.02, atol=0.02 * max(1.0, dy.numel() ** 0.5))
        else:
            assert_as_good_as_plain(a, b, truth, what, delta_terms(dy, results[2][0]) if what == "dw" else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dscale_is_as_good_as_plain(dtype, backend, device):
    errors = {"ours": [], "plain": []}
    for seed in range(12):
        torch.manual_seed(seed)
        x, w, scale, _ = inputs(AGGREGATE[0], dtype, device)
        dy = torch.randn(2, 6, 16, device=device)

        def dscale(f, *leaves):
            return run(lambda x, w, s: f(x, w, scale=s, prefix=1), leaves, dy.to(dtype))[3].double()

        truth = dscale(reference.soft_aggregate, x.double(), w.double(), scale.double())
        errors["ours"].append((dscale(tokenops.soft_aggregate, x, w, scale) - truth).abs().item())
        errors["plain"].append((dscale(reference.soft_aggregate, x, w, scale) - truth).abs().item())
    assert sum(errors["ours"]) <= 2 * sum(errors["plain"]) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_as_good_as_plain(dtype, backend, device):
    for M, N, C in ((12, 33, 20), (98, 196, 64), (1, 5, 3), (6, 1, 8)):
        z = torch.randn(2, M, C, dtype=dtype, device=device)
        w = 2 * torch.randn(2, N, M, dtype=dtype, device=device)
        dy = torch.randn(2, N, C, device=device).to(dtype)
        results = (
            run(tokenops.soft_scatter, (z, w), dy),
            run(reference.soft_scatter, (z, w), dy),
            run(reference.soft_scatter, (z.double(), w.double()), dy.double()),
        )
        for what, a, b, truth in zip(("y", "dz", "dw"), *results):
            cancels = delta_terms(dy, results[2][0]) if what == "dw" else 0.0
            assert_as_good_as_plain(a, b, truth, f"{what} at M={M} N={N}", cancels)


# Values at the edges.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_token_counts(dtype, backend, device):
    """An image without a valid token gives zeros and zero gradients, never NaN; masked tokens are not even read."""
    x, w, scale, _ = inputs(AGGREGATE[0], dtype, device)
    mask = torch.ones(2, 12, dtype=torch.bool, device=device)
    mask[0] = False
    mask[1, 3:] = False
    x[0, 1:] = INF
    x[1, 4:] = float("nan")
    y, dx, dw, dscale = run(lambda x, w, s: tokenops.soft_aggregate(x, w, scale=s, mask=mask, prefix=1), (x, w, scale))
    assert (y[0, 1:] == 0).all() and (y[:, 0] == x[:, 0]).all() and y[1].isfinite().all()
    assert (dx[0, 1:] == 0).all() and (dx[1, 4:] == 0).all() and (dw[0] == 0).all() and (dw[1, 3:] == 0).all()
    assert dx.isfinite().all() and dw.isfinite().all() and dscale.isfinite().all()
    torch.testing.assert_close(y[1:], tokenops.soft_aggregate(x[1:, :4], w[1:, :3], scale=scale, prefix=1))


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_logits_of_minus_infinity_leave_a_token_out(scale, backend, device):
    x, w, _, _ = inputs(AGGREGATE[0], torch.float32, device)
    w[0, :4] = -INF
    w[1, :, 2] = -INF  # a slot with no token at all
    learned = torch.tensor(scale, device=device)
    y, dx, dw, dscale = run(lambda x, w, s: tokenops.soft_aggregate(x, w, scale=s, prefix=1), (x, w, learned))
    expected = run(lambda x, w, s: reference.soft_aggregate(x, w, scale=s, prefix=1), (x, w, learned))
    for a, b in zip((y, dx, dw, dscale), expected):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
    assert (y[1, 3] == 0).all() and (dw[0, :4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype, backend, device):
    x, w, _, _ = inputs(AGGREGATE[5], dtype, device)
    w = torch.where(w > 0, 1e4, -1e4).to(dtype) + w
    for a, b in zip(
        run(lambda x, w: tokenops.soft_aggregate(x, w, prefix=1), (x, w)),
        run(lambda x, w: reference.soft_aggregate(x, w, prefix=1), (x, w)),
    ):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2)


# Layouts, dtypes, modes.


def test_offsets_beyond_32_bits(backend, device, much_memory):
    """Rows 2**30 elements apart: memory of which only a few pages are touched."""
    step = 2**30
    x = torch.empty(3 * step + 4, dtype=torch.float32, device=device).as_strided((1, 4, 4), (0, step, 1))
    x.copy_(torch.randn(1, 4, 4))
    w = torch.randn(1, 4, 2, device=device)
    torch.testing.assert_close(tokenops.soft_aggregate(x, w), tokenops.soft_aggregate(x.contiguous(), w))
    far = torch.empty(2 * step + 2, dtype=torch.float32, device=device).as_strided((1, 2, 2), (0, 2 * step, 1))
    far.copy_(w[:, :2])
    torch.testing.assert_close(tokenops.soft_aggregate(x[:, :2], far), tokenops.soft_aggregate(x[:, :2], w[:, :2]))


def test_mixed_dtypes(backend, device):
    """The result has the tokens' dtype, each gradient its own tensor's."""
    x, w, scale, _ = inputs(AGGREGATE[0], torch.float32, device)
    x, scale = x.bfloat16(), scale.half()
    y, dx, dw, dscale = run(lambda x, w, s: tokenops.soft_aggregate(x, w, scale=s, prefix=1), (x, w, scale))
    assert (y.dtype, dx.dtype, dw.dtype, dscale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float16)
    truth = reference.soft_aggregate(x.double(), w.double(), scale=scale.double(), prefix=1)
    torch.testing.assert_close(y.double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.slow_interpreted  # the interpreter knows one order
def test_deterministic(backend, device):
    x, w, scale, mask = inputs(AGGREGATE[6], torch.float32, device, mask=True)
    first, second = (
        run(lambda x, w, s: tokenops.soft_aggregate(x, w, scale=s, mask=mask, prefix=1), (x, w, scale))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


WITHOUT_MEMORY = """
import resource, torch, tokenops
torch.set_num_threads(1)
x = torch.ones(1, 2**22, 1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
try:
    tokenops.soft_aggregate(x, x)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.skipif(native.attention_isa(torch.float32) != "avx512", reason="torch's calls keep no memory of a thread")
def test_too_little_memory_is_an_error():
    """For what a thread keeps, 512 MB here; nothing ends."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0 and "bad_alloc" in done.stdout, done.stderr[-2000:]


@needs_amx
def test_bfloat16_runs_on_tiles():
    """Where the machine has them: what the softmax's gradient takes is then not rounded."""
    x, w, _, _ = inputs(AGGREGATE[6], torch.bfloat16, "cpu")
    dy = torch.randn(1, 99, 64)

    def dw():
        return run(lambda x, w: tokenops.soft_aggregate(x, w, prefix=1), (x, w), dy)[2]

    on_tiles = dw()
    with native.limit_cpu_isa("avx512bf16"):
        without = dw()
    assert not torch.equal(on_tiles, without) and torch.equal(on_tiles, dw())


@needs_amx
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", (AGGREGATE[6], AGGREGATE[7]), ids=str)
def test_one_image_on_tiles_of_many_threads(case):
    """Bit for bit the same."""
    x, w, scale, mask = inputs(case, torch.bfloat16, "cpu", mask=True)
    dy = torch.randn(1, case.prefix + case.M, case.C)

    def f(x, w, s):
        return tokenops.soft_aggregate(x, w, scale=s, mask=mask, prefix=1)

    by_threads(lambda: run(f, (x, w, scale), dy), 1, 2, 3)


def test_an_impossible_backend_says_why():
    with pytest.raises(ValueError, match="backend='cudnn', but it must be one of auto, native, triton, reference"):
        tokenops.use_backend("cudnn")
    with (
        tokenops.use_backend("native"),
        pytest.raises(RuntimeError, match="asked for but cannot run: .* no native path on meta"),
    ):
        tokenops.soft_aggregate(*torch.zeros(2, 2, 5, 5, device="meta"))
