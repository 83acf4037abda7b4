"""The CUDA kernels of sum_rows, compiled for the host and run under AddressSanitizer and UBSan."""

import itertools

import numpy as np
import torch

from support import summed_rows
from support.emulation import LAYOUTS, MULTIPROCESSORS, SEED, bits, needs_compiler, tensor, told
from support.runs import double
from tokenops.ops import reference_packed
from tokenops.ops.sum_rows import sorted_rows

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = (*summed_rows.CASES, (300, 2, 1000, "long"), (900, 260, 24, "anywhere"))


def expected(tensors, M, mean, dy):
    """The sums, and what they, and the products with x, give back."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in ("x", "weight") if n in tensors}
    norm = (tensors["factor"], tensors["bias"], summed_rows.EPS) if "factor" in tensors else None
    given = {**tensors, **leaves}
    y, totals, normed = reference_packed.sum_rows(
        given["x"], given["dest"], M, weight=given.get("weight"), mean=mean, norm=norm
    )
    results = {"y": y, "totals": totals, "gathered": reference_packed.gather_rows(dy, tensors["dest"])}
    (results["dx"],) = torch.autograd.grad(y, leaves["x"], dy, retain_graph=True)
    if normed is not None:
        results["normed"] = normed
    inside = (tensors["dest"] >= 0) & (tensors["dest"] < M)
    total = totals.masked_fill(totals == 0, 1.0) if mean else torch.ones_like(totals)
    shares = dy.to(totals.dtype) / total.unsqueeze(1)
    x = tensors["x"].to(totals.dtype).masked_fill(~inside.unsqueeze(1), 0.0)
    results["dots"] = (x * reference_packed.gather_rows(shares, tensors["dest"])).sum(dim=1)
    return {name: t.detach() for name, t in results.items()}


def arguments(tensors, M, dy):
    order, offsets = sorted_rows(tensors["dest"], M)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    given = {"x": tensors["x"].unsqueeze(0), "dy": dy.unsqueeze(0), "dest": tensors["dest"], "order": order}
    given["offsets"] = offsets
    if "weight" in tensors:
        given["each"] = tensors["weight"]
    if "factor" in tensors:
        given |= {"weight": tensors["factor"].to(wide), "bias": tensors["bias"].to(wide)}
    return {name: t.contiguous() for name, t in given.items()}


def test_sums_and_gathers(emulate):
    """Every kind of places, with and without weights and norm, accesses of 16 bytes and of one element."""
    torch.manual_seed(0)
    arrays, runs, kept = {}, [], []
    for start, case in enumerate(CASES):
        for option in itertools.islice(summed_rows.OPTIONS, start % 2, None, 2):
            n, (T, M, C, kind) = len(runs), case
            dtype = DTYPES[(n + n // 4) % 4]
            tensors = summed_rows.inputs(T, M, C, kind, option, dtype, "cpu")
            dy = torch.randn(M, C).to(dtype)
            kept.append((tensors, M, option[1], dy))
            arrays |= {f"{name}{n}": bits(t) for name, t in arguments(tensors, M, dy).items()}
            layout = LAYOUTS[n // 2 % 4], MULTIPROCESSORS[n // 3 % 4], SEED + n
            runs.append((option[1], summed_rows.EPS, option[2], *layout))
    results = emulate("sum_rows", arrays, runs)
    for n, (tensors, M, mean, dy) in enumerate(kept):
        with told(n, runs[n], dy.shape, dy.dtype):
            plain = expected(tensors, M, mean, dy)
            truth = expected(double(tensors), M, mean, dy.double())
            ours = {name: tensor(results[f"{name}{n}"]).view(t.shape) for name, t in plain.items()}
            if dy.dtype == torch.float64:  # the truth itself is rounded
                torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
                continue
            for name, right in truth.items():
                terms = tensors["x"].double().nan_to_num().norm() * dy.double().norm() if name == "dots" else 0.0
                summed_rows.assert_as_good_as_plain(ours[name], plain[name], right, name, float(terms))
            if "normed" in ours and dy.numel():  # statistics are of the rows as rounded
                y = ours["y"].double()
                mean_, deviation = (torch.from_numpy(results[f"{name}{n}"]).double() for name in ("mean", "deviation"))
                torch.testing.assert_close(mean_, y.mean(dim=1), rtol=1e-5, atol=1e-6)
                inverse = (y.var(dim=1, correction=0) + summed_rows.EPS).rsqrt()
                torch.testing.assert_close(deviation, inverse, rtol=1e-5, atol=1e-6)
    assert {int(results[f"width{n}"]) for n in range(len(runs))} >= {2, 4, 8, 16}
    assert {int(results[f"threads{n}"]) for n in range(len(runs))} >= {8, 16, 32}


def test_any_order_of_threads_gives_the_same_bits(emulate):
    torch.manual_seed(1)
    tensors = summed_rows.inputs(300, 4, 24, "long", (True, True, True), torch.float32, "cpu")
    given = arguments(tensors, 4, torch.randn(4, 24))
    arrays = {f"{name}{n}": bits(t) for name, t in given.items() for n in range(5)}
    results = emulate("sum_rows", arrays, [(True, 1e-5, True, "0", 2, SEED + n) for n in range(5)])
    for name, n in itertools.product(("y", "totals", "normed", "dx", "dots", "gathered"), range(1, 5)):
        with told(name, n):
            assert np.array_equal(results[f"{name}{n}"], results[f"{name}0"])
