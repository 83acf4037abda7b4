"""Random calls of bipartite merging, whose matching is drawn so that there is one answer."""

import torch

from fuzz.calls import NAN, Call, norm_of, poisoned_row, tokens_of
from fuzz.draw import Draw
from support.bipartite import exact_metric, random_metric


def metric_of(draw, B, rows, prefix, r, dtype):
    """Likenesses without rounding, many of them equal; or such that every choice is clear; with what is no number."""
    torch.manual_seed(draw.random.getrandbits(60))
    D = draw.size(least=1)
    if draw.chance(0.4) and D > 1 and rows < 20 and B and most_merged(rows, prefix):
        return draw.lay(random_metric(B, rows, D, prefix, r, dtype, "cpu"), ())
    metric = exact_metric(B, rows, D, prefix, "cpu").double()
    if draw.chance(0.3):
        draw.say("large or small metric")
        power = {torch.float16: 3, torch.bfloat16: 100, torch.float32: 100, torch.float64: 900}[dtype]
        metric = metric * 2.0 ** draw.pick((power, -power))
    if draw.chance(0.2):
        draw.say("no number in the metric")
        metric = metric.masked_fill(draw.uniform(B, rows, 1) < 0.2, draw.pick((NAN, 0.0)))
    return draw.lay(metric.to(dtype), (0, 1))


def most_merged(rows, prefix):
    even = len([n for n in range(prefix, rows) if n % 2 == 0])
    return even if even < rows - prefix else 0


def rows_of(draw):
    prefix = draw.pick((0, 1, 1, 2))
    rows = prefix + draw.size(most=33)
    most = most_merged(rows, prefix)
    return prefix, rows, draw.pick((0, most, draw.random.randint(0, most)))


def match_bipartite(draw: Draw) -> Call:
    B, (prefix, rows, r), dtype = draw.images(), rows_of(draw), draw.dtype()
    tensors = {"metric": metric_of(draw, B, rows, prefix, r, dtype)}

    def invoke(api, t):
        return {"index": api.match_bipartite(t["metric"], r, prefix=prefix)}

    return Call("match_bipartite", tensors, invoke, "metric", (), ("index",), options={"r": r, "prefix": prefix})


def merge_bipartite(draw: Draw) -> Call:
    B, (prefix, rows, r), C, dtype = draw.images(), rows_of(draw), draw.size(), draw.dtype()
    tensors = {"metric": metric_of(draw, B, rows, prefix, r, draw.other(dtype))}
    normed = draw.chance(0.4)
    tensors["x"] = tokens_of(draw, (B, rows, C), dtype, normed)
    if not prefix and not normed and draw.chance(0.1) and tensors["metric"].isfinite().all():
        draw.say("x is the metric")
        tensors["x"], C = tensors["metric"], tensors["metric"].shape[2]
    elif draw.chance(0.4):
        tensors["sizes"] = draw.sizes((B, rows), draw.other(dtype))
    else:
        poisoned_row(draw, tensors["x"])
    norm = norm_of(draw, normed, C, dtype, tensors)

    def invoke(api, t):
        found = api.merge_bipartite(t["x"], t["metric"], r, prefix=prefix, sizes=t.get("sizes"), norm=norm(t))
        names = "tokens", "index", "sizes", "log_sizes", "normed"
        assert found._fields[:5] == names and all(not t for t in found[5:])  # what packed sequences have besides
        return {name: value for name, value in zip(names, found) if value is not None}

    options = {"r": r, "prefix": prefix}
    return Call("merge_bipartite", tensors, invoke, "x", ("x", "weight", "bias"), ("index", "sizes"), options=options)


def unmerge_bipartite(draw: Draw) -> Call:
    B, N, C, dtype = draw.images(), draw.size(), draw.size(), draw.dtype()
    M, prefix = draw.size(least=1), draw.pick((0, 1, 2))
    index = torch.tensor([[draw.random.randrange(M) for _ in range(N)] for _ in range(B)], dtype=torch.int64)
    tensors = {"y": draw.floats((B, prefix + M, C), dtype), "index": draw.lay(index.reshape(B, N))}
    poisoned_row(draw, tensors["y"])

    def invoke(api, t):
        return {"x": api.unmerge_bipartite(t["y"], t["index"], prefix=prefix)}

    return Call("unmerge_bipartite", tensors, invoke, "y", ("y",), ("x",), options={"prefix": prefix})


def tome(draw: Draw) -> Call:
    B, N, C, dtype = draw.images(), draw.size(most=33), draw.size(), draw.dtype()
    class_token, distill_token = draw.pick(((False, False), (True, False), (True, True)))
    prefix = class_token + distill_token
    N = max(N, prefix)
    r = draw.pick((-1, 0, 1, 2, N, draw.random.randint(0, N)))
    most = max(0, min(r, (N - prefix) // 2))
    tensors = {"metric": metric_of(draw, B, N, prefix, most, draw.other(dtype)), "x": draw.floats((B, N, C), dtype)}
    if draw.chance(0.4):
        tensors["size"] = draw.sizes((B, N, 1), draw.other(dtype))
    if draw.chance(0.3):
        tensors["source"] = draw.sizes((B, N, draw.size()), torch.float32)

    def invoke(api, t):
        merge, unmerge = api.tome.bipartite_soft_matching(t["metric"], r, class_token, distill_token)
        x, size = api.tome.merge_wavg(merge, t["x"], t.get("size"))
        results = {
            "x": x,
            "size": size,
            "unmerged": unmerge(x),
            "mean": merge(t["x"]),
            "sum": merge(t["x"], mode="sum"),
        }
        return results | {"source": api.tome.merge_source(merge, t["x"], t.get("source"))}

    options = {"r": r, "class_token": class_token, "distill_token": distill_token}
    return Call("tome", tensors, invoke, "x", ("x", "source"), ("size", "source"), options=options)
