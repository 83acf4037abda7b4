"""The place of a patch: the vision transformer within a model, its blocks, its grid, and what is made of its tokens."""

from typing import Any

from torch import nn

from .engine import Patched
from .families import FAMILIES, PATCH_ANEW
from .modules import name_of, unwrapped
from .trunks import is_trunk, trunk_of

#: transformers' models that take nothing but the class token of the vision transformer in them
_CLASS = ("ViTForImageClassification", "CLIPVisionModelWithProjection", "CLIPModel", "VisionTextDualEncoderModel")
#: those with a language model that takes as many patch tokens as the prompt has places for, in no grid
_COUNTING = ("LlavaModel", "VipLlavaModel", "PaliGemmaModel", "DeepseekVLModel")


class Site:
    """A vision transformer within a model, patched or not.

    Args:
        model: what `apply_patch` was given.

    Attributes:
        owner: the vision transformer, which has the patch embedding; ``path`` says where it is in the model.
        container: the module that holds its blocks, ``within`` the owner.
        blocks: these, without what wraps them; ``depth`` are as many, or as many as when the model was patched.
        prefix: how many tokens before the patches' are never touched.
        has_class: whether the first of them is a class token.
        dim: C.
        placed: whether its attention is told where tokens are: rotary positions, or biases of relative ones.
        grid: rows and columns of patches, None where images may have others; ``patches`` are as many.
        img_size: height and width of the images, None where the model does not say.
        embedding: the module that makes the patch tokens.
        taken: the blocks behind which the model takes its tokens, mostly the last; -1 is before the first.

    Raises:
        TypeError: the model has no blocks that can be patched, or some that cannot.
        ValueError: it has several vision transformers, or a block in two places.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        where, self.path, self.within = _find(model)
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
            try:
                if family is None:
                    raise TypeError(f"it is {name_of(block)}, which is not of a kind that can be patched")
                family.check(block)
            except TypeError as error:
                raise TypeError(f"apply_patch: block {i} of {where}: {error}") from None
            self.families.append(family)
        owner = self.owner
        self.timm = hasattr(owner, "patch_embed")
        self.embedding, self.prefix, self.has_class, self.dim, self.img_size, self.grid = trunk_of(owner)
        self.placed = getattr(owner, "rope", None) is not None or any(family.placed for family in self.families)
        self.patches = None if self.grid is None else self.grid[0] * self.grid[1]
        #: the modules around the vision transformer, and the innermost of them with a prompt that has places for images
        self._around = _around(model, self.path)
        self._speaker: Any = next((m for m in reversed(self._around) if _has_places(m)), None)
        self.taken = (self.depth - 1,) if self._speaker is None else _layers(self._speaker.config, self.depth)

    def refuse_others(self) -> None:
        """ValueError where a patched model has blocks that are not."""
        others = [i for i, block in enumerate(self.blocks) if not hasattr(block, "tokenops_role")]
        if others:
            raise ValueError(f"blocks {others} were added or replaced since the patch: {PATCH_ANEW}")

    def pools_class(self) -> bool:
        """Whether the model, as it is now, classifies by tokens of the prefix alone."""
        owner = self.owner
        if not self.has_class or self._speaker is not None:
            return False
        if hasattr(owner, "global_pool"):
            return owner.global_pool == "token" and getattr(owner, "attn_pool", None) is None
        return not self._around or type(self._around[-1]).__name__ in _CLASS

    @property
    def maps(self) -> str | None:
        """The class that expects every patch token in its place, where the model has one."""
        if self._speaker is not None:
            kind = type(self._speaker).__name__
            return None if kind in _COUNTING and len(self.taken) == 1 else kind
        kinds = (type(module).__name__ for module in self._around)
        return next((kind for kind in kinds if "MaskedImageModeling" in kind), None)

    def needs_grid(self, method: str) -> tuple[int, tuple[int, int]]:
        """The number of patches and the grid; ValueError where images may have others."""
        if self.grid is None or self.patches is None:
            raise ValueError(f"{method} needs a fixed grid, but the model has dynamic_img_size=True")
        if getattr(getattr(self.owner, "patch_drop", None), "prob", 0.0):
            raise ValueError(f"{method} needs every patch, but the model has a patch_drop_rate")
        return self.patches, self.grid

    def needs_no_map(self, method: str) -> None:
        """ValueError where the model expects every patch token in its place."""
        if self.maps is not None:
            raise ValueError(
                f"{method}: {self.maps} expects every patch token in its place, which 'tome' and 'evo_vit' alone give:"
                " use one of these"
            )

    def refuse_placed(self, method: str, why: str) -> None:
        """ValueError where attention is told where tokens are."""
        if self.placed:
            raise ValueError(f"{method}: the model has rotary or relative positions, but {why}")


def _around(model: Any, path: str) -> list[Any]:
    """The modules on the way from the model, included, to one within it, not included."""
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:length])) for length in range(len(names))]


def _has_places(module: Any) -> bool:
    """Whether it is a model of transformers that puts image tokens into places of a prompt."""
    config = getattr(module, "config", None)
    return hasattr(config, "image_token_id") or hasattr(config, "image_token_index")


def _layers(config: Any, depth: int) -> tuple[int, ...]:
    """The blocks whose hidden states become image tokens; -1 for what comes into the first."""
    layers = getattr(config, "vision_feature_layer", -1)
    layers = [layers] if isinstance(layers, int) else layers
    return tuple(sorted({(i + depth if i < 0 else i - 1) for i in layers}))


def _find(model: nn.Module) -> tuple[str, str, str]:
    """Where the blocks are, where the vision transformer around them is, and where in it they are."""
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
        seen = f": it has {', '.join(others)}" if others else ""
        raise TypeError(
            f"apply_patch: {name_of(model)} is no vision transformer that can be patched{seen}; blocks must be of a"
            " kind that tokenops.supported() lists"
        )
    if len(found) > 1:
        raise ValueError(
            f"apply_patch: the model has several vision transformers, {', '.join(f[0] for f in found)}: patch each by"
            f" itself, apply_patch(model{'.' * bool(found[0][1])}{found[0][1]}, ...)"
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
