"""What scores and search need of a dense model: its tokens, and blocks of which only the first rows are computed."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...patching.blocks import attend, feed
from ...patching.families import Family
from ...patching.site import is_patched


def slim_block(block: Any, x: Tensor, n_out: int) -> Tensor:
    r"""A transformer block that computes only its first ``n_out`` rows, ``(B, n_in, C)`` to ``(B, n_out, C)``.

    .. math:: Z' = \mathrm{diag}(m)\,(\mathrm{MSA}(Z) + Z), \qquad Z_{out} = \mathrm{MLP}(Z') + Z'

    They are exactly what the whole block gives for these rows: queries, residual and MLP see n_out rows, keys and
    values all n_in. Where nothing is dropped the block itself runs.

    Source: Tang et al. (CVPR 2022), section 3; that keys come from all alive rows is the reading [D] consistent with
    the paper's diag(m) P.
    """
    return block(x) if n_out == x.shape[1] else feed(block, attend(block, x, rows=n_out)[0])


def embed_tokens(model: Any, images: Tensor) -> Tensor:
    """Images to the tokens ``(B, 1+N, C)`` before the first block, class token first."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def with_class(order: Tensor) -> Tensor:
    """Patch positions ``(..., N)`` to rows of the tokens ``(..., 1+N)``, the class token's before them."""
    return torch.cat((order.new_zeros(*order.shape[:-1], 1), order + 1), dim=-1)


def check_model(op: str, model: Any) -> None:
    """TypeError or ValueError in words where scores cannot be computed: the model must be dense, with a class token."""
    if not isinstance(model, VisionTransformer) or is_patched(model):
        raise TypeError(f"{op}: model must be a dense VisionTransformer of timm, but got {type(model).__name__}")
    if model.num_prefix_tokens != 1 or model.cls_token is None:
        raise ValueError(
            f"{op}: there must be a class token and nothing else before the patches, but the model has"
            f" {model.num_prefix_tokens} such tokens (register or distillation tokens, or no class token)"
        )
    if model.global_pool != "token":
        raise ValueError(f"{op}: the model must classify by its class token, but global_pool={model.global_pool!r}")
    if model.dynamic_img_size:
        raise ValueError(f"{op} needs a fixed grid, but the model has dynamic_img_size=True")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(f"{op} needs every patch, but the model has a patch_drop_rate")
    for i, block in enumerate(model.blocks):
        if type(block) is not vision_transformer.Block:
            raise TypeError(f"{op} knows timm's Block, but block {i} is {type(block).__name__}")
        Family.check(block)


def rows_of(x: Tensor, order: Tensor) -> Tensor:
    """The tokens ``(B, 1+N, C)``, class token first, in an order of the patches, ``(N,)`` or ``(B, N)``."""
    rows = with_class(order).expand(x.shape[0], -1)
    return x.gather(1, rows.unsqueeze(2).expand(-1, -1, x.shape[2]))


def run_dense(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
