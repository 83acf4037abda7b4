"""Towers of language models whose images are packed in one sequence, alone and in their models."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from support.packed_towers import SPEAKERS, TOWERS, prompt, shortened, speaker, tower
from support.zoo.entry import BATCH, Entry, drawn

#: 16 patches, 3 blocks, of which the first and the last see whole images
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2VL": dict(depth=3),
    "Qwen2_5_VL": dict(depth=3, fullatt_block_indexes=[0, 2]),
    "Qwen3VL": dict(depth=3, deepstack_visual_indexes=[0, 1]),
    "Qwen3VLMoe": dict(depth=3, deepstack_visual_indexes=[0, 1]),
    "Qwen3_5": dict(depth=3),
    "Qwen3_5Moe": dict(depth=3),
}
GRID = torch.tensor([[1, 4, 4]] * BATCH)


def packed() -> dict[str, Tensor]:
    """Patches as rows, an image at a time."""
    return {"hidden_states": drawn(16, 3 * 2 * 4 * 4), "grid_thw": GRID}


def asked() -> dict[str, Tensor]:
    return {**prompt(*[[4]] * BATCH), "pixel_values": packed()["hidden_states"], "image_grid_thw": GRID}


def fitted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompt with places for the units that are left."""
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    whole = {name: value for name, value in inputs.items() if name not in images}
    with torch.no_grad():
        output = model.get_image_features(**images)
    kept = getattr(output, "kept", None)
    kept = torch.arange(int((whole["mm_token_type_ids"] > 0).sum())) if kept is None else kept
    return {**shortened(model, whole, kept, inputs["image_grid_thw"]), **images}


def entries() -> list[Entry]:
    made = []
    for name, sizes in SIZES.items():
        kind, results = TOWERS[name][1].__name__, ("last_hidden_state", "pooler_output", "deepstack_features")
        made.append(Entry("transformers", kind, partial(tower, name, **sizes), packed, results=results))
        if name not in SPEAKERS:
            continue
        model = partial(lambda name, sizes: speaker(name, **sizes).model, name, sizes)
        made.append(Entry("transformers", f"{name}Model", model, asked, results=("last_hidden_state",), fit=fitted))
    return made
