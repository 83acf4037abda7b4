"""Teaches torch.utils.flop_counter our operators (matrix products only, two FLOPs a multiply-add, as it counts).

Imported as soon as tokenops and that module both are (counted.py), so that a count does not depend on what was
counted before.
"""

import torch
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from .schemas import KERNELS

_ops, _aten = torch.ops.tokenops, torch.ops.aten


@register_flop_formula(_ops.soft_aggregate_fwd)
def _soft_aggregate_fwd(x, w, *args, **kwargs):
    b, n, m = w
    return 2 * b * n * m * x[2]


@register_flop_formula(_ops.soft_aggregate_bwd)
def _soft_aggregate_bwd(dy, x, w, *args, **kwargs):
    b, n, m = w
    return 2 * (2 * b * n * m * x[2])


@register_flop_formula(_ops.token_mlp_fwd)
def _token_mlp_fwd(z, w1, b1, w2, *args, **kwargs):
    return 2 * z[0] * z[2] * w1[0] * (w1[1] + w2[0])


@register_flop_formula(_ops.token_mlp_bwd)
def _token_mlp_bwd(dy, z, w1, b1, w2, *args, **kwargs):
    # three products with w1's shape (the hidden tokens again, their weights, the tokens), two with w2's
    return 2 * z[0] * z[2] * w1[0] * (3 * w1[1] + 2 * w2[0])


@register_flop_formula(_ops.masked_channel_attention_fwd, get_raw=True)
def _masked_channel_attention_fwd(q, k, v, *args, out_val=None, **kwargs):
    return 2 * _attention(q, k, v, args[8:10], args[11:], 1, 1)


@register_flop_formula(_ops.masked_channel_attention_bwd, get_raw=True)
def _masked_channel_attention_bwd(dout, dscores, dlse, q, k, v, *args, out_val=None, **kwargs):
    # three products with the keys' width (the logits again, dq, dk), two with the values' (dP, dv)
    return 2 * _attention(q, k, v, args[9:11], args[11:], 3, 2)


def _attention(q, k, v, side_by_side, bounds, of_keys, of_values):
    """Multiply-adds of so many products with either width; all three may be side by side in q."""
    if k is not None:
        heads, wide_k, wide_v = q.shape[0] * q.shape[1], q.shape[3], v.shape[3]
        pairs = q.shape[2] * k.shape[2]
    else:
        heads, wide_k = q.shape[0], side_by_side[0] * side_by_side[1]
        wide_v, pairs = q.shape[2] - 2 * wide_k, q.shape[1] ** 2
    if bounds and bounds[0] is not None:
        pairs = _pairs(*bounds, q.shape[2])
    return heads * pairs * (of_keys * wide_k + of_values * wide_v)


def _pairs(cu_q, cu_k, max_q, max_k, rows):
    """Of queries and keys of one sequence, in all of them; at most, where the boundaries may not be looked at."""
    if isinstance(cu_q, FakeTensor):
        return rows * max_k
    of_q, of_k = (cu.long().diff() for cu in (cu_q, cu_k))
    return int((of_q * of_k).sum())


@register_flop_formula(_ops.match_bipartite_fwd)
def _match_bipartite_fwd(metric, r, prefix, *args, **kwargs):
    b, rows, d = metric
    n = rows - prefix
    return 2 * b * (n // 2) * (n - n // 2) * d if r else 0


@register_flop_formula(_ops.match_packed_fwd)
def _match_packed_fwd(metric, cu_seqlens, max_seqlen, *args, **kwargs):
    return metric[0] * max_seqlen // 2 * metric[1]  # as if all sequences were as long as the longest


@register_flop_formula(_ops.merge_bipartite_matched)
def _merge_bipartite_matched(x, metric, r, sizes, weight, bias, prefix, *args, **kwargs):
    return _match_bipartite_fwd(metric, r, prefix)


# what moves tokens, or adds them up, multiplies no matrices
for _name in {name for name, _ in KERNELS}:
    if getattr(_ops, _name) not in flop_registry:
        register_flop_formula(getattr(_ops, _name))(lambda *args, **kwargs: 0)

if _aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:  # what torch itself may not count

    @register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu)
    def _attention_cpu(q, k, v, *args, **kwargs):
        return sdpa_flop_count(q, k, v)


if _aten._scaled_dot_product_flash_attention_for_cpu_backward not in flop_registry:

    @register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _attention_cpu_backward(dout, q, k, v, *args, **kwargs):
        return sdpa_backward_flop_count(dout, q, k, v)
