"""Random calls: of every public operator one function that draws its arguments, options and layouts.

A call is made of an `api`, which is tokenops or the oracle: `invoke(api, tensors)` gives its results by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fuzz.draw import Draw

NAN, INF = float("nan"), float("inf")


@dataclass
class Call:
    operator: str
    tensors: dict[str, torch.Tensor]  # the same one may be there under two names
    invoke: Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    like: str  # the tensor whose dtype decides
    learned: tuple[str, ...]  # which the documentation says to be differentiable
    exact: tuple[str, ...] = ()  # results that are chosen or copied, or sums of small integers
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self):
        return self.tensors[self.like].dtype


def scale_of(draw, dtype, tensors):
    """A number, a learned tensor of any one-element shape, or nothing."""
    kind = draw.pick(("none", "number", "tensor"))
    if kind == "tensor":
        shape = draw.pick(((), (1,), (1, 1), (1, 1, 1)))
        tensors["scale"] = draw.floats(
            shape, draw.other(dtype), ("normal", "zeros") if draw.chance(0.2) else ("normal",)
        )
    return draw.pick((2, 0.5, -1.5, 0.0, 1)) if kind == "number" else None


def logits_of(draw, shape, dtype):
    w = draw.floats(shape, dtype, ("normal", "normal", "large", "ties", "zeros", "tiny"))
    if draw.chance(0.3):
        draw.say("-inf")
        draw.put(w, draw.uniform(*shape) < draw.pick((0.1, 0.6)), -INF)
    if draw.chance(0.1):
        draw.say("-inf for one")
        draw.put(w, draw.uniform(*shape[:-2], 1, shape[-1]) < 0.3, -INF)
        draw.put(w, draw.uniform(*shape[:-1], 1) < 0.1, -INF)
    return w


def soft_aggregate(draw: Draw) -> Call:
    B, N, M, C, dtype = draw.images(), draw.size(), draw.size(), draw.size(), draw.dtype()
    prefix = draw.pick((0, 0, 1, 2))
    tensors = {"x": draw.floats((B, prefix + N, C), dtype), "w": logits_of(draw, (B, N, M), draw.other(dtype))}
    factor = scale_of(draw, dtype, tensors)
    if draw.chance(0.4):
        tensors["mask"] = draw.lay(draw.uniform(B, N) < draw.pick((0.0, 0.5, 0.9)))
        if draw.chance(0.6):  # what is left out is not read
            draw.say("NaN masked")
            left_out = ~tensors["mask"].unsqueeze(-1)
            behind = torch.cat([left_out.new_zeros(B, prefix, 1), left_out], dim=1)
            draw.put(tensors["x"], behind, NAN), draw.put(tensors["w"], left_out, NAN)
    elif prefix == 0 and N and draw.chance(0.1):
        draw.say("x is w")
        tensors["x"] = tensors["w"] = draw.floats((B, N, M), dtype)

    def invoke(api, t):
        y = api.soft_aggregate(t["x"], t["w"], scale=t.get("scale", factor), mask=t.get("mask"), prefix=prefix)
        return {"y": y}

    return Call(
        "soft_aggregate", tensors, invoke, "x", ("x", "w", "scale"), options={"prefix": prefix, "scale": factor}
    )


def soft_scatter(draw: Draw) -> Call:
    B, N, M, C, dtype = draw.images(), draw.size(), draw.size(), draw.size(), draw.dtype()
    tensors = {"z": draw.floats((B, M, C), dtype), "w": logits_of(draw, (B, N, M), draw.other(dtype))}
    factor = scale_of(draw, dtype, tensors)
    if draw.chance(0.1):
        draw.say("z is w")
        tensors["z"] = tensors["w"] = draw.floats((B, M, M), dtype)

    def invoke(api, t):
        return {"y": api.soft_scatter(t["z"], t["w"], scale=t.get("scale", factor))}

    return Call("soft_scatter", tensors, invoke, "z", ("z", "w", "scale"), options={"scale": factor})


def token_mlp(draw: Draw) -> Call:
    B, M, R, N, C, dtype = draw.images(), draw.size(), draw.size(), draw.size(), draw.size(), draw.dtype()
    if draw.chance(0.1):
        B = 9  # more than the CPU takes together
    plain = ("normal", "ties", "tiny")
    tensors = {
        "z": draw.floats((B, M, C), dtype, plain),
        "w1": draw.floats((R, M), dtype, plain),
        "w2": draw.floats((N, R), dtype, plain),
    }
    if draw.chance(0.1) and M == R == N:
        draw.say("w1 is w2")
        tensors["w2"] = tensors["w1"]
    for name, rows in (("b1", R), ("b2", N)):
        if draw.chance(0.6):
            tensors[name] = draw.floats((rows,), dtype, plain)
    if "b1" in tensors and "b2" in tensors and R == N and draw.chance(0.5):
        tensors["b2"] = tensors["b1"]

    def invoke(api, t):
        return {"y": api.token_mlp(t["z"], t["w1"], t.get("b1"), t["w2"], t.get("b2"))}

    return Call("token_mlp", tensors, invoke, "z", ("z", "w1", "b1", "w2", "b2"))


def masked_channel_attention(draw: Draw) -> Call:
    B, H, dtype = draw.images(), draw.pick((1, 1, 2, 3)), draw.dtype()
    Nq, Nk = draw.size(), draw.size()
    Dk, Dv = draw.size(least=1, most=33), draw.size(least=1, most=33)
    if draw.chance(0.05):
        Dk = draw.pick((127, 128)) if draw.most > 20 else Dk
    kinds = ("normal", "normal", "ties", "tiny") + ("large",) * (dtype != torch.float16)
    if draw.chance(0.15):
        Nq, Dv = Nk, Dk
        q = draw.floats((B, H, Nk, Dk), dtype, kinds)
        draw.say("q is k is v")
        tensors = {"q": q, "k": q, "v": q if draw.chance(0.5) else draw.floats((B, H, Nk, Dk), dtype)}
    elif draw.chance(0.15):
        draw.say("packed")
        Nq, Dv = Nk, Dk
        packed = draw.floats((B, Nk, 3, H, Dk), dtype, kinds[:3]).permute(2, 0, 3, 1, 4)
        tensors = dict(zip("qkv", packed.unbind(0)))
    else:
        tensors = {
            "q": draw.floats((B, H, Nq, Dk), dtype, kinds),
            "k": draw.floats((B, H, Nk, Dk), dtype, kinds),
            "v": draw.floats((B, H, Nk, Dv), dtype),
        }
    same = tensors["q"] is tensors["k"]
    for name, width in (("qk_mask", Dk), ("v_mask", Dv)):
        if draw.chance(0.3):
            tensors[name] = draw.floats((H, width), draw.other(dtype), ("factors", "zeros", "normal"))
    if "qk_mask" in tensors and "v_mask" in tensors and Dk == Dv and draw.chance(0.3):
        tensors["v_mask"] = tensors["qk_mask"]
    beyond = torch.zeros(B, 1, Nk, 1, dtype=torch.bool)
    if draw.chance(0.35):
        lengths = [draw.pick((0, Nk, draw.random.randint(0, Nk))) for _ in range(B)]
        lengths = draw.ints(lengths).to(draw.pick((torch.int64, torch.int32)))
        tensors["key_lengths"] = lengths
        beyond = (torch.arange(Nk) >= lengths.unsqueeze(1))[:, None, :, None]
        if not same and draw.chance(0.6):
            draw.say("NaN beyond")
            draw.put(tensors["k"], beyond, NAN), draw.put(tensors["v"], beyond, NAN)
    if draw.chance(0.4):
        bias = draw.floats(
            (draw.pick((1, B)), draw.pick((1, H)), 1, Nk), draw.other(dtype), ("normal", "large", "zeros")
        )
        if draw.chance(0.6):
            draw.say("-inf")
            draw.put(bias, draw.uniform(*bias.shape) < draw.pick((0.2, 1.0)), -INF)
        if not same and draw.chance(0.5):
            draw.say("NaN keys of -inf")
            draw.put(tensors["k"], (bias == -INF).expand(B, H, 1, Nk).transpose(2, 3), NAN)
        tensors["key_bias"] = bias
    options = {
        "scale": draw.pick((None, None, 0.25, 1, -0.5)),
        "scores": draw.pick((None, "class", "received")) if Nq else None,
        "heads": draw.pick(("each", "mean")),
        "return_lse": draw.chance(0.5),
        "return_key_mean": draw.chance(0.3),
    }
    names = (
        "out",
        *(("scores",) if options["scores"] else ()),
        *(n for n in ("lse", "key_mean") if options[f"return_{n}"]),
    )

    def invoke(api, t):
        given = {name: value for name, value in t.items() if name not in "qkv"}
        found = api.masked_channel_attention(t["q"], t["k"], t["v"], **given, **options)
        assert isinstance(found, tuple) == (len(names) > 1)
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    learned = ("q", "k", "v", "qk_mask", "v_mask", "key_bias")
    return Call("masked_channel_attention", tensors, invoke, "q", learned, options=options)


NORMABLE = ("normal", "normal", "ties", "tiny")  # of large numbers that are equal nobody can say the variance


def norm_of(draw, normed, C, dtype, tensors):
    """How the result is normalized, if it is: what makes the argument `norm`."""
    if not normed:
        return lambda t: None
    eps = draw.pick((1e-5, 1e-6, 1e-2))
    if draw.chance(0.7):
        tensors["weight"] = draw.floats((C,), draw.other(dtype), ("normal", "factors", "zeros"))
    if draw.chance(0.7):
        tensors["bias"] = draw.floats((C,), draw.other(dtype), ("normal", "zeros"))
    if "weight" in tensors and "bias" in tensors and draw.chance(0.2):
        draw.say("weight is bias")
        tensors["bias"] = tensors["weight"]
    return lambda t: (t.get("weight"), t.get("bias"), eps)


def tokens_of(draw, shape, dtype, normed):
    return draw.floats(shape, dtype, NORMABLE) if normed else draw.floats(shape, dtype)


def poisoned_row(draw, x):
    """A token that is no number, which is to stay what it is, and alone."""
    if draw.chance(0.1):
        draw.say("a NaN token")
        draw.put(x, draw.uniform(*x.shape[:2], 1) < 0.2, NAN)


COMPANIONS = (torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8, torch.int32, torch.float64)


def companion(draw, dtype, B, N):
    values = draw.floats((B, N), torch.float64)
    return values.to(dtype) if dtype.is_floating_point else draw.lay((draw.uniform(B, N) * 100).to(dtype))


def select_tokens(draw: Draw) -> Call:
    B, N, C, dtype = draw.images(), draw.size(), draw.size(), draw.dtype()
    k = draw.pick((0, N, draw.random.randint(0, N), draw.random.randint(0, N)))
    prefix, rest = draw.pick((0, 1, 1, 2)), draw.pick(("none", "weighted", "mean"))
    options = {"prefix": prefix, "rest": rest, "normalize": draw.chance(0.5), "order": draw.pick(("score", "index"))}
    kinds = ("positive", "ties", "zeros") if rest == "weighted" else ("normal", "ties", "zeros", "huge", "tiny")
    normed = draw.chance(0.4)
    tensors = {"x": tokens_of(draw, (B, prefix + N, C), dtype, normed)}
    tensors["scores"] = draw.floats((B, N), draw.other(dtype), kinds)
    if rest != "weighted":
        if draw.chance(0.3):
            draw.say("special scores")
            draw.put(tensors["scores"], draw.uniform(B, N) < 0.3, draw.pick((NAN, INF, -INF, -0.0)))
            draw.put(tensors["scores"], draw.uniform(B, N) < 0.1, NAN)
        if rest == "none":
            poisoned_row(draw, tensors["x"])
    if draw.chance(0.3):
        tensors["counts"] = draw.ints([draw.pick((0, k, draw.random.randint(0, k))) for _ in range(B)])
    companions = [f"companion{i}" for i in range(draw.pick((0, 0, 1, 2, 4)))]
    for name in companions:
        tensors[name] = companion(draw, draw.pick(COMPANIONS), B, N)
    if len(companions) > 1 and draw.chance(0.3):
        draw.say("companions are the same")
        tensors[companions[1]] = tensors[companions[0]]
    if companions and draw.chance(0.2):
        draw.say("the scores go along")
        tensors[companions[0]] = tensors["scores"]
    norm = norm_of(draw, normed, C, dtype, tensors)

    def invoke(api, t):
        along = tuple(t[name] for name in companions)
        found = api.select_tokens(
            t["x"], t["scores"], k, counts=t.get("counts"), companions=along, norm=norm(t), **options
        )
        assert found._fields[:5] == ("tokens", "index", "companions", "normed", "lengths")
        assert all(t is None for t in found[5:])  # what packed sequences have besides
        results = {**found._asdict(), **dict(zip(companions, found.companions, strict=True))}
        return {name: t for name, t in results.items() if t is not None and name != "companions"}

    exact = ("index", "lengths", *companions, *(("tokens",) if rest == "none" else ()))
    learned = ("x", "scores", "weight", "bias", *companions)
    return Call("select_tokens", tensors, invoke, "x", learned, exact, options={"k": k, **options})


def restore_tokens(draw: Draw) -> Call:
    B, N, C, dtype = draw.images(), draw.size(), draw.size(), draw.dtype()
    prefix, carried = draw.pick((0, 1, 1, 2)), draw.chance(0.4)
    k = draw.random.randint(0, N)
    index = [draw.random.sample(range(N), k) for _ in range(B)]
    index = [[-1 if draw.chance(0.15) else i for i in row] for row in index] if draw.chance(0.4) else index
    tensors = {"base": draw.floats((B, prefix + N, C), dtype)}
    if draw.chance(0.1):
        draw.say("base is tokens")
        tensors["tokens"], index = tensors["base"], [draw.random.sample(range(N), N) for _ in range(B)]
        k = N
    else:
        tensors["tokens"] = draw.floats((B, prefix * carried + k, C), dtype)
        poisoned_row(draw, tensors["tokens"]), poisoned_row(draw, tensors["base"])
    tensors["index"] = draw.ints(torch.tensor(index, dtype=torch.int64).reshape(B, k))
    pairs = None if draw.chance(0.4) else draw.pick((0, 1, 2, 4))
    for i in range(pairs or 0):
        of = draw.pick(COMPANIONS)
        tensors[f"old{i}"], tensors[f"new{i}"] = companion(draw, of, B, N), companion(draw, of, B, k)
        if k == N and draw.chance(0.5):
            tensors[f"new{i}"] = tensors[f"old{i}"]

    def invoke(api, t):
        given = None if pairs is None else tuple((t[f"old{i}"], t[f"new{i}"]) for i in range(pairs))
        found = api.restore_tokens(t["base"], t["tokens"], t["index"], prefix=prefix, companions=given)
        if pairs is None:
            return {"y": found}
        return {"y": found[0], **{f"companion{i}": c for i, c in enumerate(found[1])}}

    learned = ("base", "tokens", *(f"{name}{i}" for i in range(pairs or 0) for name in ("old", "new")))
    exact = ("y", *(f"companion{i}" for i in range(pairs or 0)))
    return Call("restore_tokens", tensors, invoke, "base", learned, exact, options={"prefix": prefix, "pairs": pairs})


def merge_neighbours(draw: Draw) -> Call:
    B, H, W, C, dtype = draw.images(), draw.size(most=17), draw.size(most=9), draw.size(), draw.dtype()
    prefix, axis, normed = draw.pick((0, 1, 1, 2)), draw.pick(("horizontal", "vertical")), draw.chance(0.4)
    tensors = {"x": tokens_of(draw, (B, prefix + H * W, C), dtype, normed)}
    kind = draw.pick(("none", "numbers", "tensors", "mixed", "logits", "logits"))
    number = draw.pick((0.25, 1, -0.5))
    if kind == "logits":
        tensors["logits"] = logits_of(draw, (B, H * W), draw.other(dtype))
    if kind in ("tensors", "mixed"):
        for name in ("first", "second")[: 2 if kind == "tensors" else 1]:
            tensors[name] = draw.floats(draw.pick(((C,), (1,), ())), draw.other(dtype), ("normal", "factors"))
        if kind == "tensors" and draw.chance(0.3):
            draw.say("first is second")
            tensors["second"] = tensors["first"]
    if draw.chance(0.4):
        tensors["sizes"] = draw.sizes((B, H * W), draw.other(dtype))
        if kind == "logits" and draw.chance(0.2):
            draw.say("logits are sizes")
            tensors["logits"] = tensors["sizes"]
    norm = norm_of(draw, normed, C, dtype, tensors)
    if kind == "none":
        poisoned_row(draw, tensors["x"])
    given = {"none": None, "numbers": (0.3, number)}

    def invoke(api, t):
        weights = t["logits"] if kind == "logits" else given.get(kind, (t.get("first"), t.get("second", number)))
        found = api.merge_neighbours(t["x"], (H, W), axis, weights, prefix=prefix, sizes=t.get("sizes"), norm=norm(t))
        names = ["y", *["merged"] * ("sizes" in t), *["normed"] * (norm(t) is not None)]
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    learned = ("x", "logits", "first", "second", "weight", "bias")
    options = {"grid": (H, W), "axis": axis, "prefix": prefix, "weights": kind}
    return Call("merge_neighbours", tensors, invoke, "x", learned, ("merged",), options=options)


def unmerge_neighbours(draw: Draw) -> Call:
    B, H, W, C, dtype = draw.images(), draw.size(most=17), draw.size(most=9), draw.size(), draw.dtype()
    merges = tuple(draw.pick(("horizontal", "vertical")) for _ in range(draw.pick((0, 1, 2, 3))))
    small = -(-H // 2 ** merges.count("vertical")) * -(-W // 2 ** merges.count("horizontal"))
    prefix, mode = draw.pick((0, 1, 2)), draw.pick(("repeat", "bilinear"))
    tensors = {"x": draw.floats((B, prefix + small, C), dtype)}

    def invoke(api, t):
        return {"y": api.unmerge_neighbours(t["x"], (H, W), merges, prefix=prefix, mode=mode)}

    options = {"grid": (H, W), "merges": merges, "prefix": prefix, "mode": mode}
    return Call("unmerge_neighbours", tensors, invoke, "x", ("x",), ("y",) if mode == "repeat" else (), options=options)
