"""apply_patch and remove_patch: token reduction in a model people have, and out of it again."""

import copy
import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from ..ops.masked_channel_attention import WIDEST_HEAD
from .around import PatchedCollector, PatchedGrid, PatchedModel, PatchedTail
from .dressing import Patched, dress, place_of, refuse_wrapped, undress
from .engine import METHODS, Method, PatchedAttention, PatchedBlock
from .families import Family, head_width
from .modules import is_sharded, unwrapped
from .packed import PatchedSpeaker, PatchedTower, dress_parts, refuse_packed
from .site import Site, Where, is_patched
from .trunks import packs, tail_of
from .views import PatchedTransformer, PatchedUnmapped


class Patch:
    """How a model is patched: ``tokenops_patch`` of the model, and of the vision transformer in it. It holds no module.

    Attributes:
        method: what is done, with its options.
        depth: how many blocks the model had.
        added: the names of what blocks were given, by number.
        where: which part of the model was named, and how many tokens were said to come before the patches' (`Where`).
    """

    def __init__(self, method: Method, depth: int, where: Where) -> None:
        self.method, self.depth, self.where = method, depth, where
        self.added: dict[int, str] = {}

    def set(self, model: Any, value: Any) -> None:
        """Another value of the method's setting, for a model or the vision transformer in it."""
        method = copy.copy(self.method)
        method.value = value
        self.fit(model, method)

    def fit(self, model: Any, method: Method | None = None) -> None:
        """Give every block its role, as the model is now, which may have lost its last blocks."""
        site = Site(model)
        site.refuse_others()
        self.give(site, method or self.method)

    def give(self, site: Any, method: Method) -> None:
        """Give every block of a site its role."""
        last, alone, site.depth = len(site.blocks) - 1, site.pools_class(), self.depth
        roles = [
            replace(role, last=i == last, taken=i == last or i in site.taken, alone=alone)
            for i, role in enumerate(method.roles(site)[: last + 1])
        ]
        for block, family, role in zip(site.blocks, site.families, roles, strict=True):
            if not isinstance(block, PatchedBlock) or "tokenops_made" in vars(type(block)):  # else it was wrapped since
                dress(block, (PatchedBlock,), family, None, role)
            block.tokenops_take(role)
        self.method = method


def apply_patch(
    model: Any, method: str | Method, *, module: str | None = None, prefix: int | None = None, **options: Any
) -> Any:
    """Token reduction in a pretrained vision transformer, in place.

    Each block becomes one of a class derived from its own: the model still saves, loads, copies, pickles, compiles,
    exports, checkpoints its blocks, and runs in threads. Where nothing is reduced its outputs do not change, but for
    rounding: in bfloat16 on a CPU with AMX its attention is ours, which is the faster. Exported under
    ``use_backend("reference")`` it has standard operators alone, and goes to ONNX (``dynamo=True``).

    Methods and their options:

    - "tome": ToMe. ``r``, tokens merged in every block: a number, ``(r, inflect)`` (as many in all, from
      ``r * (1 - inflect)`` in the first block on a line to ``r * (1 + inflect)`` in the last) or a list, a number a
      block; never more than half of the patch tokens that are left. ``model.r`` may be set.
      ``prop_attn=True`` counts a token by its size in attention. ``positions="mean"`` of rotary or relative ones is
      that of the rows of a token's patches, "destination" the row that others went to. ``unmerge=None`` gives every
      patch a token again where the model takes its tokens (behind the last block, or that of LLaVA's
      ``vision_feature_layer``), but where it is known to take the class token alone: the mean over patches is then the
      one by sizes. True or False decide it.
    - "evit": EViT. ``keep_rate=0.7``, a number or one a block; ``reduction_loc=None``, the blocks that drop tokens (a
      quarter, half and three quarters of the depth); ``fuse_token=True``. ``model.keep_rate`` may be set.
    - "evo_vit": Evo-ViT. ``prune_ratio=0.5``, ``tradeoff=0.5``, ``stages=None`` (a third and two thirds of the depth).
      All tokens are there again behind every stage. ``model.stage_wise=True`` may be set: False makes a
      stage of every block, as in the beginning of its training.
    - "patch_slimming": Patch Slimming. ``schedule``, a `tokenops.methods.patch_slimming.Schedule`, or its counts.
    - "dps": dynamic Patch Slimming, a reconstruction: ``counts``, tokens behind each block, and ``after=2``, so many
      blocks run before a scorer, which is to be trained, puts each image's tokens in an order of its own.
    - "sit": SiT. ``keeping_ratio=0.5``, ``locations=None``: a `tokenops.nn.TokenSlimming` before these blocks (as
      "evit"). It is to be trained, and in the state dict until `remove_patch`.
    - "cait": CAIT's merging. ``points=None``, block numbers to "horizontal" or "vertical" (behind a third and two
      thirds of the depth), ``kind="average"`` or what else `tokenops.nn.NeighbourMerging` knows, for all or one a
      point; ``layout="raster"`` or "block", the order of the patches.
    - "random": as "evit", but the tokens that stay are drawn at random, and the others are gone; or, with ``r``, as
      "tome", but those that are merged are drawn, and ``model.r`` may be set: what a choice is to be better than.

    What may be set is set between forwards: one that runs meanwhile may have it in some blocks alone, or raise.

    Without a class token "evit" and "evo_vit" choose by the mean attention that tokens receive, which is ours. In
    models with rotary or relative positions a merged, fused or mixed token has the mean of those of its patches.

    What a model returns beside its result (``forward_features``, ``last_hidden_state``) has the tokens that are left.
    So have transformers' ``hidden_states``: ``[0]`` are those that come into the first block, ``[i]`` those behind
    block i - 1, where "evit" has a fused token last and "evo_vit" those that pass through its stage; ``[-2]`` is behind
    the last block but one. A head that averages patches counts each token that is left once, "evit"'s fused one too;
    "tome" has all again there, and "cait" where it merged an odd side. Models that make maps of the tokens behind one
    block or several (backbones, ``features_only``, depth, segmentation, boxes, masked images) are given one for every
    patch by "tome", "evo_vit" and "cait", and the blocks behind run on those that are left all the same; methods that
    drop or mix patches are refused. The same goes for "NCHW" maps of timm's ``forward_intermediates``. Attention
    weights and masks are refused, but for padding in SigLIP 2, NaFlexVit and Idefics: nobody attends to it, and it is
    merged with none. Where attention weights are dropped in training, or have biases of relative positions, the whole
    matrix is written.

    Language models that see: "tome" and "evo_vit", and "cait" where a grid is made of the tokens, give every patch a
    token where the language model takes them, so prompts stay as they are. LLaVA, PaliGemma and DeepSeek-VL also take
    the other methods, and ``unmerge=False``, with a prompt of as many image tokens as are left: one number for all
    images, which `tokens_left` says and `tokenops.vlm.fit_processor` gives the processor; with another one transformers
    raises a ValueError. BLIP-2, whose queries attend to any number, takes all methods. Models that make a grid of the
    tokens (LLaVA-NeXT, Gemma 3, Idefics3, InternVL) or take several layers are refused with methods that drop some.

    Towers that pack their images in one sequence (Qwen's, from Qwen2-VL to Qwen3.5) take "evit" with
    ``fuse_token=False``, and "random": whole units of 2 x 2 patches stay, of every image its share, in blocks that see
    whole images. The result's ``kept`` are their numbers among all, `image_tokens_left` says how many there are before
    the tower runs, and `tokenops.vlm.compress` makes prompts with as many places, where the whole model was patched.

    Blocks are checkpointed with ``use_reentrant=False``, in transformers' ``gradient_checkpointing_enable`` too. With
    True a forward is refused where blocks hand on more than tokens: "tome", "evo_vit", and with rotary positions all.

    Args:
        model: a vision transformer of timm, transformers, torchvision or open_clip, or a model with one within;
            `tokenops.supported` lists which take which methods, or why not. Where images may be of any size, methods
            for one grid are fitted to that of ``img_size``.
        method: one of the above, or a `tokenops.patching.Method` of your own.
        module: which vision transformer, by the name of a part of the model that has no other, where it has several:
            ``"vision_model"``, say. What the model makes of its tokens is looked at as without, which it is not where
            the part itself is patched, ``apply_patch(model.vision_model, ...)``.
        prefix: how many tokens come before the patches' and are never touched, where a class derived from the model's
            adds some (prompts); the first is the class token if the model has one.
        **options: those of the method.

    Returns:
        The model.

    Raises:
        TypeError: the model, its blocks or their attention are of another kind; or an option is not known. The model is
            as before.
        ValueError: an option does not fit, the method is not defined for the model, or it is patched already.

    >>> import timm, tokenops, torch
    >>> model = tokenops.apply_patch(timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3), "tome", r=4)
    >>> model.forward_features(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 5, 192])
    """
    how = _made(method, options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_patch: model must be a torch.nn.Module, but got {model!r}")
    if is_patched(model):
        raise ValueError(f"apply_patch: the {type(model).__name__} is patched already: remove_patch comes first")
    where = Where(module, prefix)
    site = Site(model, where)
    if site.packs:
        refuse_packed(site, how)
    widest = max(head_width(block) for block in site.blocks)
    if how.scores and widest > WIDEST_HEAD:
        raise ValueError(f"{how.name}: the model has heads of {widest} channels, but {WIDEST_HEAD} are the most")
    taken = [name for name in (how.setting, "tokenops_patch") if name is not None and hasattr(model, name)]
    if taken:
        raise ValueError(f"apply_patch: the model has an attribute {taken[0]!r} of its own")
    how.roles(site)
    parts, patch = how.parts(site), Patch(how, site.depth, where)
    if any(list(part.parameters()) for _, part in parts.values()) and (wrapper := distributed(model)):
        raise ValueError(f"{how.name} adds parameters, which {wrapper} would not know of: apply_patch comes before it")
    for i, (name, part) in parts.items():
        _add_to(site.blocks[i], name, part)
        patch.added[i] = name
    patch.give(site, how)
    for block, family in zip(site.blocks, site.families):
        for attention in family.attentions_of(block):
            dress(unwrapped(attention), (PatchedAttention,), family)
    if how.shape:
        site.embedding.tokenops_grid = site.needs_grid(how.name)[1]
        dress(site.embedding, (PatchedGrid,))
    mixins: tuple[type, ...] = (PatchedTransformer,) if site.timm else ()
    if not site.timm and hasattr(site.owner, "forward_intermediates"):
        mixins = (PatchedUnmapped,)
    if hasattr(site.owner, "embeddings"):  # transformers'
        named = list(inspect.signature(type(site.owner).forward).parameters)[1:]
        site.owner.tokenops_mask = named.index("attention_mask") if "attention_mask" in named else None
        shared = getattr(site.owner.config, "use_shared_relative_position_bias", False)
        site.owner.tokenops_biased = "attention_mask" in site.families[0].tables, shared
        mixins = (PatchedModel,)
    if site.packs:
        dress_parts(site)
        mixins = (PatchedTower,)
    if tail := tail_of(site.owner):
        site.owner.encoder.tokenops_tail = tail
        dress(site.owner.encoder, (PatchedTail,))
    if site.families[0].handed is not Family.handed:
        dress(site.owner.encoder, (PatchedCollector,))
    if site.owner is not model:
        site.owner.tokenops_patch, site.owner.tokenops_within = patch, type(model).__name__
        dress(site.owner, mixins, None, how.setting)
        mixins = (PatchedSpeaker,) if site.packs and site.speaker is model else ()
    vars(model)["tokenops_patch"] = patch  # a compiled module would pass the assignment on
    dress(model, mixins, None, how.setting)
    return model


def remove_patch(model: Any) -> Any:
    """Undo `apply_patch`: the model's own classes again, with the weights as they are now.

    Raises:
        ValueError: the model is not patched, or was wrapped since.
    """
    patch = getattr(model, "tokenops_patch", None)
    if patch is None:
        raise ValueError(f"remove_patch: this {type(model).__name__} is not patched")
    if packs(model) and "tokenops_within" in vars(model):  # which takes the images of the tower apart
        raise ValueError(f"remove_patch: the whole {model.tokenops_within} is patched: remove_patch that")
    dressed: list[Any] = [module for module in model.modules() if isinstance(module, Patched)][::-1]  # from the inside
    for module in dressed:
        refuse_wrapped(module)
    for module in dressed:
        undress(module)
        if "tokenops_role" in vars(module):
            module._buffers.pop("tokenops_constant", None)
            getattr(getattr(module, "_hf_hook", None), "original_devices", {}).pop("tokenops_constant", None)
            for name in patch.added.values():
                module._modules.pop(name, None)
        for name in (
            "tokenops_role",
            "tokenops_grid",
            "tokenops_mask",
            "tokenops_tail",
            "tokenops_patch",
            "tokenops_within",
        ):
            vars(module).pop(name, None)
    return model


def _made(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if options:
            raise TypeError(f"apply_patch: {', '.join(options)} given beside a method that has its options")
        return method
    if method not in METHODS:
        known = f"it must be one of {', '.join(map(repr, METHODS))}" if METHODS else "tokenops.methods is not imported"
        raise ValueError(f"method={method!r}, but {known}")
    return METHODS[method](**options)


def distributed(model: nn.Module) -> str | None:
    """The name of what has taken a model's parameters to share them among processes."""
    kinds = [type(module) for module in model.modules()]
    named = ("FullyShardedDataParallel", "DistributedDataParallel")
    found = ("fully_shard" if is_sharded(k) else k.__name__ for k in kinds if is_sharded(k) or k.__name__ in named)
    return next(found, None)


def _add_to(block: nn.Module, name: str, part: nn.Module) -> None:
    """In the state dict from now on, on the block's device, in its dtype and mode."""
    like = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
    block.add_module(name, part.to(place_of(block), like.dtype).train(block.training))
