"""Rows to sum up, and how the sums are compared."""

import torch

from support.layer_norm import cancelling
from support.runs import differentiated
from support.tolerance import assert_as_good_as_plain

# T rows go to M places, C channels; where to is made of a kind

KINDS = {
    "anywhere": lambda T, M: torch.randint(-2, M + 2, (T,)),
    "alone": lambda T, M: torch.randperm(max(T, M))[:T],
    "long": lambda T, M: torch.where(torch.rand(T) < 0.8, M // 2, torch.randint(-1, max(M, 1), (T,))),
    "one": lambda T, M: torch.zeros(T, dtype=torch.int64),
}
CASES = [
    (20, 7, 16, "anywhere"),
    (1, 1, 1, "one"),
    (33, 40, 37, "alone"),
    (300, 3, 5, "long"),
    (700, 5, 140, "long"),
    (256, 1, 8, "one"),
    (0, 3, 4, "anywhere"),
    (5, 0, 4, "anywhere"),
    (5, 3, 0, "anywhere"),
]
#: weighted, mean, norm
OPTIONS = ((False, False, False), (True, False, True), (True, True, False), (False, True, True), (True, True, True))
EPS = 1e-5


def inputs(T, M, C, kind, option, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {"x": torch.randn(T, 2 * C, device=device).to(dtype)[:, ::2], "dest": KINDS[kind](T, M).to(device)}
    tensors["x"] = tensors["x"].masked_fill(((tensors["dest"] < 0) | (tensors["dest"] >= M)).unsqueeze(1), float("nan"))
    if option[0]:
        tensors["weight"] = (torch.rand(T, device=device) + 0.1).to(wide)
    if option[2]:
        tensors |= {"factor": (torch.rand(C, device=device) + 0.5).to(dtype), "bias": torch.randn(C, device=device)}
    return tensors


def run(function, tensors, M, mean, upstream=None):
    def summed(t):
        norm = (t["factor"], t["bias"], EPS) if "factor" in t else None
        y, totals, normed = function(t["x"], t["dest"], M, weight=t.get("weight"), mean=mean, norm=norm)
        return {"tokens": y, "totals": totals.detach(), "normed": normed}

    return differentiated(summed, tensors, ("x", "weight", "factor", "bias"), upstream)


def compare(ours, plain, truth, tensors):
    of_tokens, of_parameters = cancelling(truth[0]["tokens"], truth[2], EPS, tensors["x"].dtype)
    extra = {"dx": of_tokens, "dfactor": of_parameters, "dbias": of_parameters}
    if "dweight" in truth[1] and tensors["x"].numel():  # <x, dy> - <y, dy>
        upstream = sum(
            d.double().norm(dim=1).max() for n, d in truth[2].items() if n in ("tokens", "normed") and len(d)
        )
        x = tensors["x"].double().nan_to_num().norm(dim=1).max()
        extra["dweight"] = 10 * float(x * upstream / tensors["weight"].min())
    for name in truth[0] | truth[1]:
        mine, theirs, right = ((found[0] | found[1])[name] for found in (ours, plain, truth))
        assert mine.is_contiguous(), name
        if name == "dweight":  # what cancels altogether
            right = right.masked_fill(right.abs() <= 1e-14 * extra.get(name, 0.0), 0.0)
        assert_as_good_as_plain(mine, theirs, right, name, extra.get(name, 0.0))
