"""What rounding costs: the oracle again, with a random rounding error in every operation (Monte Carlo arithmetic).

Some results are sums of what cancels, and of a few numbers plain PyTorch is right by luck. What these errors make of a
result, so much any code of that precision may be wrong.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
#: what rounds; the others copy
ARITHMETIC = {
    getattr(aten, name)
    for name in "add sub mul div sum mean exp log sqrt rsqrt erf mm bmm pow reciprocal neg add_ mul_ div_".split()
} - {aten.neg}

_now = None


class Rounding(TorchDispatchMode):
    """Within it, fp64 is as imprecise as the accumulation dtype, and `rounded` as the tensors' dtype."""

    def __init__(self, dtype, wide, generator):
        super().__init__()
        self.dtype, self.eps, self.generator = dtype, 2 * torch.finfo(wide).eps, generator

    def __enter__(self):
        global _now
        _now = self
        return super().__enter__()

    def __exit__(self, *exc):
        global _now
        _now = None
        return super().__exit__(*exc)

    def disturbed(self, t, eps):
        return t * (1 + eps * (2 * torch.rand(t.shape, generator=self.generator, dtype=torch.float64) - 1))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in ARITHMETIC and isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            noisy = self.disturbed(result, self.eps)
            return result.copy_(noisy) if func.overloadpacket._qualified_op_name.endswith("_") else noisy
        return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, forward):
        return _stored(t) if forward else t.clone()

    @staticmethod
    def backward(ctx, dt):
        return _stored(dt), None


def _stored(t):
    with _disable_current_modes():
        return _now.disturbed(t, torch.finfo(_now.dtype).eps).to(_now.dtype).double()


def rounded(t, forward=True):
    """A number that may be kept in the tensors' dtype, and its gradient (or only that)."""
    return t if _now is None else _Rounded.apply(t, forward)


class Recomputed:
    """Probabilities that a backward pass makes again from logits and their log-sum-exp: its rounding is an error of all
    of a row, which then do not sum to 1, and what should cancel in P * (dP - sum of P dP) does not."""

    size: torch.Tensor | float = 0.0

    def logits(self, s):
        return s if _now is None else _Logits.apply(s, self)

    def probabilities(self, p, lse):
        return p if _now is None else _Probabilities.apply(p, lse.detach(), self)

    def scores(self, p, lse):
        """What is told of them is made again as well."""
        if _now is None:
            return p
        with _disable_current_modes():
            error = _now.disturbed(torch.ones_like(p), _now.eps * _magnitude(lse)) - 1
        return p + (p * error).detach()


def _magnitude(lse):
    return 1 + torch.where(lse.isfinite(), lse, 0.0).abs().detach()


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, of):
        ctx.of = of
        return s.clone()

    @staticmethod
    def backward(ctx, ds):
        with _disable_current_modes():
            return ds + _now.disturbed(ctx.of.size * torch.ones_like(ds), 1.0) - ctx.of.size, None


class _Probabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, lse, of):
        ctx.p, ctx.of, ctx.times = p.detach(), of, _magnitude(lse)
        return p.clone()

    @staticmethod
    def backward(ctx, dp):
        with _disable_current_modes():
            ctx.of.size = _now.eps * ctx.times * (ctx.p * dp).abs().sum(dim=0)
        return dp, None, None
