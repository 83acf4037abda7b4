"""What a channel costs, in multiply-adds or in measured time, and which channels a budget is best spent on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...nn import Attention
from ...patching.views import evaluating
from .blocks import MASKS, Mlp, blocks_of
from .structure import macs, token_counts

#: what is pruned: channels of q and k, channels of v with the output projection's, hidden channels of the MLP
KINDS = tuple(MASKS)


@dataclass(frozen=True)
class ChannelCosts:
    """What each channel of each block costs, and what is left when all are gone.

    Attributes:
        qk: for every block, one channel of q and k of one head.
        v: for every block, one channel of v of one head.
        hidden: for every block, one hidden channel of the MLP.
        total: the whole model with every channel.
        unit: of all of these.
    """

    qk: tuple[float, ...]
    v: tuple[float, ...]
    hidden: tuple[float, ...]
    total: float
    unit: str


def channel_counts(model: nn.Module) -> list[dict[str, tuple[int, int]]]:
    """(heads, channels a head) of every kind and block; an MLP that is not ours has no channels to prune.

    Raises:
        TypeError: the model is not prunable.
    """
    counts = []
    for i, block in enumerate(blocks_of(model)):
        attn = block.attn
        if not isinstance(attn.qkv, nn.Linear):
            raise TypeError(f"block {i} has a projection of another kind, {type(attn.qkv).__name__}")
        heads = attn.num_heads
        counts.append({"qk": (heads, attn.head_dim), "v": (heads, attn.v_head_dim), "hidden": (1, _hidden(block))})
    return counts


def mac_costs(model: nn.Module) -> ChannelCosts:
    r"""Multiply-adds of one image.

    .. math:: c_{qk} = c_v = 2 N D + N^2, \qquad c_{hidden} = (N + N') D

    with N tokens in attention and N' tokens into the MLP's second layer.

    Args:
        model: behind :func:`prunable`.

    Raises:
        TypeError: the model is not prunable.
    """
    qk, v, hidden = [], [], []
    for block, (tokens, late) in zip(blocks_of(model), token_counts(model)):
        attn = block.attn
        dim, out = attn.qkv.in_features, attn.proj.out_features
        gate = 0 if attn.gate is None else dim
        qk.append(2 * tokens * dim + tokens**2)
        v.append(tokens * (dim + gate + out) + tokens**2)
        hidden.append(tokens * dim + late * out)
    return ChannelCosts(tuple(qk), tuple(v), tuple(hidden), macs(model), "MACs")


def latency_costs(model: Any, batch_size: int = 8, *, seconds: float = 0.2) -> ChannelCosts:
    """Microseconds of one batch, on the device and in the dtype of the model, under inference mode.

    Attention and MLP of every block are timed at full, three quarters and half width, by turns, and the shortest times
    count, as other work only adds; the slope is what a channel costs, at least a hundredth of the time over the width.
    Blocks alike are timed once. The whole model counts for no less than its channels.

    Args:
        model: behind :func:`prunable`.
        batch_size: images of a batch.
        seconds: how long each width is timed.

    Raises:
        TypeError: the model is not prunable.
        ValueError: batch_size or seconds is not above 0.
    """
    if batch_size < 1 or seconds <= 0:
        raise ValueError(f"latency_costs: batch_size={batch_size} and seconds={seconds} must be above 0")
    found: dict[Any, tuple[float, float, float]] = {}
    rows = []
    with torch.inference_mode():
        for block, counts, (tokens, late) in zip(blocks_of(model), channel_counts(model), token_counts(model)):
            key = (tokens, late, block.attn.qkv.in_features, *counts.values())
            if key not in found:
                found[key] = _slopes(block, tokens, late, batch_size, seconds)
            rows.append(found[key])
        conv = next(module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))
        images = conv.weight.new_zeros(batch_size, conv.in_channels, *model.patch_embed.img_size)
        with evaluating(model):
            total = _microseconds(model, images, seconds)
        channels = sum(
            heads * width * cost
            for counts, row in zip(channel_counts(model), rows)
            for (heads, width), cost in zip(counts.values(), row)
        )
    qk, v, hidden = zip(*rows)
    return ChannelCosts(qk, v, hidden, max(total, channels), f"us a batch of {batch_size}")


def _slopes(block: Any, tokens: int, late: int, batch_size: int, seconds: float) -> tuple[float, float, float]:
    """Microseconds a channel of q and k of one head, of v of one head, and of the MLP."""
    attn, dim = block.attn, block.attn.qkv.in_features
    made = {"device": attn.qkv.weight.device, "dtype": attn.qkv.weight.dtype}
    x = torch.randn(batch_size, tokens, dim, **made)

    def attention(qk: int, v: int) -> nn.Module:
        return Attention(dim, attn.num_heads, qk, attn.proj.out_features, True, v_head_dim=v, **made).eval()

    def mlp(hidden: int) -> Any:
        fc1, fc2 = nn.Linear(dim, hidden, **made), nn.Linear(hidden, attn.proj.out_features, **made)
        return lambda x: fc2(block.mlp.act(fc1(x))[:, :late].contiguous())

    def slope(make: Any, width: int) -> float:
        widths = sorted({max(1, width // 2), max(1, 3 * width // 4), width})
        functions = [make(w) for w in widths]
        turns = [[_microseconds(function, x, seconds / 3) for function in functions] for _ in range(3)]
        times = [min(column) for column in zip(*turns)]
        mean = times[-1] / width
        return max(0.01 * mean, float(np.polyfit(widths, times, 1)[0])) if len(widths) > 1 else mean

    qk = slope(lambda width: attention(width, attn.v_head_dim), attn.head_dim) / attn.num_heads
    v = slope(lambda width: attention(attn.head_dim, width), attn.v_head_dim) / attn.num_heads
    hidden = _hidden(block)
    return qk, v, slope(mlp, hidden) if hidden else 0.0


def _hidden(block: Any) -> int:
    """Hidden channels that can be pruned: none of an MLP that is not ours."""
    if not isinstance(block.mlp, Mlp):
        return 0
    fc1: Any = block.mlp.fc1
    return fc1.out_features


def _microseconds(function: Any, x: Tensor, seconds: float) -> float:
    from torch.utils.benchmark import Timer  # takes a while to import

    timer = Timer("function(x)", globals=dict(function=function, x=x), num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times) * 1e6


def cubic_keep(step: int, first: int, last: int, keep: float) -> float:
    r"""What part of the cost a step allows: all before ``first``, ``keep`` from ``last`` on.

    .. math:: \rho + (1 - \rho)\,(1 - (t - t_0) / (t_1 - t_0))^3

    >>> [round(cubic_keep(step, 0, 4, 0.5), 3) for step in range(5)]
    [1.0, 0.711, 0.562, 0.508, 0.5]
    """
    left = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
    return keep + (1 - keep) * left**3


def choose_channels(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    multiples: Sequence[int],
    budget: float,
    *,
    per_cost: bool = True,
    same_channels: bool = False,
) -> list[Tensor]:
    """Which channels stay: as many in every head, the best by score over cost, jointly over all layers.

    Within a layer the r-th best channels of all heads are a group, ``multiple`` groups of consecutive r a unit. The
    unit with the least score over cost goes first, until the budget is met; every layer's first unit stays.

    Args:
        scores: for every layer ``(H, D)``, at least 0 and finite; an MLP's hidden channels are one head.
        costs: for every layer, of one channel of one head.
        multiples: for every layer, groups in a unit. Where they do not divide D the last unit is smaller.
        budget: what the channels that stay may cost together.
        per_cost: False ranks by the mean score alone.
        same_channels: all heads keep the same channels, ranked by their sum over the heads.

    Returns:
        For every layer ``(H, D)`` bool, True where a channel stays, on the CPU. Of equal scores the lower channel's.

    Raises:
        ValueError: the first units alone cost more than the budget.

    Source: head-level consistency of CAIT (Wang et al., arXiv 2309.15755), reconstructed: same count, free channels.

    >>> choose_channels([torch.tensor([[3.0, 1.0], [0.0, 2.0]])], [1.0], [1], budget=2.0)
    [tensor([[ True, False],
            [False,  True]])]
    """
    scores = [score.detach().double().cpu() for score in scores]
    if same_channels:
        scores = [score.sum(0, keepdim=True).expand_as(score) for score in scores]
    orders, kept, total, units = [], [], 0.0, []
    for layer, (score, cost, multiple) in enumerate(zip(scores, costs, multiples, strict=True)):
        ranked = score.sort(dim=1, descending=True, stable=True)
        density = math.inf
        for rank, unit in enumerate(ranked.values.sum(0).split(multiple)):
            channels = len(score) * len(unit)
            density = min(density, unit.sum().item() / channels / (cost if per_cost else 1))  # min: against rounding
            if rank > 0:
                units.append((density, -rank, layer, len(unit), channels * cost))
        orders.append(ranked.indices)
        kept.append(score.shape[1])
        total += score.numel() * cost
    for _, _, layer, groups, cost in sorted(units):
        if total <= budget:
            break
        kept[layer] -= groups
        total -= cost
    if total > budget * (1 + 1e-9):
        raise ValueError(f"choose_channels: one unit of each layer costs {total:.6g}, more than budget={budget:.6g}")
    return [
        torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)
        for order, count in zip(orders, kept)
    ]
