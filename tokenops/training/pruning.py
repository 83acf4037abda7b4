"""CAIT's objective: a model is pruned while it learns, and compacted in the middle of the training."""

from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from ..methods.cait.compact import compact
from ..methods.cait.compactors import CompactorPruner
from ..methods.cait.pruning import BudgetPruner
from ..methods.cait.structure import Structure, restructure
from .objectives import Plain


class Pruned(Plain):
    """Self-distillation, and a pruner that chooses channels behind every step; once it is done the model is compacted.

    Optimizers and averages of weights begin anew then. Compactors have SGD with ResRep's momentum of 0.99 and a
    constant learning rate of 0.01, beside AdamW.

    Args:
        model: what is trained: behind `prunable`.
        pruner: a `ChannelPruner` or `CompactorPruner` of the model, or None to prune nothing.
        **kwargs: those of :class:`Plain`.

    Raises:
        ValueError: the pruner is another model's.
    """

    def __init__(self, model: nn.Module, pruner: BudgetPruner | None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if pruner is not None and pruner.model is not model:
            raise ValueError("the pruner's model must be the model")
        self.pruner, self.compacted = pruner, False

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
        self.pruner.step()
        return not self.pruner.frozen

    def after_step(self) -> bool:
        if self.pruner is None or not self.pruner.frozen:
            return False
        self.model = compact(self.pruner.model).train(self.model.training)
        self.pruner, self.compacted = None, True
        return True

    def optimizers(self, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> list[Optimizer]:
        """AdamW, and SGD for compactors while there are any."""
        found = super().optimizers(lr, weight_decay, betas)
        if isinstance(self.pruner, CompactorPruner):
            found.append(SGD(list(self.pruner.parameters()), 0.01, momentum=0.99))
        return found

    def extra_state(self) -> dict[str, Any]:
        if self.compacted:
            return {"structure": Structure.of(self.model).to_json()}
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if "structure" in state:
            first = next(self.model.parameters())
            plain: Any = compact(self.model) if self.pruner is not None else self.model
            structure = Structure.from_json(state["structure"])
            if any(getattr(block, "merge", None) is not None for block in plain.blocks):
                structure = Structure(widths=structure.widths)
            self.model = restructure(plain, structure).to(first.device).train(self.model.training)
            self.pruner, self.compacted = None, True
        elif self.pruner is not None:
            if "pruner" not in state:
                raise ValueError("the checkpoint has no state of a pruner: it is of another objective")
            self.pruner.load_state_dict(state["pruner"])
