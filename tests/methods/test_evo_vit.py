"""Evo-ViT on DeiT computes, costs and trains what was published (published/evo_vit.py is the oracle)."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from published.evo_vit import PublishedEvoViT
from support import models
from support.models import (
    SMALL,
    all_close,
    close,
    flops,
    gradients,
    images,
    kept_maps,
    meta,
    roles,
)
from support.weights import spread
from tokenops.methods import load_checkpoint
from tokenops.methods.evo_vit import evo_vit_loss, stage_wise_at

#: millions of parameters without the class head, and giga multiply-adds, as published
COSTS = {
    "evo_deit_tiny_patch16_224": (5.72, 0.818),
    "evo_deit_small_patch16_224": (22.05, 3.033),
    "evo_deit_base_patch16_224": (86.57, 11.658),
    "evo_deit_small_patch16_384": (22.20, 9.881),
    "evo_deit_base_patch16_384": (86.86, 36.112),
}
#: more than was published: the numbers of blocks, of stages, of tokens (of 16; one is dropped, one stays, all stay)
CONFIGURATIONS = {
    "published": {},
    "short": dict(depth=5, stages=(1, 3), prune_ratio=(1, 0.5, 0.5, 0.25, 0.25), tradeoff=(1, 0.3, 0.5, 0.7, 0)),
    "one dropped": dict(depth=6, stages=(2, 4), prune_ratio=(1, 1) + (0.94,) * 4, tradeoff=(0.2, 0.9) + (0.5,) * 4),
    "one kept": dict(depth=3, stages=(1,), prune_ratio=(1, 0.07, 0.07), tradeoff=(0, 1, 1)),
    "all kept": dict(depth=3, stages=(1, 2), prune_ratio=(1, 1, 1), tradeoff=(1, 0.5, 0.5)),
    "some stages": dict(depth=4, stages=(1, 2, 3), prune_ratio=(1, 0.5, 1, 0.5), tradeoff=(1, 0.5, 0.4, 1)),
    "all in the end": dict(depth=4, stages=(2, 3), prune_ratio=(1, 1, 0.5, 1), tradeoff=(0.5, 0.5, 0.4, 1)),
}


small = partial(models.small, "evo_deit_tiny_patch16_224")


def against_the_oracle(stage_wise=True, batch=3, **kwargs):
    published = spread(PublishedEvoViT(**SMALL, **kwargs, stage_wise=stage_wise)).eval()
    with torch.no_grad():
        for qk in published.qks.parameters():  # what is looked at differs from block to block
            qk.mul_(5)
    model = small(**kwargs, stage_wise=stage_wise)
    model.load_state_dict(published.state_dict(), strict=True)
    return model, published, images(model, batch)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("stage_wise", [True, False])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_equal_the_published_computation(name, stage_wise):
    model, published, x = against_the_oracle(stage_wise, **CONFIGURATIONS[name])
    logits, expected = model(x), published(x)
    close(logits, expected)
    maps = kept_maps(model, x)
    pruned = [places for places in published.chosen if places.shape[1] < 16]
    for there, places in zip(maps, pruned, strict=True):
        assert there.shape == (3, 4, 4)
        assert torch.equal(there.flatten(1), torch.zeros(3, 16, dtype=torch.bool).scatter(1, places, True))
    all_close(gradients(model, logits.square().mean()), renamed(gradients(published, expected.square().mean())))


def renamed(state):
    """Published names to timm's, of a depth that is seen."""
    found = {}
    for key, value in state.items():
        module, _, rest = key.partition(".")
        i, _, rest = rest.partition(".")
        if module == "qks":
            found[f"blocks.{i}.attn.qkv.{rest[3:]}"] = torch.cat((value, state[f"vs.{i}.v.{rest[3:]}"]))
        elif module in ("norms", "projs"):
            found[f"blocks.{i}.{'norm1' if module == 'norms' else 'attn.proj'}.{rest}"] = value
        elif module == "norm":
            found[f"fc_{key}"] = value
        elif module != "vs":
            found[key] = value
    return found


@pytest.mark.usefixtures("on_device")
@torch.no_grad()
def test_images_are_independent_of_the_batch_and_modes_differ():
    model, published, x = against_the_oracle(batch=8, tradeoff=(1.0,) * 12)
    published(x)
    first, second = (stage.sort(dim=1).values for stage in published.chosen)
    assert not torch.equal(first, second)
    for model.stage_wise in (True, False):
        close(torch.cat([model(image[None]) for image in x]), model(x))
    layer_wise, model.stage_wise = model(x), True
    assert (layer_wise - model(x)).abs().max() > 1e-3


@torch.no_grad()
def test_state_dicts(tmp_path):
    model, published, x = against_the_oracle()
    torch.save({"model": published.state_dict(), "epoch": 299}, tmp_path / "published.pth")
    other = load_checkpoint(small(), tmp_path / "published.pth")
    assert torch.equal(other(x), model(x))
    other = small()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x)) and set(other.state_dict()) == set(model.state_dict())
    assert not any("_cls" in key for key in other.state_dict())  # the class head is the objective's
    # of a copy, and within another module
    for twin in (copy.deepcopy(small()), pickle.loads(pickle.dumps(small()))):
        twin.load_state_dict(published.state_dict(), strict=True)
        assert torch.equal(twin(x), model(x))
    torch.nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in published.state_dict().items()}, strict=True)
    for broken, message in (("vs.3.v.weight", "Missing.*blocks.3.attn.qkv.weight"), ("norm.bias", "fc_norm.bias")):
        state = published.state_dict()
        del state[broken]
        with pytest.raises(RuntimeError, match=message):
            small().load_state_dict(state, strict=True)


@torch.no_grad()
def test_deit_loads():
    deit = spread(timm.create_model("deit_tiny_patch16_224", **SMALL)).eval()
    model = small(stages=())
    model.load_state_dict(deit.state_dict(), strict=True)
    x = images(model)
    close(model(x), model.head(model.fc_norm(deit.forward_intermediates(x, 1)[1][0].mean((2, 3)))))
    assert torch.equal(model.fc_norm.bias, deit.norm.bias) and kept_maps(model, x) == []
    for name in COSTS:
        deit = meta(name[4:].replace("384", "224"), img_size=int(name[-3:]))
        meta(name).load_state_dict(deit.state_dict(), strict=True)


@pytest.mark.parametrize("name", COSTS)
def test_parameters_and_flops_are_the_published_ones(name):
    model = meta(name).eval()
    x = torch.empty(1, 3, *model.patch_embed.img_size, device="meta")
    parameters, gmacs = COSTS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert flops(model, x) / 2e9 == pytest.approx(gmacs, rel=1e-3)
    assert [(i, role.part) for i, role in enumerate(roles(model)) if role.begins] == [(4, 0.5), (8, 0.5)]
    assert [i for i, role in enumerate(roles(model)) if role.ends] == [7, 11]


@torch.no_grad()
def test_scores_are_computed_where_they_are_needed():
    def blocks_with_scores(model):
        found = []
        for i, block in enumerate(model.blocks):
            block.attn.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: found.append(i) if "ask" in kwargs and kwargs["ask"].scores else None,
                with_kwargs=True,
            )
        model(images(model))
        return found

    assert blocks_with_scores(small()) == [3, 4, 5, 6, 7]
    assert blocks_with_scores(small(stage_wise=False)) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert blocks_with_scores(small(stages=(4,))) == [3]
    assert blocks_with_scores(small(prune_ratio=1.0)) == []


def test_schedule():
    modes = [stage_wise_at(epoch, 300) for epoch in range(300)]
    assert modes == [False] * 200 + [True] * 100
    assert [stage_wise_at(epoch, 10) for epoch in range(10)] == [False] * 7 + [True] * 3


def test_loss():
    logits, cls, target = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(cls, target)) / 2
    close(evo_vit_loss((logits, cls), target), expected)
    close(evo_vit_loss((logits, cls), logits, F.mse_loss), F.mse_loss(cls, logits) / 2)
