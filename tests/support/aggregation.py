"""Inputs of soft_aggregate, and its result with all gradients."""

import torch


def inputs(case, dtype, device, mask=False, spread=2.0):
    x = torch.randn(case.B, case.prefix + case.N, case.C, dtype=dtype, device=device)
    w = spread * torch.randn(case.B, case.N, case.M, dtype=dtype, device=device)
    keep = torch.rand(case.B, case.N, device=device) > 0.3 if mask else None
    scale = torch.tensor([[[1.25]]], dtype=dtype, device=device)
    return x, w, scale, keep


def run(function, tensors, dy=None):
    """The result and the gradients of the tensors that are there."""
    leaves = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]
    y = function(*leaves)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy, allow_unused=True)
    return y.detach(), *grads


def delta_terms(dy, y):
    """The size of what is subtracted in dw = A * (G - D), D = sum over the channels of dy * y."""
    terms = (dy.double() * y).abs().sum(dim=-1)
    return terms.max().item() if terms.numel() else 0.0
