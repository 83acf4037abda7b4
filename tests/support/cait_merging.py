"""Small models of every kind that CAIT merges, and a merge written down with strided slices, for the tests."""

import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import nn

import tokenops
from tokenops.methods import lv_vit
from tokenops.methods.cait.merging import merges_of
from tokenops.nn import neighbour_merging

KINDS = neighbour_merging.KINDS
SMALL = dict(img_size=64, embed_dim=48, num_heads=3, depth=4, num_classes=5)
POINTS = {0: "horizontal", 2: "vertical"}


def _vit(name, **changes):
    return lambda **kwargs: timm.create_model(name, **{**SMALL, **changes, **kwargs})


#: every kind of model that is taken
MODELS = {
    "deit": _vit("deit_tiny_patch16_224"),
    "distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit3": _vit("deit3_small_patch16_224"),
    "registers": _vit("vit_tiny_patch16_224", reg_tokens=2),
    "no prefix": _vit("vit_tiny_patch16_224", class_token=False, global_pool="avg", qk_norm=True),
    "swiglu": _vit("vit_tiny_patch16_224", mlp_layer=SwiGLU),
    "scaled mlp": _vit("vit_tiny_patch16_224", scale_mlp_norm=True),
    "lvvit": lambda **kwargs: lv_vit(**{**SMALL, "skip_lam": 2.0, "mlp_ratio": 3.0, "qkv_bias": False, **kwargs}),
    "no bias": _vit("vit_tiny_patch16_224", proj_bias=False),
}


def lively(module, scale=0.1):
    """Every parameter off its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def dense(name="deit", **kwargs):
    model = lively(MODELS[name](**kwargs)).eval()
    return model


def merged(name="deit", points=POINTS, kind="average", layout="raster", **kwargs):
    """A merged model with merges that have learned something."""
    model = tokenops.apply_patch(dense(name, **kwargs), "cait", points=points, kind=kind, layout=layout)
    lively(nn.ModuleList(merge for merge in merges_of(model) if merge is not None))
    return model


def by_slices(merge, x, axis):
    """A merge by strided slices of (B, H, W, C); a lone last row or column passes through."""
    if axis == "vertical":
        return by_slices(merge, x.transpose(1, 2), "horizontal").transpose(1, 2)
    width = x.shape[2] // 2 * 2
    a, b, lone = x[:, :, 0:width:2], x[:, :, 1:width:2], x[:, :, width:]
    if merge.kind == "average":
        y = (a + b) / 2
    elif merge.kind in ("scalar", "channel"):
        y = merge.alpha * a + merge.beta * b
    elif merge.kind == "linear":
        y = torch.cat((a, b), dim=3) @ merge.linear.weight.T + merge.linear.bias
    else:
        norm = merge.norm
        la, lb = (
            F.layer_norm(t, t.shape[-1:], norm.weight, norm.bias, norm.eps) @ merge.score.weight[0] for t in (a, b)
        )
        share = torch.exp(la) / (torch.exp(la) + torch.exp(lb))
        y = share[..., None] * a + (1 - share[..., None]) * b
    return torch.cat((y, lone), dim=2)
