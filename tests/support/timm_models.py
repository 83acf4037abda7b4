"""Small models of the kinds of blocks that timm, torchvision and open_clip have beside the plain one."""

from functools import partial
from importlib.util import find_spec

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torchvision.models.vision_transformer import VisionTransformer as Torchvision

from support.patched_models import EVA, SIZES
from support.weights import redrawn

VIT = partial(VisionTransformer, **SIZES)
NAFLEX = dict(pos_embed_grid_size=None, patch_size=8, embed_dim=32, depth=3, num_heads=2, fc_norm=True)


def naflex(**kwargs):
    return NaFlexVit(NaFlexVitCfg(**{**NAFLEX, **kwargs}), num_classes=5, img_size=32)


#: 16 patches, 3 blocks; tokens in no place of their own
FREE = {
    "post_norm": partial(VIT, block_fn=ResPostBlock, init_values=0.5),
    "side_by_side": partial(VIT, block_fn=ParallelThingsBlock, init_values=0.5),
    "scaling": partial(VIT, block_fn=ParallelScalingBlock, init_values=0.5, qk_norm=True),
    "scaling_fused": partial(VIT, block_fn=partial(ParallelScalingBlock, fuse_out_proj=True), qkv_bias=False),
    "torchvision": partial(
        Torchvision, image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    ),
    "cait": partial(Cait, init_values=0.5, **SIZES),
    "eva_post": partial(Eva, use_post_norm=True, **dict(EVA, use_rot_pos_emb=False)),
    "naflex": partial(naflex, reg_tokens=2, class_token=False),
    "naflex_class": partial(naflex, class_token=True, global_pool="token", embed_proj_type="conv"),
}
#: those where attention is told where tokens are
PLACED = {
    "beit": partial(Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.5, **SIZES),
    "beit_shared": partial(Beit, use_shared_rel_pos_bias=True, global_pool="token", **SIZES),
    "relpos": partial(VisionTransformerRelPos, init_values=0.5, qk_norm=True, **SIZES),
    "relpos_class": partial(
        VisionTransformerRelPos, class_token=True, global_pool="token", rel_pos_type="bias", **SIZES
    ),
    "relpos_shared": partial(VisionTransformerRelPos, shared_rel_pos=True, rel_pos_dim=8, **SIZES),
    "relpos_post": partial(VisionTransformerRelPos, block_fn=ResPostRelPosBlock, **SIZES),
    "eva_post_rope": partial(Eva, use_post_norm=True, **EVA),
    "dinov3": partial(
        Eva,
        **dict(EVA, num_reg_tokens=4, attn_type="rope", rope_type="dinov3", rope_rotate_half=True),
        dynamic_img_size=True,
        use_abs_pos_emb=False,
        init_values=0.5,
    ),
    "pe": partial(Eva, attn_type="rope", use_pre_transformer_norm=True, global_pool="map", **EVA),
    "rope_bare": partial(Eva, class_token=False, attn_type="rope", rope_type="mixed", **EVA),
    "naflex_rope": partial(naflex, class_token=True, rope_type="axial"),
    "naflex_mixed": partial(naflex, class_token=True, reg_tokens=1, rope_type="mixed"),
}
if find_spec("open_clip") is not None:
    from open_clip.transformer import VisionTransformer as OpenCLIP

    OPEN = partial(OpenCLIP, image_size=32, patch_size=8, width=32, layers=3, heads=2, mlp_ratio=2.0, output_dim=8)
    FREE["open_clip"] = OPEN
    FREE["open_clip_average"] = partial(OPEN, pool_type="avg", ls_init_value=0.5)


def made(family):
    torch.manual_seed(0)
    return redrawn({**FREE, **PLACED}[family]())
