"""EViT computes what was published (written down here in plain PyTorch), in few launches, and is a timm model."""

import doctest
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from support.models import (
    SMALL,
    all_close,
    close,
    flops,
    gradients,
    images,
    kept_maps,
    meta,
    operators_between,
    roles,
    train_a_little,
)
from support.weights import spread
from tokenops.methods import evit
from tokenops.methods.evit import keep_rate_at

PER_BLOCK = (1, 0.9, 1, 1, 0.5, 0.3, 1, 1, 1, 1, 1, 0.6)


def small(name="evit_deit_tiny_patch16_224", **kwargs):
    model = spread(timm.create_model(name, **{**SMALL, **kwargs})).eval()
    return model


def published(model, x):
    """Logits, and the places of the image patches that are left after each reducing block, of one image at a time."""
    state, heads, logits, left = dict(model.named_parameters()), model.blocks[0].attn.num_heads, [], []

    def linear(name, y):
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, y):
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for image in x:
        proj = "patch_embed.proj"
        y = F.conv2d(image[None], state[f"{proj}.weight"], state[f"{proj}.bias"], stride=16)[0].flatten(1).T
        y = torch.cat((state["cls_token"][0], y)) + state["pos_embed"][0]
        places, after = list(range(len(y) - 1)), []
        for i, rate in enumerate(role.part for role in roles(model)):
            block = f"blocks.{i}"
            q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", y)).unflatten(1, (3, heads, -1)).unbind(1)
            weights = torch.einsum("qhd,khd->hqk", q, k).mul(q.shape[2] ** -0.5).softmax(dim=2)
            y = y + linear(f"{block}.attn.proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            keep = math.ceil(rate * (len(y) - 1))
            if keep < len(y) - 1:
                a = weights[:, 0, 1:].mean(dim=0)
                order = a.argsort(descending=True)
                best, others = order[:keep], order[keep:]
                fused = (a[others, None] * y[1 + others]).sum(dim=0, keepdim=True)
                fuse = roles(model)[i].fuse_token
                y = torch.cat((y[:1], y[1 + best], fused if fuse else fused[:0]))
                places = [places[j] for j in best] + [None] * fuse
                after.append({place for place in places if place is not None})
            y = y + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", y))))
        logits.append(linear("head", norm("norm", y[0])))
        left.append(after)
    return torch.stack(logits), left


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kwargs", [{}, dict(fuse_token=False), dict(keep_rate=PER_BLOCK), dict(keep_rate=0.01)])
def test_outputs_equal_the_published_computation(kwargs):
    model = small(**kwargs)
    x = images(model, 2)
    logits = model(x)
    expected, left = published(model, x)
    close(logits, expected)
    maps = kept_maps(model, x)
    assert len(maps) == sum(role.part < 1 for role in roles(model)) and maps[0].shape == (2, 4, 4)
    for b, after in enumerate(left):
        for there, places in zip(maps, after, strict=True):
            assert set(there[b].flatten().nonzero().flatten().tolist()) == places
    all_close(gradients(model, logits.square().mean()), gradients(model, expected.square().mean()))


@torch.no_grad()
def test_tokens_that_are_left():
    model = small(img_size=(48, 80))  # 15 patches
    x = images(model)
    counts = [y.shape[1] for y in model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)]
    assert counts == [15] * 3 + [12] * 3 + [10] * 3 + [8] * 3  # ceil(0.7 N) and the fused one
    model.keep_rate = 0.95  # ceil(14.25): every token
    close(model(x), plain(model)(x))
    assert kept_maps(model, x) == []
    model.keep_rate = 0.93  # exactly one is dropped, or fused with itself alone
    close(model(x), published(model, x)[0])
    model = small(img_size=(48, 80), fuse_token=False, keep_rate=0.93)
    close(model(x), published(model, x)[0])
    assert [m.sum().item() for m in kept_maps(model, x)] == [2 * 14]  # ceil(0.93 * 14) is 14


def plain(model):
    """timm's own model with the same weights."""
    kwargs = dict(SMALL, img_size=model.patch_embed.img_size)
    deit = timm.create_model("deit_tiny_patch16_224", **kwargs).eval()
    deit.load_state_dict(model.state_dict(), strict=True)
    return deit


@torch.no_grad()
def test_deit_loads_and_without_reduction_is_timms():
    model = small(keep_rate=1.0)
    deit = plain(model)
    other = small(keep_rate=1.0)
    other.load_state_dict(deit.state_dict(), strict=True)
    x = images(model)
    close(other(x), deit(x))
    close(other.forward_features(x), deit.forward_features(x))
    for size in ("tiny", "small", "base"):
        meta(f"evit_deit_{size}_patch16_224").load_state_dict(meta(f"deit_{size}_patch16_224").state_dict())


@pytest.mark.usefixtures("on_device")
def test_the_reduction_is_one_launch(chosen):
    names = operators_between(small(), "blocks.3.attn.proj", "blocks.3.mlp.fc1")
    assert names == ["aten.add.Tensor", *(f"tokenops.{name}" for name in chosen("select_tokens_fwd"))]


def test_cost():
    for rate, gmacs in ((0.5, 2.3), (0.7, 3.0), (0.9, 4.0)):  # as published for DeiT-S
        model = meta("evit_deit_small_patch16_224", keep_rate=rate).eval()
        assert flops(model, torch.empty(1, 3, 224, 224, device="meta")) / 2e9 == pytest.approx(gmacs, abs=0.06)


def test_keep_rate_schedule():
    rates = [keep_rate_at(epoch, 0.7, start=10, end=110) for epoch in (0, 9.9, 10, 35, 60, 109.999, 110, 299)]
    assert rates[:3] == [1, 1, 1] and rates[4] == pytest.approx(0.85) and rates[-2:] == [0.7, 0.7]
    assert rates[3] == pytest.approx(0.7 + 0.3 * (1 + math.cos(math.pi / 4)) / 2) and rates == sorted(rates)[::-1]
    assert keep_rate_at(3, 0.5, start=3, end=3) == 0.5
    model = small()
    model.keep_rate = 1.0
    assert [role.part for role in roles(model)] == [1.0] * 12
    model.keep_rate = keep_rate_at(60, 0.7, start=10, end=110)
    assert [i for i, role in enumerate(roles(model)) if role.part == pytest.approx(0.85)] == [3, 6, 9]
    for kwargs, message in ((dict(base=0), "base=0"), (dict(base=1.5), "base=1.5"), (dict(end=5), "end=5.*start=10")):
        with pytest.raises(ValueError, match=message):
            keep_rate_at(1, **{**dict(base=0.7, start=10, end=110), **kwargs})


@pytest.mark.usefixtures("on_device")
def test_trains():
    model = small(init_values=0.1, qk_norm=True)
    x, target = images(model, 4), torch.arange(4)
    train_a_little(model, lambda: F.cross_entropy(model(x), target))


def test_other_parts_of_timm():
    model = small(fuse_token=False, norm_layer="rmsnorm", global_pool="avg", reg_tokens=2, keep_rate=PER_BLOCK)
    x = images(model)
    assert model(x).shape == (2, 5) and model.forward_features(x).shape == (2, 3 + 2, 48)
    final, (first,) = model.forward_intermediates(x, [0], return_prefix_tokens=True, norm=True)
    assert final.shape == (2, 5, 48) and first[0].shape == (2, 48, 4, 4) and first[1].shape == (2, 3, 48)
    last = model.forward_intermediates(x, 1, stop_early=True, output_fmt="NLC", intermediates_only=True)[0]
    close(model.norm(last), final[:, 3:])
    with pytest.raises(ValueError, match="block 1 gives 15 tokens that are not the grid's 4 x 4 patches"):
        model.forward_intermediates(x, [0, 1])
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    features = timm.create_model("evit_deit_tiny_patch16_224", features_only=True, out_indices=(2, 9), **SMALL)
    assert [f.shape for f in features(x)] == [(2, 16, 48), (2, 9, 48)] and len(features.model.blocks) == 10


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(keep_rate=0.0), "keep_rate=0.0, but it must be above 0 and at most 1"),
        (dict(keep_rate=1.1), "keep_rate=1.1"),
        (dict(keep_rate=float("nan")), "keep_rate=nan"),
        (dict(keep_rate=(0.5, 0.5)), "keep_rate has 2 values.*12 blocks"),
        (dict(reduction_loc=(3, 12)), r"reduction_loc=\(3, 12\), but it must be ascending block numbers from 0 to 11"),
        (dict(reduction_loc=(6, 3)), r"reduction_loc=\(6, 3\)"),
    ],
)
def test_errors_of_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_is_a_timm_model():
    assert timm.list_models("evit_*") == [f"evit_deit_{s}_patch16_224" for s in ("base", "small", "tiny")]
    model = small()
    x = images(model)
    with pytest.raises(ValueError, match="attn_mask was given"):
        model.forward_features(x, attn_mask=torch.zeros(1, 1))
    assert doctest.testmod(evit) == (0, 1)
