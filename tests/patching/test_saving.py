"""save_patched and load_patched: what comes back is what was saved, or says what is wrong."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support.patched_models import METHODS, images, model_of
from tokenops import apply_patch, load_patched, remove_patch, save_patched
from tokenops.methods import CAIT, EViT
from tokenops.methods.patch_slimming import Schedule
from tokenops.patching import Flow, Method, Role, options_of
from tokenops.patching.as_json import decoded, encoded
from tokenops.patching.blocks import whole
from tokenops.patching.engine import METHODS as KNOWN

#: every method that says its names to the engine, with options that reduce
OPTIONS = {
    **{method: options for method, (_, options) in METHODS.items()},
    "dps": dict(counts=[17, 9, 4], after=1),
    "random": dict(keep_rate=0.5, reduction_loc=range(0, 3, 2)),
}


def result(model, x):
    """The last result of a model of timm or transformers; what is drawn is drawn alike."""
    torch.manual_seed(5)
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out[-1]


def applied(model, method, **options):
    """Patched, and trained by one step."""
    torch.manual_seed(3)
    model = apply_patch(model, method, **(options or OPTIONS[method])).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        out = model(images())
        loss = (out if isinstance(out, torch.Tensor) else out[-1]).square().mean()
    loss.backward()
    optimizer.step()
    return model.eval()


def other(family):
    """A model of a family with weights of its own."""
    model = model_of(family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    return model


def method_of(model):
    return model.tokenops_patch.method


def written(method):
    """A range comes back as the tuple of its numbers."""
    return {"reduction_loc": (0, 2)} if method == "random" else {}


def test_the_list_is_all_methods():
    assert OPTIONS.keys() == {name for name, kind in KNOWN.items() if kind.__module__.startswith("tokenops.")}


@pytest.mark.parametrize("family", ["plain", "registers"])
@pytest.mark.parametrize("method", OPTIONS)
def test_what_was_saved_comes_back(family, method, tmp_path):
    model, x = applied(model_of(family), method), images()
    save_patched(model, tmp_path / "new" / "folder")
    again = other(family)
    assert load_patched(again, tmp_path / "new" / "folder") is again
    assert torch.equal(result(again, x), result(model, x))
    assert type(method_of(again)) is type(method_of(model))
    assert options_of(method_of(again)) == {**options_of(method_of(model)), **written(method)}
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert torch.equal(result(remove_patch(again), x), result(remove_patch(model), x))


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("kind", ["vit", "clip", "siglip"])
def test_models_of_transformers(kind, method, tmp_path):
    pytest.importorskip("transformers")
    from support.hf_models import model_of as hf_model_of

    model, x = applied(hf_model_of(kind), method), images()
    save_patched(model, tmp_path)
    again = copy.deepcopy(load_patched(type(model), tmp_path))  # weights in memory that is aligned as the model's own
    assert torch.equal(result(again, x), result(model, x))
    assert options_of(method_of(again)) == {**options_of(method_of(model)), **written(method)}
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert (tmp_path / "tokenops.safetensors").exists() == (method in ("sit", "dps"))
    plain, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)  # as any folder of theirs
    assert not any(loading.values()) and not hasattr(plain, "tokenops_patch")
    expected = result(remove_patch(model), x)
    assert torch.equal(result(copy.deepcopy(plain), x), expected) and torch.equal(
        result(remove_patch(again), x), expected
    )


def test_a_part_of_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from support.hf_models import SIZES

    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9)
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=8)
    model, x = transformers.CLIPModel(config).eval(), images()
    apply_patch(model.vision_model, "sit", keeping_ratio=0.5)
    save_patched(model, tmp_path)
    assert json.loads((tmp_path / "tokenops.json").read_text())["module"] == "vision_model"
    again = load_patched(transformers.AutoModel, tmp_path)
    y = model.get_image_features(x).pooler_output
    assert torch.equal(again.get_image_features(x).pooler_output, y)
    half = load_patched(transformers.CLIPModel, tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in half.vision_model.state_dict().values()} == {torch.bfloat16}
    torch.testing.assert_close(half.get_image_features(x.bfloat16()).pooler_output.float(), y, rtol=0.1, atol=0.1)


def test_a_setting_is_saved_as_it_is_now(tmp_path):
    model, x = apply_patch(model_of("plain"), "tome", r=1), images()
    for r in (3, [4, 0, 2], (3, -1), 2.5):
        model.r = r
        save_patched(model, tmp_path)
        again = load_patched(model_of("plain"), tmp_path)
        assert again.r == r and type(again.r) is type(r)
        assert torch.equal(result(again, x), result(model, x))
    model = apply_patch(model_of("plain"), "evo_vit")
    model.stage_wise = False
    save_patched(model, tmp_path)
    assert load_patched(model_of("plain"), tmp_path).stage_wise is False


def test_points_keep_their_numbers_and_a_schedule_its_order(tmp_path):
    points = {1: "vertical", 0: "horizontal"}
    model = apply_patch(model_of("plain"), CAIT(points, kind=["scalar", "linear"]))
    save_patched(model, tmp_path)
    again = load_patched(model_of("plain"), tmp_path)
    assert method_of(again).points == points and method_of(again).kind == ["scalar", "linear"]
    schedule = Schedule.from_counts([9, 5, 2], (4, 4), order=[*range(15, -1, -1)])
    model = apply_patch(model_of("plain"), "patch_slimming", schedule=schedule)
    save_patched(model, tmp_path)
    assert not (tmp_path / "tokenops.safetensors").exists()  # of the method that was saved here before
    assert load_patched(model_of("plain"), tmp_path).schedule == schedule


def test_a_model_around_and_tied_weights(tmp_path):
    def model():
        made = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("head", "twin", "turned")})
        made["vit"] = model_of("plain")
        made["twin"].weight = made["head"].weight
        return made

    one, x = model(), images()
    apply_patch(one["vit"], "sit")
    with torch.no_grad():
        one["turned"].weight.t_()  # not contiguous
        one["vit"].blocks[1].slimming.scale.fill_(3)
    save_patched(one, tmp_path)
    again = load_patched(model(), tmp_path)
    assert torch.equal(result(again["vit"], x), result(one["vit"], x))
    assert again["twin"].weight is again["head"].weight
    for name in ("head", "turned"):
        assert torch.equal(again[name].weight, one[name].weight)


@dataclass(frozen=True)
class Halving(Role):
    """Every `step`-th patch of every image is left."""

    step: int = 1

    def run(self, block, flow, rope, record):
        x = whole(block, flow.tokens, rope)
        return Flow(torch.cat((x[:, : self.prefix], x[:, self.prefix :: self.step]), dim=1), None)


@pytest.fixture
def mine():
    """Methods of a user, forgotten afterwards."""
    before = dict(KNOWN)

    class Steps(Method):
        name = "steps_of_mine"

        def __init__(self, steps, *, last=None, **others):
            self._kept = dict(steps), last, others

        def roles(self, site):
            return [Halving(site.prefix, False, self._kept[0].get(i, 1)) for i in range(site.depth)]

    class Same(Steps):
        name = "with_a_constructor_of_its_own"

        def __init__(self, step):
            super().__init__({0: step})

    @dataclass(frozen=True)
    class Data(Method):
        name = "a_dataclass"
        step: int = 2

        def roles(self, site):
            return [Halving(site.prefix, False, self.step) for _ in range(site.depth)]

    class Bare(Method):
        name = "without_options"

        def roles(self, site):
            return [Halving(site.prefix, False, 2) for _ in range(site.depth)]

    yield {"steps": Steps, "same": Same, "data": Data, "bare": Bare}
    KNOWN.clear()
    KNOWN.update(before)


def test_methods_of_a_user(mine, tmp_path):
    x = images()
    for method, options in (
        (
            mine["steps"]({1: 2}, last=("a", [1.5, None, True]), deep=4),
            dict(steps={1: 2}, last=("a", [1.5, None, True]), deep=4),
        ),
        (mine["same"](3), dict(step=3)),
        (mine["data"](3), dict(step=3)),
        (mine["bare"](), {}),
    ):
        model = apply_patch(model_of("plain"), method)
        save_patched(model, tmp_path)
        again = load_patched(other("plain"), tmp_path)
        assert type(method_of(again)) is type(method) and options_of(method_of(again)) == options
        assert options_of(copy.deepcopy(method)) == options
        assert torch.equal(result(again, x), result(model, x))


@pytest.mark.parametrize("value", [object(), torch.ones(2), float("inf"), [1, {2}], {0: b"x"}, 1j, ("a", str)])
def test_options_that_json_has_not(mine, value, tmp_path):
    model = apply_patch(model_of("plain"), mine["steps"]({}, last=value))
    with pytest.raises(TypeError, match="steps_of_mine's option last has .*, but JSON takes finite numbers, text"):
        save_patched(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_classes_that_cannot_come_back(mine, tmp_path):
    class Nameless(mine["steps"]):
        pass

    class Positional(mine["bare"]):
        name = "positional"

        def __init__(self, *steps):
            pass

    class Set(mine["bare"]):
        name, setting = "set_later", "later"

        def __init__(self):
            self.value = 3

    for method, error, words in (
        (Nameless({}), ValueError, "Nameless is not known by a name of its own"),
        (Positional(1, 2), TypeError, r"Positional: steps=\(1, 2\) has no name"),
        (Set(), TypeError, "Set: its constructor does not take 'later', its setting"),
    ):
        with pytest.raises(error, match=words):
            save_patched(apply_patch(model_of("plain"), method), tmp_path / "folder")
    save_patched(apply_patch(model_of("plain"), Positional()), tmp_path / "folder")


def test_models_that_are_not_saved(tmp_path):
    def refused(model, words, error=ValueError):
        with pytest.raises(error, match=words):
            save_patched(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    refused(model_of("plain"), "this VisionTransformer is not patched: apply_patch comes first")
    refused("model", "must be a patched torch.nn.Module, but got 'model'")
    around = nn.Sequential(model_of("plain"), nn.Softmax(-1))
    apply_patch(around, "tome", r=1)
    refused(around[0], "patched as a part: save the Sequential around it")
    pair = nn.Sequential(apply_patch(model_of("plain"), "tome", r=1), apply_patch(model_of("plain"), "tome", r=2))
    refused(pair, "0, 1 are patched, but one part can be saved")
    refused(torch.compile(pair[0], backend="eager"), "torch.compile wraps the model")
    short = apply_patch(model_of("plain"), "tome", r=1)
    short.blocks = short.blocks[:2]
    refused(short, "the model has 2 blocks, but had 3 when it was patched")
    refused(apply_patch(model_of("plain"), "tome", r=1).to("meta"), "cls_token is on the meta device")

    class Odd(nn.Linear):
        def get_extra_state(self):
            return "text"

    around = nn.Sequential(model_of("plain"), Odd(5, 5))
    refused(apply_patch(around, "tome", r=1), "1._extra_state of the state dict is a str", TypeError)
    shared = type("DistributedDataParallel", (nn.Sequential,), {})(pair[0])
    refused(shared, "DistributedDataParallel shares the model's weights among processes: save the model within")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, but it must be a folder"):
        save_patched(pair[0], tmp_path / "file")


@pytest.fixture
def saved(tmp_path):
    """A folder of a SiT."""
    save_patched(applied(model_of("plain"), "sit"), tmp_path)
    return tmp_path


def refused(folder, error, words, model=None, **kwargs):
    """The error, and the model as it was."""
    model = other("plain") if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(error, match=words):
        load_patched(model, folder, **kwargs)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    state = before.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda found: found.update(format="tokenops.cait"), "must be a JSON object with format 'tokenops-patch'"),
        (lambda found: found.update(version=2), "version is 2, but this package reads 1"),
        (lambda found: found.update(weights="x"), "must have the keys .*, but has .*weights"),
        (
            lambda found: found.pop("module"),
            "must have the keys format, method, module, options, prefix, tower, version, but has",
        ),
        (lambda found: found.update(method="sitt"), "method 'sitt' is none of .*'sit'.*: one of your own must be"),
        (lambda found: found.update(method=["sit"]), "is none of"),
        (lambda found: found.update(module=1), "module and tower must be text or null"),
        (lambda found: found.update(module="trunk"), "module 'trunk' is no part of the VisionTransformer"),
        (lambda found: found.update(options=[]), "options an object"),
        (lambda found: found["options"].update(keep=0.5), "sit takes other options than .*keep: .*'keep'"),
        (lambda found: found["options"].update(keeping_ratio=2), "keeping_ratio=2, but it must be above 0"),
        (lambda found: found["options"].update(keeping_ratio="x"), "'<' not supported"),
        (lambda found: found["options"].update(keeping_ratio=0.01), "keeping_ratio=0.01 leaves none of 16"),
        (lambda found: found["options"].update(locations={"tuple": [7]}), r"locations=\(7,\)"),
        (lambda found: found["options"].update(locations={"list": [7]}), "option locations has .*'list'.* 'tuple' of"),
        (lambda found: found["options"].update(locations={"mapping": [1]}), "option locations has"),
        (lambda found: found["options"].update(locations={"mapping": [[[1], 2]]}), "option locations has"),
        (lambda found: found["options"].update(locations={"document": {}}), "sit takes no object for it"),
        (lambda found: found.update(method="patch_slimming", options={"schedule": {"document": {}}}), "schedule must"),
        (lambda found: found.update(method="dps", options={}), "dps takes other options than .*'counts'"),
        (lambda found: found["options"].update(locations={"tuple": [1]}), "Unexpected key.*2.slimming"),
    ],
)
def test_a_file_of_something_else(saved, change, words):
    found = json.loads((saved / "tokenops.json").read_text())
    change(found)
    (saved / "tokenops.json").write_text(json.dumps(found))
    refused(saved, ValueError, words)


def test_files_that_are_not_there_or_are_broken(saved, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "there is no tokenops.json in .*nowhere")
    for name in ("model.safetensors", "tokenops.safetensors"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:100])
        refused(saved, ValueError, f"{name} is no file of safetensors")
        (saved / name).unlink()
        refused(saved, FileNotFoundError, f"there is no {name} in ")
        (saved / name).write_bytes(whole)
    (saved / "tokenops.json").write_text("{")
    refused(saved, ValueError, "a tokenops.json must be JSON, but ")


@pytest.mark.parametrize(
    "name, key", [("model.safetensors", "blocks.1.attn.proj.bias"), ("tokenops.safetensors", "1.slimming.scale")]
)
def test_weights_that_do_not_fit(saved, name, key):
    weights = load_file(saved / name)
    for changed, words in (
        ({k: v for k, v in weights.items() if k != key}, f"{name} do not fit: .*\\s*Missing key.*{key}"),
        ({**weights, "more": torch.ones(1)}, f"{name} do not fit: .*\\s*Unexpected key.*more"),
        ({**weights, key: torch.ones(7)}, f"{name} do not fit: .*\\s*size mismatch for {key}"),
    ):
        save_file(changed, saved / name)
        refused(saved, ValueError, words)


def test_models_that_are_not_loaded(saved):
    refused(saved, ValueError, "do not fit", nn.Linear(2, 2))
    refused(saved, ValueError, "do not fit", model_of("plain", embed_dim=16))
    refused(saved, ValueError, "is patched already: remove_patch comes first", apply_patch(model_of("plain"), "sit"))
    refused(saved, TypeError, "dtype given, but only a class's", dtype=torch.float64)
    with pytest.raises(TypeError, match="must be a torch.nn.Module or a class of transformers, but got 'ViTModel'"):
        load_patched("ViTModel", saved)
    with pytest.raises(TypeError, match="Linear has no from_pretrained"):
        load_patched(nn.Linear, saved)
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_patched(model_of("plain").to("meta"), saved)


def test_what_transformers_cannot_save_or_load(tmp_path):
    transformers = pytest.importorskip("transformers")
    from support.hf_models import model_of as hf_model_of

    model = apply_patch(hf_model_of("vit_classifier"), "sit")
    model._hf_peft_config_loaded = True  # as peft's adapters make it
    with pytest.raises(ValueError, match="has adapters"):
        save_patched(model, tmp_path)
    model._hf_peft_config_loaded = False
    save_patched(model, tmp_path)
    kind = transformers.ViTForImageClassification
    with pytest.raises(ValueError, match="do not fit ViTModel: .*'unexpected_keys': .*classifier"):
        load_patched(transformers.ViTModel, tmp_path)
    with pytest.raises(TypeError, match="give its class, load_patched.ViTForImageClassification, folder"):
        load_patched(hf_model_of("vit_classifier"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit ViTForImageClassification"):
        load_patched(kind, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="do not fit ViTForImageClassification"):
        load_patched(kind, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has not all that from_pretrained needs"):
        load_patched(kind, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no config.json"):
        load_patched(kind, tmp_path)


def test_options_by_name():
    assert options_of(EViT(0.5)) == dict(keep_rate=0.5, reduction_loc=None, fuse_token=True)
    value = {0: "a", "b": (1, [2.5, {3: None}], True), 1.5: ()}
    again = decoded("x", json.loads(json.dumps(encoded("x", value))))
    assert again == value and type(again["b"][1][0]) is float and again["b"][2] is True
