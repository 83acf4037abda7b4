"""Options that several methods take, one number a block and blocks by number, and a role with such a number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, SupportsIndex

from ..patching.engine import Role


@dataclass(frozen=True)
class PartRole(Role):
    """Of a block from which a part of the patch tokens goes on.

    Attributes:
        share: the part, as two whole numbers: compilers make a variable of a float.
    """

    share: tuple[int, int] = (1, 1)

    @property
    def part(self) -> float:
        return self.share[0] / self.share[1]


def per_block(
    name: str, value: float | Sequence[float], blocks: Iterable[int], depth: int, zero: bool = False
) -> tuple[float, ...]:
    """One number a block: the value in `blocks` and 1 elsewhere, or the sequence itself. 0 counts as one if `zero`."""
    given = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(v, Real) for v in given):
        raise TypeError(f"{name}={value!r}, but it must be a number or one for each of {depth} blocks")
    if not all(0 < v <= 1 or (zero and v == 0) for v in given):
        raise ValueError(f"{name}={value}, but it must be {'at least' if zero else 'above'} 0 and at most 1")
    if not isinstance(value, Iterable):
        chosen = set(blocks)
        return tuple(float(value) if i in chosen else 1.0 for i in range(depth))
    if len(given) != depth:
        raise ValueError(
            f"{name} has {len(given)} values, {given}, but it must be a number or one for each of {depth} blocks"
        )
    return tuple(float(v) for v in given)


def block_indices(name: str, blocks: Sequence[int], first: int, depth: int) -> tuple[int, ...]:
    """The blocks as a tuple, checked: ascending, from `first` to the last of `depth`."""
    found = tuple(blocks) if isinstance(blocks, Iterable) else (blocks,)
    if not isinstance(blocks, Iterable) or not all(isinstance(i, SupportsIndex) for i in found):
        raise TypeError(f"{name}={blocks!r}, but it must be several block numbers, as (1, 2)")
    if any(not first <= i < depth for i in found) or any(a >= b for a, b in zip(found, found[1:])):
        raise ValueError(f"{name}={found}, but it must be ascending block numbers from {first} to {depth - 1}")
    return found


def quarters(depth: int, given: Sequence[int] | None) -> Sequence[int]:
    """The blocks at a quarter, half and three quarters of the depth, if none are given."""
    if given is not None:
        return given
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
