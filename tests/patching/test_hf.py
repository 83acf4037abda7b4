"""apply_patch on transformers' models."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.patched_models import BEHIND, METHODS, blocks_of, gradients, images, merged_image, tokens_behind, tokens_of
from tokenops import apply_patch, remove_patch, trace

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from support.hf_models import SIZES, model_of, patched, pooled  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

KINDS = ["vit", "clip", "siglip", "vit_classifier"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_where_nothing_is_reduced(kind, method):
    model, x = model_of(kind), images()
    expected = model(x)
    apply_patch(model, method, **METHODS[method][0])
    for a, b in zip(model(x).to_tuple(), expected.to_tuple()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_tokens_become_fewer_and_a_patched_model_is_a_model(kind, method, tmp_path):
    model, x = model_of(kind), images()
    names, expected = list(model.state_dict()), pooled(model, x)
    apply_patch(model, method, **METHODS[method][1])
    prefix = int(kind != "siglip")
    counts = [prefix + n for n in BEHIND[method]]
    if method == "tome" and kind == "siglip":
        counts[-1] = 16
    assert tokens_behind(model, x) == counts
    y = pooled(model, x)
    assert y.shape == expected.shape and not torch.allclose(y, expected, atol=1e-3)
    y.sum().backward()
    lost = [name for name, p in model.named_parameters() if p.grad is None and "layer" in name.lower()]
    assert not [name for name in lost if "post_layernorm" not in name]
    assert [name for name in model.state_dict() if "slimming" not in name] == names
    model.save_pretrained(tmp_path)
    remove_patch(model)
    assert list(model.state_dict()) == names and torch.equal(pooled(model, x), expected)
    if method != "sit":
        assert torch.equal(pooled(type(model).from_pretrained(tmp_path), x), expected)


def plain_tome(layers, x, r):
    """ToMe over transformers' layers, plainly."""
    sizes = torch.ones(x.shape[:2])
    for layer in layers:
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        first, second = (
            (layer.layer_norm1, layer.layer_norm2)
            if hasattr(layer, "layer_norm1")
            else (layer.layernorm_before, layer.layernorm_after)
        )
        normed = first(x)
        q, k, v = (
            p(normed).unflatten(-1, (2, 16)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q @ k.transpose(-2, -1) / 4 + sizes.log()[:, None, None]).softmax(-1)
        out = getattr(attention, "o_proj", None) or attention.out_proj
        x = x + out((weights @ v).transpose(1, 2).flatten(2))
        merged = [merged_image(*of_image, r, 1) for of_image in zip(x, k.mean(dim=1), sizes)]
        x, sizes = (torch.stack([m[i] for m in merged]) for i in (0, 1))
        x = x + layer.mlp(second(x))
    return x


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_tome_equals_the_paper_written_plainly(kind):
    model, x = model_of(kind), images()
    with torch.no_grad():
        if kind == "vit":
            expected = model.layernorm(plain_tome(model.layers, model.embeddings(x), 3))
        else:
            embedded = model.pre_layrnorm(model.embeddings(x))
            expected = plain_tome(model.encoder.layers, embedded, 3)
        apply_patch(model, "tome", r=3)
        torch.testing.assert_close(model(x).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_the_vision_tower_of_a_pair():
    config = transformers.CLIPConfig(
        text_config=dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9
        ),
        vision_config=SIZES,
        projection_dim=8,
    )
    model, x = transformers.CLIPModel(config).eval(), images()
    text = list(model.text_model.named_modules())
    apply_patch(model, "tome", r=4)
    assert [step.tokens for step in trace(model, x).steps] == [13, 9, 5]
    assert tokens_behind(model, torch.tensor([[1, 2]]), pixel_values=x) == [13, 9, 5]
    assert list(model.text_model.named_modules()) == text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vit", pytest.param("siglip", marks=pytest.mark.slow)])
def test_compiles_whole(kind):
    model, x = apply_patch(model_of(kind), "tome", r=3), images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).pooler_output, model(x).pooler_output, rtol=0, atol=1e-5)


def test_an_image_of_all_patches():
    model, x = model_of("vit_masked"), images()
    expected = model(x).reconstruction
    for method in ("evit", "sit", "patch_slimming"):
        with pytest.raises(ValueError, match=f"{method}: ViTForMaskedImageModeling expects every patch"):
            apply_patch(model, method, **METHODS[method][1])
    apply_patch(model, "tome", r=4)
    assert model(x).reconstruction.shape == expected.shape
    model.r = 0
    torch.testing.assert_close(model(x).reconstruction, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing(kind, method):
    model, x = patched(method, kind), images()
    expected, kept = gradients(model.train(), x, pooled)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, less = gradients(model.train(), x, pooled)
    assert found.keys() == expected.keys() and 2 * less < kept
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if method in ("tome", "evo_vit"):  # what they hand on would be lost
        with pytest.raises(ValueError, match="got tuple: .* pass use_reentrant=False"):
            gradients(model.train(), x, pooled)
        return
    found, _ = gradients(model.train(), x, pooled)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["tome", "evo_vit"])
def test_gradients_are_not_lost_behind_a_block_that_is_not_checkpointed(method):
    options = dict(r=3) if method == "tome" else dict(stages=(1,))
    model, x = apply_patch(model_of("vit"), method, **options).train(), images()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in model.layers[:2]:
        layer.eval()
    with pytest.raises(ValueError, match="tokens whose gradients are lost: .* pass use_reentrant=False"):
        model(x)
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_are_the_tokens_behind_each_block(kind, method):
    model, x = patched(method, kind), images()
    blocks, behind = blocks_of(model), []
    hooks = [b.register_forward_hook(lambda m, a, y: behind.append(tokens_of(y))) for b in blocks]
    hooks.append(blocks[0].register_forward_pre_hook(lambda m, a: behind.append(a[0])))
    out = model(pixel_values=x, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(out.hidden_states) == 4 and all(map(torch.equal, out.hidden_states, behind))
    prefix = int(kind != "siglip")
    assert [state.shape[1] for state in out.hidden_states[:3]] == [prefix + n for n in (16, *BEHIND[method][:2])]
    if hasattr(out, "last_hidden_state"):
        last = out.hidden_states[-1]
        norm = getattr(model, "layernorm" if kind == "vit" else "post_layernorm")
        torch.testing.assert_close(out.last_hidden_state, last if kind == "clip" else norm(last))
    model.config.output_hidden_states = True
    assert all(map(torch.equal, model(pixel_values=x).hidden_states, behind))
    assert torch.equal(model(pixel_values=x, output_hidden_states=-2).hidden_states[-2], behind[2])


@pytest.mark.parametrize("kind, implementation", [("clip", "sdpa"), ("clip", "eager"), ("vit", "eager")])
@pytest.mark.parametrize("method", METHODS)
def test_attention_weights_are_refused(method, kind, implementation):
    model, x = model_of(kind, attn_implementation=implementation), images()
    apply_patch(model, method, **METHODS[method][1])
    with pytest.raises(ValueError, match="output_attentions was given to a patched model"):
        model(x, output_attentions=True)
    if implementation == "eager":
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="config.output_attentions is on"):
            model(x)


@pytest.mark.parametrize("method", METHODS)
def test_threads(method):
    model = patched(method, "clip")
    given = [images(seed=seed) for seed in range(12)]

    def run(x):
        with torch.no_grad():
            return model(x, output_hidden_states=True).hidden_states

    expected = [run(x) for x in given]
    with ThreadPoolExecutor(4) as pool:
        for found, same in zip(pool.map(run, given), expected):
            assert all(map(torch.equal, found, same))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_grid_of_another_shape_with_as_many_patches(kind, method):
    model = patched(method, kind)
    for height, width in ((16, 64), (64, 16)):
        x = images(side=64)[:, :, :height, :width]
        if method in ("cait", "patch_slimming"):
            words = f"images give {height // 8} x {width // 8} patches, but .* fitted to a grid of 4 x 4"
            with pytest.raises(ValueError, match=words):
                model(x, interpolate_pos_encoding=True)
        else:
            counts = tokens_behind(model, images())
            assert tokens_behind(model, x, interpolate_pos_encoding=True) == counts
    assert pooled(model, images()).isfinite().all()


def offloaded(model, how, folder):
    """The model by accelerate, with weights that are not where it computes."""
    if how == "cpu":
        return accelerate.cpu_offload(model, "cpu")
    if how == "disk":
        return accelerate.disk_offload(model, folder, "cpu")
    parts = model._no_split_modules
    where = accelerate.infer_auto_device_map(model, {"cpu": 90_000, "disk": 10**9}, no_split_module_classes=parts)
    assert {"cpu", "disk"} == set(where.values())
    whole = [name for name, module in model.named_modules() if type(module).__name__ in parts]
    assert len([name for name in whole if "layers" in name]) == 3
    assert not [key for key in where for name in whole if key.startswith(f"{name}.")]
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_weights_elsewhere(kind, method, how, tmp_path):
    plain, x = model_of(kind), images()
    torch.manual_seed(3)
    expected, last = pooled(apply_patch(copy.deepcopy(plain), method, **METHODS[method][1]), x), pooled(plain, x)
    for before in (True, False):
        model = copy.deepcopy(plain)
        if before:
            model = offloaded(model, how, tmp_path / "before")
        torch.manual_seed(3)
        apply_patch(model, method, **METHODS[method][1])
        if not before:
            model = offloaded(model, how, tmp_path / "after")
        assert any(p.is_meta for p in model.parameters())
        torch.testing.assert_close(pooled(model, x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled(remove_patch(model), x), last, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_accelerate_that_are_taken_off(method, tmp_path):
    """They leave a forward on each module, of the class that it had."""
    plain, x = model_of("vit"), images()
    torch.manual_seed(3)
    expected, last = pooled(apply_patch(copy.deepcopy(plain), method, **METHODS[method][1]), x), pooled(plain, x)
    for before in (True, False):
        model = accelerate.dispatch_model(copy.deepcopy(plain), {"": "cpu"}, force_hooks=True)
        model = offloaded(model, "cpu", tmp_path)
        if before:
            accelerate.hooks.remove_hook_from_submodules(model)
            assert "forward" in vars(model.layers[0].layernorm_after)
        torch.manual_seed(3)
        apply_patch(model, method, **METHODS[method][1])
        if not before:
            accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(pooled(model, x), expected, rtol=0, atol=1e-5)
        assert torch.equal(pooled(copy.deepcopy(model), x), pooled(model, x))
        assert torch.equal(pooled(remove_patch(model), x), last)


@pytest.fixture
def no_accelerator():
    """None that another test has made, and none for others."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_mixed_precision(method):
    model, x = patched(method, "vit_classifier"), images()
    single, _ = gradients(copy.deepcopy(model).train(), x, pooled)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, optimizer = trainer.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    with trainer.autocast():
        loss = pooled(model.train(), x).float().square().sum()
    trainer.backward(loss)
    inner = trainer.unwrap_model(model)
    for name, p in inner.named_parameters():
        if name in single:
            close = torch.nn.functional.cosine_similarity(p.grad.flatten(), single[name].flatten(), dim=0)
            assert close > 0.9 or single[name].norm() < 1e-3, (name, close)
    optimizer.step()
    assert not [n for n, p in inner.named_parameters() if n in single and torch.equal(p, before[n])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_pickles_and_loads(kind, method, tmp_path):
    model, x = model_of(kind), images()
    names = {name: type(module) for name, module in model.named_modules()}
    apply_patch(model, method, **METHODS[method][1])
    y = pooled(model, x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(pooled(twin, x), y)
        remove_patch(twin)
        assert {name: type(module) for name, module in twin.named_modules()} == names
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    again = apply_patch(type(model).from_pretrained(tmp_path), method, **METHODS[method][1])
    if method == "sit":  # what was added to the model
        again.load_state_dict(model.state_dict())
    assert torch.equal(pooled(again, x), y)


def test_what_is_refused():
    x = images()
    model = apply_patch(model_of("vit"), "tome", r=2)
    with pytest.raises(ValueError, match="attention_mask was given"):
        model(x, attention_mask=torch.tensor([[1] * 16 + [0]] * 2))
    swin = transformers.SwinModel(transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1]))
    with pytest.raises(TypeError, match="SwinModel is no vision transformer that can be patched: "):
        apply_patch(swin, "tome", r=1)


def test_images_of_another_size():
    x = images(side=48)
    model = apply_patch(model_of("vit"), "tome", r=5)
    assert tokens_behind(model, x, interpolate_pos_encoding=True) == [32, 27, 22]
    model = apply_patch(remove_patch(model), "patch_slimming", schedule=[17, 9, 5])
    with pytest.raises(ValueError, match="images give 6 x 6 patches, but the method was fitted to a grid of 4 x 4"):
        model(x, interpolate_pos_encoding=True)
    model = apply_patch(remove_patch(model), "cait", points={0: "vertical"})
    with pytest.raises(ValueError, match="6 x 6 patches"):
        model(x, interpolate_pos_encoding=True)


def test_eager_attention_and_half_precision():
    model, x = model_of("clip", attn_implementation="eager"), images()
    expected = model(x).pooler_output
    apply_patch(model, "tome", r=0)
    torch.testing.assert_close(model(x).pooler_output, expected, rtol=0, atol=1e-5)
    model.r = 3
    assert not torch.allclose(model(x).pooler_output, expected, atol=1e-3)
    half = model.bfloat16()(x).pooler_output
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
