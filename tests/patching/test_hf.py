"""apply_patch on transformers' models."""

import copy

import pytest
import torch

from support.patched_models import METHODS, images, tokens_behind
from support.weights import redrawn
from tokenops.patching import apply_patch, remove_patch, trace

transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


def model_of(kind, **kwargs):
    torch.manual_seed(0)
    name = {"vit": "ViT", "clip": "CLIPVision", "siglip": "SiglipVision"}[kind.partition("_")[0]]
    config = getattr(transformers, f"{name}Config")(**SIZES, **kwargs)
    if kind == "vit_classifier":
        return redrawn(transformers.ViTForImageClassification(config))
    if kind == "vit_masked":
        config.encoder_stride = 8
        return redrawn(transformers.ViTForMaskedImageModeling(config))
    return redrawn(getattr(transformers, f"{name}Model")(config))


KINDS = ["vit", "clip", "siglip", "vit_classifier"]


def pooled(model, x):
    out = model(pixel_values=x)
    return out.logits if hasattr(out, "logits") else out.pooler_output


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
    behind = dict(tome=[13, 10, 7], evit=[9, 9, 6], evo_vit=[16] * 3, patch_slimming=[12, 8, 3], sit=[16, 8, 4])
    counts = [prefix + n for n in behind.get(method, [8, 4, 4])]
    if method == "tome" and kind == "siglip":
        counts[-1] = 16
    assert tokens_behind(model, x) == counts
    y = pooled(model, x)
    assert y.shape == expected.shape and not torch.allclose(y, expected, atol=1e-3)
    y.sum().backward()
    lost = [name for name, p in model.named_parameters() if p.grad is None and "layer" in name.lower()]
    assert not [name for name in lost if "post_layernorm" not in name]
    twin = copy.deepcopy(model)
    assert torch.equal(pooled(twin, x), y) and twin.tokenops_patch is not model.tokenops_patch
    assert [name for name in model.state_dict() if "slimming" not in name] == names
    model.save_pretrained(tmp_path)
    remove_patch(model)
    assert list(model.state_dict()) == names and torch.equal(pooled(model, x), expected)
    if method != "sit":
        assert torch.equal(pooled(type(model).from_pretrained(tmp_path), x), expected)


def plain_tome(model, layers, x, r):
    """ToMe over transformers' layers, plainly; sorted by the similarity of the mean keys."""
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
        unit = torch.nn.functional.normalize(k.mean(dim=1), dim=-1)
        merged = []
        for b in range(len(x)):
            A, B = list(range(2, x.shape[1], 2)), list(range(1, x.shape[1], 2))
            best, into = (unit[b, A] @ unit[b, B].T).max(dim=1)
            gone = best.argsort(descending=True)[:r].tolist()
            assign = torch.zeros(x.shape[1] - r, x.shape[1])
            assign[0, 0] = 1
            stay = [a for a in range(len(A)) if a not in gone]
            for row, a in enumerate(stay, 1):
                assign[row, A[a]] = 1
            for j, column in enumerate(B):
                assign[1 + len(stay) + j, column] = 1
            for a in gone:
                assign[1 + len(stay) + into[a], A[a]] = 1
            merged.append(assign * sizes[b])
        weights = torch.stack(merged)
        x, sizes = (weights @ x) / weights.sum(-1, keepdim=True), weights.sum(-1)
        x = x + layer.mlp(second(x))
    return x


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_tome_equals_the_paper_written_plainly(kind):
    model, x = model_of(kind), images()
    with torch.no_grad():
        if kind == "vit":
            expected = model.layernorm(plain_tome(model, model.layers, model.embeddings(x), 3))
        else:
            embedded = model.pre_layrnorm(model.embeddings(x))
            expected = plain_tome(model, model.encoder.layers, embedded, 3)
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
    if kind == "vit" and torch.__version__ < "2.12":  # there transformers makes a mask of its own where it is traced
        with pytest.raises(Exception, match="attention_mask was given to a patched model"):
            compiled(x)
        return
    torch.testing.assert_close(compiled(x).pooler_output, model(x).pooler_output, rtol=0, atol=1e-5)


def test_an_image_of_all_patches():
    model, x = model_of("vit_masked"), images()
    expected = model(x).reconstruction
    for method in ("evit", "sit", "cait", "patch_slimming"):
        with pytest.raises(ValueError, match=f"{method}: the model makes an image of all its patch tokens"):
            apply_patch(model, method, **METHODS[method][1])
    apply_patch(model, "tome", r=4)
    assert model(x).reconstruction.shape == expected.shape
    model.r = 0
    torch.testing.assert_close(model(x).reconstruction, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_what_is_refused():
    x = images()
    model = apply_patch(model_of("vit", attn_implementation="eager"), "tome", r=2)
    with pytest.raises(ValueError, match="output_attentions was given"):
        model(x, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="config.output_attentions is on"):
        model(x)
    model.config.output_attentions = False
    with pytest.raises(ValueError, match="attention_mask was given"):
        model(x, attention_mask=torch.tensor([[1] * 16 + [0]] * 2))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.train()(x)
    with pytest.raises(TypeError, match="no vision transformer .* blocks must be"):
        apply_patch(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)), "tome")


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
