"""How close is close enough: measured, not picked.

Truth is the reference in fp64. A kernel may be at most twice as far from it as plain PyTorch is in the same dtype, by
the L2 norm and, less sharply, by the largest error, in which there is luck: of a few roundings the largest of plain
PyTorch is now and then several times less than ours, with another seed the other way. No row may be silently zero, and
errors may not all lean to one side.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

FACTOR = 2.0
MADE = 6.0  # roundings of the accumulator
#: a file for the share of what is allowed that each comparison took (pytest --margins)
NOTED_IN: str | None = None


def assert_as_good_as_plain(
    ours: Tensor, plain: Tensor, truth: Tensor, what: str = "result", cancels: float = 0.0
) -> None:
    """`ours` and `plain` are in the tested dtype, `truth` in fp64 (all finite).

    `cancels` is the size of the terms that cancel in each element, one rounding of which is allowed for (a gradient
    A * (G - D) of a softmax, whose D = sum of dy * y is made from the rounded y); in the norm that of one element.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, expected {plain.dtype}"
    if truth.numel() == 0:
        return
    ours64, plain64 = ours.detach().double().cpu(), plain.detach().double().cpu()
    truth = truth.detach().double().cpu()
    assert torch.isfinite(ours64).all(), f"{what}: {int((~torch.isfinite(ours64)).sum())} elements are not finite"
    # a floor for plain results that happen to be exact: two roundings of the largest value, and a few of its making
    eps = torch.finfo(ours.dtype).eps
    floor = 2 * eps * truth.abs().max()
    made = MADE * torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps * truth.abs().max()
    error, allowed = (ours64 - truth).abs().max(), FACTOR * (plain64 - truth).abs().max() + floor + made + eps * cancels
    _note(what, "largest", error, allowed)
    assert error <= allowed, f"{what}: largest error {error:.3e}, but plain PyTorch allows {allowed:.3e}"
    error, allowed = (ours64 - truth).norm(), FACTOR * (plain64 - truth).norm() + floor * truth.numel() ** 0.5
    allowed = allowed + eps * cancels
    _note(what, "L2", error, allowed)
    assert error <= allowed, f"{what}: L2 error {error:.3e}, but plain PyTorch allows {allowed:.3e}"
    assert_no_silent_rows(ours64, truth, what)
    assert_unbiased(ours64, truth, what, eps)


def assert_no_silent_rows(ours: Tensor, truth: Tensor, what: str = "result") -> None:
    """A row of zeros where the truth has values means that a tile was never computed."""
    if truth.dim() == 0:
        return
    rows = truth.abs().amax(dim=-1)
    silent = (ours.abs().amax(dim=-1) == 0) & (rows > 1e-3 * truth.abs().max())
    assert not silent.any(), f"{what}: {int(silent.sum())} rows are zero, but should not be"


def assert_unbiased(ours: Tensor, truth: Tensor, what: str, eps: float) -> None:
    """Rounding errors cancel; a mean error of many roundings is a missing term."""
    if truth.numel() < 1000:
        return
    error = ours - truth
    bias, typical = error.mean().abs(), error.abs().mean()
    noise = typical / truth.numel() ** 0.5 + eps * truth.abs().mean() * 0.25
    _note(what, "mean", bias, 8 * noise)
    assert bias <= 8 * noise, (
        f"{what}: mean error {bias:.3e} against {typical:.3e} in size: the errors lean to one side"
    )


def _note(what: str, statistic: str, error: Tensor, allowed: Tensor) -> None:
    if NOTED_IN is not None and allowed > 0:
        row = os.environ.get("PYTEST_CURRENT_TEST", ""), what, statistic, float(error / allowed)
        with Path(NOTED_IN).open("a") as file:
            file.write(json.dumps(row) + "\n")
