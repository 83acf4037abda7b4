"""Objectives whose teacher is looked into: SiT's feature recalibration and DPS-ViT's ranking of patches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.patch_slimming.dynamic import TokenScorer, ranking_loss, scored, teacher_lifespans
from ..nn import ReverseTokenSlimming
from ..patching.engine import tokens_of
from ..patching.views import evaluating
from .objectives import Metrics, Objective, decay_groups, logits_of, parameters_to_train

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

    Args:
        model: a vision transformer whose blocks leave a fixed number of tokens, as "sit" does.
        teacher: a dense vision transformer of the same depth and width.
        smoothing: of labels.
        temperature: :math:`\tau`.
        token_weight, logits_weight, hard_weight: of the last three terms.
        cnn_teacher: whose class the student's distillation head learns (`L_hard`), or None. The student must return
            ``(logits, distillation logits)`` in training, as timm's distilled models do.
        img_size: of the images, for the run; the model's own if not given.

    Raises:
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
        self._fit_to(_size_of(model) if img_size is None else img_size)

    @torch.no_grad()
    def _fit_to(self, img_size: int | tuple[int, int]) -> None:
        """Make the reverse modules, and check the widths."""
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        first = next(self.model.parameters())
        images = torch.zeros(1, _channels_of(self.model), *size, device=first.device, dtype=first.dtype)
        self._teachers[0].to(first.device)
        with evaluating(self.model):
            _, ours = block_tokens(self.model, images)
        _, theirs = block_tokens(self._teachers[0], images)
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

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            output, theirs = block_tokens(self._teachers[0].eval(), images)
            expected = logits_of(output)
        output, ours = block_tokens(self.model, images)
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
        reverse = {id(p): p for m in self.modules() if isinstance(m, ReverseTokenSlimming) for p in m.parameters()}
        others = [p for p in parameters_to_train(self.model) if id(p) not in reverse]
        group = {"params": list(reverse.values()), "lr": RTSM_LR_SCALE * lr, "lr_scale": RTSM_LR_SCALE}
        return [*decay_groups(self.model, others, lr, weight_decay), {**group, "weight_decay": weight_decay}]


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
        if not any(isinstance(module, TokenScorer) for module in model.modules()):
            raise TypeError(f"{type(model).__name__} has no scorer: the model must be patched with 'dps'")
        self.ranking = ranking

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        model: Any = self.model
        output, scores = scored(model, images)
        cls = self.criterion(logits_of(output), target)
        counts = model.tokenops_patch.method.counts
        ranks = ranking_loss(scores, teacher_lifespans(self._teachers[0].eval(), images, counts))
        return cls + self.ranking * ranks, {"cls": cls.detach(), "ranking": ranks.detach()}


def block_tokens(model: Any, images: Tensor) -> tuple[Any, list[Tensor]]:
    """What the model returns, and the patch tokens ``(B, M, C)`` behind every block, as the next block gets them."""
    blocks, prefix = blocks_of(model), prefix_of(model)
    with captured(blocks) as tokens:
        output = model(images)
    return output, [x[:, prefix:] for x in tokens]


@contextmanager
def captured(blocks: Any) -> Iterator[list[Tensor]]:
    """The outputs of blocks, in the order of calls, while it lasts; of slimmed ones what the slimming made of them."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(tokens_of(output))

    def slimmed(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if outputs:
            outputs[-1] = output

    handles = [block.register_forward_hook(keep) for block in blocks]
    handles += [block.slimming.register_forward_hook(slimmed) for block in blocks if hasattr(block, "slimming")]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> Any:
    """The transformer's blocks: ``model.blocks``, or of any other model its longest list of modules of one class."""
    blocks: Any = getattr(model, "blocks", None)
    if blocks is not None:
        return blocks
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    if not lists:
        raise TypeError(f"{type(model).__name__} has no list of blocks")
    return max(lists, key=len)


def prefix_of(model: Any) -> int:
    """How many tokens stand before the patches."""
    found = getattr(model, "num_prefix_tokens", None)
    if found is None:  # of Hugging Face
        found = sum(m.cls_token is not None for m in model.modules() if hasattr(m, "cls_token"))
        found = found or sum(hasattr(m, "class_embedding") for m in model.modules())
    return int(found)


def _size_of(model: Any) -> tuple[int, int]:
    """Height and width of a model's images."""
    for owner in (model, getattr(model, "patch_embed", None), getattr(model, "config", None)):
        size = getattr(owner, "img_size", None) or getattr(owner, "image_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (size[0], size[1])
    raise ValueError(f"img_size must be given: {type(model).__name__} does not say what images it takes")


def _channels_of(model: nn.Module) -> int:
    """Channels of a model's images: those that its first convolution takes."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
