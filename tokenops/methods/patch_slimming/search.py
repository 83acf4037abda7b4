"""The top-down search for a schedule: from the last layer on, as few patches as the next layer's error allows."""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...patching import apply_patch
from .blocks import check_model, embed_tokens, rows_of, run_dense, slim_block
from .impact import impact
from .method import PatchSlimming
from .schedule import Schedule

ERRORS = ("relative", "mse", "raw")


class Candidate(NamedTuple):
    """One step of the search: so many tokens (class token included) in a layer, and the error they leave behind it."""

    layer: int
    tokens: int
    error: float


class SearchResult(NamedTuple):
    """What :func:`search` returns.

    Attributes:
        schedule: what is kept.
        model: the model with the schedule (`tokenops.apply_patch`) and its tuned weights, in eval mode.
        errors: E behind each layer but the last; 0 where everything is kept without a look.
        candidates: all that were tried, in that order.
    """

    schedule: Schedule
    model: nn.Module
    errors: list[float]
    candidates: list[Candidate]


def search(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    tolerance: float = 0.01,
    granularity: int = 10,
    *,
    error: str = "relative",
    epochs: int = 3,
    lr: float = 1e-5,
    clip: float = 1.0,
    batch_size: int = 16,
    progress: bool = True,
) -> SearchResult:
    r"""Find a schedule for a trained model, by unlabelled images, and tune its blocks to it.

    The last layer keeps the class token. From there to the first layer, layer l keeps what layer l + 1 does and the r
    patches of the highest impact besides, r = 0, granularity, 2 granularity, ..., until the error is at most the
    tolerance or nothing is left to add. At each r block l alone is tuned, through slim block l + 1 as far as it is, to

    .. math:: E_{l+1} = \|\mathrm{diag}(m_{l+1}) (\hat B_{l+1}(\hat B_l(Z_{l-1})) - Z_{l+1})\|_F^2

    with the features Z of the given model; weights are carried over from one r to the next. The schedule is nested by
    construction. Tune the whole model afterwards.

    Args:
        model: a dense VisionTransformer of timm. It is not changed: copies of it are tuned.
        images: ``(n, 3, height, width)``, or batches of images or of (images, labels, ...): a random part of the
            training set, prepared as for evaluation. They stay in memory, with two layers' features.
        tolerance: of E. Published: 0.01 and 0.02, in a normalisation that is not.
        granularity: what r grows by. Published: 10; 16 fills the tiles of matrix units.
        error: what E is divided by: "relative", the norm of Z_{l+1} there (so that outlier channels do not matter);
            "mse", its number of elements; "raw", the number of images.
        epochs: of tuning for every candidate. Published: 3. 0 tunes nothing.
        lr: of AdamW, without weight decay [D].
        clip: norm the gradient is clipped to [D].
        batch_size: of the images, where they are one tensor.
        progress: whether to show a progress bar on a terminal.

    Returns:
        ``(schedule, model, errors, candidates)``.

    Raises:
        TypeError: the model is another, or already slim, or the images are no tensors.
        ValueError: an argument is out of range, or there are no images.

    Source: Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022), section 3.3 and algorithm 1 [P].
    Optimiser, carried weights [D] and the normalisation "relative" are not the paper's.
    """
    _check(model, tolerance, granularity, error, epochs, lr, clip, batch_size)
    frozen: Any = copy.deepcopy(model).eval().requires_grad_(False)
    student = copy.deepcopy(frozen)
    device = frozen.cls_token.device
    batches = [batch.to(device) for batch in _batches(images, batch_size)]
    grid = tuple(frozen.patch_embed.grid_size)
    L, full = len(frozen.blocks), 1 + grid[0] * grid[1]
    counts, order = [full] * (L - 1) + [1], torch.arange(full - 1, device=device)
    errors, tried = [0.0] * (L - 1), []

    with tqdm(total=L - 1, desc="searching", disable=None if progress else True, leave=False) as bar:
        for layer in range(L - 1, 0, -1):
            n = above = counts[layer]
            if above == full:  # nested: every layer below keeps everything
                break
            before, after, score = [], [], torch.zeros(full - 1, dtype=torch.float64, device=device)
            for batch in batches:
                with torch.no_grad():
                    z = run_dense(frozen.blocks[: layer - 1], embed_tokens(frozen, batch))
                    score += impact(student.blocks, z, layer, counts, order).sum(0)
                    before.append(z)
                    after.append(run_dense(frozen.blocks[layer - 1 : layer + 1], z))
            kept = order[: above - 1]
            order = torch.cat((kept, _best_first(score, kept)))
            before = [rows_of(z, order) for z in before]
            after = [rows_of(z, order)[:, :above] for z in after]

            tune = _Tuning(student.blocks[layer - 1], student.blocks[layer], before, after, error, lr, clip)
            while True:
                for _ in range(epochs):
                    tune.epoch(n, above)
                found = tune.error(n, above)
                tried.append(Candidate(layer, n, found))
                bar.set_description(f"layer {layer}: {n} tokens, error {found:.3g}")
                if found <= tolerance or n == full:
                    break
                n = min(n + granularity, full)
            counts[layer - 1], errors[layer - 1] = n, found
            bar.update()
            del tune, before, after  # the next layer's take their place

    schedule = Schedule.from_counts(counts, (int(grid[0]), int(grid[1])), order.tolist())
    for tuned, parameter in zip(student.parameters(), model.parameters()):
        tuned.requires_grad_(parameter.requires_grad)
    return SearchResult(schedule, apply_patch(student, PatchSlimming(schedule)), errors, tried)


class _Tuning:
    """Block l against the next layer's features; the next block is frozen, but gradients go through it."""

    def __init__(
        self, block: Any, above: Any, before: list[Tensor], after: list[Tensor], kind: str, lr: float, clip: float
    ) -> None:
        self.block, self.above, self.kind, self.clip = block, above, kind, clip
        self.data = list(zip(before, after))
        self.optimizer = torch.optim.AdamW(block.parameters(), lr=lr, weight_decay=0.0)

    def terms(self, z: Tensor, target: Tensor, n: int, above: int) -> tuple[Tensor, Tensor]:
        """Squared error and what to divide it by, in fp32 or wider."""
        wide = torch.promote_types(target.dtype, torch.float32)
        got = slim_block(self.above, slim_block(self.block, z, n), above).to(wide)
        target = target.to(wide)
        by = {"relative": target.square().sum(), "mse": target.numel(), "raw": len(target)}[self.kind]
        return (got - target).square().sum(), torch.as_tensor(by, dtype=torch.float64, device=target.device)

    def epoch(self, n: int, above: int) -> None:
        self.block.requires_grad_(True)
        with torch.enable_grad():
            for z, target in self.data:
                squares, by = self.terms(z, target, n, above)
                self.optimizer.zero_grad()
                (squares / by).backward()
                torch.nn.utils.clip_grad_norm_(self.block.parameters(), self.clip)
                self.optimizer.step()
        self.block.requires_grad_(False)

    @torch.no_grad()
    def error(self, n: int, above: int) -> float:
        terms = [self.terms(z, target, n, above) for z, target in self.data]
        return float(sum(squares.double() for squares, _ in terms) / sum(by for _, by in terms))


def _best_first(score: Tensor, kept: Tensor) -> Tensor:
    """The positions that are not kept yet, by score, of equal ones the lower position first."""
    ranked = torch.sort(score, descending=True, stable=True).indices
    taken = torch.zeros_like(ranked, dtype=torch.bool).index_fill(0, kept, True)
    return ranked[~taken[ranked]]


def _batches(images: Any, batch_size: int) -> Iterator[Tensor]:
    some = False
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        batch = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(batch, Tensor):
            raise TypeError(f"search: images must be tensors or start with one, but got {type(batch).__name__}")
        if len(batch):
            some = True
            yield batch
    if not some:
        raise ValueError("search: there are no images")


def _check(
    model: Any, tolerance: Any, granularity: Any, error: Any, epochs: Any, lr: Any, clip: Any, size: Any
) -> None:
    check_model("search", model)
    if len(model.blocks) < 2:
        raise ValueError("search: model has one block, but there must be at least 2")
    if error not in ERRORS:
        raise ValueError(f"search: error={error!r}, but it must be one of {', '.join(map(repr, ERRORS))}")
    for name, value, least in (("granularity", granularity, 1), ("epochs", epochs, 0), ("batch_size", size, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"search: {name} must be an int, but got {value!r}")
        if value < least:
            raise ValueError(f"search: {name}={value}, but it must be at least {least}")
    for name, value in (("tolerance", tolerance), ("lr", lr), ("clip", clip)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"search: {name} must be a number, but got {value!r}")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"search: {name}={value}, but it must be a finite number of at least 0")
