"""Tokens per layer: what they may be, and some that cost what was published."""

import math
from collections.abc import Iterable


def check_counts(counts: Iterable[int], patches: int, name: str = "counts") -> tuple[int, ...]:
    """Tokens per layer, class token included: ints from 1 to 1 + patches that never grow."""
    if not isinstance(counts, Iterable):
        raise TypeError(f"{name} must be ints, one for every layer, but got {counts!r}")
    counts = tuple(counts)
    if not counts:
        raise ValueError(f"{name} is empty, but there must be a number of tokens for every layer")
    before = 1 + patches
    for layer, n in enumerate(counts, 1):
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} must be ints, but layer {layer} has {n!r}")
        if not 1 <= n <= before:
            raise ValueError(
                f"{name} gives layer {layer} {n} tokens, but 1 (the class token) to {before} (what the layer before"
                " has) are allowed"
            )
        before = n
    return counts


def counts_for(counts: Iterable[int], patches: int, depth: int) -> tuple[int, ...]:
    """Tokens per layer, checked, one number for each block."""
    found = check_counts(counts, patches)
    if len(found) != depth:
        raise ValueError(f"counts has {len(found)} layers, but the model has {depth} blocks")
    return found


def uniform_pyramid(depth: int, patches: int, keep: float, *, start: int = 0, step: int = 16) -> tuple[int, ...]:
    r"""Tokens per layer where each layer keeps the same part of the one before, and the last the class token only.

    .. math:: n_l = (1 + N)\, keep^{\max(0,\, l - start)}, \qquad n_L = 1

    rounded to a multiple of ``step``: multiples of 16 fill the tiles of matrix units. The form is ours.

    Args:
        depth: L.
        patches: N.
        keep: above 0, at most 1.
        start: so many first layers keep everything.
        step: what the counts are multiples of, where they are not ``1 + N`` or 1.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}, but it must be above 0 and at most 1")
    if not 0 <= start < depth:
        raise ValueError(f"start={start}, but it must be 0 to {depth - 1}: there are {depth} layers")
    if step < 1:
        raise ValueError(f"step={step}, but it must be at least 1")
    full = 1 + patches
    ideal = (full * keep ** max(0, layer - start) for layer in range(1, depth))
    counts = [full if n == full else max(1, min(full, step * math.floor(n / step + 0.5))) for n in ideal]
    return (*counts, 1)


#: Tokens per layer at 224 pixels that cost, within 2 %, the published GMACs of the paper's table (counted with
#: torch.utils.flop_counter, two FLOPs a MAC). The published masks were not released: only the totals are the paper's,
#: the counts are ours. LV-ViT-S is published as 4.7 and 4.5 of 6.6 GMACs (0.71, 0.68); our dense lvvit_small, without
#: the extras of token labelling, counts 5.53, so that these are 0.85 and 0.81 of it: the cost is matched, not the
#: ratio. For DeiT-B the counts are DeiT-S's.
published_counts: dict[str, tuple[int, ...]] = {
    "ps_deit_tiny": uniform_pyramid(12, 196, 0.915),
    "ps_deit_small": uniform_pyramid(12, 196, 0.915),
    "ps_deit_base": uniform_pyramid(12, 196, 0.915),
    "ps_lvvit_small": uniform_pyramid(16, 196, 0.985),
    "dps_deit_tiny": uniform_pyramid(12, 196, 0.815, start=2),
    "dps_deit_small": uniform_pyramid(12, 196, 0.84, start=2),
    "dps_lvvit_small": uniform_pyramid(16, 196, 0.97, start=2),
}


def published_for(name: str, depth: int, patches: int) -> list[int]:
    """Published numbers of tokens, stretched to a model of another depth or grid.

    >>> published_for("dps_deit_small", 6, 64)
    [65, 53, 37, 27, 22, 16]
    """
    published = published_counts[name]
    of_layer = [published[i * len(published) // depth] for i in range(depth)]
    return [1 + round((n - 1) * patches / 196) for n in of_layer]
