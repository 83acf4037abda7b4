"""The place of a patch: the vision transformer within a model, its blocks, its grid, and what is made of its tokens."""

from typing import Any

from torch import nn

from .engine import Patched, grid_of, plain_of
from .families import FAMILIES, Eva, name_of

#: the timm models whose loops run blocks one after another; transformers' are told by their blocks
_TIMM = ("timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva")
#: transformers' models that classify by the mean of the patch tokens, though there is a class token
_MEAN = ("CLIPForImageClassification",)
#: transformers' models whose language model takes a fixed number of tokens from a hidden layer, or from a map of them
_TAKING = {
    "LlavaModel": "vision_feature_layer",
    "LlavaNextModel": "vision_feature_layer",
    "VipLlavaModel": "vision_feature_layers",
    "VideoLlavaModel": "vision_feature_layer",
    "PaliGemmaModel": "",
    "Gemma3Model": "",
}


class Site:
    """A vision transformer within a model, patched or not.

    Args:
        model: what `apply_patch` was given.

    Attributes:
        owner: the vision transformer, which has the patch embedding; ``path`` says where it is in the model.
        container: the module that holds its blocks, ``within`` the owner.
        blocks: these; ``depth`` are as many, or as many as when the model was patched.
        prefix: how many tokens before the patches' are never touched.
        has_class: whether the first of them is a class token.
        dim: C.
        rope: whether it has rotary positions.
        grid: rows and columns of patches, None where images may have others; ``patches`` are as many.
        embedding: the module that makes the patch tokens.

    Raises:
        TypeError: the model has no blocks that can be patched, or some that cannot.
        ValueError: it has several vision transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        where, self.path, self.within = _find(model)
        self.owner: Any = model.get_submodule(self.path)
        self.container: Any = self.owner.get_submodule(self.within)
        self.blocks = list(self.container)
        self.depth = len(self.blocks)
        self.families = []
        for i, block in enumerate(self.blocks):
            family = FAMILIES.get(name_of(block))
            try:
                if family is None:
                    raise TypeError(f"it is {name_of(block)}, but it must be {' or '.join(FAMILIES)}")
                family.check(block)
            except TypeError as error:
                raise TypeError(f"apply_patch: block {i} of {where}: {error}") from None
            self.families.append(family)
        owner = self.owner
        self.timm = hasattr(owner, "patch_embed")
        self.embedding: Any = owner.patch_embed if self.timm else owner.embeddings
        self.rope = self.families[0] is Eva and getattr(owner, "rope", None) is not None
        self.grid: tuple[int, int] | None = None
        if self.timm:
            self.prefix, self.dim = owner.num_prefix_tokens, owner.embed_dim
            self.has_class = owner.cls_token is not None
            if not getattr(owner, "dynamic_img_size", False) and owner.patch_embed.grid_size is not None:
                self.grid = tuple(owner.patch_embed.grid_size)
        else:
            embeddings = self.embedding
            self.has_class = hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")
            self.prefix, self.dim = int(self.has_class), owner.config.hidden_size
            size = getattr(embeddings, "patch_embeddings", embeddings).image_size
            self.grid = grid_of(embeddings, *((size, size) if isinstance(size, int) else size))
        self.patches = None if self.grid is None else self.grid[0] * self.grid[1]

    def pools_class(self) -> bool:
        """Whether the model, as it is now, classifies by tokens of the prefix alone."""
        owner = self.owner
        if hasattr(owner, "global_pool"):
            return self.has_class and owner.global_pool == "token" and getattr(owner, "attn_pool", None) is None
        kinds = {type(module).__name__ for module in _around(self.model, self.path)}
        return self.has_class and not self.maps_patches() and not kinds & {*_MEAN, *_TAKING}

    def maps_patches(self) -> bool:
        """Whether the model makes an image of its patch tokens, or words of them all."""
        kinds = [type(module).__name__ for module in _around(self.model, self.path)]
        return any("MaskedImageModeling" in kind or kind in _TAKING for kind in kinds)

    def needs_grid(self, method: str) -> tuple[int, tuple[int, int]]:
        """The number of patches and the grid; ValueError where images may have others."""
        if self.grid is None or self.patches is None:
            raise ValueError(f"{method} needs a fixed grid, but the model has dynamic_img_size=True")
        if getattr(getattr(self.owner, "patch_drop", None), "prob", 0.0):
            raise ValueError(f"{method} needs every patch, but the model has a patch_drop_rate")
        return self.patches, self.grid

    def needs_no_map(self, method: str) -> None:
        """ValueError where the model makes an image of all its patch tokens."""
        if self.maps_patches():
            raise ValueError(
                f"{method}: the model makes an image of all its patch tokens, which only 'tome' and 'evo_vit' keep"
            )

    def refuse_rope(self, method: str, why: str) -> None:
        """ValueError where tokens have rotary positions."""
        if self.rope:
            raise ValueError(f"{method}: the model has rotary positions, but {why}")


def _around(model: Any, path: str) -> list[Any]:
    """The modules on the way from the model to one within it, both included."""
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:length])) for length in range(len(names) + 1)]


def _find(model: nn.Module) -> tuple[str, str, str]:
    """Where the blocks are, where the vision transformer around them is, and where in it they are."""
    found, others = [], []
    for path, holder in model.named_modules():
        for name, container in holder.named_children():
            if not isinstance(container, (nn.Sequential, nn.ModuleList)) or not len(container):
                continue
            where = f"{path}.{name}".strip(".")
            if not any(name_of(block) in FAMILIES for block in container):
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
            f"apply_patch: {name_of(model)} is no vision transformer that can be patched{seen}; blocks must be"
            f" {' or '.join(FAMILIES)}"
        )
    if len(found) > 1:
        raise ValueError(f"apply_patch: the model has several vision transformers, {', '.join(f[0] for f in found)}")
    return found[0]


def _owner(model: nn.Module, path: str) -> str | None:
    """The path of the innermost module at or around another that embeds patches, if its loop is a known one."""
    names = path.split(".") if path else []
    for length in range(len(names), -1, -1):
        here = ".".join(names[:length])
        module: Any = model.get_submodule(here)
        if hasattr(module, "patch_embed"):
            plain = plain_of(module)
            known = any(f"{kind.__module__}.{kind.__name__}" in _TIMM for kind in plain.__mro__)
            return here if known and not plain.__module__.startswith("tokenops.") else None
        embeddings = getattr(module, "embeddings", None)
        if hasattr(embeddings, "patch_embeddings") or hasattr(embeddings, "patch_embedding"):
            return here
    return None


def is_patched(model: nn.Module) -> bool:
    """Whether a model is patched, or a part of it."""
    return any(isinstance(module, Patched) for module in model.modules())
