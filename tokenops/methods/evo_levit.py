"""Evo-LeViT: LeViT whose less attended patches skip each stage as one token; the ten published models.

All are registered with timm. No weights are hosted: `checkpoint_path=` (or `load_checkpoint`) takes published ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..ops.restore_tokens import restore_tokens
from ..ops.select_tokens import select_tokens
from .levit_layers import AttentionSubsample, Layer, LeViT, mlp


class Stage(NamedTuple):
    """A stage: its grid, its layers ``blocks[first:end]``, of which those from ``pruned`` on keep ``keep`` patches."""

    grid: tuple[int, int]
    first: int
    pruned: int
    end: int
    keep: int


class EvoLeViT(LeViT):
    r"""LeViT with a class token and slow-fast token evolution: only the best patches run through a stage's layers.

    g, the patches' global scores, is the class token's attention averaged over the heads, blended from layer to layer,
    :math:`g \leftarrow (1-t) g + t a` with t = sigmoid(theta), of the patches that a layer sees. A pruned stage with n
    of N patches to keep computes, S the n patches with the largest g,

    .. math:: Z_0 = [cls, x_S, r], \quad r = \sum_{j \notin S} g_j x_j / \sum_{j \notin S} g_j, \qquad
        Z = \mathrm{layers}(Z_0), \qquad x_S \leftarrow Z_S, \quad x_j \leftarrow x_j + (Z_r - r) \; (j \notin S)

    so the others move with r, which is then dropped. The patches stay in their places all the way, and no attention
    matrix is written. Between stages every patch is a key and a quarter of them are queries; g, of these, is scaled
    to the sum it had. The logits are the average of two classifiers of the mean patch.

    Args:
        img_size: height and width of the images, multiples of 16, or one int for both.
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the heads out (features come out).
        embed_dim: width of a token, per stage.
        key_dim: channels of a head's queries and keys.
        depth: layers per stage.
        num_heads: attention heads per stage.
        attn_ratio: width of a head's values over `key_dim` (twice that between the stages).
        mlp_ratio: hidden width of an MLP over its input's.
        keeping_ratio: the part of a stage's patches to keep, ``int(ratio * N)`` of N, one or one per stage; 1 prunes
            nothing.
        dense_layers: the first so many layers of the network see every patch whatever the ratio.
        stage_wise: patches are chosen once a stage (the later part of training, and inference) or before every layer
            (the earlier part). The attribute may be changed between forwards.
        learn_tradeoff: theta is used, or t is .5 (as in the earlier part of training). An attribute, too.
        drop_path_rate: stochastic depth, the same of every branch.

    In training `forward` returns the logits of `head`, `head_dist` (of the mean patch), `head_cls` and `head_cls_dist`
    (of the class token), for `evo_levit_loss`. Choosing patches has no gradient; g has one, through its part in r,
    and so has each theta that a later choice depends on: the first layer's and those of the last stage never do.

    Parameter names are those of the published source (``blocks``; theta is ``learn_tradeoff``), with which they were
    compared; no published weights were at hand to be loaded. Its state dicts hold all blocks a second time below
    ``stage_blocks``: these are left out when loading, as are heads that `for_inference` dropped.

    Raises:
        ValueError: sizes do not fit together, or a stage is pruned before any layer saw all patches; and from the
            forward pass, images of another size.

    Source: Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer (AAAI 2022), section 3; Graham
    et al., LeViT (ICCV 2021). Equal to the published code except where its branches mistake r for a patch (exactly one
    patch dropped).

    >>> model = EvoLeViT(64, num_classes=10, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(3, 1, 1)).eval()
    >>> model(torch.randn(2, 3, 64, 64)).shape, [tuple(m.shape) for m in model.kept_maps(torch.randn(1, 3, 64, 64))]
    (torch.Size([2, 10]), [(1, 4, 4), (1, 2, 2), (1, 1, 1)])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (128, 256, 384),
        key_dim: int = 16,
        depth: Sequence[int] = (4, 4, 4),
        num_heads: Sequence[int] = (4, 8, 12),
        attn_ratio: float = 2.0,
        mlp_ratio: float = 2.0,
        keeping_ratio: float | Sequence[float] = 0.5,
        dense_layers: int = 2,
        stage_wise: bool = True,
        learn_tradeoff: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        number = len(embed_dim)
        if isinstance(keeping_ratio, (int, float)):
            ratios = [float(keeping_ratio)] * number
        else:
            ratios = [float(ratio) for ratio in keeping_ratio]
        for name, values in (("depth", depth), ("num_heads", num_heads), ("keeping_ratio", ratios)):
            if len(values) != number:
                raise ValueError(f"{name}={values} has {len(values)} stages, but embed_dim has {number}")
        if min(depth) < 1:
            raise ValueError(f"depth={tuple(depth)}, but every stage needs at least one layer")
        if not all(0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"keeping_ratio={keeping_ratio}, but it must be above 0 and at most 1")
        if dense_layers < 0:
            raise ValueError(f"dense_layers={dense_layers}, but it must be at least 0")
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        super().__init__(size, in_chans, num_classes, embed_dim[0], embed_dim[-1])
        self.embed_dim, self.stage_wise, self.learn_tradeoff = tuple(embed_dim), stage_wise, learn_tradeoff
        grid = self.grid_size
        blocks: list[nn.Module] = []
        self.stages: list[Stage] = []
        for s, dim in enumerate(embed_dim):
            first = len(blocks)
            blocks += [
                Layer(dim, key_dim, num_heads[s], attn_ratio, mlp_ratio, drop_path_rate) for _ in range(depth[s])
            ]
            patches, end = grid[0] * grid[1], len(blocks)
            keep = int(patches * ratios[s])
            dense = depth[s] if keep == patches else min(max(dense_layers - sum(depth[:s]), 0), depth[s])
            self.stages.append(Stage(grid, first, first + dense, end, keep))
            if s + 1 < number:
                if dim < key_dim:
                    raise ValueError(f"embed_dim={tuple(embed_dim)}, but all must be at least key_dim={key_dim}")
                out = embed_dim[s + 1]
                blocks.append(AttentionSubsample(dim, out, key_dim, dim // key_dim, 2 * attn_ratio, grid))
                blocks.append(mlp(out, mlp_ratio, drop_path_rate))
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        if self.stages[0].pruned == 0:
            raise ValueError(
                "dense_layers=0, but where stage 1 is pruned its first layer must see every patch: at least 1"
            )
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [
            dict(module=f"blocks.{stage.end - 1}", num_chs=dim, reduction=16 * 2**s)
            for s, (stage, dim) in enumerate(zip(self.stages, embed_dim))
        ]

    def _run(self, x: Tensor, last: int, kept: list[Tensor] | None = None) -> list[Tensor]:
        """The tokens behind each of the stages up to `last`; the maps of kept patches go to `kept`."""
        g: Tensor | None = None
        done = []
        for s, stage in enumerate(self.stages[: last + 1]):
            if s:
                x, g = self._subsample(self.stages[s - 1].end, x, g)
            for i in range(stage.first, stage.pruned):
                x, g = self._layer(i, x, g, slice(1, None))
            step = max(stage.end - stage.pruned, 1) if self.stage_wise else 1
            for i in range(stage.pruned, stage.end, step):
                x, g, index = self._slow_fast(range(i, i + step), stage.keep, x, g)
                if kept is not None:
                    grid = torch.zeros(x.shape[0], x.shape[1] - 1, dtype=torch.bool, device=x.device)
                    kept.append(grid.scatter(1, index, True).unflatten(1, stage.grid))
            done.append(x)
        return done

    def _scored(self, i: int) -> bool:
        """Whether a choice of patches behind block i depends on its scores."""
        choices = [s.pruned if self.stage_wise else s.end - 1 for s in self.stages if s.pruned < s.end]
        return bool(choices) and i < choices[-1]

    def _layer(self, i: int, x: Tensor, g: Tensor | None, patches: slice) -> tuple[Tensor, Tensor | None]:
        layer: Any = self.blocks[i]
        if not self._scored(i):
            return layer(x), g
        x, row = layer(x, scores=True)
        row = row[:, patches]
        return x, row if g is None else layer.blend(g, row, self.learn_tradeoff)

    def _slow_fast(self, layers: range, k: int, x: Tensor, g: Any) -> tuple[Tensor, Tensor, Tensor]:
        scored = self._scored(layers[0])
        followers = (g,) if scored else ()
        first, index, companions, *_ = select_tokens(x, g, k, rest="weighted", order="index", companions=followers)
        z, g_kept = first, companions[0] if scored else None
        for i in layers:
            z, g_kept = self._layer(i, z, g_kept, slice(1, -1))
        # what the layers added to the representative token, dropped paths included
        moved = x + (z[:, -1:] - first[:, -1:])
        pairs = () if g_kept is None else ((g, g_kept),)
        x, restored = restore_tokens(moved, z[:, :-1], index, companions=pairs)
        return x, restored[0] if restored else g, index

    def _subsample(self, i: int, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        subsample: Any = self.blocks[i]
        if self._scored(i):
            assert g is not None
            total = g.sum(dim=1, keepdim=True)
            x, row = subsample(x, scores=True)
            g = subsample.blend(subsample.strided(g), subsample.strided(row[:, 1:]), self.learn_tradeoff)
            g = g * (total / g.sum(dim=1, keepdim=True))
        else:
            x = subsample(x)
        return self.blocks[i + 1](x), g

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last stage's tokens ``(B, 1+N, C)``, the patches in their places."""
        return self._run(self.embed(x), len(self.stages))[-1]

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def kept_maps(self, x: Tensor) -> list[Tensor]:
        """Which patches are kept, ``(B, grid height, grid width)`` bool: a map a pruned stage (layer-wise: layer)."""
        maps: list[Tensor] = []
        self._run(self.embed(x), len(self.stages), maps)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens behind chosen stages, as timm's models give them: ``(features, intermediates)``.

        Args:
            x: images.
            indices: which stages: the last n for an int, all for None.
            return_prefix_tokens: pair every intermediate with its class token.
            norm: nothing, as there is no final norm.
            stop_early: leave out the stages behind the last one asked for.
            output_fmt: "NCHW" maps, or "NLC" tokens.
            intermediates_only: do not return the final features.

        Raises:
            ValueError: ``output_fmt`` is neither.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}, but it must be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.stages), indices)
        done = self._run(self.embed(x), last if stop_early else len(self.stages))
        intermediates: list[Any] = []
        for s in take:
            y = done[s][:, 1:]
            y = y.transpose(1, 2).unflatten(2, self.stages[s].grid) if output_fmt == "NCHW" else y
            intermediates.append((y, done[s][:, :1]) if return_prefix_tokens else y)
        return intermediates if intermediates_only else (done[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates at `indices` do not need; returns the indices counted from 0."""
        take, last = feature_take_indices(len(self.stages), indices)
        if prune_head or last + 1 < len(self.stages):
            self.reset_classifier(0)
        self.stages = self.stages[: last + 1]
        self.blocks = self.blocks[: self.stages[-1].end]
        self.num_features = self.head_hidden_size = self.embed_dim[last]
        return take


def evo_levit_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    teacher: Tensor | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Half the mean loss of two heads on the labels, half the mean cross entropy of two on the teacher's classes.

    Args:
        logits: what the model returns in training, four times ``(B, num_classes)``.
        target: labels, as `criterion` takes them.
        teacher: the teacher's logits ``(B, num_classes)``; without them its heads learn from the labels, too.
        criterion: the loss on the labels, of ``(logits, target)``.

    Raises:
        ValueError: there are not four logits.

    Source: the training of Xu et al., Evo-ViT (AAAI 2022), which is LeViT's hard distillation with twice the heads.
    """
    if len(logits) != 4:
        raise ValueError(f"evo_levit_loss: logits has {len(logits)} tensors, but the model returns 4 in training")
    mean, mean_dist, cls, cls_dist = logits
    own = (criterion(mean, target) + criterion(cls, target)) / 2
    if teacher is None:
        return own / 2 + (criterion(mean_dist, target) + criterion(cls_dist, target)) / 4
    taught = teacher.argmax(dim=1)
    return own / 2 + (F.cross_entropy(mean_dist, taught) + F.cross_entropy(cls_dist, taught)) / 4
