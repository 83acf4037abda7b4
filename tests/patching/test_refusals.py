"""What apply_patch does not take, said in words, with the model left as it was."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from support.patched_models import METHODS, SIZES, images, model_of
from tokenops import apply_patch, remove_patch, trace


def refused(model, error, words, method="tome", **options):
    options = options or (dict(r=1) if method == "tome" else {})
    before = {name: id(module) for name, module in model.named_modules()}
    attributes = set(vars(model))
    with pytest.raises(error, match=words):
        apply_patch(model, method, **options)
    assert {name: id(module) for name, module in model.named_modules()} == before and set(vars(model)) == attributes


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(block_fn=vision_transformer.DiffParallelScalingBlock), "the difference of two softmaxes"),
        (dict(attn_layer="diff"), "its attention is .*DiffAttention"),
    ],
)
def test_other_blocks(kwargs, words):
    refused(VisionTransformer(**SIZES, **kwargs), TypeError, words)


def test_one_block_among_others():
    model = model_of("plain")
    model.blocks[2].attn = nn.Identity()
    refused(model, TypeError, "block 2 of blocks: its attention is torch.nn.*Identity")
    model = model_of("plain")
    model.blocks[1] = type("Mine", (vision_transformer.Block,), {})(32, 2)
    refused(model, TypeError, "block 1 of blocks: it is .*Mine")
    model = model_of("plain")
    model.blocks[1].forward = lambda x, **kwargs: x
    refused(model, TypeError, "block 1 of blocks: its forward was replaced")


def test_other_models():
    refused(nn.Sequential(nn.Linear(2, 2)), TypeError, "no vision transformer that can be patched")
    refused(timm.create_model("resnet10t"), TypeError, "no vision transformer")
    refused(nn.ModuleList([model_of("plain"), model_of("plain")]), ValueError, "several .* 0.blocks, 1.blocks")


def test_a_model_within_another():
    model, x = nn.Sequential(nn.Identity(), model_of("plain"), nn.Softmax(-1)), images()
    expected = model(x)
    apply_patch(model, "tome", r=0)
    torch.testing.assert_close(model(x), expected)
    model.r = 8
    model(x)
    assert [step.tokens for step in trace(model, x).steps] == [9, 5, 3]
    with pytest.raises(ValueError, match="r=2 was set on the VisionTransformer within: .* the Sequential around"):
        model[1].r = 2
    assert model[1].r == model.r == 8
    assert torch.equal(remove_patch(model)(x), expected) and not hasattr(model, "r")


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("tome", dict(r=-1), "r=-1"),
        ("tome", dict(r=[1, 2]), "r="),
        ("tome", dict(r=float("inf")), "r=inf"),
        ("evit", dict(keep_rate=0.0), "keep_rate=0.0, but it must be above 0 and at most 1"),
        ("evit", dict(keep_rate=1.1), "keep_rate=1.1"),
        ("evit", dict(keep_rate=float("nan")), "keep_rate=nan"),
        ("evit", dict(keep_rate=(0.5, 0.5)), "keep_rate has 2 values.*3 blocks"),
        ("evit", dict(reduction_loc=(1, 3)), r"reduction_loc=\(1, 3\), but .* ascending block numbers from 0 to 2"),
        ("evit", dict(reduction_loc=(2, 1)), r"reduction_loc=\(2, 1\)"),
        ("evo_vit", dict(prune_ratio=0), "prune_ratio=0, but it must be above 0 and at most 1"),
        ("evo_vit", dict(prune_ratio=[0.5] * 3), "prune_ratio=.*must be 1 before block 1"),
        ("evo_vit", dict(prune_ratio=0.06), "prune_ratio=0.06 keeps none of 16 tokens"),
        ("evo_vit", dict(prune_ratio=[1, 0.5]), "prune_ratio has 2 values"),
        ("evo_vit", dict(tradeoff=-0.1), "tradeoff=-0.1, but it must be at least 0 and at most 1"),
        ("evo_vit", dict(stages=(0, 2)), r"stages=\(0, 2\), but it must be ascending block numbers from 1 to 2"),
        ("patch_slimming", dict(schedule=[17, 9]), "2 layers, but the model has 3 blocks"),
        ("patch_slimming", dict(schedule=[17, 9, 10]), "counts gives layer 3"),
        ("sit", dict(keeping_ratio=0), "keeping_ratio=0"),
        ("sit", dict(keeping_ratio=1.5), "keeping_ratio=1.5"),
        ("sit", dict(keeping_ratio=0.1), "leaves none of 16 tokens"),
        ("cait", dict(points={3: "vertical"}), "points has block 3, but blocks are numbered 0 to 2"),
        ("cait", dict(points={-1: "vertical"}), "points has block -1"),
        ("cait", dict(points={"1": "vertical"}), "points has block '1'"),
        ("cait", dict(points={1: "up"}), "axis='up'"),
        ("cait", dict(points={1: "vertical"}, kind="max"), "kind='max'"),
        ("cait", dict(points={1: "vertical"}, kind=("scalar",) * 2), "kind=.* has 2 values, but there are 1 points"),
        ("cait", dict(points={0: "vertical"}, layout="hilbert"), "layout='hilbert'"),
        ("cait", dict(points={1: "vertical"}, layout="block"), "'block' merges horizontally, then vertically"),
        ("dropping", {}, "method='dropping', but it must be one of .*'tome'"),
    ],
)
def test_options_out_of_range(method, options, words):
    refused(model_of("plain"), ValueError, words, method, **options)


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("tome", dict(ratio=3), "ratio"),
        ("evit", dict(keep_rate="all"), "keep_rate='all', but it must be a number"),
        ("evit", dict(keep_rate=[0.5, None, 1]), "keep_rate="),
        ("evit", dict(reduction_loc=1), "reduction_loc=1, but it must be several block numbers"),
        ("random", dict(reduction_loc=(0.5,)), "reduction_loc="),
        ("evo_vit", dict(stages=2), "stages=2"),
        ("evo_vit", dict(tradeoff="much"), "tradeoff='much'"),
        ("sit", dict(locations=2), "locations=2"),
        ("cait", dict(points=3), "points=3"),
        ("patch_slimming", dict(schedule=3), "counts must be ints, one for every layer, but got 3"),
        ("dps", dict(counts=3), "counts must be ints, one for every layer, but got 3"),
    ],
)
def test_options_of_another_kind(method, options, words):
    refused(model_of("plain"), TypeError, words, method, **options)


def test_what_is_no_model():
    for given in (None, VisionTransformer):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, but got"):
            apply_patch(given, "tome", r=1)


@pytest.mark.parametrize("method", METHODS)
def test_a_block_in_two_places(method):
    model = model_of("plain")
    model.blocks[2] = model.blocks[0]
    refused(model, ValueError, "blocks 0 and 2 of blocks are one module", method, **METHODS[method][1])
    model = model_of("plain")
    model.blocks[2].attn, model.blocks[1].mlp = model.blocks[0].attn, model.blocks[0].mlp  # parts may be shared
    x = images()
    expected = model(x)
    apply_patch(model, method, **METHODS[method][1])(x)
    assert torch.equal(remove_patch(model)(x), expected)


def test_scripting():
    model = apply_patch(model_of("plain"), "tome", r=2)
    for part in (model, nn.Sequential(model.blocks[0])):
        with pytest.raises(ValueError, match="cannot be scripted: use torch.export or torch.jit.trace"):
            torch.jit.script(part)


def test_no_patch_left_to_pool():
    refused(model_of("average"), ValueError, "leaves no patch", "patch_slimming", schedule=[17, 9, 1])


@pytest.mark.parametrize("method", ["patch_slimming", "sit", "cait"])
def test_grids_that_are_not_whole(method):
    options = METHODS[method][1]
    refused(model_of("plain", patch_drop_rate=0.5), ValueError, "patch_drop_rate", method, **options)
    unsized = model_of("plain")
    unsized.patch_embed.grid_size = None
    refused(unsized, ValueError, "needs a fixed grid, but the model does not say what images", method, **options)


def test_wide_heads():
    model = model_of("plain", embed_dim=160, num_heads=1)
    refused(model, ValueError, "heads of 160 channels, but 128 are the most", "tome")
    x = images()
    expected = copy.deepcopy(model)(x)
    apply_patch(model, "patch_slimming", schedule=[17, 17, 17])
    torch.testing.assert_close(model(x), expected)
    remove_patch(model)
    assert apply_patch(model, "patch_slimming", schedule=[9, 5, 1])(x).isfinite().all()


def test_masks_at_the_call():
    model, x = apply_patch(model_of("plain"), "tome", r=2), images()
    with pytest.raises(ValueError, match="attn_mask was given"):
        model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal was given"):
        model(x, is_causal=True)
    model.r = 0
    model(x, is_causal=True)


def test_twice_and_never():
    model = apply_patch(model_of("plain"), "tome", r=0)
    with pytest.raises(ValueError, match="patched already: remove_patch comes first"):
        apply_patch(model, "evit")
    remove_patch(model)
    with pytest.raises(ValueError, match="is not patched"):
        remove_patch(model)
    with pytest.raises(ValueError, match="is not patched"):
        trace(model, images())
    model.r = 3
    refused(model, ValueError, "an attribute 'r' of its own", r=1)


def test_blocks_out_of_turn():
    """A block by itself begins a forward: nothing of another one is in it."""
    model = apply_patch(model_of("plain"), "tome", r=2)
    x = torch.randn(1, 17, 32)
    assert model.blocks[1](x).tokens.shape == (1, 15, 32)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.blocks[1](tuple(model.blocks[0](x)))


def test_a_forward_that_failed_leaves_no_trace():
    model, x = apply_patch(model_of("plain"), "tome", r=2), images()
    expected = model(x)
    handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert torch.equal(copy.deepcopy(model)(x), expected) and torch.equal(model(x), expected)


def test_the_engine_knows_methods_by_their_import_alone():
    code = (
        "import sys\nfrom tokenops.patching import apply_patch\nassert 'tokenops.methods' not in sys.modules\n"
        "try:\n    apply_patch(None, 'tome')\nexcept ValueError as error:\n    print(error)\n"
        "import tokenops\ntokenops.apply_patch\nassert 'tokenops.methods' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "method='tome', but tokenops.methods is not imported\n"
