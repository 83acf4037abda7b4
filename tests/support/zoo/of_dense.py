"""Models of transformers that make maps of what a backbone gives: depth, masks, poses; and timm's within them."""

from functools import partial
from typing import Any

import timm
import transformers
from torch import nn

from support.zoo.entry import PATCH, SIDE, Entry, drawn
from support.zoo.of_pairs import Line
from support.zoo.of_transformers import SIZES, built, pixels, prompted

#: heads that take four layers
FOUR: dict[str, Any] = dict(SIZES, num_hidden_layers=4)
NECK: dict[str, Any] = dict(neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=8)
STAGES = dict(out_features=["stage1", "stage2", "stage3", "stage4"])


def dpt(kind: str) -> nn.Module:
    return built(kind, **FOUR, **NECK, backbone_out_indices=[0, 1, 2, 3])


def on_dinov2(kind: str, **given: Any) -> nn.Module:
    tower = dict(FOUR, model_type="dinov2", reshape_hidden_states=False, **STAGES)
    return built(kind, backbone_config=tower, patch_size=PATCH, **{**NECK, **given})


def zoe() -> nn.Module:
    tower = dict(FOUR, model_type="beit", use_relative_position_bias=True, reshape_hidden_states=False, **STAGES)
    bins = dict(bottleneck_features=8, num_relative_features=8, bin_embedding_dim=8, num_attractors=[2, 2, 2, 2])
    return built("ZoeDepthForDepthEstimation", backbone_config=tower, backbone_hidden_size=32, **bins, **NECK)


def uper(model_type: str) -> nn.Module:
    tower = dict(FOUR, model_type=model_type, **STAGES)
    return built("UperNetForSemanticSegmentation", backbone_config=tower, hidden_size=8, use_auxiliary_head=False)


def pose() -> nn.Module:
    tower = dict(
        SIZES,
        model_type="vitpose_backbone",
        image_size=(SIDE, SIDE),
        patch_size=(8, 8),
        out_features=["stage3"],
    )
    return built("VitPoseForPoseEstimation", backbone_config=tower, num_labels=3)


def matting() -> nn.Module:
    tower = dict(
        SIZES,
        model_type="vitdet",
        num_channels=4,
        image_size=64,
        patch_size=16,
        pretrain_image_size=64,
        out_features=["stage3"],
    )
    return built("VitMatteForImageMatting", backbone_config=tower, hidden_size=32, fusion_hidden_sizes=[8, 8, 8, 8])


def sam() -> nn.Module:
    return built(
        "SamModel",
        vision_config=dict(SIZES, window_size=2, global_attn_indexes=[2], output_channels=16, num_pos_feats=8),
        prompt_encoder_config=dict(hidden_size=16, image_size=SIDE, patch_size=8, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16),
    )


def wrapped(kind: str, name: str = "vit_base_patch16_224", **given: Any) -> nn.Module:
    """timm's models as transformers' own."""
    args = dict(img_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    config = transformers.TimmWrapperConfig(architecture=name, model_args=args, **given)
    return getattr(transformers, kind)(config)


def timm_backbone() -> nn.Module:
    config = transformers.TimmBackboneConfig(backbone="test_vit", out_indices=[0, 2])
    model = transformers.TimmBackbone(config)
    args = dict(img_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model._backbone = timm.create_model("vit_base_patch16_224", features_only=True, out_indices=[0, 2], **args)
    return model


LINES: list[Line] = [
    ("DPTModel", partial(dpt, "DPTModel"), pixels, ()),
    ("DPTForDepthEstimation", partial(dpt, "DPTForDepthEstimation"), pixels, ()),
    ("DPTForSemanticSegmentation", partial(dpt, "DPTForSemanticSegmentation"), pixels, ()),
    ("DPTForDepthEstimation, Dinov2Backbone", partial(on_dinov2, "DPTForDepthEstimation"), pixels, ()),
    (
        "DepthAnythingForDepthEstimation",
        partial(
            on_dinov2,
            "DepthAnythingForDepthEstimation",
            reassemble_hidden_size=32,
            depth_estimation_type="metric",
            fusion_hidden_size=16,
            head_hidden_size=16,
        ),
        pixels,
        (),
    ),
    (
        "PromptDepthAnythingForDepthEstimation",
        partial(
            on_dinov2,
            "PromptDepthAnythingForDepthEstimation",
            reassemble_hidden_size=32,
            depth_estimation_type="metric",
        ),
        pixels,
        (),
    ),
    ("ZoeDepthForDepthEstimation", zoe, pixels, ("predicted_depth",)),
    ("UperNetForSemanticSegmentation, Dinov2Backbone", partial(uper, "dinov2"), pixels, ()),
    ("UperNetForSemanticSegmentation, BeitBackbone", partial(uper, "beit"), pixels, ()),
    ("VitPoseForPoseEstimation", pose, pixels, ()),
    ("VitMatteForImageMatting", matting, lambda: {"pixel_values": drawn(4, 64, 64)}, ()),
    ("SamModel", sam, lambda: {**pixels(), "input_points": 8 + drawn(1, 1, 2)}, ("pred_masks", "iou_scores")),
    (
        "SegGptForImageSegmentation",
        partial(
            built,
            "SegGptForImageSegmentation",
            **dict(
                SIZES,
                image_size=[2 * SIDE, SIDE],
                pretrain_image_size=SIDE,
                intermediate_hidden_state_indices=[2],
                merge_index=0,
            ),
        ),
        prompted,
        ("pred_masks",),
    ),
    (
        "EomtForUniversalSegmentation",
        partial(
            built,
            "EomtForUniversalSegmentation",
            **dict(SIZES, num_blocks=1, num_queries=3, num_register_tokens=2, num_upscale_blocks=1),
        ),
        pixels,
        ("masks_queries_logits", "class_queries_logits"),
    ),
    (
        "BeitForSemanticSegmentation",
        partial(
            built,
            "BeitForSemanticSegmentation",
            **dict(SIZES, num_hidden_layers=4, out_indices=[0, 1, 2, 3], use_auxiliary_head=False),
        ),
        pixels,
        (),
    ),
    ("TimmWrapperModel", partial(wrapped, "TimmWrapperModel"), pixels, ()),
    ("TimmWrapperForImageClassification", partial(wrapped, "TimmWrapperForImageClassification"), pixels, ()),
    ("TimmBackbone", timm_backbone, pixels, ()),
]


def entries() -> list[Entry]:
    made = []
    for name, make, inputs, results in LINES:
        blocks = 4 if any(word in name for word in ("DPT", "Depth", "UperNet", "ForSemanticSegmentation")) else 3
        made.append(Entry("transformers", name, make, inputs, results=results, blocks=blocks))
    return made
