"""DPS-ViT: every image keeps patches of its own. A reconstruction: the published mechanism is not known to us.

Known is that patches are removed adaptively, by the input, on top of PS-ViT; neither scorer, loss nor training is.
Ours: the tokens per layer are fixed, so that batches stay dense; a small scorer predicts once how long each token
lives; one sort by it makes every later layer a prefix slice; and it learns the order that algorithm 1 would find for
that image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.select_tokens import select_tokens
from ...patching.engine import Method, Role
from .blocks import check_model, embed_tokens
from .counts import counts_for
from .impact import checked_for, impact
from .method import Slim, refuse_empty


class TokenScorer(nn.Module):
    r"""One lifespan score for each patch token, from itself and the mean of all: a reconstruction, ours.

    .. math:: u_i = \mathrm{LN}(z_i), \qquad s_i = w^T \mathrm{GELU}(W_1 u_i + W_2 \bar u + b_1) + b_2

    Args:
        dim: C; the hidden width is C / 4.
        prefix: P, tokens before the patches', which are not looked at.

    Shapes:
        ``x (B, P+N, C)``; the scores are ``(B, N)``.
    """

    def __init__(self, dim: int, prefix: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden, made = max(1, dim // 4), {"device": device, "dtype": dtype}
        self.prefix = prefix
        self.norm = nn.LayerNorm(dim, **made)
        self.token = nn.Linear(dim, hidden, **made)
        self.context = nn.Linear(dim, hidden, bias=False, **made)
        self.out = nn.Linear(hidden, 1, **made)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x[:, self.prefix :])
        return self.out(F.gelu(self.token(u) + self.context(u.mean(1, keepdim=True)))).squeeze(2)


@dataclass(frozen=True)
class DynamicSlim(Slim):
    """A block of the dynamic method: the first of the slim ones scores the tokens, and puts them in that order.

    Attributes:
        scores: whether it does.
    """

    scores: bool = False

    @property
    def idle(self) -> bool:
        return self.rows is None and not self.scores

    def ordered(self, block: Any, x: Tensor, follows: bool) -> tuple[Tensor, Tensor | None]:
        if not self.scores:
            return x, None
        prefix = self.prefix
        chosen = select_tokens(x, block.scorer(x.detach()), x.shape[1] - prefix, prefix=prefix, order="score")
        return chosen.tokens, chosen.index


class DynamicSlimming(Method):
    """Every image keeps patches of its own: dynamic Patch Slimming (DPS-ViT), a reconstruction.

    Behind block ``after`` the scorer gives each patch a score; one :func:`tokenops.select_tokens` sorts the tokens of
    each image by it; layer l is then the slice ``x[:, :counts[l]]`` as in `PatchSlimming`, nested by construction. The
    scorer (``scorer`` of the next block) is trained by `ranking_loss` alone: the choice has no gradient, and none goes
    from the scorer into the tokens.

    Args:
        counts: tokens per layer, one for the class token included: a searched schedule's ``counts``, or
            `published_counts`. The first ``after`` layers must keep everything.
        after: so many blocks run before the tokens are scored.

    Source: Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022): that it is dynamic and what it
    costs [P]; how, is ours.

    A step of training is `tokenops.training.PatchRanking`'s, or:

    >>> import timm, tokenops
    >>> from tokenops.methods.patch_slimming import ranking_loss, scored, teacher_lifespans
    >>> teacher = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3).eval()
    >>> student = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3)
    >>> student = tokenops.apply_patch(student, "dps", counts=[17, 9, 1], after=1)
    >>> images = torch.randn(2, 3, 64, 64)
    >>> logits, scores = scored(student, images)
    >>> loss = logits.square().mean()  # the task's loss
    >>> loss = loss + ranking_loss(scores, teacher_lifespans(teacher, images, [17, 9, 1]))
    """

    name, scores, shape = "dps", False, True

    def __init__(self, counts: Sequence[int], after: int = 2) -> None:
        if isinstance(after, bool) or not isinstance(after, int):
            raise TypeError(f"after must be an int, but got {after!r}")
        self.counts, self.after = counts, after

    def roles(self, site: Any) -> list[Role]:
        site.needs_no_map("dps")
        patches, _ = site.needs_grid("dps")
        counts, after = counts_for(self.counts, patches, site.depth), self.after
        if not 0 <= after < site.depth:
            raise ValueError(f"after={after}, but it must be 0 to {site.depth - 1}: there are {site.depth} blocks")
        for layer, n in enumerate(counts[:after], 1):
            if n != 1 + patches:
                raise ValueError(
                    f"counts gives layer {layer} {n} tokens, but tokens are scored after layer {after}, and till then"
                    f" all {1 + patches} are needed"
                )
        refuse_empty("counts leaves", site, counts)
        before = (1 + patches, *counts)
        rows = [n - 1 if n < m else None for m, n in zip(before, counts)]
        return [DynamicSlim(site.prefix, False, n, i == after) for i, n in enumerate(rows)]

    def parts(self, site: Any) -> dict[int, tuple[str, Any]]:
        return {self.after: ("scorer", TokenScorer(site.dim, site.prefix))}


def scored(model: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
    """What a model with the method "dps" returns, and the scores ``(B, N)`` of its scorer.

    Raises:
        TypeError: the model has no scorer.
    """
    found: list[Tensor] = []
    handle = scorer_of(model).register_forward_hook(lambda module, inputs, scores: found.append(scores))
    try:
        return model(images), found[-1]
    finally:
        handle.remove()


def scorer_of(model: nn.Module) -> TokenScorer:
    """The scorer of a model with the method "dps"; TypeError where there is none."""
    found = next((module for module in model.modules() if isinstance(module, TokenScorer)), None)
    if found is None:
        raise TypeError(f"{type(model).__name__} has no scorer: the model must be patched with 'dps'")
    return found


@torch.no_grad()
def teacher_lifespans(teacher: nn.Module, images: Tensor, counts: Sequence[int]) -> Tensor:
    """How many layers each patch of each image should live, by the impact scores of the dense teacher: ours.

    Algorithm 1 for every image by itself, with given counts instead of a tolerance: from the last layer to the first,
    layer l keeps what layer l + 1 does, and the patches of the highest impact besides, ``counts[l]`` tokens in all.

    Args:
        teacher: the dense model, in eval mode.
        images: ``(B, 3, height, width)``.
        counts: tokens per layer, class token included.

    Returns:
        ``(B, N)`` int64, 0 to L.
    """
    check_model("teacher_lifespans", teacher)
    model: Any = teacher
    counts = checked_for(model, counts)
    features = [embed_tokens(model, images)]
    for block in model.blocks:
        features.append(block(features[-1]))
    B, N = len(images), features[0].shape[1] - 1
    order = torch.arange(N, device=images.device).expand(B, N)
    lifespan = torch.zeros(N, dtype=torch.int64, device=images.device)
    kept = 0
    for layer in range(len(counts), 0, -1):
        now = counts[layer - 1] - 1
        if now == kept:
            continue
        if now < N:  # else which ones go without saying
            score = impact(model.blocks, features[layer - 1], layer, counts, order).gather(1, order)
            score[:, :kept] = float("inf")
            order = order.gather(1, torch.sort(score, dim=1, descending=True, stable=True).indices)
        lifespan[kept:now] = layer
        kept = now
    return torch.zeros_like(order).scatter(1, order, lifespan.expand(B, N))


def ranking_loss(scores: Tensor, lifespan: Tensor) -> Tensor:
    r"""Pairwise logistic loss: who should live longer should have the higher score; equals are left alone. Ours.

    .. math:: \mathrm{mean}_{\{(b,i,j):\; \ell_{bi} > \ell_{bj}\}} \log(1 + e^{s_{bj} - s_{bi}})

    Args:
        scores: ``(B, N)`` of the student.
        lifespan: ``(B, N)``, of `teacher_lifespans`.

    Returns:
        A scalar, fp32 (fp64 for fp64 scores); 0 where there is no such pair.

    Raises:
        ValueError: the shapes are not ``(B, N)`` both.
    """
    if scores.dim() != 2 or lifespan.shape != scores.shape:
        raise ValueError(
            f"ranking_loss: scores and lifespan must both be (B, N), but got {tuple(scores.shape)} and"
            f" {tuple(lifespan.shape)}"
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    behind = F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2))
    longer = lifespan.unsqueeze(2) > lifespan.unsqueeze(1)
    return (behind * longer).sum() / longer.sum().clamp(min=1)
