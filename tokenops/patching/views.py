"""Views of a patched model that say what its blocks do: where patches went, and maps of intermediate features."""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .engine import Aside, Flow, Record, Step, tokens_of
from .modules import plain_of
from .site import Site
from .trunks import grid_of


class Trace(NamedTuple):
    """What a patched model did to the tokens of a batch.

    Attributes:
        method: its name, as `apply_patch` takes it.
        grid: rows and columns of patches.
        steps: one for each block that changed the tokens, in order.
    """

    method: str
    grid: tuple[int, int]
    steps: list[Step]


@torch.no_grad()
def trace(model: Any, images: Tensor) -> Trace:
    """Run a patched model in eval mode, and say where the patches went.

    What attention mixes in between is not followed: a token stands for its own place. Of Evo-ViT a step says which
    patches pass through a stage; behind it all are there again.

    Args:
        model: behind `apply_patch`; its mode is as before afterwards.
        images: ``(B, 3, H, W)``.

    Raises:
        ValueError: the model is not patched.

    >>> import timm, tokenops
    >>> model = tokenops.apply_patch(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2), "tome", r=4)
    >>> [(step.block, step.tokens) for step in trace(model, torch.randn(1, 3, 64, 64)).steps]
    [(0, 13), (1, 9)]
    """
    patch = getattr(model, "tokenops_patch", None)
    if patch is None:
        raise ValueError(f"trace needs a model behind apply_patch, but this {type(model).__name__} is not patched")
    site = Site(model)
    if site.packs:
        raise ValueError(
            f"trace takes images of one size, but {type(site.owner).__name__} takes rows of patches: see the kept units"
            " of its result"
        )
    view, records = recorded(site)
    with evaluating(model):
        view.eval()
        (view if site.timm else view.get_submodule(site.path))(images)  # CLIP's model would take words
    grid = grid_of(site.embedding, images.shape)
    return Trace(patch.method.name, grid, [record.step for record in records if record.step is not None])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode within; every module of it has its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returns: a tensor, the first of a tuple, or a Hugging Face output."""
    if isinstance(output, Tensor):
        return output
    found = output.logits if hasattr(output, "logits") else output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}, in which there are no logits")
    return found


@contextmanager
def patches_behind(site: Site) -> Iterator[list[Tensor]]:
    """The patch tokens behind every block of a model, patched or not, of a run within, as the next block has them:
    where a part of that one (`Method.entry`) changes them first, those behind it.
    """
    outputs: list[Tensor] = []
    patch = getattr(site.owner, "tokenops_patch", None)
    entry = None if patch is None else patch.method.entry

    def behind(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(tokens_of(output)[:, site.prefix :])

    def entered(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if outputs:
            outputs[-1] = output[:, site.prefix :]

    parts = [getattr(block, entry) for block in site.blocks if entry is not None and hasattr(block, entry)]
    handles = [block.register_forward_hook(behind) for block in site.blocks]
    handles += [part.register_forward_hook(entered) for part in parts]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Recorder(nn.Module):
    """Stands for a block in a view: takes and gives tensors, keeps the state aside, and says what was done."""

    def __init__(self, block: nn.Module, index: int, records: list[Record]) -> None:
        super().__init__()
        self.block: Any = block
        self.index, self.records = index, records

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = self.records[self.index - 1] if self.index else None
        prefix = self.block.tokenops_role.prefix
        record = Record(self.index, before.patches if before is not None else x.shape[1] - prefix)
        del self.records[self.index :]  # of a run before: recomputed, in checkpointing
        self.records.append(record)
        flow = None if before is None or before.flow is None else before.flow
        taken = x if flow is None or flow.state is None else Flow(x, flow.state)
        y = self.block(taken, *args, record=record, **kwargs)
        return tokens_of(y) if isinstance(y, (Flow, Tensor)) else (tokens_of(y), *y[1:])


def recorded(site: Site) -> tuple[Any, list[Record]]:
    """A model of the same modules whose blocks are recorded, and the records that its runs make."""
    site.refuse_others()
    records: list[Record] = []
    names = ".".join(name for name in (site.path, site.within) if name).split(".")
    view = above = _shallow(site.model)
    for name in names[:-1]:
        above._modules[name] = above = _shallow(above._modules[name])
    recorders = [Recorder(block, i, records) for i, block in enumerate(site.blocks)]
    sequential = isinstance(site.container, nn.Sequential)
    above._modules[names[-1]] = nn.Sequential(*recorders) if sequential else nn.ModuleList(recorders)
    return view, records


def _shallow(module: Any) -> Any:
    """A module of the same parts, of which others may be put in the place of some."""
    new = object.__new__(type(module))
    vars(new).update(vars(module))
    vars(new)["_modules"] = dict(module._modules)  # a compiled module would pass the assignment on
    if "_orig_mod" in new._modules:  # one that is compiled is not in a view
        vars(new)["forward"] = lambda *args, **kwargs: new._modules["_orig_mod"](*args, **kwargs)
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and hasattr(module, "_old_forward"):  # accelerate's
        new.forward = functools.partial(forward.func, new)
        new._old_forward = types.MethodType(type(new).forward, new)
    return new


class PatchedUnmapped:
    """A vision transformer whose own intermediate features take what blocks hand on for tokens."""

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """ValueError, as what blocks hand on is more than tokens."""
        raise ValueError(
            f"forward_intermediates of {type(self).__name__} takes tokens of the whole grid from between the blocks:"
            " remove_patch comes before it"
        )


class PatchedTransformer:
    """A vision transformer of timm whose intermediate maps cover the grid again, and whose roles follow its form."""

    def forward_intermediates(
        self,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Outputs of chosen blocks as timm's models give them, with its arguments.

        "NLC" gives the tokens as they are behind a block. "NCHW" gives maps of the full grid, in which patches that
        were merged have the same values, and those that wait for the end of a stage have theirs from before it.

        Raises:
            ValueError: ``output_fmt`` is neither, or "NCHW" where patches were dropped, fused or mixed.
        """
        from timm.models._features import feature_take_indices

        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}, but it must be 'NCHW' or 'NLC'")
        plain: Any = plain_of(self)
        if isinstance(self.blocks[0], Recorder):  # type: ignore[attr-defined]  # a trace of a model around
            return plain.forward_intermediates(self, x, indices, output_fmt="NLC", intermediates_only=True)
        site: Any = Site(self)
        view, records = recorded(site)
        if return_prefix_tokens:  # not all models have them
            kwargs["return_prefix_tokens"] = True
        given = dict(norm=norm, stop_early=stop_early, output_fmt="NLC", intermediates_only=intermediates_only)
        out = plain.forward_intermediates(view, x, indices, **given, **kwargs)
        if output_fmt == "NLC":
            return out
        found = out["image_intermediates"] if isinstance(out, dict) else out if intermediates_only else out[1]
        grid = grid_of(site.embedding, x.shape)
        finish = site.owner.norm if norm else nn.Identity()
        for j, i in enumerate(sorted(feature_take_indices(len(site.blocks), indices)[0])):
            tokens, *others = found[j] if isinstance(found[j], tuple) else (found[j],)
            flow = records[i].flow
            spread = tokens
            if flow is not None and flow.state is not None and not isinstance(flow.state, Aside):
                spread = site.blocks[i].tokenops_role.spread(tokens, flow.state, finish)
            if spread is None:
                raise ValueError(
                    f"block {i} gives {tokens.shape[1]} tokens that are not the grid's {grid[0]} x {grid[1]} patches"
                    f" ({self.tokenops_patch.method.name}): use output_fmt='NLC', or"  # type: ignore[attr-defined]
                    " 'tome', 'evo_vit' or 'cait', which keep a map"
                )
            y = spread.transpose(1, 2).unflatten(2, grid).contiguous()
            found[j] = (y, *others) if others else y
        return out

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As timm's, which drops blocks; the last that stays is the last."""
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self.tokenops_patch.fit(self)  # type: ignore[attr-defined]
        return kept

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """As timm's; whether tokens are brought back follows the pooling.

        Raises:
            ValueError: the method leaves nothing to pool; the model is as before.
        """
        before = {**vars(self), "_modules": dict(self._modules)}  # type: ignore[attr-defined]
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        try:
            self.tokenops_patch.fit(self)  # type: ignore[attr-defined]
        except ValueError:
            vars(self).update(before)
            raise
