"""apply_patch on every family of timm: nothing changes where nothing is reduced, and a patched model is a model."""

import copy
import io
import pickle

import pytest
import torch
from timm.layers import Attention

from support.patched_models import (
    BEHIND,
    FAMILIES,
    METHODS,
    ROTARY,
    images,
    model_of,
    patched,
    tokens_behind,
    tokens_of,
)
from support.weights import redrawn
from tokenops import apply_patch, nn, remove_patch
from tokenops.nn import convert_attention
from tokenops.patching import blocks, engine
from tokenops.patching.positions import Positions

CASES = [(family, method) for family in (*FAMILIES, *ROTARY) for method in METHODS]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family, method", CASES)
def test_nothing_changes_where_nothing_is_reduced(family, method, device):
    model, x = model_of(family), images()
    expected, kinds = model(x), [type(module) for module in model.modules()]
    assert apply_patch(model, method, **METHODS[method][0]) is model
    for module, kind in zip(model.modules(), kinds):
        assert isinstance(module, kind) and str(type(module)) == str(kind)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5 if device == "cpu" else 1e-4)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family, method", CASES)
def test_tokens_become_fewer_and_everything_learns(family, method):
    model, x = model_of(family), images()
    model(x).square().sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    model.zero_grad()
    expected, prefix = model(x), model.num_prefix_tokens
    apply_patch(model, method, **METHODS[method][1])
    counts = [prefix + n for n in BEHIND[method]]
    if method == "tome" and (model.global_pool != "token" or model.attn_pool is not None):
        counts[-1] = prefix + 16  # brought back
    assert tokens_behind(model, x) == counts
    y = model(x)
    assert y.shape == expected.shape and not torch.allclose(y, expected, atol=1e-3)
    y.square().sum().backward()
    missing = {name for name in learnt if model.get_parameter(name).grad is None}
    assert not missing


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", [*FAMILIES, *ROTARY, "gated", "converted"])
def test_attention_by_the_operator_is_the_blocks_own(family):
    model = model_of(family if family in {**FAMILIES, **ROTARY} else "norms")
    if family == "gated":
        for block in model.blocks:
            block.attn = Attention(32, num_heads=2, gated=True, qkv_bias=True)
        redrawn(model)
    if family == "converted":
        convert_attention(model)
        model.blocks[1].attn.qk_mask, model.blocks[1].attn.v_mask = torch.rand(2, 16), torch.rand(2, 16)
    x = model._pos_embed(model.patch_embed(images()))
    x, rope = x if isinstance(x, tuple) else (x, None)
    rope = rope[1] if getattr(model, "rope_mixed", False) else rope
    block, positions = model.blocks[1], None if rope is None else Positions((rope,))
    with torch.no_grad():
        own, scores, keys = blocks.attend(block, x, positions=positions)
        assert scores is None and keys is None
        bias = torch.zeros(x.shape[:2])
        y, scores, keys = blocks.attend(block, x, positions=positions, key_bias=bias, scores="received", key_mean=True)
        torch.testing.assert_close(y, own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))
        assert keys.shape == (*x.shape[:2], 16)
        few = blocks.attend(block, x, positions=positions, rows=7)[0]
        torch.testing.assert_close(few, own[:, :7], rtol=1e-4, atol=1e-4)
        whole = block(x) if rope is None else block(x, rope=rope)
        torch.testing.assert_close(blocks.feed(block, y), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_converted_attention_stays_patched():
    model, x = apply_patch(model_of("norms"), "evit", keep_rate=0.5), images()
    expected = model(x)
    assert convert_attention(model) == 3
    assert all(isinstance(block.attn, engine.PatchedAttention) for block in model.blocks)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [type(block.attn) for block in remove_patch(model).blocks] == [nn.Attention] * 3


@pytest.mark.parametrize("method", METHODS)
def test_names_weights_and_bits(method):
    model, x = model_of("registers"), images()
    before = copy.deepcopy(model)
    blocks = list(model.blocks)
    apply_patch(model, method, **METHODS[method][1])
    names = [name for name in model.state_dict() if "slimming" not in name]
    assert names == list(before.state_dict())
    assert (method == "sit") == any("slimming" in name for name in model.state_dict())
    before.load_state_dict({name: model.state_dict()[name] for name in names})
    other = {name: value + 0.01 for name, value in before.state_dict().items()}
    assert not model.load_state_dict(other, strict=method != "sit").unexpected_keys
    before.load_state_dict(other)
    model.train()
    assert remove_patch(model) is model
    assert list(model.blocks) == blocks and all(block.training for block in blocks)
    assert list(model.state_dict()) == list(before.state_dict())
    for module, other in zip(model.modules(), before.modules(), strict=True):
        assert type(module) is type(other) and vars(module).keys() == vars(other).keys()
    assert torch.equal(model.eval()(x), before(x))
    assert not any(name in dict(model.named_modules()) for name in ("blocks.1.slimming", "blocks.0.merge"))
    apply_patch(model, method, **METHODS[method][1])  # and again


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_models_of_their_own(method, tmp_path):
    model, x = patched(method), images()
    expected = model(x)
    twin, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for other in (twin, unpickled, loaded):
        assert torch.equal(other(x), expected)
        assert other.tokenops_patch is not model.tokenops_patch
        assert other.blocks[1].attn is not model.blocks[1].attn
        with torch.no_grad():
            other.blocks[1].attn.qkv.weight.add_(1.0)
        assert not torch.equal(other(x), expected)
        remove_patch(other)
        assert type(other.blocks[1]).__name__ == "Block"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_compiles_whole(method):
    model, x = patched(method), images()
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)


def test_hooks_of_a_block_stay_its_own():
    model, x, seen = model_of("plain"), images(), []
    model.blocks[1].register_forward_hook(lambda m, a, y: seen.append(tuple(tokens_of(y).shape)))
    apply_patch(model, "tome", r=2)
    handle = model.blocks[0].register_forward_hook(lambda m, a, y: seen.append(tuple(tokens_of(y).shape)))
    model(x)
    assert seen == [(2, 15, 32), (2, 13, 32)]
    handle.remove()
    remove_patch(model)(x)
    assert seen[2:] == [(2, 17, 32)]


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_autocast_and_other_dtypes(method):
    model, x = patched(method, "registers"), images()
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape and y.isfinite().all()
    y.float().sum().backward()
    buffer = io.BytesIO()
    torch.save(model.double().state_dict(), buffer)
    assert model(x.double()).dtype == torch.float64


def test_dropout_and_stochastic_depth_are_the_models_own():
    model, x = model_of("plain", proj_drop_rate=0.3, drop_path_rate=0.3).train(), images()
    torch.manual_seed(3)
    expected = model(x)
    apply_patch(model, "tome", r=0)
    torch.manual_seed(3)
    assert torch.equal(model(x), expected)


def test_images_of_any_size():
    model, x = model_of("dynamic"), images(side=48)
    expected = model(x)
    apply_patch(model, "tome", r=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.r = 5
    assert tokens_behind(model, x) == [32, 27, 22] and tokens_behind(model, images()) == [12, 7, 4]


@pytest.mark.parametrize("method", ["patch_slimming", "cait", "sit"])
def test_methods_for_one_grid_are_fitted_to_the_usual_one(method):
    model, x = patched(method, "dynamic"), images()
    assert model(x).shape == (2, 5)
    if method == "sit":  # as many mixtures, of whatever there is
        assert tokens_behind(model, images(side=48)) == [1 + n for n in (36, 8, 4)]
        return
    with pytest.raises(ValueError, match="the images give 6 x 6 patches, but the method was fitted to a grid of 4 x 4"):
        model(images(side=48))


def test_a_stem_that_does_not_say_what_images_it_takes():
    model, x = model_of("plain"), images()
    expected = apply_patch(copy.deepcopy(model), "tome", r=2)(x)
    del model.patch_embed.img_size
    model.patch_embed.forward = lambda x: model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(apply_patch(model, "tome", r=2)(x), expected)
