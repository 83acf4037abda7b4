"""Slim blocks: of the rows that come in, the first n_out are computed, from keys and values of all."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...masked_channel_attention import WIDEST_HEAD, masked_channel_attention
from ...nn import Attention
from .. import lvvit
from ..lvvit import LVViT


def attention_heads(attention: Any, x: Tensor, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """q ``(B, H, n_out, Dk)`` of the first rows, k and v ``(B, H, n_in, D)`` of all, from slices of the projection."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    H, wide = attention.num_heads, attention.num_heads * attention.head_dim
    q = F.linear(x[:, :n_out], weight[:wide], None if bias is None else bias[:wide])
    kv = F.linear(x, weight[wide:], None if bias is None else bias[wide:])
    k, v = kv[..., :wide], kv[..., wide:]
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
    return attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v


def slim_attention(attention: Any, x: Tensor, n_out: int) -> Tensor:
    """Rectangular attention: the first ``n_out`` of the rows ``(B, n_in, C)`` attend to all; ``(B, n_out, C)``."""
    q, k, v = attention_heads(attention, x, n_out)
    dropped = attention.attn_drop.p if attention.training else 0.0
    if dropped or max(q.shape[3], v.shape[3]) > WIDEST_HEAD:  # what the operator does not do
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, scale=attention.scale)
    else:
        masks: Any = {name: getattr(attention, name, None) for name in ("qk_mask", "v_mask")}
        attended = masked_channel_attention(q, k, v, scale=attention.scale, **masks)
        assert isinstance(attended, Tensor)
        out = attended
    out = out.transpose(1, 2).flatten(2)
    if getattr(attention, "norm", None) is not None:
        out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(x[:, :n_out]).sigmoid()
    return attention.proj_drop(attention.proj(out))


def slim_block(block: Any, x: Tensor, n_out: int) -> Tensor:
    r"""A transformer block that computes only its first ``n_out`` rows, ``(B, n_in, C)`` to ``(B, n_out, C)``.

    .. math:: Z' = \mathrm{diag}(m)\,(\mathrm{MSA}(Z) + Z), \qquad Z_{out} = \mathrm{MLP}(Z') + Z'

    They are exactly what the whole block gives for these rows: queries, residual and MLP see n_out rows, keys and
    values all n_in. Where nothing is dropped the block itself runs.

    Source: Tang et al. (CVPR 2022), section 3; that keys come from all alive rows is the reading [D] consistent with
    the paper's diag(m) P.
    """
    if n_out == x.shape[1]:
        return block(x)
    attended = slim_attention(block.attn, block.norm1(x), n_out)
    x = x[:, :n_out]
    if isinstance(block, lvvit.Block):
        x = torch.add(x, block.drop_path(attended), alpha=block.alpha)
        return torch.add(x, block.drop_path(block.mlp(block.norm2(x))), alpha=block.alpha)
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def embed_tokens(model: Any, images: Tensor) -> Tensor:
    """Images to the tokens ``(B, 1+N, C)`` before the first block, class token first."""
    if isinstance(model, LVViT):
        return model.embed(images)
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def with_class(order: Tensor) -> Tensor:
    """Patch positions ``(..., N)`` to rows of the tokens ``(..., 1+N)``, the class token's before them."""
    return torch.cat((order.new_zeros(*order.shape[:-1], 1), order + 1), dim=-1)


def check_model(model: Any) -> None:
    """TypeError or ValueError in words where slim blocks would not compute what the model does."""
    if model.num_prefix_tokens != 1 or model.cls_token is None:
        raise ValueError(
            f"Patch Slimming needs a class token and nothing else before the patches, but the model has"
            f" {model.num_prefix_tokens} such tokens (register or distillation tokens, or no class token)"
        )
    if isinstance(model, VisionTransformer):
        if model.global_pool != "token":
            raise ValueError(f"Patch Slimming classifies by the class token, but global_pool={model.global_pool!r}")
        if model.dynamic_img_size:
            raise ValueError("Patch Slimming needs a fixed grid, but the model has dynamic_img_size=True")
        if not isinstance(model.patch_drop, nn.Identity):
            raise ValueError("Patch Slimming needs every patch, but the model has a patch_drop_rate")
    for i, block in enumerate(model.blocks):
        if type(block) not in (vision_transformer.Block, lvvit.Block):
            raise TypeError(f"Patch Slimming knows timm's Block and LV-ViT's, but block {i} is {type(block).__name__}")
        Attention.from_timm(block.attn)  # raises for another attention
        if not isinstance(block.attn.qkv, nn.Linear):
            raise TypeError(
                f"Patch Slimming slices qkv, a Linear, but in block {i} it is {type(block.attn.qkv).__name__}"
            )


def rows_of(x: Tensor, order: Tensor) -> Tensor:
    """The tokens ``(B, 1+N, C)``, class token first, in an order of the patches, ``(N,)`` or ``(B, N)``."""
    rows = with_class(order).expand(x.shape[0], -1)
    return x.gather(1, rows.unsqueeze(2).expand(-1, -1, x.shape[2]))


def run_dense(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
