"""What the papers claim and can be tried in small: two models each, the same seeds, images and multiply-adds."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .intervals import Interval, Scores, interval, paired

LEVELS = (0.8, 0.6, 0.4, 0.25)
STRONG = (0.4, 0.25)

Key = tuple[str, float]  # name and level


class Claim(NamedTuple):
    """That ``ours`` beats ``theirs``: in words, where it is from, and the levels at which it is tried."""

    text: str
    source: str
    ours: str
    theirs: str
    levels: tuple[float, ...]
    equal: bool = False  # that ours loses nothing, rather


CLAIMS = (
    Claim("feature recalibration (FRD) helps", "SiT, 3.3", "SiT with FRD", "SiT", LEVELS),
    Claim("with the error of tokens as it is", "SiT, 3.3", "SiT with FRD of absolute errors", "SiT", STRONG),
    Claim("its tokens alone help", "SiT, 3.3", "SiT with token recalibration", "SiT", STRONG),
    Claim("its logits alone help", "SiT, 3.3", "SiT with logits", "SiT", STRONG),
    Claim("tokens help beside logits", "SiT, 3.3", "SiT with FRD", "SiT with logits", STRONG),
    Claim("soft aggregation beats hard dropping", "SiT, 3.2", "SiT", "EViT, dropping only", LEVELS),
    Claim("class attention chooses better than chance", "EViT, 3.1", "EViT, dropping only", "random dropping", LEVELS),
    Claim("fusing what is left out helps", "EViT, 3.2", "EViT", "EViT, dropping only", LEVELS),
    Claim("slow-fast beats dropping, fine-tuned", "Evo-ViT", "Evo-ViT", "EViT, dropping only", LEVELS),
    Claim("slow-fast beats dropping, from scratch", "Evo-ViT", "Evo-ViT from scratch", "dropping from scratch", (0.4,)),
    Claim(
        "the searched counts beat uniform ones",
        "Patch Slimming, 3.3",
        "Patch Slimming",
        "Patch Slimming, uniform counts and one last token",
        STRONG,
    ),
    Claim(
        "impact ranks better than attention",
        "Patch Slimming, 3.2",
        "Patch Slimming",
        "Patch Slimming by attention",
        STRONG,
    ),
    Claim(
        "a choice for each image beats a fixed one, same counts",
        "Patch Slimming (DPS)",
        "DPS (reconstruction)",
        "Patch Slimming, uniform counts",
        STRONG,
    ),
    Claim(
        "merging on the grid beats leaving tokens behind, segmentation",
        "CAIT",
        "scenes, merged on the grid",
        "scenes, dropped",
        (0.6,),
    ),
    Claim("heads of one width lose nothing", "CAIT", "heads of one width", "heads of any width", (0.5,), equal=True),
    Claim("heads may keep other channels each", "CAIT", "heads of one width", "heads with the same channels", (0.5,)),
    Claim("training helps merging", "ToMe, 4", "ToMe", "ToMe, not trained", LEVELS),
)


#: by the sign of a difference that was claimed to be positive
VERDICTS = {1: "as claimed", -1: "the other way", 0: "not shown"}
#: how far multiply-adds may differ for a difference to be one of the methods
ALIKE = 0.04


class Outcome(NamedTuple):
    """What became of a claim at a level; ``cost`` is ours' multiply-adds over theirs."""

    claim: Claim
    level: float
    difference: Interval
    cost: float

    @property
    def verdict(self) -> str:
        """What the interval carries, here: of these models, this task and so little training."""
        sign = self.difference.sign
        if sign * (self.cost - 1) > ALIKE:
            return f"costs {self.cost:.2f} times as much: none"
        return "no difference shown" if self.claim.equal and not sign else VERDICTS[sign]


def both(scores: Mapping[Key, Scores], claim: Claim, level: float) -> dict[int, np.ndarray]:
    """Ours less theirs, of the seeds that are there."""
    return paired(*(scores.get((name, level), {}) for name in (claim.ours, claim.theirs)))


def outcomes(scores: Mapping[Key, Scores], costs: Mapping[Key, float]) -> list[Outcome]:
    """Of the claims whose cells are there."""
    tried = ((claim, level, both(scores, claim, level)) for claim in CLAIMS for level in claim.levels)
    return [
        Outcome(claim, level, interval(found.values()), costs[claim.ours, level] / costs[claim.theirs, level])
        for claim, level, found in tried
        if found
    ]


def trend(scores: Mapping[Key, Scores], claim: Claim) -> Interval | None:
    """How much more ``ours`` gains at the first of the strong levels, where both cost the same, than at the mildest."""
    mild, strong = (both(scores, claim, level) for level in (claim.levels[0], STRONG[0]))
    more = paired(strong, mild)
    return interval(more.values()) if more else None
