"""What the tests of models share: images, closeness, gradients, costs, operators that run, a little training."""

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokenops
import tokenops.methods  # noqa: F401  (its models have names)
from support.weights import spread

#: a DeiT that is quick
SMALL = dict(embed_dim=48, num_heads=3, img_size=64, num_classes=5)


def small(name, **kwargs):
    return spread(timm.create_model(name, **{**SMALL, **kwargs})).eval()


def images(model, batch=2):
    size = model.img_size if hasattr(model, "img_size") else model.patch_embed.img_size
    return torch.randn(batch, 3, *size)


def meta(name, **kwargs):
    """The model of full size without its memory."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def kept_maps(model, x):
    """Which patches each step of a patched model leaves: ``(B, h, w)`` bool."""
    found = tokenops.trace(model, x)
    return [(step.sources >= 0).unflatten(1, found.grid) for step in found.steps]


def roles(model):
    """What the method does in each block."""
    return [block.tokenops_role for block in model.blocks]


def masks_of(order, counts):
    """(L, B, 1+N) masks that keep the first patches of an order (B, N)."""
    masks = torch.zeros(len(counts), order.shape[0], 1 + order.shape[1], dtype=torch.bool)
    masks[..., 0] = True
    for mask, n in zip(masks, counts):
        mask.scatter_(1, order[:, : n - 1] + 1, True)
    return masks


def close(a, b):
    first = a if isinstance(a, torch.Tensor) else a[0]
    tolerance = 1e-5 if first.device.type == "cpu" else 1e-4  # a GPU takes three products of TF32 for one of fp32
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def train_still(module):
    """In training, but for batch norms, which depend on no other image."""
    for part in module.train().modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    return module


def flops(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def all_close(grads, expected, tolerance=1e-4):
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm() + 1e-6, name


def train_a_little(model, loss_of, steps=4):
    """Every parameter gets a gradient, and the loss goes down."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def operators_between(model, start, end):
    """Names of the operators, views excluded, that run from behind one module of a model to another."""
    names, seen = None, []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if names is not None and not func.is_view:
                names.append(str(func))
            return func(*args, **(kwargs or {}))

    def begin(*_):
        nonlocal names
        names = []

    def stop(*_):
        nonlocal names
        seen.append(names)
        names = None

    model.get_submodule(start).register_forward_hook(begin)
    model.get_submodule(end).register_forward_pre_hook(stop)
    with torch.no_grad(), Recorder():
        model(images(model))
    return seen[0]
