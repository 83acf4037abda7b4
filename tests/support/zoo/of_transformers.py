"""The vision models of transformers by themselves: encoders, their heads, backbones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support.zoo.entry import BATCH, FRAMES, GRID, PACKED, PATCH, SIDE, STAGES, Entry, drawn, images

DIVIDED = "its blocks take every place of all frames, and every frame, in turn"
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=SIDE,
    patch_size=PATCH,
)


def built(name: str, **given: Any) -> nn.Module:
    """A class with a configuration of its own kind."""
    kind: Any = getattr(transformers, name)
    return kind(kind.config_class(**given))


pixels = partial(images, "pixel_values")
BACKBONE = dict(out_features=["stage1", "stage3"])


def videos(frames: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": drawn(frames, 3, SIDE, SIDE)}


def masked() -> dict[str, Tensor]:
    return {**pixels(), "bool_masked_pos": torch.arange(16).expand(BATCH, -1) % 3 == 0}


def noisy() -> dict[str, Tensor]:
    """MAE's order of patches is drawn, unless it is given."""
    return {**pixels(), "noise": torch.rand(BATCH, 16, generator=torch.Generator().manual_seed(5))}


def naflex(second: tuple[int, int] = (4, 4)) -> dict[str, Tensor]:
    """SigLIP 2's packed patches: the second image has a grid of its own, and padding behind it."""
    shapes = torch.tensor([[4, 4], second])
    mask = (torch.arange(16) < shapes.prod(dim=1, keepdim=True)).long()
    patches = drawn(16, 3 * PATCH * PATCH) * mask[..., None]
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def spectrograms() -> dict[str, Tensor]:
    return {"input_values": drawn(SIDE, SIDE)}


def prompted() -> dict[str, Tensor]:
    """SegGPT's image, and an example of what is asked for."""
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: drawn(3, SIDE, SIDE, seed=i) for i, name in enumerate(names)}


#: class, what its configuration has beside the sizes, inputs, what is special
Line = tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]], str]
LINES: list[Line] = [
    ("ViTModel", {}, pixels, ""),
    ("ViTModel", dict(attn_implementation="eager"), pixels, "eager attention"),
    ("ViTForImageClassification", {}, pixels, ""),
    ("ViTForMaskedImageModeling", dict(encoder_stride=8), masked, ""),
    ("DeiTModel", {}, pixels, ""),
    ("DeiTForImageClassification", {}, pixels, ""),
    ("DeiTForImageClassificationWithTeacher", {}, pixels, ""),
    ("DeiTForMaskedImageModeling", dict(encoder_stride=8), masked, ""),
    ("Dinov2Model", {}, pixels, ""),
    ("Dinov2Model", dict(use_swiglu_ffn=True), pixels, "SwiGLU"),
    ("Dinov2ForImageClassification", {}, pixels, ""),
    ("Dinov2Backbone", BACKBONE, pixels, ""),
    ("Dinov2WithRegistersModel", dict(num_register_tokens=2), pixels, ""),
    ("Dinov2WithRegistersForImageClassification", dict(num_register_tokens=2), pixels, ""),
    ("Dinov2WithRegistersBackbone", dict(num_register_tokens=2, **BACKBONE), pixels, ""),
    ("DINOv3ViTModel", dict(num_register_tokens=2), pixels, ""),
    ("DINOv3ViTModel", dict(num_register_tokens=2, use_gated_mlp=True), pixels, "gated MLP"),
    ("DINOv3ViTBackbone", dict(num_register_tokens=2, **BACKBONE), pixels, ""),
    ("IJepaModel", {}, pixels, ""),
    ("IJepaForImageClassification", {}, pixels, ""),
    ("ViTMSNModel", {}, pixels, ""),
    ("ViTMSNForImageClassification", {}, pixels, ""),
    ("ViTMAEModel", dict(mask_ratio=0.0), noisy, "every patch"),
    ("ViTMAEModel", dict(mask_ratio=0.5), noisy, "half of the patches"),
    (
        "ViTMAEForPreTraining",
        dict(
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
        ),
        noisy,
        "",
    ),
    ("BeitModel", {}, pixels, ""),
    ("BeitModel", dict(use_relative_position_bias=True), pixels, "relative position bias"),
    ("BeitModel", dict(use_shared_relative_position_bias=True), pixels, "shared relative position bias"),
    ("BeitModel", dict(use_absolute_position_embeddings=True), pixels, "absolute positions"),
    ("BeitForImageClassification", dict(use_relative_position_bias=True), pixels, ""),
    ("BeitForMaskedImageModeling", dict(vocab_size=9, use_mask_token=True), masked, ""),
    ("BeitBackbone", BACKBONE, pixels, ""),
    ("Data2VecVisionModel", {}, pixels, ""),
    ("Data2VecVisionForImageClassification", dict(use_relative_position_bias=True), pixels, ""),
    ("CLIPVisionModel", {}, pixels, ""),
    ("CLIPVisionModelWithProjection", dict(projection_dim=8), pixels, ""),
    ("MetaClip2VisionModel", {}, pixels, ""),
    ("MetaClip2VisionModelWithProjection", dict(projection_dim=8), pixels, ""),
    ("ChineseCLIPVisionModel", {}, pixels, ""),
    ("AltCLIPVisionModel", {}, pixels, ""),
    ("CLIPSegVisionModel", {}, pixels, ""),
    ("SiglipVisionModel", {}, pixels, ""),
    ("SiglipVisionModel", dict(vision_use_head=False), pixels, "no head"),
    ("Siglip2VisionModel", dict(num_patches=16), naflex, "one grid"),
    ("Siglip2VisionModel", dict(num_patches=16), partial(naflex, (2, 6)), "grids of their own"),
    ("OwlViTVisionModel", {}, pixels, ""),
    ("Owlv2VisionModel", {}, pixels, ""),
    ("BlipVisionModel", {}, pixels, ""),
    ("Blip2VisionModel", {}, pixels, ""),
    ("InstructBlipVisionModel", {}, pixels, ""),
    ("InstructBlipVideoVisionModel", {}, pixels, ""),
    ("Idefics3VisionTransformer", {}, pixels, ""),
    ("SmolVLMVisionTransformer", {}, pixels, ""),
    ("InternVLVisionModel", {}, pixels, ""),
    ("InternVLVisionModel", dict(use_qk_norm=True, norm_type="rms_norm"), pixels, "qk_norm"),
    ("GitVisionModel", {}, pixels, ""),
    ("PixioModel", dict(n_cls_tokens=2), pixels, ""),
    ("PixioBackbone", dict(n_cls_tokens=2, **BACKBONE), pixels, ""),
    ("Tipsv2VisionModel", {}, pixels, ""),
    ("Tipsv2VisionBackbone", BACKBONE, pixels, ""),
    ("MLCDVisionModel", {}, pixels, ""),
    ("Aimv2VisionModel", {}, pixels, ""),
    ("PixtralVisionModel", {}, pixels, ""),
    ("JanusVisionModel", dict(projection_dim=32), pixels, ""),
    ("ASTModel", dict(num_mel_bins=SIDE, max_length=SIDE, frequency_stride=8, time_stride=8), spectrograms, ""),
    (
        "ASTForAudioClassification",
        dict(num_mel_bins=SIDE, max_length=SIDE, frequency_stride=8, time_stride=8),
        spectrograms,
        "",
    ),
    ("VideoMAEModel", dict(num_frames=2, tubelet_size=2), videos, "16 tubes"),
    ("VideoMAEModel", dict(num_frames=4, tubelet_size=2), partial(videos, 4), "32 tubes"),
    ("VideoMAEForVideoClassification", dict(num_frames=4, tubelet_size=2), partial(videos, 4), ""),
    ("VivitModel", dict(num_frames=4, tubelet_size=[2, PATCH, PATCH]), partial(videos, 4), ""),
    ("VivitForVideoClassification", dict(num_frames=4, tubelet_size=[2, PATCH, PATCH]), partial(videos, 4), ""),
    ("TimesformerModel", dict(num_frames=2), videos, ""),
    ("TimesformerModel", dict(num_frames=2, attention_type="space_only"), videos, "space_only"),
    ("TimesformerModel", dict(num_frames=2, attention_type="joint_space_time"), videos, "joint_space_time"),
    ("TimesformerForVideoClassification", dict(num_frames=2), videos, ""),
    (
        "VJEPA2Model",
        dict(
            crop_size=SIDE, frames_per_clip=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1
        ),
        lambda: {"pixel_values_videos": drawn(2, 3, SIDE, SIDE)},
        "",
    ),
    ("YolosModel", dict(image_size=[SIDE, SIDE], num_detection_tokens=3), pixels, ""),
    ("YolosForObjectDetection", dict(image_size=[SIDE, SIDE], num_detection_tokens=3), pixels, ""),
    ("VitPoseBackbone", dict(image_size=(SIDE, SIDE), patch_size=(PATCH, PATCH), **BACKBONE), pixels, ""),
    ("VitDetModel", dict(pretrain_image_size=SIDE), pixels, "global attention"),
    ("VitDetModel", dict(pretrain_image_size=SIDE, window_size=2, window_block_indices=[0, 1]), pixels, "windows"),
    (
        "VitDetModel",
        dict(pretrain_image_size=SIDE, use_relative_position_embeddings=True),
        pixels,
        "relative positions",
    ),
    ("VitDetBackbone", dict(pretrain_image_size=SIDE, **BACKBONE), pixels, ""),
    ("SamVisionModel", dict(window_size=2, global_attn_indexes=[2], output_channels=8), pixels, ""),
    ("SamHQVisionModel", dict(window_size=2, global_attn_indexes=[2], output_channels=8), pixels, ""),
    ("Sam3ViTModel", dict(pretrain_image_size=SIDE, window_size=2, global_attn_indexes=[2]), pixels, ""),
    (
        "GroupViTVisionModel",
        dict(depths=[1, 1, 1], num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 2]),
        pixels,
        "",
    ),
    ("XCLIPVisionModel", dict(mit_hidden_size=32, num_frames=2), pixels, ""),
    ("FlavaImageModel", {}, pixels, ""),
    (
        "SegGptModel",
        dict(
            image_size=[2 * SIDE, SIDE], pretrain_image_size=SIDE, intermediate_hidden_state_indices=[2], merge_index=0
        ),
        prompted,
        "",
    ),
    (
        "LwDetrViTBackbone",
        dict(pretrain_image_size=SIDE, num_windows=4, window_block_indices=[0], **BACKBONE),
        pixels,
        "",
    ),
    ("Sapiens2Model", dict(num_register_tokens=2, num_key_value_attention_heads=1), pixels, ""),
    (
        "VideoPrismVisionModel",
        dict(num_frames=2, tubelet_size=(1, PATCH, PATCH), num_spatial_layers=3, num_temporal_layers=1),
        lambda: {"pixel_values_videos": drawn(2, 3, SIDE, SIDE)},
        "",
    ),
    (
        "Phi4MultimodalVisionModel",
        dict(crop_size=SIDE),
        lambda: {**pixels(), "patch_attention_mask": torch.ones(BATCH, 4, 4, dtype=torch.bool)},
        "",
    ),
    ("MgpstrModel", dict(image_size=[SIDE, SIDE]), pixels, ""),
]

#: what a patch has to refuse, by the reason
REFUSED: dict[str, str] = {
    STAGES: """
SwinModel SwinForImageClassification SwinBackbone Swinv2Model HieraModel HieraForImageClassification MobileViTModel
MobileViTV2Model PvtModel PvtV2Model CvtModel LevitModel LevitForImageClassification PoolFormerModel SegformerModel
SwiftFormerModel DonutSwinModel Sam2HieraDetModel
""",
    GRID: "BitModel ResNetModel ConvNextModel EfficientNetModel DetrModel",
    "": "Llama4VisionModel MllamaVisionModel",
}
#: the same of those that have a small form
NOTES = {
    "GroupViTVisionModel": "it merges patches by itself, into groups that it learns",
    "TimesformerModel": DIVIDED,
    "TimesformerForVideoClassification": DIVIDED,
    "VideoPrismVisionModel": DIVIDED,
    "XCLIPVisionModel": FRAMES,
    "PixtralVisionModel": PACKED,
    "Sam3ViTModel": GRID,
}


def entries() -> list[Entry]:
    made = []
    for kind, given, inputs, special in LINES:
        name = f"{kind}, {special}".strip(", ")
        doubled = given.get("num_frames") == 4 or kind.startswith("SegGpt")
        make = partial(built, kind, **{**SIZES, **given})
        results = ("last_hidden_state",) if kind == "JanusVisionModel" else ()  # what it pools is its first patch
        patches = 32 if doubled else 16
        note = NOTES.get(name, "")
        made.append(Entry("transformers", name, make, inputs, patches=patches, results=results, note=note))
    for note, names in REFUSED.items():
        made += [Entry("transformers", n, partial(built, n), pixels, bare=True, note=note) for n in names.split()]
    return made
