"""Small language models that see, with prompts of several images: two in the first, one in the second."""

import torch
import transformers

from support.speakers import IMAGE, speaker
from support.weights import redrawn

#: rows and columns of patches of the images, where a tower takes them as they are
GRIDS = ((4, 6), (12, 8), (6, 4))
#: for every name how many tokens an image has where they are all of one size
TOKENS = {"Llava": 16, "PaliGemma": 16, "InternVL": 16, "Gemma3": 16}
NAMES = (*TOKENS, "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
WORDS = dict(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def viewer(name, **more):
    """A model in evaluation, whose tower makes its tokens differ."""
    if name in TOKENS:
        side = 32 if name in ("Llava", "PaliGemma") else 64
        return speaker(name, side, **({"mm_tokens_per_image": 16} if name == "Gemma3" else {}), **more)
    torch.manual_seed(0)
    ids = dict(image_token_id=IMAGE, video_token_id=18, vision_start_token_id=17, vision_end_token_id=16)
    tower = dict(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, out_hidden_size=32, in_channels=3
    )
    if name in ("Qwen2VL", "Qwen2_5_VL"):
        if name == "Qwen2VL":
            tower |= dict(embed_dim=32, mlp_ratio=2)
        else:
            tower |= dict(window_size=16, fullatt_block_indexes=[1, 3])
        rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
        words = dict(WORDS, rope_parameters=rope)
    else:
        tower |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 2])
        rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4, mrope_interleaved=True)
        words = dict(WORDS, head_dim=16, rope_parameters=rope)
    config = getattr(transformers, f"{name}Config")(vision_config=tower, text_config=words, **ids, **more)
    return redrawn(getattr(transformers, f"{name}ForConditionalGeneration")(config))


def lengths(name):
    """Tokens of the three images."""
    return [TOKENS[name]] * 3 if name in TOKENS else [rows * columns // 4 for rows, columns in GRIDS]


def seen(name, seed=2, padded="left"):
    """What a processor would make of two prompts, the second padded."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = lengths(name)
    prompts = [[3, 4, *[IMAGE] * first, 5, *[IMAGE] * second, 6, 7, 8], [9, *[IMAGE] * third, 4, 3]]
    longest = max(map(len, prompts))
    rows, mask = [], []
    for prompt in prompts:
        gap = longest - len(prompt)
        before, behind = (gap, 0) if padded == "left" else (0, gap)
        rows.append([0] * before + prompt + [0] * behind)
        mask.append([0] * before + [1] * len(prompt) + [0] * behind)
    given = dict(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))
    pictures = (given["input_ids"] == IMAGE).long()
    if name in TOKENS:
        side = 32 if name in ("Llava", "PaliGemma") else 64
        given["pixel_values"] = torch.randn(3, 3, side, side, generator=generator)
        if name == "Gemma3":
            given["token_type_ids"] = pictures
        if name == "PaliGemma":  # the words behind the last image are the answer
            given["token_type_ids"] = torch.zeros_like(pictures)
            given["token_type_ids"][:, -2:] = 1
    else:
        given["image_grid_thw"] = torch.tensor([(1, *grid) for grid in GRIDS])
        given["pixel_values"] = torch.randn(4 * sum(lengths(name)), 3 * 2 * 4 * 4, generator=generator)
        given["mm_token_type_ids"] = pictures
    return given
