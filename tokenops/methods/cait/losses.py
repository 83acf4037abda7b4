"""What a compressed model is trained on: self-distillation, and token labels merged with the tokens."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...nn import NeighbourMerging
from .blocks import check_model
from .merging import merges_of, order_of


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
