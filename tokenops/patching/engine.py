"""The engine: what a forward knows beside its tokens is a value, and a patched block is a block of a class of its own.

A block takes a tensor, or a `Flow` from the block before, and hands on one of the two. Nothing is kept on a module: so
threads, recomputation in checkpointing, hooks and wrappers see what they see in any model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from ..ops.masked_channel_attention import WIDEST_HEAD, faster
from . import families
from .blocks import Ask, attended, dropped_by
from .dressing import place_of
from .positions import Positions


class Flow(NamedTuple):
    """What a block hands to the next one where tokens alone do not say enough.

    Attributes:
        tokens: ``(B, P+N, C)``; hooks that look at ``output[0]`` find them.
        state: the method's, a NamedTuple of tensors, some of them None. Those that count are integers: wrappers that
            cast floats leave these alone.
    """

    tokens: Tensor
    state: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing but a patched block takes one."""
        raise ValueError(
            f"{getattr(func, '__name__', func)} was given what a patched block hands to the next one: blocks were"
            f" added, replaced or taken away since the patch: {families.PATCH_ANEW}"
        )


def tokens_of(given: Any) -> Tensor:
    """The tokens in what a block takes or gives: a tensor, a `Flow`, or a tuple that begins with them."""
    return given if isinstance(given, Tensor) else tokens_of(given[0])


class Aside(NamedTuple):
    """In the place of a state, where the model takes tokens that are not those that the next block is to have.

    Attributes:
        tokens: what the next block is to have.
        state: the method's, of these.
    """

    tokens: Tensor
    state: Any


class Step(NamedTuple):
    """What a block did to the tokens. Either the sources or the weights are None.

    Attributes:
        block: which, from 0.
        tokens: how many are left behind it, prefix included.
        sources: ``(B, N0)`` int64: the token behind the prefix that each of the N0 patches of the image is in, -1 for a
            patch that was dropped, fused away or passed by.
        weights: ``(B, M, N0)``: how much token m draws on each patch, 1 in sum.
    """

    block: int
    tokens: int
    sources: Tensor | None
    weights: Tensor | None = None


class Record:
    """Given to a block that is to say what it does, beside what it returns.

    Attributes:
        block: its number.
        patches: N0, how many patch tokens came into the first block.
        step: what it did; None for nothing.
        flow: what came out of it, the state with it even of the last block; None where the block ran by itself.
    """

    def __init__(self, block: int, patches: int) -> None:
        self.block, self.patches = block, patches
        self.step: Step | None = None
        self.flow: Flow | None = None

    def note(self, x: Tensor, sources: Tensor | None, weights: Tensor | None = None) -> None:
        self.step = Step(self.block, x.shape[1], sources, None if weights is None else weights.detach())


@dataclass(frozen=True)
class Role:
    """What a method does in one block: constants, and the function that does it. No number of the block is in it, which
    a compiler would guard on: blocks that do the same have equal roles.

    Attributes:
        prefix: how many tokens before the patches' are never touched.
        last: whether a tensor must come out.
        taken: whether the model takes its tokens from behind the block: the last, and that of a hidden state.
        alone: whether the model takes tokens of the prefix alone.
        constant: rows by number that the block needs where its tokens are (`PatchedBlock.tokenops_rows`), or None.
    """

    prefix: int
    last: bool
    taken: bool = field(default=False, kw_only=True)
    alone: bool = field(default=False, kw_only=True)
    constant: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def idle(self) -> bool:
        """Whether the block does nothing of its own to tokens without a state."""
        return False

    @property
    def mapped(self) -> bool:
        """Whether every patch has a token again where the model takes them, by `spread`."""
        return False

    @property
    def pads(self) -> bool:
        """Whether it knows padding from patches."""
        return False

    def run(self, block: Any, flow: Flow, positions: Positions | None, record: Record | None) -> Flow:
        """The block with the method in it."""
        raise NotImplementedError

    def left(self, block: Any, tokens: int, full: int) -> int:
        """How many tokens come out of `run` in evaluation, the prefix included, of so many that come in.

        Args:
            block: which; what is in it may say the number.
            tokens: those that come in, as the block before hands them on.
            full: those that came into the first block.
        """
        if self.idle:
            return tokens
        raise NotImplementedError(f"{type(self).__qualname__} does not say how many tokens it leaves: define left")

    def spread(self, tokens: Tensor, state: Any, finish: Any, prefix: int = 0) -> Tensor | None:
        """Tokens ``(B, prefix+n, C)`` behind the block, which went through `finish`, as one for every patch; or None.

        ``prefix`` of them, none or all that the model has, are not patches.
        """
        return None

    def refuse_padding(self) -> None:
        """ValueError where the method, or what the model makes of the tokens, would take padding for patches."""
        if not self.pads or not (self.mapped or self.alone):
            raise ValueError(
                "padded images were given to a patched model, whose method knows no padding, or which pools patches by"
                " a mask of all: use 'tome' or 'evo_vit', which give every patch a token again, or images of one size"
            )

    def shown(self, flow: Flow) -> Flow:
        """What the model takes behind the block, and what the next one is given beside."""
        if not (self.taken and self.mapped) or flow.state is None:
            return flow
        tokens = self.spread(flow.tokens, flow.state, lambda x: x, self.prefix)
        if tokens is None or self.last or tokens is flow.tokens:
            return Flow(flow.tokens if tokens is None else tokens, None if self.last else flow.state)
        return Flow(tokens, Aside(*flow))


class Method:
    """What is done to the tokens of a model: a plug-in of the engine. Its constructor takes its options, by name.

    Attributes:
        name: as `apply_patch` takes it; a class with a name is known by it from then on.
        scores: whether attention gives more than its result, which heads wider than the operator's cannot.
        packs: whether it is defined for towers of images that are packed in one sequence.
        shape: whether it is for one grid of patches, which images are then checked for.
        setting: the option that becomes an attribute of the model, to be set between forwards; None without.
        entry: the name of the part that tokens pass first in a block that has it; None without.
        value: what that is.
        documents: the options that may be objects with `to_json` and `from_json`, and their classes: how a folder of
            `tokenops.save_patched` has them. Other options are numbers, text, lists, tuples and mappings.
    """

    name: ClassVar[str]
    scores: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    shape: ClassVar[bool] = False
    setting: str | None = None
    entry: ClassVar[str | None] = None
    documents: ClassVar[Mapping[str, Any]] = {}
    value: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _noted(cls.__init__)  # type: ignore[method-assign]
        if "name" in vars(cls):
            METHODS[cls.name] = cls

    def roles(self, site: Any) -> Sequence[Role]:
        """One role a block of the model.

        Raises:
            ValueError: an option does not fit, or the method is not defined for the model.
        """
        raise NotImplementedError

    def parts(self, site: Any) -> dict[int, tuple[str, Any]]:
        """Modules to be added to blocks, by number: a name, and the module."""
        return {}


def _noted(init: Any) -> Any:
    """A method's constructor that notes what it was given, if no other does: those of base classes come later."""

    @wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        if "tokenops_given" not in vars(self):
            object.__setattr__(self, "tokenops_given", (args, kwargs))  # a frozen dataclass takes no assignment
        init(self, *args, **kwargs)

    return noting


METHODS: dict[str, type[Method]] = {}


class PatchedBlock:
    """A block with a role. Its parameters, submodules, hooks and names are its own, and its forward where it is idle.

    Attributes:
        tokenops_role: what the method does in it; rows of a constant length that it names are a buffer.
    """

    tokenops_role: Role
    tokenops_constant: Tensor

    @staticmethod
    def tokenops_unnormed(x: Tensor) -> Tensor:
        """In the place of a norm that this kind of block does not have (`families.UNNORMED`)."""
        return x

    def tokenops_take(self, role: Role) -> None:
        """Have a role from now on."""
        if role.constant is not None:
            rows = torch.tensor(role.constant, device=place_of(self))
            self.register_buffer("tokenops_constant", rows, persistent=False)  # type: ignore[attr-defined]
        self.tokenops_role = role  # last: a forward in another thread finds the rows of the role it finds

    def tokenops_rows(self, x: Tensor) -> Tensor:
        """The constant rows where x is: the buffer may be elsewhere, as weights that were meta were assigned."""
        rows = self.tokenops_constant
        return rows if rows.device == x.device else torch.tensor(self.tokenops_role.constant, device=x.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As every module's; rows that are constants are as they were, whatever `to_empty` did to them."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        constant = self.tokenops_role.constant
        if constant is not None and not self.tokenops_constant.is_meta:
            self.tokenops_constant = torch.tensor(constant, device=self.tokenops_constant.device)
        return self

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens ``(B, P+N, C)``, or a `Flow`, to as many tokens or fewer.

        Raises:
            ValueError: a mask or attention weights are asked for; or the state of the block before was lost, or its
                gradients.
        """
        role, record = self.tokenops_role, kwargs.pop("record", None)
        args, kwargs = type(self).tokenops_family.unmasked(args, kwargs)  # type: ignore[attr-defined]
        if not isinstance(x, Flow):
            refuse_symbols(x)
            if not isinstance(x, Tensor):
                raise ValueError(_lost(x))
            if role.idle:
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]
            x = Flow(x, None)
        elif x.tokens.requires_grad and not torch.is_grad_enabled():
            raise ValueError(_lost(x))
        if isinstance(x.state, Aside):
            x = Flow(*x.state)
        positions = families.positions(self, args, kwargs, role.prefix)
        if positions is not None and positions.hidden is not None:
            role.refuse_padding()
        flow = role.shown(role.run(self, x, positions, record))
        if record is not None:
            record.flow = flow
        family = type(self).tokenops_family  # type: ignore[attr-defined]
        return family.handed(flow.tokens if flow.state is None or (role.last and not family.packs) else flow)


def refuse_symbols(x: Any) -> None:
    """ValueError where a model is traced by symbols, not by values."""
    if isinstance(x, fx.Proxy):
        raise ValueError(
            "a patched model cannot be traced symbolically (torch.fx, create_feature_extractor), as it looks at numbers"
            " of tokens: use its forward_intermediates, timm's features_only, torch.export or torch.jit.trace"
        )


def _lost(x: Any) -> str:
    what = "tokens whose gradients are lost" if isinstance(x, Flow) else type(x).__name__
    return (
        f"a block of a patched model takes tokens or what the block before gave, but got {what}: checkpointing with"
        " use_reentrant=True takes it apart, so pass use_reentrant=False"
    )


class PatchedAttention:
    """An attention that can be asked for more than its result."""

    def forward(self, *args: Any, ask: Ask | None = None, **kwargs: Any) -> Any:
        """The attention's own result; with `ask` computed so that what is asked for is told.

        Without, by our operator too where it is much the faster than torch's, which the attention would run: less is
        not worth other bits than the model's own.
        """
        family = type(self).tokenops_family  # type: ignore[attr-defined]
        positions = kwargs.pop("positions", None)
        x, *more = args or list(kwargs.values())[:1]  # transformers' layers may name the tokens
        if ask is None:
            named = dict(list(kwargs.items())[0 if args else 1 :])
            named = {name: value for name, value in named.items() if value is not None and value is not False}
            others = [*more, *(value for name, value in named.items() if name not in family.tables)]
            if not _swift(family, self, x) or any(other is not None for other in others):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            ask, positions = Ask(), family.positions(None, named, 0)
        return family.returned(attended(family, self, ask, x, positions))


def _swift(family: Any, attention: Any, x: Any) -> bool:
    """Whether our operator is much the faster on these tokens, and does all that the attention does."""
    if not family.swift or not isinstance(x, Tensor) or faster(x) < 1.5 or torch.is_autocast_enabled("cpu"):
        return False
    plain = family.fused(attention) and not dropped_by(family, attention)
    return plain and family.width(attention) <= WIDEST_HEAD


def sources_of(places: Tensor, patches: int) -> Tensor:
    """Places ``(B, k)`` of tokens among the patches, -1 for none, to the token ``(B, patches)`` of every patch."""
    tokens = torch.arange(places.shape[1], device=places.device).expand_as(places)
    empty = tokens.new_full((places.shape[0], 1 + patches), -1)
    return empty.scatter(1, places + 1, tokens)[:, 1:]
