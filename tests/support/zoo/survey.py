"""What becomes of an architecture under a method: it works, it is refused, or it is open why not."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from support.weights import redrawn
from support.zoo.entry import BATCH, Entry, results_of
from tokenops import apply_patch, remove_patch

#: of what is compared, as a share of the largest number where that is above 1
CLOSE = 1e-5
#: methods whose choice is drawn anew for every batch
DRAWING = ("random",)
#: methods that put the tokens in another order
ORDERING = ("dps",)


class Outcome(NamedTuple):
    """What is found: a kind, "works", "refused" or "open", and the words that say more."""

    kind: str
    words: str = ""

    @property
    def text(self) -> str:
        """As it stands in the package's file."""
        if self.kind == "works":
            return f"works {self.words}".strip()
        return self.words if self.kind == "refused" else f"open: {self.words}"


def options(method: str, blocks: int, patches: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Ways to ask for a method: words for a way that is not the default, options that reduce nothing, options that do.

    The first that is not refused counts.
    """
    last = blocks - 1
    steps = [0.75 - 0.5625 * i / max(last, 1) for i in range(blocks)]
    counts = [1 + max(1, round(patches * step)) for step in steps]
    dense = [1 + patches] * blocks
    choosing = dict(keep_rate=0.5, reduction_loc=(0, last))
    return {
        "tome": [("", dict(r=0), dict(r=3))],
        "evit": [
            ("", dict(keep_rate=1), choosing),
            ("with fuse_token=False", dict(keep_rate=1, fuse_token=False), dict(choosing, fuse_token=False)),
        ],
        "evo_vit": [("", dict(prune_ratio=1.0), dict(prune_ratio=0.5))],
        "patch_slimming": [("", dict(schedule=dense), dict(schedule=counts))],
        "dps": [("", dict(counts=dense, after=1), dict(counts=dense[:1] + counts[1:], after=1))],
        "sit": [("", dict(keeping_ratio=1), dict(keeping_ratio=0.5, locations=tuple(range(1, blocks))[-2:]))],
        "cait": [("", dict(points={}), dict(points=dict(zip(range(last), ("horizontal", "vertical")))))],
        "random": [("", dict(keep_rate=1), choosing)],
    }[method]


METHODS = ("tome", "evit", "evo_vit", "patch_slimming", "dps", "sit", "cait", "random")


class Surveyed:
    """An architecture, built once, under one method after another.

    Args:
        entry: of the list.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.build()

    def build(self) -> None:
        torch.manual_seed(0)
        if self.entry.bare:
            with torch.device("meta"):
                self.model = self.entry.make()
            return
        self.model = redrawn(self.entry.make())
        self.inputs = self.entry.inputs()
        self.names = list(self.model.state_dict())
        self.expected = self.run(self.inputs)
        if not any(y.numel() > 1 and y.std() > 1e-3 for y in self.expected.values()):
            raise ValueError("its results are constant, so nothing shows in them")
        self.reached = self.gradients()

    def run(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            return results_of(self.model(**self.fitted(inputs)), self.entry.results)

    def fitted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs, with as many places in a prompt as the model, as it is now, has image tokens."""
        return inputs if self.entry.fit is None else self.entry.fit(self.model, inputs)

    def gradients(self) -> set[str]:
        """The names of the parameters that gradients reach."""
        self.model.zero_grad(set_to_none=True)
        results = results_of(self.model(**self.fitted(self.inputs)), self.entry.results)
        sum(y.square().sum() for y in results.values() if y.requires_grad).backward()  # type: ignore[union-attr]
        reached = {name for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return reached

    def outcome(self, method: str) -> Outcome:
        """What becomes of it under a method. Nothing is raised."""
        found = Outcome("open", "no way to ask")
        for way, idle, reducing in options(method, self.entry.blocks, self.entry.patches):
            found = self.tried(method, idle, reducing)
            if found.kind == "works":
                return Outcome("works", way)
            if found.kind == "open":
                return found
        return found

    def tried(self, method: str, idle: dict[str, Any], reducing: dict[str, Any]) -> Outcome:
        stage = "apply_patch"
        try:
            for stage, given in (("reducing nothing", idle), ("reducing", reducing)):
                torch.manual_seed(3)  # token slimmings are drawn
                try:
                    apply_patch(self.model, method, **given)
                except (TypeError, ValueError) as error:
                    return Outcome("refused", shortened(error))
                if self.entry.bare:
                    self.build()
                    return Outcome("open", "accepted, but it is in the list as what is refused: give it a small form")
                problem = self.of_idle(method) if given is idle else self.of_reducing(method)
                problem = problem or self.of_removal()
                if problem:
                    self.build()
                    return Outcome("open", f"{stage}, {problem}")
        except Exception as error:  # of any kind: it is what is to be found
            self.build()
            if isinstance(error, ValueError) and str(error).startswith("padded images were given"):
                return Outcome("refused", shortened(error))  # which nobody knows before they come
            return Outcome("open", f"{stage}: {type(error).__name__}: {shortened(error)}")
        return Outcome("works")

    def of_idle(self, method: str) -> str | None:
        """What is wrong with a model patched so that nothing is reduced."""
        found, expected = self.run(self.inputs), self.expected
        if method in ORDERING and self.entry.fit is not None:
            return None  # a language model reads the tokens in their order
        if method in ORDERING:
            found, expected = in_order(found), in_order(expected)
        return differ(found, expected)

    def of_reducing(self, method: str) -> str | None:
        """What is wrong with a model patched so that tokens are reduced."""
        added = [name for name in self.model.state_dict() if name not in self.names]
        if [name for name in self.model.state_dict() if name in self.names] != self.names:
            return "the state dict has other names"
        found = self.run(self.inputs)
        if not found or not all(torch.isfinite(y).all() for y in found.values()):
            return "results are not finite"
        if differ(found, self.expected, 1e-3) is None:
            return "results are those of the unpatched model"
        if method not in DRAWING:
            problem = self.of_batch(self.inputs)
            if problem is not None:  # rounding apart, which some heads amplify
                self.model.double()
                problem = self.of_batch({k: x.double() if is_real(x) else x for k, x in self.inputs.items()})
                self.model.float()
            if problem is not None:
                return f"a batch is not image by image: {problem}"
        lost = self.reached - self.gradients()
        return f"no gradient reaches {min(lost)} and {len(lost) - 1} others" if lost else None if added else None

    def of_batch(self, inputs: dict[str, Any]) -> str | None:
        """What is wrong with the results of a batch, beside those of its images alone."""
        alone = [self.run({name: one(x, i) for name, x in inputs.items()}) for i in range(BATCH)]
        return differ(self.run(inputs), {name: torch.cat([y[name] for y in alone]) for name in alone[0]})

    def of_removal(self) -> str | None:
        """What is wrong with a model that was patched before."""
        remove_patch(self.model)
        if list(self.model.state_dict()) != self.names:
            return "remove_patch left other names in the state dict"
        found = self.run(self.inputs)
        same = found.keys() == self.expected.keys() and all(torch.equal(found[k], y) for k, y in self.expected.items())
        return None if same else "remove_patch left another model"


def is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def one(x: Any, i: int) -> Any:
    """The i-th image's part of an input."""
    return x[i : i + 1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == BATCH else x


def differ(found: dict[str, Tensor], expected: dict[str, Tensor], close: float = CLOSE) -> str | None:
    """How results differ from others, in words; None where they do not."""
    if found.keys() != expected.keys():
        return f"results are {', '.join(found)} in place of {', '.join(expected)}"
    for name, y in expected.items():
        what = f"result {name!r}" if name else "the result"
        if found[name].shape != y.shape:
            return f"{what} is {tuple(found[name].shape)} in place of {tuple(y.shape)}"
        off = float((found[name] - y).abs().max()) if y.numel() else 0.0
        if not off <= close * max(1.0, float(y.abs().max()) if y.numel() else 0.0):
            return f"{what} is off by {off:.1g}"
    return None


def in_order(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of which the tokens, where they are of tokens, come in the order of their numbers."""
    return {name: y.sort(dim=1).values if y.dim() == 3 else y for name, y in results.items()}


def shortened(error: Exception) -> str:
    """An error's words, on one line and without the list of all blocks that are known, which grows."""
    text = " ".join(str(error).split()).removeprefix("apply_patch: ")
    text = re.sub(r"(; blocks must be .*|, but it must be [a-z]\w*(\.\w+)+( or .*)?)$", "", text)
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return text if len(text) <= 300 else text[:297] + "..."


def blocks_of(model: nn.Module) -> str:
    """The full name of the class of most of a model's blocks: those of a list of modules with the most parameters."""
    best, most = "", -1
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            kinds = {type(child) for child in module}
            size = sum(p.numel() for p in module.parameters())
            if len(kinds) == 1 and size > most and list(module.children())[0]._modules:
                kind = kinds.pop()
                best, most = f"{kind.__module__}.{kind.__qualname__}", size
    return best


def surveyed(entry: Entry) -> tuple[str, dict[str, Outcome]]:
    """The class of its blocks, and by method what becomes of an architecture."""
    with quiet():
        try:
            subject = Surveyed(entry)
        except Exception as error:  # another version of its library, say: the list goes on
            problem = Outcome("open", f"unpatched: {type(error).__name__}: {shortened(error)}")
            return "", dict.fromkeys(METHODS, problem)
        return blocks_of(subject.model), {method: subject.outcome(method) for method in METHODS}


def outcome(entry: Entry, method: str) -> Outcome:
    """What becomes of an architecture under a method."""
    with quiet():
        return Surveyed(entry).outcome(method)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of configurations as small as these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
