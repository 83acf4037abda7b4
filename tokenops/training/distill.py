"""Objectives whose teacher is looked into: SiT's feature recalibration and DPS-ViT's ranking of patches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.patch_slimming.dynamic import ranking_loss, scored, scorer_of, teacher_lifespans
from ..nn import ReverseTokenSlimming
from ..patching.site import Site
from ..patching.views import evaluating, logits_of, patches_behind
from .objectives import Metrics, Objective

#: how much faster than everything else reverse modules learn
RTSM_LR_SCALE = 5.0


class FeatureRecalibration(Objective):
    r"""SiT's FRD: the reverse modules predict the teacher's tokens in every block from those that are left.

    .. math:: L = L_{cls} + 2 L_{token} + 2 L_{logits} + L_{hard}, \qquad
        L_{token} = \mathrm{mean}_l\, \mathrm{MSE}(\mathrm{RTSM}_l(z_l), t_l), \qquad
        L_{logits} = \tau^2\, \mathrm{KL}(\mathrm{softmax}(t / \tau) \,\|\, \mathrm{softmax}(s / \tau))

    with the patch tokens behind every block as the next one gets them (a slimming comes before), not normalised; a
    block with as many tokens as the teacher's has no reverse module. The reverse modules are made here, from a run with
    zeros as images, and are trained and saved with the objective: ``rtsm``, under the published names.

    The published weights are for tokens of the size that LV-ViT's have: the error is absolute. Where the logged
    ``token`` is far above ``cls``, divide ``token_weight`` by the mean square of the teacher's tokens.

    Args:
        model: a vision transformer that `tokenops.apply_patch` takes, whose blocks leave a fixed number of tokens, as
            "sit" does.
        teacher: a dense one of the same depth and width.
        smoothing: of labels.
        temperature: :math:`\tau`.
        token_weight, logits_weight, hard_weight: of the last three terms.
        cnn_teacher: whose class the student's distillation head learns (`L_hard`), or None. The student must return
            ``(logits, distillation logits)`` in training, as timm's distilled models do.
        img_size: of the images, for the run; the model's own if not given.

    Raises:
        TypeError: one of the two is another model.
        ValueError: depths or widths differ, or a block's tokens are more than the teacher's.

    Source: Zong et al., Self-slimmed Vision Transformer (ECCV 2022), section 3.3, and its published code.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        smoothing: float = 0.1,
        temperature: float = 1.0,
        token_weight: float = 2.0,
        logits_weight: float = 2.0,
        hard_weight: float = 1.0,
        cnn_teacher: nn.Module | None = None,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(model, smoothing, [teacher, cnn_teacher])
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}, but it must be above 0")
        self.temperature = temperature
        self.weights = (token_weight, logits_weight, hard_weight)
        if cnn_teacher is not None and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # type: ignore[operator]
        self._sites = _site("model", model), _site("teacher", teacher)
        size = self._sites[0].img_size if img_size is None else img_size
        if size is None:
            raise ValueError(f"img_size must be given: {type(model).__name__} does not say what images it takes")
        self._fit_to((size, size) if isinstance(size, int) else tuple(size))

    @torch.no_grad()
    def _fit_to(self, size: tuple[int, ...]) -> None:
        """Make the reverse modules, and check the widths."""
        first = next(self.model.parameters())
        images = torch.zeros(1, _channels_of(self.model), *size, device=first.device, dtype=first.dtype)
        self._teachers[0].to(first.device)
        with evaluating(self.model):
            ours = self._run(0, images)[1]
        theirs = self._run(1, images)[1]
        if len(ours) != len(theirs):
            raise ValueError(f"teacher has {len(theirs)} blocks, but the model has {len(ours)}")
        reverse: list[nn.Module] = []
        for i, (mine, other) in enumerate(zip(ours, theirs)):
            if mine.shape[2] != other.shape[2]:
                raise ValueError(f"teacher's tokens have {other.shape[2]} channels, but the model's {mine.shape[2]}")
            if mine.shape[1] > other.shape[1]:
                raise ValueError(
                    f"the model has {mine.shape[1]} patch tokens behind block {i}, but the teacher only"
                    f" {other.shape[1]}: another patch or image size?"
                )
            same = mine.shape[1] == other.shape[1]
            sizes = (mine.shape[2], mine.shape[1], other.shape[1])
            reverse.append(nn.Identity() if same else ReverseTokenSlimming(*sizes))
        self.rtsm = nn.ModuleList(reverse).to(first.device, first.dtype)

    def _run(self, which: int, images: Tensor) -> tuple[Any, list[Tensor]]:
        """What the model (0) or its teacher (1) returns, and the patch tokens behind every block."""
        site = self._sites[which]
        with patches_behind(site) as tokens:
            return site.model(images), tokens

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        self._teachers[0].eval()
        with torch.no_grad():
            output, theirs = self._run(1, images)
            expected = logits_of(output)
        output, ours = self._run(0, images)
        logits = logits_of(output)
        ours = [reverse(tokens) for reverse, tokens in zip(self.rtsm, ours)]
        token_weight, logits_weight, hard_weight = self.weights
        cls = self.criterion(logits, target)
        token = sum(F.mse_loss(mine, other.to(mine.dtype)) for mine, other in zip(ours, theirs)) / len(ours)
        mine, other = (F.log_softmax(y.float() / self.temperature, dim=1) for y in (logits, expected))
        distance = self.temperature**2 * F.kl_div(mine, other, reduction="batchmean", log_target=True)
        loss = cls + token_weight * token + logits_weight * distance
        parts = {"cls": cls.detach(), "token": torch.as_tensor(token).detach(), "logits": distance.detach()}
        if len(self._teachers) > 1:
            if not isinstance(output, tuple) or len(output) != 2:
                raise ValueError("cnn_teacher: the model returns no (logits, distillation logits) in training")
            hard = F.cross_entropy(output[1], self.teachers_logits(images, 1).argmax(1))
            loss, parts["hard"] = loss + hard_weight * hard, hard.detach()
        return loss, parts

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """As published: reverse modules learn five times as fast and decay whole, biases and norms too."""
        group = {"params": list(self.rtsm.parameters()), "lr": RTSM_LR_SCALE * lr, "lr_scale": RTSM_LR_SCALE}
        return [*super().parameter_groups(lr, weight_decay), {**group, "weight_decay": weight_decay}]


class PatchRanking(Objective):
    """DPS-ViT's training: cross entropy, and the scorer learns which patches the dense teacher's impacts would keep.

    Args:
        model: one with the method "dps".
        teacher: the dense model it came from.
        smoothing: of labels.
        ranking: weight of `ranking_loss`.

    Raises:
        TypeError: the model has no scorer.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, smoothing: float = 0.0, ranking: float = 1.0) -> None:
        super().__init__(model, smoothing, [teacher])
        scorer_of(model)
        self.ranking = ranking

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        model: Any = self.model
        output, scores = scored(model, images)
        cls = self.criterion(logits_of(output), target)
        counts = model.tokenops_patch.method.counts
        ranks = ranking_loss(scores, teacher_lifespans(self._teachers[0].eval(), images, counts))
        return cls + self.ranking * ranks, {"cls": cls.detach(), "ranking": ranks.detach()}


def _channels_of(model: nn.Module) -> int:
    """Channels of a model's images: those that its first convolution takes."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def _site(role: str, model: nn.Module) -> Site:
    try:
        return Site(model)
    except TypeError as error:
        raise TypeError(f"FeatureRecalibration: the {role} must be a model that apply_patch takes: {error}") from None
