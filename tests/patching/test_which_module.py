"""apply_patch on models with several vision transformers, and on those whose tokens are not all patches."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from support.patched_models import SIZES, images, model_of, tokens_behind
from support.weights import redrawn
from tokenops import apply_patch, load_patched, remove_patch, save_patched, trace


class Two(nn.Module):
    """Two towers whose logits are added: late fusion."""

    def __init__(self):
        super().__init__()
        self.near, self.far = model_of("plain"), model_of("registers")

    def forward(self, x):
        return self.near(x) + self.far(x.flip(-1))


def test_the_towers_are_listed_and_one_is_named():
    model, x = Two(), images()
    near, far = model.near(x), model.far(x.flip(-1))
    with pytest.raises(ValueError, match=r"near.blocks, far.blocks: name one, .*module='near'\), of 'near', 'far'"):
        apply_patch(model, "tome", r=3)
    apply_patch(model, "tome", r=3, module="far")
    assert torch.equal(model.near(x), near) and not torch.allclose(model.far(x.flip(-1)), far, atol=1e-3)
    assert [step.tokens for step in trace(model, x).steps] == [5 + 13, 5 + 10, 5 + 7]
    model.r = 0
    torch.testing.assert_close(model.far(x.flip(-1)), far)
    model.r = 3
    assert tokens_behind(model.far, x) == [18, 15, 12]
    remove_patch(model)
    assert torch.equal(model(x), near + far)


@pytest.mark.parametrize("named", ["near", "near.blocks"])
def test_the_other_tower_by_its_blocks(named):
    model, x = Two(), images()
    apply_patch(model, "evit", keep_rate=0.5, module=named)
    assert hasattr(model.near.blocks[0], "tokenops_role") and not hasattr(model.far.blocks[0], "tokenops_role")
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("named, words", [("middle", "has no such part"), ("near.head", "has no vision transformer")])
def test_a_name_that_is_none(named, words):
    with pytest.raises(ValueError, match=f"module='{named}'.*{words}"):
        apply_patch(Two(), "tome", r=3, module=named)


def test_which_tower_is_saved(tmp_path):
    model, x = apply_patch(Two(), "tome", r=3, module="far"), images()
    save_patched(model, tmp_path)
    assert torch.equal(load_patched(Two(), tmp_path)(x), model(x))


class Prompted(VisionTransformer):
    """Visual prompt tuning: tokens of its own behind the class token."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.prompts = nn.Parameter(torch.randn(1, 3, self.embed_dim))

    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat((x[:, :1], self.prompts.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)


@pytest.mark.parametrize("method, options", [("tome", dict(r=8)), ("evit", dict(keep_rate=0.25, fuse_token=False))])
def test_prompts_are_named_and_never_touched(method, options, tmp_path):
    torch.manual_seed(0)
    model, x = redrawn(Prompted(**SIZES)), images()
    with pytest.raises(ValueError, match=r"Prompted has a _pos_embed of its own, .* prefix=1\)"):
        apply_patch(model, method, **options)
    expected = model(x)
    apply_patch(model, method, prefix=4, **options)
    assert tokens_behind(model, x)[0] < 20
    steps = trace(model, x).steps
    assert all(step.tokens == 4 + step.sources.max() + 1 for step in steps)  # the prompts are all there
    save_patched(model, tmp_path)
    torch.testing.assert_close(load_patched(redrawn(Prompted(**SIZES)), tmp_path)(x), model(x))
    assert torch.equal(remove_patch(model)(x), expected)


@pytest.mark.parametrize("prefix", [0, True, "4", 1.0])
def test_a_prefix_that_cannot_be(prefix):
    with pytest.raises(ValueError, match="prefix=.*, but it must be a whole number of at least 1"):
        apply_patch(redrawn(Prompted(**SIZES)), "tome", r=2, prefix=prefix)


def test_a_class_derived_that_makes_no_tokens():
    class Other(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return 2 * super().forward_head(x, pre_logits)

    assert tokens_behind(apply_patch(redrawn(Other(**SIZES)), "tome", r=2), images()) == [15, 13, 11]
