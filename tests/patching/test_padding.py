"""Images of many shapes in one batch: padding is attended to by none, never chosen before patches, merged with none."""

import pytest
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from support.patched_models import tokens_behind
from support.weights import redrawn
from tokenops import apply_patch, remove_patch
from tokenops.patching.positions import Positions

transformers = pytest.importorskip("transformers")


def naflex(padding=0.0):
    """SigLIP 2 with two images: 4 x 4 patches, and 2 x 3 with ten rows of padding."""
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_patches=16, patch_size=4
    )
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 6:] = 0
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1))
    x[1, 6:] = padding
    shapes = torch.tensor([[4, 4], [2, 3]])
    given = dict(pixel_values=x, pixel_attention_mask=mask, spatial_shapes=shapes)
    return redrawn(transformers.Siglip2VisionModel(config)), given


METHODS = [
    ("tome", dict(r=0), dict(r=2)),
    ("tome", dict(r=0), dict(r=2, prop_attn=False)),
    ("evo_vit", dict(prune_ratio=1.0), dict(prune_ratio=0.3, stages=(1,))),
    ("random", dict(r=0), dict(r=2)),
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method, idle, reducing", METHODS)
def test_padding_says_nothing(method, idle, reducing, implementation):
    model, given = naflex()
    model.set_attn_implementation(implementation)
    expected = model(**given)
    apply_patch(model, method, **idle)
    torch.testing.assert_close(model(**given).pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    for setting, value in reducing.items():
        if setting == "r":
            model.r = value
    if method == "evo_vit" or "prop_attn" in reducing:
        apply_patch(remove_patch(model), method, **reducing)
    torch.manual_seed(5)
    found = model(**given)
    assert found.last_hidden_state.shape == expected.last_hidden_state.shape
    assert not torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-4)
    _, other = naflex(padding=7.0)
    torch.manual_seed(5)
    same = model(**other)
    torch.testing.assert_close(found.pooler_output, same.pooler_output, rtol=1e-5, atol=1e-5)
    seen = given["pixel_attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[seen], same.last_hidden_state[seen], rtol=1e-5, atol=1e-5)


def test_an_image_with_padding_is_merged_as_without():
    model, given = naflex()
    apply_patch(model, "tome", r=[2, 0, 0])  # later blocks split other rows into sides, where padding is between them
    together = model(**given)
    alone = {name: value[1:] if name == "spatial_shapes" else value[1:, :6] for name, value in given.items()}
    one = model(**alone)
    for inputs, counts in ((given, [14, 14]), (alone, [4, 4])):
        assert tokens_behind(model, inputs["pixel_values"], **dict(list(inputs.items())[1:]))[:2] == counts
    torch.testing.assert_close(together.last_hidden_state[1:, :6], one.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.pooler_output[1:], one.pooler_output, rtol=1e-4, atol=1e-5)


def test_hidden_tokens_literally():
    hidden = torch.tensor([[False, False, False, True, True]])
    positions = Positions((), None, 1, hidden)
    assert positions.at(torch.tensor([[3, 0]])).hidden.tolist() == [[False, True, False]]
    assert positions.at(torch.tensor([1, 2])).hidden.tolist() == [[False, False, True]]
    mean = positions.mean(torch.tensor([[0, 1, 1, 2]]), 3)
    assert mean.hidden.tolist() == [[False, False, False, True]]
    inf = float("inf")
    assert positions.hiding(torch.float32).tolist() == [[[[0, 0, 0, -inf, -inf]]]]
    assert Positions().hiding(torch.float32) is None


def rows(content=0.0):
    """Two images as rows of patches: 4 x 4, and 2 x 6 with four rows of padding."""
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in ((4, 4), (2, 6))]
    coordinates = torch.stack([places[0], torch.cat((places[1], torch.zeros(4, 2, dtype=torch.long)))])
    valid = torch.arange(16) < torch.tensor([[16], [12]])
    x = torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(1)).masked_fill(~valid[..., None], content)
    return {"patches": x, "patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("method, idle, reducing", [METHODS[0], METHODS[2]])
def test_timms_rows_of_patches(method, idle, reducing, rotary):
    made = dict(patch_size=8, embed_dim=32, depth=3, num_heads=2, fc_norm=True)
    if rotary:
        made.update(rope_type="axial", attn_type="rope", block_fn="eva")
    torch.manual_seed(0)
    model = redrawn(NaFlexVit(NaFlexVitCfg(**made), num_classes=5))
    expected = model(rows())
    apply_patch(model, method, **idle)
    torch.testing.assert_close(model(rows()), expected, rtol=0, atol=1e-5)
    apply_patch(remove_patch(model), method, **reducing)
    found = model(rows())
    assert found.isfinite().all() and not torch.allclose(found, expected, atol=1e-4)
    torch.testing.assert_close(found, model(rows(content=7.0)), rtol=1e-5, atol=1e-5)
    assert torch.equal(remove_patch(model)(rows()), expected)
    apply_patch(model, "evit", keep_rate=0.5)
    with pytest.raises(ValueError, match="padded images were given .* use 'tome' or 'evo_vit'"):
        model(rows())
