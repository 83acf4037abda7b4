"""Fewer image tokens behind the towers of unmodified language models, and prompts that are as much shorter."""

import copy

import pytest
import torch

from support.patched_models import applied
from tokenops import kept_counts, remove_patch, vlm
from tokenops.vlm import compress, placeholder_counts, shorten

transformers = pytest.importorskip("transformers")

from support.speakers import IMAGE, speaker  # noqa: E402
from support.viewers import GRIDS, NAMES, TOKENS, lengths, seen, viewer  # noqa: E402

RATE = 0.4
CLASS = ("Llava", "InternVL")


def positions(model, given):
    """Those of the whole prompts, as the models give them themselves."""
    mask = given["attention_mask"]
    if "image_grid_thw" not in given:
        first = int(type(model).__name__.startswith("PaliGemma"))
        return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) + first
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: given[name] for name in names})[0]


def features(model, given):
    """Image tokens of each image, and of Qwen3-VL those of its deepstack."""
    names = ("pixel_values", "image_grid_thw")
    output = model.model.get_image_features(**{name: given[name] for name in names if name in given})
    return list(output.pooler_output), getattr(output, "deepstack_features", [])


def kept_of(model, given, short):
    """Numbers of the image tokens that are left, told by what they are."""
    left = torch.cat(list(short["mm_encoder_outputs"]["image"].pooler_output))
    same = (torch.cat(features(model, given)[0]) == left.unsqueeze(1)).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def masked(model, given, kept):
    """The whole prompts with all image tokens, of which those that are left out are no keys; and which count."""
    places = given["input_ids"] == IMAGE
    left_out = torch.ones(int(places.sum()), dtype=torch.bool)
    left_out[kept] = False
    mask = given["attention_mask"].clone()
    mask[places] = mask[places].masked_fill(left_out, 0)
    return {**given, "attention_mask": mask, "position_ids": positions(model, given)}, mask.bool()


@pytest.mark.parametrize("padded", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_kept_give_what_the_model_gives(name, padded):
    model, given = viewer(name).double(), seen(name, padded=padded)
    with torch.no_grad():
        expected = model(**given, position_ids=positions(model, given)).logits[given["attention_mask"].bool()]
        short = compress(model, given, 1.0)
        got = model(**short).logits[short["attention_mask"].bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_fewer_tokens_give_what_masked_keys_give(name, padded):
    """Two images in one prompt and one in the other, so that the prompts become shorter by unequal numbers."""
    model, given = viewer(name).double(), seen(name, padded=padded)
    before = {key: value.clone() for key, value in given.items()}
    with torch.no_grad():
        short = compress(model, given, RATE)
        kept = kept_of(model, given, short)
        whole, counts = masked(model, given, kept)
        expected = model(**whole).logits[counts]
        got = model(**short).logits[short["attention_mask"].bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(before[key], given[key]) for key in before)

    left = kept_counts(lengths(name), RATE)
    assert len(kept) == sum(left) == (short["input_ids"] == IMAGE).sum() and (kept.diff() > 0).all()
    words = [int(row.sum()) for row in (given["attention_mask"] - (given["input_ids"] == IMAGE).long())]
    each = torch.tensor([words[0] + left[0] + left[1], words[1] + left[2]])
    assert torch.equal(short["attention_mask"].sum(1), each) and short["input_ids"].shape == (2, each.max())
    assert (short["attention_mask"].diff(dim=1) >= 0).all(), "padding is on the left"
    assert short["input_ids"][0, -3:].tolist() == [6, 7, 8] and "pixel_values" not in short


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_masked_keys_say(name):
    model, given = viewer(name), seen(name)
    said = dict(max_new_tokens=6, do_sample=False)
    plain = model.generate(**given, **said)[:, -6:]
    assert torch.equal(model.generate(**compress(model, given, 1), **said)[:, -6:], plain)
    short = compress(model, given, RATE)
    whole, _ = masked(model, given, kept_of(model, given, short))
    words = model.generate(**short, **said)
    assert words.shape[1] == short["input_ids"].shape[1] + 6
    assert torch.equal(words[:, -6:], model.generate(**whole, **said)[:, -6:])


@pytest.mark.parametrize("name", NAMES)
def test_it_says_so_one_prompt_at_a_time_and_in_beams(name):
    model, given = viewer(name), seen(name)
    short = compress(model, given, RATE)
    both = model.generate(**short, max_new_tokens=4, do_sample=False)[:, -4:]
    counts = given["attention_mask"][1].bool()
    alone = {key: given[key][1:, counts] for key in given if given[key].shape == given["input_ids"].shape}
    rows = 4 * lengths(name)[2] if "image_grid_thw" in given else 1
    alone["pixel_values"] = given["pixel_values"][-rows:]
    if "image_grid_thw" in given:
        alone["image_grid_thw"] = given["image_grid_thw"][-1:]
    one = compress(model, alone, RATE)
    assert one["attention_mask"].all()
    assert torch.equal(model.generate(**one, max_new_tokens=4, do_sample=False)[:, -4:], both[1:])
    beams = model.generate(**short, max_new_tokens=4, do_sample=False, num_beams=2)
    assert beams.shape == (2, short["input_ids"].shape[1] + 4)


@pytest.mark.parametrize("name", NAMES)
def test_labels_give_the_loss_and_gradients_of_masked_keys(name):
    model, given = viewer(name).double(), seen(name)
    labels = given["input_ids"].clone()
    labels[:, :-1] = -100  # each is told from the word before it, which is no image token
    given["labels"] = labels
    short = compress(model, given, RATE)
    assert short["labels"][:, -1].tolist() == [8, 3] and (short["labels"] != -100).sum() == 2
    whole, _ = masked(model, given, kept_of(model, given, short))
    found = {}
    for what, inputs in (("short", short), ("whole", whole)):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found[what] = loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(*(loss for loss, _ in found.values()), rtol=0, atol=1e-6)  # losses are fp32
    grads, expected = (grads for _, grads in found.values())
    assert grads.keys() == expected.keys() and any("visual." in key or "vision_tower." in key for key in grads)
    for key in grads:
        torch.testing.assert_close(grads[key], expected[key], rtol=1e-5, atol=1e-6, msg=key)


# ---- scores


def matrix(model, given, layer, kind):
    """Scores of every image's tokens, of the matrix of attention that the tower itself makes."""
    base = model.model
    if "image_grid_thw" in given:
        calls = []
        hook = base.visual.blocks[layer].attn.register_forward_hook(
            lambda module, args, kwargs, out: calls.append((args[0], kwargs)), with_kwargs=True
        )
        features(model, given)
        hook.remove()
        ((hidden, more),) = calls
        attention = base.visual.blocks[layer].attn
        q, k, _ = attention.qkv(hidden).reshape(len(hidden), 3, 2, 16).unbind(1)
        cos, sin = (table.unsqueeze(1) for table in more["position_embeddings"])
        q, k = (x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin for x in (q, k))
        scores, ends = [], more["cu_seqlens"].tolist()
        for begin, end in zip(ends, ends[1:]):
            logits = torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end]) / 4
            scores.append(logits.softmax(-1).sum(1).mean(0))
        scores = torch.cat(scores).view(-1, 4).sum(1)
        if hasattr(base.visual, "window_size"):  # 16 pixels are 2 x 2 units: windows of a grid, left to right
            order = []
            for rows, columns in GRIDS:
                units = sum(map(len, order)) + torch.arange(rows * columns // 4).view(rows // 2, columns // 2)
                order.append(
                    torch.cat([x.flatten() for band in units.split(2) for x in band.split(2, dim=1)])  # no whole ones
                )
            order = torch.cat(order)
            scores = torch.zeros_like(scores).index_copy(0, order, scores)
        return scores.split(lengths("Qwen3VL"))
    model.set_attn_implementation("eager")
    attention = base.get_image_features(given["pixel_values"], output_attentions=True).attentions[layer].mean(1)
    scores = attention[:, 0] if kind == "class" else attention.mean(1)
    scores = scores[:, scores.shape[1] % 2 :]  # of a class token, which makes their number odd
    if type(base).__name__ in ("InternVLModel", "Gemma3Model"):
        scores = scores.view(-1, 4, 2, 4, 2).sum((2, 4)).flatten(1)
    return list(scores)


@pytest.mark.parametrize(
    ("name", "kind", "layer", "block"),
    [
        ("Llava", "received", None, 1),
        ("Llava", "class", None, 1),
        ("Llava", "class", -1, 2),
        ("PaliGemma", "received", None, 2),
        ("PaliGemma", "received", 0, 0),
        ("InternVL", "received", None, 2),
        ("InternVL", "class", None, 2),
        ("Gemma3", "received", None, 2),
        ("Qwen2_5_VL", "received", None, 3),
        ("Qwen2_5_VL", "received", 2, 2),
        ("Qwen3VL", "received", None, 3),
        ("Qwen3VL", "received", -3, 1),
    ],
)
@torch.no_grad()
def test_those_are_kept_that_the_matrix_says(name, kind, layer, block):
    agrees(viewer(name), name, kind, layer, block)


@torch.no_grad()
def test_the_matrix_of_other_towers():
    normed = viewer("InternVL", vision=dict(use_qk_norm=True))
    agrees(normed, "InternVL", "received", None, 2)
    agrees(normed, "InternVL", "class", 1, 1)
    without = dict(model_type="siglip_vision_model", vision_use_head=False)  # LLaVA's with SigLIP: all tokens are taken
    model = viewer("Llava", vision=without, vision_feature_select_strategy="full", vision_feature_layer=-1)
    agrees(model, "Llava", "received", None, 2)
    with pytest.raises(ValueError, match="SiglipVisionModel has no class token"):
        compress(model, seen("Llava"), RATE, score="class")


def agrees(model, name, kind, layer, block):
    """Asserts that the tokens that are left are those with the largest scores of the matrix."""
    given = seen(name, seed=5)
    short = compress(model, given, RATE, score=kind, layer=layer)
    kept = kept_of(model, given, short)
    expected, begin = [], 0
    for scores in matrix(model, given, block, kind):
        (count,) = kept_counts([len(scores)], RATE)
        ranked = scores.sort(descending=True)
        assert ranked.values[count - 1] - ranked.values[count] > 1e-5, "no choice of rounding"
        expected.append(ranked.indices[:count].sort().values + begin)
        begin += len(scores)
    assert torch.equal(kept, torch.cat(expected))


@pytest.mark.parametrize("name", ["Llava", "Gemma3", "Qwen3VL"])
def test_scores_of_ones_own(name):
    model, given = viewer(name), seen(name)
    total, counts = sum(lengths(name)), kept_counts(lengths(name), 0.3)
    rising = torch.arange(float(total))
    expected, begin = [], 0
    for n, k in zip(lengths(name), counts):
        expected += range(begin + n - k, begin + n)
        begin += n
    for score in (
        rising,
        lambda tokens: rising,
        lambda tokens: [torch.arange(float(len(image))) for image in tokens],
    ):
        assert kept_of(model, given, compress(model, given, 0.3, score=score)).tolist() == expected


def test_every_deepstack_feature_is_of_the_tokens_that_are_left():
    model, given = viewer("Qwen3VL"), seen("Qwen3VL")
    short = compress(model, given, RATE)
    kept = kept_of(model, given, short)
    _, deep = features(model, given)
    left = short["mm_encoder_outputs"]["image"].deepstack_features
    assert len(left) == len(deep) == 2
    for part, whole in zip(left, deep):
        assert [len(image) for image in part] == kept_counts(lengths("Qwen3VL"), RATE)
        assert torch.equal(torch.cat(part), torch.cat(whole)[kept])


@pytest.mark.parametrize("name", NAMES)
def test_the_model_stays_as_it_is_and_half_precision_runs(name):
    model, given = viewer(name).bfloat16(), seen(name)
    types = [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first, again = (compress(copy.deepcopy(model) if i else model, given, RATE) for i in range(2))
    assert torch.equal(kept_of(model, given, first), kept_of(model, given, again))
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model(**first).logits.isfinite().all()


def test_llava_with_its_class_token_among_the_features():
    model = viewer("Llava", vision_feature_select_strategy="full").double()
    given = seen("Llava")
    given["input_ids"][given["input_ids"] == 4] = IMAGE  # a place more before the first, two behind the third
    given["input_ids"][0, -2], given["input_ids"][0, -1] = IMAGE, 8
    places = int((given["input_ids"] == IMAGE).sum())
    assert places == 3 * 17
    with torch.no_grad():
        short = compress(model, given, RATE)
        whole, counts = masked(model, given, kept_of(model, given, short))
        got = model(**short).logits[short["attention_mask"].bool()]
        torch.testing.assert_close(got, model(**whole).logits[counts], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["PaliGemma", "Qwen3VL"])
def test_what_a_prompt_need_not_have(name):
    """Of one prompt without padding a mask and the kinds of its tokens; and positions are taken as they are given."""
    model, given = viewer(name), seen(name)
    first = {key: value[:1] for key, value in given.items()}
    patches = 4 * sum(lengths(name)[:2])
    first["pixel_values"] = given["pixel_values"][: 2 if name == "PaliGemma" else patches]
    if name == "Qwen3VL":
        first["image_grid_thw"] = given["image_grid_thw"][:2]
    expected = compress(model, first, RATE)
    bare = {key: first[key] for key in first if key not in ("attention_mask", "mm_token_type_ids")}
    where = positions(model, first)
    for inputs in (bare, {**bare, "position_ids": where}, {**first, "position_ids": where}):
        short = compress(model, inputs, RATE)
        for key in ("input_ids", "attention_mask", "position_ids"):
            assert torch.equal(short[key], expected[key]), key
        torch.testing.assert_close(model(**short).logits, model(**expected).logits, rtol=0, atol=1e-5)
    moved = compress(model, {**bare, "position_ids": where + 5}, RATE)
    assert torch.equal(moved["position_ids"], expected["position_ids"] + 5)


# ---- refusals


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (dict(pixel_values=None), {}, ValueError, "no pixel_values, so there are no image tokens"),
        (dict(input_ids=None), {}, ValueError, "inputs have no input_ids"),
        (dict(pixel_values_videos=torch.ones(1)), {}, ValueError, "inputs have videos, but only images"),
        (dict(mm_encoder_outputs={}), {}, ValueError, "inputs have mm_encoder_outputs"),
        (dict(input_ids=torch.full((2, 41), 3)), {}, ValueError, "has 0 places for image tokens, but the images have"),
        (dict(attention_mask=torch.ones(2, 1, 35, 35)), {}, ValueError, "attention_mask must have shape (B,N)"),
        ({}, dict(keep_rate=0), ValueError, "keep_rate=0, but it must be above 0"),
        ({}, dict(keep_rate=1.5), ValueError, "keep_rate=1.5, but it must be above 0 and at most 1"),
        ({}, dict(keep_rate="all"), TypeError, "keep_rate must be a number"),
        ({}, dict(score="mean"), ValueError, "score='mean', but it must be one of 'received', 'class'"),
        ({}, dict(score="class"), ValueError, "has no class token: take 'received'"),
        ({}, dict(score=3), TypeError, "score must be a string, a tensor or a function"),
        ({}, dict(score=torch.ones(3)), ValueError, "score has 3 numbers, but the images have"),
        ({}, dict(score=torch.ones(3), layer=1), ValueError, "layer=1 is not taken with a score of one's own"),
        ({}, dict(layer=4), ValueError, "layer=4, but the tower has 4 blocks: -4 to 3 is allowed"),
        ({}, dict(layer=1.0), TypeError, "layer must be an int"),
    ],
)
def test_refusals(change, options, error, words):
    model, given = viewer("Qwen2_5_VL"), {**seen("Qwen2_5_VL"), **change}
    with pytest.raises(error) as raised:
        compress(model, given, **{"keep_rate": RATE, **options})
    assert words in str(raised.value)


def test_video_places_are_refused():
    given = seen("Qwen3VL")
    given["input_ids"][0, -1] = 18
    with pytest.raises(ValueError, match="inputs have videos"):
        compress(viewer("Qwen3VL"), given, RATE)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None])
def test_other_models_are_refused(model):
    with pytest.raises(TypeError, match="must be one of transformers with LlavaModel, PaliGemmaModel"):
        compress(model, seen("Llava"), RATE)
    with pytest.raises(TypeError, match="model is a LlavaNextForConditionalGeneration, but"):
        compress(speaker("LlavaNext"), seen("Llava"), RATE)
    with pytest.raises(TypeError, match="inputs must be a mapping"):
        compress(viewer("Llava"), [1], RATE)


def test_patched_towers_are_refused():
    model, given = viewer("Llava"), seen("Llava")
    expected = kept_of(model, given, compress(model, given, RATE))
    applied(model, "evit")
    with pytest.raises(ValueError, match="is patched and reduces tokens by itself: fit the processor"):
        compress(model, given, RATE)
    remove_patch(model)
    assert torch.equal(kept_of(model, given, compress(model, given, RATE)), expected)


# ---- prompts


def test_counts_are_those_of_compress():
    given = seen("Qwen2_5_VL")
    counts = placeholder_counts(given["image_grid_thw"], RATE)
    assert counts == placeholder_counts([(1, *grid) for grid in GRIDS], RATE) == kept_counts([6, 24, 6], RATE)
    output = compress(viewer("Qwen2_5_VL"), given, RATE)["mm_encoder_outputs"]["image"]
    assert [len(image) for image in output.pooler_output] == counts
    assert placeholder_counts([[2, 8, 4]], 1, merge=4) == [4] and placeholder_counts([], 1) == []


@pytest.mark.parametrize(
    ("grid", "merge", "error", "words"),
    [
        ([[1, 4]], 2, TypeError, r"grid_thw\[0\] must be three ints"),
        ([4], 2, TypeError, r"grid_thw\[0\] must be three ints"),
        ([[1, 4, 4], [1, 4, 5]], 2, ValueError, r"grid_thw\[1\]=\[1, 4, 5\].*multiples of 2"),
        ([[0, 4, 4]], 2, ValueError, "frames must be 1 or more"),
        ([[1, 4, 4]], 0, ValueError, "merge=0, but it must be 1 or more"),
        ([[1, 4, 4]], 2.0, TypeError, "merge must be an int"),
    ],
)
def test_counts_of_what_is_no_grid(grid, merge, error, words):
    with pytest.raises(error, match=words):
        placeholder_counts(grid, RATE, merge=merge)


def given_words(**more):
    ids = torch.tensor([[9, 9, 1, 9, 2, 0], [3, 9, 4, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **more}


def test_shorten():
    ids = given_words()["input_ids"]
    more = dict(labels=ids * 10, mm_token_type_ids=(ids == 9).int(), weights=ids / 2, image_sizes=ids, other="as it is")
    axes = torch.stack([ids + 100, ids + 200, ids + 300])
    for kept in (torch.tensor([2, 0, -1]), torch.tensor([True, False, True, False])):
        short = shorten(given_words(**more), kept, token_id=9, position_ids=axes, pad_token_id=8)
        assert short["input_ids"].tolist() == [[8, 9, 1, 9, 2], [3, 4, 5, 6, 7]]
        assert short["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1] * 5]
        assert short["labels"].tolist() == [[-100, 90, 10, 90, 20], [30, 40, 50, 60, 70]]
        assert short["mm_token_type_ids"].tolist() == [[0, 1, 0, 1, 0], [0] * 5]
        assert short["weights"][0].tolist() == [0, 4.5, 0.5, 4.5, 1]
        assert short["position_ids"][2].tolist() == [[0, 309, 301, 309, 302], [303, 304, 305, 306, 307]]
        assert short["image_sizes"] is ids or torch.equal(short["image_sizes"], ids)
        assert short["other"] == "as it is" and torch.equal(short["position_ids"][0, 1], short["input_ids"][1] + 100)
    text = shorten(given_words(), torch.tensor([3]), token_id=9, position_ids=None)
    assert text["position_ids"].tolist() == [[0, 0, 0, 0, 2, 4], [0, 1, 2, 3, 4, 5]]
    row = torch.arange(6)[None]
    assert shorten(given_words(), torch.tensor([3]), token_id=9, position_ids=row)["position_ids"][1, 5] == 5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(kept=torch.tensor([4])), ValueError, "kept has 4, but input_ids has 4 places"),
        (dict(kept=torch.tensor([1, 1])), ValueError, "kept names a place twice"),
        (dict(kept=torch.ones(3, dtype=torch.bool)), ValueError, "kept has 3 flags, but input_ids has 4 places"),
        (dict(kept=torch.ones(3)), TypeError, "kept must be int64, int32 or bool"),
        (dict(kept=[1]), TypeError, "kept must be a tensor"),
        (dict(pad_token_id=9), ValueError, "pad_token_id=9, but that is the id of a place"),
        (dict(position_ids=torch.ones(2, 5)), ValueError, r"position_ids must have shape \(2, 6\)"),
        (dict(position_ids=torch.ones(3, 6)), ValueError, r"position_ids must have shape \(2, 6\)"),
        (dict(inputs={}), TypeError, "input_ids must be a tensor"),
        (dict(inputs=given_words(attention_mask=torch.ones(2, 5))), ValueError, "attention_mask has shape"),
    ],
)
def test_shorten_says_in_words_what_is_wrong(change, error, words):
    options = dict(inputs=given_words(), kept=torch.tensor([0]), token_id=9, position_ids=None)
    options.update(change)
    with pytest.raises(error, match=words):
        shorten(options.pop("inputs"), options.pop("kept"), **options)


def test_the_room_has_its_names():
    assert set(vlm.__all__) == {"compress", "fit_processor", "placeholder_counts", "shorten"}
    assert set(CLASS) < set(TOKENS)
