"""Models that make maps of what comes out of several blocks: every patch is there, and blocks behind run on fewer."""

import copy

import pytest
import torch

from support.patched_models import METHODS, images
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, trace

transformers = pytest.importorskip("transformers")

from support.hf_models import SIZES  # noqa: E402

REDUCING = {
    "tome": dict(r=3),
    "evo_vit": dict(prune_ratio=0.5, stages=(1,)),
    "cait": dict(points={0: "horizontal", 1: "vertical"}),
}


def backbone(kind="Dinov2", **kwargs):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **kwargs)
    return redrawn(getattr(transformers, f"{kind}Backbone")(config))


def seen_by_attention(model, x):
    """How many tokens the attention of each block is given, and what the model returns."""
    counts = []
    layers = [layer for name, layer in model.named_modules() if name.endswith(("attention", "attn"))]
    hooks = [layer.register_forward_pre_hook(lambda m, a: counts.append(a[0].shape[1])) for layer in layers]
    with torch.no_grad():
        out = model(x)
    for hook in hooks:
        hook.remove()
    return counts, out


@pytest.mark.parametrize("method", REDUCING)
def test_a_map_of_every_block_while_tokens_are_fewer(method):
    model, x = backbone(out_indices=[1, 2, 3], apply_layernorm=False), images()
    twin = transformers.Dinov2Model(model.config).eval()
    twin.load_state_dict(model.state_dict())
    apply_patch(model, method, **REDUCING[method])
    apply_patch(twin, method, **REDUCING[method])  # which nobody takes maps from
    counts, out = seen_by_attention(model, x)
    assert counts == dict(tome=[17, 14, 11], evo_vit=[17, 9, 9], cait=[17, 9, 5])[method]
    states = twin(x, output_hidden_states=True).hidden_states
    waiting = states[1][:, 1:]
    for i, found in enumerate(out.feature_maps, 1):
        tokens, sources = states[i][:, 1:], [step.sources for step in trace(twin, x).steps if step.block == i - 1]
        if method == "evo_vit" and i == 2:  # those that wait for the end of the stage are as before it
            sources = sources[0].unsqueeze(2)
            rows = tokens.gather(1, sources.clamp(min=0).expand(-1, -1, tokens.shape[2]))
            tokens = torch.where(sources >= 0, rows, waiting)
        elif tokens.shape[1] < 16:
            last = [step.sources for step in trace(twin, x).steps if step.block <= i - 1][-1]
            tokens = tokens.gather(1, last.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        expected = tokens.transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "Pixio"])
@pytest.mark.parametrize("method", ["evit", "patch_slimming", "sit"])
def test_maps_of_patches_that_are_gone_are_refused_at_once(kind, method):
    model, x = backbone(kind, out_indices=[1, 3]), images()
    expected = model(x).feature_maps
    with pytest.raises(ValueError, match=f"{method}: {kind}Backbone expects every patch token in its place"):
        apply_patch(model, method, **METHODS[method][1])
    assert all(map(torch.equal, model(x).feature_maps, expected))


def test_tokens_that_are_asked_for_as_they_are():
    model, x = backbone(out_indices=[1, 3], reshape_hidden_states=False), images()
    expected = copy.deepcopy(model)(x).feature_maps
    apply_patch(model, "evit", keep_rate=0.5, reduction_loc=(1,), fuse_token=False)
    assert [y.shape[1] for y in model(x).feature_maps] == [17, 9]
    assert torch.equal(model(x).feature_maps[0], expected[0])
    assert all(map(torch.equal, remove_patch(model)(x).feature_maps, expected))


@pytest.mark.filterwarnings("ignore")
def test_gradients_and_a_compiler_behind_maps():
    model, x = backbone(out_indices=[1, 2, 3]), images()
    apply_patch(model, "tome", r=3)
    sum(y.square().sum() for y in model(x).feature_maps).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "layer." in name)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(x).feature_maps, model(x).feature_maps):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_detection_tokens_stand_where_they_stood():
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        **{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3, use_mid_position_embeddings=False
    )
    model, x = redrawn(transformers.YolosForObjectDetection(config)), images()
    expected = model(x).logits
    with pytest.raises(TypeError, match="adds positions to all tokens between blocks: it must be without"):
        other = transformers.YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3)
        apply_patch(transformers.YolosForObjectDetection(other), "tome", r=1)
    apply_patch(model, "tome", r=0)
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
    model.r = 3
    out = model.vit(x).last_hidden_state
    assert out.shape[1] == 1 + 7 + 3 and model(x).logits.shape == expected.shape
    heads = model.class_labels_classifier(out[:, -3:])
    torch.testing.assert_close(model(x).logits, heads)
    assert not torch.allclose(model(x).logits, expected, atol=1e-3)
    assert torch.equal(remove_patch(model)(x).logits, expected)
