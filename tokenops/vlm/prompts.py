"""Prompts with fewer places for image tokens; needs nothing of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.packed import kept_counts

#: what stands in padding, where it is not 0
_PADDING = {"labels": -100}
#: entries of images, whose shapes say nothing of the prompt
_OF_IMAGES = ("pixel_", "image_", "video_")


def placeholder_counts(grid_thw: Sequence[Sequence[int]] | Tensor, keep_rate: float, merge: int = 2) -> list[int]:
    """How many placeholders each image has behind `compress`, told before its tower runs: for who sizes prompts.

    It is `tokenops.kept_counts` of the tokens of an image, :math:`t h w / \\mathrm{merge}^2`.

    Args:
        grid_thw: ``(S, 3)`` integers, frames, rows and columns of patches of each image, as processors of Qwen's models
            give them (``image_grid_thw``). A tensor on a GPU is waited for.
        keep_rate: above 0 and at most 1.
        merge: rows and columns of the square of patches that becomes one token (``spatial_merge_size``).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a rate is out of range, a grid is none or no multiple of ``merge``.

    >>> placeholder_counts([[1, 16, 24], [1, 8, 8]], 0.3)
    [29, 5]
    """
    op = "placeholder_counts"
    if isinstance(merge, bool) or not isinstance(merge, int):
        raise TypeError(f"{op}: merge must be an int, but got {merge!r}")
    if merge < 1:
        raise ValueError(f"{op}: merge={merge}, but it must be 1 or more")
    grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else list(grid_thw)
    tokens = []
    for i, grid in enumerate(grids):
        sides = list(grid) if isinstance(grid, Sequence) else [grid]
        if len(sides) != 3 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
            raise TypeError(f"{op}: grid_thw[{i}] must be three ints, frames, rows and columns, but got {grid!r}")
        frames, rows, columns = sides
        if min(sides) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"{op}: grid_thw[{i}]={sides}, but frames must be 1 or more, rows and columns multiples of {merge}"
            )
        tokens.append(frames * (rows // merge) * (columns // merge))
    return kept_counts(tokens, keep_rate)


def shorten(
    inputs: Mapping[str, Any], kept: Tensor, *, token_id: int, position_ids: Tensor | None, pad_token_id: int = 0
) -> dict[str, Any]:
    """Prompts without the places of image tokens that are left out; every other token keeps its position.

    Of every row of the batch the tokens that count (those the attention mask does not leave out) and the kept places
    are put together again, with padding on the left, as ``generate`` wants it, up to the longest.

    Args:
        inputs: ``input_ids`` ``(B, N)``, and what follows its tokens: ``attention_mask``, ``token_type_ids``,
            ``mm_token_type_ids``, ``labels`` and any other tensor ``(B, N)``. Others stay as they are, and so do those
            of images (names with ``pixel_``, ``image_``, ``video_``).
        kept: which places are kept, counted through the whole batch in the order they come: their numbers, ``(K,)``
            int64 in any order, -1 for none (``index`` of `tokenops.select_tokens` of packed images); or ``(T,)`` bool,
            one for every place.
        token_id: the id of a place (``config.image_token_id``).
        position_ids: ``(B, N)`` or, for positions of several axes, ``(A, B, N)``: of the whole prompts. None for those
            of text: the number of a token among those that count.
        pad_token_id: what ``input_ids`` has in padding. ``labels`` have -100 there, all else 0.

    Returns:
        A new dict with ``attention_mask`` and ``position_ids``, whether or not they were given: without the first,
        positions with gaps are taken for those of several sequences by some models.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit together; a place does not exist or is there twice; padding is a place.

    >>> given = {"input_ids": torch.tensor([[1, 9, 9, 9, 2]])}
    >>> short = shorten(given, torch.tensor([1]), token_id=9, position_ids=None)
    >>> short["input_ids"].tolist(), short["position_ids"].tolist()
    ([[1, 9, 2]], [[0, 2, 4]])
    """
    op = "shorten"
    ids = inputs.get("input_ids")
    B, N = checks.tensor(op, "input_ids", ids, "B,N", floating=False)
    assert isinstance(ids, Tensor)
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if tuple(checks.tensor(op, "attention_mask", mask, "B,N", like=ids, floating=False)) != (B, N):
        raise ValueError(f"{op}: attention_mask has shape {tuple(mask.shape)}, but input_ids {B, N}")
    if pad_token_id == token_id:
        raise ValueError(f"{op}: pad_token_id={pad_token_id}, but that is the id of a place for an image token")
    if position_ids is None:
        position_ids = text_positions(mask)
    elif not _fits(position_ids, B, N):
        what = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise ValueError(f"{op}: position_ids must have shape ({B}, {N}) or (A, {B}, {N}), but got {what}")
    places = ids == token_id
    stays = (mask != 0) & ~places
    stays[places] = _flags(op, kept, int(places.sum()), ids.device)

    longest = int(stays.sum(1).max()) if B else 0
    order = stays.int().argsort(dim=1, stable=True)[:, N - longest :]  # what stays is last, in its order
    there = stays.gather(1, order)

    def taken(name: str, values: Tensor) -> Tensor:
        padding = pad_token_id if name == "input_ids" else _PADDING.get(name, 0)
        shape = (*values.shape[:-2], B)
        found = values.expand(*shape, N).gather(-1, order.expand(*shape, longest))
        return found.masked_fill(~there, padding)

    short = dict(inputs)
    for name, value in {**inputs, "attention_mask": mask, "position_ids": position_ids}.items():
        follows = isinstance(value, Tensor) and value.shape == (B, N) and not name.startswith(_OF_IMAGES)
        if follows or name == "position_ids":
            short[name] = taken(name, value)
    return short


def text_positions(mask: Tensor) -> Tensor:
    """The number of each token among those that count; 0 in padding."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def _fits(positions: Any, B: int, N: int) -> bool:
    return (
        isinstance(positions, Tensor)
        and positions.dim() in (2, 3)
        and positions.shape[-1] == N
        and positions.shape[-2] in (1, B)
    )


def _flags(op: str, kept: Any, places: int, device: torch.device) -> Tensor:
    """Whether each place is kept."""
    (given,) = checks.tensor(op, "kept", kept, "K", floating=False)
    if kept.dtype == torch.bool:
        if given != places:
            raise ValueError(f"{op}: kept has {given} flags, but input_ids has {places} places for image tokens")
        return kept.to(device)
    if kept.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: kept must be int64, int32 or bool, but got {kept.dtype}")
    numbers = kept[kept >= 0].to(device=device, dtype=torch.int64)
    if len(numbers) and int(numbers.max()) >= places:
        raise ValueError(f"{op}: kept has {int(numbers.max())}, but input_ids has {places} places for image tokens")
    flags = torch.zeros(places, dtype=torch.bool, device=device).index_fill_(0, numbers, True)
    if int(flags.sum()) != len(numbers):
        raise ValueError(f"{op}: kept names a place twice")
    return flags
