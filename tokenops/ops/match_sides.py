"""Matchings whose two sides are given otherwise than by parity: every k-th token, or a draw, on the one of them."""

import torch
from torch import Tensor

from . import reference


def match_kth(metric: Tensor, k: int) -> tuple[Tensor, int]:
    """Every k-th row of ``(B, N, D)`` is a destination, each other one goes into that it is most like.

    Returns the index ``(B, N)`` int64, and how many are left: N // k, or all where k is below 2 or above N.
    """
    B, N, _ = metric.shape
    token = torch.arange(N, device=metric.device)
    if k < 2 or k > N:
        return token.expand(B, -1).contiguous(), N
    last = token % k == k - 1
    return _into_most_alike(metric, token[~last].expand(B, -1), token[last].expand(B, -1)), N // k


def match_random(metric: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """r rows of ``(B, N, D)``, drawn for each image, go each into the one of the others that it is most like: (B, N).

    The draw is made where the generator is, so that one on the CPU draws the same for every device.
    """
    device = metric.device if generator is None else generator.device
    drawn = torch.rand(metric.shape[:2], generator=generator, device=device).to(metric.device).argsort(dim=1)
    return _into_most_alike(metric, drawn[:, :r], drawn[:, r:].sort(dim=1).values)


@reference.keeps_dtypes
@torch.no_grad()
def _into_most_alike(metric: Tensor, sources: Tensor, destinations: Tensor) -> Tensor:
    """Which of the destinations ``(B, M)``, ascending, every token is or goes into, where the others are sources."""
    rows = destinations.shape[1]
    index = torch.empty(metric.shape[:2], dtype=torch.int64, device=metric.device)
    index = index.scatter(1, destinations, torch.arange(rows, device=metric.device).expand_as(destinations))
    if not sources.shape[1]:
        return index
    unit = reference.unit_rows(metric)
    a, b = (unit.gather(1, side.unsqueeze(2).expand(-1, -1, unit.shape[2])) for side in (sources, destinations))
    return index.scatter(1, sources, reference.most_alike(a, b)[1])
