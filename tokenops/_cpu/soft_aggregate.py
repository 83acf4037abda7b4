"""soft_aggregate on a CPU: torch's own softmax and matrix products, written straight into place."""

import torch

from .._schemas import tokens_last
from ..reference import accumulation_dtype, aggregation_weights


def _counting(x, mask, prefix):
    """The tokens behind the prefix, zero where the mask leaves them out (they may hold anything, NaN too)."""
    tokens = x[:, prefix:]
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)


def _softmax(w, dtype):
    """Softmax over the tokens, along memory where they lie last."""
    if tokens_last(w):
        return torch.softmax(w.transpose(1, 2), 2, dtype).transpose(1, 2)
    return torch.softmax(w, 1, dtype)


def _scale(scale, factor, dtype):
    """What the logits are multiplied with, None for 1."""
    if scale is not None:
        return factor * scale.to(dtype).reshape(())
    return None if factor == 1.0 else factor


def _weights(x, w, scale, factor, mask):
    """A, (B,N,M). The quick way makes NaN of a slot whose logits are all -inf: seen in any of its rows."""
    wide = accumulation_dtype(torch.promote_types(x.dtype, w.dtype))
    s = _scale(scale, factor, wide)
    exact = s is not None or mask is not None
    dtype = wide if exact else torch.promote_types(x.dtype, w.dtype)
    if mask is None:
        a = _softmax(w if s is None else w.to(wide) * s, dtype)
        if a.shape[1] == 0 or not a[:, 0].isnan().any():
            return a if exact else a.to(x.dtype)
    a = aggregation_weights(w.to(wide), s, mask).to(wide if exact else x.dtype)
    return a.transpose(1, 2).contiguous().transpose(1, 2) if tokens_last(w) else a.contiguous()


def soft_aggregate_fwd(x, w, scale, factor, mask, prefix):
    a = _weights(x, w, scale, factor, mask)
    y = x.new_empty((x.shape[0], prefix + w.shape[2], x.shape[2]))
    if prefix:
        y[:, :prefix] = x[:, :prefix]
    torch.bmm(a.to(x.dtype).transpose(1, 2), _counting(x, mask, prefix), out=y[:, prefix:])
    return y, a


def soft_aggregate_bwd(dy, x, w, scale, factor, mask, y, a, prefix):
    tokens, dslots = _counting(x, mask, prefix), dy[:, prefix:]
    dx = x.new_empty(x.shape)
    if prefix:
        dx[:, :prefix] = dy[:, :prefix]
    torch.bmm(a.to(x.dtype), dslots, out=dx[:, prefix:])
    wide = accumulation_dtype(torch.promote_types(x.dtype, w.dtype))
    s = _scale(scale, factor, wide)
    if tokens_last(a):
        da, a, dim = torch.bmm(dslots, tokens.transpose(1, 2)), a.transpose(1, 2), 2
    else:
        da, dim = torch.bmm(tokens, dslots.transpose(1, 2)), 1
    ds = torch.ops.aten._softmax_backward_data.default(da.to(a.dtype), a, dim, a.dtype)
    ds = ds.transpose(1, 2) if dim == 2 else ds
    dscale = ds.new_empty((0,), dtype=wide)
    if scale is not None:
        dscale = factor * (ds * w.masked_fill(w == float("-inf"), 0.0)).sum()
    return dx, (ds if s is None else ds * s).to(w.dtype), dscale
