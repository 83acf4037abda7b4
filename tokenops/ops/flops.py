"""Teaches torch.utils.flop_counter our operators (matrix products only, two FLOPs a multiply-add, as it counts).

Imported as soon as tokenops and that module both are (counted.py), so that a count does not depend on what was
counted before.
"""

import torch
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


@register_flop_formula(_ops.masked_channel_attention_fwd)
def _masked_channel_attention_fwd(q, k, v, *args, **kwargs):
    return 2 * _attention(q, k, v, args[8:10], 1, 1)


@register_flop_formula(_ops.masked_channel_attention_bwd)
def _masked_channel_attention_bwd(dout, dscores, dlse, q, k, v, *args, **kwargs):
    # three products with the keys' width (the logits again, dq, dk), two with the values' (dP, dv)
    return 2 * _attention(q, k, v, args[-2:], 3, 2)


def _attention(q, k, v, packed, of_keys, of_values):
    """Multiply-adds of so many products with either width; all three may be side by side in q."""
    if k is not None:
        return q[0] * q[1] * q[2] * k[2] * (of_keys * q[3] + of_values * v[3])
    wide = packed[0] * packed[1]
    return q[0] * q[1] * q[1] * (of_keys * wide + of_values * (q[2] - 2 * wide))


@register_flop_formula(_ops.match_bipartite_fwd)
def _match_bipartite_fwd(metric, r, prefix, *args, **kwargs):
    b, rows, d = metric
    n = rows - prefix
    return 2 * b * (n // 2) * (n - n // 2) * d if r else 0


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
