"""LV-ViT, which SiT slims: timm's VisionTransformer with a stem of convolutions and scaled branches.

Its auxiliary head and token labels belong to training: `published_names` leaves their weights out.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ConvStem(PatchEmbed):
    """Patch embedding by 3x3 convolutions, BN and GELU between them: stride 16 in all, ``(B, N, C)`` tokens out.

    Args:
        img_size: height and width of the images, multiples of 16, or one int for both.
        patch_size: 16.
        in_chans: channels of the images.
        embed_dim: C.
        layers: 4, or 6 with two more convolutions at half the resolution.
        bias, dynamic_img_pad: as timm passes them; without meaning.

    Raises:
        ValueError: sizes are no multiples of 16; and from the forward pass, images of another size.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        layers: int = 4,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        if patch_size != 16:
            raise ValueError(f"patch_size={patch_size}, but the stem's patches are 16 pixels wide")
        self.layers, self.in_chans, self.patch_size = layers, in_chans, (16, 16)
        self.dynamic_img_pad = False  # type: ignore[misc]
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size)
        whole_patches(self.img_size)
        made = {"device": device, "dtype": dtype}
        widths = [in_chans, *[embed_dim // 8] * (layers - 3), embed_dim // 4, embed_dim // 2, embed_dim]
        for i in range(1, layers + 1):
            stride = 1 if 1 < i < layers - 2 else 2
            conv = nn.Conv2d(widths[i - 1], widths[i], 3, stride=stride, padding=1, bias=False, **made)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i], **made))

    def forward(self, x: Tensor) -> Tensor:
        x = images_of(x, self.in_chans, self.img_size)
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


def whole_patches(img_size: tuple[int, int]) -> None:
    """ValueError where images are not made of patches of 16 pixels."""
    if img_size[0] % 16 or img_size[1] % 16 or min(img_size) < 16:
        raise ValueError(f"img_size={img_size}, but height and width must be multiples of the patch size 16")


def images_of(x: Tensor, in_chans: int, img_size: tuple[int, int]) -> Tensor:
    """Images with channels last: convolutions are faster, and tokens a view of their result. ValueError for others."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (in_chans, *img_size):
        raise ValueError(
            f"x must be images (B, {in_chans}, {img_size[0]}, {img_size[1]}), but got {tuple(x.shape)}; for another"
            " size make the model with img_size=(height, width)"
        )
    return x.contiguous(memory_format=torch.channels_last)


class Scale(nn.Module):
    """A layer scale without a parameter: what a residual branch is multiplied by."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return str(self.factor)


def lv_vit(stem: str = "conv4", skip_lam: float = 1.0, norm_eps: float = 1e-5, **kwargs: Any) -> VisionTransformer:
    """An LV-ViT, dense: a VisionTransformer of timm that classifies by its class token.

    Args:
        stem: "conv4", "conv6" (`ConvStem`) or "linear" (one 16x16 convolution, as in DeiT).
        skip_lam: what the residual branches are divided by.
        norm_eps: epsilon of the layer norms.
        **kwargs: those of timm's VisionTransformer.

    Raises:
        ValueError: there is no such stem, or sizes do not fit together.

    Source: Jiang et al., All Tokens Matter: Token Labeling for Training Better Vision Transformers (NeurIPS 2021), as
    used by Zong et al., Self-slimmed Vision Transformer (ECCV 2022).
    """
    if stem not in ("linear", "conv4", "conv6"):
        raise ValueError(f"stem={stem!r}, but it must be 'conv4', 'conv6' or 'linear'")
    embed: Any = PatchEmbed if stem == "linear" else partial(ConvStem, layers=int(stem[-1]))
    model = VisionTransformer(**{"embed_layer": embed, "norm_layer": partial(LayerNorm, eps=norm_eps), **kwargs})
    if skip_lam != 1:
        for block in model.blocks:
            block.ls1, block.ls2 = Scale(1 / skip_lam), Scale(1 / skip_lam)
    return model


def published_names(model: Any, state: dict[str, Tensor], prefix: str = "", *others: Any) -> None:
    """Names of the published LV-ViT and SiT checkpoints to those of the model here. A hook of ``load_state_dict``.

    Slimmings (``tsm``) belong to the block behind them here. Reverse modules (``rtsm``) and the auxiliary head are
    training's, and left out.
    """
    slims = [i for i, block in enumerate(model.blocks) if hasattr(block, "slimming")]
    for key in list(state):
        kind, _, rest = key.removeprefix(prefix).partition(".")
        j, _, name = rest.partition(".")
        if kind == "tsm" and j.isdecimal() and int(j) < len(slims):
            state[f"{prefix}blocks.{slims[int(j)]}.slimming.{name}"] = state.pop(key)
        elif kind in ("rtsm", "aux_head"):
            del state[key]


def for_inference(model: Any) -> Any:
    """Everything inference can do without is folded: batch norms of a stem, factors of branches. Load weights before.

    A model that has a ``for_inference`` of its own (`EvoLeViT`) does it itself.

    Returns:
        The model, now in evaluation mode.
    """
    if hasattr(model, "for_inference"):
        return model.for_inference()
    model.eval()
    for module in model.modules():
        if isinstance(module, ConvStem):
            module.fuse()
    for block in getattr(model, "blocks", ()):
        for name, linear in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            scale = getattr(block, name, None)
            if isinstance(scale, Scale):
                with torch.no_grad():
                    for parameter in block.get_submodule(linear).parameters():
                        parameter.mul_(scale.factor)
                setattr(block, name, nn.Identity())
    return model
