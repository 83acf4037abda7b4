"""Small towers of language models whose images are packed in one sequence, and what is left in them, by masked keys."""

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeVisionModel,
    Qwen3_5VisionModel,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeVisionModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from support.weights import redrawn

UNIT = 4
#: the token that stands for a piece of an image
IMAGE = 60
SIZES: dict[str, Any] = dict(depth=5, num_heads=2, patch_size=4)
OTHERS: dict[str, Any] = dict(SIZES, hidden_size=32, intermediate_size=48, out_hidden_size=24)
DEEP: dict[str, Any] = dict(OTHERS, num_position_embeddings=16, deepstack_visual_indexes=[0, 2, 3])
#: the configuration of a language model, its tower, and what this is made of. Windows of 2 x 2 units are in blocks 0, 2
#: and 4
TOWERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Qwen2VL": (
        Qwen2VLConfig,
        Qwen2VisionTransformerPretrainedModel,
        dict(SIZES, embed_dim=32, mlp_ratio=2, hidden_size=24),
    ),
    "Qwen2_5_VL": (
        Qwen2_5_VLConfig,
        Qwen2_5_VisionTransformerPretrainedModel,
        dict(OTHERS, window_size=16, fullatt_block_indexes=[1, 3]),
    ),
    "Qwen3VL": (
        Qwen3VLConfig,
        Qwen3VLVisionModel,
        DEEP,
    ),
    "Qwen3VLMoe": (Qwen3VLMoeConfig, Qwen3VLMoeVisionModel, DEEP),
    "Qwen3_5": (Qwen3_5Config, Qwen3_5VisionModel, dict(OTHERS, num_position_embeddings=16)),
    "Qwen3_5Moe": (Qwen3_5MoeConfig, Qwen3_5MoeVisionModel, dict(OTHERS, num_position_embeddings=16)),
}
#: those whose language models are made small here
SPEAKERS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
TEXT: dict[str, Any] = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=32,
    vocab_size=64,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2]),
)
#: frames, rows and columns of patches: a large image, a small one, and two frames
GRID = torch.tensor([[1, 8, 12], [1, 4, 6], [2, 4, 4]])


def tower(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config, kind, sizes = TOWERS[name]
    return redrawn(kind(config(vision_config={**sizes, **more}).vision_config))


def speaker(name: str, **more: Any) -> Any:
    """The language model around a tower."""
    torch.manual_seed(0)
    config, _, sizes = TOWERS[name]
    ids = dict(image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2)
    made = config(vision_config={**sizes, **more}, text_config=TEXT, **ids)
    return redrawn(getattr(transformers, f"{name}ForConditionalGeneration")(made))


def patches(grid: Tensor = GRID) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)


class Left(NamedTuple):
    """What is left of images: their image tokens, which these are of all, and those taken from between blocks; and the
    units behind every block, in the order of the tower.
    """

    pooled: Tensor
    kept: Tensor
    deepstack: list[Tensor]
    behind: list[Tensor]


def masked(model: Any, x: Tensor, grid: Tensor, counts: dict[int, list[int]]) -> Left:
    """A tower in which all rows stay, and those that are left out are masked as keys.

    Args:
        model: as it is made, not patched.
        x, grid: what it is given.
        counts: for blocks by number, how many units of each image (a frame is one) are left by its attention.
    """
    images = windows = get_vision_cu_seqlens(grid)
    x = model.patch_embed(x)
    position_ids = get_vision_position_ids(grid, 2)
    if hasattr(model, "pos_embed"):
        index, weights = get_vision_interpolation_indices_and_weights(grid, 4, align_corners=True, spatial_merge_size=2)
        x = x + (model.pos_embed(index) * weights[:, :, None]).sum(1)
    cos, sin = model.rotary_pos_emb(x, position_ids)
    order = torch.arange(len(x) // UNIT)
    if hasattr(model, "fullatt_block_indexes"):
        order, windows = get_vision_window_index(grid, 2, model.window_size, model.patch_size)
        x, cos, sin = (t.unflatten(0, (-1, UNIT))[order].flatten(0, 1) for t in (x, cos, sin))
    alive, deepstack, behind = torch.ones(len(x) // UNIT, dtype=torch.bool), [], []
    for i, block in enumerate(model.blocks):
        whole = i in getattr(model, "fullatt_block_indexes", (i,))
        bounds = (images if whole else windows).tolist()
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, 2, -1).unbind(1)
        q, k = (t * cos[:, None] + rotated(t) * sin[:, None] for t in (q, k))
        rows, out, units = alive.repeat_interleave(UNIT), [], []
        for begin, end in zip(bounds, bounds[1:]):
            here = slice(begin, end)
            logits = torch.einsum("nhd,mhd->hnm", q[here], k[here]) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(~rows[here], float("-inf")).softmax(-1).nan_to_num()
            out.append(torch.einsum("hnm,mhd->nhd", weights, v[here]))
            units.append(weights[:, rows[here]].mean((0, 1)).unflatten(0, (-1, UNIT)).sum(1))
        x = x + block.attn.proj(torch.cat(out).flatten(1))
        if i in counts:
            left = torch.zeros_like(alive)
            for scores, begin, count in zip(units, bounds, counts[i]):
                scores = scores.masked_fill(~alive[begin // UNIT :][: len(scores)], -1)
                left[begin // UNIT + scores.argsort(descending=True)[:count]] = True
            alive = left
        x = x + block.mlp(block.norm2(x))
        behind.append(alive.nonzero().flatten())
        if i in getattr(model, "deepstack_visual_indexes", ()):
            merger = model.deepstack_merger_list[model.deepstack_visual_indexes.index(i)]
            deepstack.append(merger(x))
    kept = order[alive].sort().values
    return Left(model.merger(x)[order.argsort()][kept], kept, [each[kept] for each in deepstack], behind)


def prompt(*rows: list[int]) -> dict[str, Tensor]:
    """Words around the places of so many image tokens of each image of each row."""
    ids = torch.tensor([[3, *(n for count in row for n in [IMAGE + 2, *[IMAGE] * count, 5]), 7] for row in rows])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int())


def shortened(model: Any, whole: dict[str, Tensor], kept: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """A prompt without the places that are not kept, as many in each row; the others have the positions they had."""
    places = whole["input_ids"] == IMAGE
    positions, _ = model.get_rope_index(**whole, image_grid_thw=grid)
    stays = ~places
    stays[places] = torch.zeros(int(places.sum()), dtype=torch.bool).index_fill(0, kept, True)
    short = {name: value[stays].unflatten(0, (len(places), -1)) for name, value in whole.items()}
    return dict(short, position_ids=torch.stack([each[stays].unflatten(0, (len(places), -1)) for each in positions]))


def rotated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)
