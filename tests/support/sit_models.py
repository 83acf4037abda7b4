"""Small SiT models for the tests."""

import timm

import tokenops.methods  # noqa: F401
from support.weights import spread

TINY = dict(embed_dim=32, num_heads=2, stage_blocks=(1, 1, 2), img_size=64, num_classes=5)


def tiny(name="sit_lvvit_xsmall", **kwargs):
    return spread(timm.create_model(name, **{**TINY, **kwargs})).eval()


def loss_and_gradients(model, x):
    model.zero_grad()
    logits, layers = model.forward_distill(x)
    loss = logits.square().mean() + sum(layer.square().mean() for layer in layers)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
