"""Qwen's towers, small enough for a CPU: one image, as it is and with half of its units chosen in one block.

Random weights, fp32, no gradients; the sides take turns. Lines on stdout: seconds of each, and how many times as fast
the patched tower is, medians with their quartiles.
"""

import argparse
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tokenops import apply_patch
from tokenops.measuring.timing import Spread, clock, interleaved, ratio

HEAD = 80


def tower(kind: str, depth: int, heads: int) -> Any:
    """Heads of 80 channels as in the published towers, and their MLP's share; windows of 8 x 8 patches."""
    width = heads * HEAD
    sizes: Any = dict(depth=depth, hidden_size=width, num_heads=heads, out_hidden_size=width, patch_size=14)
    torch.manual_seed(0)
    if kind == "qwen2_5":
        full = sorted({2 * depth // 8, depth - 1})
        config = Qwen2_5_VLVisionConfig(**sizes, intermediate_size=width * 171 // 64, fullatt_block_indexes=full)
        return Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    deep = [depth // 4, depth // 2, 3 * depth // 4]
    config = Qwen3VLVisionConfig(**sizes, intermediate_size=width * 4, deepstack_visual_indexes=deep)
    return Qwen3VLVisionModel(config).eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("qwen2_5", "qwen3"), default="qwen2_5")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--side", type=int, default=48, help="patches of a row of the image")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    plain, patched = (tower(asked.kind, asked.depth, asked.heads) for _ in range(2))
    block = 2 * asked.depth // 8
    apply_patch(patched, "evit", keep_rate=asked.keep_rate, reduction_loc=(block,), fuse_token=False)
    grid = torch.tensor([[1, asked.side, asked.side]])
    x = torch.randn(asked.side**2, 3 * 2 * 14 * 14)
    sides = {
        name: lambda model=model: model(x, grid_thw=grid) for name, model in dict(plain=plain, patched=patched).items()
    }
    counts = [len(call().pooler_output) for call in sides.values()]
    times = interleaved(sides, asked.rounds, clock("cpu"))
    print(
        f"{asked.kind}, {asked.depth} blocks of {asked.heads} heads of {HEAD}, {len(x)} patches, block {block} chooses"
    )
    for (name, seconds), count in zip(times.items(), counts):
        spread = Spread.of(seconds)
        print(f"{name}: {spread.median:.3f} s ({spread.low:.3f} to {spread.high:.3f}), {count} image tokens")
    spread = ratio(times["plain"], times["patched"])
    print(f"patched is {spread.median:.2f} times as fast ({spread.low:.2f} to {spread.high:.2f})")


if __name__ == "__main__":
    main()
