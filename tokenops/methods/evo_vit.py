"""Evo-ViT: tokens the class token looks at pass through a stage, the others wait for its end."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.restore_tokens import restore_tokens
from ..ops.select_tokens import select_tokens
from ..patching.blocks import attend, feed
from ..patching.engine import Flow, Method, Record, Role, sources_of
from ..patching.modules import fusable
from ..patching.positions import Positions, at
from .options import PartRole, block_indices, per_block


class Waiting(NamedTuple):
    """What follows the tokens of Evo-ViT.

    Attributes:
        scores: ``(B, N)``, what is chosen by, of the tokens that pass through; None where no choice comes.
        base: ``(B, P+N0, C)``, all tokens as they were before the stage; None outside of one.
        base_scores: ``(B, N0)``, their scores, where these are used again.
        index: ``(B, k)`` int64, where the chosen ones belong.
    """

    scores: Tensor | None = None
    base: Tensor | None = None
    base_scores: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Evolving(PartRole):
    """A block within a stage.

    Attributes:
        begins, ends: whether it is the first, or the last, of a stage of chosen tokens.
        alpha: how much its own scores count.
        needed: whether its scores are computed.
        wanted: whether scores are used again behind it.
        scores: "class", the class token's attention, or "received", the mean attention a token receives.
    """

    begins: bool = False
    ends: bool = False
    alpha: float = 1.0
    needed: bool = False
    wanted: bool = False
    scores: str = "class"

    @property
    def idle(self) -> bool:
        return not (self.begins or self.needed)

    @property
    def pads(self) -> bool:
        return True

    @property
    def mapped(self) -> bool:
        return True

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        state: Any = flow.state or Waiting()
        x, (scores, base, base_scores, index) = flow.tokens, state
        normed = None
        if self.begins:
            if scores is None:
                raise ValueError(
                    "a block that chooses tokens was given no scores: stage_wise is set between forwards, not while one"
                    " runs"
                )
            N = x.shape[1] - self.prefix
            if (k := self._kept(N)) < 1:  # of images whose size was not known before
                raise ValueError(f"prune_ratio keeps none of {N} tokens, but it must keep at least one")
            chosen = select_tokens(
                x,
                scores,
                k,
                prefix=self.prefix,
                order="index",
                companions=(scores,) if self.wanted else (),
                norm=fusable(getattr(block, block.tokenops_family.norm1)),
            )
            base, base_scores, index = x, scores if self.wanted else None, chosen.index
            x, normed = chosen.tokens, chosen.normed
            scores = chosen.companions[0] if self.wanted else None
            if record is not None:
                record.note(x, sources_of(index, record.patches))
        kind = self.scores if self.needed else None
        x, looked_at, _ = attend(block, x, normed, scores=kind, positions=at(positions, index))
        if looked_at is not None:
            new = looked_at[:, self.prefix :].detach()  # scores are only sorted
            scores = new if self.alpha == 1 or scores is None else torch.lerp(scores, new, self.alpha)
        x = feed(block, x)
        if (self.ends or self.last) and base is not None:
            if base_scores is not None and scores is not None:
                x, (scores,) = restore_tokens(base, x, index, prefix=self.prefix, companions=((base_scores, scores),))
            else:
                x = restore_tokens(base, x, index, prefix=self.prefix)
            base = base_scores = index = None
        return Flow(x, None if scores is None and base is None else Waiting(scores, base, base_scores, index))

    def left(self, block: Any, tokens: int, full: int) -> int:
        if self.ends or self.last:
            return full
        return self.prefix + self._kept(tokens - self.prefix) if self.begins else tokens

    def _kept(self, patches: int) -> int:
        return int(self.part * patches)

    def spread(self, tokens: Tensor, state: Any, finish: Any, prefix: int = 0) -> Tensor | None:
        if state.base is None:
            return tokens
        base = finish(state.base)[:, self.prefix - prefix :]
        return restore_tokens(base, tokens, state.index, prefix=prefix)


class EvoViT(Method):
    r"""Later blocks update the patch tokens the class token looks at, and leave the others as they are.

    Block l updates a score of every patch token that passes through it, from the class token's attention :math:`a_l`,
    summed over the heads (here its mean: only the order counts):

    .. math:: g \leftarrow (1 - \alpha_l)\, g + \alpha_l\, a_l

    Before a pruned stage the :math:`\lfloor rN \rfloor` tokens of the largest g are chosen; they and the prefix alone
    pass through the stage, and return to their places among the others afterwards. Stage-wise, a stage is a run of
    blocks (inference, and the end of training); layer-wise, it is one block (the beginning of training). Only blocks
    whose scores a later choice needs compute them. Without a class token the mean attention that tokens receive is the
    score, which is ours.

    Args:
        prune_ratio: r, above 0 and at most 1: a number for all blocks from the first pruned stage on, or one number a
            block, 1 before. Stage-wise, that of a stage's first block holds.
        tradeoff: :math:`\alpha`, 0 to 1: a number for all blocks from the first pruned stage on (1 before), or one
            number a block. Block 0 has no scores to mix with.
        stages: the blocks at which a pruned stage begins, from 0, not 0 itself; blocks 4 and 8 of 12 (a third and two
            thirds of the depth) if not given. ``()`` prunes nothing.
        stage_wise: whether chosen tokens pass through a whole stage, as in inference; else every block chooses anew.

    Source: Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer (AAAI 2022), section 3, in the
    form published for DeiT: without a representative token.
    """

    name, setting = "evo_vit", "stage_wise"

    def __init__(
        self,
        prune_ratio: float | Sequence[float] = 0.5,
        tradeoff: float | Sequence[float] = 0.5,
        stages: Sequence[int] | None = None,
        stage_wise: bool = True,
    ) -> None:
        self.prune_ratio, self.tradeoff, self.stages, self.value = prune_ratio, tradeoff, stages, stage_wise

    def roles(self, site: Any) -> list[Role]:
        depth = site.depth
        thirds = tuple(sorted({depth // 3, 2 * depth // 3} - {0}))
        stages = block_indices("stages", thirds if self.stages is None else self.stages, 1, depth)
        pruned = range(stages[0] if stages else depth, depth)
        ratios = per_block("prune_ratio", self.prune_ratio, pruned, depth)
        alphas = (1.0, *per_block("tradeoff", self.tradeoff, pruned, depth, zero=True)[1:])
        if any(ratio != 1 for ratio in ratios[: pruned.start]):
            raise ValueError(f"prune_ratio={ratios}, but it must be 1 before block {pruned.start}")
        if site.patches is not None and int(min(ratios) * site.patches) < 1:
            raise ValueError(
                f"prune_ratio={self.prune_ratio} keeps none of {site.patches} tokens, but it must keep at least one"
            )
        starts = (0, *(stages if self.value else pruned))
        scores, found = "class" if site.has_class else "received", list[Role]()
        for j, (first, end) in enumerate(zip(starts, [*starts[1:], depth])):
            chosen = ratios[first] < 1
            wanted = any(ratios[later] < 1 for later in starts[j + 1 :])
            for i in range(first, end):
                overwritten = 1.0 in alphas[i + 1 : end]
                needed = wanted and alphas[i] > 0 and not overwritten
                begins, ends = chosen and i == first, chosen and i == end - 1
                share = float(ratios[first]).as_integer_ratio() if begins else (1, 1)
                alpha = alphas[i] if needed else 1.0
                found.append(Evolving(site.prefix, False, share, begins, ends, alpha, needed, wanted, scores))
        return found


def stage_wise_at(epoch: float, epochs: float) -> bool:
    """What ``stage_wise`` is in training's epoch ``epoch`` (from 0) of ``epochs``: False in the first two thirds.

    >>> [stage_wise_at(epoch, 300) for epoch in (0, 199, 200, 299)]
    [False, False, True, True]
    """
    return 3 * epoch >= 2 * epochs


def evo_vit_loss(
    logits: tuple[Tensor, Tensor],
    target: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """The published training loss: half of it that of the mean patch token's logits, half that of the class token's.

    Args:
        logits: the two.
        target: what the criterion takes: labels, or probabilities of the classes (mixup).
        criterion: of the logits and the target.

    Source: Xu et al., Evo-ViT (AAAI 2022), in its published code.
    """
    return 0.5 * criterion(logits[0], target) + 0.5 * criterion(logits[1], target)


#: where the published modules are that are timm's in another place
_PLACES = {"norms": "norm1", "projs": "attn.proj"}


def published_names(model: Any, state: dict[str, Tensor], prefix: str = "", *_: Any) -> None:
    """Published names (``qks``, ``vs``, ``norms``, ``projs``), and DeiT's, to those of a timm model that pools patches.

    Those of the class head, which training has (`tokenops.training.SlowFast`), are left out. A hook of
    ``load_state_dict``.
    """
    for key in list(state):
        name = key.removeprefix(prefix)
        if found := re.fullmatch(r"(norms|projs)\.(\d+)\.(\w+)", name):
            module, i, kind = found.groups()
            state[f"{prefix}blocks.{i}.{_PLACES[module]}.{kind}"] = state.pop(key)
        elif found := re.fullmatch(r"qks\.(\d+)\.qk\.(\w+)", name):
            i, kind = found.groups()
            v = f"{prefix}vs.{i}.v.{kind}"
            if v in state:
                state[f"{prefix}blocks.{i}.attn.qkv.{kind}"] = torch.cat((state.pop(key), state.pop(v)))
        elif name.startswith("norm."):
            state[f"{prefix}fc_{name}"] = state.pop(key)
        elif name.startswith(("norm_cls.", "head_cls.")):
            del state[key]
