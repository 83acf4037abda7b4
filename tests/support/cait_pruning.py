"""A small model with merged tokens, batches for it, and one step of training under a pruner."""

import timm
import torch
from torch import nn

from support.weights import spread
from tokenops import apply_patch
from tokenops.methods import lv_vit
from tokenops.methods.cait.blocks import prunable

SIZES = dict(img_size=64, embed_dim=32, num_heads=2, depth=3, num_classes=5)
SMALL = dict(qk=4, v=2, hidden=16)
MERGES = {0: "horizontal", 1: "vertical"}


def dense(kind="deit", **kwargs):
    sizes = {**SIZES, **kwargs}
    if kind == "lvvit":
        return lv_vit(skip_lam=2.0, **sizes)
    if kind == "scaled":
        return timm.models.VisionTransformer(**sizes, init_values=0.3, qkv_bias=False)
    name = "deit_tiny_distilled_patch16_224" if kind == "distilled" else "deit_tiny_patch16_224"
    return timm.create_model(name, **sizes)


def model_of(kind="deit", merges="average", **kwargs):
    model = spread(prunable(dense(kind, **kwargs)))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)  # attention that differs between tokens
            if kind != "scaled":
                block.attn.qkv.bias.normal_()
    return model if merges is None else apply_patch(model, "cait", points=MERGES, kind=merges)


def batch(seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 64, 64, generator=generator), torch.arange(size) % 5


def learn(model, pruner, optimizer, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    chosen = pruner.step()
    optimizer.step()
    return chosen
