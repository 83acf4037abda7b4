"""EViT on timm's VisionTransformer: the tokens the class token looks at stay, the others become one.

The models are registered with timm. No weights are hosted: DeiT's and EViT's load as they are, the names are timm's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import convert_attention
from ..select_tokens import select_tokens
from .sit import _cfg


class ReducingViT(VisionTransformer):
    """What EViT and Evo-ViT share: a timm VisionTransformer whose attention can tell what the class token looked at.

    Args:
        **kwargs: those of timm's VisionTransformer. There must be a class token, no dropout of attention weights, and
            timm's pre-norm blocks.

    Raises:
        ValueError: there is not.
    """

    def __init__(self, **kwargs: Any) -> None:
        if not kwargs.get("class_token", True):
            raise ValueError("class_token=False, but the class token's attention is the score of the tokens")
        if kwargs.get("attn_drop_rate", 0.0):
            raise ValueError(
                f"attn_drop_rate={kwargs['attn_drop_rate']}, but attention with dropout gives no scores: it must be 0"
            )
        super().__init__(**kwargs)
        if not all(isinstance(block, Block) for block in self.blocks):
            raise ValueError(f"block_fn={kwargs['block_fn']!r}, but it must be timm's Block or a subclass of it")
        convert_attention(self)

    def embed(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to tokens ``(B, P+N, C)``, what the first block takes."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def maybe_checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, checkpointed if so set."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def place_map(self, places: Tensor, x: Tensor) -> Tensor:
        """Places ``(B, k)`` among the patches of images x, -1 for none, to a ``(B, grid_h, grid_w)`` bool map."""
        height, width = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        there = torch.zeros(len(x), 1 + height * width, dtype=torch.bool, device=x.device)
        return there.scatter_(1, places + 1, True)[:, 1:].unflatten(1, (height, width))


class EViT(ReducingViT):
    r"""Vision transformer that drops, in a few blocks, the patch tokens its class token attends to least.

    In such a block, with :math:`a` the class token's attention to the N patch tokens, its mean over the heads, and
    :math:`k = \lceil r N \rceil` of them kept:

    .. math:: x \leftarrow x + \mathrm{Attention}(x), \qquad
        x \leftarrow [x_{cls},\; x_i\, (i \in \mathrm{top}_k(a)),\;
        \textstyle\sum_{j \notin \mathrm{top}_k(a)} a_j x_j], \qquad
        x \leftarrow x + \mathrm{MLP}(x)

    The fused token is one more patch token for the blocks that follow. Choice, gather, fusion and the MLP's norm are
    one launch. Parameter names are those of timm's VisionTransformer.

    Args:
        keep_rate: r, above 0 and at most 1: a number for the blocks of ``reduction_loc``, or one number a block. A
            block that would keep every token is an ordinary one.
        reduction_loc: the blocks that drop tokens, counted from 0.
        fuse_token: whether the dropped tokens are fused into one; without, they are gone.
        **kwargs: those of timm's VisionTransformer, see `ReducingViT`.

    Attributes:
        keep_rates: one a block; `set_keep_rate` sets them.

    Raises:
        ValueError: a rate or a block is out of range; see also `ReducingViT`.

    Source: Liang et al., EViT: Expediting Vision Transformers via Token Reorganizations (ICLR 2022), section 3.
    """

    def __init__(
        self,
        keep_rate: float | Sequence[float] = 0.7,
        reduction_loc: Sequence[int] = (3, 6, 9),
        fuse_token: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reduction_loc = block_indices("reduction_loc", reduction_loc, 0, len(self.blocks))
        self.fuse_token = fuse_token
        self.set_keep_rate(keep_rate)

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Another rate, at any time: a number for the blocks of ``reduction_loc``, or one number a block.

        Raises:
            ValueError: a rate is not above 0 and at most 1, or there are not as many as blocks.
        """
        self.keep_rates = per_block("keep_rate", keep_rate, self.reduction_loc, len(self.blocks))

    @staticmethod
    def keep_rate_at(epoch: float, base: float, start: float, end: float) -> float:
        r"""The rate of the published training at an epoch: 1 until ``start``, down a cosine to ``base`` at ``end``.

        .. math:: r = base + (1 - base) (1 + \cos(\pi t)) / 2, \qquad t = (epoch - start) / (end - start)

        Args:
            epoch: which, counted from 0; fractions for steps within it.
            base: the rate in the end, above 0 and at most 1.
            start: the epoch at which the rate begins to shrink.
            end: the epoch at which it has shrunk, not before ``start``.

        Raises:
            ValueError: ``base`` or ``end`` is out of range.

        >>> [round(EViT.keep_rate_at(epoch, 0.7, start=10, end=110), 3) for epoch in (0, 10, 60, 110, 300)]
        [1.0, 1.0, 0.85, 0.7, 0.7]
        """
        if not 0 < base <= 1:
            raise ValueError(f"base={base}, but it must be above 0 and at most 1")
        if not start <= end:
            raise ValueError(f"end={end}, but it must not be before start={start}")
        if epoch < start:
            return 1.0
        if epoch >= end:
            return float(base)
        return base + (1 - base) * (1 + math.cos(math.pi * (epoch - start) / (end - start))) / 2

    def run_block(self, i: int, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Block ``i`` on tokens ``(B, P+N, C)``, which may leave fewer; ``source`` ``(B, N)`` follows the patch tokens.

        What follows the fused token is -1.
        """
        return self.maybe_checkpointed(self._run_block, i, x, source)

    def _run_block(self, i: int, x: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block, prefix = self.blocks[i], self.num_prefix_tokens
        N = x.shape[1] - prefix
        k = math.ceil(self.keep_rates[i] * N)
        x, looked_at = attend(block, x, scores=k < N)
        if looked_at is None:
            return feed(block, x), source
        chosen = select_tokens(
            x,
            looked_at[:, prefix:],
            k,
            prefix=prefix,
            rest="weighted" if self.fuse_token else "none",
            normalize=False,
            order="index",  # the set alone matters: no sort
            companions=() if source is None else (source,),
            norm=fusable(block.norm2),
        )
        if source is not None:
            source = F.pad(chosen.companions[0], (0, int(self.fuse_token)), value=-1)
        return feed(block, chosen.tokens, chosen.normed), source

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to the normalised tokens that are left, ``(B, P+n, C)``, of each image in an order of its own.

        Raises:
            ValueError: a mask is given; it would have to follow the tokens.
        """
        refuse_masks(attn_mask, is_causal)
        x = self.embed(x)
        for i in range(len(self.blocks)):
            x, _ = self.run_block(i, x)
        return self.norm(x)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks as timm's models give them: ``(features, intermediates)``.

        Args:
            x: images.
            indices: which blocks: the last n for an int, all for None.
            return_prefix_tokens: pair every intermediate with its prefix tokens.
            norm: apply the final norm to the intermediates.
            stop_early: leave out the blocks behind the last one asked for.
            output_fmt: "NCHW" maps, or "NLC" tokens.
            intermediates_only: do not compute the final features.

        Raises:
            ValueError: ``output_fmt`` is neither, or "NCHW" where a block's tokens no longer form the grid.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}, but it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.embed(x)
        reduced, intermediates = False, []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            before = x.shape[1] - self.num_prefix_tokens
            reduced = reduced or math.ceil(self.keep_rates[i] * before) < before
            x, _ = self.run_block(i, x)
            if i in take:
                y = self.norm(x) if norm else x
                prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    if reduced:
                        raise ValueError(
                            f"block {i} gives {y.shape[1]} chosen tokens, which form no grid: use output_fmt='NLC'"
                        )
                    y = y.transpose(1, 2).unflatten(2, grid)
                intermediates.append((y, prefix) if return_prefix_tokens else y)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    @torch.no_grad()
    def kept_maps(self, x: Tensor) -> list[Tensor]:
        """Which image patches are still there after each block that drops some: ``(B, grid_h, grid_w)`` bool a block.

        A patch within a fused token is not. Use it in eval mode: dropped patches (``patch_drop_rate``) have no place.
        """
        images, x = x, self.embed(x)
        source: Tensor | None = torch.arange(x.shape[1] - self.num_prefix_tokens, device=x.device).repeat(len(x), 1)
        maps = []
        for i in range(len(self.blocks)):
            before = source
            x, source = self.run_block(i, x, before)
            if source is not before and source is not None:
                maps.append(self.place_map(source, images))
        return maps


def attend(block: Any, x: Tensor, normed: Tensor | None = None, scores: bool = False) -> tuple[Tensor, Tensor | None]:
    """x plus the attention of a timm block; and the class token's probabilities ``(B, P+N)``, if asked for.

    ``normed`` is what the block's first norm makes of x, where that is known.
    """
    normed = block.norm1(x) if normed is None else normed
    y, looked_at = block.attn(normed, scores="class", heads="mean") if scores else (block.attn(normed), None)
    return x + block.drop_path1(block.ls1(y)), looked_at


def feed(block: Any, x: Tensor, normed: Tensor | None = None) -> Tensor:
    """x plus the MLP of a timm block; ``normed`` is what its second norm makes of x, where that is known."""
    normed = block.norm2(x) if normed is None else normed
    return x + block.drop_path2(block.ls2(block.mlp(normed)))


def fusable(norm: Any) -> tuple[Tensor, Tensor, float] | None:
    """What `select_tokens` takes to apply a norm in its launch; None where it is no layer norm."""
    return (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal must be None and False: a mask would have to follow the tokens")


def per_block(
    name: str, value: float | Sequence[float], blocks: Iterable[int], depth: int, zero: bool = False
) -> tuple[float, ...]:
    """One number a block: the value in `blocks` and 1 elsewhere, or the sequence itself. 0 counts as one if `zero`."""
    given = (value,) if isinstance(value, (int, float)) else tuple(value)
    if not all(0 < v <= 1 or (zero and v == 0) for v in given):
        raise ValueError(f"{name}={value}, but it must be {'at least' if zero else 'above'} 0 and at most 1")
    if isinstance(value, (int, float)):
        chosen = set(blocks)
        return tuple(float(value) if i in chosen else 1.0 for i in range(depth))
    if len(given) != depth:
        raise ValueError(
            f"{name} has {len(given)} values, {given}, but it must be a number or one for each of {depth} blocks"
        )
    return tuple(float(v) for v in given)


def block_indices(name: str, blocks: Sequence[int], first: int, depth: int) -> tuple[int, ...]:
    """The blocks as a tuple, checked: ascending, from `first` to the last of `depth`."""
    found = tuple(blocks)
    if any(not first <= i < depth for i in found) or any(a >= b for a, b in zip(found, found[1:])):
        raise ValueError(f"{name}={found}, but it must be ascending block numbers from {first} to {depth - 1}")
    return found


#: the sizes of DeiT
DEIT: dict[str, dict[str, int]] = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}


def create(model_cls: type[nn.Module], variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    """A model as timm makes them; the name says the size of DeiT."""
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls="getter", out_indices=3, output_fmt="NLC"),
        **{**DEIT[variant.split("_")[2]], **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {f"evit_deit_{size}_patch16_224": _cfg(first_conv="patch_embed.proj") for size in DEIT}
)


@register_model
def evit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-T: 139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12."""
    return create(EViT, "evit_deit_tiny_patch16_224", pretrained, kwargs)


@register_model
def evit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-S: 139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12."""
    return create(EViT, "evit_deit_small_patch16_224", pretrained, kwargs)


@register_model
def evit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-B: 139, 99 and 71 patch tokens after blocks 4, 7 and 10 of 12."""
    return create(EViT, "evit_deit_base_patch16_224", pretrained, kwargs)
