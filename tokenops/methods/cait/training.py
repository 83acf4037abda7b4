"""Training a compressed model: self-distillation, token labels merged with the tokens, and the whole loop."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import NeighbourMerging
from .blocks import check_model
from .compact import compact
from .compactors import CompactorPruner
from .merging import merges_of, order_of
from .pruning import BudgetPruner, parameters_to_train


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    weight: float = 0.5,
    temperature: float = 1.0,
    smoothing: float = 0.1,
) -> Tensor:
    r"""Cross-entropy, and how far the student is from the uncompressed model it began as.

    .. math:: \mathrm{CE}(s, y)
        + \lambda\,\tau^2\,\mathrm{KL}(\mathrm{softmax}(t / \tau) \,\|\, \mathrm{softmax}(s / \tau))

    both averaged over images (and pixels).

    Args:
        student: s, logits ``(B, K)``, or ``(B, K, H, W)`` of a segmentation.
        teacher: t, logits of the same shape; no gradients go there. None leaves the second term out.
        target: y, int64 classes without the dimension K, or probabilities in the logits' shape (mixup).
        weight: :math:`\lambda`.
        temperature: :math:`\tau`, above 0.
        smoothing: of the labels.

    Raises:
        ValueError: temperature is not above 0, or the two shapes differ.

    Source: self-distillation is our choice for CAIT, whose training is not published.
    """
    loss = F.cross_entropy(student, target, label_smoothing=smoothing)
    if teacher is None:
        return loss
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}, but it must be above 0")
    if student.shape != teacher.shape:
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}, but student {tuple(student.shape)}")
    ours, theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher.detach()))
    distance = F.kl_div(ours, theirs, reduction="sum", log_target=True) * student.shape[1] / student.numel()
    return loss + weight * temperature**2 * distance


def merge_token_labels(labels: Tensor, model: Any) -> Tensor:
    """Labels of patches to labels of what the patches became, averaged over the same pairs and in the same order.

    For LV-ViT's token labelling, which asks for a class distribution of every token that comes out.

    Args:
        labels: ``(B, H*W, K)``, float, patch by patch in rows.
        model: behind ``apply_patch(model, "cait")``; a dense one leaves the labels as they are.

    Returns:
        ``(B, M, K)``, one label for each patch token behind the last block.

    Raises:
        TypeError: the model is behind another method, or not a timm VisionTransformer.
        ValueError: there are not as many labels as patches.
    """
    check_model("merge_token_labels", model)
    height, width = model.patch_embed.grid_size
    if labels.dim() != 3 or labels.shape[1] != height * width:
        raise ValueError(f"labels must be (B, {height * width}, K), but got {tuple(labels.shape)}")
    order = order_of(model)
    if order is not None:
        labels = labels[:, order]
    for merge in merges_of(model):
        if merge is not None:
            average = NeighbourMerging(labels.shape[2], merge.axis, merge.grid, prefix=0, layout=merge.layout)
            labels = average(labels)
    return labels


class Record(NamedTuple):
    """What happened: the loss of every step, and before which step (from 0) the model was compacted, None if never."""

    losses: list[float]
    compacted_at: int | None


def compress(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    teacher: nn.Module | None = None,
    pruner: BudgetPruner | None = None,
    loss: Callable[[Tensor, Tensor | None, Tensor], Tensor] = distillation_loss,
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup: int = 0,
    clip: float = 1.0,
    progress: Callable[[int, Tensor], object] | None = None,
) -> tuple[Any, Record]:
    """Train a model whose tokens are merged, prune it meanwhile, compact it once the choice is final, and go on.

    AdamW (vectors, position embeddings and class tokens do not decay), a linear warm-up and a cosine to zero over all
    steps; compactors have SGD with ResRep's momentum of 0.99 and a constant learning rate of 0.01. AdamW begins anew
    behind the compaction. For one process: several need a loop of their own around ``pruner.step()``.

    Args:
        model: what is trained, in place: a classifier, or anything with the pruner's model within
            (`SegmentationModel`). It comes back in the mode, training or not, in which it was given.
        batches: (images, targets), gone through again and again; they are moved to the model's device.
        steps: how many.
        teacher: gives logits for the same images, in evaluation mode and without gradients: the uncompressed model.
        pruner: a `ChannelPruner` or `CompactorPruner`, whose schedule must end within the steps; None prunes nothing.
        loss: of the logits, the teacher's logits (or None) and the targets.
        lr: the highest learning rate.
        weight_decay, betas: AdamW's.
        warmup: steps of the warm-up.
        clip: the largest norm of all gradients together.
        progress: called behind every step with its number, from 0, and its loss.

    Returns:
        The model (with a pruner that was the model's own: a new one, compacted) and the `Record`.

    Raises:
        ValueError: the pruner's schedule ends too late, its model is not within the model, or there are no batches.

    Source: CAIT's recipe is not published; joint merging and pruning, then compaction, is reconstructed.
    """
    if pruner is not None:
        end = pruner.steps[1] + getattr(pruner, "settle", 0) - pruner.steps_done
        if end > steps:
            raise ValueError(f"steps={steps}, but the pruner's schedule ends {end} steps from now")
        if all(module is not pruner.model for module in model.modules()):
            raise ValueError("the pruner's model must be the model or a part of it")
    training, first = model.training, next(model.parameters())
    adamw = dict(lr=lr, weight_decay=weight_decay, betas=betas)
    optimizers = _optimizers(model, pruner, adamw)
    losses = torch.zeros(steps, device=first.device)  # not a tensor a step: those scatter over the heap and pin it
    compacted_at = None
    model.train()
    for step, (images, target) in zip(range(steps), _again_and_again(batches)):
        if pruner is not None and pruner.frozen:
            model = _compacted(model, pruner)
            optimizers, pruner, compacted_at = _optimizers(model, None, adamw), None, step
        images, target = images.to(first.device), target.to(first.device)
        expected = None
        if teacher is not None:
            with torch.no_grad():
                expected = teacher.eval()(images)
        value = loss(model(images), expected, target)
        value.backward()
        losses[step] = value.detach()
        if pruner is not None:
            pruner.step()
        if pruner is None or not pruner.frozen:  # a pruner that has just ended has changed what the gradients are of
            nn.utils.clip_grad_norm_(parameters_to_train(model), clip)
            for group in optimizers[0].param_groups:
                group["lr"] = lr * _schedule(step, steps, warmup)
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad()
        if progress is not None:
            progress(step, losses[step])
    if pruner is not None and pruner.frozen:
        model, compacted_at = _compacted(model, pruner), steps
    return model.train(training), Record(losses.tolist(), compacted_at)


def _optimizers(model: nn.Module, pruner: BudgetPruner | None, adamw: dict[str, Any]) -> Any:
    trained = parameters_to_train(model)
    plain: set[int] = set()
    module: Any
    for module in model.modules():  # position embeddings and class tokens
        plain |= {id(getattr(module, name, None)) for name in getattr(module, "no_weight_decay", tuple)()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1 and id(p) not in plain]},
        {"params": [p for p in trained if p.ndim <= 1 or id(p) in plain], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **adamw)]
    if isinstance(pruner, CompactorPruner):
        optimizers.append(torch.optim.SGD(list(pruner.parameters()), 0.01, momentum=0.99))
    return optimizers


def _schedule(step: int, steps: int, warmup: int) -> float:
    """What part of the highest learning rate a step has."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def _compacted(model: nn.Module, pruner: BudgetPruner) -> nn.Module:
    """The model with the pruner's compacted."""
    small = compact(pruner.model)
    if model is pruner.model:
        return small
    name = next(name for name, module in model.named_modules() if module is pruner.model)
    model.set_submodule(name, small)
    return model


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("there are no batches any more: give a DataLoader or a list, not an iterator")
