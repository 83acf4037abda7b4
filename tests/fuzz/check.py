"""One call, in one way, on one backend, against the oracle: results, gradients, inputs left as they were."""

import contextlib
import zlib

import torch

import tokenops
from fuzz import oracle, ways
from fuzz.draw import Draw
from fuzz.operators import CALLS
from fuzz.rounding import Rounding
from support.tolerance import FACTOR, MADE

#: how often each way of calling is taken
WAYS = {"eager": 50, "backward": 10, "functional": 10, "no_grad": 8, "inference": 4, "autocast": 5}
WAYS |= {"vmap": 6, "vmap of grad": 7, "twice": 5}
DRAWS = 2  # of rounding errors


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def double(tensors):
    made = {id(t): t.detach().double() if t.is_floating_point() else t for t in tensors.values()}
    return {name: made[id(t)] for name, t in tensors.items()}


def bits(tensors):
    """Every byte of every storage, what lies between and around the elements too."""
    kept = {}
    for t in tensors.values():
        storage = t.untyped_storage()
        kept[storage._cdata] = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
    return kept


class Check:
    """Drawn from `seed`; `run` raises AssertionError, or whatever the operator raises."""

    def __init__(self, backend, operator, seed, most=65, way=None):
        self.backend, self.operator, self.seed = backend, operator, seed
        self.draw = Draw(f"{operator}:{seed}", most)
        self.call = CALLS[operator](self.draw)
        self.way = way or self.draw.random.choices(list(WAYS), list(WAYS.values()))[0]
        learned = [n for n in self.call.learned if n in self.call.tensors]
        learned = [n for n in learned if self.call.tensors[n].is_floating_point()]
        self.subset = learned if self.draw.chance(0.6) else [n for n in learned if self.draw.chance(0.5)]
        # a tensor under two names is one leaf
        self.subset = [
            n for n in self.call.tensors if any(self.call.tensors[n] is self.call.tensors[m] for m in self.subset)
        ]

    def __str__(self):
        call = self.call
        tensors = [
            f"  {n}: {str(t.dtype)[6:]} {tuple(t.shape)} strides {t.stride()}" + " gradient" * (n in self.subset)
            for n, t in call.tensors.items()
        ]
        said = f"{self.operator} on {self.backend}, {self.way}, {call.options}, {' '.join(self.draw.said)}"
        return "\n".join([said, *tensors])

    def truth(self, tensors, upstream, mode=None):
        given = double(tensors)
        with mode or contextlib.nullcontext():
            way = ways.twice if self.way == "twice" else ways.eager
            results, gradients = way(self.call, oracle, given, self.subset, upstream)
        orders = ("", "second ") if self.way == "twice" else ("",)
        zeros = {order + n: torch.zeros_like(given[n]) for n in self.subset for order in orders}
        return results, zeros | {n: g for n, g in gradients.items() if g is not None}

    def run(self):
        self.prepare()
        before = bits(self.call.tensors)
        with tokenops.use_backend(self.backend):
            found = self.ours()
        assert bits(self.call.tensors) == before, "an input, or what lies beside it, was changed"
        self.judge(found)

    def prepare(self):
        """The upstream gradients, of what is differentiable."""
        call, self.given = self.call, {}
        for name, result in self.truth(call.tensors, {})[0].items():
            if name not in call.exact or name in ("tokens", "y", "x") or name.startswith("companion"):
                if result.is_floating_point() and self.draw.chance(0.85):
                    self.given[name] = self.upstream(result.shape)

    def ours(self):
        """(results, gradients) of the call, or of each sample: on whatever backend runs."""
        call, tensors, self.names = self.call, self.call.tensors, []
        if not self.way.startswith("vmap"):
            return [ways.WAYS[self.way](call, tokenops, tensors, self.subset, self.given)]
        names = [n for n in tensors if self.draw.chance(0.6)] or list(tensors)[:1]
        self.names = [n for n in tensors if any(tensors[n] is tensors[m] for m in names)]
        count = self.draw.pick((1, 2, 3))
        dims = {n: self.draw.random.randint(0, tensors[n].dim()) for n in self.names}
        derivative = self.way == "vmap of grad" and bool(self.subset) and bool(self.given)
        return ways.mapped(call, tokenops, tensors, self.subset, self.given, self.names, count, dims, derivative)

    def judge(self, found):
        for number, ours in enumerate(found):
            self.compare(ours, ways.variant(self.call, self.call.tensors, number, self.names), self.given)

    def upstream(self, shape):
        kind = self.draw.pick(("random", "random", "one", "transposed"))
        if kind == "one":
            return torch.ones((), dtype=torch.float64).expand(shape)
        t = torch.randn(shape, generator=self.draw.generator, dtype=torch.float64)
        return t if kind == "random" else t.transpose(0, -1).contiguous().transpose(0, -1)

    def compare(self, ours, tensors, upstream):
        dtype = self.call.dtype
        with tokenops.use_backend("reference"):
            way = ways.twice if self.way == "twice" else ways.eager
            plain = way(self.call, tokenops, tensors, self.subset, upstream)
        # the gradients that the results' dtype can hold are what ours is given
        upstream = {n: u.to(plain[0][n].dtype) for n, u in upstream.items()}
        truth = self.truth(tensors, upstream)
        assert set(ours[1]) <= set(truth[1])
        noisy = []
        for _ in range(DRAWS):
            noisy.append(self.truth(tensors, upstream, Rounding(dtype, wide_of(dtype), self.draw.generator)))
        assert list(ours[0]) == list(truth[0])
        for name, right in truth[0].items():
            near = [n[0][name] for n in noisy]
            expected = plain[0][name]
            close(ours[0][name], right, near, self.plainly(expected), expected.dtype, name, name in self.call.exact)
        for name in ours[1]:
            t, mine, right = tensors[name.removeprefix("second ")], ours[1][name], truth[1][name]
            if mine is None:
                assert not right.count_nonzero(), f"no gradient of {name}"
                continue
            near = [n[1][name] for n in noisy]
            of = self.plainly(plain[1].get(name))
            # attention's are of P = exp(S - lse), whose lse is rounded, and on a GPU of D = dout * out, whose out is
            rounded = 16 if self.backend == "triton" and dtype in LOW else 4
            factor = rounded * FACTOR if self.operator == "masked_channel_attention" else FACTOR
            close(mine, right, near, of, t.dtype, f"gradient of {name}", False, factor)

    def plainly(self, t):
        """Plain PyTorch in the tensors' dtype. In fp32 the reference has to be right by itself."""
        return () if t is None or (self.backend == "reference" and self.call.dtype not in LOW) else (t,)


LOW = (torch.float16, torch.bfloat16)


def close(ours, right, noisy, plain, dtype, what, exact, factor=FACTOR):
    """`ours` is `right`: no number where that is none, and elsewhere at most `factor` times as far from it as plain
    PyTorch and as rounding errors go, and a few roundings."""
    assert ours.dtype == dtype, f"{what}: {ours.dtype}, expected {dtype}"
    assert ours.shape == right.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(right.shape)}"
    if not right.is_floating_point():
        assert torch.equal(ours, right), (
            f"{what}: {ours.flatten()[:20].tolist()}, expected {right.flatten()[:20].tolist()}"
        )
        return
    mine, rounded = ours.double(), right.to(dtype).double()
    if exact:
        assert torch.equal(mine.nan_to_num(-1.5), rounded.nan_to_num(-1.5)), (
            f"{what}: copied or chosen, but not the same"
        )
        return
    noisy = [n.to(dtype).double() for n in noisy]
    sure = torch.stack([n.isfinite() == rounded.isfinite() for n in noisy]).all(dim=0)  # and not at the border
    sure &= (right.abs() / torch.finfo(dtype).max - 1).abs().nan_to_num(1.0) > 0.1
    if (right.isfinite() & rounded.isinf()).any():
        return  # what is left of a tensor that its dtype cannot hold is no matter
    for odd, of in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        wrong = (of(mine) != of(rounded)) & sure
        assert not wrong.any(), f"{what}: {int(wrong.sum())} elements {odd} that must not be, or not that must be"
    assert (mine == rounded)[rounded.isinf() & sure].all(), f"{what}: an infinity of the other sign"
    sure &= rounded.isfinite()
    if not sure.any():
        return
    info = torch.finfo(dtype)
    mine, right = mine[sure], right[sure]
    near = [n[sure] - right for n in (*noisy, *(p.double() for p in plain))]
    near = [n for n in near if n.isfinite().all()]
    largest = right.abs().max()
    floor = 2 * info.eps * largest + MADE * torch.finfo(wide_of(dtype)).eps * largest + 2 * info.tiny
    error = mine - right
    for statistic, size, elements in (("largest", lambda e: e.abs().max(), 1), ("L2", torch.norm, len(right))):
        allowed = factor * max(size(n) for n in near) + floor * elements**0.5
        assert size(error) <= allowed, f"{what}: {statistic} error {size(error):.3e}, allowed is {allowed:.3e}"
