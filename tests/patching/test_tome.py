"""ToMe by apply_patch against the paper's steps written out plainly, and its options."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from support.patched_models import SIZES, embedded, images, merged_image, model_of, softmax_attention, tokens_behind
from tokenops import apply_patch, remove_patch, trace
from tokenops.methods.tome import merged_per_block


def plain_tome(model, x, rates, prop_attn=True):
    """Tokens behind the last block, and for each image the patches (rows of the input) in each token."""
    x, prefix = embedded(model, x), model.num_prefix_tokens
    sizes = torch.ones(x.shape[:2])
    members = [[{i} for i in range(x.shape[1])] for _ in x]
    for block, r in zip(model.blocks, rates):
        y, _, keys = softmax_attention(block.attn, block.norm1(x), sizes.log() if prop_attn else None)
        x = x + block.ls1(y)
        r = min(r, (x.shape[1] - prefix) // 2)
        if r:
            merged = [merged_image(x[b], keys[b], sizes[b], r, prefix) for b in range(len(x))]
            x, sizes = torch.stack([m[0] for m in merged]), torch.stack([m[1] for m in merged])
            members = [
                [set().union(*(members[b][i] for i in group)) for group in groups]
                for b, (_, _, groups) in enumerate(merged)
            ]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, sizes, members


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", ["plain", "distilled", "registers", "norms", "clip"])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_equals_the_paper_written_plainly(family, prop_attn):
    model, x = model_of(family), images()
    with torch.no_grad():
        tokens, _, _ = plain_tome(model, x, (3, 5, 2), prop_attn)
        expected = model.norm(tokens)
        apply_patch(model, "tome", r=[3, 5, 2], prop_attn=prop_attn)
        features = model.forward_features(x)
    assert features.shape[1] == model.num_prefix_tokens + 6
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", ["average", "map"])
def test_pooling_sees_every_patch_again(family):
    model, x = model_of(family), images()
    with torch.no_grad():
        tokens, sizes, members = plain_tome(model, x, (4, 4, 2))
        apply_patch(model, "tome", r=[4, 4, 2])
        features = model.forward_features(x)
        full = torch.stack(
            [
                torch.stack([t for i in range(16) for t, m in zip(tokens[b], members[b]) if i in m])
                for b in range(len(x))
            ]
        )
        torch.testing.assert_close(features, model.norm(full), rtol=1e-4, atol=1e-4)
        mean = (model.norm(tokens) * sizes[..., None]).sum(1) / 16
        torch.testing.assert_close(features.mean(1), mean, rtol=1e-4, atol=1e-4)
        if family == "average":
            torch.testing.assert_close(model(x), model.head(model.fc_norm(mean)), rtol=1e-4, atol=1e-4)


def test_unmerge_can_be_decided():
    x = images()
    model = apply_patch(model_of("plain"), "tome", r=4, unmerge=True)
    assert model.forward_features(x).shape[1] == 17
    full = model(x)
    model = apply_patch(remove_patch(model), "tome", r=4)
    assert model.forward_features(x).shape[1] == 5
    torch.testing.assert_close(model(x), full)
    model.reset_classifier(0, "avg")
    assert model.forward_features(x).shape[1] == 17  # the model pools otherwise now


def test_r_may_be_set_at_any_time():
    model, x = apply_patch(model_of("plain"), "tome", r=0), images()
    assert model.r == 0
    for r, counts in [
        (2, [15, 13, 11]),
        ([8, 0, 1], [9, 9, 8]),
        ((3, -1), [11, 8, 8]),
        (100, [9, 5, 3]),
        (0, [17] * 3),
    ]:
        model.r = r
        assert tokens_behind(model, x) == counts
    for r in (-1, [1, 2], (3, 2), "many", True, [1, 2, -3]):
        with pytest.raises(ValueError, match="r="):
            model.r = r
    with pytest.raises(TypeError, match=r"needs r, .*apply_patch\(model, 'tome', r=8\)"):
        apply_patch(model_of("plain"), "tome")


def test_schedules_keep_their_sum():
    assert merged_per_block(13, 12) == (13,) * 12
    falling = merged_per_block((8, -1), 12)
    assert falling[0] == 16 and falling[-1] == 0 and list(falling) == sorted(falling, reverse=True)
    assert merged_per_block((8, 1), 5) == (0, 4, 8, 12, 16) and merged_per_block((8, -0.5), 5) == (12, 10, 8, 6, 4)
    assert merged_per_block((5, 0), 3) == (5, 5, 5) == merged_per_block(5.5, 3) and merged_per_block((4, 1), 1) == (4,)
    assert merged_per_block((7, 0.3), 4) == (4, 6, 8, 10)  # r (1 - inflect) is cut to a whole number


def test_a_prefix_token_never_merges():
    model = VisionTransformer(reg_tokens=3, **SIZES).eval()
    apply_patch(model, "tome", r=8)
    assert [step.tokens for step in trace(model, images()).steps] == [12, 8, 6]
