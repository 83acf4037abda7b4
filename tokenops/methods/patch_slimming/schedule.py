"""What is kept where: nested masks per layer, and their JSON file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ...patching.as_json import read_json
from .counts import check_counts

FORMAT = "tokenops.patch_slimming"
VERSION = 1


def centre_order(grid: tuple[int, int]) -> list[int]:
    """Patch positions by their distance from the centre of the image, nearest first: the prior before any search."""
    height, width = grid

    def distance(i: int) -> int:
        return (2 * (i // width) - height + 1) ** 2 + (2 * (i % width) - width + 1) ** 2

    return sorted(range(height * width), key=distance)


@dataclass(frozen=True)
class Schedule:
    r"""Which patches every layer keeps: nested masks :math:`m_1 \supseteq m_2 \ldots \supseteq m_L`, for all images.

    The class token is always kept and not listed. A layer may keep no patch at all: the last one usually does not.

    Args:
        grid: (height, width) of the patches.
        masks: for every layer (from the first) the positions it keeps, 0 to height * width - 1 row by row.

    Attributes:
        counts: tokens per layer, class token included.
        lifespan: for every patch the number of layers that keep it. Nested masks are nothing but this.
        order: the patches by lifespan, longest first, of equal ones the lower position: every mask is a prefix of it.

    Raises:
        TypeError: a position is no int.
        ValueError: a position is out of range or twice in a layer, or a layer keeps what the one before dropped.

    Source: Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022), section 3: nested masks [P].

    >>> schedule = Schedule.from_counts([5, 3, 1], grid=(2, 2), order=[3, 0, 1, 2])
    >>> schedule.masks
    ((0, 1, 2, 3), (0, 3), ())
    """

    grid: tuple[int, int]
    masks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        grid = tuple(self.grid)
        if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
            raise ValueError(f"Schedule: grid must be (height, width), two ints above 0, but got {self.grid!r}")
        patches, before = grid[0] * grid[1], None
        masks = []
        for layer, mask in enumerate(self.masks, 1):
            for position in mask:
                if type(position) is not int:
                    raise TypeError(f"Schedule: positions must be ints, but layer {layer} has {position!r}")
                if not 0 <= position < patches:
                    raise ValueError(
                        f"Schedule: layer {layer} keeps position {position}, but the grid {grid[0]} x {grid[1]} has"
                        f" positions 0 to {patches - 1}"
                    )
            kept = set(mask)
            if len(kept) != len(mask):
                raise ValueError(f"Schedule: layer {layer} has a position twice")
            if before is not None and kept - before:
                raise ValueError(
                    f"Schedule: layer {layer} keeps position {min(kept - before)}, which layer {layer - 1} dropped, but"
                    " masks must be nested"
                )
            masks.append(tuple(sorted(kept)))
            before = kept
        if not masks:
            raise ValueError("Schedule: masks is empty, but there must be one for every layer")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "masks", tuple(masks))

    @property
    def depth(self) -> int:
        return len(self.masks)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(1 + len(mask) for mask in self.masks)

    @property
    def lifespan(self) -> list[int]:
        lifespan = [0] * self.patches
        for layer, mask in enumerate(self.masks, 1):
            for position in mask:
                lifespan[position] = layer
        return lifespan

    @property
    def order(self) -> list[int]:
        lifespan = self.lifespan
        return sorted(range(self.patches), key=lambda i: -lifespan[i])

    @classmethod
    def from_counts(
        cls, counts: Sequence[int], grid: tuple[int, int], order: Sequence[int] | None = None
    ) -> "Schedule":
        """The schedule that keeps, in every layer, the first so many positions of an order.

        Args:
            counts: tokens per layer, class token included; they never grow.
            grid: (height, width) of the patches.
            order: all positions, the most important first. None takes `centre_order`: a placeholder for a search.

        Raises:
            TypeError: a count is no int.
            ValueError: a count is out of range or grows, or ``order`` is no permutation of the positions.
        """
        patches = grid[0] * grid[1]
        order = centre_order(grid) if order is None else [int(i) for i in order]
        if sorted(order) != list(range(patches)):
            raise ValueError(f"order must have each of the positions 0 to {patches - 1} once, but got {order}")
        return cls(grid, tuple(tuple(order[: n - 1]) for n in check_counts(counts, patches)))

    @classmethod
    def from_lifespan(cls, lifespan: Sequence[int], depth: int, grid: tuple[int, int]) -> "Schedule":
        """The schedule in which patch i is kept by the first ``lifespan[i]`` of ``depth`` layers."""
        patches = grid[0] * grid[1]
        if len(lifespan) != patches or not all(0 <= span <= depth for span in lifespan):
            raise ValueError(
                f"lifespan must be {patches} numbers of layers, 0 to {depth}, but got {len(lifespan)} from"
                f" {min(lifespan, default=0)} to {max(lifespan, default=0)}"
            )
        return cls(grid, tuple(tuple(i for i in range(patches) if lifespan[i] > layer) for layer in range(depth)))

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": VERSION, "grid": list(self.grid), "layers": self.depth}
        rows = ",\n".join(f"    {json.dumps(mask)}" for mask in self.masks)
        return f'{json.dumps(head)[:-1]}, "kept": [\n{rows}\n]}}\n'

    def save(self, path: str | PathLike[str]) -> None:
        """Write the JSON file that :meth:`load` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Read what :meth:`to_json` wrote. ValueError says what is wrong with anything else."""
        found = read_json(text, "Patch Slimming schedule", FORMAT, VERSION)
        grid, kept, layers = (found.get(key) for key in ("grid", "kept", "layers"))
        if not isinstance(grid, list) or len(grid) != 2:
            raise ValueError(f"the schedule's grid must be [height, width], but is {grid!r}")
        if not isinstance(kept, list) or not all(isinstance(mask, list) for mask in kept):
            raise ValueError("the schedule's kept must be a list of positions for every layer")
        if layers != len(kept):
            raise ValueError(f"the schedule says it has {layers!r} layers, but keeps positions for {len(kept)}")
        try:
            return cls((grid[0], grid[1]), tuple(tuple(mask) for mask in kept))
        except TypeError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Schedule":
        """Read a file of :meth:`save`: FileNotFoundError without one, ValueError for anything but a valid schedule."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
