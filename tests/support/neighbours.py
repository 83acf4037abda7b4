"""What the tests of merge_neighbours share: inputs, a run that names everything it gets, and the comparison."""

import torch

from support import layer_norm
from support.runs import differentiated
from support.tolerance import assert_as_good_as_plain

EPS = 1e-5
AXES = ("horizontal", "vertical")
#: (weights, sizes, norm): every kind, and every pair of them that touch
OPTIONS = (
    ("average", False, False),
    ("average", True, True),
    ("numbers", False, True),
    ("scalars", True, False),
    ("channels", False, True),
    ("channels", True, False),
    ("logits", False, False),
    ("logits", True, True),
)


def inputs(case, dtype, device, option):
    """x, and what its weights, sizes and norm are made of, in fp32 (sizes that no one else has, and one of 0)."""
    (B, H, W, C, prefix, _), (kind, sized, normed) = case, option
    tensors = {"x": torch.randn(B, prefix + H * W, C, device=device).to(dtype)}
    if kind in ("scalars", "channels"):
        count = 1 if kind == "scalars" else C
        tensors |= {"first": torch.rand(count, device=device) + 0.2, "second": torch.randn(count, device=device)}
    if kind == "logits":
        tensors["logits"] = torch.randn(B, H * W, device=device)
    if sized:
        tensors["sizes"] = torch.randint(1, 5, (B, H * W), device=device).float()
    if normed:
        tensors |= {"weight": torch.rand(C, device=device) + 0.5, "bias": torch.randn(C, device=device)}
    return tensors


def weights_of(given, kind):
    if kind == "numbers":
        return 0.25, 0.5
    if kind in ("scalars", "channels"):
        return given["first"], given["second"]
    return given.get("logits")


def run(function, tensors, case, axis, option, upstream=None):
    """Every result and every gradient, by name; the upstream gradients are random unless given."""

    def merged(t):
        norm, sizes = (t["weight"], t["bias"], EPS) if "weight" in t else None, t.get("sizes")
        weights, grid = weights_of(t, option[0]), (case.H, case.W)
        found = function(t["x"], grid, axis, weights, prefix=case.prefix, sizes=sizes, norm=norm)
        names = ["y", *["sizes"] * (sizes is not None), *["normed"] * (norm is not None)]
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    learned = [name for name in tensors if name != "sizes"]
    return differentiated(merged, tensors, learned, upstream)


def cancelling(tensors, upstream):
    """The size of what cancels in the gradients of logits and factors, and how often it was added up."""
    if tensors["x"].numel() == 0:
        return 0.0
    x = tensors["x"].double()
    dy = sum(t.double().abs().max() for n, t in upstream.items() if n != "sizes") * (10 if "normed" in upstream else 1)
    return float(dy * x.abs().sum(dim=2).max())


def compare(ours, plain, truth, cancels=0.0):
    """Sizes agree to the bit, sums to as much as plain PyTorch's do. Each is (results, gradients), the truth with the
    upstream gradients behind."""
    of_tokens, of_parameters = layer_norm.cancelling(truth[0]["y"], truth[2], EPS, ours[0]["y"].dtype)
    of_the_norm = {"dx": of_tokens, "dweight": of_parameters, "dbias": of_parameters}
    for name, expected in truth[0].items():
        assert ours[0][name].is_contiguous(), name
        if name == "sizes":
            assert torch.equal(ours[0][name], plain[0][name])
        else:
            assert_as_good_as_plain(ours[0][name], plain[0][name], expected, name)
    for name, expected in truth[1].items():
        extra = cancels if name in ("dlogits", "dfirst", "dsecond") else of_the_norm.get(name, 0.0)
        assert_as_good_as_plain(ours[1][name], plain[1][name], expected, name, extra)
