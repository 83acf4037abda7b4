"""How a dense model becomes a cheaper one, by every method, and by the variants that the papers' claims are about."""

import copy
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenops
from tokenops import training
from tokenops.methods import cait, patch_slimming
from tokenops.methods.cait.costs import channel_counts, choose_channels
from tokenops.methods.patch_slimming import Schedule
from tokenops.methods.patch_slimming.blocks import embed_tokens, run_dense
from tokenops.methods.patch_slimming.impact import attention_matrix

from . import models
from .data import Data, load
from .models import TOKENS, Settings, macs, reached

#: the blocks that see fewer tokens than the one before; methods that drop behind an attention do in the block before
PLACES = (1, 2)
BEHIND = (0, 1)
#: of CAIT at each level: the blocks with a merge behind them; channels are pruned for what is missing
POINTS: dict[float, dict[int, str]] = {
    0.8: {3: "horizontal"},
    0.6: {1: "horizontal", 3: "vertical"},
    0.4: {0: "horizontal", 1: "vertical"},
    0.25: {0: "horizontal", 1: "vertical", 2: "horizontal", 3: "vertical"},
}


class Run(NamedTuple):
    """One dense model, the level to bring it to, and what a method may use."""

    dense: Any
    level: float  # part of the dense model's multiply-adds
    seed: int
    settings: Settings
    folder: Path | None = None  # of checkpoints

    @property
    def target(self) -> float:
        return self.level * macs(self.dense)

    @property
    def data(self) -> Data:
        return load(self.settings.data)

    def patched(self, method: str, option: Callable[[float], dict[str, Any]]) -> Any:
        return reached(
            lambda part: tokenops.apply_patch(copy.deepcopy(self.dense), method, **option(part)), self.target
        )

    def fine_tuned(self, objective: Any) -> Any:
        settings = self.settings
        return models.train(objective, settings, self.seed, settings.steps, settings.fine_lr, self.folder)

    def from_scratch(self, objective: Any) -> Any:
        settings = self.settings
        return models.train(objective, settings, self.seed, settings.dense_steps, settings.lr, self.folder)

    def plain(self, model: Any) -> Any:
        return self.fine_tuned(training.Plain(model, self.settings.smoothing))


def fine_tuned(run: Run) -> Any:
    return run.plain(copy.deepcopy(run.dense))


def narrow(run: Run) -> Any:
    """A dense model of the same multiply-adds, trained on as many images as the dense one and its fine-tuning."""
    settings = run.settings
    torch.manual_seed(run.seed)
    objective = models.Plain(models.narrow(settings, run.target), settings.smoothing)
    steps = settings.dense_steps + settings.steps
    return models.train(objective, settings, run.seed, steps, settings.lr, run.folder)


def slimmed(run: Run) -> Any:
    return run.patched("sit", lambda part: dict(keeping_ratio=max(part, 0.144), locations=PLACES))


def sit(run: Run) -> Any:
    return run.plain(slimmed(run))


def recalibrated(run: Run, tokens: float, logits: float) -> Any:
    weights = dict(token_weight=tokens, logits_weight=logits)
    return run.fine_tuned(
        training.FeatureRecalibration(slimmed(run), run.dense, smoothing=run.settings.smoothing, **weights)
    )


@torch.no_grad()
def relative(run: Run) -> float:
    """1 over the mean square of the dense model's tokens behind its blocks, so that errors of tokens are relative."""
    x, squares = embed_tokens(run.dense, sample(run)), []
    for block in run.dense.blocks:
        x = run_dense([block], x)
        squares.append(x[:, 1:].square().mean().item())
    return len(squares) / sum(squares)


def sit_frd(run: Run) -> Any:
    """The published weights, of the relative error: the tokens here are large, and their error would drown the rest."""
    return recalibrated(run, 2.0 * relative(run), 2.0)


def sit_frd_absolute(run: Run) -> Any:
    return recalibrated(run, 2.0, 2.0)


def sit_tokens(run: Run) -> Any:
    return recalibrated(run, 2.0 * relative(run), 0.0)


def sit_logits(run: Run) -> Any:
    return recalibrated(run, 0.0, 2.0)


def dropping(run: Run, fuse: bool, method: str = "evit") -> Any:
    options = dict(reduction_loc=BEHIND, fuse_token=fuse)
    return run.patched(method, lambda part: dict(keep_rate=max(part, 0.02), **options))


def evit(run: Run) -> Any:
    return run.plain(dropping(run, True))


def evit_dropping(run: Run) -> Any:
    return run.plain(dropping(run, False))


def random(run: Run) -> Any:
    return run.plain(dropping(run, False, "random"))


def slow_fast(run: Run) -> Any:
    return run.patched("evo_vit", lambda part: dict(prune_ratio=max(part, 1 / TOKENS), stages=(PLACES[0], 3)))


def evo_vit(run: Run) -> Any:
    """With the dense model's class token: another head, on the mean patch, is not learned in so few steps."""
    return run.plain(slow_fast(run))


def evo_vit_from_scratch(run: Run) -> Any:
    """As published: two heads, on the mean patch and on the class token, layer-wise and then stage-wise."""
    torch.manual_seed(run.seed)
    model = slow_fast(run._replace(dense=models.vit(run.settings, global_pool="avg", fc_norm=True)))
    return run.from_scratch(models.SlowFast(model, run.settings.smoothing))


def dropping_from_scratch(run: Run) -> Any:
    torch.manual_seed(run.seed)
    run = run._replace(dense=models.vit(run.settings))
    return run.from_scratch(models.Plain(dropping(run, False), run.settings.smoothing))


def sample(run: Run) -> Tensor:
    """Images that a schedule is searched with."""
    images = run.data.images
    return run.data.normalised(images[:: max(1, len(images) // 64)])


def searched(run: Run) -> Schedule:
    """A schedule that costs the target: its counts come from tolerances, searched by halves."""
    found: list = []

    def make(part: float) -> Any:
        tolerance = 0.9 * (1 - part) ** 3 + 1e-4
        search = patch_slimming.search(run.dense, sample(run), tolerance, 2, epochs=0, progress=False)
        found.append((search.model, search.schedule))
        return search.model

    model = reached(make, run.target)
    return next(schedule for searched, schedule in found if searched is model)


def scheduled(run: Run, schedule: Schedule) -> Any:
    return run.plain(tokenops.apply_patch(copy.deepcopy(run.dense), "patch_slimming", schedule=schedule))


def patch_slim(run: Run) -> Any:
    return scheduled(run, searched(run))


def uniform(run: Run, last: Sequence[int]) -> Any:
    """The search's order of the patches, but counts that fall by one ratio where the other methods reduce."""
    order, grid = searched(run).order, (models.GRID, models.GRID)

    def counts(part: float) -> dict[str, Any]:
        found = falling(part, run.settings.depth)
        return dict(schedule=Schedule.from_counts([*found[: len(found) - len(last)], *last], grid, order))

    return run.plain(run.patched("patch_slimming", counts))


def patch_slim_uniform(run: Run) -> Any:
    return uniform(run, [])


def patch_slim_uniform_last(run: Run) -> Any:
    """Of the last block the class token alone is left, as in the search."""
    return uniform(run, [1])


def patch_slim_attention(run: Run) -> Any:
    """The search's counts, but patches in the order of the attention that they get, over all blocks."""
    received: Any = 0
    with torch.no_grad():
        x = embed_tokens(run.dense, sample(run))
        for block in run.dense.blocks:
            weights = attention_matrix(block.attn, block.norm1(x), x.shape[1])
            received = received + weights.sum(2).mean((0, 1))[1:]
            x = run_dense([block], x)
    schedule = searched(run)
    order = received.argsort(descending=True).tolist()
    return scheduled(run, Schedule.from_counts(schedule.counts, schedule.grid, order))


def falling(part: float, depth: int) -> list[int]:
    """Tokens of every block: fewer in the places where methods reduce."""
    left = [TOKENS * part ** sum(i >= place for place in PLACES) for i in range(depth)]
    return [1 + max(1, round(tokens)) for tokens in left]


def dynamic(run: Run) -> Any:
    model = run.patched("dps", lambda part: dict(counts=falling(part, run.settings.depth), after=PLACES[0]))
    return run.fine_tuned(training.PatchRanking(model, run.dense, run.settings.smoothing))


def merged(run: Run, points: dict[int, str]) -> Any:
    return cait.prunable(tokenops.apply_patch(copy.deepcopy(run.dense), "cait", points=points))


def pruner(run: Run, model: Any, part: float, kind: Any = cait.ChannelPruner, **options: Any) -> Any:
    """To a part of the cost, over the first half of the fine-tuning."""
    steps = run.settings.steps
    schedule = dict(steps=(0, max(2, steps // 2)), every=max(1, steps // 40), multiples={"hidden": 8, "qk": 2, "v": 2})
    return kind(model, part, **schedule, **options)


def cait_compressed(run: Run) -> Any:
    model = merged(run, POINTS[run.level])
    channels = pruner(run, model, min(1.0, run.target / macs(model)))
    return run.fine_tuned(training.Pruned(model, channels, teacher=run.dense, smoothing=run.settings.smoothing))


class FreeHeads(cait.ChannelPruner):
    """Every head keeps the channels that are worth most, however many: nothing makes heads alike."""

    def choose(self, scores: Sequence[Tensor], budget: float) -> list[Tensor]:
        heads = [(row, layer) for score, layer in zip(scores, self.layers) for row in score.split(1)]
        costs, multiples = ([getattr(layer, name) for _, layer in heads] for name in ("cost", "multiple"))
        kept = iter(choose_channels([row for row, _ in heads], costs, multiples, budget))
        return [torch.cat([next(kept) for _ in score]) for score in scores]


class Masked(training.Plain):
    """Channels are chosen behind every step; what is pruned stays masked."""

    def __init__(self, model: nn.Module, pruner: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.pruner = pruner

    def before_step(self) -> bool:
        self.pruner.step()
        return True

    def extra_state(self) -> dict[str, Any]:
        return {"pruner": self.pruner.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state["pruner"])


def attention_pruned(run: Run, kind: Any, **options: Any) -> Any:
    """Channels of attention alone, to a part of its channels' cost that is the level; masked."""
    model = merged(run, {})
    costs = cait.mac_costs(model)
    counts, kinds = channel_counts(model), ("qk", "v")
    channels = sum(prod(block[each]) * getattr(costs, each)[i] for i, block in enumerate(counts) for each in kinds)
    found = pruner(run, model, 1 - (1 - run.level) * channels / costs.total, kind, kinds=kinds, **options)
    return run.fine_tuned(Masked(model, found, smoothing=run.settings.smoothing))


def heads_alike(run: Run) -> Any:
    return attention_pruned(run, cait.ChannelPruner)


def heads_same(run: Run) -> Any:
    return attention_pruned(run, cait.ChannelPruner, same_channels=True)


def heads_free(run: Run) -> Any:
    return attention_pruned(run, FreeHeads)


@torch.no_grad()
def compacted(model: Any) -> Any:
    """What a masked model costs, for timing alone: all heads of a block are as wide as its widest."""
    found = copy.deepcopy(model)
    for block in found.blocks:
        for name in ("qk_mask", "v_mask"):
            mask = getattr(block.attn, name)
            width = int(mask.sum(1).max())
            best = mask.argsort(dim=1, descending=True, stable=True)[:, :width]
            mask.copy_(torch.zeros_like(mask).scatter_(1, best, 1.0))
    return cait.compact(found)


def tome_untrained(run: Run) -> Any:
    return run.patched("tome", lambda part: dict(r=round(25 * (1 - part))))


def tome(run: Run) -> Any:
    return run.plain(tome_untrained(run))


METHODS: dict[str, Callable[[Run], Any]] = {
    "SiT with FRD": sit_frd,
    "SiT": sit,
    "EViT": evit,
    "EViT, dropping only": evit_dropping,
    "random dropping": random,
    "Evo-ViT": evo_vit,
    "Patch Slimming": patch_slim,
    "DPS (reconstruction)": dynamic,
    "CAIT (reconstruction)": cait_compressed,
    "ToMe, not trained": tome_untrained,
    "ToMe": tome,
    "narrower dense": narrow,
}
VARIANTS: dict[str, Callable[[Run], Any]] = {
    "dense, fine-tuned": fine_tuned,
    "SiT with FRD of absolute errors": sit_frd_absolute,
    "SiT with token recalibration": sit_tokens,
    "SiT with logits": sit_logits,
    "Evo-ViT from scratch": evo_vit_from_scratch,
    "dropping from scratch": dropping_from_scratch,
    "Patch Slimming, uniform counts": patch_slim_uniform,
    "Patch Slimming, uniform counts and one last token": patch_slim_uniform_last,
    "Patch Slimming by attention": patch_slim_attention,
    "heads of one width": heads_alike,
    "heads with the same channels": heads_same,
    "heads of any width": heads_free,
}
