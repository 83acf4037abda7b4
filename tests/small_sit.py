"""Small SiT models for the tests."""

import timm
import torch
from published_sit import spread

import tokenops.methods  # noqa: F401

TINY = dict(embed_dim=32, num_heads=2, stage_blocks=(1, 1, 2), img_size=64, num_classes=5)


def tiny(name="sit_lvvit_xsmall", **kwargs):
    return spread(timm.create_model(name, **{**TINY, **kwargs})).eval()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.img_size)


def meta(name, **kwargs):
    """The model of full size without its memory."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def loss_and_gradients(model, x):
    model.zero_grad()
    logits, layers = model.forward_distill(x)
    loss = logits.square().mean() + sum(layer.square().mean() for layer in layers)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
