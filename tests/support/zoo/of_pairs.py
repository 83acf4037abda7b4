"""Models of transformers that see and read: pairs of towers, and encoders of both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn

from support.zoo.entry import FRAMES, JOINT, Entry, words
from support.zoo.of_transformers import SIZES, built, naflex, pixels, videos

TEXT: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=64,
    max_position_embeddings=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    projection_dim=16,
    head_dim=16,
    num_key_value_heads=2,
)


def paired() -> dict[str, Tensor]:
    return {**pixels(), **words()}


def two(kind: str, text: dict[str, Any] = TEXT, vision: dict[str, Any] = SIZES, **given: Any) -> nn.Module:
    return built(kind, text_config=text, vision_config=vision, **{"projection_dim": 16, **given})


def dual() -> nn.Module:
    text = transformers.BertConfig(**TEXT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**SIZES), text, projection_dim=16
    )
    return transformers.VisionTextDualEncoderModel(config)


EMBEDS = ("image_embeds",)
LOGITS = ("logits",)
#: name, model, inputs, results
Line = tuple[str, Callable[[], nn.Module], Callable[[], dict[str, Any]], tuple[str, ...]]
LINES: list[Line] = [
    ("CLIPModel", partial(two, "CLIPModel"), paired, EMBEDS),
    ("CLIPForImageClassification", partial(built, "CLIPForImageClassification", vision_config=SIZES), pixels, ()),
    ("MetaClip2Model", partial(two, "MetaClip2Model"), paired, EMBEDS),
    (
        "MetaClip2ForImageClassification",
        partial(built, "MetaClip2ForImageClassification", vision_config=SIZES),
        pixels,
        (),
    ),
    ("ChineseCLIPModel", partial(two, "ChineseCLIPModel"), paired, EMBEDS),
    ("AltCLIPModel", partial(two, "AltCLIPModel"), paired, EMBEDS),
    ("CLIPSegModel", partial(two, "CLIPSegModel"), paired, EMBEDS),
    (
        "CLIPSegForImageSegmentation",
        partial(
            two,
            "CLIPSegForImageSegmentation",
            extract_layers=[0, 1, 2],
            reduce_dim=8,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=8,
        ),
        paired,
        LOGITS,
    ),
    ("SiglipModel", partial(two, "SiglipModel"), paired, EMBEDS),
    ("SiglipForImageClassification", partial(built, "SiglipForImageClassification", vision_config=SIZES), pixels, ()),
    (
        "Siglip2Model",
        partial(two, "Siglip2Model", vision=dict(SIZES, num_patches=16)),
        lambda: {**naflex(), **words()},
        EMBEDS,
    ),
    (
        "Siglip2ForImageClassification",
        partial(built, "Siglip2ForImageClassification", vision_config=dict(SIZES, num_patches=16)),
        naflex,
        (),
    ),
    ("OwlViTModel", partial(two, "OwlViTModel"), paired, EMBEDS),
    (
        "OwlViTForObjectDetection",
        partial(two, "OwlViTForObjectDetection", projection_dim=32),
        paired,
        ("logits", "pred_boxes"),
    ),
    ("Owlv2Model", partial(two, "Owlv2Model"), paired, EMBEDS),
    (
        "Owlv2ForObjectDetection",
        partial(two, "Owlv2ForObjectDetection", projection_dim=32),
        paired,
        ("logits", "pred_boxes"),
    ),
    ("BlipModel", partial(two, "BlipModel"), paired, EMBEDS),
    ("BlipForConditionalGeneration", partial(two, "BlipForConditionalGeneration"), paired, LOGITS),
    ("BlipForImageTextRetrieval", partial(two, "BlipForImageTextRetrieval"), paired, ("itm_score",)),
    ("Aimv2Model", partial(two, "Aimv2Model"), paired, EMBEDS),
    ("Tipsv2Model", partial(two, "Tipsv2Model"), paired, EMBEDS),
    (
        "XCLIPModel",
        partial(
            two,
            "XCLIPModel",
            vision=dict(
                SIZES,
                mit_hidden_size=32,
                mit_num_hidden_layers=1,
                mit_num_attention_heads=2,
                mit_intermediate_size=32,
                num_frames=2,
            ),
            prompt_num_attention_heads=2,
            projection_dim=32,
        ),
        lambda: {**videos(), **words()},
        ("video_embeds",),
    ),
    (
        "FlavaModel",
        partial(
            built,
            "FlavaModel",
            image_config=SIZES,
            text_config=TEXT,
            multimodal_config=dict(TEXT, vocab_size=None),
            projection_dim=16,
            hidden_size=32,
        ),
        paired,
        ("image_embeddings", "multimodal_embeddings"),
    ),
    ("VisionTextDualEncoderModel", dual, paired, EMBEDS),
    ("ViltModel", partial(built, "ViltModel", **{**TEXT, **SIZES}), paired, ("pooler_output",)),
    (
        "BridgeTowerModel",
        partial(
            built,
            "BridgeTowerModel",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            text_config=dict(TEXT, hidden_size=64),
            vision_config=dict(SIZES, hidden_size=64),
        ),
        paired,
        ("image_features", "pooler_output"),
    ),
]


def entries() -> list[Entry]:
    notes = {"ViltModel": JOINT, "XCLIPModel": FRAMES}
    return [
        Entry("transformers", name, make, inputs, results=results, note=notes.get(name, ""))
        for name, make, inputs, results in LINES
    ]
