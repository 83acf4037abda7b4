"""Language models of transformers behind a tower."""

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support.zoo.entry import BATCH, GRID, JOINT, PACKED, SIDE, STAGES, Entry, drawn, words
from support.zoo.of_pairs import LOGITS, TEXT, Line, paired
from support.zoo.of_transformers import SIZES, built, pixels

#: the token that stands for a piece of an image
PLACE = 5


def told(places: int, pictures: Tensor | None = None, **more: Tensor) -> dict[str, Any]:
    """A prompt with places for an image, and the image."""
    ids = torch.full((BATCH, places + 2), PLACE)
    ids[:, 0], ids[:, -1] = 7, 8
    pictures = pixels()["pixel_values"] if pictures is None else pictures
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures, **more}


def as_many(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompt with as many places as there are image tokens."""
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    features = getattr(features, "pooler_output", features)
    features = torch.stack(list(features)) if isinstance(features, (list, tuple)) else features
    batch = len(inputs["input_ids"])
    fresh = told(features.numel() // features.shape[-1] // batch)
    made = {name: fresh[name][:batch] for name in ("input_ids", "attention_mask")}
    if "token_type_ids" in inputs:
        made["token_type_ids"] = torch.zeros_like(made["input_ids"])
    return {**inputs, **made}


def llama(**more: Any) -> dict[str, Any]:
    return dict(TEXT, model_type="llama", **more)


def clip_tower(**more: Any) -> dict[str, Any]:
    return dict(SIZES, model_type="clip_vision_model", projection_dim=16, **more)


def siglip_tower(**more: Any) -> dict[str, Any]:
    return dict(SIZES, model_type="siglip_vision_model", vision_use_head=False, **more)


def language(kind: str, vision: dict[str, Any], text: dict[str, Any] | None = None, **given: Any) -> nn.Module:
    ids = dict(image_token_id=PLACE, image_token_index=PLACE, pad_token_id=0)
    return built(kind, vision_config=vision, text_config=llama() if text is None else text, **ids, **given)


def queried(kind: str) -> nn.Module:
    """BLIP-2 and InstructBLIP: what takes the tower is a Q-Former."""
    former = dict(TEXT, cross_attention_frequency=1, encoder_hidden_size=32)
    text = dict(TEXT, model_type="opt", word_embed_proj_dim=32, ffn_dim=32)
    return built(
        kind,
        vision_config=SIZES,
        qformer_config=former,
        text_config=text,
        num_query_tokens=3,
        image_token_index=PLACE,
        image_text_hidden_size=8,
    )


def queries() -> dict[str, Any]:
    given = told(3)
    return {**given, "qformer_input_ids": words()["input_ids"], "qformer_attention_mask": words()["attention_mask"]}


LINES: list[Line] = [
    ("Blip2Model", partial(queried, "Blip2Model"), partial(told, 3), ("logits",)),
    ("Blip2ForConditionalGeneration", partial(queried, "Blip2ForConditionalGeneration"), partial(told, 3), LOGITS),
    ("InstructBlipForConditionalGeneration", partial(queried, "InstructBlipForConditionalGeneration"), queries, LOGITS),
    (
        "LlavaForConditionalGeneration, CLIP",
        partial(language, "LlavaForConditionalGeneration", clip_tower()),
        partial(told, 16),
        LOGITS,
    ),
    (
        "LlavaForConditionalGeneration, SigLIP",
        partial(
            language,
            "LlavaForConditionalGeneration",
            siglip_tower(),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        partial(told, 16),
        LOGITS,
    ),
    (
        "VipLlavaForConditionalGeneration",
        partial(language, "VipLlavaForConditionalGeneration", clip_tower(), vision_feature_layers=[-2, -1]),
        partial(told, 16),
        LOGITS,
    ),
    (
        "LlavaNextForConditionalGeneration",
        partial(language, "LlavaNextForConditionalGeneration", clip_tower(), image_grid_pinpoints=[[SIDE, SIDE]]),
        lambda: told(36, drawn(2, 3, SIDE, SIDE), image_sizes=torch.full((2, 2), SIDE)),
        LOGITS,
    ),
    (
        "LlavaOnevisionForConditionalGeneration",
        partial(
            language, "LlavaOnevisionForConditionalGeneration", siglip_tower(), image_grid_pinpoints=[[SIDE, SIDE]]
        ),
        lambda: told(36, drawn(2, 3, SIDE, SIDE), image_sizes=torch.full((2, 2), SIDE)),
        LOGITS,
    ),
    (
        "PaliGemmaForConditionalGeneration",
        partial(
            language,
            "PaliGemmaForConditionalGeneration",
            siglip_tower(),
            dict(TEXT, model_type="gemma"),
            projection_dim=32,
        ),
        lambda: told(16, token_type_ids=torch.zeros(BATCH, 18).long()),
        LOGITS,
    ),
    (
        "Gemma3ForConditionalGeneration",
        partial(
            language,
            "Gemma3ForConditionalGeneration",
            siglip_tower(),
            dict(TEXT, model_type="gemma3_text"),
            mm_tokens_per_image=4,
        ),
        lambda: told(4, token_type_ids=torch.zeros(BATCH, 6).long()),
        LOGITS,
    ),
    (
        "Idefics2ForConditionalGeneration",
        partial(
            language,
            "Idefics2ForConditionalGeneration",
            SIZES,
            dict(TEXT, model_type="mistral"),
            perceiver_config=dict(
                hidden_size=32,
                resampler_n_latents=2,
                resampler_depth=1,
                resampler_n_heads=2,
                resampler_head_dim=16,
                num_key_value_heads=1,
            ),
        ),
        lambda: told(2, drawn(1, 3, SIDE, SIDE)),
        LOGITS,
    ),
    (
        "Idefics3ForConditionalGeneration",
        partial(language, "Idefics3ForConditionalGeneration", SIZES, scale_factor=2),
        lambda: told(4, drawn(1, 3, SIDE, SIDE)),
        LOGITS,
    ),
    (
        "SmolVLMForConditionalGeneration",
        partial(language, "SmolVLMForConditionalGeneration", SIZES, scale_factor=2),
        lambda: told(4, drawn(1, 3, SIDE, SIDE)),
        LOGITS,
    ),
    (
        "InternVLForConditionalGeneration",
        partial(
            language,
            "InternVLForConditionalGeneration",
            dict(SIZES, model_type="internvl_vision", image_size=(SIDE, SIDE), patch_size=(8, 8)),
        ),
        partial(told, 4),
        LOGITS,
    ),
    (
        "AyaVisionForConditionalGeneration",
        partial(
            language,
            "AyaVisionForConditionalGeneration",
            siglip_tower(),
            dict(TEXT, model_type="cohere2"),
            downsample_factor=2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        partial(told, 4),
        LOGITS,
    ),
    (
        "Cohere2VisionForConditionalGeneration",
        partial(
            language,
            "Cohere2VisionForConditionalGeneration",
            siglip_tower(),
            dict(TEXT, model_type="cohere2"),
            downsample_factor=2,
        ),
        partial(told, 4),
        LOGITS,
    ),
    (
        "JanusForConditionalGeneration",
        lambda: built(
            "JanusForConditionalGeneration",
            vision_config=dict(SIZES, projection_dim=32),
            text_config=llama(),
            vq_config=dict(
                base_channels=32,
                embed_dim=8,
                num_embeddings=8,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                projection_dim=32,
                image_token_embed_dim=32,
            ),
            image_token_id=PLACE,
        ),
        partial(told, 16),
        LOGITS,
    ),
    (
        "DeepseekVLForConditionalGeneration",
        partial(language, "DeepseekVLForConditionalGeneration", siglip_tower()),
        partial(told, 16),
        LOGITS,
    ),
    (
        "Mistral3ForConditionalGeneration",
        partial(
            language,
            "Mistral3ForConditionalGeneration",
            dict(SIZES, model_type="pixtral"),
            dict(TEXT, model_type="mistral"),
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        lambda: told(4, image_sizes=torch.full((2, 2), SIDE)),
        LOGITS,
    ),
    (
        "PerceptionLMForConditionalGeneration",
        lambda: built(
            "PerceptionLMForConditionalGeneration",
            vision_config=dict(
                architecture="vit_pe_core_base_patch16_224",
                model_args=dict(
                    img_size=[SIDE, SIDE],
                    patch_size=8,
                    embed_dim=32,
                    depth=3,
                    num_heads=2,
                    global_pool="",
                    use_post_transformer_norm=False,
                ),
                num_classes=0,
            ),
            text_config=llama(),
            vision_use_cls_token=True,
            projector_pooling_ratio=2,
            image_token_id=PLACE,
        ),
        lambda: told(4, drawn(1, 3, SIDE, SIDE)),
        LOGITS,
    ),
    ("GitForCausalLM", partial(built, "GitForCausalLM", vision_config=SIZES, **TEXT), paired, LOGITS),
    (
        "Kosmos2Model",
        partial(
            built,
            "Kosmos2Model",
            text_config=dict(
                vocab_size=64, embed_dim=32, layers=1, ffn_dim=32, attention_heads=2, max_position_embeddings=96
            ),
            vision_config=SIZES,
            latent_query_num=3,
        ),
        lambda: {**told(3), "image_embeds_position_mask": told(3)["input_ids"] == PLACE},
        ("last_hidden_state",),
    ),
    (
        "VisionEncoderDecoderModel, ViT",
        lambda: transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                transformers.ViTConfig(**SIZES),
                transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True),
            )
        ),
        lambda: {**pixels(), "decoder_input_ids": words()["input_ids"]},
        LOGITS,
    ),
]

#: those whose language model takes as many image tokens as are left
COUNTING = ("LlavaFor", "PaliGemma", "DeepseekVL")
#: what a patch has to refuse, by the reason
REFUSED: dict[str, str] = {
    PACKED: "Glm4vModel",
    STAGES: "Florence2Model Mask2FormerModel",
    GRID: "AlignVisionModel GotOcr2Model",
    JOINT: "LayoutLMv3Model",
    "": "Pix2StructVisionModel",
}


def entries() -> list[Entry]:
    made = []
    for name, make, inputs, results in LINES:
        fit = as_many if name.startswith(COUNTING) else None
        note = PACKED if name.startswith("Mistral3") else ""
        made.append(Entry("transformers", name, make, inputs, results=results, fit=fit, note=note))
    for note, names in REFUSED.items():
        made += [Entry("transformers", n, partial(built, n), pixels, bare=True, note=note) for n in names.split()]
    return made
