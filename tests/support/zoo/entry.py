"""What an entry of the list is: an architecture, small and with random weights, and what it is given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: images of a batch; each is also run alone
BATCH = 2
SIDE, PATCH = 32, 8


#: why no method can be defined for an architecture
STAGES = "its stages halve the grid of tokens: what one has dropped or merged, the next one would pool"
GRID = "its layers are convolutions or windows of the grid, which takes a token in every place"
FIXED = "its layers mix tokens by weights of their places, as many as there are places"
STREAMS = "it has two sequences of tokens, which belong to each other"
PACKED = "it takes the patches of all images in one sequence, without a batch"
FRAMES = "its blocks hand messages from frame to frame"
JOINT = "its blocks take one sequence of patches and something else"


class Entry(NamedTuple):
    """An architecture of a library.

    Attributes:
        library: the name of its package.
        architecture: timm's name of a model, or a class; what is special about it may follow after a comma.
        make: builds it, small.
        inputs: what it is given, batch first.
        blocks: how many it has; ``patches`` so many patch tokens for an image.
        results: the names of those results that belong to the images one by one; empty for all.
        bare: whether it is made without storage, as only the refusal is of interest: it has no small form.
        note: why no method can be defined for it, where that is so.
        fit: makes the inputs fit the model as it is now, for language models that take as many tokens as are left.
    """

    library: str
    architecture: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    blocks: int = 3
    patches: int = 16
    results: tuple[str, ...] = ()
    bare: bool = False
    note: str = ""
    fit: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))


def images(name: str = "x", channels: int = 3, side: int = SIDE) -> dict[str, Tensor]:
    return {name: drawn(channels, side, side)}


def words(length: int = 4, vocabulary: int = 60) -> dict[str, Tensor]:
    """Texts, none of which has a token of special meaning."""
    ids = torch.randint(10, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def results_of(out: Any, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of real numbers in what a model returns, by where they are."""
    found: dict[str, Tensor] = {}
    items: Any
    if isinstance(out, Tensor):
        return {"": out} if out.is_floating_point() and out.dim() else {}
    if hasattr(out, "items"):
        items = [(name, value) for name, value in out.items() if not names or name in names]
    elif isinstance(out, (list, tuple)):
        items = [(str(i), value) for i, value in enumerate(out)]
    else:
        return {}
    for name, value in items:
        found.update({f"{name}.{inner}".strip("."): tensor for inner, tensor in results_of(value).items()})
    return found
