"""CAIT's objective: a model is pruned while it learns, and compacted in the middle of the training."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..methods.cait.compact import compact
from ..methods.cait.pruning import BudgetPruner
from ..methods.cait.structure import Structure, restructure
from .objectives import Plain


class Pruned(Plain):
    """Self-distillation, and a pruner that chooses channels behind every step; once it is done the model is compacted.

    Optimizers and averages of weights begin anew then. Compactors have SGD with ResRep's momentum of 0.99 and a
    constant learning rate of 0.01, beside AdamW.

    Args:
        model: what is trained: behind `prunable`, or with such a model within (`SegmentationModel`).
        pruner: a `ChannelPruner` or `CompactorPruner` of the model or that part, whose schedule must end within the
            training; or None to prune nothing.
        **kwargs: those of :class:`Plain`.

    Attributes:
        model: another one behind the compaction, where the pruner was the model's own.
        compacted_at: the pruner's steps before the compaction; None until then.

    Raises:
        ValueError: the pruner is another model's.

    Source: CAIT's recipe is not published; joint merging and pruning, then compaction, is reconstructed.

    >>> import timm, torch
    >>> from tokenops.methods import cait
    >>> from tokenops.training import fit
    >>> model = cait.prunable(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=2))
    >>> objective = Pruned(model, cait.ChannelPruner(model, target=0.8, steps=(0, 2), every=1))
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    >>> history = fit(objective, batches, steps=3, lr=1e-3, progress=False, device="cpu")
    >>> objective.compacted_at, cait.macs(objective.model) < cait.macs(model)
    (2, True)
    """

    def __init__(self, model: nn.Module, pruner: BudgetPruner | None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        names = [name for name, module in model.named_modules() if pruner is not None and module is pruner.model]
        if pruner is not None and not names:
            raise ValueError("the pruner's model must be the model or a part of it")
        self.pruner, self.part = pruner, "".join(names)
        self.compacted_at: int | None = None

    def planned(self, updates: int) -> None:
        if self.pruner is not None and self.pruner.left > updates:
            raise ValueError(f"the pruner's schedule ends {self.pruner.left} steps from now, behind {updates} updates")

    def _put(self, small: nn.Module) -> None:
        if self.part:
            self.model.set_submodule(self.part, small)
        else:
            self.model = small

    @property
    def settled(self) -> bool:
        return self.pruner is None

    @property
    def final(self) -> bool:
        return self.pruner is None

    def before_step(self) -> bool:
        """The pruner's step; one that has just ended has changed what the gradients are of."""
        if self.pruner is None:
            return True
        before = self.pruner.frozen
        self.pruner.step()
        return before or not self.pruner.frozen

    def after_step(self) -> bool:
        if self.pruner is None or not self.pruner.frozen:
            return False
        self._put(compact(self.pruner.model).train(self.model.training))
        self.compacted_at, self.pruner = self.pruner.steps_done, None
        return True

    def optimizers(self, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> list[Optimizer]:
        """AdamW, and what the pruner has beside."""
        found = super().optimizers(lr, weight_decay, betas)
        return found if self.pruner is None else [*found, *self.pruner.optimizers()]

    def extra_state(self) -> dict[str, Any]:
        if self.compacted_at is not None:
            structure = Structure.of(self.model.get_submodule(self.part))
            return {"structure": structure.to_json(), "compacted_at": self.compacted_at}
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if "structure" in state:
            part = self.model.get_submodule(self.part)
            plain: Any = part if self.pruner is None else compact(part)
            structure = Structure.from_json(state["structure"])
            if any(getattr(block, "merge", None) is not None for block in plain.blocks):
                structure = Structure(widths=structure.widths)
            self._put(restructure(plain, structure).to(next(part.parameters()).device).train(part.training))
            self.pruner, self.compacted_at = None, state["compacted_at"]
        elif self.pruner is not None:
            if "pruner" not in state:
                raise ValueError("the checkpoint has no state of a pruner: it is of another objective")
            self.pruner.load_state_dict(state["pruner"])
