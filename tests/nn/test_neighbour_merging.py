"""NeighbourMerging against strided slices: every kind of weights, both axes, odd sides, sizes, and the block layout."""

import pytest
import torch

import tokenops
from support.cait_merging import KINDS, by_slices, lively
from support.models import close
from tokenops.nn import NeighbourMerging, grid_order, raster_order


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
@pytest.mark.parametrize("grid, prefix", [((4, 6), 1), ((3, 5), 2), ((1, 1), 0), ((2, 1), 1)])
def test_neighbour_merging(kind, axis, grid, prefix):
    merge = NeighbourMerging(8, axis, grid, kind, prefix=prefix)
    x = torch.randn(2, prefix + grid[0] * grid[1], 8, requires_grad=True)
    average = tokenops.merge_neighbours(x, grid, axis, prefix=prefix)
    torch.testing.assert_close(merge(x), average, rtol=1e-6, atol=1e-6)  # all begin so
    lively(merge)
    y = merge(x)
    expected = torch.cat((x[:, :prefix], by_slices(merge, x[:, prefix:].unflatten(1, grid), axis).flatten(1, 2)), dim=1)
    close(y, expected)
    inputs = [x, *merge.parameters()]
    found, wanted = (torch.autograd.grad(t.square().sum(), inputs, materialize_grads=True) for t in (y, expected))
    for grad, right in zip(found, wanted):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)
    assert y.shape[1] == prefix + merge.merged_grid[0] * merge.merged_grid[1]
    assert merge.commutes == (kind in ("average", "scalar"))
    merge.reset_parameters()
    torch.testing.assert_close(merge(x), average, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_count_by_their_sizes(kind):
    """What is merged twice is the mean of all patches, odd axes included; an empty pair stays finite."""
    x = torch.randn(2, 1 + 2 * 5, 8)
    first = NeighbourMerging(8, "horizontal", (2, 5), kind)
    second = NeighbourMerging(8, "horizontal", first.merged_grid, kind)
    y, sizes = second(*first(x, torch.ones(2, 10)))
    patches = x[:, 1:].unflatten(1, (2, 5))
    close(y[:, 1:].unflatten(1, (2, 2)), torch.stack((patches[:, :, :4].mean(2), patches[:, :, 4]), dim=2))
    assert sizes.tolist() == [[4, 1, 4, 1]] * 2
    y, sizes = first(x, torch.zeros(2, 10))
    close(y, first(x))
    assert sizes.shape == (2, 6) and not sizes.any()


def test_grid_order():
    order = grid_order((4, 6))
    for t, patch in enumerate(order.tolist()):
        (block, dy, dx) = t // 4, t // 2 % 2, t % 2
        assert patch == (2 * (block // 3) + dy) * 6 + 2 * (block % 3) + dx
    assert torch.equal(order[raster_order((4, 6))], torch.arange(24))
    for grid in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match="even sides"):
            raster_order(grid)


def test_errors_of_neighbour_merging():
    for kwargs, message in (
        (dict(axis="diagonal"), "axis='diagonal', but it must be one of 'horizontal', 'vertical'"),
        (dict(kind="maximum"), "kind='maximum'"),
        (dict(layout="hilbert"), "layout='hilbert'"),
        (dict(layout="block", grid=(4, 3)), r"grid=\(4, 3\) has odd sides"),
        (dict(layout="block", grid=(3, 4)), r"grid=\(3, 4\) has odd sides"),
    ):
        with pytest.raises(ValueError, match=message):
            NeighbourMerging(**{**dict(dim=8, axis="horizontal", grid=(4, 4)), **kwargs})
    for kind in KINDS:
        with pytest.raises(ValueError, match="x has 18 tokens"):
            NeighbourMerging(8, "horizontal", (4, 4), kind)(torch.randn(2, 18, 8))
