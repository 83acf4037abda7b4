"""The methods that slim tokens between blocks, or by a schedule: SiT, Patch Slimming, CAIT's merging."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.cait.blocks import _points
from ..methods.evit import block_indices
from ..methods.patch_slimming.schedule import Schedule
from ..nn import NeighbourMerging, TokenSlimming
from .block import PatchedBlock, State
from .families import rope_rows
from .reducing import Method, quarters, refuse_rope


class SiT(Method):
    """Learned mixtures of the tokens before a few blocks, `tokenops.nn.TokenSlimming`."""

    name, scores = "sit", False

    def __init__(self, keeping_ratio: float = 0.5, locations: Sequence[int] | None = None) -> None:
        if isinstance(keeping_ratio, bool) or not 0 < keeping_ratio <= 1:
            raise ValueError(f"keeping_ratio={keeping_ratio}, but it must be above 0 and at most 1")
        self.keeping_ratio, self.locations = keeping_ratio, locations

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        refuse_rope(site, "sit", "a mixture of tokens has no position")
        site.needs_no_map("sit")
        patches, depth = site.needs_grid("sit")[0], len(site.blocks)
        self.locations = block_indices("locations", quarters(depth, self.locations), 0, depth)
        left = [int(patches * self.keeping_ratio**i) for i in range(1, len(self.locations) + 1)]
        if self.keeping_ratio == 1:
            return {}
        if left and left[-1] < 1:
            raise ValueError(f"keeping_ratio={self.keeping_ratio} leaves none of {patches} tokens")
        return {i: ("slimming", TokenSlimming(site.dim, tokens)) for i, tokens in zip(self.locations, left)}

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        slimming: Any = getattr(block, "slimming", None)
        if slimming is not None:
            if state.steps is not None:
                drawn = slimming.aggregation(x, block.patch.prefix).transpose(1, 2)
                state.weights = drawn if state.weights is None else drawn @ state.weights
            x = slimming(x, prefix=block.patch.prefix)
            state.note(block.index, x, None, state.weights)
        return block.whole(x, rope)


class PatchSlimming(Method):
    """The patches a schedule keeps, the same for every image, as in `tokenops.methods.patch_slimming`."""

    name, scores = "patch_slimming", False

    def __init__(self, schedule: Schedule | Sequence[int]) -> None:
        self.schedule = schedule

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        site.needs_no_map("patch_slimming")
        patches, grid = site.needs_grid("patch_slimming")
        schedule = self.schedule
        if not isinstance(schedule, Schedule):
            schedule = Schedule.from_counts(schedule, grid)
        if schedule.depth != len(site.blocks):
            raise ValueError(f"the schedule has {schedule.depth} layers, but the model has {len(site.blocks)} blocks")
        if tuple(schedule.grid) != tuple(grid):
            raise ValueError(
                f"the schedule is for a grid of {schedule.grid[0]} x {schedule.grid[1]} patches, but the model has"
                f" {grid[0]} x {grid[1]}"
            )
        if not site.pools_class() and schedule.counts[-1] < 2:
            raise ValueError(
                "the schedule leaves no patch to the last layer, but the model does not classify by its class token"
            )
        self.schedule, self.kept, self.patches = schedule, [n - 1 for n in schedule.counts], patches
        self.sorts = next((i for i, n in enumerate(self.kept) if n < patches), None)
        return {} if self.sorts is None else {self.sorts: ("lifespan_order", torch.tensor(schedule.order))}

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        prefix, i = block.patch.prefix, block.index
        if i == 0 and state.patches != self.patches:
            raise ValueError(f"the images give {state.patches} patches, but the schedule is for {self.patches}")
        if i == self.sorts:
            order: Any = block.lifespan_order
            places = torch.cat((torch.arange(prefix, device=order.device), order + prefix))
            x, state.places = x.index_select(1, places), order
        rows = prefix + self.kept[i]
        if rows == x.shape[1]:
            return block.whole(x, rope, None if state.places is None else state.places[: rows - prefix])
        assert state.places is not None
        rope = rope_rows(rope, state.places[: x.shape[1] - prefix])
        x = block.feed(block.attend(x, rows=rows, rope=rope)[0])
        if state.steps is not None:
            rank = state.places.argsort()
            state.note(i, x, rank.masked_fill(rank >= self.kept[i], -1).repeat(len(x), 1))
        return x


class CAIT(Method):
    """Neighbours of the grid merged behind a few blocks, `tokenops.nn.NeighbourMerging`."""

    name, merges, scores = "cait", True, False

    def __init__(self, points: Mapping[int, str] | None = None, kind: str = "average") -> None:
        self.points, self.kind = points, kind

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        refuse_rope(site, "cait", "a merged token has no position")
        site.needs_no_map("cait")
        grid = site.needs_grid("cait")[1]
        self.points = _points(self.points, len(site.blocks))
        merges = {}
        for i, axis in self.points.items():
            merge = NeighbourMerging(site.dim, axis, grid, self.kind, prefix=site.prefix)
            merges[i] = "merge", merge
            grid = merge.merged_grid
        return merges

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        x = block.whole(x, rope)
        merge: Any = getattr(block, "merge", None)
        if merge is None:
            return x
        x = merge(x)
        if state.steps is not None:
            (height, width), (_, columns) = merge.grid, merge.merged_grid
            place = torch.arange(height * width, device=x.device).unflatten(0, (height, width))
            row, column = place // width, place % width
            into = row * columns + column // 2 if merge.axis == "horizontal" else row // 2 * columns + column
            source = into.flatten().repeat(len(x), 1)
            state.source = source if state.source is None else source.gather(1, state.source)
            state.note(block.index, x, state.source)
        return x


def add_to(block: PatchedBlock, name: str, what: Any) -> None:
    """A module, in the state dict from now on, or a tensor, which is not; on the block's device."""
    like = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
    if isinstance(what, nn.Module):
        block.add_module(name, what.to(like.device, like.dtype).train(block.training))
    else:
        block.register_buffer(name, what.to(like.device), persistent=False)
