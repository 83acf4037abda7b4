"""The architectures of timm: one small model of every kind of vision transformer and of every option that matters."""

from functools import partial
from typing import Any

import timm
import torch
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from support.zoo.entry import FIXED, GRID, PATCH, SIDE, STAGES, STREAMS, Entry, drawn, images

SIZES: dict[str, Any] = dict(img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=3, num_heads=2, num_classes=5)

#: those that take these sizes: each has other parts, other parameters or another way to pool than those before it
PLAIN = """
vit_base_patch16_224 vit_base_patch16_gap_224 vit_base_patch16_224_miil vit_base_patch16_siglip_224
vit_base_patch16_siglip_gap_224 vit_base_patch16_clip_224 vit_base_patch16_clip_quickgelu_224 vit_base_patch32_plus_256
vit_base_patch14_dinov2 vit_base_patch14_reg4_dinov2 vit_giant_patch14_dinov2 vit_giant_patch14_reg4_dinov2
vit_base_patch14_reg1_tipsv2 vit_giant_patch14_reg1_tipsv2 vit_base_patch16_rpn_224 vit_base_patch16_xp_224
vit_base_patch16_18x2_224 vit_base_patch16_reg4_gap_256 vit_betwixt_patch16_gap_256 vit_betwixt_patch16_reg1_gap_256
vit_betwixt_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256 vit_dlittle_patch16_reg1_gap_256
vit_dpwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_256
vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_siglip_224 vit_intern300m_patch14_448
vit_base_patch16_radio_v3 vit_giant_patch16_radio_v3 vit_huge_patch16_radio_v4 aimv2_1b_patch14_224
beit3_base_patch16_224 eva_large_patch14_196 flexivit_base test_vit test_vit2 test_vit3 test_vit4
deit_base_patch16_224 deit_base_distilled_patch16_224 deit3_base_patch16_224
eva_giant_patch14_224 eva_giant_patch14_clip_224 eva02_base_patch14_224 eva02_small_patch14_224
eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224 vit_base_patch16_rope_224 vit_base_patch16_rope_ape_224
vit_base_patch16_rope_mixed_224 vit_base_patch16_rope_mixed_ape_224 vit_base_patch16_rope_reg1_gap_256
vit_betwixt_patch16_rope_reg4_gap_256 vit_mediumd_patch16_rope_reg1_gap_256 vit_base_patch16_dinov3
vit_base_patch16_dinov3_qkvb vit_7b_patch16_dinov3 vit_huge_plus_patch16_dinov3_qkvb vit_base_patch16_lingbot
vit_giant_patch16_lingbot vit_pe_core_base_patch16_224 vit_pe_core_gigantic_patch14_448 vit_pe_lang_large_patch14_448
vit_pe_lang_gigantic_patch14_448 vit_pe_spatial_base_patch16_512
beit_base_patch16_224 beitv2_base_patch16_224 vit_relpos_base_patch16_224 vit_relpos_base_patch16_cls_224
vit_relpos_base_patch16_clsgap_224 vit_relpos_base_patch16_rpn_224 vit_relpos_base_patch16_plus_240
vit_relpos_base_patch32_plus_rpn_256 vit_srelpos_medium_patch16_224 test_vit_relpos
samvit_base_patch16 samvit_base_patch16_224 cait_m36_384 convit_base xcit_tiny_12_p8_224
qwen3_vit_88m qwen3_vit_88m_enc qwen3_vit_88m_merge deepseek_vit_412m deepseek_vit_412m_enc
gemma4_vit_167m
""".split()

#: options that timm's users set by themselves
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic_img_size": ("vit_base_patch16_224", dict(dynamic_img_size=True)),
    "dynamic_img_size and dynamic_img_pad": (
        "vit_base_patch16_224",
        dict(dynamic_img_size=True, dynamic_img_pad=True),
    ),
    "qk_norm": ("vit_base_patch16_224", dict(qk_norm=True)),
    "scaled norms": ("vit_base_patch16_224", dict(scale_attn_norm=True, scale_mlp_norm=True)),
    "LayerScale": ("vit_base_patch16_224", dict(init_values=1e-5)),
    "no position embedding": ("vit_base_patch16_224", dict(pos_embed="none")),
    "no head": ("vit_base_patch16_224", dict(num_classes=0)),
    "no pooling": ("vit_base_patch16_224", dict(num_classes=0, global_pool="")),
    "average without prefix": ("vit_base_patch16_224", dict(global_pool="avg")),
    "average with prefix": ("vit_base_patch16_224", dict(global_pool="avg", pool_include_prefix=True)),
    "maximum": ("vit_base_patch16_224", dict(global_pool="max")),
    "average and maximum": ("vit_base_patch16_224", dict(global_pool="avgmax")),
    "dynamic_img_size, rotary": ("vit_base_patch16_rope_224", dict(dynamic_img_size=True)),
}


def small(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{**SIZES, **options})


def features(name: str, **options: Any) -> nn.Module:
    return small(name, features_only=True, num_classes=0, **options)


NAFLEX = """
naflexvit_base_patch16_gap naflexvit_base_patch16_map naflexvit_base_patch16_par_gap naflexvit_base_patch16_parfac_gap
naflexvit_base_patch16_siglip naflexvit_so150m2_patch16_reg1_gap naflexvit_so150m2_patch16_reg1_map
naflexvit_base_patch16_radio_v3 naflexvit_huge_patch16_radio_v4
""".split()


def naflex(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{k: v for k, v in SIZES.items() if k != "img_size"}, **options)


def packed() -> dict[str, Tensor]:
    """Two images as rows of patches, the second of 2 x 6 patches behind which there is padding."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    square = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(6), indexing="ij")
    flat = torch.cat([torch.stack([rows.flatten(), columns.flatten()], dim=-1), torch.zeros(4, 2, dtype=torch.long)])
    valid = torch.arange(16) < torch.tensor([[16], [12]])
    patches = drawn(16, PATCH * PATCH * 3) * valid[..., None]
    return {"x": patches, "patch_coord": torch.stack([square, flat]), "patch_valid": valid}


#: those with sizes of another kind
SMALL: dict[str, dict[str, Any]] = {
    "vit_base_patch16_sapiens2": dict(SIZES, num_kv_heads=1),
    "gemma4_vit_167m_enc": dict(SIZES, global_pool="none"),
    "vit_tiny_r_s16_p8_224": dict(SIZES, patch_size=2),
    "vitamin_small_224": dict(
        SIZES,
        patch_size=1,
        img_size=64,
        embed_cfg=VitCfg(
            embed_dim=(8, 16, 32),
            depths=(1, 1, 1),
            stem_width=8,
            conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        ),
    ),
    "tnt_s_patch16_224": dict(
        img_size=32, patch_size=8, embed_dim=32, inner_dim=8, depth=3, num_heads_outer=2, num_heads_inner=2
    ),
    "tnt_s_legacy_patch16_224": dict(
        img_size=32, patch_size=8, embed_dim=32, inner_dim=8, depth=3, num_heads_outer=2, num_heads_inner=2
    ),
}

#: what a patch has to refuse, by the reason
REFUSED: dict[str, str] = {
    STAGES: """
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 hiera_tiny_224 hiera_small_abswin_256
hieradet_small mvitv2_tiny mvitv2_small_cls pvt_v2_b0 mobilevit_xxs mobilevitv2_050 levit_128s levit_conv_128s nest_tiny
twins_pcpvt_small twins_svt_small coat_tiny coat_lite_tiny poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
davit_tiny maxvit_tiny_tf_224 maxvit_rmlp_nano_rw_256 coatnet_nano_rw_224 efficientformer_l1 efficientformerv2_s0
fastvit_t8 tiny_vit_5m_224 visformer_tiny gcvit_xxtiny edgenext_xx_small focalnet_tiny_srf efficientvit_b0
efficientvit_m0 efficientvim_m1 nextvit_small iformer_t lowformer_b0 shvit_s1 swiftformer_xs repvit_m0_9 mambaout_femto
inception_next_atto csatv2 cpubone_b0_bfrobust convnext_atto convnextv2_atto mobilenetv5_300m botnet26t_256 halonet26t
lambda_resnet26t pit_xs_224 pit_xs_distilled_224 volo_d1_224
""",
    GRID: """
convmixer_768_32 sequencer2d_s resnet18 resnetv2_18 regnety_002 efficientnet_b0 mobilenetv3_small_050
mobilenetv4_conv_small vgg11 densenet121 xception41
""",
    FIXED: "mixer_s16_224 gmixer_12_224 gmlp_ti16_224 resmlp_12_224",
    STREAMS: "crossvit_9_240 crossvit_9_dagger_240",
}
#: the same of those that have a small form
NOTES = {"xcit_tiny_12_p8_224": GRID, "tnt_s_patch16_224": STREAMS, "tnt_s_legacy_patch16_224": STREAMS}


def bare(name: str) -> nn.Module:
    return timm.create_model(name)


def entries() -> list[Entry]:
    made = [Entry("timm", name, partial(small, name), images) for name in PLAIN]
    made += [
        Entry("timm", f"{name}, {what}", partial(small, name, **given), images)
        for what, (name, given) in OPTIONS.items()
    ]
    made += [
        Entry("timm", f"{name}, features_only", partial(features, name), images)
        for name in ("vit_base_patch16_224", "vit_base_patch16_dinov3", "beit_base_patch16_224")
    ]
    made += [Entry("timm", name, partial(naflex, name), images) for name in NAFLEX]
    made += [Entry("timm", f"{name}, packed", partial(naflex, name), packed) for name in NAFLEX]
    made += [
        Entry("timm", name, partial(timm.create_model, name, **given), partial(images, side=given["img_size"]))
        for name, given in SMALL.items()
    ]
    made = [entry._replace(note=NOTES.get(entry.architecture, "")) for entry in made]
    for note, names in REFUSED.items():
        made += [Entry("timm", name, partial(bare, name), images, bare=True, note=note) for name in names.split()]
    return made
