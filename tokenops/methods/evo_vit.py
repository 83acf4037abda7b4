"""Evo-DeiT: Evo-ViT's slow-fast token evolution on timm's VisionTransformer, five models registered with timm.

No weights are hosted: `checkpoint_path=` (or `load_checkpoint`) takes published ones, and DeiT's.
"""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..restore_tokens import restore_tokens
from ..select_tokens import select_tokens
from .evit import DEIT, ReducingViT, attend, block_indices, create, feed, fusable, per_block, refuse_masks
from .sit import _cfg


class EvoViT(ReducingViT):
    r"""Vision transformer whose later blocks update the patch tokens the class token looks at and leave the others.

    Block l updates a score of every patch token that passes through it, from the class token's attention :math:`a_l`,
    summed over the heads (here its mean: only the order counts):

    .. math:: g \leftarrow (1 - \alpha_l)\, g + \alpha_l\, a_l

    Before a pruned stage the :math:`\lfloor rN \rfloor` tokens of the largest g are chosen; they and the class token
    alone pass through the stage, and return to their places among the others afterwards. The mean of all patch tokens,
    updated or not, is classified. Stage-wise, a stage is a run of blocks (inference, and the end of training);
    layer-wise, it is one block (the beginning of training).

    Tokens keep their order, only blocks whose scores a later choice needs compute them, and the last stage restores
    nothing: it needs only the mean of what it left out.

    A state dict may have published names (``qks``, ``vs``, ``norms``, ``projs`` beside ``blocks``), timm's (DeiT) or
    its own, timm's and the class head's. One without a class head, as DeiT's, starts both heads and their norms from
    the one it has. All of them load with strict=True.

    Args:
        prune_ratio: r, above 0 and at most 1: a number for all blocks from the first pruned stage on, or one number a
            block, 1 before. Stage-wise, that of a stage's first block holds.
        tradeoff: :math:`\alpha`, 0 to 1: a number for all blocks from the first pruned stage on (1 before), or one
            number a block. Block 0 has no scores to mix with.
        stages: the blocks at which a pruned stage begins, counted from 0, not 0 itself; blocks 4 and 8 of 12 (a third
            and two thirds of the depth) if not given. ``()`` prunes nothing.
        stage_wise: the initial value of the attribute.
        **kwargs: those of timm's VisionTransformer, see `ReducingViT`; ``global_pool`` can only be "avg".

    Attributes:
        stage_wise: the mode, to be set at any time; `schedule_at` says what training sets.

    Raises:
        ValueError: a number is out of range, or a stage would keep no token; see also `ReducingViT`.

    Source: Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer (AAAI 2022), section 3, in the
    form published for DeiT: without a representative token.
    """

    def __init__(
        self,
        prune_ratio: float | Sequence[float] = 0.5,
        tradeoff: float | Sequence[float] = 0.5,
        stages: Sequence[int] | None = None,
        stage_wise: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_pool(kwargs.pop("global_pool", None))
        super().__init__(global_pool="avg", fc_norm=False, **kwargs)
        depth = len(self.blocks)
        self.stages = block_indices("stages", (depth // 3, 2 * depth // 3) if stages is None else stages, 1, depth)
        pruned = range(self.stages[0] if self.stages else depth, depth)
        self.prune_ratio = per_block("prune_ratio", prune_ratio, pruned, depth)
        self.tradeoff = (1.0, *per_block("tradeoff", tradeoff, pruned, depth, zero=True)[1:])
        if any(ratio != 1 for ratio in self.prune_ratio[: pruned.start]):
            raise ValueError(f"prune_ratio={self.prune_ratio}, but it must be 1 before block {pruned.start}")
        patches = self.patch_embed.num_patches
        if int(min(self.prune_ratio) * patches) < 1:
            raise ValueError(f"prune_ratio={prune_ratio} keeps none of {patches} tokens, but it must keep at least one")
        self.stage_wise = stage_wise
        self.norm_cls: nn.Module | None = copy.deepcopy(self.norm)
        self.head_cls: nn.Module | None = None
        self._make_class_head()
        self.register_load_state_dict_pre_hook(_rename)

    @staticmethod
    def schedule_at(epoch: float, epochs: float) -> bool:
        """What ``stage_wise`` is in training's epoch ``epoch`` (from 0) of ``epochs``: False in the first two thirds.

        >>> [EvoViT.schedule_at(epoch, 300) for epoch in (0, 199, 200, 299)]
        [False, False, True, True]
        """
        return 3 * epoch >= 2 * epochs

    def runs(self) -> list[tuple[int, int, float]]:
        """Blocks that share their tokens, as (first, end, part of the patch tokens that pass through them)."""
        depth = len(self.blocks)
        pruned = range(self.stages[0] if self.stages else depth, depth)
        starts = [0, *(self.stages if self.stage_wise else pruned)]
        return [(first, end, self.prune_ratio[first]) for first, end in zip(starts, [*starts[1:], depth])]

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to ``(B, 2, C)``: the class token and the mean of all patch tokens, neither normalised.

        Raises:
            ValueError: a mask is given; it would have to follow the tokens.
        """
        refuse_masks(attn_mask, is_causal)
        return self._features(x, [])

    def _features(self, x: Tensor, indices: list[Tensor | None]) -> Tensor:
        """The features; and into `indices`, what each run but the first chose, None for all tokens."""
        x, prefix = self.embed(x), self.num_prefix_tokens
        N, runs = x.shape[1] - prefix, self.runs()
        scores: Any = None
        mean: Tensor | None = None
        for j, (first, end, ratio) in enumerate(runs):
            wanted = any(ratio < 1 for _, _, ratio in runs[j + 1 :])  # whether a later choice needs the scores
            last = j == len(runs) - 1
            tokens, normed, index, updated = x, None, None, scores
            if ratio < 1:
                chosen = select_tokens(
                    x,
                    scores,
                    int(ratio * N),
                    prefix=prefix,
                    rest="mean" if last else "none",
                    order="index",
                    companions=(scores,) if wanted else (),
                    norm=fusable(self.blocks[first].norm1),
                )
                tokens, normed, index = chosen.tokens, chosen.normed, chosen.index
                updated = chosen.companions[0] if wanted else None
                if last:
                    tokens, mean = tokens[:, :-1], tokens[:, -1]
                    normed = None if normed is None else normed[:, :-1]
            for i in range(first, end):
                overwritten = 1.0 in self.tradeoff[i + 1 : end]
                needed = wanted and self.tradeoff[i] > 0 and not overwritten
                tokens, looked_at = self.maybe_checkpointed(self._run_block, i, tokens, normed, needed)
                normed = None
                if looked_at is not None:
                    new, alpha = looked_at[:, prefix:].detach(), self.tradeoff[i]  # scores are only sorted
                    updated = new if alpha == 1 else torch.lerp(updated, new, alpha)
            if index is None or last:
                x, scores = tokens, updated
            else:
                pairs = ((scores, updated),) if wanted else ()
                x, restored = restore_tokens(x, tokens, index, prefix=prefix, companions=pairs)
                scores = restored[0] if wanted else None
            if j:
                indices.append(index)
        pooled = x[:, prefix:].mean(dim=1)
        if mean is not None:
            k = x.shape[1] - prefix
            pooled = pooled * (k / N) + mean * ((N - k) / N)
        return torch.stack((x[:, 0], pooled), dim=1)

    def _run_block(self, i: int, x: Tensor, normed: Tensor | None, scores: bool) -> tuple[Tensor, Tensor | None]:
        x, looked_at = attend(self.blocks[i], x, normed, scores)
        return feed(self.blocks[i], x), looked_at

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Features ``(B, 2, C)`` to logits ``(B, num_classes)`` of the mean patch token.

        In training, and while there is a class head, the class token's are there too: ``(logits, class logits)``.
        """
        pooled = self.head_drop(self.norm(x[:, 1]))
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if not self.training or self.head_cls is None or self.norm_cls is None:
            return logits
        return logits, self.head_cls(self.head_drop(self.norm_cls(x[:, 0])))

    @torch.no_grad()
    def kept_maps(self, x: Tensor) -> list[Tensor]:
        """Which image patches pass through each pruned stage (layer-wise: block): ``(B, grid_h, grid_w)`` bool each.

        Use it in eval mode: dropped patches (``patch_drop_rate``) have no place.
        """
        indices: list[Tensor | None] = []
        self._features(x, indices)
        every = torch.arange(self.patch_embed.num_patches, device=x.device).repeat(len(x), 1)
        return [self.place_map(every if index is None else index, x) for index in indices]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: within a stage most tokens are at no block's state.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("EvoViT has no intermediate features: its blocks see different tokens")

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Not there, see `forward_intermediates`."""
        return self.forward_intermediates()

    def remove_cls(self) -> "EvoViT":
        """Drop the class head and its norm, which only training uses. Returns the model."""
        self.norm_cls = self.head_cls = None
        return self

    def for_inference(self) -> "EvoViT":
        """`remove_cls`, stage-wise and in eval mode. Returns the model."""
        self.stage_wise = True
        self.eval()
        return self.remove_cls()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (the class head if there is one); 0 for none."""
        _check_pool(global_pool)
        super().reset_classifier(num_classes)
        if self.head_cls is not None:
            self._make_class_head()

    def _make_class_head(self) -> None:
        self.head_cls = copy.deepcopy(self.head)
        if isinstance(self.head_cls, nn.Linear):
            trunc_normal_(self.head_cls.weight, std=0.02)
            nn.init.zeros_(self.head_cls.bias)


def evo_vit_loss(
    logits: Tensor | tuple[Tensor, Tensor],
    target: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """The published training loss: half of it that of the mean patch token's logits, half that of the class token's.

    Args:
        logits: what an `EvoViT` returns: a pair in training; of a single tensor (evaluation) the whole loss is taken.
        target: what the criterion takes: labels, or probabilities of the classes (mixup).
        criterion: of the logits and the target.

    Source: Xu et al., Evo-ViT (AAAI 2022), in its published code.
    """
    if isinstance(logits, Tensor):
        return criterion(logits, target)
    return 0.5 * criterion(logits[0], target) + 0.5 * criterion(logits[1], target)


def _check_pool(global_pool: str | None) -> None:
    if global_pool not in (None, "avg"):
        raise ValueError(f"global_pool={global_pool!r}, but Evo-ViT classifies the mean of its patch tokens ('avg')")


#: where the published modules are that are timm's in another place
_PLACES = {"norms": "norm1", "projs": "attn.proj"}


def _rename(model: EvoViT, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Published names to timm's, and the class head as the model has it or not."""
    for key in list(state):
        name = key.removeprefix(prefix)
        if found := re.fullmatch(r"(norms|projs)\.(\d+)\.(\w+)", name):
            module, i, kind = found.groups()
            state[f"{prefix}blocks.{i}.{_PLACES[module]}.{kind}"] = state.pop(key)
        elif found := re.fullmatch(r"qks\.(\d+)\.qk\.(\w+)", name):
            i, kind = found.groups()
            v = f"{prefix}vs.{i}.v.{kind}"
            if v in state:
                state[f"{prefix}blocks.{i}.attn.qkv.{kind}"] = torch.cat((state.pop(key), state.pop(v)))
    own = [key for key in state if key.startswith((prefix + "norm_cls.", prefix + "head_cls."))]
    if model.head_cls is None:
        for key in own:
            del state[key]
    elif not own:
        for name in ("norm", "head"):
            for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
                state[f"{prefix}{name}_cls.{key.rpartition('.')[2]}"] = state[key].clone()


_EVO_CFG = dict(first_conv="patch_embed.proj", classifier=("head", "head_cls"))
default_cfgs = generate_default_cfgs(
    {
        **{f"evo_deit_{size}_patch16_224": _cfg(**_EVO_CFG) for size in DEIT},
        **{f"evo_deit_{size}_patch16_384": _cfg(**_EVO_CFG, input_size=(3, 384, 384)) for size in ("small", "base")},
    }
)


@register_model
def evo_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-T: 0.818 GMAC, 98 of 196 tokens in blocks 5 to 12."""
    return create(EvoViT, "evo_deit_tiny_patch16_224", pretrained, kwargs)


@register_model
def evo_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-S: 3.033 GMAC, 98 of 196 tokens in blocks 5 to 12."""
    return create(EvoViT, "evo_deit_small_patch16_224", pretrained, kwargs)


@register_model
def evo_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-B: 11.66 GMAC, 98 of 196 tokens in blocks 5 to 12."""
    return create(EvoViT, "evo_deit_base_patch16_224", pretrained, kwargs)


@register_model
def evo_deit_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-S at 384 pixels: 9.881 GMAC, 288 of 576 tokens in blocks 5 to 12."""
    return create(EvoViT, "evo_deit_small_patch16_384", pretrained, dict(img_size=384, **kwargs))


@register_model
def evo_deit_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> EvoViT:
    """Evo-ViT on DeiT-B at 384 pixels: 36.11 GMAC, 288 of 576 tokens in blocks 5 to 12."""
    return create(EvoViT, "evo_deit_base_patch16_384", pretrained, dict(img_size=384, **kwargs))
