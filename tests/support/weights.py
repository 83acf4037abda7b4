"""Weights for models under test: values that make norms, attention and tokens differ from what they start as."""

import torch


def spread(model):
    """Give every parameter and buffer a value that matters: norms off 1 and 0, running statistics off 0 and 1."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point():
            continue
        with torch.no_grad():
            if name.endswith("running_var") or name.endswith("scale"):
                value.uniform_(0.5, 2.0)
            elif "norm" in name or ".bn" in name:
                value.add_(0.2 * torch.randn_like(value))
            elif "weight.3.weight" in name:
                value.normal_(std=1.0)
    return model


def spread_levit(model):
    """Give every parameter and buffer a value that matters: norms off 1 and 0, uneven attention, theta off 0."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith("bn.weight"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("bn.bias", "running_mean")):
                value.normal_(std=0.2)
            elif name.endswith("learn_tradeoff"):
                value.normal_()
            elif name.endswith(("qkv.c.weight", "q.1.c.weight", "kv.c.weight")):
                value.mul_(2)
    return model


def redrawn(model):
    """Weights of the size that keeps tokens apart, norms and scales near 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
            if parameter.dim() > 1 and name.endswith("weight"):
                parameter.copy_(noise * 1.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("weight") or "gamma" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()
