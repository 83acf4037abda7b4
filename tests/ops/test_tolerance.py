"""The yardstick itself: it passes what is right and fails what is wrong."""

import pytest
import torch

from support.tolerance import assert_as_good_as_plain


def example():
    truth = torch.randn(8, 16, 32, dtype=torch.float64)
    return truth.float(), truth.float(), truth


def test_passes_rounding():
    ours, plain, truth = example()
    assert_as_good_as_plain(ours, plain, truth)
    noisy = truth + 1e-5 * torch.randn_like(truth)
    assert_as_good_as_plain((truth + 1e-5 * torch.randn_like(truth)).float(), noisy.float(), truth)


def spoil_one(t):
    t[3, 4, 5] += 1e-3


def spoil_slightly_everywhere(t):
    t.mul_(1 + 1e-4)


def spoil_row(t):
    t[3, 4] = 0


def spoil_nan(t):
    t[0, 0, 0] = float("nan")


def spoil_bias(t):
    t += 3e-7 * 8


@pytest.mark.parametrize("spoil", [spoil_one, spoil_slightly_everywhere, spoil_row, spoil_nan, spoil_bias])
def test_fails_wrong_results(spoil):
    ours, plain, truth = example()
    spoil(ours)
    with pytest.raises(AssertionError):
        assert_as_good_as_plain(ours, plain, truth)


def test_silent_row_is_seen_where_plain_is_far_off_too():
    ours, _, truth = example()
    ours[3, 4] = 0
    with pytest.raises(AssertionError, match="1 rows are zero"):
        assert_as_good_as_plain(ours, (truth + 5).float(), truth)


def test_shape_and_dtype():
    ours, plain, truth = example()
    with pytest.raises(AssertionError, match="shape"):
        assert_as_good_as_plain(ours[:4], plain, truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_good_as_plain(ours.half(), plain, truth)
