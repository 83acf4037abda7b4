"""Token merging under the names its users know, on tokenops' kernels.

>>> import torch
>>> x, keys = torch.randn(2, 197, 64), torch.randn(2, 197, 16)
>>> merge, unmerge = bipartite_soft_matching(keys, 16, class_token=True)
>>> x, size = merge_wavg(merge, x)
>>> x.shape, size.shape, unmerge(x).shape
(torch.Size([2, 181, 64]), torch.Size([2, 181, 1]), torch.Size([2, 197, 64]))

`kth_bipartite_soft_matching` and `random_bipartite_soft_matching` are the same with other sides, for comparisons: their
likenesses are a matrix an image in plain PyTorch, the merges are the kernels all the same.

Source: Bolya et al., Token Merging: Your ViT But Faster (ICLR 2023), section 3; written from the paper.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import checks
from .ops.match_sides import match_kth, match_random
from .ops.merge_bipartite import match_bipartite, merge_by_index, sum_by_index, unmerge_bipartite


class Merge(NamedTuple):
    """Merges tokens as a matching says; what `bipartite_soft_matching` and its like give first.

    Attributes:
        index: ``(B, N - prefix)`` int64: which of the tokens behind the prefix each goes into.
        tokens: how many these are.
        prefix: leading rows that are never merged.
    """

    index: Tensor  # type: ignore[assignment]
    tokens: int
    prefix: int

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N-r, C)``, each the "mean" or the "sum" of those that go into it.

        Raises:
            ValueError: ``x`` is not what was matched, or there is no such mode.
        """
        _check("merge", self, x)
        if mode == "sum":
            return sum_by_index("merge", x, self.index, self.tokens, self.prefix)
        if mode != "mean":
            raise ValueError(f"merge: mode={mode!r}, but it must be 'mean' or 'sum'")
        return merge_by_index("merge", x, self.index, self.tokens, self.prefix)[0]


class Unmerge(NamedTuple):
    """Gives every token the one it went into, ``(B, N-r, C)`` to ``(B, N, C)``; see `Merge`."""

    index: Tensor  # type: ignore[assignment]
    prefix: int

    def __call__(self, y: Tensor) -> Tensor:
        return unmerge_bipartite(y, self.index, prefix=self.prefix)


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Unmerge]:
    """How to merge the r most alike tokens: ``(merge, unmerge)``, both functions of tokens.

    Args:
        metric: ``(B, N, D)``, by which tokens are compared.
        r: how many to merge; more than half of the tokens that may be merged is taken as half of them, below 0 as none.
        class_token, distill_token: whether the first row, or the first two, are never merged.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: metric has another number of dimensions.
    """
    prefix = int(class_token) + int(distill_token)
    _check_matching("bipartite_soft_matching", metric, "r", r)
    N = max(0, metric.shape[1] - prefix)
    r = max(0, min(r, N // 2))
    index = match_bipartite(metric, r, prefix=prefix)
    return Merge(index, N - r, prefix), Unmerge(index, prefix)


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Unmerge]:
    """How to merge into every k-th token the others, each into the one it is most like: ``(merge, unmerge)``.

    Of N tokens those numbered k - 1, 2k - 1, ... (from 0) are left, N // k in their order. The tokens behind the last
    of them go into their most alike too: nothing is lost. Likeness, equals and what is no number are as in
    :func:`tokenops.match_bipartite`: cosine, the first, the least.

    Args:
        metric: ``(B, N, D)``, by which tokens are compared, of any float dtype; not differentiated. All tokens may be
            merged: leave a class token out.
        k: at 1 or below nothing is merged, nor above N, where there is no k-th token.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: metric has another number of dimensions.

    >>> keys = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [0, 1], [2, 2], [1, -1], [3, 3]]])
    >>> merge, unmerge = kth_bipartite_soft_matching(keys, 3)  # tokens 2 and 5 are left
    >>> merge.index.tolist()
    [[0, 0, 0, 0, 0, 1, 0]]
    """
    _check_matching("kth_bipartite_soft_matching", metric, "k", k)
    index, tokens = match_kth(metric, k)
    return Merge(index, tokens, 0), Unmerge(index, 0)


def random_bipartite_soft_matching(
    metric: Tensor, r: int, *, generator: torch.Generator | None = None
) -> tuple[Merge, Unmerge]:
    """How to merge r tokens drawn at random, each into the one of the others it is most like: ``(merge, unmerge)``.

    Every image has a draw of its own; the N - r others are left, in their order. Likeness, equals and what is no number
    are as in :func:`tokenops.match_bipartite`.

    Args:
        metric: ``(B, N, D)``, by which tokens are compared, of any float dtype; not differentiated. All tokens may be
            merged: leave a class token out.
        r: how many to merge; more than N - 1 is taken as N - 1, below 0 as none.
        generator: what draws, on any device; None: torch's own, where the metric is.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: metric has another number of dimensions.

    >>> merge, unmerge = random_bipartite_soft_matching(torch.randn(2, 16, 4), 6)
    >>> merge(torch.randn(2, 16, 8)).shape
    torch.Size([2, 10, 8])
    """
    op = "random_bipartite_soft_matching"
    _check_matching(op, metric, "r", r)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, but got {type(generator).__name__}")
    N = metric.shape[1]
    r = max(0, min(r, N - 1))
    index = match_random(metric, r, generator)
    return Merge(index, N - r, 0), Unmerge(index, 0)


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge by the mean weighted with sizes: ``(tokens (B, N-r, C), sizes (B, N-r, 1))``.

    Args:
        merge: of `bipartite_soft_matching` or its like.
        x: ``(B, N, C)``.
        size: ``(B, N, 1)``, how many patches each token stands for; None: 1.
    """
    _check("merge_wavg", merge, x)
    sizes = None
    if size is not None:
        checks.tensor("merge_wavg", "size", size, "B,N,1", like=x)
        sizes = size.squeeze(2)
    y, totals, _, _ = merge_by_index("merge_wavg", x, merge.index, merge.tokens, merge.prefix, sizes)
    return y, totals.unsqueeze(2)


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which of the first tokens each token is made of: ``(B, N-r, N0)``, 1 for yes.

    Args:
        merge: of `bipartite_soft_matching` or its like.
        x: ``(B, N, C)``, the tokens before this merge.
        source: ``(B, N, N0)``, that of the merge before; None at the first.
    """
    _check("merge_source", merge, x)
    if source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="sum")


def _check_matching(op: str, metric: Tensor, name: str, value: int) -> None:
    checks.tensor(op, "metric", metric, "B,N,D")
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, but got {value!r}")


def _check(op: str, merge: Merge, x: Tensor) -> None:
    if not isinstance(merge, Merge):
        raise TypeError(f"{op}: merge must come from bipartite_soft_matching, but got {type(merge).__name__}")
    checks.tensor(op, "x", x, "B,N,C", like=merge.index)
    checks.same(op, "images", "x", x.shape[0], "merge", merge.index.shape[0])
    checks.same(op, "tokens", "x", x.shape[1], "merge", merge.prefix + merge.index.shape[1])
