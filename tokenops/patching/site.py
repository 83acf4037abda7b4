"""The place of a patch: the vision transformer within a model, its blocks, its grid, and what is made of its tokens."""

from typing import Any, NamedTuple

from torch import nn

from .dressing import Patched
from .families import FAMILIES, PADDED, PATCH_ANEW
from .families.refused import why_refused
from .modules import name_of, unwrapped
from .readers import pools_class, reader_of
from .trunks import is_timm, is_trunk, packs, pads, trunk_of

#: what makes the tokens of vision transformers as `trunk_of` says
_MAKERS = ("timm.", "torchvision.", "open_clip.", "transformers.", "tokenops.", "torch.")
#: the methods that make them, beside a forward
_MAKING = ("forward_features", "_pos_embed", "_embeds", "_process_input")


class Where(NamedTuple):
    """What `apply_patch` was told of the place of a patch.

    Attributes:
        module: the part of the model with the vision transformer; None for the only one.
        prefix: how many tokens come before the patches'; None for as many as the model itself says.
    """

    module: str | None = None
    prefix: int | None = None


class Site:
    """A vision transformer within a model, patched or not.

    Args:
        model: what `apply_patch` was given.
        told: what it was told; None for what a patched model was patched with.

    Attributes:
        owner: the vision transformer, which has the patch embedding; ``path`` says where it is in the model.
        container: the module that holds its blocks, ``within`` the owner.
        blocks: these, without what wraps them; ``depth`` are as many, or as many as when the model was patched.
        prefix: how many tokens before the patches' are never touched.
        has_class: whether the first of them is a class token.
        dim: C.
        grid: rows and columns of patches, None where images may have others; ``patches`` are as many.
        usual: those of img_size, which methods for one grid are fitted to.
        img_size: height and width of the images, None where the model does not say.
        embedding: the module that makes the patch tokens.
        taken: the blocks behind which the model takes its tokens, mostly the last; -1 is before the first.
        maps: the class that expects every patch token in its place; None without.
        packs: whether its images are packed in one sequence of tokens.
        speaker: the innermost model around with a prompt that has places for images; None without.

    Raises:
        TypeError: the model has no blocks that can be patched, or some that cannot.
        ValueError: it has several vision transformers, or a block in two places.
    """

    def __init__(self, model: Any, told: Where | None = None) -> None:
        self.model = model
        if told is None:
            told = getattr(vars(model).get("tokenops_patch"), "where", None) or Where()
            told = told if "tokenops_within" not in vars(model) else told._replace(module=None)
        where, self.path, self.within = _find(model, told.module)
        self.owner: Any = model.get_submodule(self.path)
        self.container: Any = self.owner.get_submodule(self.within)
        self.blocks = [unwrapped(block) for block in self.container]
        self.depth = len(self.blocks)
        places = {id(block): i for i, block in enumerate(self.blocks)}
        for i, block in enumerate(self.blocks):
            if (again := places[id(block)]) != i:
                raise ValueError(
                    f"apply_patch: blocks {i} and {again} of {where} are one module, but each needs a role of its own"
                )
        self.families = []
        for i, block in enumerate(self.blocks):
            family = getattr(type(block), "tokenops_family", None) or FAMILIES.get(name_of(block))
            if family is not None and pads(self.owner):
                family = PADDED.get(family, family)
            try:
                if family is None:
                    raise TypeError(f"it is {name_of(block)}, which is not of a kind that can be patched")
                family.check(block)
            except TypeError as error:
                raise TypeError(f"apply_patch: block {i} of {where}: {error}") from None
            self.families.append(family)
        owner = self.owner
        self.timm, self.packs = is_timm(owner), packs(owner)
        if getattr(getattr(owner, "config", None), "use_mid_position_embeddings", False):
            raise TypeError(
                f"apply_patch: {name_of(owner)} adds positions to all tokens between blocks: it must be without"
                " (use_mid_position_embeddings=False)"
            )
        self.embedding, self.prefix, self.has_class, self.dim, self.img_size, self.grid, self.usual = trunk_of(owner)
        if told.prefix is None:
            _refuse_prompts(owner)
        elif isinstance(told.prefix, bool) or not isinstance(told.prefix, int) or told.prefix < self.prefix:
            raise ValueError(
                f"apply_patch: prefix={told.prefix!r}, but it must be a whole number of at least {self.prefix}, as many"
                " tokens as come before the patches' without others"
            )
        else:
            self.prefix = told.prefix
        self.patches = None if self.grid is None else self.grid[0] * self.grid[1]
        self._around = _around(model, self.path)
        self.taken, self.maps, self.speaker = reader_of(owner, self._around, self.depth)

    def refuse_others(self) -> None:
        """ValueError where a patched model has blocks that are not."""
        others = [i for i, block in enumerate(self.blocks) if not hasattr(block, "tokenops_role")]
        if others:
            raise ValueError(f"blocks {others} were added or replaced since the patch: {PATCH_ANEW}")

    def pools_class(self) -> bool:
        """Whether the model, as it is now, classifies by tokens of the prefix alone."""
        return self.maps is None and pools_class(self.owner, self._around, self.has_class, self.speaker)

    def pools_patches(self) -> bool:
        """Whether the model, as it is now, makes something of all its patch tokens, and no words of each."""
        return self.speaker is None and not self.pools_class()

    def needs_grid(self, method: str) -> tuple[int, tuple[int, int]]:
        """The number of patches and the grid a method is fitted to: that of img_size, where images may have others."""
        if self.usual is None:
            raise ValueError(
                f"{method} needs a fixed grid, but the model does not say what images it is made for, or shuffles their"
                " patches"
            )
        dropping = (getattr(self.owner, name, None) for name in ("patch_drop", "patch_dropout"))
        if any(getattr(module, "prob", 0.0) for module in dropping):
            raise ValueError(f"{method} needs every patch, but the model has a patch_drop_rate")
        return self.usual[0] * self.usual[1], self.usual

    def needs_no_map(self, method: str) -> None:
        """ValueError where the model expects every patch token in its place."""
        if self.maps is not None:
            raise ValueError(
                f"{method}: {self.maps} expects every patch token in its place, which 'tome', 'evo_vit' and 'cait'"
                " alone give: use one of these"
            )


def _around(model: Any, path: str) -> list[Any]:
    """The modules on the way from the model, included, to one within it, not included."""
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:length])) for length in range(len(names))]


def _refuse_prompts(owner: Any) -> None:
    """ValueError where a class of somebody's own makes the tokens of a vision transformer, and may add some."""
    parts: list[tuple[Any, tuple[str, ...]]] = [(owner, _MAKING if is_timm(owner) else ("forward", *_MAKING))]
    parts += [(getattr(owner, name), ("forward",)) for name in ("embeddings", "encoder") if hasattr(owner, name)]
    for kind, names in ((kind, names) for part, names in parts for kind in type(part).__mro__):
        makes = [name for name in names if name in vars(kind)]
        if makes and not kind.__module__.startswith(_MAKERS):
            raise ValueError(
                f"apply_patch: {kind.__name__} has a {makes[0]} of its own, which may add tokens (prompts): say how"
                " many come before the patches' in all, apply_patch(..., prefix=1) for a class token alone"
            )


def _find(model: nn.Module, part: str | None) -> tuple[str, str, str]:
    """Where the blocks are, where the vision transformer around them is, and where in it they are.

    ``part`` is the path of a part of the model in which they are, or with the blocks in it.
    """
    if part is not None and part not in dict(model.named_modules()):
        raise ValueError(f"apply_patch: module={part!r}, but {type(model).__name__} has no such part")
    found, others = [], []
    for path, holder in model.named_modules():
        for name, container in holder.named_children():
            if not isinstance(container, (nn.Sequential, nn.ModuleList)) or not len(container):
                continue
            where = f"{path}.{name}".strip(".")
            if not any(name_of(unwrapped(block)) in FAMILIES for block in container):
                if name in ("blocks", "layer", "layers"):
                    others.append(f"{where} of {name_of(container[0])}")
                continue
            owner = _owner(model, path)
            if owner is None:
                others.append(f"{where}, of no known vision transformer")
            else:
                found.append((where, owner, where.removeprefix(owner).strip(".")))
    if not found:
        reason = why_refused([name_of(module) for module in model.modules()])
        if reason is not None:
            raise TypeError(f"apply_patch: {name_of(model)} is no vision transformer that can be patched: {reason}")
        seen = f": it has {', '.join(others)}" if others else ""
        raise TypeError(
            f"apply_patch: {name_of(model)} is no vision transformer that can be patched{seen}; blocks must be of a"
            " kind that tokenops.supported() lists"
        )
    names = [f"{where}." for where, _, _ in found]
    if part is not None:
        found = [place for place, name in zip(found, names) if f"{name}".startswith(f"{part}." * bool(part))]
        if not found:
            raise ValueError(
                f"apply_patch: module={part!r} has no vision transformer, but {', '.join(n[:-1] for n in names)} are"
            )
    if len(found) > 1:
        owners = ", ".join(repr(owner) for _, owner, _ in found)
        raise ValueError(
            f"apply_patch: the model has several vision transformers, {', '.join(f[0] for f in found)}: name one,"
            f" apply_patch(model, ..., module={found[0][1]!r}), of {owners}"
        )
    return found[0]


def _owner(model: nn.Module, path: str) -> str | None:
    """The path of the innermost module at or around another that embeds patches, if its loop is a known one."""
    names = path.split(".") if path else []
    for length in range(len(names), -1, -1):
        here = ".".join(names[:length])
        found = is_trunk(model.get_submodule(here))
        if found is not False:
            return here if found else None
    return None


def is_patched(model: nn.Module) -> bool:
    """Whether a model is patched, or a part of it."""
    return any(isinstance(module, Patched) for module in model.modules())
