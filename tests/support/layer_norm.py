"""What cancels in the gradients of a layer norm that an operator ends in."""

import torch

LARGEST_WEIGHT = 1.5  # of the tests' inputs: torch.rand + 0.5


def cancelling(tokens, upstream, eps, dtype):
    """The size of the terms in the gradients of the tokens and of the norm's parameters, from what is right in fp64.

    In the tokens dnormed * weight / deviation cancels but for what is along neither the mean nor the tokens themselves,
    of two or four channels nearly all of it. The parameters' gradients are sums of what was rounded in the tokens'
    dtype: this is in roundings of fp32, which they have.
    """
    if "normed" not in upstream or tokens.numel() == 0:
        return 0.0, 0.0
    variance = tokens.var(dim=-1, correction=0)
    inverse = torch.where(variance > eps, variance + eps, 1.0).rsqrt()
    size = (inverse * (1 + tokens.abs().amax(dim=-1) * inverse)).max()  # tokens less their mean
    dnormed = upstream["normed"].double().abs().max()
    coarser = max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    return float(dnormed * LARGEST_WEIGHT * size), float(dnormed * tokens.shape[-1] ** 0.5 * coarser)
