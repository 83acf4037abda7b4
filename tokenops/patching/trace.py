"""Where the patches of an image went: what a patched model did to its tokens, block by block."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What a block did to the tokens. Either the sources or the weights are None.

    Attributes:
        block: which, from 0.
        tokens: how many are left behind it, prefix included.
        sources: ``(B, N0)`` int64: the token behind the prefix that each of the N0 patches of the image is in, -1 for a
            patch that was dropped, fused away or passed by.
        weights: ``(B, M, N0)``: how much token m draws on each patch, 1 in sum.
    """

    block: int
    tokens: int
    sources: Tensor | None
    weights: Tensor | None = None


class Trace(NamedTuple):
    """What a patched model did to the tokens of a batch.

    Attributes:
        method: its name, as `apply_patch` takes it.
        grid: rows and columns of patches.
        steps: one for each block that changed the tokens, in order.
    """

    method: str
    grid: tuple[int, int]
    steps: list[Step]


@torch.no_grad()
def trace(model: Any, images: Tensor) -> Trace:
    """Run a patched model in eval mode, and say where the patches went.

    What attention mixes in between is not followed: a token stands for its own place. Of Evo-ViT a step says which
    patches pass through a stage; behind it all are there again.

    Args:
        model: behind `apply_patch`; its mode is as before afterwards.
        images: ``(B, 3, H, W)``.

    Raises:
        ValueError: the model is not patched.

    >>> import timm
    >>> from tokenops.patching import apply_patch
    >>> model = apply_patch(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2), "tome", r=4)
    >>> [(step.block, step.tokens) for step in trace(model, torch.randn(1, 3, 64, 64)).steps]
    [(0, 13), (1, 9)]
    """
    patch = getattr(model, "tokenops_patch", None)
    if patch is None:
        raise ValueError(f"trace needs a model behind apply_patch, but this {type(model).__name__} is not patched")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with patch.traced():
            (model if hasattr(patch.owner, "patch_embed") else patch.owner)(images)  # CLIP's model would take words
            return Trace(patch.method.name, patch.grid_of(images), patch.steps)
    finally:
        for module, mode in modes.items():
            module.training = mode


def sources_of(places: Tensor, patches: int) -> Tensor:
    """Places ``(B, k)`` of tokens among the patches, -1 for none, to the token ``(B, patches)`` of every patch."""
    tokens = torch.arange(places.shape[1], device=places.device).expand_as(places)
    empty = tokens.new_full((len(places), 1 + patches), -1)
    return empty.scatter(1, places + 1, tokens)[:, 1:]
