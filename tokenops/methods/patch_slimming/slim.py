"""PS-ViT's execution: tokens are put in the order of their lifespan once, so every layer keeps a prefix slice."""

import copy
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..lvvit import LVViT
from .blocks import check_model, embed_tokens, slim_block, with_class
from .schedule import Schedule


class SlimOutput(NamedTuple):
    """What :meth:`Slimmed.forward_layers` returns."""

    logits: Tensor
    layers: list[Tensor]
    places: list[Tensor]
    scores: Tensor | None


class Slimmed(nn.Module):
    """What both methods share: a ViT whose layer l computes ``counts[l]`` tokens, a prefix slice of what comes in."""

    blocks: Any
    norm: Any
    cls_token: Any
    patch_embed: Any
    grad_checkpointing: bool
    forward_head: Any
    counts: tuple[int, ...]
    #: N, the patches of an image
    patches: int
    #: how many blocks run before the tokens are put in the order of their lifespan
    sort_after: int

    def arrange(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens in the order of their lifespan, the patches' places ``(B, N)`` in it, and scores if there are any."""
        raise NotImplementedError

    def _run(self, images: Tensor, layers: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x = embed_tokens(self, images)
        if x.shape[1] != 1 + self.patches:
            raise ValueError(f"the images give {x.shape[1] - 1} patches, but the model is slimmed for {self.patches}")
        order, scores = x, None
        for i, (block, n) in enumerate(zip(self.blocks, self.counts)):
            if i == self.sort_after:
                x, order, scores = self.arrange(x)
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(slim_block, block, x, n, use_reentrant=False)
            else:
                x = slim_block(block, x, n)
            if layers is not None:
                layers.append(x)
        return self.norm(x), order, scores

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normalised tokens ``(B, counts[-1], C)`` of the last layer, class token first."""
        return self._run(x, None)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_layers(self, x: Tensor) -> SlimOutput:
        """Logits, and what distillation compares.

        Returns:
            logits; every block's tokens ``(B, counts[l], C)``, class token first; for each the patches' places in the
            grid ``(B, counts[l] - 1)``, so that a teacher's tokens can be taken there; and the scorer's scores
            ``(B, N)`` (None for the static method).
        """
        layers: list[Tensor] = []
        features, order, scores = self._run(x, layers)
        grid = torch.arange(order.shape[1], device=x.device).expand_as(order)
        places = [(order if i >= self.sort_after else grid)[:, : layer.shape[1] - 1] for i, layer in enumerate(layers)]
        return SlimOutput(self.forward_head(features), layers, places, scores)

    def forward_distill(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and every block's patch tokens ``(B, counts[l] - 1, C)``; `forward_layers` says where they belong."""
        output = self.forward_layers(x)
        return output.logits, [layer[:, 1:] for layer in output.layers]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Slimmed tokens form no grid: always a NotImplementedError."""
        raise NotImplementedError("slimmed tokens form no grid: use forward_layers, which says where each belongs")

    @torch.no_grad()
    def patch_order(self, x: Tensor) -> Tensor:
        """The patches of every image by lifespan, longest first, ``(B, N)`` positions."""
        tokens = embed_tokens(self, x)
        for block in self.blocks[: self.sort_after]:
            tokens = block(tokens)
        return self.arrange(tokens)[1]

    @torch.no_grad()
    def kept_maps(self, x: Tensor) -> list[Tensor]:
        """Which patches are kept: for every distinct number of tokens ``(B, grid height, grid width)``, bool."""
        order = self.patch_order(x)
        maps = []
        for n in dict.fromkeys(self.counts):
            kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, : n - 1], True)
            maps.append(kept.unflatten(1, tuple(self.patch_embed.grid_size)))
        return maps


class PatchSlimming(Slimmed):
    """A ViT that keeps the same patches for every image; made by :func:`apply`, or by its two classes.

    Its state dict is the dense model's, and ``lifespan (N,)``, the schedule. Dense weights load with strict=True and
    leave the schedule as it is; weights of a slim model bring theirs with them.
    """

    schedule: Schedule
    lifespan: Tensor
    order: Tensor
    rows: Tensor

    def set_schedule(self, schedule: Schedule) -> None:
        """Run by another schedule from now on.

        Raises:
            TypeError: it is no Schedule.
            ValueError: it is for another number of layers or another grid.
        """
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a patch_slimming.Schedule, but got {type(schedule).__name__}")
        grid = tuple(self.patch_embed.grid_size)
        if schedule.depth != len(self.blocks):
            raise ValueError(f"the schedule has {schedule.depth} layers, but the model has {len(self.blocks)} blocks")
        if schedule.grid != grid:
            raise ValueError(
                f"the schedule is for a grid of {schedule.grid[0]} x {schedule.grid[1]} patches, but the model has"
                f" {grid[0]} x {grid[1]}: search one for this image size"
            )
        self.schedule, self.counts, self.patches = schedule, schedule.counts, schedule.patches
        self.sort_after = 0
        device = self.cls_token.device
        self.register_buffer("lifespan", torch.tensor(schedule.lifespan, device=device))
        self.register_buffer("order", torch.tensor(schedule.order, device=device), persistent=False)
        self.register_buffer("rows", with_class(self.order), persistent=False)

    def arrange(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return x.index_select(1, self.rows), self.order.expand(x.shape[0], -1), None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "lifespan")
        schedule = self.schedule
        if saved is not None and not saved.is_meta:
            try:
                schedule = Schedule.from_lifespan(saved.tolist(), schedule.depth, schedule.grid)
            except ValueError as error:
                args[-1].append(f"{prefix}lifespan: {error}")
        self.set_schedule(schedule)
        if saved is None:
            state_dict[prefix + "lifespan"] = self.lifespan
        super()._load_from_state_dict(state_dict, prefix, *args)


class PSVisionTransformer(PatchSlimming, VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer (DeiT, ViT with a class token) with Patch Slimming: its arguments, and ``schedule``."""

    def __init__(self, *args: Any, schedule: Schedule, **kwargs: Any) -> None:
        VisionTransformer.__init__(self, *args, **kwargs)
        check_model(self)
        self.set_schedule(schedule)


class PSLVViT(PatchSlimming, LVViT):
    """:class:`LVViT` with Patch Slimming: its arguments, and ``schedule``."""

    def __init__(self, *args: Any, schedule: Schedule, **kwargs: Any) -> None:
        LVViT.__init__(self, *args, **kwargs)
        self.set_schedule(schedule)


def apply(model: nn.Module, schedule: Schedule) -> PatchSlimming:
    """Patch Slimming (PS-ViT) on a dense vision transformer: the model that computes only what the schedule keeps.

    Tokens are permuted once, behind the patch embedding, by how long they live. Layer l is then the prefix slice
    ``x[:, :counts[l]]``: queries, residual and MLP of the rows it keeps, keys and values of those the one before kept.

    Args:
        model: a timm VisionTransformer (``deit_*``, ``vit_*`` with a class token; LayerScale and qk_norm are fine), an
            :class:`LVViT`, or a slimmed one, whose schedule is replaced. It is not changed, but the result shares its
            submodules and parameters: deepcopy it first where they are to be trained apart.
        schedule: the masks, from :func:`search`, :meth:`Schedule.load` or :meth:`Schedule.from_counts`.

    Returns:
        A :class:`PatchSlimming` with the model's parameter names.

    Raises:
        TypeError: the model is another, or a block or attention of it is.
        ValueError: it has register or distillation tokens, pools patches, takes images of any size or drops patches; or
            the schedule does not fit.

    Source: Tang et al., Patch Slimming for Efficient Vision Transformers (CVPR 2022, arXiv 2106.02852), section 3. The
    permutation is ours. The name PS-ViT is also Progressive Sampling's, another method.

    >>> import timm
    >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3)
    >>> slim = apply(dense, Schedule.from_counts([17, 9, 1], grid=(4, 4)))
    >>> slim(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """
    new = remade("patch_slimming.apply", model, {VisionTransformer: PSVisionTransformer, LVViT: PSLVViT})
    new.set_schedule(schedule)
    return new


def remade(op: str, model: nn.Module, kinds: dict[type, Any]) -> Any:
    """A model of the class that stands for the given one's, sharing its parameters and submodules."""
    kind = next((base for base in kinds if type(model) is base), None)
    if kind is None and isinstance(model, Slimmed):
        kind = next((base for base in kinds if isinstance(model, base)), None)
    if kind is None:
        raise TypeError(f"{op}: model must be timm's VisionTransformer or LVViT, but got {type(model).__name__}")
    check_model(model)
    new = kinds[kind].__new__(kinds[kind])
    new.__dict__.update(
        (key, copy.copy(value) if isinstance(value, (dict, set)) else value) for key, value in vars(model).items()
    )
    for name in ("lifespan", "order", "rows"):
        new._buffers.pop(name, None)
    new._modules.pop("scorer", None)
    return new
