"""torch.vmap of our kernels: images of all samples in one call; one call a sample where these do not share all else."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: tensors that images share: a sample's own, or its own gradient, takes a call of its own
SHARED = {
    "soft_aggregate": ("scale",),
    "token_mlp": ("w1", "b1", "w2", "b2"),
    "masked_channel_attention": ("qk_mask", "v_mask"),
    "select_tokens": ("weight", "bias"),
    "merge_neighbours": ("first", "second", "weight", "bias"),
    "merge_bipartite": ("weight", "bias"),
}
#: boundaries of sequences within the one image: where they are given every sample takes a call of its own
BOUNDARIES = ("cu_q", "cu_k", "cu_seqlens")
#: operators without images: a call a sample
WITHOUT_IMAGES = frozenset({"sum_rows", "match_packed"})


def rule(name: str, backend: str, kernel: Any) -> Callable[..., tuple[Any, Any]]:
    """What torch.library.register_vmap takes for the kernel `name` of a backend."""
    operator, _, direction = name.rpartition("_")
    shared = [argument.name in (*SHARED.get(operator, ()), *BOUNDARIES) for argument in kernel._schema.arguments]
    bounds = [argument.name in BOUNDARIES for argument in kernel._schema.arguments]
    places = [_image_dim(argument.name, backend) for argument in kernel._schema.arguments]
    of_results = [_image_dim(result.name, backend) for result in kernel._schema.returns]

    def call(info, dims, *arguments):
        samples, given = info.batch_size, list(zip(shared, dims, arguments))
        alone = (own and isinstance(a, Tensor) and (direction == "bwd" or d is not None) for own, d, a in given)
        packed = any(bound and isinstance(a, Tensor) for bound, a in zip(bounds, arguments))
        if operator in WITHOUT_IMAGES or packed or any(alone):
            calls = [kernel(*(_map(_sample, a, d, s) for a, d in zip(arguments, dims))) for s in range(samples)]
            return tree_map(lambda *of_each: _stack(of_each), *calls), 0
        folded = (a if own else _map(_fold, a, d, place, samples) for (own, d, a), place in zip(given, places))
        made = kernel(*folded)
        if isinstance(made, Tensor):
            return _unfold(made, None, of_results[0], samples), 0
        return tuple(_map(_unfold, t, None, place, samples) for t, place in zip(made, of_results)), 0

    return call


def _image_dim(name: str, backend: str) -> int:
    return 1 if name == "statistics" or (name == "saved" and backend == "triton") else 0


def _map(function: Callable[..., Any], value: Any, dims: Any, *others: Any) -> Any:
    """Of a tensor, or of each of a list; anything else is as it is."""
    if isinstance(value, (list, tuple)):
        return [_map(function, t, d, *others) for t, d in zip(value, dims or [None] * len(value))]
    return function(value, dims, *others) if isinstance(value, Tensor) else value


def _sample(tensor: Tensor, dim: int | None, sample: int) -> Tensor:
    return tensor if dim is None else _without_gaps(tensor.select(dim, sample))


def _stack(of_each: Sequence[Tensor]) -> Tensor:
    """The samples in front, each in the order that a kernel leaves in memory."""
    order = sorted(range(of_each[0].dim()), key=of_each[0].stride, reverse=True)
    together = torch.stack([t.permute(order) for t in of_each])
    return together.permute(0, *(1 + order.index(dim) for dim in range(len(order))))


def _fold(tensor: Tensor, dim: int | None, place: int, samples: int) -> Tensor:
    """The samples' images as one batch."""
    if dim is None:
        tensor = tensor.unsqueeze(place).expand(*tensor.shape[:place], samples, *tensor.shape[place:])
    else:
        tensor = tensor.movedim(dim, place)
    return _without_gaps(tensor.flatten(place, place + 1))


def _without_gaps(tensor: Tensor) -> Tensor:
    """As kernels leave in memory what they save for the gradient, in the order it has."""
    return tensor if tensor.is_contiguous() else tensor.clone()


def _unfold(tensor: Tensor, _: None, place: int, samples: int) -> Tensor:
    """The samples in front; each has the same nothing where a kernel gives no such result."""
    if tensor.dim() == 1:
        return tensor.expand(samples, -1)
    return tensor.unflatten(place, (samples, tensor.shape[place] // max(samples, 1))).movedim(place, 0)
