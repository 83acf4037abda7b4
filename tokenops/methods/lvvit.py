"""LV-ViT: the vision transformer that SiT slims, dense here; also the plain ViT of DeiT (`stem="linear"`).

Parameter names are those of the published SiT checkpoints and, for the linear stem, of timm's VisionTransformer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import Attention


class ConvStem(nn.Module):
    """Patch embedding by 3x3 convolutions, BN and GELU between them: stride 16 in all, ``(B, N, C)`` tokens out.

    Args:
        img_size: (height, width) of the images.
        in_chans: channels of the images.
        embed_dim: C.
        layers: 4, or 6 with two more convolutions at half the resolution.
    """

    def __init__(self, img_size: tuple[int, int], in_chans: int, embed_dim: int, layers: int) -> None:
        super().__init__()
        self.img_size, self.layers = img_size, layers
        self.grid_size = (img_size[0] // 16, img_size[1] // 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [in_chans, *[embed_dim // 8] * (layers - 3), embed_dim // 4, embed_dim // 2, embed_dim]
        for i in range(1, layers + 1):
            stride = 1 if 1 < i < layers - 2 else 2
            conv = nn.Conv2d(widths[i - 1], widths[i], 3, stride=stride, padding=1, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions, and (B, N, C) is then a view
        for i in range(1, self.layers + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            if i < self.layers:  # in place where no gradient needs the input: these are the largest tensors there are
                x = F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
        return x.flatten(2).transpose(1, 2)

    def fuse(self) -> None:
        """Fold every batch norm into its convolution (evaluation mode: its running statistics)."""
        for i in range(1, self.layers + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if not isinstance(norm, nn.Identity):
                setattr(self, f"conv{i}", torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(self, f"bn{i}", nn.Identity())
        self.to(memory_format=torch.channels_last)


class Block(nn.Module):
    """Pre-norm transformer block whose two branches are divided by ``skip_lam``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        skip_lam: float = 1.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.alpha = 1.0 / skip_lam
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.drop_path(self.attn(self.norm1(x))), alpha=self.alpha)
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=self.alpha)


class LVViT(nn.Module):
    """LV-ViT, a vision transformer with a convolutional stem and scaled residuals, classifying by its class token.

    Args:
        img_size: height and width of the images, multiples of 16, or one int for both.
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the head out (features come out).
        embed_dim: C, width of a token.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP over C.
        qkv_bias: whether the qkv projection has a bias.
        skip_lam: what the residual branches are divided by.
        stem: "conv4", "conv6" (3x3 convolutions with BN and GELU) or "linear" (one 16x16 convolution, as in DeiT).
        norm_eps: epsilon of the layer norms.
        aux_head: whether there is token labelling's head; unused here and frozen, but in the published checkpoints.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: sizes do not fit together; and from the forward pass, images of another size.

    Source: Jiang et al., All Tokens Matter: Token Labeling for Training Better Vision Transformers (NeurIPS 2021), as
    used by Zong et al., Self-slimmed Vision Transformer (ECCV 2022).
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        skip_lam: float = 1.0,
        stem: str = "conv4",
        norm_eps: float = 1e-5,
        aux_head: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if size[0] % 16 or size[1] % 16 or min(size) < 16:
            raise ValueError(f"img_size={img_size}, but height and width must be multiples of the patch size 16")
        if stem == "linear":
            self.patch_embed: nn.Module = PatchEmbed(size, 16, in_chans, embed_dim)
        elif stem in ("conv4", "conv6"):
            self.patch_embed = ConvStem(size, in_chans, embed_dim, int(stem[-1]))
        else:
            raise ValueError(f"stem={stem!r}, but it must be 'conv4', 'conv6' or 'linear'")
        self.img_size, self.in_chans, self.num_classes = size, in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grid_size, self.num_patches = self.patch_embed.grid_size, self.patch_embed.num_patches
        self.grad_checkpointing = False

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, skip_lam, norm_eps) for rate in rates
        )
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=16) for i in range(depth)]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.has_aux_head = aux_head
        self.reset_classifier(num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def embed(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to tokens ``(B, 1+N, C)``: class token first, position embedding added."""
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(
                f"x must be images (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), but got"
                f" {tuple(x.shape)}; for another size make the model with img_size=(height, width)"
            )
        x = self.patch_embed(x)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed

    def run_block(self, i: int, x: Tensor) -> Tensor:
        """Block ``i``, checkpointed if so set."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self.blocks[i], x, use_reentrant=False)
        return self.blocks[i](x)

    def slim(self, i: int, x: Tensor) -> Tensor:
        """What goes on to the block after ``i``: every token, here."""
        return x

    def restore(self, i: int, tokens: Tensor) -> Tensor:
        """What distillation compares after block ``i``, from the patch tokens that go on: these, here."""
        return tokens

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens ``(B, 1+N, C)``."""
        x = self.embed(x)
        for i in range(len(self.blocks)):
            x = self.slim(i, self.run_block(i, x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits ``(B, num_classes)``, from the class token alone."""
        x = self.head_drop(x[:, 0])
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_distill(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and, for feature distillation, every block's patch tokens ``(B, N, C)``, not normalised."""
        x = self.embed(x)
        layers = []
        for i in range(len(self.blocks)):
            x = self.slim(i, self.run_block(i, x))
            layers.append(self.restore(i, x[:, self.num_prefix_tokens :]))
        return self.forward_head(self.norm(x)), layers

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
        """Outputs of chosen blocks (before any slimming), as timm's models give them: ``(features, intermediates)``.

        Args:
            x: images.
            indices: which blocks: the last n for an int, all for None.
            return_prefix_tokens: pair every intermediate with its class token.
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
        x = self.embed(x)
        intermediates: list[Any] = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self.run_block(i, x)
            if i in take:
                y = self.norm(x) if norm else x
                prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    if y.shape[1] != self.num_patches:
                        raise ValueError(
                            f"block {i} gives {y.shape[1]} slim tokens, which form no grid: use output_fmt='NLC'"
                        )
                    y = y.transpose(1, 2).unflatten(2, self.grid_size)
                intermediates.append((y, prefix) if return_prefix_tokens else y)
            x = self.slim(i, x)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates at `indices` do not need; returns the indices counted from 0."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def fuse(self) -> "LVViT":
        """Fold the stem's batch norms into its convolutions, for inference. Returns the model, now in eval mode."""
        self.eval()
        if isinstance(self.patch_embed, ConvStem):
            self.patch_embed.fuse()
        return self

    def for_inference(self) -> "LVViT":
        """Everything inference can do without is dropped or folded: `fuse`. Load weights before. Returns the model."""
        return self.fuse()

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head (and auxiliary head) for `num_classes`; 0 for none."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool={global_pool!r}, but these models classify by their class token ('token')")
        self.num_classes = num_classes
        self.head = self._head()
        if self.has_aux_head:
            self.aux_head = self._head().requires_grad_(False)

    def _head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.pos_embed
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        _init_linear(head)
        return head.train(self.training)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
