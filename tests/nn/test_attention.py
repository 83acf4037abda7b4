"""tokenops.nn.Attention equals timm's, gives scores besides, and becomes physically smaller without a change."""

import copy
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F

import tokenops
from support.models import close
from tokenops.nn import Attention, compact_channels, convert_attention
from tokenops.ops.masked_channel_attention import faster

TimmAttention = timm.layers.Attention

B, N, C, H = 2, 17, 48, 3
FORMS = {
    "plain": dict(),
    "biases": dict(qkv_bias=True, proj_bias=False),
    "normed": dict(qk_norm=True, norm_layer=torch.nn.LayerNorm, qkv_bias=True),
}
if "gated" in inspect.signature(TimmAttention).parameters:
    OTHER = dict(attn_head_dim=20, dim_out=10, scale_norm=True, norm_layer=torch.nn.LayerNorm, gated=True)
else:  # timm before gates
    OTHER = dict(attn_head_dim=20, dim_out=10, scale_norm=True, norm_layer=torch.nn.LayerNorm)


def pair(**kwargs):
    theirs = TimmAttention(C, num_heads=H, **kwargs)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = Attention(C, num_heads=H, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def probabilities(module, x):
    """The whole matrix, plainly."""
    qkv = module.qkv(x).reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(qkv[0]), module.k_norm(qkv[1])
    return torch.softmax(module.scale * q @ k.transpose(2, 3), dim=3)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("form", [*FORMS.values(), OTHER], ids=[*FORMS, "other sizes, norm and gate"])
def test_equals_timm(form, ran_kernels, chosen):
    ours, theirs = pair(**form)
    x = torch.randn(B, N, C)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with ran_kernels() as names:
            y = module(leaf)
            grads = torch.autograd.grad(y.square().mean(), [leaf, *module.parameters()])
        results.append((y, *grads))
        expected = chosen("masked_channel_attention_fwd", "masked_channel_attention_bwd") if module is ours else set()
        assert names == expected
    for a, b in zip(*results):
        close(a, b)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("form", FORMS)
def test_scores(form, ran_kernels, chosen):
    module, _ = pair(**FORMS[form])
    x = torch.randn(B, N, C)
    p = probabilities(module, x)
    with torch.no_grad(), ran_kernels() as names:
        y, first = module(x, scores="class")
        close(first, p[:, :, 0])
        close(module(x, scores="class", heads="mean")[1], p[:, :, 0].mean(dim=1))
        close(module(x, scores="received")[1], p.mean(dim=2))
        close(y, module(x))
        plain, received, key_mean = module(x, scores="received", return_key_mean=True)
    assert names == chosen("masked_channel_attention_fwd")
    k = module.k_norm(module.qkv(x).reshape(B, N, 3, H, C // H)[:, :, 1])
    close(key_mean, k.mean(dim=2))
    module.fused_attn = False  # timm's convention: plain PyTorch
    with ran_kernels() as names:
        close(module(x, scores="class")[1], first)
    assert names == set()


@pytest.mark.usefixtures("on_device")
def test_masks_of_keys_stay_on_the_kernel(ran_kernels, chosen):
    ours, theirs = pair()
    x, keep = torch.randn(B, N, C), torch.rand(B, 1, 1, N) > 0.3
    bias = torch.randn(1, H, 1, N)
    with ran_kernels() as names:
        close(ours(x, attn_mask=keep), theirs(x, attn_mask=keep.expand(B, 1, N, N)))
        close(ours(x, attn_mask=bias), theirs(x, attn_mask=bias.expand(1, H, N, N)))
        close(ours(x, key_bias=bias, attn_mask=bias), theirs(x, attn_mask=(2 * bias).expand(1, H, N, N)))
        lengths = torch.tensor([5, N])
        close(ours(x, key_lengths=lengths)[0], ours(x[:1], attn_mask=(torch.arange(N) < 5).reshape(1, 1, 1, N))[0])
    assert chosen("masked_channel_attention_fwd") <= names


def test_other_masks_and_dropout_go_through_sdpa(ran_kernels):
    ours, theirs = pair(attn_drop=0.5)
    x, mask = torch.randn(B, N, C), torch.randn(N, N)
    ours.eval(), theirs.eval()
    with ran_kernels() as names:
        close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask))
        close(ours(x, attn_mask=mask[:1, :1, None, None]), theirs(x, attn_mask=mask[:1, :1, None, None]))
        close(ours(x, is_causal=True), theirs(x, is_causal=True))
        ours.train(), theirs.train()
        torch.manual_seed(1)
        dropped = ours(x)
        torch.manual_seed(1)
        close(dropped, theirs(x))
    assert names == set()
    for wrong, why in (
        (dict(scores="class"), "scores cannot be had with dropout, which only SDPA does"),
        (dict(key_lengths=torch.ones(B).long()), "key_lengths cannot be had with dropout"),
        (dict(return_key_mean=True), "return_key_mean cannot be had with dropout"),
    ):
        with pytest.raises(ValueError, match=f"Attention: {why}"):
            ours(x, **wrong)
    ours.eval()
    with pytest.raises(ValueError, match="scores cannot be had with a mask of queries"):
        ours(x, attn_mask=mask, scores="class")
    ours.v_mask = torch.ones(H, C // H)
    with pytest.raises(ValueError, match="v_mask cannot be had with a mask of queries"):
        ours(x, is_causal=True)


def test_heads_wider_than_the_kernel_go_through_sdpa():
    module = Attention(160, num_heads=1)
    x = torch.randn(1, 3, 160)
    q, k, v = module.qkv(x).split(160, dim=2)
    close(module(x), module.proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]))
    with pytest.raises(ValueError, match="scores cannot be had with heads over 128"):
        module(x, scores="class")


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_base_patch16_clip_quickgelu_224", "deit3_small_patch16_224"]
)
def test_a_whole_timm_model(name, ran_kernels, chosen):
    """LayerScale, class token and pooling stay the block's and the model's business."""
    model = timm.create_model(name, depth=2, embed_dim=96, num_heads=4, img_size=64, num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, names_before = model(x), list(model.state_dict())
        assert convert_attention(model) == 2
        with ran_kernels() as names:
            close(model(x), expected)
    assert names == chosen(*["masked_channel_attention_fwd"] * (faster(x) > 0))  # else torch's own is not slower
    assert list(model.state_dict()) == names_before
    with pytest.raises(ValueError, match="VisionTransformer has no timm.layers.Attention within"):
        convert_attention(model)


def test_a_timm_model_made_with_it(ran_kernels):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, attn_layer=Attention)
    with ran_kernels() as names:
        model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert names == {"masked_channel_attention_fwd.native", "masked_channel_attention_bwd.native"}


def test_conversion_shares_parameters_and_refuses_others():
    theirs = TimmAttention(C, num_heads=H, qkv_bias=True).eval()
    ours = Attention.from_timm(theirs)
    assert ours.qkv.weight is theirs.qkv.weight and not ours.training
    small = compact_channels(ours.train(), kept(7, 16), kept(9, 16))
    small.v_mask, small.attn_drop.training = torch.rand(H, 9), False
    again, x = Attention.from_timm(small), torch.randn(B, N, C)
    assert again.v_mask is small.v_mask and torch.equal(again(x), small(x))
    assert again.training and not again.attn_drop.training  # each part keeps its mode
    for other in (timm.layers.AttentionRope(C, num_heads=H), torch.nn.MultiheadAttention(C, H)):
        with pytest.raises(TypeError, match=f"from_timm takes timm.layers.Attention, but got .*{type(other).__name__}"):
            Attention.from_timm(other)


# Channel masks and compaction.


def kept(d, width):
    return torch.rand(H, width).argsort(dim=1)[:, :d]


def hard(index, width):
    return torch.zeros(H, width).scatter(1, index, 1.0)


def test_masks_of_ones_change_nothing():
    module, _ = pair(qkv_bias=True)
    x = torch.randn(B, N, C)
    expected = module(x)
    module.qk_mask = module.v_mask = torch.ones(H, C // H)
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("on_device")
def test_masks_learn():
    """A parameter set as a mask gets the gradient of a gate on that channel."""
    module, _ = pair()
    x = torch.randn(B, N, C)
    module.qk_mask = torch.nn.Parameter(torch.rand(H, C // H))
    module.v_mask = torch.nn.Parameter(torch.rand(H, C // H))
    assert {"qk_mask", "v_mask"} <= {name for name, _ in module.named_parameters()}
    masks = [module.qk_mask, module.v_mask]
    ours = torch.autograd.grad(module(x).square().sum(), masks)
    module.fused_attn = False
    for a, b in zip(ours, torch.autograd.grad(module(x).square().sum(), masks)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masks", ["learned", "straight-through"])
@pytest.mark.parametrize("form", ["biases", "normed"])
def test_masks_in_training_are_folded(form, masks):
    """A mask that learns, and one that is a result of a tensor that learns; fp64 loses nothing."""
    module = pair(**FORMS[form])[0].double()
    x, gates = torch.randn(B, N, C).double(), torch.rand(2, H, C // H, dtype=torch.float64)
    if masks == "learned":
        module.qk_mask, module.v_mask = map(torch.nn.Parameter, gates)
    else:
        gates.requires_grad_()
        module.qk_mask, module.v_mask = (gates > 0.5).double() + gates - gates.detach()
    small = compact_channels(module)
    torch.testing.assert_close(small(x), module(x), rtol=1e-12, atol=1e-12)
    assert small.v_mask is None and (small.qk_mask is None) == (form != "normed")
    assert all(parameter.is_leaf for parameter in small.parameters())


def test_masks_are_saved_where_there_are_some():
    module, _ = pair()
    assert not any("mask" in name for name in module.state_dict())
    module.qk_mask, module.v_mask = torch.rand(H, 16), torch.nn.Parameter(torch.rand(H, 16))
    saved, other, x = module.state_dict(), Attention(C, H), torch.randn(B, N, C)
    other.qk_mask, other.v_mask = torch.ones(H, 16), torch.nn.Parameter(torch.ones(H, 16))
    other.load_state_dict(saved, strict=True)
    assert torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(module)(x), module(x))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("form", ["plain", "biases"])
@pytest.mark.parametrize("soft", [False, True])
def test_compact_equals_masked(form, soft, ran_kernels, chosen):
    module, _ = pair(**FORMS[form])
    x, width = torch.randn(B, N, C), C // H
    qk, v = kept(10, width), kept(13, width)
    soft_qk, soft_v = (torch.rand(H, width) + 0.5, torch.rand(H, width)) if soft else (None, None)
    module.qk_mask, module.v_mask = soft_qk, soft_v
    small = compact_channels(module, qk, hard(v, width).bool())
    module.qk_mask = hard(qk, width) * (soft_qk if soft else 1.0)
    module.v_mask = hard(v, width) * (soft_v if soft else 1.0)
    with ran_kernels() as names:
        close(small(x, scores="class"), module(x, scores="class"))
    assert names == chosen("masked_channel_attention_fwd")
    assert (small.head_dim, small.v_head_dim, small.scale) == (10, 13, width**-0.5)
    assert small.qkv.weight.shape == (H * 33, C) and small.proj.weight.shape == (C, H * 13)
    assert small.qk_mask is None and small.v_mask is None
    # smaller again, from indices within the smaller heads
    smallest = compact_channels(small, keep_v=torch.arange(4).expand(H, 4))
    assert smallest.v_head_dim == 4 and smallest.head_dim == 10
    assert smallest(x).shape == (B, N, C)


def test_keeping_everything_changes_nothing():
    module, _ = pair(qkv_bias=True)
    x = torch.randn(B, N, C)
    small = compact_channels(module)
    assert torch.equal(small(x), module(x)) and small.qkv.weight is not module.qkv.weight


@pytest.mark.usefixtures("on_device")
def test_norms_and_gates():
    """A norm over the channels keeps them; the other side is still compacted, and a gate along with it."""
    module, _ = pair(**FORMS["normed"])
    x, v = torch.randn(B, N, C), kept(5, C // H)
    module.qk_mask = torch.rand(H, C // H)
    small = compact_channels(module, keep_v=v)
    module.v_mask = hard(v, C // H)
    close(small(x), module(x))
    with pytest.raises(ValueError, match="keep_qk would take channels out of a norm over all of them"):
        compact_channels(module, keep_qk=v)
    module.q_norm = torch.nn.Identity()  # k's norm is in the way as well
    with pytest.raises(ValueError, match="keep_qk would take channels out of a norm over all of them"):
        compact_channels(module, keep_qk=v)
    normed = Attention(C, H, scale_norm=True, norm_layer=torch.nn.LayerNorm)
    with pytest.raises(ValueError, match="keep_v would take channels out of a norm over all of them"):
        compact_channels(normed, keep_v=v)
    gated = Attention(C, H, gated=True, qkv_bias=True)
    gated.v_mask = hard(v, C // H)
    close(compact_channels(gated, keep_v=v)(x), gated(x))


def test_a_compact_module_is_an_ordinary_module():
    module, _ = pair(qkv_bias=True)
    small = compact_channels(module, kept(7, 16), kept(9, 16))
    x = torch.randn(B, N, C)
    expected, scores = small(x, scores="received")
    again = compact_channels(module, kept(7, 16), kept(9, 16))
    again.load_state_dict(small.state_dict(), strict=True)
    copied = copy.deepcopy(small)
    compiled = torch.compile(small, fullgraph=True, dynamic=True, backend="aot_eager")
    for other in (again, copied, compiled):
        y, received = other(x, scores="received")
        torch.testing.assert_close((y, received), (expected, scores))
    compiled(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, scores = small(x, scores="class")
    assert low.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(low.float(), expected, atol=5e-2, rtol=5e-2)
    with tokenops.use_backend("reference"):
        exported = torch.export.export(small, (x,)).module()
    close(exported(x), expected)


def test_a_compact_module_keeps_how_it_was_set(ran_kernels):
    """Frozen stays frozen, evaluation stays evaluation, plain PyTorch stays so; SDPA too takes the original scale."""
    theirs = TimmAttention(C, num_heads=H, qkv_bias=True).eval().requires_grad_(False)
    theirs.fused_attn, theirs.proj.bias.requires_grad = False, True
    small, x = compact_channels(Attention.from_timm(theirs), kept(7, 16)), torch.randn(B, N, C)
    assert [name for name, p in small.named_parameters() if p.requires_grad] == ["proj.bias"]
    assert not any(module.training for module in small.modules())
    mask = torch.randn(1, 1, 1, N)
    with ran_kernels() as names:
        close(small(x, attn_mask=mask.expand(1, 1, N, N)), small(x, attn_mask=mask))
    assert names == set()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            dict(keep_qk=torch.ones(H, 16)),
            TypeError,
            "keep_qk must be a tensor of bool or int64, but got torch.float32",
        ),
        (dict(keep_v=[1]), TypeError, "keep_v must be a tensor of bool or int64, but got list"),
        (
            dict(keep_v=torch.ones(H, 9) > 0),
            ValueError,
            r"keep_v must be bool .3, 16. or indices .3, d., but got .3, 9.",
        ),
        (dict(keep_v=torch.ones(2, 16) > 0), ValueError, r"keep_v must be bool .3, 16."),
        (dict(keep_qk=torch.full((H, 1), 16)), ValueError, r"keep_qk has an index outside of 0..15"),
        (dict(keep_qk=torch.zeros(H, 2).long()), ValueError, "keep_qk has an index twice in one head"),
        (dict(keep_v=torch.eye(H, 16).cumsum(0) > 0), ValueError, r"keep_v must keep as many .* but keeps .1, 2, 3."),
        (dict(keep_v=torch.zeros(H, 16) > 0), ValueError, "keep_v must keep as many channels in every head"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=f"compact_channels: {words}"):
        compact_channels(Attention(C, H), **arguments)


def test_errors_of_construction():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=48"):
        Attention(48, num_heads=5)
    with pytest.raises(ValueError, match="head_dim=16 and v_head_dim=0 must be at least 1"):
        Attention(48, num_heads=3, v_head_dim=0)
    with pytest.raises(ValueError, match="num_heads=0 does not divide dim=48"):
        Attention(48, num_heads=0)
    with pytest.raises(ValueError, match="qk_norm and scale_norm need a norm_layer"):
        Attention(48, num_heads=3, qk_norm=True)
    with pytest.raises(TypeError, match="compact_channels takes tokenops.nn.Attention, but got Linear"):
        compact_channels(torch.nn.Linear(2, 2))
