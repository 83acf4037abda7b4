"""Where patches went, for every method; and intermediate maps that are right, or refused."""

import pickle

import pytest
import torch
from timm.models._features import FeatureGetterNet

from support.patched_models import METHODS, ROTARY, images, model_of, patched, tokens_of
from tokenops import apply_patch, remove_patch, trace

HARD = [method for method in METHODS if method != "sit"]


def marked(model, x):
    """Tokens behind each block, where blocks do nothing but what the method does: each patch is its own channel."""
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
    seen, prefix = [], model.num_prefix_tokens

    def label(module, args, kwargs=None):
        tokens = torch.zeros_like(args[0])
        tokens[:, prefix:, :16] = torch.eye(16)
        return (tokens,)

    handles = [model.blocks[0].register_forward_pre_hook(label)]
    handles += [
        block.register_forward_hook(lambda m, a, y: seen.append(tokens_of(y)[:, prefix:, :16]))
        for block in model.blocks
    ]
    steps = trace(model, x).steps
    for handle in handles:
        handle.remove()
    return seen, steps


@pytest.mark.parametrize("method", ["tome", "evit", "patch_slimming", "cait"])
@pytest.mark.parametrize("family", ["layer_scale", "registers"])
def test_sources_say_where_each_patch_is(family, method):
    """Labels in the first channels show what a token is made of, if nothing else changes tokens."""
    model, x = model_of(family), images()
    options = dict(METHODS[method][1])
    if method == "evit":
        options["fuse_token"] = False
    apply_patch(model, method, **options)
    seen, steps = marked(model, x)
    assert steps and len({step.block for step in steps}) == len(steps)
    for step in steps:
        tokens = seen[step.block]
        assert tokens.shape[1] + model.num_prefix_tokens == step.tokens and step.weights is None
        for b in range(2):
            made_of = tokens[b] > 1e-6
            for patch in range(16):
                token = int(step.sources[b, patch])
                assert made_of[:, patch].nonzero().flatten().tolist() == ([] if token < 0 else [token])


def test_weights_of_sit():
    model, x = model_of("layer_scale"), images()
    apply_patch(model, "sit", **METHODS["sit"][1])
    with torch.no_grad():
        for i in (1, 2):
            model.blocks[i].slimming.weight[3].weight.normal_()
    seen, (first, second) = marked(model, x)
    assert (first.block, second.block, first.tokens, second.tokens) == (1, 2, 9, 5)
    assert first.sources is None and not first.weights.requires_grad
    for step in (first, second):
        torch.testing.assert_close(step.weights, seen[step.block], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.weights.sum(dim=2), torch.ones(2, step.tokens - 1))


def test_stages_of_evo_vit():
    model, x = apply_patch(model_of("plain", depth=6), "evo_vit"), images()
    found = trace(model, x)
    assert [(step.block, step.tokens) for step in found.steps] == [(2, 9), (4, 9)]
    for step in found.steps:
        assert [sorted(row[row >= 0].tolist()) for row in step.sources] == [list(range(8))] * 2


@pytest.mark.parametrize("method", METHODS)
def test_trace_leaves_the_model_as_it_is(method):
    model, x = patched(method).train(), images()
    model.blocks[1].eval()
    found = trace(model, x)
    assert found.method == method and found.grid == (4, 4) and found.steps
    assert model.training and model.blocks[0].mlp.training and not model.blocks[1].mlp.training
    for step in found.steps:
        assert (step.sources is None) != (step.weights is None)
        assert step.sources is None or (step.sources.shape == (2, 16) and step.sources.dtype == torch.int64)
    assert trace(apply_patch(remove_patch(model), method, **METHODS[method][0]), x).steps == []


@pytest.mark.parametrize("method", ["tome", "cait"])
@pytest.mark.parametrize("family", ["layer_scale", "registers", "average"])
def test_maps_cover_the_grid(family, method):
    model, x = model_of(family), images()
    apply_patch(model, method, **METHODS[method][1])
    steps = trace(model, x).steps
    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    maps = model.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    for i, (flat, image) in enumerate(zip(tokens, maps)):
        assert image.shape == (2, 32, 4, 4)
        sources = [step.sources for step in steps if step.block <= i][-1]
        if flat.shape[1] == 16:
            sources = torch.arange(16).expand(2, 16)
        for b in range(2):
            for patch in range(16):
                assert torch.equal(image[b, :, patch // 4, patch % 4], flat[b, sources[b, patch]])


def test_maps_in_timms_other_forms():
    model, x = apply_patch(model_of("registers"), "tome", r=4), images()
    everything = model.forward_intermediates(x)[1]
    features, some = model.forward_intermediates(x, indices=[0, 2], norm=True, return_prefix_tokens=True)
    assert torch.equal(features, model.forward_features(x))
    assert [tuple(y.shape) for y, _ in some] == [(2, 32, 4, 4)] * 2 and some[0][1].shape == (2, 5, 32)
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, everything[0])
    found = model.forward_intermediates(x, indices=1, output_dict=True)
    assert torch.equal(found["image_intermediates"][0], everything[2])
    assert torch.equal(model.get_intermediate_layers(x, n=1, reshape=True)[0], everything[2])
    getter = FeatureGetterNet(model, out_indices=[1], prune=False)
    assert torch.equal(getter(x)[0], everything[1])
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    unpickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(unpickled.forward_intermediates(x)[1][1], everything[1])
    remove_patch(model)
    assert "forward_intermediates" not in vars(model)
    assert model.forward_intermediates(x)[1][0].shape == (2, 32, 4, 4)


@pytest.mark.parametrize("method", ["evit", "patch_slimming", "sit"])
def test_maps_of_chosen_tokens_are_refused(method):
    model, x = patched(method), images()
    with pytest.raises(ValueError, match=f"not the grid's 4 x 4 patches \\({method}\\): use output_fmt='NLC'"):
        model.forward_intermediates(x)
    assert len(model.forward_intermediates(x, output_fmt="NLC")[1]) == 3
    if method == "sit":
        assert model.forward_intermediates(x, indices=[0])[1][0].shape == (2, 32, 4, 4)
    apply_patch(remove_patch(model), method, **METHODS[method][0])
    assert len(model.forward_intermediates(x)[1]) == 3


def test_maps_of_a_rotary_model():
    model, x = model_of("rope"), images()
    expected = model.forward_intermediates(x)[1]
    apply_patch(model, "evit", keep_rate=[1, 1, 0.5], fuse_token=False)
    assert "rope" in ROTARY and torch.equal(model.forward_intermediates(x, indices=[0, 1])[1][1], expected[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_model_ends_earlier(method):
    """timm's prune_intermediate_layers drops blocks, the last with them."""
    model, x = patched(method), images()
    expected = model.forward_intermediates(x, indices=[1], output_fmt="NLC", stop_early=True)[1][0]
    model.prune_intermediate_layers([1], prune_head=False)
    assert len(model.blocks) == 2
    if method == "tome":
        model.r = 3
    (found,) = model.forward_intermediates(x, indices=[1], output_fmt="NLC", intermediates_only=True)
    assert model(x).isfinite().all()
    if method != "evo_vit":  # whose stage ends with the model now
        assert torch.equal(found, expected)
    remove_patch(model)(x)
