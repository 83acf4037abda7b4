"""soft_scatter: M slim tokens become N tokens, each a mixture of them (the reverse direction of soft_aggregate)."""

from torch import Tensor

from . import checks
from .soft_aggregate import _apply, _check_scale


def soft_scatter(z: Tensor, w: Tensor, *, scale: Tensor | float | None = None) -> Tensor:
    r"""Scatter slim tokens softly: each token is a softmax-weighted mean of the slim tokens.

    .. math:: A = \mathrm{softmax}_M(s \cdot w), \qquad y = A z

    It is :func:`soft_aggregate` with the logits transposed, and runs as the same kernel with other strides.

    Args:
        z: slim tokens ``(B, M, C)``, fp16, bf16, fp32 or fp64, any strides. The result has its dtype.
        w: logits ``(B, N, M)``, any of those dtypes, any strides. ``-inf`` leaves a slim token out of one token.
        scale: what the logits are multiplied with: a number, or a one-element tensor, which gets a gradient.

    Returns:
        ``(B, N, C)`` in ``z.dtype``, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together.

    Source: the reverse of section 3.2 of Zong et al., Self-slimmed Vision Transformer (ECCV 2022), as soft assignment;
    the paper's own reverse module is :func:`token_mlp`.

    >>> z, w = torch.randn(2, 98, 64), torch.randn(2, 196, 98)
    >>> soft_scatter(z, w).shape
    torch.Size([2, 196, 64])
    """
    op = "soft_scatter"
    checks.tensor(op, "z", z, "B,M,C")
    checks.tensor(op, "w", w, "B,N,M", like=z)
    checks.same(op, "images", "w", w.shape[0], "z", z.shape[0])
    checks.same(op, "slim tokens", "w", w.shape[2], "z", z.shape[1])
    _check_scale(op, scale, z)
    return _apply(op, z, w.transpose(1, 2), scale, None, 0)
