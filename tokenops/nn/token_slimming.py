"""SiT's two modules: TokenSlimming (TSM) makes tokens fewer, ReverseTokenSlimming (RTSM) predicts them back."""

import torch
from torch import Tensor, nn

from ..ops.reference import aggregation_weights
from ..ops.soft_aggregate import soft_aggregate
from ..ops.token_mlp import token_mlp


class TokenSlimming(nn.Module):
    r"""Token slimming module: N tokens become M learned mixtures of them.

    .. math:: A = \mathrm{softmax}_N(s\,(\mathrm{gelu}(\mathrm{LN}(x) W_1^\top + b_1) W_2^\top + b_2)), \qquad
        y = [\,x_{:P},\; A^\top x_{P:}\,]

    Each slim token is a convex combination of the raw tokens ``x`` (not of the normalised ones). ``b_2`` adds the same
    to every token of a slot, so the softmax over the tokens cancels it: its gradient is zero, and it is there only
    because published checkpoints hold it. Any N is accepted.

    Linear layers start from a truncated normal with standard deviation 0.02 and zero biases, as published: at first
    every slim token is about the mean of all tokens.

    Args:
        dim: C, channels of a token.
        slim_tokens: M, how many tokens come out (prefix tokens come on top).
        ratio: width of the hidden layer over ``dim``.

    Shapes:
        ``x`` is ``(B, P+N, C)``, the result ``(B, P+M, C)``.

    Raises:
        ValueError: ``slim_tokens`` is not positive, or ``ratio`` leaves no hidden channel.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.2. Parameter names are those of its
    published checkpoints.

    >>> slim = TokenSlimming(64, slim_tokens=98)
    >>> slim(torch.randn(2, 197, 64), prefix=1).shape
    torch.Size([2, 99, 64])
    """

    def __init__(self, dim: int, slim_tokens: int, ratio: float = 0.5) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        if slim_tokens < 1:
            raise ValueError(f"TokenSlimming: slim_tokens={slim_tokens}, but at least one token must be left")
        if hidden < 1:
            raise ValueError(f"TokenSlimming: ratio={ratio} of dim={dim} leaves no hidden channel")
        self.slim_tokens = slim_tokens
        self.weight = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, slim_tokens)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        self.weight.apply(_init_linear)

    def logits(self, x: Tensor, prefix: int = 0) -> Tensor:
        """The aggregation logits before the scale, ``(B, N, M)``: a view that leaves the prefix rows out."""
        # the prefix rows are computed and left out: cheaper than the copy that slicing x first would cost
        return self.weight(x)[:, prefix:]

    def forward(self, x: Tensor, prefix: int = 0) -> Tensor:
        """Slim ``x`` (B, P+N, C) to (B, P+M, C); the first ``prefix`` tokens are carried through unchanged."""
        return soft_aggregate(x, self.logits(x, prefix), scale=self.scale, prefix=prefix)

    def aggregation(self, x: Tensor, prefix: int = 0) -> Tensor:
        """A, ``(B, N, M)`` in fp32 (fp64 for fp64): how much slim token m draws on token n; sums to 1 over N."""
        return aggregation_weights(self.logits(x, prefix), self.scale)

    def extra_repr(self) -> str:
        return f"slim_tokens={self.slim_tokens}"


class _Mlp(nn.Module):
    """Two linear layers with an exact GELU between them, under the names of the published checkpoints."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ReverseTokenSlimming(nn.Module):
    r"""Reverse token slimming module: M slim tokens become N tokens again, for the distillation loss of training.

    .. math:: t = W_b\, \mathrm{gelu}(W_a \mathrm{LN}_1(z) + b_a) + b_b, \qquad
        y = t + \mathrm{gelu}(\mathrm{LN}_2(t) W_c^\top + b_c) W_d^\top + b_d

    The first MLP runs along the tokens (:func:`tokenops.token_mlp`, ``W_a`` is ``(ratio*N, M)``), the second along the
    channels. Without prefix tokens. Inference has no use for it.

    Args:
        dim: C, channels of a token.
        slim_tokens: M, how many tokens come in.
        tokens: N, how many come out.
        ratio: width of the hidden layers over ``tokens`` and over ``dim``.

    Shapes:
        ``z`` is ``(B, M, C)``, the result ``(B, N, C)``.

    Raises:
        ValueError: not M tokens come in, or a number of tokens is not positive.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.3. Parameter names are those of its
    published checkpoints.

    >>> restore = ReverseTokenSlimming(64, slim_tokens=49, tokens=196)
    >>> restore(torch.randn(2, 49, 64)).shape
    torch.Size([2, 196, 64])
    """

    def __init__(self, dim: int, slim_tokens: int, tokens: int, ratio: float = 4.0) -> None:
        super().__init__()
        if slim_tokens < 1 or tokens < 1:
            raise ValueError(f"ReverseTokenSlimming: slim_tokens={slim_tokens} and tokens={tokens} must be at least 1")
        self.norm1 = nn.LayerNorm(dim)
        self.mlp1 = _Mlp(slim_tokens, int(tokens * ratio), tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp2 = _Mlp(dim, int(dim * ratio), dim)
        self.apply(_init_linear)

    def forward(self, z: Tensor) -> Tensor:
        """Predict all N tokens, (B, N, C), from the slim ones, (B, M, C)."""
        along, z = self.mlp1, self.norm1(z)
        if torch.is_autocast_enabled(z.device.type):  # token_mlp computes in the dtype of its tokens
            z = z.to(torch.get_autocast_dtype(z.device.type))
        t = token_mlp(z, along.fc1.weight, along.fc1.bias, along.fc2.weight, along.fc2.bias)
        return t + self.mlp2(self.norm2(t))
