"""Heads that make something of all patch tokens: merged ones count by their sizes, and there is one to count."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from support.patched_models import SIZES, images
from support.weights import redrawn
from tokenops import apply_patch, trace
from tokenops.methods.cait import unmerge_tokens

POOLS = ("avg", "avgmax", "max", "map")


def pooling(pool, kind=VisionTransformer, **kwargs):
    torch.manual_seed(0)
    return redrawn(kind(**dict(SIZES, global_pool=pool, **kwargs)))


def odd(pool, side=(24, 40), **kwargs):
    """A grid of 3 x 5 patches."""
    return pooling(pool, **{**kwargs, "img_size": side}), torch.randn(2, 3, *side)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", [VisionTransformer, Eva])
@pytest.mark.parametrize("method", ["tome", "random"])
@torch.no_grad()
def test_merged_tokens_count_by_their_sizes(method, kind, pool):
    """The head sees every patch as the token it is in."""
    rotary = dict(use_rot_pos_emb=False) if kind is Eva else {}
    model, x = pooling(pool, kind, **rotary), images()
    behind = []
    last = model.blocks[-1].register_forward_hook(lambda m, a, y: behind.append(y))
    apply_patch(model, method, r=3)
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    sources = trace(model, x).steps[-1].sources
    last.remove()
    tokens, P = behind[0], model.num_prefix_tokens
    assert tokens.shape[1] == P + 16 and all(len(row.unique()) == 7 for row in sources)
    for b in range(2):
        for token in range(7):
            rows = tokens[b, P:][sources[b] == token]
            assert torch.equal(rows, rows[:1].expand_as(rows))
    torch.testing.assert_close(y, model.forward_head(model.norm(tokens)))


@torch.no_grad()
def test_a_lone_column_counts_once():
    """Three patches that are 1, 2 and 6: (1 + 2) / 2 and 6 become 3 in the mean, and not 3.75."""
    model, x = odd("avg", (8, 24), class_token=False, pos_embed="none", init_values=1.0)
    for block in model.blocks:
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    model.norm = model.fc_norm = model.head = torch.nn.Identity()
    model.patch_embed.register_forward_hook(lambda m, a, y: torch.tensor([1.0, 2, 6])[None, :, None].expand_as(y))
    apply_patch(model, "cait", points={0: "horizontal"})
    assert trace(model, x).steps[0].tokens == 2
    assert model.forward_features(x)[0, :, 0].tolist() == [1.5, 1.5, 6]
    torch.testing.assert_close(model(x), torch.full((2, 32), 3.0))
    learned = apply_patch(odd("avg", (8, 24))[0], "cait", points={0: "horizontal"}, kind="linear")
    assert learned.forward_features(x).shape[1] == 1 + 3


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_neighbours_count_by_their_sizes(pool):
    """3 x 5, 3 x 3, 2 x 3 and 1 x 3 patches: the last have 6, 6 and 3."""
    points = {0: "horizontal", 1: "vertical", 2: "vertical"}
    model, x = odd(pool)
    apply_patch(model, "cait", points=points)
    bare, y = copy.deepcopy(model), model.forward_features(x)
    bare.blocks[2].tokenops_take(replace(bare.blocks[2].tokenops_role, grid=False))
    at = torch.tensor([0, *(1 + column // 2 for _ in range(3) for column in range(5))])
    assert y.shape[1] == 1 + 15 and bare.forward_features(x).shape[1] == 1 + 3
    torch.testing.assert_close(y, bare.forward_features(x)[:, at])
    torch.testing.assert_close(model(x), model.forward_head(y))
    maps, tokens = (model.forward_intermediates(x, output_fmt=f, intermediates_only=True) for f in ("NCHW", "NLC"))
    assert [t.shape[1] for t in tokens] == [9, 6, 15] and [m.shape[2:] for m in maps] == [(3, 5)] * 3
    for block in range(3):
        full = unmerge_tokens(model, tokens[block], block, prefix=0)
        assert torch.equal(full.mT.unflatten(2, (3, 5)), maps[block])
    model.prune_intermediate_layers([1])
    assert model.forward_features(x).shape[1] == 1 + 15
    model.reset_classifier(5, "token")
    assert model.forward_features(x).shape[1] == 1 + 6


@torch.no_grad()
def test_the_block_layout_comes_back_row_by_row():
    """6 x 6 patches are 3 x 3 behind two merges, and 3 x 2 behind the third, of 8 and of 4."""
    points = {0: "horizontal", 1: "vertical", 2: "horizontal"}
    (raster, x), (block, _) = odd("avg", (48, 48)), odd("avg", (48, 48))
    apply_patch(raster, "cait", points=points)
    apply_patch(block, "cait", points=points, layout="block")
    y = raster.forward_features(x)
    assert y.shape[1] == 1 + 36 and len(y[0, 1:].unique(dim=0)) == 6
    torch.testing.assert_close(block.forward_features(x), y)
    equal = apply_patch(pooling("avg"), "cait", points=dict(list(points.items())[:2]))
    assert equal.forward_features(images()).shape[1] == 1 + 4  # all stand for four: there is nothing to count


@pytest.mark.parametrize("pool", [*POOLS, ""])
@pytest.mark.parametrize("class_token", [True, False])
def test_a_head_is_left_something_to_pool(pool, class_token):
    def refused(method, words, **options):
        with pytest.raises(ValueError, match=words):
            apply_patch(pooling(pool, class_token=class_token), method, **options)

    layer = "no patch to layer 3, but the model takes patches from there"
    refused("patch_slimming", f"the schedule leaves {layer}", schedule=[17, 9, 1])
    refused("dps", f"counts leaves {layer}", counts=[17, 9, 1], after=1)
    refused("sit", "keeping_ratio=0.05 leaves none of 16", keeping_ratio=0.05)
    refused("evo_vit", "prune_ratio=0.05 keeps none of 16", prune_ratio=0.05)
    least = {
        "patch_slimming": dict(schedule=[17, 2, 2]),
        "dps": dict(counts=[17, 2, 2], after=1),
        "evit": dict(keep_rate=1e-9, fuse_token=False),
        "random": dict(keep_rate=1e-9),
        "tome": dict(r=100),
    }
    for method, options in least.items():
        model = apply_patch(pooling(pool, class_token=class_token), method, **options)
        assert model(images()).isfinite().all()


def test_images_too_small_for_a_stage():
    for class_token in (True, False):
        model = pooling("avg", class_token=class_token, dynamic_img_size=True)
        apply_patch(model, "evo_vit", prune_ratio=0.1)
        assert model(images()).isfinite().all()
        with pytest.raises(ValueError, match="prune_ratio keeps none of 4 tokens, but it must keep at least one"):
            model(images(side=16))


def test_another_head_that_would_have_nothing_to_pool():
    model, x = apply_patch(pooling("token"), "patch_slimming", schedule=[17, 9, 1]), images()
    expected = model(x)
    with pytest.raises(ValueError, match="the schedule leaves no patch to layer 3"):
        model.reset_classifier(2, "avg")
    assert torch.equal(model(x), expected) and (model.global_pool, model.num_classes) == ("token", 5)
    model.schedule = [17, 9, 2]
    model.reset_classifier(2, "avg")
    assert model(x).isfinite().all() and model(x).shape == (2, 2)
