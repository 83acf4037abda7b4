"""Channel pruning while training: masks by gated Taylor scores, the same count in every head, down to a budget."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .blocks import MASKS, blocks_of
from .costs import KINDS, ChannelCosts, channel_counts, choose_channels, cubic_keep, latency_costs, mac_costs

#: what the kept channels of a head (of an MLP) are multiples of: what the kernels' matrix units take
MULTIPLES = {"qk": 16, "v": 8, "hidden": 64}


class PrunedBlock(NamedTuple):
    """One line of a pruner's report: channels that are kept, a head's and the MLP's, and what they and all cost."""

    block: int
    qk: int
    v: int
    hidden: int
    cost: float
    dense_cost: float


@dataclass
class Layer:
    """The channels of one kind in one block; ``mask`` is the one their module has."""

    block: int
    kind: str
    owner: Any
    heads: int
    width: int
    cost: float
    multiple: int

    @property
    def mask(self) -> Any:
        return getattr(self.owner, MASKS[self.kind][1])

    @mask.setter
    def mask(self, value: Any) -> None:
        setattr(self.owner, MASKS[self.kind][1], value)


class BudgetPruner(ABC):
    """What both pruners share: which channels there are, the schedule of the budget, the choice, the report.

    Attributes:
        layers: what is pruned.
        counts: for every block (heads, channels a head) of every kind, unpruned.
        kept: for every layer the channels that stay now, ``(H, D)`` bool on the CPU.
        costs: what the channels cost.
        budget: what the model may cost at the end.
        steps_done: how often :meth:`step` was called.
        frozen: whether the choice is final.
    """

    per_cost = True

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        steps: tuple[int, int],
        costs: str | ChannelCosts = "macs",
        every: int = 200,
        multiples: Mapping[str, int] | None = None,
        same_channels: bool = False,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        first, last = steps
        multiples = {**MULTIPLES, **(multiples or {})}
        _check(target, first, last, every, multiples, kinds)
        self.model, self.steps, self.every, self.same_channels = model, (first, last), every, same_channels
        self.costs = found = self._costs(model, costs)
        self.counts = channel_counts(model)
        self.layers = []
        for i, (block, counts) in enumerate(zip(blocks_of(model), self.counts)):
            for kind in (kind for kind in KINDS if kind in kinds):
                heads, width = counts[kind]
                owner = getattr(block, MASKS[kind][0])
                if width:
                    _check_prunable(i, kind, owner)
                    layer = Layer(i, kind, owner, heads, width, getattr(found, kind)[i], multiples[kind])
                    self.layers.append(layer)
        if not self.layers:
            raise ValueError(f"kinds={kinds!r}, but the model has no such channels: its MLPs are not timm's")
        self.kept = [torch.ones(layer.heads, layer.width, dtype=torch.bool) for layer in self.layers]
        self.budget = target * found.total if target <= 1 else float(target)
        least = self.cost - sum(
            layer.heads * max(0, layer.width - layer.multiple) * layer.cost for layer in self.layers
        )
        if self.budget < least:
            raise ValueError(
                f"target={target}: that is {self.budget:.6g} {found.unit}, but with one unit of each kind in every"
                f" block the model still costs {least:.6g} of {found.total:.6g}"
            )
        self.steps_done, self.frozen = 0, False

    @abstractmethod
    def step(self) -> bool:
        """To be called behind ``loss.backward()``: whether the choice was made anew."""

    @abstractmethod
    def freeze(self) -> None:
        """Make the choice final as it is; :func:`compact` comes next."""

    def optimizers(self) -> list[Optimizer]:
        """What steps parameters of the pruner's own."""
        return []

    @property
    def left(self) -> int:
        """Steps until the choice is final."""
        return 0 if self.frozen else self.steps[1] - self.steps_done

    @staticmethod
    def _costs(model, costs):
        if isinstance(costs, ChannelCosts):
            depth = len(blocks_of(model))
            for kind in KINDS:
                if len(getattr(costs, kind)) != depth:
                    raise ValueError(f"costs: {kind} has {len(getattr(costs, kind))} blocks, but the model {depth}")
            return costs
        if costs not in ("macs", "latency"):
            raise ValueError(f"costs={costs!r}, but it must be 'macs', 'latency' or ChannelCosts")
        return mac_costs(model) if costs == "macs" else latency_costs(model)

    @property
    def cost(self) -> float:
        """What the model costs with the channels that stay now."""
        gone = sum(layer.cost * int((~kept).sum()) for layer, kept in zip(self.layers, self.kept))
        return self.costs.total - gone

    def report(self) -> list[PrunedBlock]:
        """For every block what is kept: its channels a head and their cost."""
        rows = []
        for i, counts in enumerate(self.counts):
            prices = {kind: getattr(self.costs, kind)[i] for kind in KINDS}
            now = {kind: width for kind, (_, width) in counts.items()}
            for layer, kept in zip(self.layers, self.kept):
                if layer.block == i:
                    now[layer.kind] = int(kept[0].sum())
            cost, dense = (
                sum(counts[kind][0] * widths[kind] * prices[kind] for kind in KINDS)
                for widths in (now, {kind: width for kind, (_, width) in counts.items()})
            )
            rows.append(PrunedBlock(i, now["qk"], now["v"], now["hidden"], cost, dense))
        return rows

    def _advance(self, scores: Any) -> bool:
        """One step of the schedule: whether the choice was made anew, from ``scores()``."""
        self.steps_done += 1
        t, (first, last) = self.steps_done, self.steps
        if not (first <= t <= last and (t % self.every == 0 or t == last)):
            return False
        total = self.costs.total
        allowed = max(self.budget, total * cubic_keep(t, first, last, min(1.0, self.budget / total)))  # max: rounding
        fixed = total - sum(layer.heads * layer.width * layer.cost for layer in self.layers)
        self.kept = self.choose(scores(), allowed - fixed)
        return True

    def choose(self, scores: Sequence[Tensor], budget: float) -> list[Tensor]:
        """Which channels stay, ``(H, D)`` bool for every layer: by `choose_channels`, or as a subclass chooses."""
        return choose_channels(
            scores,
            [layer.cost for layer in self.layers],
            [layer.multiple for layer in self.layers],
            budget,
            per_cost=self.per_cost,
            same_channels=self.same_channels,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs to go on as this one would have."""
        return {"steps_done": self.steps_done, "frozen": self.frozen, "kept": _flat(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner of the same model and options was.

        Raises:
            ValueError: the state is another model's.
        """
        size = sum(kept.numel() for kept in self.kept)
        if len(state["kept"]) != size:
            raise ValueError(f"the state is of {len(state['kept'])} channels, but this model has {size} to prune")
        self.steps_done, self.frozen = state["steps_done"], state["frozen"]
        self.kept = [part.bool().cpu() for part in self._parts(state["kept"])]

    def _parts(self, flat):
        """One flat vector to a tensor (H, D) for every layer."""
        sizes = [layer.heads * layer.width for layer in self.layers]
        return [part.reshape(layer.heads, -1) for part, layer in zip(flat.split(sizes), self.layers)]


class ChannelPruner(BudgetPruner):
    r"""Prunes channels of attention and MLPs while a model trains, by gated Taylor scores.

    It is CAIT's CDCP, reconstructed: only its ideas are published (one mask for q and k, heads of equal width, channels
    that come and go while training). Every block gets masks of 0 and 1: one for q and k, one for v and the matching
    rows of the output projection, one for the MLP's hidden channels. Their gradients, which channels with mask 0 get
    too, are Taylor scores

    .. math:: s \leftarrow \beta s + (1 - \beta)\, (\partial L / \partial m)^2

    and every so many steps all masks are chosen anew by :func:`choose_channels`, within a budget that falls by
    :func:`cubic_keep`: what was pruned returns if it scores well. After the last step the choice is final; then
    :func:`compact`.

    The masks are parameters, for their gradients, but must not be in the optimizer: give it
    :func:`parameters_to_train`. Averages of weights (EMA) should begin after :func:`compact`. With several processes
    (``torch.distributed``) the masks' gradients are averaged over them, so that all choose the same.

    Args:
        model: behind :func:`prunable`, tokens merged already, without masks.
        target: what the model may cost at the end: up to 1 a fraction of the cost with all channels, above 1 MACs of an
            image or, by latency, microseconds of a batch.
        steps: the first and the last step of the schedule. CAIT's are unknown: 5 % and 50 % of training are ours.
        costs: "macs" (`mac_costs`), "latency" (`latency_costs`) or :class:`ChannelCosts`.
        every: steps between two choices.
        beta: of the running mean of scores.
        multiples: what kept channels are multiples of: ``{"qk": 16, "v": 8, "hidden": 64}``, or other values for some.
        same_channels: all heads keep the same channels, instead of the same number.
        kinds: what is pruned, of "qk", "v" and "hidden".

    Raises:
        TypeError: the model is not prunable.
        ValueError: an argument is out of range, the target cannot be met, a norm runs over channels that were to be
            pruned (``qk_norm``), or a block has a mask already.

    Source: Wang et al., CAIT (arXiv 2309.15755), a reconstruction; gate scores as in Molchanov et al., Importance
    Estimation for Neural Network Pruning (CVPR 2019).

    >>> import timm
    >>> from tokenops.methods.cait import prunable
    >>> model = prunable(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2))
    >>> pruner = ChannelPruner(model, target=0.8, steps=(0, 2), every=1)
    >>> for _ in range(2):
    ...     model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    ...     chosen = pruner.step()
    >>> pruner.frozen, pruner.cost <= pruner.budget
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        steps: tuple[int, int],
        costs: str | ChannelCosts = "macs",
        every: int = 200,
        beta: float = 0.9,
        multiples: Mapping[str, int] | None = None,
        same_channels: bool = False,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}, but it must be at least 0 and below 1")
        shared: Any = dict(steps=steps, costs=costs, every=every, multiples=multiples)
        super().__init__(model, target, same_channels=same_channels, kinds=kinds, **shared)
        self.beta = beta
        for layer, kept in zip(self.layers, self.kept):
            shape = kept.shape if layer.kind != "hidden" else (layer.width,)
            layer.mask = nn.Parameter(torch.ones(shape, device=next(layer.owner.parameters()).device))
        self.scores = torch.zeros(sum(kept.numel() for kept in self.kept), device=self.layers[0].mask.device)

    @torch.no_grad()
    def step(self) -> bool:
        """Take the masks' gradients, behind ``loss.backward()`` and before gradients are clipped or used.

        Gradients that are not finite (a step a gradient scaler skips) leave the scores as they were.

        Returns:
            Whether the masks were chosen anew.

        Raises:
            RuntimeError: no mask has a gradient.
        """
        masks = [layer.mask for layer in self.layers]
        gradients = [mask.grad for mask in masks]
        for mask in masks:
            mask.grad = None
        if self.frozen:
            return False
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("ChannelPruner.step: no mask has a gradient; it comes behind loss.backward()")
        flat = _flat([torch.zeros_like(m) if g is None else g for m, g in zip(masks, gradients)]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
            flat = flat / dist.get_world_size()
        self.scores = self.scores.to(flat.device)
        new = torch.lerp(flat.square(), self.scores, self.beta)
        self.scores = torch.where(flat.isfinite().all(), new, self.scores)
        chosen = self._advance(lambda: self._parts(self.scores.cpu()))
        if chosen:
            self._set_masks()
        self.frozen = self.steps_done >= self.steps[1]
        return chosen

    def freeze(self) -> None:
        self.frozen = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": self.scores.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.scores = state["scores"].to(self.scores.device, torch.float32, copy=True)
        self._set_masks()

    @torch.no_grad()
    def _set_masks(self):
        for layer, kept in zip(self.layers, self.kept):
            layer.mask.copy_(kept.reshape(layer.mask.shape))


def parameters_to_train(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get: every parameter that is trained and is no mask, and no compactor or its gate."""
    others = (*map(".".join, MASKS.values()), "qkv.compactor_qk", "qkv.compactor_v")
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(others)]


def _flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def _check_prunable(block, kind, owner):
    """ValueError where a norm runs over the channels, or they have a mask."""
    norms = {"qk": ("q_norm", "k_norm"), "v": ("norm",), "hidden": ("norm",)}[kind]
    for name in norms:
        if not isinstance(getattr(owner, name), nn.Identity):
            raise ValueError(
                f"block {block}: {name} is a norm over the {kind} channels, which cannot be pruned then; leave"
                f" {kind!r} out of kinds"
            )
    if getattr(owner, MASKS[kind][1]) is not None:
        raise ValueError(f"block {block} has a mask of its {kind} channels already: compact(model) first, or remove it")


def _check(target, first, last, every, multiples, kinds):
    if not (target > 0 and math.isfinite(target)):
        raise ValueError(f"target={target}, but it must be above 0: a fraction up to 1, or a cost")
    if not 0 <= first < last:
        raise ValueError(f"steps=({first}, {last}), but they must be two numbers from 0 on, the first below the last")
    if every < 1:
        raise ValueError(f"every={every}, but it must be at least 1")
    for kind, multiple in multiples.items():
        if kind not in KINDS or multiple < 1:
            raise ValueError(f"multiples={{{kind!r}: {multiple}}}, but it takes {KINDS} and numbers of at least 1")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds={kinds!r}, but it must be some of {KINDS}")
