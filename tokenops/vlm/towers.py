"""How much of the attention of one block of a language model's tower each of its image tokens gets.

The block is run again as far as its queries and keys, from the hidden states that the tower hands out, for which
transformers leaves hooks in the tower; else no module is changed, and no matrix of attention is written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.masked_channel_attention import masked_channel_attention
from ..patching.families.packed import turned


class Speaker(NamedTuple):
    """A kind of language model.

    Attributes:
        tower: the tower's name in it.
        block: of it and what get_image_features was given, the block whose output is the last that is taken.
        scores: of it, the hidden states before a block, the block's number, "received" or "class" and what
            get_image_features was given, the scores of all image tokens one behind the other.
        features: which hidden states it takes for itself.
        first: the position of a prompt's first token.
    """

    tower: str
    block: Callable[[Any, dict[str, Any]], int]
    scores: Callable[[Any, Tensor, int, str, dict[str, Any]], Tensor]
    features: Callable[[Any, dict[str, Any]], list[int]] = lambda model, given: []
    first: int = 0


def blocks_of(tower: Any) -> Any:
    """The blocks of a tower."""
    if hasattr(tower, "blocks"):
        return tower.blocks
    encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
    if encoder is None:
        raise TypeError(
            f"compress: the blocks of {type(tower).__name__} cannot be read: give scores of your own (score=...)"
        )
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def has_class(tower: Any) -> bool:
    """Whether the first token of a tower is a class token."""
    embeddings = getattr(tower, "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


# ---- towers of images of one size: CLIP, SigLIP, InternVL's


def _attended(tower: Any, hidden: Tensor, number: int, kind: str) -> Tensor:
    """Of each image (B, N, C) the scores (B, N) of all tokens of a tower."""
    block = blocks_of(tower)[number]
    attention: Any = getattr(block, "self_attn", None) or getattr(block, "attention", None)
    norm = getattr(block, "layer_norm1", None) or getattr(block, "layernorm_before", None)
    if norm is None or not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim", "scale")):
        raise TypeError(
            f"compress: the attention of {type(tower).__name__} cannot be read: give scores of your own (score=...)"
        )
    if kind == "class" and not has_class(tower):
        raise ValueError(f"compress: score='class', but {type(tower).__name__} has no class token: take 'received'")
    x = norm(hidden)
    q, k = attention.q_proj(x), attention.k_proj(x)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q, k))
    return masked_channel_attention(q, k, k[..., :1], scale=attention.scale, scores=kind, heads="mean")[1]


def _of_patches(model: Any, hidden: Tensor, number: int, kind: str) -> Tensor:
    """Scores (B, n) of the patches, without those of a class token."""
    scores = _attended(model.vision_tower, hidden, number, kind)
    return scores[:, int(has_class(model.vision_tower)) :]


def _llava(model: Any, hidden: Tensor, number: int, kind: str, given: dict[str, Any]) -> Tensor:
    strategy = given.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    scores = _attended(model.vision_tower, hidden, number, kind)
    return scores[:, int(strategy == "default") :].flatten()


def _as_they_are(model: Any, hidden: Tensor, number: int, kind: str, given: dict[str, Any]) -> Tensor:
    return _of_patches(model, hidden, number, kind).flatten()


def _pooled(model: Any, hidden: Tensor, number: int, kind: str, given: dict[str, Any]) -> Tensor:
    """Of squares of the grid, as Gemma 3's projector makes them."""
    scores = _of_patches(model, hidden, number, kind)
    side = model.multi_modal_projector.patches_per_image
    return model.multi_modal_projector.avg_pool(scores.view(-1, 1, side, side)).flatten()


def _shuffled(model: Any, hidden: Tensor, number: int, kind: str, given: dict[str, Any]) -> Tensor:
    """Of squares of the grid, as InternVL puts them together."""
    scores = _of_patches(model, hidden, number, kind)
    side = int(scores.shape[1] ** 0.5)
    return model.pixel_shuffle(scores.view(-1, side, side, 1), model.config.downsample_ratio).sum(-1).flatten()


def _last(model: Any, given: dict[str, Any]) -> int:
    return len(blocks_of(model.vision_tower)) - 1


def _taken(model: Any, given: dict[str, Any]) -> list[int]:
    """The hidden states that make the features."""
    layers = given.get("vision_feature_layer")
    layers = model.config.vision_feature_layer if layers is None else layers
    count = len(blocks_of(model.vision_tower)) + 1
    return [layer % count for layer in ([layers] if isinstance(layers, int) else layers)]


def _last_taken(model: Any, given: dict[str, Any]) -> int:
    return max(_taken(model, given)[-1] - 1, 0)


# ---- towers of images of any size, one behind the other: Qwen's


def _qwen(model: Any, hidden: Tensor, number: int, kind: str, given: dict[str, Any]) -> Tensor:
    """Of 2 x 2 squares, in the images' own order where the tower works by windows."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

    tower, unit = model.visual, model.visual.spatial_merge_size**2
    if kind == "class":
        raise ValueError(f"compress: score='class', but {type(tower).__name__} has no class token: take 'received'")
    grid = given["image_grid_thw"]
    bounds = get_vision_cu_seqlens(grid)
    tables = tower.rotary_pos_emb(hidden, get_vision_position_ids(grid, tower.spatial_merge_size))
    windows = None
    if hasattr(tower, "fullatt_block_indexes"):
        windows, bounds_of_windows = get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        windows = windows.to(hidden.device)
        tables = [table.unflatten(0, (-1, unit))[windows].flatten(0, 1) for table in tables]
        if number not in tower.fullatt_block_indexes:
            bounds = bounds_of_windows
    block = blocks_of(tower)[number]
    q, k, _ = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
    q, k = (turned(t, *tables) for t in (q, k))
    bounds = bounds.to(hidden.device, torch.int32)
    longest = int(bounds.diff().max())
    _, scores = masked_channel_attention(
        q, k, k[..., :1], cu_seqlens=bounds, max_seqlen=longest, scale=block.attn.scaling, scores=kind, heads="mean"
    )
    # of all queries of a sequence, not of one of them: sequences of unequal length compare
    scores = scores * bounds.diff().repeat_interleave(bounds.diff())
    scores = scores.view(-1, unit).sum(1)
    return scores if windows is None else scores[windows.argsort()]


def _last_whole(model: Any, given: dict[str, Any]) -> int:
    """The last block that sees whole images."""
    depth = len(model.visual.blocks)
    whole = getattr(model.visual, "fullatt_block_indexes", None)
    return max((number % depth for number in whole), default=depth - 1) if whole is not None else depth - 1


#: by the name of the model with the tower in it
SPEAKERS = {
    "LlavaModel": Speaker("vision_tower", _last_taken, _llava, _taken),
    "PaliGemmaModel": Speaker("vision_tower", _last, _as_they_are, first=1),
    "InternVLModel": Speaker("vision_tower", _last_taken, _shuffled, _taken),
    "Gemma3Model": Speaker("vision_tower", _last, _pooled),
    "Qwen2VLModel": Speaker("visual", _last_whole, _qwen),
    "Qwen2_5_VLModel": Speaker("visual", _last_whole, _qwen),
    "Qwen3VLModel": Speaker("visual", _last_whole, _qwen),
}


def speaker_of(model: Any) -> tuple[Any, Speaker]:
    """The model with the tower in it, and its kind."""
    for module in model.modules() if hasattr(model, "modules") else ():
        for kind in type(module).__mro__:
            if kind.__name__ in SPEAKERS:
                return module, SPEAKERS[kind.__name__]
    known = ", ".join(SPEAKERS)
    raise TypeError(
        f"compress: model is a {type(model).__name__}, but it must be one of transformers with {known} in it"
    )
