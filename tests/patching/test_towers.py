"""apply_patch on what contains a vision tower: language models that see, heads that pool, wrappers and backbones."""

import copy

import pytest
import torch

from support.patched_models import METHODS, images, tokens_behind
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, trace

transformers = pytest.importorskip("transformers")

from support.hf_models import SIZES  # noqa: E402
from support.speakers import IMAGE, SPEAKER, WORDS, speaker  # noqa: E402

#: how many image tokens for one image
PLACES = {"Llava": 16, "LlavaNext": 52, "VipLlava": 16, "PaliGemma": 16, "Gemma3": 4, "DeepseekVL": 16}


def asked(name, count, x):
    """A prompt with places for so many image tokens, and two images."""
    words = torch.tensor([[3, *[IMAGE] * count, 4, 5]] * 2)
    given = dict(input_ids=words, attention_mask=torch.ones_like(words), pixel_values=x)
    if name == "LlavaNext":  # one image is itself, small, and its two halves
        given.update(pixel_values=torch.stack((x, x.flip(0), x / 2), 1), image_sizes=torch.tensor([[32, 64]] * 2))
    if name in ("PaliGemma", "Gemma3"):
        given["token_type_ids"] = (words == IMAGE).long()
    return given


def says(model, given):
    """The logits; generate says the same."""
    logits = model(**given).logits
    made = model.generate(**given, max_new_tokens=2, do_sample=False)
    start = given["input_ids"].shape[1]
    assert made.shape[1] == start + 2 and torch.equal(made[:, start], logits[:, -1].argmax(-1))
    return logits


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("method, options", [("tome", dict(r=3)), ("evo_vit", dict(prune_ratio=0.5, stages=(1,)))])
def test_a_model_that_speaks_gets_every_patch(name, method, options):
    model, given = speaker(name), asked(name, PLACES[name], images())
    expected = says(model, given)
    apply_patch(model, method, **options)
    logits = says(model, given)
    assert logits.shape == expected.shape and not torch.allclose(logits, expected, atol=1e-3)
    if method == "tome":
        model.r = 0
        torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(remove_patch(model)(**given).logits, expected)


#: options that say the same of a tower with a block fewer, but for schedules
SHORTER = {
    "tome": dict(r=3),
    "evit": dict(keep_rate=0.5, reduction_loc=(0,)),
    "evo_vit": dict(prune_ratio=0.5, stages=(1,)),
    "patch_slimming": dict(schedule=[13, 9, 9]),
    "sit": dict(keeping_ratio=0.5, locations=(1,)),
    "cait": dict(points={0: "horizontal", 1: "vertical"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_llava_sees_what_a_tower_that_ends_there_gives(method):
    model, x = speaker("Llava"), images()
    tower, options = model.model.vision_tower, dict(SHORTER[method])
    shorter = copy.deepcopy(tower)
    shorter.encoder.layers = shorter.encoder.layers[:2]
    apply_patch(model, method, **options)
    if method == "patch_slimming":
        options["schedule"] = options["schedule"][:2]
    if method == "tome":
        options["unmerge"] = True
    apply_patch(shorter, method, **options)
    if method == "sit":
        shorter.encoder.layers[1].slimming.load_state_dict(tower.encoder.layers[1].slimming.state_dict())
    seen = shorter(x).last_hidden_state[:, 1:]
    features = torch.stack(model.get_image_features(x).pooler_output)
    torch.testing.assert_close(features, model.model.multi_modal_projector(seen), rtol=0, atol=1e-5)
    count = dict(evit=9, patch_slimming=8, sit=8, cait=4).get(method, 16)
    assert seen.shape[1] == count
    says(model, asked("Llava", count, x))


@pytest.mark.parametrize("name", ["Llava", "PaliGemma", "DeepseekVL"])
def test_fewer_image_tokens_where_the_prompt_has_fewer_places(name):
    model, x = speaker(name), images()
    apply_patch(model, "tome", r=3, unmerge=False)
    count = 10 if name == "Llava" else 7  # LLaVA does not see the last block
    steps = trace(model, x).steps
    assert steps[1 if name == "Llava" else 2].tokens - int(name == "Llava") == count
    says(model, asked(name, count, x))
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**asked(name, 16, x))


def test_a_schedule_must_leave_patches_where_they_are_taken():
    model, x = speaker("Llava"), images()
    with pytest.raises(ValueError, match="leaves no patch to layer 2"):
        apply_patch(model, "patch_slimming", schedule=[17, 1, 1])
    says(apply_patch(model, "patch_slimming", schedule=[17, 9, 1]), asked("Llava", 8, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["tome", "evo_vit", "evit"])
def test_a_model_that_speaks_learns_with_checkpoints(method):
    model = apply_patch(speaker("Llava"), method, **SHORTER[method]).train()
    given = asked("Llava", 9 if method == "evit" else 16, images())

    def gradients():
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len([name for name in expected if "vision_tower.encoder.layers" in name]) == 32  # of two blocks
    model.gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_one_tower_of_two_is_patched_by_itself():
    tower = dict(SIZES, model_type="clip_vision_model")
    config = transformers.VideoLlavaConfig(vision_config=tower, text_config=dict(SPEAKER, model_type="llama"))
    model = transformers.VideoLlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"several .* apply_patch\(model, ..., module='model.(video|image)_tower'\)"):
        apply_patch(model, "tome", r=2)
    apply_patch(model.model.image_tower, "tome", r=2)
    assert tokens_behind(model.model.image_tower, images()) == [15, 13, 11]


def pair(kind, **vision):
    """A model with a vision tower and a text tower, or the head of one on the vision tower of it."""
    torch.manual_seed(0)
    family = kind.partition("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(
        text_config=WORDS, vision_config=dict(SIZES, **vision), num_labels=3
    )
    return redrawn(getattr(transformers, kind)(config))


@pytest.mark.parametrize("kind", ["CLIPForImageClassification", "SiglipForImageClassification"])
def test_a_mean_of_patches_counts_merged_ones_by_their_size(kind):
    model, x = pair(kind), images()
    prefix = int(kind.startswith("CLIP"))
    asked_for = apply_patch(copy.deepcopy(model), "tome", r=3, unmerge=True)(x).logits
    bare = apply_patch(copy.deepcopy(model), "tome", r=3, unmerge=False)
    sources = trace(bare, x).steps[-1].sources
    tokens = bare.vision_model(x, output_hidden_states=True).last_hidden_state[:, prefix:]
    assert tokens.shape[1] == 7
    sizes = torch.stack([row.bincount(minlength=7) for row in sources]).float()
    expected = model.classifier((sizes[..., None] * tokens).sum(1) / 16)
    apply_patch(model, "tome", r=3)
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x).logits, asked_for, rtol=0, atol=0)
    assert not torch.allclose(bare(x).logits, expected, atol=1e-3)
    apply_patch(remove_patch(model), "random", r=3)
    sources, tokens = trace(model, x).steps[-1].sources, model.vision_model(x).last_hidden_state[:, prefix:]
    assert [len(row.unique()) for row in sources] == [7, 7] == [len(rows.unique(dim=0)) for rows in tokens]
    assert tokens.shape[1] == 16


@pytest.mark.parametrize("kind", ["CLIPForImageClassification", "SiglipForImageClassification"])
def test_a_mean_of_patches_with_other_methods(kind):
    model, x = pair(kind), images()
    prefix = int(kind.startswith("CLIP"))
    with pytest.raises(ValueError, match="leaves no patch to layer 3, but the model takes patches"):
        apply_patch(model, "patch_slimming", schedule=[17, 9, 1])
    apply_patch(model, "evit", **METHODS["evit"][1])
    tokens = model.vision_model(x).last_hidden_state
    assert tokens.shape[1] == prefix + 6  # 5 and what the others became, which counts as one
    torch.testing.assert_close(model(x).logits, model.classifier(tokens[:, prefix:].mean(1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_class_token_of_a_projection_and_of_a_pair(method):
    """The same weights in another model give the same, and class tokens do not ask for patches."""
    full, x = pair("CLIPModel"), images()
    config = full.config.vision_config
    config.projection_dim = full.config.projection_dim
    alone = transformers.CLIPVisionModelWithProjection(config).eval()
    alone.load_state_dict({k: v for k, v in full.state_dict().items() if k.startswith("vis")})
    torch.manual_seed(3)
    apply_patch(full, method, **METHODS[method][1])
    torch.manual_seed(3)
    apply_patch(alone, method, **METHODS[method][1])
    expected = alone(x).image_embeds
    assert torch.equal(full.get_image_features(pixel_values=x).pooler_output, expected)
    words = dict(input_ids=torch.tensor([[1, 2]]))
    unit = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(full(pixel_values=x, **words).image_embeds, unit)
    if method == "tome":
        assert tokens_behind(alone, x)[-1] == trace(full, x).steps[-1].tokens == 8


def test_the_class_token_of_a_pair_of_any_towers():
    tower, words = transformers.ViTModel(transformers.ViTConfig(**SIZES)), transformers.BertConfig(**WORDS)
    model = transformers.VisionTextDualEncoderModel(vision_model=tower, text_model=transformers.BertModel(words))
    alone, x = redrawn(model).vision_model, images()
    expected = apply_patch(copy.deepcopy(alone), "tome", r=3)(x)
    assert expected.last_hidden_state.shape[1] == 8
    out = apply_patch(model, "tome", r=3)(pixel_values=x, input_ids=torch.tensor([[1, 2]])).vision_model_output
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(out.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("method", METHODS)
def test_siglip_pools_by_attention(method):
    model, x = pair("SiglipModel"), images()
    expected = model.get_image_features(pixel_values=x).pooler_output
    apply_patch(model, method, **METHODS[method][1])
    y = model.get_image_features(pixel_values=x).pooler_output
    assert y.shape == expected.shape and not torch.allclose(y, expected, atol=1e-3)
    torch.testing.assert_close(y, model.vision_model.head(model.vision_model(x).last_hidden_state))
    assert torch.equal(remove_patch(model).get_image_features(pixel_values=x).pooler_output, expected)


def test_a_decoder_sees_the_tokens_that_are_left():
    words = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9, add_cross_attention=True)
    encoder = transformers.ViTModel(transformers.ViTConfig(**SIZES))
    decoder = transformers.AutoModelForCausalLM.from_config(words)
    model, x = redrawn(transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)), images()
    given = dict(pixel_values=x, decoder_input_ids=torch.tensor([[1, 2]] * 2))
    expected = model(**given).logits
    for method, count in dict(tome=17, evit=7, evo_vit=17, patch_slimming=4, sit=5, cait=5).items():
        apply_patch(model, method, **METHODS[method][1])
        out = model(**given)
        assert out.encoder_last_hidden_state.shape[1] == count and not torch.allclose(out.logits, expected, atol=1e-3)
        assert torch.equal(remove_patch(model)(**given).logits, expected)


SMALL = dict(img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=2)


def wrapped(kind):
    """timm's model in transformers' wrapper."""
    if kind == "TimmBackbone":
        config = transformers.TimmBackboneConfig(backbone="vit_tiny_patch16_224", out_indices=[1, 2])
        return redrawn(transformers.TimmBackbone(config, **SMALL))
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=SMALL)
    return redrawn(getattr(transformers, kind)(config))


@pytest.mark.parametrize("method", METHODS)
def test_timms_models_in_transformers_wrapper(method):
    model, x = wrapped("TimmWrapperForImageClassification"), images()
    expected = model(x).logits
    apply_patch(model, method, **METHODS[method][1])
    y = model(x).logits
    assert y.shape == expected.shape and not torch.allclose(y, expected, atol=1e-3)
    assert torch.equal(model.timm_model(x), y)
    states = model(x, output_hidden_states=True, output_fmt="NLC").hidden_states
    assert [state.shape[1] for state in states] == [n - 1 for n in tokens_behind(model, x)]
    if method in ("evit", "patch_slimming", "sit"):
        with pytest.raises(ValueError, match=r"not the grid's 4 x 4 patches .* use output_fmt='NLC', or 'tome'"):
            model(x, output_hidden_states=True)
    else:
        assert [state.shape[2:] for state in model(x, output_hidden_states=True).hidden_states] == [(4, 4)] * 3
    assert torch.equal(remove_patch(model)(x).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_timms_maps_in_transformers_backbone(method):
    model, x = wrapped("TimmBackbone"), images()
    expected = model(x).feature_maps
    if method in ("evit", "patch_slimming", "sit"):
        with pytest.raises(ValueError, match=f"{method}: FeatureGetterNet expects every patch token in its place"):
            apply_patch(model, method, **METHODS[method][1])
        return
    apply_patch(model, method, **METHODS[method][1])
    assert trace(model, x).grid == (4, 4) and trace(model, x).steps[-1].block == (1 if method == "cait" else 2)
    maps = model._backbone.model.forward_intermediates(x, [1, 2], intermediates_only=True)
    for found, before, same in zip(model(x).feature_maps, expected, maps):
        assert torch.equal(found, same) and not torch.allclose(found, before, atol=1e-3)
    assert all(map(torch.equal, remove_patch(model)(x).feature_maps, expected))
