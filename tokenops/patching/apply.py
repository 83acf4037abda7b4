"""apply_patch and remove_patch: token reduction in a model people have, and out of it again."""

from typing import Any

from torch import nn

from .block import Host, Patch, PatchedBlock
from .families import FAMILIES, WIDEST_HEAD, Eva, Family, head_width, name_of
from .maps import FeatureMaps
from .reducing import EViT, EvoViT, Method, ToMe
from .slimming import CAIT, PatchSlimming, SiT, add_to

METHODS: dict[str, type[Method]] = {method.name: method for method in (ToMe, EViT, EvoViT, PatchSlimming, SiT, CAIT)}
#: the timm models whose loops run blocks one after another; transformers' are told by their blocks
_TIMM = ("timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva")


class Site(Host):
    """The place of a patch: a model, the vision transformer within, and its blocks.

    Raises:
        TypeError: the model has no blocks that can be patched, or some that cannot.
        ValueError: it has several vision transformers, or is patched already.
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(model, "tokenops_patch", None) is not None or any(
            isinstance(module, PatchedBlock) for module in model.modules()
        ):
            raise ValueError(f"apply_patch: the {type(model).__name__} is patched already: remove_patch comes first")
        self.model = model
        self.path, self.holder, self.name, self.owner = _find(model)
        self.blocks = list(getattr(self.holder, self.name))
        self.families: list[type[Family]] = []
        for i, block in enumerate(self.blocks):
            family = FAMILIES.get(name_of(block))
            try:
                if family is None:
                    raise TypeError(f"it is {name_of(block)}, but it must be {' or '.join(FAMILIES)}")
                family.check(block)
            except TypeError as error:
                raise TypeError(f"apply_patch: block {i} of {self.path}: {error}") from None
            self.families.append(family)
        self.timm = hasattr(self.owner, "patch_embed")
        self.rope = self.families[0] is Eva and getattr(self.owner, "rope", None) is not None
        self._measure()

    def _measure(self) -> None:
        owner: Any = self.owner
        self.grid = None
        if self.timm:
            self.prefix, self.dim = owner.num_prefix_tokens, owner.embed_dim
            self.has_class = owner.cls_token is not None
            if not getattr(owner, "dynamic_img_size", False) and owner.patch_embed.grid_size is not None:
                self.grid = tuple(owner.patch_embed.grid_size)
        else:
            embeddings = owner.embeddings
            self.has_class = hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")
            self.prefix, self.dim = int(self.has_class), owner.config.hidden_size
            size = getattr(embeddings, "patch_embeddings", embeddings)
            sides = [(s, s) if isinstance(s, int) else tuple(s) for s in (size.image_size, size.patch_size)]
            self.grid = sides[0][0] // sides[1][0], sides[0][1] // sides[1][1]
        self.patches = None if self.grid is None else self.grid[0] * self.grid[1]

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


def _find(model: nn.Module) -> tuple[str, Any, str, Any]:
    """The path of the blocks, the module and attribute that hold them, and the vision transformer around it."""
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
                found.append((where, holder, name, owner))
    if not found:
        seen = f": it has {', '.join(others)}" if others else ""
        raise TypeError(
            f"apply_patch: {name_of(model)} is no vision transformer that can be patched{seen}; blocks must be"
            f" {' or '.join(FAMILIES)}"
        )
    if len(found) > 1:
        raise ValueError(f"apply_patch: the model has several vision transformers, {', '.join(f[0] for f in found)}")
    return found[0]


def _owner(model: nn.Module, path: str) -> Any:
    """The innermost module at the path or around it that embeds patches, if its loop is a known one."""
    names = path.split(".") if path else []
    for length in range(len(names), -1, -1):
        module: Any = model.get_submodule(".".join(names[:length]))
        if hasattr(module, "patch_embed"):
            known = any(f"{kind.__module__}.{kind.__name__}" in _TIMM for kind in type(module).__mro__)
            return module if known and not type(module).__module__.startswith("tokenops.") else None
        embeddings = getattr(module, "embeddings", None)
        if hasattr(embeddings, "patch_embeddings") or hasattr(embeddings, "patch_embedding"):
            return module
    return None


def apply_patch(model: Any, method: str, *, trace_source: bool = False, **options: Any) -> Any:
    """Token reduction in a pretrained vision transformer, in place.

    Each block is replaced by one that stands in for it with its own parameters, under the same names: the model still
    saves, loads, copies, pickles, compiles and exports, and its class stays. Where nothing is reduced its outputs do
    not change.

    Methods and their options:

    - "tome": ToMe. ``r=0`` tokens merged in every block: a number, ``(r, inflect)`` (as many in all, from
      ``r * (1 - inflect)`` in the first block on a line to ``r * (1 + inflect)`` in the last) or a list, a number a
      block; never more than half of the patch tokens that are left. ``model.r`` may be set at any time.
      ``prop_attn=True`` counts a token by its size in attention. ``unmerge=None`` gives every patch a token again
      behind the last block where the model does not classify by its class token alone (average or attention pooling,
      features): the mean over patches is then the one by sizes. True or False decide it.
    - "evit": EViT. ``keep_rate=0.7``, a number or one a block; ``reduction_loc=None``, the blocks that drop tokens (a
      quarter, half and three quarters of the depth); ``fuse_token=True``. ``model.keep_rate`` may be set at any time.
    - "evo_vit": Evo-ViT, stage-wise. ``prune_ratio=0.5``, ``tradeoff=0.5``, ``stages=None`` (a third and two thirds of
      the depth), as in `tokenops.methods.EvoViT`. All tokens are there again behind every stage.
    - "patch_slimming": Patch Slimming. ``schedule``, a `tokenops.methods.patch_slimming.Schedule`, or its counts.
    - "sit": SiT. ``keeping_ratio=0.5``, ``locations=None``: a `tokenops.nn.TokenSlimming` before these blocks (as
      "evit"). It is to be trained, and in the state dict until `remove_patch`.
    - "cait": CAIT's merging. ``points=None``, block numbers to "horizontal" or "vertical" (behind a third and two
      thirds of the depth), ``kind="average"`` or what else `tokenops.nn.NeighbourMerging` knows.

    Without a class token "evit" and "evo_vit" choose by the mean attention that tokens receive, which is ours. Models
    with rotary positions take the methods that leave tokens where they are: "evit" with ``fuse_token=False``,
    "evo_vit", "patch_slimming".

    What a model returns beside its result (``forward_features``, ``last_hidden_state``) has the tokens that are left.
    "NCHW" maps of timm's ``forward_intermediates`` cover the grid behind "tome" and "cait", and are refused where
    patches were dropped or mixed. Masks, attention weights and hidden states of every layer are refused too.

    Args:
        model: timm's VisionTransformer (``vit_*``, ``deit*``, with LayerScale, register tokens, qk_norm or without a
            class token) or Eva, transformers' ViT, CLIP and SigLIP, or a model with one of them within.
        method: one of the above.
        trace_source: keep where the patches of the last forward went at ``model.tokenops_patch.trace``.
        **options: those of the method.

    Returns:
        The model. It runs one forward at a time. (With torch 2.11 transformers' ViT makes a mask where it is compiled,
        which is refused.)

    Raises:
        TypeError: the model, its blocks or their attention are of another kind; or an option is not known. The model is
            as before.
        ValueError: an option does not fit, the method is not defined for the model, or it is patched already.

    >>> import timm, torch
    >>> model = apply_patch(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3), "tome", r=4)
    >>> model.forward_features(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 5, 192])
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}, but it must be one of {', '.join(map(repr, METHODS))}")
    site = Site(model)
    how = METHODS[method](**options)
    widest = max(head_width(family, block) for family, block in zip(site.families, site.blocks))
    if how.scores and widest > WIDEST_HEAD:
        raise ValueError(f"{method}: the model has heads of {widest} channels, but {WIDEST_HEAD} are the most")
    if getattr(site.owner, "grad_checkpointing", False) or any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        raise ValueError(
            "apply_patch: the model checkpoints its blocks, but a block run twice changes the tokens twice"
        )
    taken = [name for name in (how.setting, "tokenops_patch") if name is not None and hasattr(model, name)]
    if taken:
        raise ValueError(f"apply_patch: the model has an attribute {taken[0]!r} of its own")
    added = how.fit(site)

    patch = Patch(site, how, trace_source)
    container = patch.blocks
    for i, (block, family) in enumerate(zip(site.blocks, site.families)):
        container[i] = PatchedBlock(block, family, patch, i)
    for i, (name, what) in added.items():
        add_to(container[i], name, what)
    patch.added = {i: name for i, (name, _) in added.items()}
    model.tokenops_patch = patch
    if how.setting is not None:
        setattr(model, how.setting, how.value)
    if hasattr(site.owner, "forward_intermediates"):
        site.owner.forward_intermediates = FeatureMaps(patch)
    return model


def remove_patch(model: Any) -> Any:
    """Undo `apply_patch`: the model's own blocks again, with the weights as they are now.

    Raises:
        ValueError: the model is not patched.
    """
    patch = getattr(model, "tokenops_patch", None)
    if patch is None:
        raise ValueError(f"remove_patch: this {type(model).__name__} is not patched")
    container = patch.blocks
    for i, block in enumerate(container):
        original = block._original[0]
        if i in patch.added:
            delattr(block, patch.added[i])
        original.training = block.training  # all else of its state is shared
        container[i] = original
    for name in (patch.method.setting, "tokenops_patch"):
        if name is not None:
            delattr(model, name)
    vars(patch.owner).pop("forward_intermediates", None)
    return model
