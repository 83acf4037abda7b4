"""Small language models of transformers with a vision tower, and processors of a few words for them."""

import numpy
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from support.hf_models import SIZES
from support.weights import redrawn

WORDS = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=20)
SPEAKER = dict(WORDS, num_key_value_heads=1, head_dim=32, bos_token_id=None, eos_token_id=None, pad_token_id=0)
IMAGE = 19
#: the tower, what kind of words, more of the config
SPEAKERS = {
    "Llava": ("clip_vision_model", "llama", {}),
    "VipLlava": ("clip_vision_model", "llama", dict(vision_feature_layer=[-1, -2])),
    "LlavaNext": ("clip_vision_model", "llama", dict(image_grid_pinpoints=[[32, 64]])),
    "LlavaOnevision": ("siglip_vision_model", "qwen2", dict(image_grid_pinpoints=[[32, 64]])),
    "PaliGemma": ("siglip_vision_model", "gemma", dict(hidden_size=32, projection_dim=32)),
    "Gemma3": ("siglip_vision_model", "gemma3_text", dict(mm_tokens_per_image=4)),
    "DeepseekVL": ("siglip_vision_model", "llama", {}),
    "Idefics3": ("idefics3_vision", "llama", dict(scale_factor=2)),
    "SmolVLM": ("smolvlm_vision", "llama", dict(scale_factor=2)),
    "InternVL": ("internvl_vision", "qwen2", dict(downsample_ratio=0.5)),
}


def speaker(name, side=32, vision=None, **more):
    torch.manual_seed(0)
    tower, words, own = SPEAKERS[name]
    vision = {**SIZES, "model_type": tower, "projection_dim": 32, "image_size": side, **(vision or {})}
    if tower == "siglip_vision_model":
        vision["vision_use_head"] = False
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=dict(SPEAKER, model_type=words), image_token_id=IMAGE, **{**own, **more}
    )
    return redrawn(getattr(transformers, f"{name}ForConditionalGeneration")(config))


#: special words of the processors, by the tokenizer's name for them
SPECIAL = dict(
    image_token="<image>",
    context_image_token="<image>",
    boi_token="<boi>",
    eoi_token="<eoi>",
    start_image_token="<img>",
    end_image_token="</img>",
    video_token="<video>",
    fake_image_token="<fake_token_around_image>",
    global_image_token="<global-img>",
    end_of_utterance_token="<end_of_utterance>",
)


def tokenizer():
    names = dict.fromkeys(["<pad>", "<unk>", "<s>", "</s>", *SPECIAL.values()])
    words = [*(name for name in names if name != "<image>"), *"abcdefgh"][:IMAGE]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<image>"])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(names))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=SPECIAL,
    )


def processor(name, side=32):
    """A processor whose number of image tokens is nobody's."""
    square, cut = dict(height=side, width=side), dict(shortest_edge=side)
    words, make = tokenizer(), getattr(transformers, f"{name.removeprefix('Vip')}Processor")
    if name in ("Llava", "VipLlava"):
        return make(transformers.CLIPImageProcessor(size=cut, crop_size=square), words, patch_size=1)
    if name == "LlavaNext":
        images = transformers.LlavaNextImageProcessor(
            size=cut, crop_size=square, image_grid_pinpoints=[[side, 2 * side]]
        )
        return make(images, words, patch_size=1)
    if name == "LlavaOnevision":
        images = transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[side, 2 * side]])
        return make(images, words, transformers.LlavaOnevisionVideoProcessor(), num_image_tokens=1)
    if name == "PaliGemma":
        images = transformers.SiglipImageProcessor(size=square)
        images.image_seq_length = 1
        return make(images, words)
    if name == "Gemma3":
        return make(transformers.Gemma3ImageProcessor(size=square), words, image_seq_length=1)
    if name == "DeepseekVL":
        images = transformers.DeepseekVLImageProcessor(size=square)
        return make(images, words, num_image_tokens=1)
    if name in ("Idefics3", "SmolVLM"):
        kind = getattr(transformers, f"{name}ImageProcessor")
        images = kind(size=dict(longest_edge=2 * side), max_image_size=dict(longest_edge=side))
        more = () if name == "Idefics3" else (transformers.SmolVLMVideoProcessor(),)
        return make(images, words, *more, image_seq_len=1)
    images = transformers.GotOcr2ImageProcessor(size=square)
    return make(images, words, transformers.InternVLVideoProcessor(), image_seq_length=1)


def pictures(seed=0):
    """Three, of several sizes."""
    draw = numpy.random.default_rng(seed)
    return [draw.integers(0, 256, (*size, 3), dtype=numpy.uint8) for size in ((40, 70), (32, 64), (50, 50))]


def read(made, name):
    """What a processor makes of two prompts: one has two images, the other has one."""
    word = "<boi>" if name == "Gemma3" else "<image>"
    first, second, third = pictures()
    images = [[first, second], [third]] if name in ("Gemma3", "Idefics3", "SmolVLM") else [first, second, third]
    texts = [f"a {word} b {word} a", f"b {word} a b"]
    return made(images=images, text=texts, padding=True, return_tensors="pt")
