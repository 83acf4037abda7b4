"""EViT computes what was published (written down here in plain PyTorch), in few launches, and is a timm model."""

import math
from functools import partial

import pytest
import torch

from support import models
from support.models import (
    all_close,
    close,
    flops,
    gradients,
    images,
    kept_maps,
    meta,
    roles,
)
from support.patched_models import embedded, model_of, softmax_attention
from tokenops import apply_patch
from tokenops.methods.evit import keep_rate_at

PER_BLOCK = (1, 0.9, 1, 1, 0.5, 0.3, 1, 1, 1, 1, 1, 0.6)


small = partial(models.small, "evit_deit_tiny_patch16_224")


def published(model, x):
    """Features, and for each reducing block the places of the image patches that are left, of every image."""
    x, prefix = embedded(model, x), model.num_prefix_tokens
    places, left = [list(range(x.shape[1] - prefix)) for _ in x], []
    for block, role in zip(model.blocks, roles(model)):
        y, weights, _ = softmax_attention(block.attn, block.norm1(x))
        x = x + block.ls1(y)
        seen = weights[:, :, 0] if model.cls_token is not None else weights.mean(dim=2)
        seen = seen.mean(dim=1)[:, prefix:]
        keep = math.ceil(role.part * seen.shape[1])
        if keep < seen.shape[1]:
            reduced = []
            for b, (tokens, a) in enumerate(zip(x, seen)):
                order = a.argsort(descending=True)
                best, others = order[:keep].sort().values, order[keep:]
                fused = (a[others, None] * tokens[prefix + others]).sum(dim=0, keepdim=True)
                reduced.append(torch.cat((tokens[:prefix], tokens[prefix + best], fused[: role.fuse_token])))
                places[b] = [places[b][j] for j in best] + [None] * role.fuse_token
            x = torch.stack(reduced)
            left.append([{place for place in of_image if place is not None} for of_image in places])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x), left


def of_family(family, fuse_token):
    return apply_patch(model_of(family), "evit", keep_rate=[1, 0.7, 0.45], fuse_token=fuse_token)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "make",
    [
        *(partial(small, **kwargs) for kwargs in ({}, dict(fuse_token=False), dict(keep_rate=PER_BLOCK))),
        partial(small, keep_rate=0.01),
        *(
            partial(of_family, family, fuse)
            for family in ("plain", "distilled", "registers", "norms", "average")
            for fuse in (True, False)
        ),
    ],
    ids=lambda make: " ".join(map(str, (*make.args, *make.keywords.items()))),
)
def test_outputs_equal_the_published_computation(make):
    model = make()
    x = images(model, 2)
    features, (expected, left) = model.forward_features(x), published(model, x)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    logits, expected = model(x), model.forward_head(expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    maps = kept_maps(model, x)
    assert len(maps) == sum(role.part < 1 for role in roles(model)) and maps[0].shape == (2, 4, 4)
    for there, places in zip(maps, left, strict=True):
        assert [set(kept.flatten().nonzero().flatten().tolist()) for kept in there] == places
    all_close(gradients(model, logits.square().mean()), gradients(model, expected.square().mean()))


@torch.no_grad()
def test_tokens_that_are_left():
    model = small(img_size=(48, 80))  # 15 patches
    x = images(model)
    counts = [y.shape[1] for y in model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)]
    assert counts == [15] * 3 + [12] * 3 + [10] * 3 + [8] * 3  # ceil(0.7 N) and the fused one
    model.keep_rate = 0.95  # ceil(14.25): every token
    close(model.forward_features(x), published(model, x)[0])
    assert kept_maps(model, x) == []
    model.keep_rate = 0.93  # exactly one is dropped, or fused with itself alone
    close(model.forward_features(x), published(model, x)[0])
    model = small(img_size=(48, 80), fuse_token=False, keep_rate=0.93)
    close(model.forward_features(x), published(model, x)[0])
    assert [m.sum().item() for m in kept_maps(model, x)] == [2 * 14]  # ceil(0.93 * 14) is 14


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
