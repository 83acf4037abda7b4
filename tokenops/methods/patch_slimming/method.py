"""PS-ViT's execution: tokens are put in the order of their lifespan once, so every layer keeps a prefix slice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...patching.blocks import attend, feed, whole
from ...patching.engine import Flow, Method, Record, Role, sources_of
from ...patching.positions import Positions, at
from .schedule import Schedule


class Alive(NamedTuple):
    """What follows slim tokens, where they have positions or somebody asks.

    Attributes:
        places: ``(n,)`` or ``(B, n)`` int64, the patch of each token.
    """

    places: Tensor


@dataclass(frozen=True)
class Slim(Role):
    r"""A block that computes only the rows it keeps, from keys and values of all that came in.

    .. math:: Z' = \mathrm{diag}(m)\,(\mathrm{MSA}(Z) + Z), \qquad Z_{out} = \mathrm{MLP}(Z') + Z'

    Attributes:
        rows: patch tokens that it keeps; None for all. `constant` has all by lifespan, prefix first, where the block
            puts them in this order.
    """

    rows: int | None = None

    @property
    def idle(self) -> bool:
        return self.rows is None

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        x, state = flow
        places = None if state is None else state.places
        follows = positions is not None or record is not None
        x, order = self.ordered(block, x, follows)
        if order is not None and follows:
            places, state = order, Alive(order)
        if self.rows is None:
            return Flow(whole(block, x, positions, places), state)
        kept = None if places is None else places[..., : self.rows]
        x = feed(block, attend(block, x, rows=self.prefix + self.rows, positions=at(positions, places))[0])
        if kept is None:
            return Flow(x, None)
        if record is not None:
            record.note(x, sources_of(kept.expand(x.shape[0], -1), record.patches))
        return Flow(x, Alive(kept))

    def left(self, block: Any, tokens: int, full: int) -> int:
        return tokens if self.rows is None else self.prefix + self.rows

    def ordered(self, block: Any, x: Tensor, follows: bool) -> tuple[Tensor, Tensor | None]:
        """The tokens in the order of their lifespan, where the block puts them there; and, if asked, this order."""
        if self.constant is None:
            return x, None
        if len(self.constant) != x.shape[1]:
            raise ValueError(
                f"a block that puts {len(self.constant)} tokens in order was given {x.shape[1]}: a schedule is set"
                " between forwards, not while one runs"
            )
        rows = block.tokenops_rows(x)
        return x.index_select(1, rows), rows[self.prefix :] - self.prefix if follows else None


def refuse_empty(words: str, site: Any, counts: Sequence[int]) -> None:
    """ValueError where the prefix alone is left and the model takes patches, whose mean would be of nothing."""
    empty = [i for i in site.taken if i >= 0 and counts[i] < 2]
    if empty and not site.pools_class():
        raise ValueError(
            f"{words} no patch to layer {empty[0] + 1}, but the model takes patches from there, not the class token"
            " alone"
        )


class PatchSlimming(Method):
    """The patches a schedule keeps, the same for every image.

    Args:
        schedule: a `Schedule`, or its counts: tokens behind each block, one for the class token included.

    Source: Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022, arXiv 2106.02852), section 3; that
    keys come from all alive rows is the reading [D] consistent with the paper's diag(m) P. The permutation is ours. The
    name PS-ViT is also Progressive Sampling's, another method.
    """

    name, scores, shape, setting = "patch_slimming", False, True, "schedule"
    documents = {"schedule": Schedule}

    def __init__(self, schedule: Schedule | Sequence[int] | None = None) -> None:
        if schedule is None:
            raise TypeError(
                "patch_slimming needs a schedule, which tokenops.methods.patch_slimming.search finds, or the numbers of"
                " tokens behind each block: apply_patch(model, 'patch_slimming', schedule=[197, 197, 140, ...])"
            )
        self.value = schedule

    def roles(self, site: Any) -> list[Role]:
        site.needs_no_map("patch_slimming")
        patches, grid = site.needs_grid("patch_slimming")
        schedule = self.value
        if not isinstance(schedule, Schedule):
            schedule = self.value = Schedule.from_counts(schedule, grid)
        if schedule.depth != site.depth:
            raise ValueError(f"the schedule has {schedule.depth} layers, but the model has {site.depth} blocks")
        if tuple(schedule.grid) != tuple(grid):
            raise ValueError(
                f"the schedule is for a grid of {schedule.grid[0]} x {schedule.grid[1]} patches, but the model has"
                f" {grid[0]} x {grid[1]}: search one for this image size"
            )
        refuse_empty("the schedule leaves", site, schedule.counts)
        roles: list[Role] = []
        before = patches
        for count in schedule.counts:
            rows, constant = count - 1 if count - 1 < before else None, None
            if rows is not None and before == patches:
                constant = (*range(site.prefix), *(site.prefix + i for i in schedule.order))
            roles.append(Slim(site.prefix, False, rows, constant=constant))
            before = count - 1
        return roles
