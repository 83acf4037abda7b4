"""The parts of LeViT that Evo-LeViT is made of, under the names of the published parameters.

Every linear layer and convolution has a batch norm behind it (`c`, `bn`) that `fuse()` folds away for inference.
"""

from typing import Any, TypeVar

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..nn.attention import merge_heads, split_heads
from ..ops.masked_channel_attention import masked_channel_attention
from .lvvit import images_of, whole_patches

Model = TypeVar("Model", bound="LeViT")
#: all classifiers, in the order of the training's outputs
HEADS = ("head", "head_dist", "head_cls", "head_cls_dist")


class ConvBN(nn.Module):
    """3x3 convolution that halves height and width, and its batch norm: ``(B, C, H, W)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def fuse(self) -> None:
        """Fold the batch norm into the convolution (evaluation mode: its running statistics)."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.c, self.bn = fuse_conv_bn_eval(self.c, self.bn), nn.Identity()


class LinearBN(nn.Module):
    """Linear layer and batch norm over images and tokens alike: ``(B, N, inputs)`` to ``(B, N, outputs)``.

    Args:
        inputs: channels that come in.
        outputs: channels that come out.
        zero: whether the norm starts with weight 0, as the last of a residual branch does.
    """

    def __init__(self, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__()
        self.c = nn.Linear(inputs, outputs, bias=False)
        self.bn: nn.Module = nn.BatchNorm1d(outputs)
        if zero:
            nn.init.zeros_(self.bn.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.bn(y.flatten(0, 1)).view_as(y)

    def fuse(self) -> None:
        """Fold the batch norm into the linear layer (evaluation mode: its running statistics)."""
        if isinstance(self.bn, nn.BatchNorm1d):
            self.c, self.bn = fuse_linear_bn_eval(self.c, self.bn), nn.Identity()


class BNLinear(nn.Module):
    """Batch norm and linear layer, a classifier: ``(B, inputs)`` to ``(B, outputs)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm1d(inputs)
        self.l = nn.Linear(inputs, outputs)
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norm into the linear layer (evaluation mode: its running statistics)."""
        bn = self.bn
        if isinstance(bn, nn.BatchNorm1d) and bn.running_var is not None and bn.running_mean is not None:
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            self.l.bias.add_(self.l.weight @ (bn.bias - bn.running_mean * scale))
            self.l.weight.mul_(scale)
            self.bn = nn.Identity()


class Residual(nn.Module):
    """``x + m(x)``, with stochastic depth; what else ``m`` returns is passed on behind the sum."""

    def __init__(self, m: nn.Module, drop: float) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor, **asked: Any) -> Any:
        out = self.m(x, **asked)
        if isinstance(out, tuple):
            return x + self.drop_path(out[0]), *out[1:]
        return x + self.drop_path(out)


class _Scoring(nn.Module):
    """Attention whose class row becomes part of the tokens' global scores."""

    learn_tradeoff: nn.Parameter
    proj: nn.Module

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: bool) -> Any:
        found: Any = masked_channel_attention(q, k, v, scores="class" if scores else None, heads="mean")
        return (self.proj(merge_heads(found[0])), found[1]) if scores else self.proj(merge_heads(found))

    def blend(self, g: Tensor, row: Tensor, learn: bool) -> Tensor:
        """``(1 - t) g + t row``, t = sigmoid(theta), or .5 where the trade-off is not learned."""
        t: Any = self.learn_tradeoff.to(g.dtype).sigmoid() if learn else 0.5
        return torch.lerp(g, row, t)


class Attention(_Scoring):
    """LeViT's attention on tokens ``(B, N, dim)``, without attention biases; values are wider than keys.

    Args:
        dim: channels of a token.
        key_dim: channels of a head of q and k.
        num_heads: H.
        attn_ratio: channels of a head of v over ``key_dim``.

    With ``scores=True`` it also returns the class token's attention to every token, averaged over the heads, (B, N).
    """

    def __init__(self, dim: int, key_dim: int, num_heads: int, attn_ratio: float) -> None:
        super().__init__()
        self.num_heads, self.widths = num_heads, [key_dim, key_dim, int(attn_ratio * key_dim)]
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.qkv = LinearBN(dim, num_heads * sum(self.widths))
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(num_heads * self.widths[2], dim, zero=True))

    def forward(self, x: Tensor, scores: bool = False) -> Any:
        q, k, v = split_heads(self.qkv(x), self.num_heads).split(self.widths, dim=3)
        return self.attend(q, k, v, scores)


class AttentionSubsample(_Scoring):
    """Attention whose queries are every second patch of every second row, and the class token; no residual.

    Args:
        dim: channels of a token.
        out_dim: channels of a token afterwards.
        key_dim: channels of a head of q and k.
        num_heads: H.
        attn_ratio: channels of a head of v over ``key_dim``.
        grid: (height, width) of the patches. A learned position embedding ``poss`` of this size is added first.

    Tokens ``(B, 1+h*w, dim)`` become ``(B, 1+ceil(h/2)*ceil(w/2), out_dim)``; the scores are as `Attention`'s, of all
    tokens that came in.
    """

    def __init__(
        self, dim: int, out_dim: int, key_dim: int, num_heads: int, attn_ratio: float, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.num_heads, self.widths, self.grid = num_heads, [key_dim, int(attn_ratio * key_dim)], grid
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.poss = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, dim))
        self.kv = LinearBN(dim, num_heads * sum(self.widths))
        self.q = nn.Sequential(nn.Identity(), LinearBN(dim, num_heads * key_dim))  # published as number 1
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(num_heads * self.widths[1], out_dim))
        trunc_normal_(self.poss, std=0.02)

    def strided(self, patches: Tensor) -> Tensor:
        """Every second patch of every second row, of ``(B, h*w, ...)``."""
        return patches.unflatten(1, self.grid)[:, ::2, ::2].flatten(1, 2)

    def forward(self, x: Tensor, scores: bool = False) -> Any:
        x = x + self.poss
        k, v = split_heads(self.kv(x), self.num_heads).split(self.widths, dim=3)
        q = self.q(torch.cat((x[:, :1], self.strided(x[:, 1:])), dim=1))
        return self.attend(split_heads(q, self.num_heads), k, v, scores)


def conv_stem(in_chans: int, embed_dim: int) -> nn.Sequential:
    """Four `ConvBN`, Hardswish between them: images to a grid of patches, 16 times smaller."""
    widths = [in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
    parts: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        parts += [nn.Hardswish(), ConvBN(inputs, outputs)]
    return nn.Sequential(*parts[1:])


def mlp(dim: int, ratio: float, drop: float) -> Residual:
    """Residual MLP along the channels."""
    hidden = int(dim * ratio)
    return Residual(nn.Sequential(LinearBN(dim, hidden), nn.Hardswish(), LinearBN(hidden, dim, zero=True)), drop)


class Layer(nn.Module):
    """Attention ``m1`` and MLP ``m2``, both residual: ``(B, N, dim)``, and the attention's scores if asked for."""

    def __init__(
        self, dim: int, key_dim: int, num_heads: int, attn_ratio: float, mlp_ratio: float, drop: float
    ) -> None:
        super().__init__()
        self.m1 = Residual(Attention(dim, key_dim, num_heads, attn_ratio), drop)
        self.m2 = mlp(dim, mlp_ratio, drop)

    def forward(self, x: Tensor, scores: bool = False) -> Any:
        if not scores:
            return self.m2(self.m1(x))
        x, row = self.m1(x, scores=True)
        return self.m2(x), row

    def blend(self, g: Tensor, row: Tensor, learn: bool) -> Tensor:
        """The attention's `blend`."""
        attention: Any = self.m1.m
        return attention.blend(g, row, learn)


class LeViT(nn.Module):
    """LeViT's frame: stem, class token and position embedding, and four classifiers; the blocks are the subclass's.

    Args:
        img_size: (height, width) of the images.
        in_chans: channels of the images.
        num_classes: classes; 0 for no heads.
        embed_dim: width of the first tokens.
        num_features: width of the last.

    Raises:
        ValueError: the images are not whole patches; and from `embed`, images of another size.
    """

    num_prefix_tokens = 1
    head: nn.Module
    head_dist: nn.Module | None
    head_cls: nn.Module | None
    head_cls_dist: nn.Module | None

    def __init__(
        self, img_size: tuple[int, int], in_chans: int, num_classes: int, embed_dim: int, num_features: int
    ) -> None:
        super().__init__()
        whole_patches(img_size)
        self.img_size, self.in_chans, self.num_classes = img_size, in_chans, num_classes
        self.num_features = self.head_hidden_size = num_features
        self.patch_embed = conv_stem(in_chans, embed_dim)
        self.grid_size = (img_size[0] // 16, img_size[1] // 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.poss = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1] + 1, embed_dim))
        trunc_normal_(self.poss, std=0.02)
        for name in HEADS:
            setattr(self, name, self._head())
        self.register_load_state_dict_pre_hook(_leave_copies_out)

    def embed(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to tokens ``(B, 1+N, C)``: class token first, position embedding added."""
        x = self.patch_embed(images_of(x, self.in_chans, self.img_size)).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.poss

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens to logits ``(B, num_classes)``, in training to those of every head; or to the mean patch."""
        cls, mean = x[:, 0], x[:, 1:].mean(dim=1)
        if pre_logits or self.num_classes == 0:
            return mean
        if self.training:
            heads = [(getattr(self, name), cls if "cls" in name else mean) for name in HEADS]
            return tuple(head(token) for head, token in heads if head is not None)
        if self.head_dist is None:
            return self.head(mean)
        return (self.head(mean) + self.head_dist(mean)) / 2

    def fuse(self: Model) -> Model:
        """Fold every batch norm into its neighbour, for inference. Returns the model, now in eval mode."""
        self.eval()
        for part in self.modules():
            if isinstance(part, (ConvBN, LinearBN, BNLinear)):
                part.fuse()
        self.patch_embed.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def for_inference(self: Model) -> Model:
        """Everything inference can do without is dropped or folded: `fuse`, the class token's heads, and the two heads
        of the mean patch become one. Load weights before. Returns the model."""
        self.fuse()
        self.head_cls = self.head_cls_dist = None
        if isinstance(self.head, BNLinear) and isinstance(self.head_dist, BNLinear):
            for mine, other in zip(self.head.l.parameters(), self.head_dist.l.parameters()):
                mine.add_(other).div_(2)
            self.head_dist = None
        return self

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("poss")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        return dict(stem=r"^cls_token|poss|patch_embed", blocks=[(r"^blocks\.(\d+)", None)])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError("enable=True, but LeViT has no checkpointing: its batch norms would see images twice")

    def get_classifier(self) -> Any:
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes`, as many as there are; 0 for none."""
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool={global_pool!r}, but these models classify by their mean patch ('avg')")
        self.num_classes = num_classes
        for name in HEADS:
            if getattr(self, name) is not None:
                setattr(self, name, self._head())

    def _head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = BNLinear(self.num_features, self.num_classes)
        return head.to(self.poss.device, self.poss.dtype).train(self.training)


def _leave_copies_out(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    gone = ["stage_blocks", *(name for name in HEADS if getattr(module, name) is None)]
    for key in [key for key in state_dict if key.startswith(tuple(f"{prefix}{name}." for name in gone))]:
        del state_dict[key]
