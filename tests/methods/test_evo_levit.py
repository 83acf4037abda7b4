"""The Evo-LeViT models compute, cost and train what was published (published/evo_levit.py is the oracle)."""

import pytest
import timm
import torch

import tokenops
from published.evo_levit import PublishedEvoLeViT
from support.models import flops, meta
from support.weights import spread_levit as spread
from tokenops.methods import load_checkpoint, models
from tokenops.methods.evo_levit import EvoLeViT, evo_levit_loss

#: dense, pruned and subsampled grids of 5x6, 3x3 and 2x2 patches: odd sides, 15, 4 and 2 of them kept
TINY = dict(embed_dim=(32, 48, 64), key_dim=8, num_heads=(2, 3, 4), depth=(4, 2, 2), img_size=(80, 96), num_classes=10)
#: millions of parameters in inference, giga multiply-adds pruned and not, at 224 and at 384 pixels, as published
COSTS = {
    "128s": (7.84, 0.256, 0.312, 0.825, 0.987),
    "128": (9.27, 0.305, 0.414, 0.984, 1.372),
    "192": (11.03, 0.510, 0.668, 1.654, 2.221),
    "256": (19.01, 0.880, 1.146, 2.763, 3.674),
    "384": (39.30, 1.849, 2.390, 5.622, 7.389),
}
MODES = pytest.mark.parametrize("stage_wise", [True, False], ids=["stages", "layers"])


def tiny(**kwargs):
    return spread(timm.create_model("evo_levit_128", **{**TINY, **kwargs})).eval()


def images(model, batch=3):
    return torch.randn(batch, 3, *model.img_size).to(model.poss.dtype)


def close(a, b, tolerance=None):
    tolerance = tolerance or (1e-5 if a.device.type == "cpu" else 1e-4)  # as support.models.close
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def against_the_oracle(stage_wise=True, learn=True, **kwargs):
    """Our model and the published one with the same weights, of which the latter has every block twice."""
    published = spread(PublishedEvoLeViT(**{**TINY, **kwargs})).eval()
    model = timm.create_model("evo_levit_128", **{**TINY, **kwargs}).eval()
    model.load_state_dict(published.state_dict(), strict=True)
    published.stage_wise, published.learn = stage_wise, learn
    model.stage_wise, model.learn_tradeoff = stage_wise, learn
    return model, published


def gmacs(model):
    return flops(model, torch.empty(1, 3, *model.img_size, device="meta")) / 2e9


@pytest.mark.usefixtures("on_device")
@MODES
@pytest.mark.parametrize("learn", [True, False], ids=["learned", "fixed"])
@torch.no_grad()
def test_outputs_equal_the_published_computation(stage_wise, learn):
    model, published = against_the_oracle(stage_wise, learn)
    x = images(model, 4)
    expected = published(x)
    close(model(x), expected)
    with tokenops.use_backend("reference"):
        close(model(x), expected)
    # what could have been got wrong matters here: the mode, the trade-off, pruning itself
    for change in (dict(stage_wise=not stage_wise), dict(learn=not learn)):
        for name, value in change.items():
            setattr(published, name, value)
        assert (published(x) - expected).abs().max() > 1e-3
    assert (tiny(keeping_ratio=1.0)(x) - expected).abs().max() > 1e-3


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(keeping_ratio=(29 / 30 + 1e-9, 8 / 9 + 1e-9, 0.75)),  # one patch is dropped in each stage
        dict(keeping_ratio=(1.0, 0.5, 1.0)),  # the last choice is not in the last stage
        dict(keeping_ratio=(0.02, 0.05, 0.2)),  # no patch is kept: class and representative token are left
        dict(keeping_ratio=(0.5, 0.7, 0.9), dense_layers=5),  # dense layers reach into the second stage
        dict(keeping_ratio=(1.0, 1.0, 1.0)),
    ],
    ids=["one", "middle", "none", "dense", "all"],
)
@MODES
@torch.no_grad()
def test_ratios_and_dense_layers(kwargs, stage_wise):
    model, published = against_the_oracle(stage_wise, **kwargs)
    x = images(model, 2)
    close(model(x), published(x))


@pytest.mark.usefixtures("on_device")
@MODES
def test_training_and_its_gradients_equal_the_published_ones(stage_wise):
    model, published = against_the_oracle(stage_wise)
    model, published = model.double().train(), published.double().train()
    x, target = images(model, 4), torch.tensor([1, 5, 2, 9])
    logits, expected = model(x), published(x)
    for mine, theirs in zip(logits, expected, strict=True):
        close(mine, theirs, 1e-9)
    evo_levit_loss(logits, target).backward()
    evo_levit_loss(expected, target).backward()
    theirs = dict(published.named_parameters())
    reached = set()
    for name, parameter in model.named_parameters():
        grad = theirs[name].grad
        if parameter.grad is None:  # a trade-off on which no later choice depends
            assert name.endswith("learn_tradeoff") and (grad is None or not grad.any())
            continue
        reached.add(name)
        assert (parameter.grad - grad).norm() <= 1e-8 * grad.norm() + 1e-12, name
        assert parameter.grad.any() or name.endswith("poss"), name
    for name, buffer in model.named_buffers():
        close(buffer, published.get_buffer(name), 1e-9)
    thetas = {int(name.split(".")[1]) for name in reached if name.endswith("learn_tradeoff")}
    # blocks 4 and 8 are the subsamplings, 10 and 11 the last stage's layers
    assert thetas == ({1, 2, 3, 4, 6, 7, 8} if stage_wise else {1, 2, 3, 4, 6, 7, 8, 10})


@pytest.mark.usefixtures("on_device")
def test_evaluation_has_gradients():
    model, published = against_the_oracle()
    x = images(model)
    model(x).square().sum().backward()
    published(x).square().sum().backward()
    for part in ("patch_embed.0.c", "blocks.2.m1.m.qkv.c", "blocks.8.kv.c"):
        grad = published.get_submodule(part).weight.grad
        assert (model.get_submodule(part).weight.grad - grad).norm() <= 1e-4 * grad.norm()


@MODES
@torch.no_grad()
def test_images_do_not_depend_on_their_batch(stage_wise):
    model = tiny(stage_wise=stage_wise)
    x = images(model, 4)
    close(model(x), torch.cat([model(image.unsqueeze(0)) for image in x]))
    assert torch.equal(model(x), model(x))


@MODES
def test_training_decreases_the_loss_and_reaches_every_parameter(stage_wise):
    model = timm.create_model("evo_levit_384", **{**TINY, "stage_wise": stage_wise}).train()
    assert model.blocks[0].m1.drop_path.drop_prob == 0.1
    x, target, teacher = images(model, 8), torch.arange(8), torch.randn(8, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = evo_levit_loss(model(x), target, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.endswith("learn_tradeoff") for name in idle), idle


def test_loss():
    logits, target, teacher = torch.randn(4, 5, 10), torch.randint(10, (5,)), torch.randn(5, 10)
    entropy = [[torch.nn.functional.cross_entropy(y, t) for y in logits] for t in (target, teacher.argmax(1))]
    (mean, mean_dist, cls, cls_dist), (_, taught, _, cls_taught) = entropy
    close(evo_levit_loss(tuple(logits), target, teacher), 0.25 * (mean + cls + taught + cls_taught))
    close(evo_levit_loss(tuple(logits), target), 0.25 * (mean + cls + mean_dist + cls_dist))
    assert evo_levit_loss(tuple(logits), target, teacher, lambda *_: torch.tensor(0.0)) < 0.26 * (taught + cls_taught)
    with pytest.raises(ValueError, match="1 tensors.*returns 4"):
        evo_levit_loss(logits[:1], target)


@torch.no_grad()
def test_state_dicts(tmp_path):
    model, published = against_the_oracle()
    x = images(model)
    official = published.state_dict()
    assert {key for key in official if not key.startswith("stage_blocks.")} == set(model.state_dict())
    torch.save({"model": official, "epoch": 299}, tmp_path / "official.pth")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    for file in ("official.pth", "own.pth"):
        assert torch.equal(load_checkpoint(tiny(), tmp_path / file)(x), model(x))
    slim = tiny()
    slim.head_cls = slim.head_cls_dist = None
    assert torch.equal(load_checkpoint(slim, tmp_path / "official.pth")(x), model(x))
    official.pop("blocks.2.m1.m.learn_tradeoff")
    with pytest.raises(RuntimeError, match="Missing key.*blocks.2.m1.m.learn_tradeoff"):
        tiny().load_state_dict(official)


@pytest.mark.parametrize(
    "size", [size if size in ("128s", "256") else pytest.param(size, marks=pytest.mark.slow) for size in COSTS]
)
def test_costs_are_the_published_ones(size):
    parameters, *costs = COSTS[size]
    model, large = (meta(f"evo_levit_{size}{end}").eval() for end in ("", "_img384"))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head_cls"))
    assert count / 1e6 == pytest.approx(parameters, abs=0.005)
    dense, large_dense = (meta(f"evo_levit_{size}{end}", keeping_ratio=1.0).eval() for end in ("", "_img384"))
    assert [gmacs(m) for m in (model, dense, large, large_dense)] == pytest.approx(costs, abs=6e-4)
    config = {key: models.LEVIT[size][key] for key in ("embed_dim", "key_dim", "num_heads", "depth")}
    with torch.device("meta"):
        official = PublishedEvoLeViT(**config).state_dict()
    model.load_state_dict(official)
    assert size == "128s" or len(official) == 782
    pruned = [(s.end - s.pruned, s.keep) for s in model.stages]
    assert pruned == ([(0, 98), (3, 24), (4, 8)] if size == "128s" else [(2, 98), (4, 24), (4, 8)])
    assert [s.keep for s in large.stages] == [288, 72, 18]


def test_scores_are_computed_only_where_a_choice_depends_on_them(monkeypatch):
    from tokenops.methods import levit_layers

    asked = []
    attention = levit_layers.masked_channel_attention

    def spy(q, k, v, **kwargs):
        asked.append(kwargs.get("scores") == "class")
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(levit_layers, "masked_channel_attention", spy)
    expected = {True: 8 * [True] + 2 * [False], False: 9 * [True] + [False]}
    for stage_wise in (True, False):
        model = tiny(stage_wise=stage_wise)
        asked.clear()
        model(images(model))
        assert asked == expected[stage_wise]
    model = tiny(keeping_ratio=1.0)
    asked.clear()
    model(images(model))
    assert asked == 10 * [False]


@MODES
@torch.no_grad()
def test_for_inference_changes_no_output(stage_wise):
    model = tiny(stage_wise=stage_wise)
    x = images(model)
    before = model(x)
    close(model.fuse()(x), before)
    assert model.for_inference() is model
    close(model(x), before)
    assert not any("bn" in key or "head_" in key for key in model.state_dict())
    close(model.for_inference()(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_a_break(training):
    model = tiny(depth=(3, 1, 1)).train(training)
    x = images(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [compiled(x), model(x)]
    for mine, expected in zip(*(result if training else (result,) for result in results), strict=True):
        close(mine, expected)
        mine.sum().backward(retain_graph=True)


@pytest.mark.usefixtures("on_device")
@torch.no_grad()
def test_patches_keep_their_places_in_bfloat16(device):
    """Places that travel as bfloat16 get lost among 576 patches: where branches add nothing, order is all there is."""
    sizes = dict(embed_dim=(16, 16), key_dim=8, num_heads=(2, 2), depth=(3, 1), img_size=(384, 384), num_classes=2)
    x = torch.randn(1, 3, 384, 384)

    def after_the_first_stage(model, x):
        seen = []
        model.blocks[3].kv.c.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(x)
        return seen[0][:, 1:]

    model = EvoLeViT(**sizes).eval()
    model.blocks[3].poss.zero_()
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(after_the_first_stage(model, x), model.embed(x)[:, 1:])
    model.bfloat16()
    assert torch.equal(after_the_first_stage(model, x.bfloat16()), model.embed(x.bfloat16())[:, 1:])
    assert [m.sum().item() for m in model.kept_maps(x.bfloat16())] == [288, 72]
    for places, kept in ((torch.int64, True), (torch.bfloat16, False)):
        published = PublishedEvoLeViT(**sizes, places=places).eval()
        published.load_state_dict(model.state_dict(), strict=False)
        tokens = published.patch_embed(x).flatten(2).transpose(1, 2) + published.poss[:, 1:]
        assert torch.equal(after_the_first_stage(published, x), tokens) == kept


@pytest.mark.usefixtures("on_device")
@torch.no_grad()
def test_autocast_stays_close(device):
    model = tiny(img_size=(192, 192)).for_inference()
    x = images(model, 2)
    expected = model(x)
    with torch.autocast(device, torch.bfloat16):
        found = model(x)
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.usefixtures("on_device")
@MODES
@torch.no_grad()
def test_kept_maps(stage_wise):
    model, published = against_the_oracle(stage_wise)
    x = images(model)
    maps = model.kept_maps(x)
    grids = {True: [(5, 6), (3, 3), (2, 2)], False: 2 * [(5, 6)] + 2 * [(3, 3)] + 2 * [(2, 2)]}[stage_wise]
    assert [tuple(m.shape[1:]) for m in maps] == grids
    kept = {(5, 6): 15, (3, 3): 4, (2, 2): 2}
    for m in maps:
        assert m.dtype == torch.bool and (m.sum((1, 2)) == kept[tuple(m.shape[1:])]).all()
    # the oracle's first choice, by the places that travel with the tokens
    places = []
    after = published.stage_blocks[4] if stage_wise else published.blocks[2]
    after.register_forward_hook(lambda module, inputs, output: places.append(inputs[1].places))
    published(x)
    chosen = torch.zeros(3, 30, dtype=torch.bool).scatter(1, places[0][:, :15], True)
    assert torch.equal(maps[0].flatten(1), chosen)
    assert tiny(keeping_ratio=1.0).kept_maps(x) == []


@torch.no_grad()
def test_features():
    model = tiny()
    x = images(model)
    last, features = model.forward_intermediates(x)
    assert [tuple(f.shape) for f in features] == [(3, 32, 5, 6), (3, 48, 3, 3), (3, 64, 2, 2)]
    assert torch.equal(last, model.forward_features(x))
    close(model.forward_head(last), model(x))
    assert torch.equal(model.forward_head(last, pre_logits=True), last[:, 1:].mean(1))
    tokens, prefix = model.forward_intermediates(
        x, indices=[1], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )[0]
    close(tokens.transpose(1, 2).unflatten(2, (3, 3)), features[1])
    assert prefix.shape == (3, 1, 48)
    backbone = timm.create_model("evo_levit_128", features_only=True, out_indices=(0, 1), **TINY).eval()
    assert [tuple(f.shape) for f in backbone(x)] == [(3, 32, 5, 6), (3, 48, 3, 3)]
    assert backbone.feature_info.channels() == [32, 48] and backbone.feature_info.reduction() == [16, 32]


def test_timm_conventions():
    model = tiny()
    x = images(model)
    model.reset_classifier(3)
    assert model(x).shape == (3, 3) and [tuple(y.shape) for y in model.train()(x)] == 4 * [(3, 3)]
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(0)
    assert model(x).shape == model.eval()(x).shape == (3, 64)
    assert model.no_weight_decay() == {"poss", "blocks.4.poss", "blocks.8.poss"}
    assert timm.create_model("evo_levit_128s", in_chans=1, num_classes=0).default_cfg["num_classes"] == 1000


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(img_size=100), r"img_size=\(100, 100\).*multiples of the patch size 16"),
        (dict(depth=(4, 4)), r"depth=\(4, 4\) has 2 stages, but embed_dim has 3"),
        (dict(num_heads=(4, 4)), "num_heads=.* has 2 stages"),
        (dict(keeping_ratio=(0.5, 0.5)), "keeping_ratio=.* has 2 stages"),
        (dict(depth=(4, 0, 4)), r"depth=\(4, 0, 4\).*at least one layer"),
        (dict(keeping_ratio=1.5), "keeping_ratio=1.5.*above 0 and at most 1"),
        (dict(keeping_ratio=(0.5, 0.0, 0.5)), "keeping_ratio=.*above 0"),
        (dict(keeping_ratio=float("nan")), "keeping_ratio=nan"),
        (dict(dense_layers=-1), "dense_layers=-1.*at least 0"),
        (dict(dense_layers=0), "dense_layers=0.*at least 1"),
        (dict(key_dim=64), r"embed_dim=\(32, 48, 64\).*at least key_dim=64"),
    ],
)
def test_bad_arguments_say_what_is_allowed(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EvoLeViT(**{**TINY, **kwargs})


def test_bad_images_and_options_say_what_is_allowed():
    model = tiny()
    with pytest.raises(ValueError, match=r"\(B, 3, 80, 96\), but got \(1, 3, 96, 80\)"):
        model(torch.randn(1, 3, 96, 80))
    with pytest.raises(ValueError, match="global_pool='max'.*'avg'"):
        model.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="output_fmt='NHWC'.*'NLC'"):
        model.forward_intermediates(torch.randn(1, 3, 80, 96), output_fmt="NHWC")
    with pytest.raises(ValueError, match="enable=True.*no checkpointing"):
        model.set_grad_checkpointing()
