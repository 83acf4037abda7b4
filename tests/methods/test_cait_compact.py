"""The compacted model is the masked model, smaller; its structure and state dict make it again."""

import copy

import pytest
import timm
import torch
from torch import nn

from support import cait_pruning
from support.cait_pruning import SIZES, dense
from tokenops.methods.cait.blocks import prunable
from tokenops.methods.cait.compact import compact
from tokenops.methods.cait.compactors import drop_biases, rotate_heads
from tokenops.methods.cait.pruning import ChannelPruner
from tokenops.methods.cait.structure import Structure, Widths, load_compressed, macs, restructure, save_compressed

#: kept channels of q and k, of v, of the MLP in the three blocks; one block keeps everything
KEPT = ((6, 11, 37), (16, 16, 128), (1, 3, 5))


def model_of(kind="deit", merges="average"):
    model = cait_pruning.model_of(kind, merges).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def hide(model, soft=False, kept=KEPT):
    """Masks of random channels, the same number in every head."""
    for block, (qk, v, hidden) in zip(model.blocks, kept):
        ones = torch.ones if not soft else lambda *shape: torch.empty(*shape).uniform_(0.3, 1.7)
        block.attn.qk_mask = (torch.rand(2, 16).argsort(1) < qk) * ones(2, 16)
        block.attn.v_mask = (torch.rand(2, 16).argsort(1) < v) * ones(2, 16)
        block.mlp.mask = nn.Parameter((torch.rand(128).argsort() < hidden) * ones(128))
    return model


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "kind, merges",
    [
        ("deit", None),
        ("deit", "average"),
        ("deit", "scalar"),
        ("deit", "channel"),
        ("deit", "linear"),
        ("distilled", "average"),
        ("lvvit", None),
        ("lvvit", "average"),
        ("scaled", None),
        ("scaled", "average"),
    ],
)
def test_compact_is_the_masked_model(kind, merges, soft):
    model, x = hide(model_of(kind, merges), soft), torch.randn(3, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        small = compact(model)
        found = small(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # masks do matter here
        unmasked = copy.deepcopy(model)
        for block in unmasked.blocks:
            block.attn.qk_mask = block.attn.v_mask = block.mlp.mask = None
        assert (unmasked(x) - expected).abs().max() > 1e-2
    for block, (qk, v, hidden) in zip(small.blocks, KEPT):
        attn, mlp = block.attn, block.mlp
        assert attn.qkv.weight.shape == (2 * (2 * qk + v), 32) and attn.proj.weight.shape == (32, 2 * v)
        assert mlp.fc1.weight.shape == (hidden, 32) and mlp.fc2.weight.shape == (32, hidden)
        assert attn.scale == 16**-0.5
    assert not any(name.endswith("mask") for name in small.state_dict())
    # the given model is as it was, and nothing is shared
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}
    assert macs(small) < macs(model)


@pytest.mark.parametrize(
    "kind, merges", [("deit", None), ("deit", "linear"), ("lvvit", "average"), ("scaled", "channel")]
)
def test_structure_and_state_dict_make_it_again(kind, merges, tmp_path):
    small, x = compact(hide(model_of(kind, merges))), torch.randn(2, 3, 64, 64)
    structure = Structure.of(small)
    assert structure.widths == tuple(Widths(*kept) for kept in KEPT)
    again = restructure(dense(kind), structure).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
        save_compressed(small, tmp_path / "model")
        assert torch.equal(load_compressed(dense(kind), tmp_path / "model").eval()(x), small(x))


def test_compact_trains():
    small, x = compact(hide(model_of())).train(), torch.randn(2, 3, 64, 64)
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.requires_grad for p in small.parameters())


def test_compact_behind_a_pruner_and_a_rotation():
    model, x = model_of(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for block in model.blocks:
            rotate_heads(block.attn)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    pruner = ChannelPruner(model, 0.6, steps=(0, 2), every=1, multiples=dict(qk=4, v=2, hidden=16))
    while not pruner.frozen:
        model(x).square().mean().backward()
        pruner.step()
    small = compact(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert macs(small) == pruner.cost <= 0.6 * macs(model)
    assert all(p.requires_grad for p in small.parameters())


def test_nothing_masked_nothing_gone():
    model, x = model_of(), torch.randn(2, 3, 64, 64)
    small = compact(model)
    assert Structure.of(small) == Structure.of(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)


def test_biases_are_dropped_exactly():
    model = model_of().double()
    attention, x = model.blocks[0].attn, torch.randn(2, 7, 32, dtype=torch.float64)
    attention.v_mask = torch.rand(2, 16)
    expected = attention(x)
    small = compact(model).blocks[0].attn
    assert not small.qkv.bias[32:].any() and small.qkv.bias[:32].all()
    torch.testing.assert_close(small(x), expected, rtol=1e-12, atol=1e-12)

    attention.v_mask = None
    expected, attention.k_norm, attention.norm = None, nn.LayerNorm(16).double(), nn.LayerNorm(32).double()
    before = attention.qkv.bias.clone()
    drop_biases(attention)
    assert torch.equal(attention.qkv.bias, before)  # norms need them


def test_half_precision_masks_fold_into_half_weights():
    model = hide(model_of(), soft=True).bfloat16()
    small, x = compact(model), torch.randn(2, 3, 64, 64).bfloat16()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0.1, atol=0.1)


def test_normalised_queries_keep_their_channels():
    model, x = prunable(timm.models.VisionTransformer(**SIZES, qk_norm=True)).eval(), torch.randn(2, 3, 64, 64)
    hide(model, kept=[(16, 9, 40)] * 3)
    for block in model.blocks:
        block.attn.qk_mask = torch.rand(2, 16) + 0.5
    small = compact(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert small.blocks[0].attn.head_dim == 16 and small.blocks[0].attn.v_head_dim == 9
    hide(model)
    with pytest.raises(ValueError, match="block 0: compact_channels: keep_qk would take channels out of a norm"):
        compact(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda b: b.attn.qk_mask.__setitem__((0, 0), 0.0), ValueError, r"block 1: .* as many channels in every head"),
        (lambda b: b.attn.v_mask.zero_(), ValueError, "block 1: .* keep_v must keep as many"),
        (lambda b: b.mlp.mask.zero_(), ValueError, "block 1: the MLP's mask keeps no hidden channel"),
        (lambda b: setattr(b.mlp, "norm", nn.LayerNorm(128)), None, None),
    ],
)
@torch.no_grad()
def test_errors(change, error, message):
    model = hide(model_of())
    change(model.blocks[1])
    if error is None:  # the block keeps every channel, so its norm does not matter; another one's does
        compact(model)
        model.blocks[0].mlp.norm = nn.LayerNorm(128)
        error, message = ValueError, "block 0: channels would be taken out of the MLP's norm"
    with pytest.raises(error, match=message):
        compact(model)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="prunable"):
        compact(dense("deit"))
