"""What the tests of bipartite merging share: inputs, runs that name everything they get, and the comparison."""

import torch

from support import layer_norm
from support.runs import differentiated
from support.tolerance import assert_as_good_as_plain
from tokenops import reference

NAN = float("nan")
EPS = 1e-5
#: (sizes, norm)
OPTIONS = ((False, False), (False, True), (True, False), (True, True))


def exact_metric(B, rows, D, prefix, device):
    """Cosines of these have no rounding, in any dtype and order of summation, and many are equal.

    Each row has 4^k entries that are not 0, all of one size, a power of two; those of the prefix are NaN.
    """
    count = max((n for n in (1, 4, 16, 64, 256) if n <= D), default=0)
    there = torch.rand(B, rows, D, device=device).argsort(dim=2) < count
    signs = torch.randint(0, 2, (B, rows, D), device=device) * 2.0 - 1
    lengths = 2.0 ** torch.randint(-2, 3, (B, rows, 1), device=device)
    metric = signs * there * lengths
    metric[:, :prefix] = NAN
    return metric


def random_metric(B, rows, D, prefix, r, dtype, device):
    """In which every choice is clear: no likeness that decides is closer to the next than fp32 can tell."""
    while True:
        metric = torch.randn(B, rows, D, device=device).to(dtype)
        unit = torch.nn.functional.normalize(metric[:, prefix:].double(), dim=2)
        even, odd = unit[:, prefix % 2 :: 2], unit[:, 1 - prefix % 2 :: 2]
        edges = (even @ odd.transpose(1, 2)).sort(dim=2, descending=True).values
        best = edges[:, :, 0].sort(dim=1, descending=True).values
        gaps = [-edges.diff(dim=2)[:, :, :1].flatten(), -best.diff(dim=1)[:, max(r - 1, 0) : r].flatten()]
        if not torch.cat(gaps).le(1e-5).any():
            return metric


def inputs(case, dtype, device, option):
    """x and the metric in `dtype`; sizes (some are 0) and the norm's weight and bias in fp32, as `option` says."""
    B, N, r, C, D, prefix, _ = case
    tensors = {
        "x": torch.randn(B, prefix + N, C, device=device).to(dtype),
        "metric": exact_metric(B, prefix + N, D, prefix, device).to(dtype),
    }
    if option[0]:
        tensors["sizes"] = torch.randint(0, 5, (B, prefix + N), device=device).float()
    if option[1]:
        tensors |= {"weight": torch.rand(C, device=device) + 0.5, "bias": torch.randn(C, device=device)}
    return tensors


def plain_merge(x, metric, r, *, prefix=1, sizes=None, norm=None):
    """What tokenops.merge_bipartite gives, of the reference: (tokens, index, sizes, log_sizes, normed)."""
    index = reference.match_bipartite(metric, r, prefix=prefix)
    tokens = index.shape[1] - r
    y, totals, logs, normed = reference.merge_bipartite(x, index, tokens, prefix=prefix, sizes=sizes, norm=norm)
    return y, index, totals, logs, normed


def run(function, tensors, r, prefix, upstream=None):
    """Every result of merge_bipartite and every gradient, by name; upstream gradients are random unless given."""

    def merged(t):
        norm = (t["weight"], t["bias"], EPS) if "weight" in t else None
        found = function(t["x"], t["metric"], r, prefix=prefix, sizes=t.get("sizes"), norm=norm)[:5]
        results = dict(zip(("tokens", "index", "sizes", "log_sizes", "normed"), found, strict=True))
        learned = ["tokens", "normed"] if norm is not None else ["tokens"]
        assert [name for name, t in results.items() if t is not None and t.requires_grad] == learned
        assert norm is not None or results["normed"] is None
        return results

    return differentiated(merged, tensors, ("x", "weight", "bias"), upstream)


def run_unmerge(function, y, index, prefix, upstream=None):
    """The result of unmerge_bipartite and its gradient, by name."""
    given = None if upstream is None else {"x": upstream}
    found = differentiated(lambda t: {"x": function(t["y"], index, prefix=prefix)}, {"y": y}, ("y",), given)
    return *found[:2], found[2]["x"]


def compare(ours, plain, truth):
    """Indices and sizes agree to the bit, sums to as much as plain PyTorch's do. Each is (results, gradients), the
    truth with the upstream gradients behind where there is a norm."""
    of_the_norm = {}
    if "dweight" in truth[1]:
        dtype = ours[0]["tokens"].dtype
        of_tokens, of_parameters = layer_norm.cancelling(truth[0]["tokens"], truth[2], EPS, dtype)
        of_the_norm = {"dx": of_tokens, "dweight": of_parameters, "dbias": of_parameters}
    for name, expected in (truth[0] | truth[1]).items():
        mine, theirs = (found[name] if name in found else grads[name] for found, grads in (ours[:2], plain[:2]))
        assert mine.is_contiguous(), name
        if name == "index":
            assert mine.dtype == torch.int64 and torch.equal(mine, expected)
        elif name == "sizes":
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        elif name == "log_sizes":  # -inf where a size is 0
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert_as_good_as_plain(mine, theirs, expected, name, of_the_norm.get(name, 0.0))
