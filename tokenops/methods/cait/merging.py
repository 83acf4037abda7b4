"""CAIT's merging: neighbours of the grid become one behind a few blocks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from ...nn import NeighbourMerging, grid_order
from ...nn.watched import exact
from ...ops.merge_bipartite import unmerge_bipartite
from ...ops.merge_neighbours import unmerge_neighbours
from ...patching.blocks import attend, feed, whole
from ...patching.engine import Flow, Method, Record, Role
from ...patching.families import Family
from ...patching.positions import Positions
from .blocks import Mlp, check_model, hidden, project


class Merged(NamedTuple):
    """What follows merged tokens, where they have positions or somebody asks.

    Attributes:
        source: ``(B, N0)`` int64, the token each patch is in: the same in all images.
    """

    source: Tensor


@dataclass(frozen=True)
class Merging(Role):
    r"""A block with a merge behind it, or without one.

    Where the merge's weights are scalars it commutes with the second linear layer: the hidden channels are merged
    instead of its result, :math:`\mathrm{merge}(x) + \mathrm{fc2}(\mathrm{merge}(h))`, and fc2 sees half as many
    tokens. The result is the same; dropout behind fc2, while training, and whatever looks at the MLP ask for the plain
    form.

    Attributes:
        merges: whether there is a merge. `constant` has all tokens in the order of the block layout, where the block
            puts them in this order.
        grid: whether every patch has a token again where the model takes them: it expects a map, or pools tokens that
            stand for unlike numbers of patches.
    """

    merges: bool = False
    grid: bool = False

    @property
    def mapped(self) -> bool:
        return self.grid

    @property
    def idle(self) -> bool:
        return not self.merges and self.constant is None

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        x, state = flow
        source = None if state is None else state.source
        follows = record is not None or positions is not None or self.grid
        if self.constant is not None:
            rows = block.tokenops_rows(x)
            x = x.index_select(1, rows)
            if follows:
                places = rows[self.prefix :] - self.prefix
                source = places.argsort().expand(x.shape[0], -1)
        if positions is not None and source is not None:
            positions = positions.mean(source[:1], x.shape[1] - self.prefix)
        if self.merges:
            x, source = self._merged(block, x, source, positions, record)
        else:
            x = whole(block, x, positions)
        return Flow(x, None if source is None else Merged(source))

    def _merged(
        self, block: Any, x: Tensor, source: Tensor | None, positions: Positions | None, record: Record | None
    ) -> tuple[Tensor, Tensor | None]:
        """The block with its merge behind it, and where the patches are then."""
        merge = block.merge
        x = attend(block, x, positions=positions)[0]
        if commutes(block) and not (block.mlp.training and block.mlp.drop2.p):
            x = self._fed(block, x)
        else:
            x = merge(feed(block, x))
        if record is not None or positions is not None or self.grid:
            into = merge.source.to(x.device)
            source = into.expand(x.shape[0], -1) if source is None else into[source]
        if record is not None:
            record.note(x, source)
        return x, source

    def _fed(self, block: Any, x: Tensor) -> Tensor:
        """x plus the MLP, merged before fc2."""
        merge, mlp, family = block.merge, block.mlp, block.tokenops_family
        y = project(mlp, merge(hidden(mlp, getattr(block, family.norm2)(x))))
        bias = mlp.fc2.bias
        if bias is not None and merge.kind == "scalar":  # behind the merge, bias counts by the sum of the weights
            y = y + (merge(torch.ones_like(x[:1, :, :1])) - 1) * bias
        return merge(x) + family.after_mlp(block, y)

    def left(self, block: Any, tokens: int, full: int) -> int:
        return self.prefix + math.prod(block.merge.merged_grid) if self.merges else tokens

    def spread(self, tokens: Tensor, state: Merged, finish: Any, prefix: int = 0) -> Tensor | None:
        return unmerge_bipartite(tokens, state.source, prefix=prefix)


class CAIT(Method):
    """Neighbouring patch tokens merged behind a few blocks; the prefix bypasses the merges.

    A pretrained model starts as the same one with average pooling of its tokens, whatever the kind.

    Where an odd side was merged, tokens stand for unlike numbers of patches. A model that pools patches then has one
    for every patch behind its last block, so that means count them by their sizes.

    Args:
        points: block numbers, from 0, to the axis merged behind each: "horizontal" or "vertical". None merges
            horizontally after a third of the depth and vertically after two thirds: of 12 blocks, behind 3 and 7.
        kind: "average", "scalar", "channel", "linear" or "content", as in `tokenops.nn.NeighbourMerging`; for all or
            one a point.
        layout: "raster" keeps the patches row by row; "block" puts them in the order of `tokenops.nn.grid_order` before
            the first block: there the first two merges, horizontal and then vertical, take rows side by side.

    Source: asymmetric token merging of CAIT (Wang et al., arXiv 2309.15755), reconstructed from the published
    description: the places, the weights and the layout are ours.
    """

    name, scores, shape = "cait", False, True

    def __init__(
        self,
        points: Mapping[int, str] | None = None,
        kind: str | Sequence[str] = "average",
        layout: str = "raster",
    ) -> None:
        if layout not in ("raster", "block"):
            raise ValueError(f"cait: layout={layout!r}, but it must be 'raster' or 'block'")
        self.points, self.kind, self.layout = points, kind, layout

    def roles(self, site: Any) -> list[Role]:
        points, sides = self._fitted(site)
        with torch.device("cpu"):  # numbers, also of a model on meta
            source, order = torch.arange(sides[0] * sides[1]), None
            if self.layout == "block":
                places = grid_order(sides)
                source, order = places.argsort(), (*range(site.prefix), *(site.prefix + places).tolist())
            for merge in self._merges(site, points, sides, ["average"] * len(points)).values():  # which draws none
                source = merge.source[source]
            sizes = source.bincount()
        grid = site.maps is not None or (site.pools_patches() and bool((sizes != sizes[0]).any()))
        return [
            Merging(site.prefix, False, i in points, grid, constant=None if i else order) for i in range(site.depth)
        ]

    def parts(self, site: Any) -> dict[int, tuple[str, Any]]:
        points, grid = self._fitted(site)
        kinds = [self.kind] * len(points) if isinstance(self.kind, str) else list(self.kind)
        return {i: ("merge", merge) for i, merge in self._merges(site, points, grid, kinds).items()}

    def _merges(
        self, site: Any, points: dict[int, str], grid: tuple[int, int], kinds: Sequence[str]
    ) -> dict[int, NeighbourMerging]:
        merges: dict[int, NeighbourMerging] = {}
        for j, ((i, axis), kind) in enumerate(zip(points.items(), kinds)):
            layout = self.layout if j < 2 else "raster"  # behind the second merge the block layout is the raster's
            merges[i] = NeighbourMerging(site.dim, axis, grid, kind, prefix=site.prefix, layout=layout)
            grid = merges[i].merged_grid
        return merges

    def _fitted(self, site: Any) -> tuple[dict[int, str], tuple[int, int]]:
        grid = site.needs_grid("cait")[1]
        points = merge_points(self.points, site.depth)
        if not isinstance(self.kind, str) and len(self.kind) != len(points):
            raise ValueError(
                f"cait: kind={self.kind!r} has {len(self.kind)} values, but there are {len(points)} points"
            )
        axes = tuple(points.values())
        if self.layout == "block" and axes[:2] != ("horizontal", "vertical")[: len(axes)]:
            raise ValueError(f"cait: layout='block' merges horizontally, then vertically, but points={points}")
        return points, grid


def merge_points(points: Mapping[int, str] | None, depth: int) -> dict[int, str]:
    """The merge points in the order of the blocks, checked."""
    if points is None:
        if depth < 3:
            raise ValueError(f"cait: points must be given for a model of {depth} blocks")
        return {round(depth / 3) - 1: "horizontal", round(2 * depth / 3) - 1: "vertical"}
    if not isinstance(points, Mapping):
        raise TypeError(f"cait: points={points!r}, but it must be block numbers to 'horizontal' or 'vertical'")
    for block in points:
        if type(block) is not int or not 0 <= block < depth:
            raise ValueError(f"cait: points has block {block!r}, but blocks are numbered 0 to {depth - 1}")
    return dict(sorted(points.items()))


def commutes(block: Any) -> bool:
    """Whether tokens are merged before the second layer of a block's MLP already, unless dropout is behind it."""
    merge = getattr(block, "merge", None)
    if (
        merge is None
        or not merge.commutes
        or not getattr(type(block), "tokenops_family", Family).linear
        or not hasattr(block, "mlp")
        or not exact(block.mlp, TimmMlp, Mlp)
    ):
        return False
    last = block.mlp.fc2
    if not isinstance(last, nn.Linear):
        return False
    return merge.kind != "scalar" or last.bias is None or not last.bias.is_meta  # it is read, to count by the weights


def merges_of(model: Any) -> list[NeighbourMerging | None]:
    """What merges tokens behind each block of a model, patched or not."""
    return [getattr(block, "merge", None) for block in model.blocks]


def order_of(model: Any) -> list[int] | None:
    """Which raster patch stands where before the first block of a model; None for the raster's own order."""
    role = getattr(model.blocks[0], "tokenops_role", None)
    rows = getattr(role, "constant", None)
    return None if rows is None else [row - model.num_prefix_tokens for row in rows[model.num_prefix_tokens :]]


def unmerge_tokens(model: Any, x: Tensor, block: int, *, prefix: int | None = None, mode: str = "repeat") -> Tensor:
    """Bring what comes out of a block back to the full grid, row by row, whatever the layout.

    Args:
        model: a timm VisionTransformer with merged tokens, or without any.
        x: ``(B, P+M, C)``, tokens behind the block.
        block: which block, from 0.
        prefix: P, the model's own number of prefix tokens unless given.
        mode: "repeat" or "bilinear", as in :func:`tokenops.unmerge_neighbours`.

    Returns:
        ``(B, P+H*W, C)``.

    Raises:
        TypeError: the model is another one, or behind another method than "cait".
        ValueError: there are not as many tokens as behind that block.
    """
    check_model("unmerge_tokens", model)
    prefix = model.num_prefix_tokens if prefix is None else prefix
    merges = [merge for merge in merges_of(model)[: block + 1] if merge is not None]
    height, width = model.patch_embed.grid_size
    if merges and x.shape[1] == prefix + height * width:  # brought back by the block
        return x
    if order_of(model) is not None and len(merges) < 2:
        # (i, j, dy, dx) to (i, dy, j, dx), dx being merged behind the first
        blocks = x[:, prefix:].unflatten(1, (height // 2, width // 2, 2, 2 - len(merges)))
        x = torch.cat((x[:, :prefix], blocks.transpose(2, 3).flatten(1, 4)), dim=1)
    return unmerge_neighbours(x, (height, width), tuple(merge.axis for merge in merges), prefix=prefix, mode=mode)
