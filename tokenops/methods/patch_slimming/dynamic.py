"""DPS-ViT: every image keeps patches of its own. A reconstruction: the published mechanism is not known to us.

Known is that patches are removed adaptively, by the input, on top of PS-ViT; neither scorer, loss nor training is.
Ours: the tokens per layer are fixed, so that batches stay dense; a small scorer predicts once how long each token
lives; one sort by it makes every later layer a prefix slice; and it learns the order that algorithm 1 would find for
that image.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...select_tokens import select_tokens
from ..lvvit import LVViT
from .blocks import check_model, embed_tokens
from .impact import checked_for, impact
from .slim import Slimmed, remade


class TokenScorer(nn.Module):
    r"""One lifespan score for each patch token, from itself and the mean of all: a reconstruction, ours.

    .. math:: u_i = \mathrm{LN}(z_i), \qquad s_i = w^T \mathrm{GELU}(W_1 u_i + W_2 \bar u + b_1) + b_2

    Args:
        dim: C; the hidden width is C / 4.

    Shapes:
        ``x (B, 1+N, C)``, class token first (it is looked at by nobody); the scores are ``(B, N)``.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden, made = max(1, dim // 4), {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **made)
        self.token = nn.Linear(dim, hidden, **made)
        self.context = nn.Linear(dim, hidden, bias=False, **made)
        self.out = nn.Linear(hidden, 1, **made)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x[:, 1:])
        return self.out(F.gelu(self.token(u) + self.context(u.mean(1, keepdim=True)))).squeeze(2)


class DynamicSlimming(Slimmed):
    """A ViT that keeps, in layer l, the ``counts[l]`` tokens an image's scores ask for; made by `apply_dynamic`.

    The scorer is trained by `ranking_loss` alone: the choice has no gradient, and none goes from the scorer into the
    tokens.
    """

    scorer: TokenScorer

    def _add_scorer(self, counts: Sequence[int], after: int) -> None:
        counts = checked_for(self, counts)
        if isinstance(after, bool) or not isinstance(after, int):
            raise TypeError(f"after must be an int, but got {after!r}")
        if not 0 <= after < len(counts):
            raise ValueError(f"after={after}, but it must be 0 to {len(counts) - 1}: there are {len(counts)} blocks")
        grid = self.patch_embed.grid_size
        full = 1 + grid[0] * grid[1]
        for layer, n in enumerate(counts[:after], 1):
            if n != full:
                raise ValueError(
                    f"counts gives layer {layer} {n} tokens, but tokens are scored after layer {after}, and till then"
                    f" all {full} are needed"
                )
        self.counts, self.sort_after, self.patches = counts, after, full - 1
        like = self.cls_token
        self.scorer = TokenScorer(like.shape[2], device=like.device, dtype=like.dtype).train(self.training)

    def arrange(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scores = self.scorer(x.detach())
        chosen = select_tokens(x, scores, x.shape[1] - 1, prefix=1, order="score")
        return chosen.tokens, chosen.index, scores

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: the scorer belongs to the block before it."""
        parent: Any = super()
        groups = parent.group_matcher(coarse)
        groups["blocks"] = [*groups["blocks"], (r"^scorer\.", (max(0, self.sort_after - 1),))]
        return groups


class DPSVisionTransformer(DynamicSlimming, VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer with dynamic Patch Slimming: its arguments, and those of `apply_dynamic`."""

    def __init__(self, *args: Any, counts: Sequence[int], after: int = 2, **kwargs: Any) -> None:
        VisionTransformer.__init__(self, *args, **kwargs)
        check_model(self)
        self._add_scorer(counts, after)


class DPSLVViT(DynamicSlimming, LVViT):
    """:class:`LVViT` with dynamic Patch Slimming: its arguments, and those of `apply_dynamic`."""

    def __init__(self, *args: Any, counts: Sequence[int], after: int = 2, **kwargs: Any) -> None:
        LVViT.__init__(self, *args, **kwargs)
        self._add_scorer(counts, after)


def apply_dynamic(model: nn.Module, counts: Sequence[int], after: int = 2) -> DynamicSlimming:
    """Dynamic Patch Slimming (DPS-ViT) on a dense vision transformer, with a new scorer: a reconstruction.

    Behind block ``after`` the scorer gives each patch a score; one :func:`tokenops.select_tokens` sorts the tokens of
    each image by it; layer l is then the slice ``x[:, :counts[l]]`` as in :func:`apply`, nested by construction.

    Args:
        model: as in :func:`apply`, or a slimmed one. It is not changed, but shares its parameters.
        counts: tokens per layer, class token included: a searched schedule's ``counts``, or `published_counts`. The
            first ``after`` layers must keep everything.
        after: so many blocks run before the tokens are scored.

    Returns:
        A :class:`DynamicSlimming` with the model's parameter names, and ``scorer.*``.

    Raises:
        TypeError, ValueError: as in :func:`apply`; or ``counts`` or ``after`` do not fit the model.

    Source: Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022): that it is dynamic and what it
    costs [P]; how, is ours.

    A step of training:

    >>> import timm
    >>> teacher = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3).eval()
    >>> student = apply_dynamic(teacher, [17, 9, 1], after=1)
    >>> images = torch.randn(2, 3, 64, 64)
    >>> output = student.forward_layers(images)
    >>> loss = output.logits.square().mean()  # the task's loss
    >>> loss = loss + ranking_loss(output.scores, teacher_lifespans(teacher, images, student.counts))
    """
    kinds: dict[type, Any] = {VisionTransformer: DPSVisionTransformer, LVViT: DPSLVViT}
    new = remade("patch_slimming.apply_dynamic", model, kinds)
    new._add_scorer(counts, after)
    return new


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
    check_model(teacher)
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
