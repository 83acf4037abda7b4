"""Packed sequences to merge, and the loop over them that says what is right."""

import torch

from support.bipartite import exact_metric
from support.packed_selection import boundaries
from support.runs import differentiated
from tokenops import reference
from tokenops.ops.merge_bipartite import most_merged

NAN = float("nan")
EPS = 1e-5
NAMES = ("tokens", "index", "sizes", "log_sizes", "normed", "companions", "cu_seqlens")


def packed_metric(lengths, D, prefix, dtype, device, slack=3):
    """Exact cosines (support/bipartite.py); prefix rows and slack are NaN."""
    parts = [exact_metric(1, n, D, min(prefix, n), device)[0] for n in lengths]
    return torch.cat([*parts, torch.full((slack, D), NAN, device=device)]).to(dtype)


def inputs(lengths, C, D, prefix, dtype, device, sized, normed, slack=3):
    """x and the metric in `dtype`, sizes (some are 0), two companions, the norm's weight and bias; slack is NaN."""
    T = sum(lengths) + slack
    tensors = {
        "x": torch.randn(T, 2 * C, device=device).to(dtype)[:, ::2],
        "metric": packed_metric(lengths, D, prefix, dtype, device, slack),
        "row": torch.randn(T, device=device),
        "table": torch.randn(T, 6, device=device).to(dtype),
    }
    if sized:
        tensors["sizes"] = torch.randint(0, 5, (T,), device=device).float()
    for name, tensor in tensors.items():
        if name != "metric":
            tensor[T - slack :] = NAN
    if normed:
        tensors |= {"weight": torch.rand(C, device=device) + 0.5, "bias": torch.randn(C, device=device)}
    return tensors


def count_of(r, s, n, prefix):
    """How many are merged of sequence s, which has n rows."""
    return min(int(r[s]) if isinstance(r, torch.Tensor) else r, most_merged(n, min(prefix, n)))


def loop(x, metric, r, lengths, *, prefix=1, sizes=None, norm=None, companions=(), capacity=None):
    """Every sequence by the reference of images, as `merge_bipartite` gives it of packed ones."""
    rows = x.shape[0] if capacity is None else capacity
    parts, followers, index, ends, begin = [], [[] for _ in companions], [], [0], 0
    for s, n in enumerate(lengths):
        piece, head, left = slice(begin, begin + n), min(prefix, n), n - min(prefix, n) - count_of(r, s, n, prefix)
        of_sizes = None if sizes is None else sizes[None, piece]
        goes = reference.match_bipartite(metric[None, piece], n - head - left, prefix=head)

        def merged(t, norm=None, goes=goes, left=left, head=head, of_sizes=of_sizes, piece=piece):
            wide = t.unsqueeze(-1) if t.dim() == 1 else t
            found = reference.merge_bipartite(wide[None, piece], goes, left, prefix=head, sizes=of_sizes, norm=norm)
            return [None if part is None else part[0] for part in found]

        parts.append(merged(x, norm))
        for follower, companion in zip(followers, companions):
            follower.append(merged(companion)[0].reshape(-1, *companion.shape[1:]))
        ahead = torch.arange(head, device=x.device)
        index += [ends[-1] + torch.cat((ahead, head + goes[0]))]
        ends.append(ends[-1] + head + left)
        begin += n

    def together(pieces, width, dtype, value=0.0):
        whole = torch.cat([torch.zeros(0, *width, dtype=dtype, device=x.device), *pieces])
        padding = torch.full((rows - whole.shape[0], *width), value, dtype=dtype, device=x.device)
        return torch.cat((whole, padding))

    wide = reference.accumulation_dtype(x.dtype)
    tokens, totals = together([p[0] for p in parts], x.shape[1:], x.dtype), together([p[1] for p in parts], (), wide)
    normed = None
    if norm is not None:  # that of a row of zeros is the bias
        normed = torch.cat((*[p[3] for p in parts], norm[1].to(x.dtype).expand(rows - ends[-1], -1)))
    carried = tuple(together(f, c.shape[1:], c.dtype) for f, c in zip(followers, companions))
    slack = torch.full((x.shape[0] - begin,), -1, device=x.device)
    found = tokens, torch.cat([*index, slack]), totals, totals.log(), normed, carried
    return *found, torch.tensor(ends, dtype=torch.int32, device=x.device)


def run(function, tensors, upstream=None):
    """Every result and every gradient by name, of `function` of (x, metric, sizes=, norm=, companions=)."""

    def merged(t):
        norm = (t["weight"], t["bias"], EPS) if "weight" in t else None
        companions = tuple(t[name] for name in ("row", "table"))
        found = function(t["x"], t["metric"], sizes=t.get("sizes"), norm=norm, companions=companions)
        results = dict(zip(NAMES, found, strict=True))
        row, table = results.pop("companions")
        return results | {"row": row.unsqueeze(1), "table": table}

    return differentiated(merged, tensors, ("x", "row", "table", "weight", "bias"), upstream)


__all__ = ["EPS", "NAN", "boundaries", "count_of", "inputs", "loop", "packed_metric", "run"]
