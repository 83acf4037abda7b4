"""Blocks that can be pruned and that merge tokens behind them, and models made of them, in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm import layers as timm_layers
from timm.models import vision_transformer
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...merge_neighbours import unmerge_neighbours
from ...nn import Attention, NeighbourMerging, grid_order
from ...patching.site import is_patched


class Mlp(nn.Module):
    """timm's MLP, of whose hidden channels some can be masked; parameter names are timm's.

    Attributes:
        mask: ``(F,)``, None at first: soft mask of the hidden channels, behind activation and norm. A tensor set here
            is a buffer, an ``nn.Parameter`` learns; either is in the state dict from then on, so set one before loading
            it.
    """

    mask: Tensor | None
    fc1: Any
    act: Any
    drop1: Any
    norm: Any
    fc2: Any
    drop2: Any

    @classmethod
    def from_timm(cls, mlp: Any) -> "Mlp":
        """The same MLP as a timm module (or one of this class), whose submodules it shares.

        Raises:
            TypeError: it is not timm's ``Mlp`` of linear layers.
        """
        if not isinstance(mlp, Mlp) and not (type(mlp) is timm_layers.Mlp and isinstance(mlp.fc1, nn.Linear)):
            raise TypeError(f"Mlp.from_timm takes timm.layers.Mlp of linear layers, but got {type(mlp).__name__}")
        new = cls()
        for name in ("fc1", "act", "drop1", "norm", "fc2", "drop2"):
            setattr(new, name, getattr(mlp, name))
        new.register_buffer("mask", getattr(mlp, "mask", None))
        new.training = mlp.training
        return new

    def hidden(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to their hidden channels ``(B, N, F)``, not masked yet."""
        return self.norm(self.drop1(self.act(self.fc1(x))))

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden channels ``(B, N, F)`` to the result ``(B, N, C)``."""
        if self.mask is not None:
            hidden = hidden * self.mask.to(hidden.dtype)
        return self.drop2(self.fc2(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.hidden(x))


class Block(nn.Module):
    r"""A pre-norm block, timm's or LV-ViT's, behind which neighbouring tokens may be merged.

    .. math:: x \leftarrow x + \alpha\,\mathrm{Attention}(x), \qquad x \leftarrow x + \alpha\,\mathrm{MLP}(x), \qquad
        y = \mathrm{merge}(x)

    Where the merge's weights are scalars it commutes with the second linear layer: the hidden channels are merged
    instead of its result, :math:`\mathrm{merge}(x) + \alpha\,\mathrm{fc2}(\mathrm{merge}(h))`, and fc2 sees half as
    many tokens. The result is the same; only dropout behind fc2, while training, asks for the plain form.

    Args:
        block: what it stands for; its submodules are shared, under the same names. The attention becomes
            `tokenops.nn.Attention`, an MLP of timm's an `Mlp`; another MLP stays what it is.

    Attributes:
        merge: None, or what merges the tokens behind the block.
        order: None, or ``(N,)`` int64: patches are first put into this order (the block layout of `grid_order`).

    Raises:
        TypeError: the block or its attention is another one.
    """

    merge: NeighbourMerging | None
    order: Tensor | None

    def __init__(self, block: Any) -> None:
        super().__init__()
        if type(block) not in (vision_transformer.Block, Block):
            raise TypeError(f"Block stands for timm's Block, but got {type(block).__name__}")
        self.alpha: float = getattr(block, "alpha", 1.0)
        self.norm1 = block.norm1
        self.attn = Attention.from_timm(block.attn)
        self.ls1 = block.ls1
        self.drop_path1 = block.drop_path1
        self.norm2 = block.norm2
        self.mlp: Any = block.mlp
        if type(block.mlp) in (timm_layers.Mlp, Mlp):
            self.mlp = Mlp.from_timm(block.mlp)
        self.ls2 = block.ls2
        self.drop_path2 = block.drop_path2
        self.merge = getattr(block, "merge", None)
        self.register_buffer("order", getattr(block, "order", None), persistent=False)
        self.training = block.training

    @property
    def commutes(self) -> bool:
        """Whether tokens are merged before fc2 already."""
        return self.merge is not None and self.merge.commutes and isinstance(self.mlp, Mlp)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens ``(B, P+N, C)`` to as many, or to ``(B, P+M, C)`` where they are merged.

        Args:
            x: tokens.
            attn_mask, is_causal: as `tokenops.nn.Attention` takes them, where tokens are neither merged nor reordered.

        Raises:
            ValueError: a mask is given to a block that merges or reorders; or the tokens are not the grid it is for.
        """
        if (self.merge is not None or self.order is not None) and (attn_mask is not None or is_causal):
            raise ValueError("attn_mask and is_causal must be None and False where tokens are merged or reordered")
        if self.order is not None:
            x = self._reorder(x, self.order)
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = torch.add(x, self.drop_path1(self.ls1(y)), alpha=self.alpha)
        if self.commutes and not (self.training and self.mlp.drop2.p):
            return self._feed_merged(x)
        x = torch.add(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), alpha=self.alpha)
        return x if self.merge is None else self.merge(x)

    def _feed_merged(self, x: Tensor) -> Tensor:
        """x plus the MLP, merged before fc2."""
        assert self.merge is not None
        y = self.mlp.project(self.merge(self.mlp.hidden(self.norm2(x))))
        bias = self.mlp.fc2.bias
        if bias is not None and self.merge.kind == "scalar":  # behind the merge, bias counts by the sum of the weights
            y = y + (self.merge(torch.ones_like(x[:1, :, :1])) - 1) * bias
        return torch.add(self.merge(x), self.drop_path2(self.ls2(y)), alpha=self.alpha)

    @staticmethod
    def _reorder(x: Tensor, order: Tensor) -> Tensor:
        prefix = x.shape[1] - len(order)
        return torch.cat((x[:, :prefix], x[:, prefix:][:, order]), dim=1)


def convert_blocks(model: Any) -> Any:
    """Make every block of a timm VisionTransformer or an LVViT a `Block`, in place; names, weights and outputs stay.

    Returns:
        The model.

    Raises:
        TypeError: the model is another one, runs its blocks in a way of its own, or has blocks or attention of another
            kind (parallel blocks, post-norm, rotary positions, say). It is unchanged then.
    """
    _check_model("convert_blocks", model)
    blocks = []
    for i, block in enumerate(model.blocks):
        try:
            blocks.append(block if type(block) is Block else Block(block))
        except TypeError as error:
            raise TypeError(f"convert_blocks: block {i}: {error}") from None
    for i, block in enumerate(blocks):
        model.blocks[i] = block
    return model


def merge_tokens(
    model: Any, points: Mapping[int, str] | None = None, kind: str | Sequence[str] = "average", layout: str = "raster"
) -> Any:
    """Merge neighbouring patch tokens behind a few blocks of a timm VisionTransformer or an LVViT, in place.

    Class, distillation and register tokens bypass the merges. The blocks become `Block` (see `convert_blocks`); a
    pretrained model starts as the same one with average pooling of its tokens, whatever the kind.

    Args:
        model: with a fixed grid of patches.
        points: block numbers, from 0, to the axis merged behind each: "horizontal" or "vertical". None merges
            horizontally after a third of the depth and vertically after two thirds: of 12 blocks, behind 3 and 7.
        kind: what `tokenops.nn.NeighbourMerging` takes, for all or one a point.
        layout: "raster" keeps the patches row by row; "block" puts them in the order of `tokenops.nn.grid_order` before
            the first block: there the first two merges, horizontal and then vertical, take rows side by side.

    Returns:
        The model, which now brings its intermediate maps back to the full grid (`UnmergedMaps`).

    Raises:
        TypeError: the model or its blocks are of another kind.
        ValueError: its tokens are merged already or form no fixed grid, or an argument does not fit.

    Source: asymmetric token merging of CAIT (Wang et al., arXiv 2309.15755), reconstructed from the published
    description: the places, the weights and the layout are ours.

    >>> import timm
    >>> model = merge_tokens(timm.create_model("deit_tiny_patch16_224", depth=3), {0: "horizontal", 1: "vertical"})
    >>> [tuple(y.shape) for y in model.forward_intermediates(torch.randn(1, 3, 224, 224), output_fmt="NLC")[1]]
    [(1, 98, 192), (1, 49, 192), (1, 49, 192)]
    """
    _check_model("merge_tokens", model)
    if not isinstance(model, UnmergedMaps) and type(model) not in _MERGED:
        raise TypeError(
            f"merge_tokens knows timm's VisionTransformer, VisionTransformerDistilled and LVViT, but got"
            f" {type(model).__name__}: derive it from UnmergedMaps, so that its maps are brought back to the full grid"
        )
    if any(merge is not None for merge in merges_of(model)):
        raise ValueError("merge_tokens: the model's tokens are merged already")
    if getattr(model, "dynamic_img_size", False):
        raise ValueError("merge_tokens needs a fixed grid, but the model has dynamic_img_size=True")
    if not isinstance(getattr(model, "patch_drop", nn.Identity()), nn.Identity):
        raise ValueError("merge_tokens needs every patch, but the model has a patch_drop_rate")
    points = _points(points, len(model.blocks))
    kinds = [kind] * len(points) if isinstance(kind, str) else list(kind)
    if len(kinds) != len(points):
        raise ValueError(f"merge_tokens: kind={kind!r} has {len(kinds)} values, but there are {len(points)} points")
    if layout not in ("raster", "block"):
        raise ValueError(f"merge_tokens: layout={layout!r}, but it must be 'raster' or 'block'")
    axes = tuple(points.values())
    if layout == "block" and axes[:2] != ("horizontal", "vertical")[: len(axes)]:
        raise ValueError(f"merge_tokens: layout='block' merges horizontally, then vertically, but points={points}")
    grid, merges = tuple(model.patch_embed.grid_size), []
    order = grid_order(grid) if layout == "block" else None
    for i, (axis, how) in enumerate(zip(axes, kinds)):  # behind the second merge the block layout is the raster's
        place = layout if i < 2 else "raster"
        merge = NeighbourMerging(model.embed_dim, axis, grid, how, prefix=model.num_prefix_tokens, layout=place)
        merges.append(merge)
        grid = merge.merged_grid

    convert_blocks(model)
    like = model.pos_embed if model.pos_embed is not None else next(model.parameters())
    for i, merge in zip(points, merges):
        model.blocks[i].merge = merge.to(like.device, like.dtype).train(model.training)
    if order is not None:
        model.blocks[0].order = order.to(like.device)
    model.__class__ = _MERGED.get(type(model), type(model))  # the maps of the class it had would be wrong, silently
    return model


def merges_of(model: Any) -> list[NeighbourMerging | None]:
    """What merges tokens behind each block of a model, converted or not."""
    return [getattr(block, "merge", None) for block in model.blocks]


def unmerge_tokens(model: Any, x: Tensor, block: int, *, prefix: int | None = None, mode: str = "repeat") -> Tensor:
    """Bring what comes out of a block back to the full grid, row by row, whatever the layout.

    Args:
        model: with merged tokens, or without any.
        x: ``(B, P+M, C)``, tokens behind the block.
        block: which block, from 0.
        prefix: P, the model's own number of prefix tokens unless given.
        mode: "repeat" or "bilinear", as in :func:`tokenops.unmerge_neighbours`.

    Returns:
        ``(B, P+H*W, C)``.

    Raises:
        ValueError: there are not as many tokens as behind that block.
    """
    prefix = model.num_prefix_tokens if prefix is None else prefix
    merges = [merge for merge in merges_of(model)[: block + 1] if merge is not None]
    height, width = model.patch_embed.grid_size
    if getattr(model.blocks[0], "order", None) is not None and len(merges) < 2:
        # (i, j, dy, dx) to (i, dy, j, dx), dx being merged behind the first
        blocks = x[:, prefix:].unflatten(1, (height // 2, width // 2, 2, 2 - len(merges)))
        x = torch.cat((x[:, :prefix], blocks.transpose(2, 3).flatten(1, 4)), dim=1)
    return unmerge_neighbours(x, (height, width), tuple(merge.axis for merge in merges), prefix=prefix, mode=mode)


class UnmergedMaps:
    """Mixin before a vision transformer's class: its intermediates as maps cover the full grid again."""

    blocks: Any
    patch_embed: Any

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Outputs of chosen blocks as timm's models give them.

        "NLC" gives the tokens as they are behind a block, "NCHW" maps of the full grid, in which the patches that were
        merged have the same values. The arguments are those of timm's ``forward_intermediates``.

        Raises:
            ValueError: ``output_fmt`` is neither.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}, but it must be 'NCHW' or 'NLC'")
        out = super().forward_intermediates(  # type: ignore[misc]
            x, indices, return_prefix_tokens, norm, stop_early, "NLC", intermediates_only, **kwargs
        )
        if output_fmt == "NLC":
            return out
        found = out["image_intermediates"] if isinstance(out, dict) else out if intermediates_only else out[1]
        for j, i in enumerate(sorted(feature_take_indices(len(self.blocks), indices)[0])):
            tokens, *others = found[j] if isinstance(found[j], tuple) else (found[j],)
            y = unmerge_tokens(self, tokens, i, prefix=0).transpose(1, 2).unflatten(2, self.patch_embed.grid_size)
            found[j] = (y.contiguous(), *others) if others else y.contiguous()
        return out


class MergedVisionTransformer(UnmergedMaps, VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer behind `merge_tokens`."""


class MergedVisionTransformerDistilled(UnmergedMaps, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's VisionTransformerDistilled behind `merge_tokens`."""


_MERGED: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: MergedVisionTransformer,
    VisionTransformerDistilled: MergedVisionTransformerDistilled,
}


def _check_model(name: str, model: Any) -> None:
    """TypeError in words unless the model runs its blocks, one after another, as these two classes do."""
    if getattr(type(model), "forward_features", None) is not VisionTransformer.forward_features or is_patched(model):
        raise TypeError(
            f"{name} takes a timm VisionTransformer or an LVViT that runs all its blocks on all its tokens, but got"
            f" {type(model).__name__}"
        )


def _points(points: Mapping[int, str] | None, depth: int) -> dict[int, str]:
    """The merge points in the order of the blocks, checked."""
    if points is None:
        if depth < 3:
            raise ValueError(f"merge_tokens: points must be given for a model of {depth} blocks")
        return {round(depth / 3) - 1: "horizontal", round(2 * depth / 3) - 1: "vertical"}
    for block in points:
        if type(block) is not int or not 0 <= block < depth:
            raise ValueError(f"merge_tokens: points has block {block!r}, but blocks are numbered 0 to {depth - 1}")
    return dict(sorted(points.items()))
