"""Towers whose images lie one behind the other in one sequence of tokens: what their parts become in a patched model.

Such a tower makes one token of every unit of rows (2 x 2 patches, which lie one behind the other) at its end, so whole
units stay or go, in the order they had.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dressing import dress
from .engine import Flow, tokens_of
from .modules import unwrapped

#: an argument of a patched tower, how many units there are: all have a row in its result, zeros where they are left out
_SPREAD = "tokenops_spread"


class Left(NamedTuple):
    """What follows the tokens of a packed tower.

    Attributes:
        units: ``(U,)`` int64, ascending: which of the units that came into the first block are left.
    """

    units: Tensor


class Merged:
    """What a merger makes of units, and which these are.

    Attributes:
        tokens: ``(U, C)``.
        index: ``(U,)``, as `Left.units`, in the order of ``tokens``.
    """

    def __init__(self, tokens: Tensor, index: Tensor) -> None:
        self.tokens, self.index = tokens, index

    def __getitem__(self, key: Any) -> "Merged":
        """Put in the order that a tower gives: for each unit of the image its place among those of the windows."""
        places = key[0]
        numbers = places.argsort()[self.index]
        order = numbers.argsort()
        return Merged(self.tokens[order], numbers[order])


class PatchedMerger:
    """What makes one token of every unit, behind a patched block."""

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Flow):
            return super().forward(x)  # type: ignore[misc]
        return Merged(super().forward(x.tokens), x.state.units)  # type: ignore[misc]


class PatchedTower:
    """A packed tower. Its result has those units that are left."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's own result, of whole units that are left; ``kept`` of it are their numbers among all ``(K,)``.

        ``pooler_output`` has them in their order; ``last_hidden_state`` and ``hidden_states`` in that of the blocks.

        Raises:
            ValueError: attention weights are asked for.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions was given to a patched model, which has none of all tokens")
        total = kwargs.pop(_SPREAD, None)
        whole = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))  # type: ignore[attr-defined]
        out = super().forward(*args, **kwargs, return_dict=True)  # type: ignore[misc]
        last, merged = out.last_hidden_state, out.pooler_output
        if isinstance(last, Flow):
            out.last_hidden_state, out.pooler_output, out.kept = last.tokens, merged.tokens, merged.index
            if getattr(out, "deepstack_features", None):
                out.deepstack_features = [_those(feature, last.state.units) for feature in out.deepstack_features]
            if total is not None:
                _change(out, lambda tokens: tokens.new_zeros(total, tokens.shape[1]).index_copy(0, out.kept, tokens))
        else:
            out.kept = torch.arange(merged.shape[0], device=merged.device)
        if getattr(out, "hidden_states", None):
            out.hidden_states = tuple(map(tokens_of, out.hidden_states))
        return out if whole else out.to_tuple()


def _those(feature: Any, units: Tensor) -> Tensor:
    """Merged units of an earlier block, of which later ones may have left out some, those with some numbers."""
    if isinstance(feature, Merged):
        return feature.tokens.index_select(0, torch.searchsorted(feature.index, units))
    return feature.index_select(0, units)


def _change(out: Any, change: Callable[[Any], Any]) -> None:
    """Another value of everything in a result that has one row a merged unit."""
    out.pooler_output = change(out.pooler_output)
    if getattr(out, "deepstack_features", None):
        out.deepstack_features = [change(feature) for feature in out.deepstack_features]


class PatchedSpeaker:
    """The model around a packed tower, which takes the features of each image apart by its grid."""

    def get_image_features(self, pixel_values: Any, image_grid_thw: Any = None, **kwargs: Any) -> Any:
        """The model's own, of the units that are left of each image; ``kept`` are their numbers among all ``(K,)``."""
        run: Callable[..., Any] = super().get_image_features  # type: ignore[misc]
        return _apart(self, run, pixel_values, image_grid_thw, kwargs)

    def get_video_features(self, pixel_values_videos: Any, video_grid_thw: Any = None, **kwargs: Any) -> Any:
        """As `get_image_features`."""
        run: Callable[..., Any] = super().get_video_features  # type: ignore[misc]
        return _apart(self, run, pixel_values_videos, video_grid_thw, kwargs)


def _apart(model: Any, run: Callable[..., Any], pixels: Any, grid: Any, kwargs: dict[str, Any]) -> Any:
    """What a model makes of images of which all units have a row, those that are left of each."""
    if _SPREAD in kwargs:  # of a video, whose features are those of an image
        return run(pixels, grid, **kwargs)
    whole = kwargs.pop("return_dict", getattr(model.config, "return_dict", True))
    grids, unit = grid.tolist(), model.visual.spatial_merge_size**2
    ends = list(accumulate(frames * rows * columns // unit for frames, rows, columns in grids))
    out = run(pixels, grid, return_dict=True, **{_SPREAD: ends[-1]}, **kwargs)
    images = out.kept.split(units_left(model.visual, grids))
    rows = [image - begin for image, begin in zip(images, [0, *ends])]
    _change(out, lambda images: tuple(image.index_select(0, row) for image, row in zip(images, rows)))
    return out if whole is not False else out.to_tuple()


def units_left(owner: Any, grids: Sequence[Sequence[int]]) -> list[int]:
    """How many units a tower leaves of images with grids of (frames, rows, columns): every frame keeps its share."""
    counts = []
    for frames, rows, columns in grids:
        full = tokens = rows * columns
        for block in map(unwrapped, owner.blocks):
            tokens = block.tokenops_role.left(block, tokens, full) if hasattr(block, "tokenops_role") else tokens
        counts.append(frames * tokens // owner.spatial_merge_size**2)
    return counts


def dress_parts(site: Any) -> None:
    """Have the mergers of a tower take what patched blocks give, and the model around it what the tower gives."""
    for merger in (site.owner.merger, *getattr(site.owner, "deepstack_merger_list", ())):
        dress(unwrapped(merger), (PatchedMerger,))
    if site.speaker not in (None, site.model):
        dress(site.speaker, (PatchedSpeaker,))


def refuse_packed(site: Any, method: Any) -> None:
    """ValueError where a method is not defined for packed towers."""
    if not method.packs:
        raise ValueError(
            f"{method.name} is not defined for a {type(site.owner).__name__}, which packs its images in one sequence"
            " and makes one token of every 2 x 2 patches: use 'evit' with fuse_token=False, which keeps whole ones"
        )
