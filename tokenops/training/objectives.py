"""What a training minimises: an `Objective` holds the model and makes a loss of a batch; here, those of one model."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.cait.losses import distillation_loss
from ..methods.cait.pruning import parameters_to_train
from ..methods.evit import keep_rate_at
from ..methods.evo_levit import evo_levit_loss
from ..methods.evo_vit import evo_vit_loss, stage_wise_at
from ..patching.views import logits_of

Metrics = dict[str, Tensor]


class Objective(nn.Module):
    """A model and the loss it is trained with; `fit` trains everything in its ``parameters()``.

    Teachers run in evaluation mode and without gradients, and are neither in ``parameters()`` nor in the state dict;
    they follow the objective to a device.

    Args:
        model: what is trained.
        smoothing: of labels; probabilities (mixup) are taken as they are.
        teachers: models that only look at images, or None.

    Raises:
        ValueError: ``smoothing`` is not at least 0 and below 1.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0, teachers: Sequence[nn.Module | None] = ()) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}, but it must be at least 0 and below 1")
        self.model, self.smoothing = model, smoothing
        self._teachers = tuple(teacher.eval() for teacher in teachers if teacher is not None)

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of a batch, and its parts, detached, for the log.

        Args:
            images: ``(B, C, H, W)``.
            target: int64 classes ``(B,)``, or probabilities ``(B, num_classes)``.
        """
        raise NotImplementedError

    def planned(self, updates: int) -> None:
        """To be called before a training of so many updates; ValueError where a schedule needs more of them."""

    def begin_epoch(self, epoch: float, epochs: int) -> None:
        """To be called at the beginning of epoch ``epoch`` (from 0) of ``epochs``: what has a schedule follows it."""

    def before_step(self) -> bool:
        """To be called behind the gradients, before they are clipped; False if optimizers must not use them."""
        return True

    def after_step(self) -> bool:
        """To be called behind an optimizer's step; True if there are other parameters now: optimizers begin anew."""
        return False

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """What AdamW takes; ``lr_scale`` is a group's multiple of the schedule's learning rate.

        Vectors, scalars and what a module's ``no_weight_decay`` names do not decay.
        """
        return decay_groups(self.model, parameters_to_train(self.model), lr, weight_decay)

    def optimizers(
        self, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> list[torch.optim.Optimizer]:
        """Everything that steps; a group without ``lr_scale`` keeps its learning rate."""
        groups = [group for group in self.parameter_groups(lr, weight_decay) if group["params"]]
        return [torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas)]

    @property
    def settled(self) -> bool:
        """Whether weights can be averaged: not while a pruner changes what they are."""
        return True

    @property
    def final(self) -> bool:
        """Whether the model runs as it will in the end: only epochs in which it does compete for the best one."""
        return True

    @property
    def mode(self) -> dict[str, Any]:
        """The model's attributes that follow a schedule, as they are: those of averaged weights follow, too."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the state dict: tensors, numbers, strings."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Undo `extra_state`, before the state dict is loaded."""

    @torch.no_grad()
    def teachers_logits(self, images: Tensor, which: int = 0) -> Tensor:
        return logits_of(self._teachers[which].eval()(images))

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy; labels are smoothed, probabilities are not."""
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing_of(target))

    def smoothing_of(self, target: Tensor) -> float:
        return 0.0 if target.is_floating_point() else self.smoothing

    def _apply(self, fn: Any, recurse: bool = True) -> "Objective":
        for teacher in self._teachers:
            teacher._apply(fn)
        return super()._apply(fn, recurse)


def decay_groups(model: nn.Module, parameters: Sequence[Tensor], lr: float, weight_decay: float) -> list[dict]:
    """``parameters`` as two groups: those that decay, and vectors and what ``no_weight_decay`` names, which do not."""
    plain: set[int] = set()
    named = {name: id(p) for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", set)
        plain |= {named.get(f"{prefix}.{name}" if prefix else name, 0) for name in (names() if callable(names) else ())}
    decay = [p for p in parameters if p.ndim > 1 and id(p) not in plain]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in plain]
    shared: dict[str, Any] = {"lr": lr, "lr_scale": 1.0}
    return [
        {"params": decay, "weight_decay": weight_decay, **shared},
        {"params": others, "weight_decay": 0.0, **shared},
    ]


class Plain(Objective):
    """Fine-tuning on labels, with self-distillation from the dense model if there is a teacher.

    The loss is :func:`tokenops.methods.cait.distillation_loss`, which without a teacher is cross entropy.

    Args:
        model, smoothing: as in :class:`Objective`.
        teacher: gives logits for the same images, or None.
        distillation: weight of the second term.
        temperature: of both softmaxes.
    """

    def __init__(
        self,
        model: nn.Module,
        smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distillation: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, smoothing, [teacher])
        self.distillation, self.temperature = distillation, temperature

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        expected = self.teachers_logits(images) if self._teachers else None
        logits = logits_of(self.model(images))
        loss = distillation_loss(
            logits, expected, target, self.distillation, self.temperature, self.smoothing_of(target)
        )
        return loss, {}


class ShrinkingKeepRate(Plain):
    """EViT's training: the keep rate begins at 1 and shrinks to its end, see :func:`tokenops.methods.keep_rate_at`.

    The last epoch always has the rate of the end, however few epochs there are.

    Args:
        model: one with the method "evit".
        keep_rate: at the end, a number or one a block; the model's own if not given.
        start, end: epochs at which it begins and ends to shrink, as parts of all epochs.
        **kwargs: those of :class:`Plain`.

    Raises:
        TypeError: the model has no keep rate.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        keep_rate: float | Sequence[float] | None = None,
        start: float = 0.1,
        end: float = 0.35,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        own: Any = getattr(model, "keep_rate", None)
        if own is None:
            raise TypeError(f"{type(model).__name__} has no keep rate: it must be patched with 'evit'")
        given = own if keep_rate is None else keep_rate
        self.keep_rate = float(given) if isinstance(given, (int, float)) else tuple(map(float, given))
        self.start, self.end = start, end
        self._rate_at(0, start, end)  # checks them
        self.rate: Any = None  # of the epoch, as keep_rate is

    @property
    def final(self) -> bool:
        return self.rate == self.keep_rate

    def begin_epoch(self, epoch: float, epochs: int) -> None:
        model: Any = self.model
        end = min(self.end * epochs, epochs - 1)
        self.rate = self._rate_at(epoch, min(self.start * epochs, end), end)
        model.keep_rate = self.rate

    @property
    def mode(self) -> dict[str, Any]:
        return {} if self.rate is None else {"keep_rate": self.rate}

    def _rate_at(self, epoch: float, start: float, end: float) -> float | tuple[float, ...]:
        rates = self.keep_rate
        if isinstance(rates, tuple):
            return tuple(keep_rate_at(epoch, rate, start, end) for rate in rates)
        return keep_rate_at(epoch, rates, start, end)


class SlowFast(Objective):
    """Evo-ViT's training: two heads (Evo-LeViT: four), layer-wise for two thirds of the epochs, then stage-wise.

    The last epoch is always stage-wise. Evo-LeViT's trade-off of scores is learned only in the stage-wise part. Beside
    the model's head on the mean patch token there is one on the class token, with a norm of its own; it begins as a
    copy, is trained and saved with the objective, and has no part in the model.

    Args:
        model: a VisionTransformer of timm with the method "evo_vit" that pools its patches (``global_pool="avg",
            fc_norm=True``), as ``evo_deit_*`` are, or an `EvoLeViT`.
        smoothing: as in :class:`Objective`.
        teacher: whose classes an `EvoLeViT`'s distillation heads learn, or None.

    Raises:
        TypeError: the model has no such modes.
        ValueError: a teacher is given for a model without distillation heads; or the model does not pool its patches,
            or has no class token.

    Source: Xu et al., Evo-ViT (AAAI 2022), in its published code.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0, teacher: nn.Module | None = None) -> None:
        super().__init__(model, smoothing, [teacher])
        if not hasattr(model, "stage_wise"):
            raise TypeError(
                f"{type(model).__name__} has no stage_wise: it must be patched with 'evo_vit', or an EvoLeViT"
            )
        #: what of the model follows the epochs; an EvoLeViT has the second, and heads of its own
        self.modes = [name for name in ("stage_wise", "learn_tradeoff") if hasattr(model, name)]
        if teacher is not None and len(self.modes) < 2:
            raise ValueError(f"teacher: {type(model).__name__} has no distillation heads, but an EvoLeViT has")
        self.norm_cls: Any = None
        if len(self.modes) < 2:
            whole: Any = model
            if getattr(whole, "global_pool", None) != "avg" or isinstance(whole.fc_norm, nn.Identity):
                raise ValueError(
                    "the model must classify the mean of its patches, for the class token has a head of its own: make"
                    " it with global_pool='avg', fc_norm=True"
                )
            if whole.cls_token is None:
                raise ValueError("the model must have a class token, which has a head of its own")
            self.norm_cls, self.head_cls = copy.deepcopy(whole.fc_norm), copy.deepcopy(whole.head)

    @property
    def final(self) -> bool:
        return bool(self.model.stage_wise)

    def begin_epoch(self, epoch: float, epochs: int) -> None:
        for name in self.modes:
            setattr(self.model, name, stage_wise_at(epoch, epochs) or epoch + 1 >= epochs)

    @property
    def mode(self) -> dict[str, Any]:
        return {name: getattr(self.model, name) for name in self.modes}

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        if self.norm_cls is not None:
            model: Any = self.model
            tokens = model.forward_features(images)
            of_class = self.head_cls(model.head_drop(self.norm_cls(tokens[:, 0])))
            return evo_vit_loss((model.forward_head(tokens), of_class), target, self.criterion), {}
        logits = self.model(images)
        expected = self.teachers_logits(images) if self._teachers else None
        return evo_levit_loss(logits, target, expected, self.criterion), {}

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, parameters_to_train(self), lr, weight_decay)
