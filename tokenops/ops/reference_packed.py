"""The specification of what works on rows without images, those of packed sequences, in plain PyTorch.

Notation: T rows, M rows of a result, C channels, S sequences.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import accumulation_dtype, keeps_dtypes, layer_norm


@keeps_dtypes
def sum_rows(
    x: Tensor,
    dest: Tensor,
    rows: int,
    *,
    weight: Tensor | None = None,
    mean: bool = False,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y[m] = the sum of weight[n] * x[n] over all n with dest[n] = m, (M,C), M = rows; or divided by the weights' sum.

    Also: the sums of the weights (M,), and the layer norm of y. A row whose dest is outside 0..M-1 is not looked at. A
    sum of weights of exactly 0 divides by 1. weight (T,) has the accumulation dtype; None: 1.
    """
    wide = accumulation_dtype(x.dtype)
    inside = (dest >= 0) & (dest < rows)
    place = torch.where(inside, dest, rows)
    shares = inside.to(wide) if weight is None else torch.where(inside, weight, 0.0)
    values = x.to(wide).masked_fill(~inside.unsqueeze(1), 0.0) * shares.unsqueeze(1)
    totals = shares.new_zeros(rows + 1).index_add(0, place, shares)[:rows]
    y = values.new_zeros(rows + 1, x.shape[1]).index_add(0, place, values)[:rows]
    if mean:
        y = y / totals.masked_fill(totals == 0, 1.0).unsqueeze(1)
    y = y.to(x.dtype)
    return y, totals, None if norm is None else layer_norm(y, norm, wide)


@keeps_dtypes
def gather_rows(y: Tensor, dest: Tensor) -> Tensor:
    """x[n] = y[dest[n]], (T,C), 0 where dest is outside: the transpose of `sum_rows`."""
    rows = y.shape[0]
    place = torch.where((dest >= 0) & (dest < rows), dest, rows)
    return torch.cat((y, y.new_zeros(1, y.shape[1]))).index_select(0, place)


def replaced_rows(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """(T,E) with row index[j] replaced by new[j], (K,E); an index outside replaces nothing, the last of equals wins."""
    if index.shape[0] == 0:
        return old.clone()
    owner = owners(index, old.shape[0])
    return torch.where((owner >= 0).unsqueeze(1), new.index_select(0, owner.clamp(min=0)), old)


@keeps_dtypes
def masked_channel_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[Tensor, Tensor], key_bias: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, ...]:
    """`reference.masked_channel_attention` of each of the sequences that are the rows of one image, q (1,H,T,D).

    The boundaries are (S+1,) of queries and of keys. Rows of no sequence give zeros, and -inf as log-sum-exp; the keys
    of a sequence without queries a score of 0.
    """
    wide = accumulation_dtype(q.dtype)
    scores, lse, key_mean = (options.pop(name) for name in ("scores", "return_lse", "return_key_mean"))
    of_heads = (1,) if options["heads"] == "mean" else q.shape[:2]
    of_q, of_k = (b.tolist() for b in boundaries)
    found: list[list[Tensor]] = [[], [], [], []]
    for m, m_end, n, n_end in zip(of_q, of_q[1:], of_k, of_k[1:]):
        bias = None if key_bias is None else key_bias[..., n:n_end]
        out, *received, logs, mean = reference.masked_channel_attention(
            q[:, :, m:m_end], k[:, :, n:n_end], v[:, :, n:n_end], key_bias=bias, scores=scores if m_end > m else None,
            return_lse=True, return_key_mean=True, **options,
        )  # fmt: skip
        received = received or [q.new_zeros(*of_heads, n_end - n, dtype=wide)]  # of no query
        for results, result in zip(found, (out, *received, logs, mean)):
            results.append(result)
    m, n = q.shape[2] - of_q[-1], k.shape[2] - of_k[-1]
    found[0].append(q.new_zeros(*q.shape[:2], m, v.shape[3]))
    found[1].append(q.new_zeros(*of_heads, n, dtype=wide))
    found[2].append(q.new_full((*q.shape[:2], m), float("-inf"), dtype=wide))
    found[3].append(k.new_zeros(1, n, k.shape[3]))
    dims = (2, -1, 2, 1)
    asked = (True, scores is not None, lse, key_mean)
    results = [torch.cat(parts, dim=dim) for parts, dim, wanted in zip(found, dims, asked) if wanted]
    return results[0] if len(results) == 1 else tuple(results)


def owners(index: Tensor, rows: int) -> Tensor:
    """Which entry of index (K,) has each of so many rows, the last of equals, -1 for none: (rows,)."""
    place = torch.where((index >= 0) & (index < rows), index, rows)
    token = torch.arange(index.shape[0], device=index.device)
    return torch.full((rows + 1,), -1, device=index.device).scatter_reduce(0, place, token, "amax")[:rows]
