"""ToMe on a rotary model, without training: where merged tokens are, and by which keys they are compared.

A rotary ViT of 6 blocks without other positions learns scikit-learn's digits, for every seed; then
r tokens are merged in every block, with both options for their positions, matched by keys before rotation, as
`tokenops` does, and behind it. A line each on stdout, per cent of 450 test images.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from timm.models.eva import Eva as Rotary
from torch import nn

from accuracy.data import split_digits
from tokenops import apply_patch
from tokenops.patching.families.timm import Eva

LEVELS = (4, 8, 12)
SIZES: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=2, num_classes=10)


class Digits(NamedTuple):
    """Training, and test images ``(n, 3, 32, 32)`` with their labels."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls) -> "Digits":
        pixels, labels, train, test = split_digits()
        images = F.interpolate(pixels.div(8).sub(1), (32, 32), mode="bilinear", align_corners=False)
        images = images.expand(-1, 3, -1, -1)
        return cls(*(t.contiguous() for t in (images[train], labels[train], images[test], labels[test])))

    @torch.inference_mode()
    def accuracy(self, model: Any) -> float:
        """Per cent of the test images."""
        right = model.eval()(self.test_images).argmax(1) == self.test_labels
        return 100 * right.double().mean().item()


def vit() -> Any:
    """Two convolutions make the patches, and linear layers start wide, for few images."""
    options: Any = dict(use_abs_pos_emb=False, use_rot_pos_emb=True, global_pool="token", mlp_ratio=2.0)
    model: Any = Rotary(**SIZES, **options)
    width = SIZES["embed_dim"]
    first, second = nn.Conv2d(3, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)
    model.patch_embed.proj = nn.Sequential(first, nn.GELU(), second)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def trained(digits: Digits, seed: int, epochs: int, lr: float = 2e-3, batch: int = 64) -> Any:
    torch.manual_seed(seed)
    model = vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = len(digits.images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.15)
    for _ in range(epochs):
        order = torch.randperm(len(digits.images))
        for chosen in order[: steps * batch].split(batch):
            dy, dx = torch.randint(-2, 3, (2,)).tolist()
            y = model(digits.images[chosen].roll((dy, dx), dims=(2, 3)))
            optimizer.zero_grad()
            F.cross_entropy(y, digits.labels[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def behind(heads: Callable[..., Any]) -> Any:
    """Heads that show keys when they are turned already."""

    def made(attention: Any, x: Any, ask: Any, positions: Any) -> Any:
        q, k, v = heads(attention, x, mock.Mock(rows=ask.rows), positions)
        ask.look_at(k)
        return q, k, v

    return staticmethod(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=16)
    args = parser.parse_args()
    digits, found = Digits.load(), {}
    for seed in range(args.seeds):
        dense = trained(digits, seed, args.epochs)
        found.setdefault("dense", []).append(digits.accuracy(dense))
        for keys, heads in (("before", staticmethod(Eva.heads)), ("behind", behind(Eva.heads))):
            with mock.patch.object(Eva, "heads", heads):
                for positions in ("mean", "destination"):
                    for r in LEVELS:
                        model = apply_patch(copy.deepcopy(dense), "tome", r=r, positions=positions)
                        name = f"{positions}, keys {keys} rotation, r={r}"
                        found.setdefault(name, []).append(digits.accuracy(model))
    for name, values in found.items():
        spread = torch.tensor(values).std().item() if len(values) > 1 else 0.0
        print(f"{name}: {sum(values) / len(values):.1f} +- {spread:.1f}  ({', '.join(f'{v:.1f}' for v in values)})")


if __name__ == "__main__":
    main()
