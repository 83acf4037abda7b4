"""CAIT's merged models compute what plain PyTorch written down here does, and stay timm's models."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.models import vision_transformer
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ResPostBlock
from torch import nn

import tokenops
from support.cait_merging import KINDS, MODELS, POINTS, SMALL, by_slices, dense, merged
from support.models import all_close, close, gradients, images
from tokenops import apply_patch, remove_patch, trace
from tokenops import nn as ours
from tokenops.methods.cait import Mlp, Structure, compact, merging, prunable, restructure, unmerge_tokens
from tokenops.methods.cait.merging import commutes, merges_of
from tokenops.ops.masked_channel_attention import faster
from tokenops.patching.blocks import Ask
from tokenops.patching.engine import PatchedAttention
from tokenops.patching.modules import plain_of


def literal(model, x):
    """Logits and every block's tokens of a merged model, row by row, in plain PyTorch."""
    P, (height, width) = model.num_prefix_tokens, model.patch_embed.grid_size
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    layers = []
    for block in model.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", attn.q_norm(q), attn.k_norm(k)).mul(q.shape[3] ** -0.5).softmax(dim=3)
        y = attn.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        x = x + block.ls1(y)
        mlp, y = block.mlp, block.norm2(x)
        y = mlp.fc2(mlp.norm(F.gelu(mlp.fc1(y)))) if isinstance(mlp, timm_layers.Mlp) else mlp(y)
        x = x + block.ls2(y)
        if hasattr(block, "merge"):
            axis = block.merge.axis
            y = by_slices(block.merge, x[:, P:].unflatten(1, (height, width)), axis)
            height, width = y.shape[1:3]
            x = torch.cat((x[:, :P], y.flatten(1, 2)), dim=1)
        layers.append(x)
    return model.forward_head(model.norm(x)), layers


@pytest.mark.parametrize("name", MODELS)
def test_conversion_changes_nothing(name):
    model = dense(name)
    x = images(model)
    expected, names = model(x), list(model.state_dict())
    assert prunable(model) is model and all(type(block.attn) is ours.Attention for block in model.blocks)
    kind = timm_layers.SwiGLU if name == "swiglu" else Mlp
    assert all(type(block.mlp) is kind and type(block) is vision_transformer.Block for block in model.blocks)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    first = model.blocks[0].attn, model.blocks[0].mlp
    prunable(model)
    assert (model.blocks[0].attn, model.blocks[0].mlp) == first  # again: nothing to do
    mask = torch.ones(model.num_prefix_tokens + 16, model.num_prefix_tokens + 16).tril().bool()
    if name != "lvvit":
        masked = model.forward_features(x, attn_mask=mask)
        torch.testing.assert_close(masked, dense_again(model, name).forward_features(x, attn_mask=mask))


def dense_again(model, name):
    """timm's model with the weights of a converted one."""
    plain = MODELS[name]().eval()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["raster", "block"])
def test_merged_models_are_the_literal_ones(name, layout):
    for kind in KINDS:
        model = merged(name, kind=kind, layout=layout)
        x = images(model)
        logits, (expected, layers) = model(x), literal(model, x)
        close(logits, expected)
        for i in (0, 1, 2, 3):
            tokens = model.forward_intermediates(x, [i], output_fmt="NLC", return_prefix_tokens=True)[1][0]
            tokens, prefix = tokens if isinstance(tokens, tuple) else (tokens, tokens[:, :0])
            P = model.num_prefix_tokens
            close(prefix, layers[i][:, :P])
            raster = tokens  # behind the second merge
            if layout == "block" and i < 2:  # (i, j, dy) to (i, dy, j)
                raster = tokens.unflatten(1, (2, 2, 2)).transpose(2, 3).flatten(1, 3)
            close(raster, layers[i][:, P:])
        all_close(gradients(model, logits.square().mean()), gradients(model, expected.square().mean()))


@pytest.mark.usefixtures("on_device")
@torch.no_grad()
def test_it_runs_the_operators(ran_kernels, chosen):
    for kind in ("average", "channel", "content"):
        model = prunable(merged(kind=kind))
        with ran_kernels() as names:
            model(x := images(model))
        ours = ["masked_channel_attention_fwd"] * (faster(x) > 0)  # else torch's own attention is not slower
        assert names == chosen(*ours, "merge_neighbours_fwd")


@pytest.mark.usefixtures("on_device")
def test_odd_grids_and_many_merges():
    points = {0: "vertical", 1: "horizontal", 2: "vertical", 3: "horizontal"}
    for kind in KINDS:
        model = merged("distilled", points, kind, img_size=(80, 112))  # 5 x 7, 3 x 7, 3 x 4, 2 x 4, 2 x 2
        x = images(model)
        close(model(x), literal(model, x)[0])
        assert [block.merge.merged_grid for block in model.blocks] == [(3, 7), (3, 4), (2, 4), (2, 2)]
    model = merged(points={0: "horizontal", 1: "vertical", 2: "horizontal"}, layout="block", img_size=96)  # 6 x 6
    assert [block.merge.layout for block in model.blocks[:3]] == ["block", "block", "raster"]
    x = images(model)
    close(model(x), literal(model, x)[0])


def plain_form(monkeypatch):
    monkeypatch.setattr(merging, "commutes", lambda block: False)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", ["average", "scalar"])
@pytest.mark.parametrize("name", ["deit", "deit3", "lvvit", "scaled mlp", "no bias"])
def test_merging_before_fc2_changes_nothing(name, kind, monkeypatch):
    points = {0: "horizontal", 2: "horizontal"}  # 4 x 5, 4 x 3, 4 x 2: lone columns
    model = prunable(merged(name, points, kind, img_size=(64, 80), drop_path_rate=0.5))
    seen = []
    for block in model.blocks:
        block.mlp.mask = torch.rand_like(block.mlp.fc1.weight[:, 0])
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    x = images(model, 4)

    def run(train):
        torch.manual_seed(1)
        logits = model.train(train)(x)
        return logits, gradients(model, logits.square().mean())

    for train in (False, True):
        assert [commutes(block) for block in model.blocks] == [True, False, True, False]
        (logits, grads), tokens = run(train), list(seen)
        seen.clear()
        with monkeypatch.context() as patch:
            plain_form(patch)
            expected, expected_grads = run(train)
        close(logits, expected)
        all_close(grads, expected_grads)
        assert tokens == [13, 13, 9, 9] and seen == [21, 13, 13, 9]
        seen.clear()


def test_another_layer_in_the_place_of_fc2_sees_every_token():
    model, seen = merged(), []
    before = model(images(model))
    fc2 = model.blocks[0].mlp.fc2
    model.blocks[0].mlp.fc2 = nn.Sequential(fc2, nn.Identity())
    model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    torch.manual_seed(0)
    assert not commutes(model.blocks[0]) and model(images(model)).shape == before.shape and seen == [17]


def test_dropout_behind_fc2_is_of_every_token():
    model = merged(proj_drop_rate=0.1)
    seen = []
    model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for train in (True, False):
        model.train(train)(images(model))
    assert seen == [17, 9]


@torch.no_grad()
def test_hidden_channels_are_masked():
    model = prunable(dense("scaled mlp"))
    mlp, x = model.blocks[0].mlp, torch.randn(2, 7, 48)
    mlp.mask = torch.rand(192)
    close(mlp(x), mlp.fc2(mlp.norm(F.gelu(mlp.fc1(x))) * mlp.mask))
    assert "blocks.0.mlp.mask" in model.state_dict() and Mlp.from_timm(mlp).mask is mlp.mask
    mlp.mask = nn.Parameter(mlp.mask)
    assert prunable(model).blocks[0].mlp.mask is mlp.mask and mlp.mask in set(model.parameters())


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("layout", ["raster", "block"])
@pytest.mark.parametrize("name", ["deit", "distilled", "lvvit"])
@torch.no_grad()
def test_masks_and_merges_in_either_order(name, layout):
    """Prunable before the patch or behind it, the masked model is one; compacted, patched still; unpatched, plain."""
    options = dict(points=POINTS, kind="scalar", layout=layout)
    first = dense(name)
    last = copy.deepcopy(first)
    prunable(apply_patch(first, "cait", **options))
    apply_patch(prunable(last), "cait", **options)
    x = images(first)
    hidden = first.blocks[0].mlp.fc1.out_features
    masks = [torch.rand(2, 3, 16), torch.rand(hidden)]
    masks[0][:, :, 5] = masks[1][3] = 0
    for model in (first, last):
        for block in model.blocks:
            attn = block.attn
            assert isinstance(attn, PatchedAttention) and plain_of(attn) is ours.Attention
            attn.qk_mask, attn.v_mask = (mask.to(x.device) for mask in masks[0])
            block.mlp.mask = masks[1].to(x.device)
        assert [commutes(block) for block in model.blocks] == [True, False, True, False]
    expected = first(x)
    assert torch.equal(last(x), expected)
    unmasked = copy.deepcopy(first)
    for block in unmasked.blocks:
        block.attn.qk_mask = block.attn.v_mask = block.mlp.mask = None
    assert not torch.allclose(unmasked(x), expected, atol=1e-3)
    close(pickle.loads(pickle.dumps(first))(x), expected)
    small = compact(first)
    close(small(x), expected)
    assert small.blocks[1].attn.head_dim == 15 and type(small) is type(first)
    torch.testing.assert_close(told(small.blocks[1], x.new_zeros(1, 4, 48)), x.new_full((1, 4), 0.25))
    restructured = restructure(MODELS[name]().eval(), Structure.of(small))
    assert isinstance(restructured.blocks[1].attn, PatchedAttention)
    plain = remove_patch(copy.deepcopy(small))
    assert type(plain) is type(MODELS[name]())
    assert all(type(block) is vision_transformer.Block for block in plain.blocks)
    assert all(type(block.attn) is ours.Attention and type(block.mlp) is Mlp for block in plain.blocks)
    assert not any("merge" in key for key in plain.state_dict()) and plain(x).isfinite().all()


def told(block, x):
    """What a patched block's attention tells of the tokens."""
    ask = Ask(scores="received")
    block.attn(x, ask=ask)
    return ask.looked_at


def test_other_models_and_blocks_are_refused():
    for block_fn in (ParallelScalingBlock, DiffParallelScalingBlock, ResPostBlock):
        model = MODELS["deit"](block_fn=block_fn)
        with pytest.raises(TypeError, match=f"block 0: .*{block_fn.__name__}"):
            prunable(model)
        assert type(model.blocks[0]) is block_fn
    with pytest.raises(TypeError, match="DiffAttention"):
        prunable(MODELS["deit"](attn_layer="diff"))
    for model in (
        timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1),
        timm.create_model("resnet10t"),
        tokenops.apply_patch(timm.create_model("deit_tiny_patch16_224", **SMALL), "sit"),
        nn.Linear(2, 2),
    ):
        with pytest.raises(TypeError, match=f"prunable takes .* but got {type(model).__name__}"):
            prunable(model)
    with pytest.raises(TypeError, match="from_timm takes timm.layers.Mlp"):
        Mlp.from_timm(timm_layers.SwiGLU(8))


def test_errors_of_merging():
    with pytest.raises(ValueError, match="points must be given for a model of 2 blocks"):
        apply_patch(MODELS["deit"](depth=2), "cait")
    with pytest.raises(ValueError, match="even sides"):
        apply_patch(dense(img_size=80), "cait", layout="block")


def test_what_learns_to_score_starts_at_once():
    model = apply_patch(dense(), "cait", points=POINTS, kind="content")  # the weights are 0, the norm gets none yet
    found = gradients(model, F.cross_entropy(model(images(model, 4)), torch.arange(4)))
    assert found["blocks.0.merge.score.weight"].any()


def test_subclasses_bring_their_maps_along():
    class Own(timm.models.VisionTransformer):
        pass

    model = prunable(apply_patch(Own(**SMALL), "cait", points=POINTS))
    assert isinstance(model, Own) and [merge is not None for merge in merges_of(model)] == [True, False, True, False]
    assert model.forward_intermediates(torch.randn(1, 3, 64, 64))[1][3].shape[2:] == (4, 4)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("layout", ["raster", "block"])
@pytest.mark.parametrize("name", ["deit", "distilled", "no prefix", "lvvit"])
@torch.no_grad()
def test_maps_cover_the_full_grid(name, layout):
    model = merged(name, {1: "horizontal", 2: "vertical"}, layout=layout, img_size=(64, 96))  # 4 x 6
    P, x = model.num_prefix_tokens, images(model)
    layers = literal(model, x)[1]
    final, maps = model.forward_intermediates(x, return_prefix_tokens=True, norm=True)
    close(final, model.forward_features(x))
    for i, (found, merges) in enumerate(zip(maps, ((), ("horizontal",), *[("horizontal", "vertical")] * 2))):
        found, prefix = found if isinstance(found, tuple) else (found, final[:, :0])
        whole = model.norm(tokenops.unmerge_neighbours(layers[i], (4, 6), merges, prefix=P))
        close(found, whole[:, P:].transpose(1, 2).unflatten(2, (4, 6)))
        close(prefix, whole[:, :P])
    tokens = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)[0]
    smooth = unmerge_tokens(model, tokens, 1, prefix=0, mode="bilinear")
    close(smooth, tokenops.unmerge_neighbours(layers[1], (4, 6), ("horizontal",), prefix=P, mode="bilinear")[:, P:])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("layout", ["raster", "block"])
def test_merged_maps(layout):
    model = apply_patch(dense(img_size=(64, 96)), "cait", points=POINTS, layout=layout)
    steps = trace(model, images(model)).steps
    assert [(step.block, step.tokens) for step in steps] == [(0, 13), (2, 7)]
    assert [step.sources[0].view(4, 6).tolist() for step in steps] == [
        [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [6, 6, 7, 7, 8, 8], [9, 9, 10, 10, 11, 11]]
        if layout == "raster"
        else [[0, 0, 2, 2, 4, 4], [1, 1, 3, 3, 5, 5], [6, 6, 8, 8, 10, 10], [7, 7, 9, 9, 11, 11]],
        [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]],
    ]
