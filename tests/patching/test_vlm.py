"""Processors that are fitted to patched language models: as many image tokens as features, end to end."""

import copy
import inspect
import pickle

import pytest
import torch

from support.patched_models import METHODS, images
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, tokens_left
from tokenops.patching.site import is_patched
from tokenops.vlm import fit_processor

transformers = pytest.importorskip("transformers")

from support.hf_models import SIZES, model_of  # noqa: E402
from support.speakers import IMAGE, SPEAKER, SPEAKERS, processor, read, speaker  # noqa: E402

#: those whose projector keeps as many tokens as it gets, in any number
COUNTING = ("Llava", "PaliGemma", "DeepseekVL")
#: methods that give every patch a token again, and those that do where a grid is made of the tokens
FULL = ("tome", "evo_vit")
MAPPED = (*FULL, "cait")
EVERY = {
    **METHODS,
    "dps": (dict(counts=[17, 17, 17]), dict(counts=[17, 9, 4], after=1)),
    "random": (dict(keep_rate=1), dict(keep_rate=0.5, reduction_loc=(0, 2))),
}
#: image tokens that are left of 16: of LLaVA behind the last block but one, of the others behind the last
LEFT = {
    "evit": (9, 6),
    "patch_slimming": (8, 3),
    "sit": (8, 4),
    "cait": (4, 4),
    "dps": (8, 3),
    "random": (8, 4),
}
#: which puts tokens in an order of its own even where all are left; LLaVA takes those before it
ORDERED = [("PaliGemma", "dps"), ("DeepseekVL", "dps")]
PAIRS = [(name, method) for name in SPEAKERS for method in EVERY if name in COUNTING or method in MAPPED]


@pytest.fixture(autouse=True)
def words_for_numbers(monkeypatch):
    """SmolVLM's processor asks for a package that only videos need."""
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", str)


def features_of(model, given):
    """Image tokens of a batch, ``(n, C)``."""
    takes = inspect.signature(model.model.get_image_features).parameters
    pooled = model.model.get_image_features(**{k: v for k, v in given.items() if k in takes}).pooler_output
    return torch.cat([tokens.flatten(0, -2) for tokens in pooled])


def counted(made, model, name):
    """Inputs with as many image tokens as the model has features, and how many."""
    given = read(fit_processor(made, model), name)
    given.pop("labels", None)
    count = int((given["input_ids"] == IMAGE).sum())
    assert count == len(features_of(model, given))
    return given, count


@pytest.mark.parametrize("name, method", PAIRS)
def test_as_many_image_tokens_as_features(name, method):
    model, made = speaker(name), processor(name)
    given, dense = counted(made, model, name)
    expected = model(**given).logits
    none, some = EVERY[method]
    apply_patch(model, method, **none)
    same, _ = counted(made, model, name)
    if (name, method) not in ORDERED:
        torch.testing.assert_close(model(**same).logits, expected, rtol=0, atol=1e-5)
    remove_patch(model)
    torch.manual_seed(3)
    apply_patch(model, method, **some)
    given, count = counted(made, model, name)
    left = 16 if method in FULL or name not in COUNTING else LEFT[method][name != "Llava"]
    assert tokens_left(model).output == left and count * 16 == dense * left
    assert model(**given).logits.shape[1] == given["input_ids"].shape[1]
    said = model.generate(**given, max_new_tokens=2, do_sample=False)
    assert said.shape[1] == given["input_ids"].shape[1] + 2


@pytest.mark.parametrize("name", COUNTING)
def test_a_prompt_alone_is_read_as_in_a_batch(name):
    model, made = apply_patch(speaker(name), "evit", **EVERY["evit"][1]), processor(name)
    given, _ = counted(made, model, name)
    both = model(**given).logits
    alone = {key: value[1:] for key, value in given.items() if key != "pixel_values"}
    kept = alone["attention_mask"][0].bool()
    alone = {key: value[:, kept] for key, value in alone.items()}
    one = model(**alone, pixel_values=given["pixel_values"][2:]).logits
    torch.testing.assert_close(one[0], both[1][kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SPEAKERS)
def test_it_lasts(name, tmp_path):
    """In copies, pickles and on disk; what is read is the same."""
    model = apply_patch(speaker(name), "tome", r=3, **(dict(unmerge=False) if name in COUNTING else {}))
    made = processor(name)
    expected = counted(made, model, name)[0]["input_ids"]
    made.save_pretrained(tmp_path)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), type(made).from_pretrained(tmp_path)):
        assert torch.equal(read(other, name)["input_ids"], expected)


@pytest.mark.parametrize("name", COUNTING)
def test_it_follows_the_model_when_fitted_again(name):
    model, made, counts = speaker(name), processor(name), []
    for r in (None, 3, 1):
        if r == 3:
            apply_patch(model, "tome", r=r, unmerge=False)
        elif r == 1:
            model.r = r
        counts.append(counted(made, model, name)[1] // 3)
    assert counts == ([16, 10, 14] if name == "Llava" else [16, 7, 13])
    assert counted(made, remove_patch(model), name)[1] == 3 * 16


@pytest.mark.parametrize(
    "more, count", [(dict(vision_feature_select_strategy="full"), 10), (dict(vision_feature_layer=-1), 6)]
)
def test_what_llava_takes_is_its_configs(more, count):
    model, made = apply_patch(speaker("Llava", **more), "evit", **EVERY["evit"][1]), processor("Llava")
    given, found = counted(made, model, "Llava")
    assert found == 3 * count
    assert model(**given).logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in SPEAKERS if name not in COUNTING])
@pytest.mark.parametrize("method", [method for method in EVERY if method not in MAPPED])
def test_a_grid_needs_every_patch(name, method):
    model = speaker(name)
    with pytest.raises(ValueError, match=f"{method}: {name}Model expects every patch .* use one of these"):
        apply_patch(model, method, **EVERY[method][1])
    with pytest.raises(ValueError, match=f"unmerge=False, but {name}Model expects every patch .* leave it out"):
        apply_patch(model, "tome", r=3, unmerge=False)
    assert not is_patched(model)


@pytest.mark.parametrize("method", ["patch_slimming", "dps"])
def test_a_patch_must_be_left_where_they_are_taken(method):
    """LLaVA takes none behind the last block."""
    option = "counts" if method == "dps" else "schedule"
    made, model = processor("Llava"), speaker("Llava")
    with pytest.raises(ValueError, match="leaves no patch to layer 2, but the model takes patches from there"):
        apply_patch(model, method, **{option: [17, 1, 1]}, **(dict(after=1) if method == "dps" else {}))
    apply_patch(model, method, **{option: [17, 9, 1]}, **(dict(after=1) if method == "dps" else {}))
    assert counted(made, model, "Llava")[1] == 3 * 8


CUT = dict(image_grid_pinpoints=[[32, 64]])
WIDE = dict(SIZES, hidden_size=64, num_attention_heads=1)
#: others that make a grid of the tokens, or take several layers: the tower, the words, more of the config
GRIDS = {
    "AyaVision": ("siglip_vision_model", "cohere2", SIZES, {}),
    "Cohere2Vision": ("siglip_vision_model", "cohere2", SIZES, {}),
    "LlavaNextVideo": ("clip_vision_model", "llama", SIZES, CUT),
    "Granite4Vision": (
        "siglip_vision_model",
        "granite",
        WIDE,
        dict(
            deepstack_layer_map=[[1, 0], [-2, 0]],
            spatial_target_layers=[0],
            downsample_rate="2/4",
            vision_feature_select_strategy="full",
            **CUT,
        ),
    ),
}


def tensors_in(found):
    found = getattr(found, "pooler_output", found)
    return [found] if isinstance(found, torch.Tensor) else [t for one in found or () for t in one]


@pytest.mark.parametrize("name", GRIDS)
def test_other_models_with_a_grid_get_one(name):
    torch.manual_seed(0)
    tower, words, sizes, more = GRIDS[name]
    vision = dict(sizes, model_type=tower, **(dict(vision_use_head=False) if tower.startswith("siglip") else {}))
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=dict(SPEAKER, model_type=words), image_token_id=IMAGE, **more
    )
    model, x = redrawn(getattr(transformers, f"{name}Model")(config)), images()[:1]
    given = dict(pixel_values=x)
    if "image_grid_pinpoints" in more:
        given = dict(pixel_values=torch.stack((x, x / 2, -x), 1), image_sizes=torch.tensor([[32, 64]]))

    def features():
        out = model.get_image_features(**given)
        return tensors_in(out) or [t for _, found in out.deepstack_features for t in found]

    expected = features()
    assert expected
    for method, (none, some) in {
        **{method: EVERY[method] for method in MAPPED},
        "random": (dict(r=0), dict(r=3)),
    }.items():
        apply_patch(model, method, **none)
        for found, dense in zip(features(), expected, strict=True):
            torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)
        remove_patch(model)
        apply_patch(model, method, **some)
        assert [found.shape for found in features()] == [dense.shape for dense in expected]
        remove_patch(model)
    with pytest.raises(ValueError, match=f"{name}Model expects every patch"):
        apply_patch(model, "evit")


@pytest.mark.parametrize("name", ["Blip2", "InstructBlip"])
@pytest.mark.parametrize("method", EVERY)
def test_queries_attend_to_any_number(name, method):
    torch.manual_seed(0)
    kinds = {part: getattr(transformers, f"{name}{part}Config") for part in ("Vision", "QFormer", "")}
    queries = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, encoder_hidden_size=32)
    config = kinds[""](
        vision_config=kinds["Vision"](**SIZES).to_dict(),
        qformer_config=kinds["QFormer"](hidden_size=32, vocab_size=20, **queries).to_dict(),
        text_config=dict(SPEAKER, model_type="llama"),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    model = redrawn(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    words = torch.tensor([[*[IMAGE] * 3, 4, 5]] * 2)
    given = dict(input_ids=words, attention_mask=torch.ones_like(words), pixel_values=images())
    if name == "InstructBlip":
        given["qformer_input_ids"] = words[:, 3:]
    expected = model(**given).logits
    apply_patch(model, method, **EVERY[method][0])
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-5)
    remove_patch(model)
    apply_patch(model, method, **EVERY[method][1])
    logits = model(**given).logits
    assert logits.shape == expected.shape and not torch.allclose(logits, expected, atol=1e-3)
    seen = model.vision_model(given["pixel_values"]).last_hidden_state.shape[1]
    assert seen == tokens_left(model).output == (17 if method in FULL else 1 + LEFT[method][1])


def test_what_does_not_belong_together_is_refused():
    llava, made = speaker("Llava"), processor("Llava")
    with pytest.raises(TypeError, match="processor is a CLIPImageProcessor, but fit_processor knows LlavaProcessor, "):
        fit_processor(made.image_processor, llava)
    with pytest.raises(TypeError, match="a Gemma3Processor is for Gemma3Model, but the model is one with a LlavaModel"):
        fit_processor(processor("Gemma3"), llava)
    with pytest.raises(TypeError, match="is for LlavaModel or VipLlavaModel, but the model is no language model"):
        fit_processor(made, model_of("clip"))
    with pytest.raises(TypeError, match="no vision transformer that can be patched"):
        fit_processor(made, llava.model.language_model)
    with pytest.raises(ValueError, match="images of 48 x 48 pixels, but the tower takes 32 x 32: set the size"):
        fit_processor(processor("Llava", side=48), llava)
    assert made.patch_size == 1


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_a_tower_of_any_size_has_the_processors(name):
    model, made = speaker(name), processor(name, side=48)
    given, count = counted(made, model, name)
    assert made.image_seq_len == 9 and count % 9 == 0
    apply_patch(model, "tome", r=3)
    assert counted(made, model, name)[1] == count
    assert model(**given).logits.isfinite().all()
