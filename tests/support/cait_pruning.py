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


def model_of(kind="deit", merged=True, **kwargs):
    sizes = {**SIZES, **kwargs}
    if kind == "lvvit":
        model = lv_vit(skip_lam=2.0, **sizes)
    else:
        model = timm.create_model("deit_tiny_patch16_224", **sizes)
    model = spread(prunable(model))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)  # attention that differs between tokens
            block.attn.qkv.bias.normal_()
    return apply_patch(model, "cait", points=MERGES) if merged else model


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
