"""The SiT models compute, cost and train what was published (published/sit.py is the oracle)."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from published.sit import PublishedSiT
from support.models import close, flops, images, meta, train_still
from support.sit_models import Distilled, loss_and_gradients, slim_after, slimmings, tiny
from support.weights import spread
from tokenops.methods import for_inference, init_from_teacher

LVVIT = dict(num_heads=6, embed_dim=384, skip_lam=2.0)
#: what the published configurations are, for the oracle
PUBLISHED = {
    "sit_lvvit_tiny": dict(LVVIT, num_heads=5, embed_dim=320, stage_blocks=(1, 1, 1, 11)),
    "sit_lvvit_xsmall": dict(LVVIT, stage_blocks=(1, 1, 1, 13)),
    "sit_lvvit_small": dict(LVVIT, stage_blocks=(9, 3, 2, 2)),
    "sit_lvvit_medium": dict(LVVIT, num_heads=8, embed_dim=512, stage_blocks=(10, 4, 3, 3)),
    "sit_lvvit_large": dict(
        num_heads=12, embed_dim=768, skip_lam=3.0, stem="conv6", img_size=288, stage_blocks=(10, 4, 3, 7)
    ),
}
TEACHER = {
    "lvvit_tiny": "sit_lvvit_tiny",
    "lvvit_small": "sit_lvvit_small",
    "lvvit_medium": "sit_lvvit_medium",
    "lvvit_large": "sit_lvvit_large",
}
#: millions of parameters (in inference, of the reverse modules) and giga multiply-adds, as published
COSTS = {
    "sit_lvvit_tiny": (15.87, 14.0, 0.987),
    "sit_lvvit_xsmall": (25.63, 21.8, 1.482),
    "sit_lvvit_small": (25.63, 11.1, 4.016),
    "sit_lvvit_medium": (55.64, 25.3, 8.019),
    "sit_lvvit_large": (148.17, 78.8, 34.314),
    "lvvit_tiny": (15.69, 0, 3.457),
    "lvvit_small": (25.37, 0, 5.532),
    "lvvit_medium": (55.20, 0, 11.839),
    "lvvit_large": (147.17, 0, 55.974),
}
DEIT = dict(stem="linear", mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, aux_head=False)
#: every architecture, small: the keyword arguments that shrink it, and the oracle's
SMALL = dict(embed_dim=64, num_heads=2, stage_blocks=(1, 1, 1, 2), img_size=96, num_classes=10)
SHRUNK = {
    "sit_lvvit_small": dict(SMALL, skip_lam=2.0),
    "sit_lvvit_large": dict(SMALL, skip_lam=3.0, stem="conv6"),
    "sit_deit_small": dict(SMALL, **DEIT),
}


def against_the_oracle(name, sizes, batch):
    published = spread(PublishedSiT(**sizes)).eval()
    kwargs = {key: sizes[key] for key in SMALL if key in sizes} if sizes.get("num_classes") else {}
    model = timm.create_model(name, **kwargs).eval()
    distilled = Distilled(model).eval()
    distilled.load_published(published.state_dict())
    return distilled, published, images(model, batch)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", SHRUNK)
@torch.no_grad()
def test_outputs_equal_the_published_computation(name, ran_kernels, chosen):
    distilled, published, x = against_the_oracle(name, SHRUNK[name], 3)
    with ran_kernels() as names:
        logits = distilled.model(x)
    assert names == chosen("soft_aggregate_fwd")
    close(logits, published(x)[0])
    logits, layers = train_still(distilled)(x)
    expected, _, expected_layers = train_still(published)(x)
    close(logits, expected)
    assert len(layers) == len(expected_layers) == 5
    for ours, theirs in zip(layers, expected_layers, strict=True):
        assert ours.shape == (3, 36, 64)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_full_size_xsmall_equals_the_published_computation():
    distilled, published, x = against_the_oracle("sit_lvvit_xsmall", PUBLISHED["sit_lvvit_xsmall"], 1)
    expected = published(x)[0]
    close(distilled.model(x), expected)
    close(for_inference(distilled.model)(x), expected)


@pytest.mark.usefixtures("on_device")
@torch.no_grad()
def test_dense_teacher_equals_the_published_computation():
    sizes = dict(SMALL, skip_lam=2.0, slim=False)
    published = spread(PublishedSiT(**sizes)).eval()
    model = timm.create_model("lvvit_small", embed_dim=64, num_heads=2, depth=5, img_size=96, num_classes=10).eval()
    model.load_state_dict(published.state_dict(), strict=True)
    x = images(model)
    logits, layers = Distilled(model)(x)
    expected, expected_layers = published(x)
    close(logits, expected)
    close(model(x), expected)
    close(torch.stack(layers), torch.stack(expected_layers))
    close(for_inference(model)(x), expected)


def sized(name):
    return pytest.param(name, marks=pytest.mark.slow if name.endswith(("medium", "large")) else ())


@pytest.mark.parametrize("name", [*map(sized, PUBLISHED)])
def test_official_state_dict_loads_strictly(name):
    with torch.device("meta"):
        official = PublishedSiT(**PUBLISHED[name]).state_dict()
    model = meta(name)
    model.load_state_dict(official, strict=True)
    stripped = {key: value for key, value in official.items() if not key.startswith(("rtsm.", "aux_head."))}
    model.load_state_dict(stripped, strict=True)
    assert sum(p.numel() for p in model.state_dict().values()) == sum(p.numel() for p in stripped.values())
    with torch.device("meta"):
        Distilled(model).load_published(official)
    for key in ("tsm.1.scale", "blocks.3.norm1.weight"):
        broken = {name: value for name, value in official.items() if name != key}
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(broken, strict=True)


@pytest.mark.parametrize("name", [*map(sized, COSTS)])
def test_parameters_and_flops_are_the_published_ones(name):
    model = meta(name).eval()
    with torch.device("meta"):
        distilled = Distilled(model)
    own, reverse = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, distilled.rtsm))
    auxiliary = 1e-3 * (model.embed_dim + 1)  # token labelling's head, which training has
    parameters, expected_reverse, gmacs = COSTS[name]
    assert own + auxiliary == pytest.approx(parameters, abs=0.005)
    assert reverse == pytest.approx(expected_reverse, abs=0.05)
    x = torch.empty(1, 3, *model.patch_embed.img_size, device="meta")
    assert flops(model, x) / 2e9 == pytest.approx(gmacs, rel=1e-3)


def test_our_kernels_are_counted_like_the_reference():
    model = tiny()
    distilled, x = spread(Distilled(model)), images(model)

    def training_step():
        with FlopCounterMode(display=False) as counter:
            logits, layers = distilled(x)
            (logits.sum() + sum(layer.sum() for layer in layers)).backward()
        return counter.get_total_flops()

    ours = flops(model, x), training_step()
    with tokenops.use_backend("reference"):
        plain = flops(model, x), training_step()
    assert ours[0] == plain[0]
    hidden = 2 * sum(2 * 32 * m.mlp1.fc1.weight.numel() for m in distilled.rtsm if hasattr(m, "mlp1"))
    assert ours[1] == plain[1] + hidden  # what the backward passes compute again


def test_tokens_per_stage():
    for name, left in (
        ("sit_lvvit_large", [162, 81, 40]),
        ("sit_lvvit_tiny", [98, 49, 24]),
        ("sit_lvvit_small", [98, 49, 24]),
        ("sit_deit_base", [98, 49, 24]),
    ):
        assert [slimming.slim_tokens for slimming in slimmings(meta(name))] == left
    assert slim_after(meta("sit_deit_small")) == [2, 5, 8]
    assert slim_after(meta("sit_lvvit_medium")) == [9, 13, 16]


@torch.no_grad()
def test_deit_is_timms_deit():
    deit = timm.create_model("deit_tiny_patch16_224").eval()
    x = torch.randn(1, 3, 224, 224)
    unslimmed = init_from_teacher(timm.create_model("sit_deit_tiny", stage_blocks=(12,)).eval(), deit)
    close(unslimmed(x), deit(x))
    for size in ("tiny", "small", "base"):
        init_from_teacher(meta(f"sit_deit_{size}"), meta(f"deit_{size}_patch16_224"))


def test_students_start_from_their_teachers():
    for teacher, student in (*TEACHER.items(), ("lvvit_small", "sit_lvvit_xsmall")):
        init_from_teacher(meta(student), meta(teacher))
    sizes = dict(embed_dim=32, num_heads=2, img_size=64, num_classes=5)
    teacher = timm.create_model("lvvit_small", depth=4, **sizes)
    student = tiny()
    before = slimmings(student)[0].weight[1].weight.clone()
    assert init_from_teacher(student, teacher.state_dict()) is student
    assert torch.equal(student.blocks[3].mlp.fc1.weight, teacher.blocks[3].mlp.fc1.weight)
    assert torch.equal(slimmings(student)[0].weight[1].weight, before)
    with pytest.raises(RuntimeError, match="lacks .*blocks.4"):
        init_from_teacher(tiny(stage_blocks=(1, 1, 3)), teacher)
    with pytest.raises(RuntimeError, match="should not, .*blocks.3"):
        init_from_teacher(tiny(stage_blocks=(1, 1, 1)), teacher)
    with pytest.raises(RuntimeError, match="size mismatch"):
        init_from_teacher(tiny(embed_dim=64), teacher)


@pytest.mark.usefixtures("on_device")
def test_gradients_reach_every_parameter(ran_kernels, chosen):
    model = tiny()
    distilled = spread(Distilled(model)).train()
    with ran_kernels() as names:
        loss, grads = loss_and_gradients(distilled, images(model))
    assert chosen("soft_aggregate_bwd", "token_mlp_bwd") <= names
    assert len(grads) == len(list(distilled.parameters()))
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        if name.endswith("weight.3.bias"):  # the softmax over the tokens cancels it
            assert grad.abs().max() < 1e-6
        else:
            assert grad.any(), name


@pytest.mark.usefixtures("on_device")
def test_gradients_equal_the_published_ones():
    distilled, published, x = against_the_oracle("sit_lvvit_small", SHRUNK["sit_lvvit_small"], 2)
    _, grads = loss_and_gradients(distilled, x)
    forward = published.forward
    published.forward = lambda x: forward(x)[::2]
    _, expected = loss_and_gradients(train_still(published), x)
    assert set(grads) == {name for name in expected if not name.startswith("aux_head.")}
    for name, grad in ((name, expected[name]) for name in grads):
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name
