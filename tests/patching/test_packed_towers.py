"""Whole units of patches are chosen within towers whose images are packed in one sequence."""

import copy
import pickle
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from support.packed_towers import (  # noqa: E402
    GRID,
    SPEAKERS,
    TOWERS,
    UNIT,
    masked,
    patches,
    prompt,
    shortened,
    speaker,
    tower,
)
from tokenops import (  # noqa: E402
    apply_patch,
    kept_counts,
    load_patched,
    remove_patch,
    save_patched,
    split_like,
    tokens_left,
    trace,
    use_backend,
)
from tokenops.patching import image_tokens_left  # noqa: E402
from tokenops.vlm import compress  # noqa: E402

#: units of the images, of which the last has two frames
UNITS = [24, 6, 4, 4]
TWICE = dict(keep_rate=0.4, reduction_loc=(1, 3), fuse_token=False)
FIRST, SECOND = kept_counts(UNITS, 0.4), kept_counts(kept_counts(UNITS, 0.4), 0.4)


def patched(name, **more):
    return apply_patch(tower(name), "evit", **{**TWICE, **more})


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.parametrize("name", TOWERS)
def test_where_nothing_is_left_out_the_tower_is_as_it_was(name):
    model = tower(name)
    expected = model(patches(), grid_thw=GRID)
    apply_patch(model, "evit", keep_rate=1, fuse_token=False)
    found = model(patches(), grid_thw=GRID)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found.kept, torch.arange(sum(UNITS)))
    close(found.pooler_output, masked(tower(name), patches(), GRID, {}).pooled)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("where", [(1,), (3,), (1, 3)])
def test_what_is_left_is_as_with_masked_keys(name, where):
    counts = dict(zip(where, (FIRST, SECOND)))
    expected = masked(tower(name), patches(), GRID, counts)
    found = patched(name, reduction_loc=where)(patches(), grid_thw=GRID, output_hidden_states=True)
    assert torch.equal(found.kept, expected.kept) and len(found.kept) == sum(counts[where[-1]])
    close(found.pooler_output, expected.pooled)
    assert [len(state) for state in found.hidden_states[1:]] == [UNIT * len(index) for index in expected.behind]
    assert len(found.last_hidden_state) == UNIT * len(found.kept)
    if name.startswith("Qwen3VL"):
        assert len(found.deepstack_features) == len(expected.deepstack) == 3
        for one, other in zip(found.deepstack_features, expected.deepstack):
            close(one, other)


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_are_those_of_masked_keys(name):
    plain, model, x = tower(name), patched(name), patches()
    names = [parameter for parameter, _ in plain.named_parameters()]
    plain(x, grid_thw=GRID).pooler_output.square().sum().backward()
    reached = {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    plain.zero_grad()
    expected = masked(plain, x, GRID, {1: FIRST, 3: SECOND})
    found = model(x, grid_thw=GRID)
    sum(y.square().mean() for y in [expected.pooled, *expected.deepstack]).backward()
    sum(y.square().mean() for y in [found.pooler_output, *getattr(found, "deepstack_features", [])]).backward()
    assert [parameter for parameter, _ in model.named_parameters()] == names
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached <= set(got)
    for name, parameter in plain.named_parameters():
        close(got[name], parameter.grad, 1e-4)


@pytest.mark.parametrize("name", TOWERS)
def test_images_are_as_each_alone(name):
    model = patched(name)
    whole, begin, first = model(patches(), grid_thw=GRID), 0, 0
    for image, units, rows in zip(GRID, (SECOND[:1], SECOND[1:2], SECOND[2:]), GRID.prod(1).tolist()):
        alone = model(patches()[begin : begin + rows], grid_thw=image[None])
        close(whole.pooler_output[first : first + sum(units)], alone.pooler_output)
        assert torch.equal(whole.kept[first : first + sum(units)] - begin // UNIT, alone.kept)
        begin, first = begin + rows, first + sum(units)
    assert begin == len(patches()) and first == len(whole.kept)


def test_windows_lose_some_units_or_all():
    """The windows of the tests above: of 4 units or less, of which any number is left, or none."""
    windows = torch.tensor([0, 4, 8, 12, 16, 20, 24, 28, 30, 34, 38], dtype=torch.int32)
    behind = masked(tower("Qwen2_5_VL"), patches(), GRID, {1: FIRST, 3: SECOND}).behind
    assert {1, 2, 4} <= set(split_like(behind[2], windows).diff().tolist())
    assert {0, 1} == set(split_like(behind[4], windows).diff().tolist())


@pytest.mark.parametrize("name", TOWERS)
def test_the_towers_own_packed_branch_gives_the_same(name, monkeypatch):
    """Blocks before the first choice run as the tower says, those behind it by our operator."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ran = []

    def flash(module, q, k, v, attention_mask, scaling, cu_seq_lens_q, **kwargs):
        ran.append(module)
        lengths = cu_seq_lens_q.diff().tolist()
        heads = (
            torch.nn.functional.scaled_dot_product_attention(*some, scale=scaling)
            for some in zip(*(t.split(lengths, dim=2) for t in (q, k, v)))
        )
        return torch.cat(list(heads), dim=2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "packed_flash", flash)
    expected = masked(tower(name), patches(), GRID, {3: FIRST})
    model = patched(name, reduction_loc=(3,))
    model.config._attn_implementation = "packed_flash"
    found = model(patches(), grid_thw=GRID)
    assert ran == [block.attn for block in model.blocks[:3]]
    assert torch.equal(found.kept, expected.kept)
    close(found.pooler_output, expected.pooled)


@pytest.mark.parametrize("name", TOWERS)
def test_a_patch_leaves_nothing_behind(name):
    model = tower(name)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    expected = model(patches(), grid_thw=GRID)
    apply_patch(model, "evit", **TWICE)
    assert list(model.state_dict()) == names and type(model).__name__ == type(tower(name)).__name__
    model(patches(), grid_thw=GRID)
    remove_patch(model)
    found = model(patches(), grid_thw=GRID)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(found.pooler_output, expected.pooler_output) and not hasattr(found, "kept")
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("name", TOWERS)
def test_the_state_is_a_value(name):
    """Of a forward: others run meanwhile, blocks are run again for gradients, copies do the same."""
    model, x = patched(name), patches()
    expected, alone = model(x, grid_thw=GRID), model(x[:96], grid_thw=GRID[:1])
    found = {}

    def run(key, *given):
        found[key] = [model(given[0], grid_thw=given[1]).pooler_output for _ in range(4)]

    threads = [threading.Thread(target=run, args=given) for given in (("all", x, GRID), ("first", x[:96], GRID[:1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected.pooler_output) for y in found["all"])
    assert all(torch.equal(y, alone.pooler_output) for y in found["first"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, grid_thw=GRID).pooler_output, expected.pooler_output)
    expected.pooler_output.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()(x, grid_thw=GRID).pooler_output.sum().backward()
    for one, other in zip(gradients, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        close(other, one)


@pytest.mark.parametrize("name", TOWERS)
def test_what_is_left_is_told_before(name):
    model = tower(name)
    assert image_tokens_left(model, GRID) == [24, 6, 8]
    apply_patch(model, "evit", **TWICE)
    expected = [SECOND[0], SECOND[1], SECOND[2] + SECOND[3]]
    assert image_tokens_left(model, GRID) == image_tokens_left(model, GRID.tolist()) == expected
    assert len(model(patches(), grid_thw=GRID).pooler_output) == sum(expected)
    model.keep_rate = 0.9
    counts = image_tokens_left(model, GRID)
    assert len(model(patches(), grid_thw=GRID).kept) == sum(counts) > sum(expected)
    with pytest.raises(TypeError, match=r"grid_thw\[0\]=\[8, 12\], but it must be three ints"):
        image_tokens_left(model, [[8, 12]])
    with pytest.raises(ValueError, match=r"grid_thw\[1\]=\(1, 7, 4\), but rows and columns must be multiples of 2"):
        image_tokens_left(model, [[1, 8, 12], [1, 7, 4]])
    with pytest.raises(ValueError, match="takes patches as rows, .*image_tokens_left their grids"):
        tokens_left(model, 32)
    with pytest.raises(TypeError, match="image_tokens_left is of towers that pack their images, not of ViTModel"):
        image_tokens_left(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1)), GRID)


@pytest.mark.parametrize("other", ["reference", "triton"])
def test_every_backend_leaves_the_same(other):
    model, given = patched("Qwen2_5_VL"), (patches()[96:], GRID[1:])
    expected = model(*given)
    with use_backend(other), torch.no_grad():
        found = model(*given)
    assert torch.equal(found.kept, expected.kept)
    close(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("name", SPEAKERS)
def test_in_bfloat16(name):
    model = patched(name, keep_rate=0.6)
    expected = model(patches(), grid_thw=GRID)
    model.bfloat16()
    found = model(patches().bfloat16(), grid_thw=GRID)
    assert found.pooler_output.dtype == torch.bfloat16 and len(found.kept) == len(expected.kept)
    both = torch.isin(expected.kept, found.kept)
    assert both.float().mean() > 0.7  # scores that are close are told apart by rounding
    rows = found.pooler_output.float()[torch.isin(found.kept, expected.kept)]
    assert (rows - expected.pooler_output[both]).std() < 0.1 * expected.pooler_output.std()


def test_a_choice_at_random_is_of_as_many():
    model = apply_patch(tower("Qwen2_5_VL"), "random", keep_rate=0.4, reduction_loc=(1, 3))
    first, second = (model(patches(), grid_thw=GRID).kept for _ in range(2))
    assert len(first) == len(second) == sum(SECOND) and not torch.equal(first, second)


def test_a_tower_is_saved_with_its_method(tmp_path):
    model = patched("Qwen2_5_VL")
    save_patched(model, tmp_path)
    again = load_patched(type(model), tmp_path)
    assert torch.equal(again(patches(), grid_thw=GRID).pooler_output, model(patches(), grid_thw=GRID).pooler_output)


def test_tuples_have_what_is_left():
    model = patched("Qwen3VL")
    whole = model(patches(), grid_thw=GRID, output_hidden_states=True)
    last, pooled, deepstack, states = model(patches(), grid_thw=GRID, output_hidden_states=True, return_dict=False)
    assert torch.equal(last, whole.last_hidden_state) and torch.equal(pooled, whole.pooler_output)
    assert all(map(torch.equal, states, whole.hidden_states))
    assert all(map(torch.equal, deepstack, whole.deepstack_features))


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("tome", dict(r=4), "tome is not defined for a .*, which packs its images .* 'evit' with fuse_token=False"),
        ("evo_vit", {}, "evo_vit is not defined for a "),
        ("patch_slimming", dict(schedule=[9] * 5), "patch_slimming is not defined for a "),
        ("dps", dict(counts=[9] * 5), "dps is not defined for a "),
        ("sit", {}, "sit is not defined for a "),
        ("cait", {}, "cait is not defined for a "),
        ("evit", {}, "fuse_token=True, but Qwen2_5_VisionTransformerPretrainedModel .* give fuse_token=False"),
        ("random", dict(r=4), "random: r merges patches one by one"),
        (
            "evit",
            dict(reduction_loc=(2,), fuse_token=False),
            r"block 2 is to choose tokens, but attends within windows.* choose blocks of \(1, 3\)",
        ),
    ],
)
def test_what_is_not_defined_is_refused_in_words(method, options, words):
    model = tower("Qwen2_5_VL")
    with pytest.raises(ValueError, match=words):
        apply_patch(model, method, **options)
    assert not hasattr(model, "tokenops_patch")
    model(patches(), grid_thw=GRID)


def test_the_blocks_that_choose_see_whole_images():
    model = apply_patch(tower("Qwen2_5_VL", depth=8, fullatt_block_indexes=[3, 5, 7]), "evit", fuse_token=False)
    assert [i for i, block in enumerate(model.blocks) if not block.tokenops_role.idle] == [3, 5]
    assert [block.tokenops_role.longest for block in model.blocks] == [16, 16, 16, None, 16, None, 16, None]
    with pytest.raises(ValueError, match=r"block 1 is to choose tokens, .*: choose blocks of \(\)"):
        apply_patch(tower("Qwen2_5_VL", fullatt_block_indexes=[]), "evit", fuse_token=False)
    model = patched("Qwen3VL", reduction_loc=None)
    assert [i for i, block in enumerate(model.blocks) if not block.tokenops_role.idle] == [1, 2, 3]


def test_attention_weights_and_traces_are_refused():
    model = patched("Qwen3VL")
    with pytest.raises(ValueError, match="output_attentions"):
        model(patches(), grid_thw=GRID, output_attentions=True)
    with pytest.raises(ValueError, match="trace takes images of one size"):
        trace(model, patches())


#: two images without frames
IMAGES = dict(pixel_values=patches(GRID[:2]), image_grid_thw=GRID[:2])


@pytest.mark.parametrize("name", SPEAKERS)
def test_the_language_model_gets_what_is_left(name):
    """As the unpatched one does of the features that masked keys leave."""
    plain, model = speaker(name), apply_patch(speaker(name), "evit", **TWICE)
    left = masked(plain.model.visual, IMAGES["pixel_values"], GRID[:2], {1: FIRST[:2], 3: SECOND[:2]})
    output = model.get_image_features(**IMAGES)
    assert [len(image) for image in output.pooler_output] == image_tokens_left(model, GRID[:2]) == SECOND[:2]
    close(torch.cat(output.pooler_output), left.pooled)
    assert torch.equal(output.kept, left.kept)
    short = shortened(plain.model, prompt(UNITS[:2]), left.kept, GRID[:2])
    features = dict(pooler_output=left.pooled.split(SECOND[:2]))
    if name == "Qwen3VL":
        features["deepstack_features"] = [each.split(SECOND[:2]) for each in left.deepstack]
    expected = plain(**short, mm_encoder_outputs={"image": type(output)(**features)}).logits
    close(model(**short, mm_encoder_outputs={"image": output}).logits, expected)
    close(model(**short, **IMAGES).logits, expected)
    with torch.no_grad():
        said = [
            each.generate(**short, **given, max_new_tokens=3, do_sample=False)
            for each, given in ((plain, dict(mm_encoder_outputs={"image": type(output)(**features)})), (model, IMAGES))
        ]
    assert torch.equal(*said)
    videos = model.get_video_features(patches(GRID[2:]), GRID[2:])
    assert [len(video) for video in videos.pooler_output] == image_tokens_left(model, GRID[2:]) == [sum(SECOND[2:])]


@pytest.mark.parametrize("name", SPEAKERS)
def test_a_prompt_that_was_not_shortened_is_refused(name):
    model = speaker(name)
    whole = prompt(UNITS[:2])
    expected = model(**whole, **IMAGES).logits
    apply_patch(model, "evit", keep_rate=1, fuse_token=False)
    assert torch.equal(model(**whole, **IMAGES).logits, expected)
    model.keep_rate = [1, 0.5, 1, 1, 1]
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 30, features: 15"):
        model(**whole, **IMAGES)
    remove_patch(model)
    assert torch.equal(model(**whole, **IMAGES).logits, expected)
    inner = apply_patch(model.model, "evit", **TWICE)
    assert len(inner.get_image_features(**IMAGES, return_dict=False)[1]) == 2
    remove_patch(inner)
    assert torch.equal(model(**whole, **IMAGES).logits, expected)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_prompts_are_compressed_to_what_is_left(name):
    """In a batch whose images leave unequal numbers."""
    model = apply_patch(speaker(name), "evit", **TWICE)
    long, short = prompt(UNITS[:1]), prompt(UNITS[1:2])
    padding = len(long["input_ids"][0]) - len(short["input_ids"][0])
    whole = {key: torch.cat((value, torch.nn.functional.pad(short[key], (padding, 0)))) for key, value in long.items()}
    made = compress(model, {**whole, **IMAGES})
    logits = model(**made).logits
    assert [int(row.sum()) for row in made["input_ids"] == 60] == SECOND[:2]
    alone = compress(model, dict(short, pixel_values=IMAGES["pixel_values"][96:], image_grid_thw=GRID[1:2]))
    close(logits[1, -len(alone["input_ids"][0]) :], model(**alone).logits[0])
    said = model.generate(**made, max_new_tokens=2, do_sample=False)
    assert torch.equal(said[:, -2], logits[:, -1].argmax(-1))
    whole.pop("mm_token_type_ids")
    assert torch.equal(compress(model, {**whole, **IMAGES})["position_ids"], made["position_ids"])
    with pytest.raises(ValueError, match="keep_rate, score and layer are not taken with a patched tower"):
        compress(model, {**whole, **IMAGES}, 0.5)
    with pytest.raises(ValueError, match="input_ids has 24 places for image tokens, but the images have 30"):
        compress(model, {**long, **IMAGES})
    remove_patch(model)
    with pytest.raises(TypeError, match="keep_rate must be given where the tower is not patched"):
        compress(model, {**whole, **IMAGES})
    apply_patch(model.model.visual, "evit", **TWICE)
    with pytest.raises(ValueError, match="the tower alone is patched: .* apply_patch to the whole model"):
        compress(model, {**whole, **IMAGES})


def test_the_patch_of_a_whole_model_is_removed_whole():
    model = apply_patch(speaker("Qwen3VL"), "evit", **TWICE)
    with pytest.raises(ValueError, match="the whole Qwen3VLForConditionalGeneration is patched: remove_patch that"):
        remove_patch(model.model.visual)
    remove_patch(model)


@pytest.mark.parametrize("merge", [1, 4])
def test_units_of_another_size(merge):
    """Of one patch, or of 4 x 4."""
    model = apply_patch(speaker("Qwen3VL", spatial_merge_size=merge), "evit", **TWICE)
    grid = torch.tensor([[1, 8, 12]])
    units = 96 // merge**2
    short = compress(model, {**prompt([units]), "pixel_values": patches(grid), "image_grid_thw": grid})
    (left,) = image_tokens_left(model, grid)
    assert left == kept_counts(kept_counts([units], 0.4), 0.4)[0]
    assert (short["input_ids"] == model.config.image_token_id).sum() == left
    assert model(**short).logits.isfinite().all()
