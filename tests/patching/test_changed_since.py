"""A patched model that is changed by hand: it works, or says in words what to do; and the patch comes off it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from support.patched_models import METHODS, images, model_of
from tokenops import apply_patch, remove_patch, trace

ALL = {**METHODS, "dps": (None, dict(counts=[17, 9, 4], after=1))}
#: whose blocks hand on more than tokens
STATEFUL = ["tome", "evo_vit"]
ANEW = "remove_patch, and apply_patch to the model as it is now"


def patched(method):
    return apply_patch(model_of("plain"), method, **ALL[method][1])


def is_plain(model):
    return not any("tokenops" in name for module in model.modules() for name in (*vars(module), *vars(type(module))))


def append(model):
    model.blocks.append(model_of("plain").blocks[0])


def replace(model):
    model.blocks[1] = model_of("plain").blocks[1]


def replace_by_another_kind(model):
    model.blocks[1] = nn.Identity()


def take_the_first_away(model):
    model.blocks = model.blocks[1:]


def take_the_last_away(model):
    model.blocks = model.blocks[:2]


def replace_attention(model):
    model.blocks[0].attn = model_of("plain").blocks[0].attn


CHANGES = [append, replace, replace_by_another_kind, take_the_first_away, take_the_last_away, replace_attention]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ALL)
def test_the_patch_comes_off(method, change):
    model, plain, x = patched(method), model_of("plain"), images()
    change(model)
    change(plain)
    remove_patch(model)
    assert is_plain(model) and list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("change", [replace, take_the_last_away])
@pytest.mark.parametrize("method", STATEFUL)
def test_what_is_no_patched_block_says_so(method, change):
    """A plain block, or the norm behind the last one, gets what only a patched block takes."""
    model = apply_patch(model_of("plain"), method, **(dict(r=3) if method == "tome" else dict(stages=(1,))))
    change(model)
    with pytest.raises(ValueError, match=f"was given what a patched block hands to the next one: .*{ANEW}"):
        model(images())


@pytest.mark.parametrize("method", ALL)
def test_settings_and_traces_of_blocks_that_came_since(method):
    model = patched(method)
    append(model)
    words = rf"blocks \[3\] were added or replaced since the patch: {ANEW}"
    with pytest.raises(ValueError, match=words):
        trace(model, images())
    setting = model.tokenops_patch.method.setting
    if setting is not None:
        with pytest.raises(ValueError, match=words):
            setattr(model, setting, getattr(model, setting))


@pytest.mark.parametrize("method", ["tome", "evit", "evo_vit", "patch_slimming", "dps"])
def test_an_attention_of_another_kind_that_came_since(method):
    model = patched(method)
    for block in model.blocks:
        block.attn = nn.Sequential(block.attn)
    with pytest.raises((ValueError, TypeError), match=f"Sequential.*({ANEW}|keyword)"):
        model(images())


def test_a_patch_taken_off_within():
    """Of the model around it is then only taken off what is left."""
    inner = model_of("plain")
    outer = apply_patch(nn.Sequential(inner), "tome", r=3)
    remove_patch(inner)
    with pytest.raises(ValueError, match="added or replaced since the patch"):
        outer.r = 1
    assert is_plain(remove_patch(outer))


def test_a_shallow_copy_has_the_same_blocks():
    model, x = patched("tome"), images()
    remove_patch(copy.copy(model))
    assert torch.equal(model(x), model_of("plain")(x))
    assert is_plain(remove_patch(model))


@pytest.mark.parametrize("method", ["tome", "evit", "evo_vit", "patch_slimming"])
def test_a_parametrized_block(method):
    """Its class is one derived from the patched block's."""
    model, x = apply_patch(model_of("eva"), method, **METHODS[method][1]), images()
    expected = model(x)
    parametrize.register_parametrization(model.blocks[0], "gamma_1", nn.Identity())
    assert torch.equal(model(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    setting = model.tokenops_patch.method.setting
    setattr(model, setting, getattr(model, setting))
    assert torch.equal(model(x), expected) and trace(model, x).steps
    with pytest.raises(ValueError, match="ParametrizedEvaBlock was wrapped after the patch"):
        remove_patch(model)
    parametrize.remove_parametrizations(model.blocks[0], "gamma_1")
    remove_patch(model)


@pytest.mark.parametrize("first", ["compile", "patch"])
def test_a_compiled_model_is_traced_set_and_taken_apart(first):
    plain, x = model_of("plain"), images()
    expected = plain(x)
    if first == "patch":
        apply_patch(plain, "tome", r=0)
    model = torch.compile(plain, backend="eager")
    if first == "compile":
        apply_patch(model, "tome", r=0)
    model.r = 8
    assert [step.tokens for step in trace(model, x).steps] == [9, 5, 3] and model.r == 8
    assert model(x).shape == (2, 5) and set(plain._modules) >= {"blocks", "head"}
    remove_patch(model)
    assert is_plain(plain) and torch.equal(plain(x), expected)


def test_weights_beside_a_bias_that_is_added_apart():
    """Eva's projection may be another module where its bias is added apart."""
    model, x = apply_patch(model_of("eva"), "evit", keep_rate=0.5), images()
    expected = model(x)
    for block in model.blocks:
        block.attn.qkv_bias_separate, block.attn.qkv = True, nn.Sequential(block.attn.qkv)
    torch.testing.assert_close(model(x), expected)


def test_a_setting_in_the_middle_of_a_forward():
    """Where blocks of the new value cannot go on from those of the old one it is said."""
    model, x = apply_patch(model_of("plain"), "patch_slimming", schedule=[13, 9, 4]), images()
    handle = model.blocks[0].register_forward_hook(lambda *_: setattr(model, "schedule", [17, 9, 4]))
    with pytest.raises(ValueError, match="17 tokens in order was given 13: a schedule is set between forwards"):
        model(x)
    handle.remove()
    assert model(x).isfinite().all()
    model = apply_patch(model_of("plain"), "evo_vit", stages=(1,))
    handle = model.blocks[1].register_forward_hook(lambda *_: setattr(model, "stage_wise", False))
    with pytest.raises(ValueError, match="stage_wise is set between forwards"):
        model(x)
    handle.remove()
    assert model(x).isfinite().all()
