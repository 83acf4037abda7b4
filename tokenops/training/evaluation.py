"""Evaluation, and sums over batches and processes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patching.views import evaluating, logits_of
from .batches import eval_batches


class Totals:
    """Means of numbers over images: sums are kept in fp64, where the numbers come from, so that nothing waits."""

    def __init__(self, state: dict[str, Tensor] | None = None, device: Any = None) -> None:
        self.sums = {name: value.to(device) for name, value in (state or {}).items()}

    def add(self, numbers: dict[str, Tensor], images: int) -> None:
        for name, value in {**numbers, "images": torch.ones((), device=numbers["loss"].device)}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double() * images

    def means(self, accelerator: Any = None) -> dict[str, float]:
        """Over the images of all processes; collective."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name] for name in names])
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        found = dict(zip(names, sums.tolist()))
        images = found.pop("images")
        return {name: value / images for name, value in found.items()}

    def state(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.sums.items()}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, accelerator: Any = None, amp: str = "no") -> dict[str, float]:
    """Loss and accuracy in per cent: ``eval_loss``, ``top1``, and ``top5`` where there are more than five classes.

    Args:
        model: in any mode, which every module of it keeps.
        loader: of (images, classes); in several processes a DataLoader is shared out, every image once.
        accelerator: of the processes; one process without.
        amp: "no", "bf16" or "fp16".

    Raises:
        ValueError: there is no image.
    """
    device = next(model.parameters()).device
    if accelerator is not None:
        loader = eval_batches(loader, accelerator.process_index, accelerator.num_processes)
    sums, classes = torch.zeros(4, dtype=torch.float64, device=device), 0
    with evaluating(model):
        for batch in loader:
            if batch is None:  # no image of it could be read
                continue
            images, target = moved(batch, device)
            with autocast(device, amp):
                logits = logits_of(model(images)).float()
            classes = logits.shape[1]
            right = logits.topk(min(5, classes)).indices == target.unsqueeze(1)
            loss = F.cross_entropy(logits, target, reduction="sum")
            sums += torch.stack((loss, right[:, 0].sum(), right.sum(), torch.as_tensor(len(images), device=device)))
    if accelerator is not None and accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    loss, first, five, images = sums.tolist()
    if not images:
        raise ValueError("the evaluation's loader has no image")
    scores = {"eval_loss": loss / images, "top1": 100 * first / images}
    return scores | ({"top5": 100 * five / images} if classes > 5 else {})


def autocast(device: torch.device, amp: str) -> Any:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "no")


def moved(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    images, target = batch
    return images.to(device, non_blocking=True), target.to(device, non_blocking=True)
