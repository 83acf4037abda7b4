"""soft_aggregate on a CPU: the weights by compiled code where there is some, and torch's own matrix products."""

import math

import torch

from .. import _native
from .._schemas import like_logits, tokens_last
from ..reference import accumulation_dtype, aggregation_weights

_kernels = torch.ops.tokenops


def _compiled(x, w):
    return _native.why_not("cpu") is None and torch.float64 not in (x.dtype, w.dtype)


def _counting(x, mask, prefix):
    """The tokens behind the prefix, zero where the mask leaves them out (they may hold anything, NaN too)."""
    tokens = x[:, prefix:]
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)


def _weights(x, w, scale, mask):
    """A, (B,N,M) in x's dtype and w's order."""
    quick = w.dtype in (torch.float32, torch.float64) or w.shape[1] >= 64
    if quick and tokens_last(w) and scale == 1.0 and mask is None and x.dtype == w.dtype:
        # torch's softmax along memory is quicker; it makes NaN of a slot whose logits are all -inf
        a = torch.softmax(w.transpose(1, 2), 2).transpose(1, 2)
        if a.shape[1] == 0 or not math.isnan(a[:, 0].sum().item()):
            return a
    a = like_logits(w, x.dtype)
    if _compiled(x, w):
        _kernels.aggregation_weights_fwd(w, scale, mask, a)
        return a
    wide = accumulation_dtype(torch.promote_types(x.dtype, w.dtype))
    return a.copy_(aggregation_weights(w.to(wide), scale, mask))


def _weights_backward(da, a, w, scale, learned):
    """dw, and the sum of dS * w if the scale is learned. The weights are rounded, so D is divided by their sum."""
    wide = accumulation_dtype(torch.promote_types(a.dtype, w.dtype))
    dw = da if da.dtype == w.dtype else like_logits(w, w.dtype)
    if _compiled(a, w):
        partial = a.new_zeros((w.shape[0], w.shape[2]) if learned else (0,), dtype=wide)
        _kernels.aggregation_weights_bwd(da, a, w, scale, dw, partial)
        return dw, partial.sum() if learned else partial
    weights, da = a.to(wide), da.to(wide)
    total = weights.sum(dim=1, keepdim=True)
    delta = (weights * da).sum(dim=1, keepdim=True) / total.masked_fill(total == 0.0, 1.0)
    ds = weights * (da - delta)
    products = (ds * w).masked_fill(weights == 0.0, 0.0)  # what does not count may be NaN
    return dw.copy_(scale * ds), products.sum() if learned else ds.new_empty((0,))


def _prepared(w, scale, factor):
    """The logits with a stride of 1, and the scale as a number."""
    w = w if tokens_last(w) or w.stride(2) == 1 else w.contiguous()
    return w, factor if scale is None else factor * scale.item()


def _in_order(a, w):
    """The weights in the order that the logits have in memory; vmap may have laid them otherwise."""
    dim = 1 if tokens_last(w) else 2
    if a.stride(dim) == 1 or a.shape[dim] == 1:
        return a
    return a.transpose(1, 2).contiguous().transpose(1, 2) if dim == 1 else a.contiguous()


def _behind(x, prefix, a, b):
    """[x[:, :P], a b]: the product is written behind the prefix."""
    if prefix == 0:
        return torch.bmm(a, b)
    if x.dtype == torch.float32:  # MKL multiplies into a strided batch 12 % slower than it takes to copy
        return torch.cat((x[:, :prefix], torch.bmm(a, b)), dim=1)
    y = x.new_empty((x.shape[0], prefix + a.shape[1], x.shape[2]))
    y[:, :prefix] = x[:, :prefix]
    torch.bmm(a, b, out=y[:, prefix:])
    return y


def soft_aggregate_fwd(x, w, scale, factor, mask, prefix):
    w, scale = _prepared(w, scale, factor)
    a = _weights(x, w, scale, mask)
    return _behind(x, prefix, a.transpose(1, 2), _counting(x, mask, prefix)), a


def soft_aggregate_bwd(dy, x, w, scale, factor, mask, y, a, prefix):
    learned = scale is not None
    w, scale = _prepared(w, scale, factor)
    a = _in_order(a, w)
    tokens, dslots = _counting(x, mask, prefix), dy[:, prefix:]
    dx = _behind(dy, prefix, a, dslots)
    if tokens_last(w):
        da = torch.bmm(dslots, tokens.transpose(1, 2)).transpose(1, 2)
    else:
        da = torch.bmm(tokens, dslots.transpose(1, 2))
    dw, dscale = _weights_backward(da, a, w, scale, learned)
    return dx, dw, factor * dscale if learned else dscale
