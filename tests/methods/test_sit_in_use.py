"""The SiT models in use: checkpoints, inference, timm's conventions, precision, compilers."""

import argparse

import pytest
import timm
import torch

import tokenops
from support.models import close, images
from support.sit_models import TINY, slimmings, tiny
from tokenops.methods import for_inference, load_checkpoint
from tokenops.methods.lvvit import Scale


def test_load_checkpoint(tmp_path):
    from safetensors.torch import save_file

    model = tiny()
    x = images(model)
    state = model.state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "official.pth")
    torch.save(state, tmp_path / "plain.pth")
    save_file(state, tmp_path / "file.safetensors")
    for file in ("official.pth", "plain.pth", "file.safetensors"):
        other = load_checkpoint(tiny(), tmp_path / file)
        assert torch.equal(other(x), model(x))
    created = timm.create_model("sit_lvvit_xsmall", checkpoint_path=str(tmp_path / "official.pth"), **TINY).eval()
    assert torch.equal(created(x), model(x))


class Evil:
    def __reduce__(self):
        return (open, ("written", "w"))


def test_load_checkpoint_executes_nothing_and_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    torch.save({"model": model.state_dict(), "more": Evil()}, "evil.pth")
    with pytest.raises(RuntimeError, match="weights_only"):
        load_checkpoint(model, "evil.pth")
    assert not (tmp_path / "written").exists()
    with pytest.raises(FileNotFoundError, match="no file missing.pth"):
        load_checkpoint(model, "missing.pth")
    state = model.state_dict()
    del state["blocks.1.slimming.scale"]
    torch.save(state, "stripped.pth")
    with pytest.raises(RuntimeError, match="Missing key.*slimming.scale"):
        load_checkpoint(model, "stripped.pth")


@pytest.mark.parametrize("name", ["sit_lvvit_xsmall", "sit_lvvit_large", "sit_deit_tiny"])
@torch.no_grad()
def test_for_inference_changes_no_output(name):
    model = tiny(name).train()
    model(images(model))  # batch norm has seen something
    model.eval()
    x = images(model)
    before = model(x)
    assert for_inference(model) is model
    close(model(x), before)
    assert not any(".bn" in key for key in model.state_dict())
    assert not any(isinstance(module, Scale) for module in model.modules())
    assert not model.training
    close(for_inference(model)(x), before)


@torch.no_grad()
def test_aggregation_maps():
    model = tiny(img_size=(64, 96), stage_blocks=(1, 1, 1, 1))
    x = images(model)
    maps = aggregation_maps(model, x)
    assert [m.shape for m in maps] == [(2, 12, 4, 6), (2, 6, 4, 6), (2, 3, 4, 6)]
    for m in maps:
        assert (m >= 0).all()
        close(m.sum((2, 3)), torch.ones(m.shape[:2]))
    # without attention and MLP the slim tokens are exactly these mixtures of the patch tokens
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_(), layer.bias.zero_()
    patches = model._pos_embed(model.patch_embed(x))[:, 1:]
    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for m, slim in zip(aggregation_maps(model, x), tokens[1:], strict=True):
        close(m.flatten(2) @ patches, slim)
    assert aggregation_maps(tiny("sit_deit_tiny", stage_blocks=(2,)), torch.randn(1, 3, 64, 64)) == []


def aggregation_maps(model, x):
    found = tokenops.trace(model, x)
    return [step.weights.unflatten(2, found.grid) for step in found.steps]


def test_feature_access():
    model = tiny()
    x = images(model)
    final, stages = model.forward_intermediates(x, indices=[0, 1, 3], output_fmt="NLC")
    assert [s.shape for s in stages] == [(2, 16, 32), (2, 8, 32), (2, 4, 32)]
    close(final, model.forward_features(x))
    close(model.forward_head(final), model(x))
    assert model.forward_head(final, pre_logits=True).shape == (2, 32)
    grid, prefix = model.forward_intermediates(
        x, [0], return_prefix_tokens=True, stop_early=True, intermediates_only=True
    )[0]
    assert grid.shape == (2, 32, 4, 4) and prefix.shape == (2, 1, 32)
    assert torch.equal(grid.flatten(2).transpose(1, 2), stages[0])
    last = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    close(last, final[:, 1:])
    with pytest.raises(ValueError, match="block 1 gives 8 tokens that are not the grid's 4 x 4 patches"):
        model.forward_intermediates(x)


def test_classifier_and_settings():
    model = tiny(in_chans=1, drop_rate=0.5, drop_path_rate=0.3)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert [getattr(b.drop_path1, "drop_prob", 0) for b in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert model.head_drop.p == 0.5 and model.num_prefix_tokens == 1
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    model.reset_classifier(0)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, model.num_features)


def test_initialisation():
    model = timm.create_model("sit_lvvit_xsmall", stage_blocks=(1, 1, 1, 1))
    for weight in (
        model.blocks[0].attn.qkv.weight,
        slimmings(model)[0].weight[1].weight,
        model.head.weight,
        model.pos_embed,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    slimming = slimmings(model)[0]
    assert slimming.scale.item() == 1 and not slimming.weight[3].bias.any() and model.cls_token.any()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(img_size=100), r"img_size=\(100, 100\), but height and width"),
        (dict(stem="patch"), "stem='patch'"),
        (dict(stage_blocks=(1, 0, 2)), r"stage_blocks=\(1, 0, 2\)"),
    ],
)
def test_errors_of_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_errors_of_input():
    model = tiny()
    for shape in ((2, 3, 64, 80), (2, 4, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"x must be images \(B, 3, 64, 64\), but got \("):
            model(torch.randn(shape))


def test_exports_with_standard_operators_only():
    model = tiny()
    x = images(model)
    with tokenops.use_backend("reference"):
        exported = torch.export.export(model, (x,))
    namespaces = {node.target.namespace for node in exported.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces == {"aten"}
    close(exported.module()(x), model(x))
