"""Random sizes, numbers and layouts, all from one seed."""

import math
import random

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: how large numbers are: squares of these, and sums of them, are numbers in the accumulation dtype
HUGE = {torch.float16: 200.0, torch.bfloat16: 1e12, torch.float32: 1e12, torch.float64: 1e100}
TINY = {torch.float16: 2.0**-10, torch.bfloat16: 1e-12, torch.float32: 1e-12, torch.float64: 1e-100}
LAYOUTS = ("contiguous", "transposed", "stepped", "offset", "guarded", "expanded")
POISON = {torch.bool: True, torch.uint8: 255}


class Draw:
    """`most` is the largest size; `backend` the one that it is for."""

    def __init__(self, seed, most):
        self.random, self.most = random.Random(seed), most
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.said = []  # what was chosen, for a report

    def say(self, what):
        self.said.append(str(what))

    def chance(self, probability):
        return self.random.random() < probability

    def pick(self, options):
        return self.random.choice(list(options))

    def size(self, least=0, most=None):
        """Of a dimension: nothing, one, few, about the border of a tile."""
        most = min(self.most, most or self.most)
        kind = self.random.random()
        if kind < 0.04:
            n = 0
        elif kind < 0.14:
            n = 1
        elif kind < 0.7:
            n = self.random.randint(2, 9)
        else:
            n = self.pick((15, 16, 17, 33) if kind < 0.93 else (31, 32, 64, 65))
        return max(least, min(n, most))

    def images(self):
        return self.pick((0, 1, 2, 2, 2, 3, 5) if self.chance(0.3) else (1, 2, 3))

    def dtype(self):
        return self.pick(FLOATS)

    def other(self, dtype):
        """The dtype of what comes along."""
        return dtype if self.chance(0.6) else self.dtype()

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def floats(self, shape, dtype, kinds=("normal", "normal", "normal", "ties", "huge", "tiny")):
        values, kind = torch.randn(shape, generator=self.generator, dtype=torch.float64), self.pick(kinds)
        if kind != "normal":
            self.say(kind)
        if kind == "ties":
            values = (2 * values).round() / 2
        elif kind == "huge":
            values = values * HUGE[dtype]
        elif kind == "tiny":
            values = values * TINY[dtype]
        elif kind == "large":
            values = values * 30
        elif kind == "positive":
            values = values.abs() + 0.01
        elif kind == "zeros":
            values = values * 0
        elif kind == "factors":
            values = self.uniform(*shape) * 1.5
        return self.lay(values.to(dtype))

    def ints(self, values):
        return self.lay(torch.as_tensor(values, dtype=torch.int64), ())

    def sizes(self, shape, dtype):
        """How many patches a token stands for; some 0."""
        return self.lay((self.uniform(*shape) * 5).floor().to(dtype))

    def put(self, t, where, value):
        """`value` in place of some elements, where that can be written."""
        where = torch.broadcast_to(where, t.shape)
        if all(step or size < 2 for step, size in zip(t.stride(), t.shape)):
            t[where] = value
        return t

    def lay(self, t, expand=None):
        """The same values in some layout, but where they are repeated along dimensions of `expand` (None: any); beyond
        it there is NaN."""
        expand = range(t.dim()) if expand is None else expand
        how = self.pick(LAYOUTS[: 6 if expand else 5]) if self.chance(0.7) else "contiguous"
        self.say(how)
        if how == "contiguous" or t.dim() == 0:
            return t.clone()
        poison = POISON.get(t.dtype, math.nan if t.is_floating_point() else 2**40 if t.dtype.itemsize > 4 else 99)
        if how == "expanded":
            shape, dims = t.shape, [d for d in expand if t.shape[d]]
            for d in self.random.sample(dims, self.random.randint(1, len(dims))) if dims else ():
                t = t.narrow(d, 0, 1)
            return self.lay(t, ()).expand(shape)
        steps, before, after = [1] * t.dim(), [0] * t.dim(), [0] * t.dim()
        order = list(range(t.dim()))
        if how == "transposed":
            self.random.shuffle(order)
        for d in range(t.dim()):
            if how == "stepped" and self.chance(0.6):
                steps[d], before[d] = self.random.randint(2, 3), self.random.randint(0, 1)
            if how == "guarded":
                before[d], after[d] = self.random.randint(0, 2), self.random.randint(0, 2)
        extent = [before[d] + steps[d] * t.shape[d] + after[d] for d in order]
        offset = self.pick((1, 3, 5)) if how == "offset" else 0
        flat = torch.full((offset + math.prod(extent),), poison, dtype=t.dtype)
        buffer = flat[offset:].view(extent).permute([order.index(d) for d in range(t.dim())])
        for d in range(t.dim()):
            buffer = buffer.narrow(d, before[d], steps[d] * t.shape[d])[
                (slice(None),) * d + (slice(None, None, steps[d]),)
            ]
        buffer.copy_(t)
        return buffer
