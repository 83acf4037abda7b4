"""What the tests of select_tokens share: inputs, a run that names everything it gets, and the comparison."""

import torch

from support.layer_norm import cancelling
from support.runs import differentiated
from support.tolerance import assert_as_good_as_plain

EPS = 1e-5
#: (rest, normalize, order, counts, norm): every option, and every pair of them that touch
OPTIONS = (
    ("none", True, "score", False, False),
    ("none", True, "index", True, True),
    ("weighted", True, "index", False, True),
    ("weighted", True, "score", True, False),
    ("weighted", False, "index", False, False),
    ("mean", True, "score", True, True),
    ("mean", True, "index", False, False),
)


def inputs(case, dtype, score_dtype, device, counts, norm):
    """x, scores (many of them equal), two companions, counts (an empty and a full image) and the norm's parameters."""
    B, N, k, C, prefix, _ = case
    tensors = dict(
        x=torch.randn(B, prefix + N, C, device=device).to(dtype),
        scores=((torch.rand(B, N, device=device) * 4 * N).round() / (4 * N + 1)).to(score_dtype),
        size=torch.rand(B, N, device=device).to(dtype),
        source=torch.arange(N, device=device).expand(B, N),
    )
    if counts:
        counts = [0, k, (k + 1) // 2][:B] if B > 1 else [(k + 1) // 2] * B
        tensors["counts"] = torch.tensor(counts, dtype=torch.int64, device=device)
    if norm:
        tensors |= dict(weight=torch.rand(C, device=device) + 0.5, bias=torch.randn(C, device=device))
    return tensors


def run(function, tensors, k, prefix, option, upstream=None):
    """Every result and every gradient, by name; the upstream gradients are random unless given."""
    rest, normalize, order, *_ = option

    def chosen(t):
        tokens, index, (size, source), normed, lengths = function(
            t["x"], t["scores"], k, prefix=prefix, rest=rest, normalize=normalize, order=order, counts=t.get("counts"),
            companions=(t["size"], t["source"]), norm=(t["weight"], t["bias"], EPS) if "weight" in t else None,
        )[:5]  # fmt: skip
        return dict(tokens=tokens, size=size, normed=normed, index=index, source=source, lengths=lengths)

    learned = ("x", "scores", "size", "weight", "bias")
    return differentiated(chosen, tensors, learned, upstream)


def terms(tensors, truth, upstream, prefix):
    """The size of what cancels in the gradient of normalised weights: <drest, x> / their sum, where that is one."""
    x, scores = tensors["x"].double()[:, prefix:], tensors["scores"].double()
    out = torch.ones_like(scores, dtype=torch.bool)
    for image, index in zip(out, truth[0]["index"]):
        image[index[index >= 0]] = False
    total = (scores * out).sum(dim=1).abs()
    drest = upstream["tokens"].double().abs().amax(dim=(1, 2))
    if "normed" in upstream:
        drest = drest + upstream["normed"].double().abs().amax(dim=(1, 2)) * 10
    size = (drest * x.abs().sum(dim=2).amax(dim=1) / total)[out.any(dim=1)]
    return float(size.max()) if size.numel() else 0.0


def compare(ours, plain, truth, cancels=0.0):
    """Choices and copies agree to the bit, sums to as much as plain PyTorch's do. Each is (results, gradients), the
    truth with the upstream gradients behind."""
    dtype = ours[0]["tokens"].dtype
    of_tokens, of_parameters = cancelling(truth[0]["tokens"], truth[2], EPS, dtype)
    for name in ("index", "source", "lengths", "size"):
        assert (name in ours[0]) == (name in plain[0])
        if name in ours[0]:
            assert ours[0][name].dtype == plain[0][name].dtype and torch.equal(ours[0][name], plain[0][name]), name
    for name in ("tokens", "normed"):
        if name in plain[0]:
            assert ours[0][name].is_contiguous()
            assert_as_good_as_plain(ours[0][name], plain[0][name], truth[0][name], name)
    for name, expected in truth[1].items():
        extra = {"dx": of_tokens, "dweight": of_parameters, "dbias": of_parameters}.get(name, 0.0)
        if name == "dscores":  # rounded as x is, or as the scores are where that is coarser
            finer = torch.finfo(ours[0]["tokens"].dtype).eps / torch.finfo(ours[1][name].dtype).eps
            extra = cancels * max(1.0, finer)
            expected = expected.masked_fill(expected.abs() <= 1e-14 * cancels, 0.0)
        if expected.numel() and ours[1][name].dtype == torch.float64:  # the truth's own rounding is as large
            extra += 8 * float(expected.abs().max())
        assert_as_good_as_plain(ours[1][name], plain[1][name], expected, name, extra)
