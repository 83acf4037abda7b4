"""The methods that choose, merge or fuse tokens within a block: ToMe, EViT, Evo-ViT."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..merge_bipartite import merge_bipartite, unmerge_bipartite
from ..methods.evit import block_indices, per_block
from ..restore_tokens import restore_tokens
from ..select_tokens import select_tokens
from .block import Patch, PatchedBlock, State
from .families import rope_rows
from .trace import sources_of


class Method:
    """What is done to the tokens of a model.

    Attributes:
        name: as `apply_patch` takes it.
        merges: whether every patch stays within some token, so that tokens can be brought back to the grid.
        scores: whether attention gives more than its result, which heads wider than the operator's cannot.
        setting: the option that is an attribute of the model, to be set at any time; None without one.
    """

    name: str
    merges = False
    scores = True
    setting: str | None = None
    #: its first value
    value: Any = None

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        """Fit the options to a model; what is to be added to its blocks, by number: a name, and a module or buffer.

        Raises:
            ValueError: an option does not fit, or the method is not defined for the model.
        """
        raise NotImplementedError

    def plan(self, patch: Patch) -> Any:
        """What each block does, from the model's setting as it is now."""
        return None

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        """A block with the method in it."""
        raise NotImplementedError

    def finish(self, block: PatchedBlock, x: Tensor, state: State) -> Tensor:
        """What the last block does beside."""
        return x


def refuse_rope(site: Any, name: str, why: str) -> None:
    if site.rope:
        raise ValueError(f"{name}: the model has rotary positions, but {why}")


class ToMe(Method):
    """Token merging in every block, between attention and MLP, as `tokenops.apply_patch` describes it."""

    name, merges, setting = "tome", True, "r"

    def __init__(self, r: Any = 0, prop_attn: bool = True, unmerge: bool | None = None) -> None:
        self.value, self.prop_attn, self.unmerge = r, prop_attn, unmerge

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        refuse_rope(site, "tome", "a merged token has no position")
        if site.maps_patches() and self.unmerge is False:
            raise ValueError("tome: unmerge=False, but the model makes an image of all its patch tokens")
        merged_per_block(self.value, len(site.blocks))
        return {}

    def plan(self, patch: Patch) -> tuple[int, ...]:
        return merged_per_block(patch.model.r, len(patch.blocks))

    def unmerges(self, patch: Patch) -> bool:
        """Whether the last block gives a token for every patch again."""
        return not patch.pools_class() if self.unmerge is None else self.unmerge

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        prefix = block.patch.prefix
        r = min(state.plan[block.index], (x.shape[1] - prefix) // 2)
        bias = state.log_sizes if self.prop_attn else None
        x, _, keys = block.attend(x, key_bias=bias, key_mean=r > 0)
        if keys is None:
            return block.feed(x)
        merged = merge_bipartite(x, keys, r, prefix=prefix, sizes=state.sizes, norm=block.norm("norm2"))
        state.sizes, state.log_sizes = merged.sizes, merged.log_sizes
        if state.steps is not None or self.unmerges(block.patch):
            state.source = merged.index if state.source is None else merged.index.gather(1, state.source)
            state.note(block.index, merged.tokens, state.source)
        return block.feed(merged.tokens, merged.normed)

    def finish(self, block: PatchedBlock, x: Tensor, state: State) -> Tensor:
        if state.source is None or not self.unmerges(block.patch):
            return x
        return unmerge_bipartite(x, state.source, prefix=block.patch.prefix)


def merged_per_block(r: Any, depth: int) -> tuple[int, ...]:
    """How many tokens each block merges, from a number, ``(r, inflect)`` or one number a block.

    >>> merged_per_block(8, 3), merged_per_block((8, -1), 3), merged_per_block((8, 0.5), 3)
    ((8, 8, 8), (16, 8, 0), (4, 8, 12))
    """
    if isinstance(r, tuple) and len(r) == 2:
        mean, inflect = r
        if not _is_number(mean) or not _is_number(inflect) or not -1 <= inflect <= 1 or mean < 0:
            raise ValueError(f"r={r!r}, but of (r, inflect) r must be at least 0 and inflect between -1 and 1")
        first = int(mean * (1 - inflect))
        slope = 2 * (mean - first) / max(depth - 1, 1)
        return tuple(int(first + slope * i) for i in range(depth)) if depth > 1 else (int(mean),)
    given = (r,) * depth if _is_number(r) else tuple(r) if isinstance(r, (list, tuple)) else ()
    if len(given) != depth or not all(_is_number(value) and value >= 0 for value in given):
        raise ValueError(
            f"r={r!r}, but it must be a number of at least 0, (r, inflect), or a list of one number for each of"
            f" {depth} blocks"
        )
    return tuple(int(value) for value in given)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class EViT(Method):
    """Tokens the class token looks at stay, the others become one, as in `tokenops.methods.EViT`."""

    name, setting = "evit", "keep_rate"

    def __init__(
        self,
        keep_rate: float | Sequence[float] = 0.7,
        reduction_loc: Sequence[int] | None = None,
        fuse_token: bool = True,
    ) -> None:
        self.value, self.reduction_loc, self.fuse_token = keep_rate, reduction_loc, fuse_token

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        if self.fuse_token:
            refuse_rope(site, "evit", "a fused token has no position: pass fuse_token=False")
        site.needs_no_map("evit")
        depth = len(site.blocks)
        self.reduction_loc = block_indices("reduction_loc", quarters(depth, self.reduction_loc), 0, depth)
        per_block("keep_rate", self.value, self.reduction_loc, depth)
        return {}

    def plan(self, patch: Patch) -> tuple[float, ...]:
        depth = len(patch.blocks)
        keep_rate = patch.model.keep_rate
        if not isinstance(keep_rate, (int, float)):
            keep_rate = tuple(keep_rate)[:depth]
        return per_block("keep_rate", keep_rate, self.reduction_loc or (), depth)

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        prefix = block.patch.prefix
        N = x.shape[1] - prefix
        k = math.ceil(state.plan[block.index] * N)
        if k >= N:
            return block.whole(x, rope, state.places)
        kind = "class" if block.patch.has_class else "received"
        x, looked_at, _ = block.attend(x, scores=kind, rope=rope_rows(rope, state.places))
        assert looked_at is not None
        followed = state.steps is not None or rope is not None
        if followed and state.places is None:
            state.places = torch.arange(N, device=x.device).repeat(len(x), 1)
        chosen = select_tokens(
            x,
            looked_at[:, prefix:],
            k,
            prefix=prefix,
            rest="weighted" if self.fuse_token else "none",
            normalize=False,
            order="index",
            companions=() if state.places is None else (state.places,),
            norm=block.norm("norm2"),
        )
        if state.places is not None:
            places = chosen.companions[0]
            if self.fuse_token:
                places = torch.nn.functional.pad(places, (0, 1), value=-1)
            state.places = places
            state.note(block.index, chosen.tokens, sources_of(places, state.patches))
        return block.feed(chosen.tokens, chosen.normed)


def quarters(depth: int, given: Sequence[int] | None) -> Sequence[int]:
    """The blocks at a quarter, half and three quarters of the depth, if none are given."""
    if given is not None:
        return tuple(given)
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


class EvoViT(Method):
    """Tokens the class token looks at pass through a stage, the others wait, as in `tokenops.methods.EvoViT`."""

    name = "evo_vit"

    def __init__(
        self,
        prune_ratio: float | Sequence[float] = 0.5,
        tradeoff: float | Sequence[float] = 0.5,
        stages: Sequence[int] | None = None,
    ) -> None:
        self.prune_ratio, self.tradeoff, self.stages = prune_ratio, tradeoff, stages

    def fit(self, site: Any) -> dict[int, tuple[str, Any]]:
        depth = len(site.blocks)
        stages = tuple(sorted({depth // 3, 2 * depth // 3} - {0})) if self.stages is None else self.stages
        stages = block_indices("stages", stages, 1, depth)
        pruned = range(stages[0] if stages else depth, depth)
        self.ratios = per_block("prune_ratio", self.prune_ratio, pruned, depth)
        self.alphas = (1.0, *per_block("tradeoff", self.tradeoff, pruned, depth, zero=True)[1:])
        if any(ratio != 1 for ratio in self.ratios[: pruned.start]):
            raise ValueError(f"prune_ratio={self.ratios}, but it must be 1 before block {pruned.start}")
        if site.patches is not None and int(min(self.ratios) * site.patches) < 1:
            raise ValueError(
                f"prune_ratio={self.prune_ratio} keeps none of {site.patches} tokens, but it must keep at least one"
            )
        self.starts = (0, *stages)
        return {}

    def plan(self, patch: Patch) -> list[tuple[bool, bool, bool]]:
        """Of each block, whether a stage of chosen tokens begins or ends there, and whether scores are computed."""
        depth = len(patch.blocks)
        starts = [first for first in self.starts if first < depth]
        plan = []
        for j, (first, end) in enumerate(zip(starts, [*starts[1:], depth])):
            chosen = self.ratios[first] < 1
            wanted = any(self.ratios[later] < 1 for later in starts[j + 1 :])
            for i in range(first, end):
                overwritten = 1.0 in self.alphas[i + 1 : end]
                needed = wanted and self.alphas[i] > 0 and not overwritten
                plan.append((chosen and i == first, chosen and i == end - 1, needed))
        return plan

    def run(self, block: PatchedBlock, x: Tensor, state: State, rope: Tensor | None) -> Tensor:
        prefix, i = block.patch.prefix, block.index
        begins, ends, needed = state.plan[i]
        wanted = any(begun for begun, _, _ in state.plan[i + 1 :])  # whether the scores are used again
        normed = None
        if begins:
            assert state.scores is not None
            chosen = select_tokens(
                x,
                state.scores,
                int(self.ratios[i] * (x.shape[1] - prefix)),
                prefix=prefix,
                order="index",
                companions=(state.scores,) if wanted else (),
                norm=block.norm("norm1"),
            )
            state.aside = x, state.scores if wanted else None, chosen.index
            x, normed, state.places = chosen.tokens, chosen.normed, chosen.index
            state.scores = chosen.companions[0] if wanted else None
            state.note(i, x, None if state.steps is None else sources_of(chosen.index, state.patches))
        kind = ("class" if block.patch.has_class else "received") if needed else None
        x, looked_at, _ = block.attend(x, normed, scores=kind, rope=rope_rows(rope, state.places))
        if looked_at is not None:
            new, alpha = looked_at[:, prefix:].detach(), self.alphas[i]  # scores are only sorted
            state.scores = new if alpha == 1 or state.scores is None else torch.lerp(state.scores, new, alpha)
        x = block.feed(x)
        if ends and state.aside is not None:
            base, scores, index = state.aside
            if scores is not None and state.scores is not None:
                x, (state.scores,) = restore_tokens(base, x, index, prefix=prefix, companions=((scores, state.scores),))
            else:
                x = restore_tokens(base, x, index, prefix=prefix)
            state.aside = state.places = None
        return x
