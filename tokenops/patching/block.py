"""The block that stands in a patched model for its own, and what the blocks of one model share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .families import Family, attend, feed, rope_rows
from .trace import Step, Trace


class State:
    """What the blocks of one forward hand on beside the tokens.

    Attributes:
        patches: N0, how many patch tokens came into the first block.
        last: the number of the last block.
        plan: what the method does in each block, as its options say now.
        steps: what was done, where it is traced; else None.
        places: the patch of each token, ``(N,)`` or ``(B, N)``, once tokens were chosen.
        source: the token ``(B, N0)`` each patch is in, once tokens were merged.
        sizes, log_sizes: ``(B, P+N)``, how many patches each token stands for.
        weights: ``(B, M, N0)``, what soft tokens draw on.
        scores: ``(B, N)``, what Evo-ViT chooses by.
        aside: tokens, scores and indices to restore to, while chosen tokens pass through a stage.
    """

    def __init__(self, patches: int, last: int, plan: Any, steps: list[Step] | None) -> None:
        self.patches, self.last, self.plan, self.steps = patches, last, plan, steps
        self.places: Tensor | None = None
        self.source: Tensor | None = None
        self.sizes: Tensor | None = None
        self.log_sizes: Tensor | None = None
        self.weights: Tensor | None = None
        self.scores: Tensor | None = None
        self.aside: tuple[Tensor, Tensor | None, Tensor] | None = None

    def note(self, block: int, x: Tensor, sources: Tensor | None, weights: Tensor | None = None) -> None:
        """Trace a step: the tokens x are behind the block."""
        if self.steps is not None:
            detached = None if weights is None else weights.detach()
            self.steps.append(Step(block, x.shape[1], sources, detached))


class Host:
    """A model and the vision transformer within.

    Attributes:
        model: what `apply_patch` was given.
        owner: the vision transformer, which has the patch embedding.
        holder, name: the module and the attribute that hold its blocks.
        prefix: how many tokens before the patches' are never touched.
        has_class: whether the first of them is a class token.
        grid: rows and columns of patches, None where images may have others.
    """

    model: Any
    owner: Any
    holder: Any
    name: str
    prefix: int
    has_class: bool
    grid: tuple[int, int] | None

    def pools_class(self) -> bool:
        """Whether the model, as it is now, classifies by tokens of the prefix alone."""
        owner = self.owner
        if hasattr(owner, "global_pool"):
            return self.has_class and owner.global_pool == "token" and getattr(owner, "attn_pool", None) is None
        return self.has_class and not self.maps_patches()

    def maps_patches(self) -> bool:
        """Whether the model makes an image of its patch tokens."""
        return "MaskedImageModeling" in type(self.model).__name__


class Patch(Host):
    """How a model is patched: ``model.tokenops_patch``. One forward at a time runs through a patched model.

    Attributes:
        method: what is done, with its options.
        trace_source: whether every forward is traced.
        trace: of the last forward that was, or None.
    """

    def __init__(self, site: Any, method: Any, trace_source: bool = False) -> None:
        self.method = method
        self.model, self.owner, self.holder, self.name = site.model, site.owner, site.holder, site.name
        self.prefix, self.has_class, self.grid = site.prefix, site.has_class, site.grid
        self.trace_source = self.tracing = trace_source
        self.trace: Trace | None = None
        self.steps: list[Step] = []
        self.added: dict[int, str] = {}
        self.state: State | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "state": None, "steps": [], "trace": None}  # of a forward: no part of a copy

    @property
    def blocks(self) -> Any:
        """The container of the blocks."""
        return getattr(self.holder, self.name)

    def begin(self, x: Tensor) -> State:
        """The state of a new forward, whose tokens are x."""
        if getattr(self.owner, "grad_checkpointing", False):
            raise ValueError("grad_checkpointing is on, but a patched block run twice would change the tokens twice")
        config = getattr(self.owner, "config", None)
        for option in ("output_attentions", "output_hidden_states"):
            if getattr(config, option, False):
                raise ValueError(f"config.{option} is on, but a patched model cannot give them: the tokens change")
        plan = self.method.plan(self)
        self.state = State(x.shape[1] - self.prefix, len(self.blocks) - 1, plan, [] if self.tracing else None)
        return self.state

    def end(self, state: State) -> None:
        """Nothing of a forward lingers, but what was traced."""
        if state.steps is not None:
            self.steps = state.steps
            if self.trace_source:
                self.trace = Trace(self.method.name, self._likely_grid(state.patches), state.steps)
        self.state = None

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Forwards within are traced, into ``steps``."""
        before, self.tracing = self.tracing, True
        try:
            yield
        finally:
            self.tracing, self.state, self.steps = before, None, []

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of images."""
        height, width = images.shape[-2:]
        if hasattr(self.owner, "patch_embed"):
            return tuple(self.owner.patch_embed.dynamic_feat_size((height, width)))
        embeddings = self.owner.embeddings
        size = getattr(embeddings, "patch_embeddings", embeddings).patch_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return height // rows, width // columns

    def _likely_grid(self, patches: int) -> tuple[int, int]:
        """The model's grid, or a square, or one row: images of another size do not say."""
        if self.grid is not None and self.grid[0] * self.grid[1] == patches:
            return self.grid
        side = round(patches**0.5)
        return (side, side) if side * side == patches else (1, patches)


class PatchedBlock(nn.Module):
    """Stands for a block under the same names: its parameters, submodules and hooks are the block's own.

    Args:
        block: what it stands for. It is kept for `remove_patch`.
        family: its kind.
        patch: what the blocks of a model share.
        index: the number of the block, from 0.
    """

    #: set where transformers would checkpoint a layer
    gradient_checkpointing = False

    def __init__(self, block: nn.Module, family: type[Family], patch: Patch, index: int) -> None:
        vars(self).update(vars(block))
        self._compiled_call_impl = None
        self._original = (block,)  # in a tuple: not a submodule
        self.family, self.patch, self.index = family, patch, index

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens ``(B, P+N, C)`` to as many, or fewer.

        Raises:
            ValueError: a mask or other outputs are asked for, or the model checkpoints its blocks.
            RuntimeError: the first block did not run before.
        """
        patch, given = self.patch, {**dict(zip(self.family.arguments, args)), **kwargs}
        rope = given.pop("rope", None)
        for name in ("attn_mask", "attention_mask", "is_causal", "output_attentions", "output_hidden_states"):
            if given.get(name) is not None and given[name] is not False:
                raise ValueError(
                    f"{name} was given to a patched model, whose tokens change between blocks: leave it out"
                )
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                "gradient checkpointing is on, but a patched block run twice would change the tokens twice"
            )
        if getattr(self, "_is_replica", False):
            raise ValueError("a patched model runs no two forwards at once: use DistributedDataParallel")
        state = patch.begin(x) if self.index == 0 else patch.state
        if state is None:
            raise RuntimeError(f"block {self.index} of a patched model needs the blocks before it: run the model")
        try:
            x = patch.method.run(self, x, state, rope)
            if self.index == state.last:
                x = patch.method.finish(self, x, state)
                patch.end(state)
        except BaseException:  # of an interrupted forward nothing is held
            patch.state = None
            raise
        return x

    def attend(
        self, x: Tensor, normed: Tensor | None = None, **asked: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `families.attend`, of this block."""
        return attend(self.family, self, x, normed, **asked)

    def feed(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """As `families.feed`, of this block."""
        return feed(self.family, self, x, normed)

    def whole(
        self, x: Tensor, rope: Tensor | None, places: Tensor | None = None, normed: Tensor | None = None
    ) -> Tensor:
        """What the block gives by itself, of patches at some places."""
        return self.feed(self.attend(x, normed, rope=rope_rows(rope, places))[0])

    def norm(self, which: str) -> tuple[Tensor, Tensor, float] | None:
        """ "norm1" or "norm2" as operators take it; None where it is no layer norm."""
        norm = getattr(self, getattr(self.family, which))
        return (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None

    def extra_repr(self) -> str:
        return f"{type(self._original[0]).__name__} {self.index}, {self.patch.method.name}"
