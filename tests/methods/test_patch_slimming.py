"""PS-ViT and DPS-ViT compute what masks would, cost what the formula says, and are models like those they came from."""

import copy

import pytest
import timm
import torch
from torch import nn

from support.models import close, flops, masks_of
from support.weights import spread
from tokenops import apply_patch, remove_patch, trace
from tokenops.methods import init_from_teacher, lv_vit
from tokenops.methods.patch_slimming import (
    Schedule,
    TokenScorer,
    blocks,
    impact_scores,
    published_counts,
    ranking_loss,
    scored,
)
from tokenops.nn import Attention, convert_attention
from tokenops.ops.masked_channel_attention import faster

DEIT = dict(img_size=64, embed_dim=48, num_heads=3, depth=4, num_classes=5)
GRID, COUNTS = (4, 4), (14, 14, 6, 1)
#: every kind of model: the published ones, what timm's blocks can have besides, and our attention with its masks
KINDS = {
    "deit": lambda: timm.create_model("deit_tiny_patch16_224", **DEIT),
    "layerscale, qk_norm, gate": lambda: gated(
        timm.create_model("vit_tiny_patch16_224", init_values=0.5, no_embed_class=True, pre_norm=True, **DEIT)
    ),
    "lvvit": lambda: lv_vit(mlp_ratio=3.0, qkv_bias=False, skip_lam=2.0, **DEIT),
    "channel masks": lambda: masked(timm.create_model("deit_tiny_patch16_224", **DEIT)),
}


def gated(model):
    for block in model.blocks:
        block.attn = Attention(48, 3, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm)
    return model


def masked(model):
    convert_attention(model)
    for block in model.blocks:
        block.attn.qk_mask, block.attn.v_mask = torch.rand(2, 3, 16).unbind(0)
    return model


def dense(kind="deit"):
    return spread(KINDS[kind]()).eval()


def apply(model, schedule):
    """A slim copy."""
    return apply_patch(copy.deepcopy(model), "patch_slimming", schedule=schedule)


def apply_dynamic(model, counts, after=2):
    return apply_patch(copy.deepcopy(model), "dps", counts=counts, after=after)


def scorer(model):
    return next(module for module in model.modules() if isinstance(module, TokenScorer))


def order_of(slim, x):
    """The patches of every image by their scores."""
    return scored(slim, x)[1].argsort(dim=1, descending=True, stable=True)


def counts_of(slim):
    return [step.tokens for step in trace(slim, images()).steps]


def schedule(counts=COUNTS):
    return Schedule.from_counts(counts, GRID, torch.randperm(16).tolist())


def images(batch=2):
    return torch.randn(batch, 3, 64, 64)


def literal(model, x, masks):
    """Patch Slimming by masks (L, B, 1+N) on all tokens: dead rows are zeros, dead keys have no weight."""
    x = blocks.embed_tokens(model, x)
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    for block, mask in zip(model.blocks, masks, strict=True):
        attention = Attention.from_timm(block.attn)
        bias = torch.zeros(x.shape[:2]).masked_fill(~alive, float("-inf"))[:, None, None]
        a = attention(block.norm1(x), key_bias=bias.expand(-1, attention.num_heads, -1, -1))
        x = x + block.ls1(a)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        x = x * mask.unsqueeze(2)
        alive = mask
    return model.forward_head(model.norm(x))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_out", [1, 7, 16, 17])
@torch.no_grad()
def test_surviving_rows_are_the_whole_block_s(kind, n_out):
    model = dense(kind).double()
    block, x = model.blocks[1], torch.randn(2, 17, 48, dtype=torch.float64)
    torch.testing.assert_close(blocks.slim_block(block, x, n_out), block(x)[:, :n_out], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_static_model_is_the_literal_masked_one(kind):
    model, x = dense(kind), images()
    plan = schedule()
    slim = apply(model, plan)
    close(slim(x), literal(model, x, masks_of(torch.tensor(plan.order).expand(2, -1), COUNTS)))
    assert not torch.allclose(slim(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dynamic_model_is_the_literal_masked_one(kind):
    model, x = dense(kind), images(3)
    counts = (17, 17, 6, 1)
    slim = apply_dynamic(model, counts, after=2)
    spread(scorer(slim))
    order = order_of(slim, x)
    assert len(order.unique(dim=0)) == 3 and torch.equal(order.sort().values, torch.arange(16).expand(3, -1))
    close(slim(x), literal(model, x, masks_of(order, counts)))


@pytest.mark.usefixtures("on_device")
@torch.no_grad()
def test_nothing_dropped_is_the_dense_model(ran_kernels, chosen):
    model, x = dense(), images()
    with ran_kernels() as names:
        assert torch.equal(apply(model, Schedule.from_counts((17,) * 4, GRID, range(16)))(x), model(x))
    assert not names
    close(apply_dynamic(model, (17,) * 4)(x), model(x))
    with ran_kernels() as names:
        apply(model, schedule())(x)
    ours = ["masked_channel_attention_fwd"] * (faster(x) > 0)  # else torch's own attention is not slower
    assert names == chosen(*ours)


def test_no_gather_but_the_first():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.extend([str(func)] if "index" in str(func) or "gather" in str(func) else [])
            return func(*args, **(kwargs or {}))

    found = []
    with Gathers(), torch.no_grad():
        apply(dense(), schedule((16, 12, 6, 1)))(images())
    assert found == ["aten.index_select.default"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: impact_scores(dense(), images(), 5, COUNTS), ValueError, "layer=5, but it must be 1 to 4"),
        (lambda: impact_scores(dense(), images(), 2, (17, 1)), ValueError, "counts has 2 layers, but the model has 4"),
        (
            lambda: ranking_loss(torch.zeros(2, 3), torch.zeros(3)),
            ValueError,
            r"be \(B, N\), but got \(2, 3\) and \(3,\)",
        ),
        (lambda: apply(dense(), Schedule.from_counts(COUNTS, (2, 8))), ValueError, "2 x 8 patches, .* 4 x 4"),
        (lambda: apply_patch(dense(), "patch_slimming"), TypeError, "needs a schedule"),
        (lambda: impact_scores(nn.Linear(2, 2), images(), 2, COUNTS), TypeError, "but got Linear"),
        (lambda: impact_scores(of(reg_tokens=2), images(), 2, COUNTS), ValueError, "model has 3 such tokens"),
        (lambda: impact_scores(of(class_token=False, global_pool="avg"), images(), 2, COUNTS), ValueError, "0 such"),
        (lambda: impact_scores(of(global_pool="avg"), images(), 2, COUNTS), ValueError, "global_pool='avg'"),
        (lambda: impact_scores(apply(dense(), schedule()), images(), 2, COUNTS), TypeError, "must be a dense"),
        (lambda: apply_dynamic(dense(), (17, 17, 5)), ValueError, "counts has 3 layers, but the model has 4 blocks"),
        (lambda: apply_dynamic(dense(), (17, 16, 5, 1)), ValueError, "layer 2 16 tokens, but tokens are scored after"),
        (lambda: apply_dynamic(dense(), (17, 17, 5, 1), 4), ValueError, "after=4, but it must be 0 to 3"),
        (lambda: apply_dynamic(dense(), (17, 17, 5, 1), 1.0), TypeError, "after must be an int"),
        (lambda: apply_dynamic(dense(), (17, 17, 18, 1)), ValueError, "layer 3 18 tokens"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def of(name="deit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**DEIT, **kwargs})


#: the paper's; of DeiT-B what ours count, as it has no figure we trust
GMACS = {
    "ps_deit_tiny": 0.7,
    "ps_deit_small": 2.6,
    "ps_deit_base": 10.04,
    "ps_lvvit_small": 4.7,
    "dps_deit_tiny": 0.6,
    "dps_deit_small": 2.4,
    "dps_lvvit_small": 4.5,
}


@pytest.mark.parametrize("name", published_counts)
def test_published_costs(name):
    with torch.device("meta"):
        model = timm.create_model(name if "lvvit" in name else name + "_patch16_224").eval()
    method = model.tokenops_patch.method
    counts = method.counts if name.startswith("dps") else method.value.counts
    assert counts == published_counts[name]
    gmacs = flops(model, torch.empty(1, 3, 224, 224, device="meta")) / 2e9
    assert gmacs == pytest.approx(GMACS[name], rel=0.02)
    doc = timm.models.model_entrypoint(name if "lvvit" in name else name + "_patch16_224").__doc__
    assert float(doc.split(" GMAC")[0].split(" ")[-1]) == pytest.approx(gmacs, abs=0.0501 if "base" in name else 0.0051)


@pytest.mark.parametrize("size, gmacs, whole", [("tiny", 0.73, 1.25), ("small", 2.73, 4.60), ("base", 10.5, 17.6)])
def test_a_secondary_source_s_schedule(size, gmacs, whole):
    counts, x = (151, 151, 151, 141, 131, *[111] * 6, 1), torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224").eval()
    assert flops(model, x) / 2e9 == pytest.approx(whole, rel=0.005)
    slim = apply_patch(model, "patch_slimming", schedule=counts)
    assert flops(slim, x) / 2e9 == pytest.approx(gmacs, rel=0.005)


def by_name(name="ps_deit_tiny_patch16_224", **kwargs):
    return spread(timm.create_model(name, **DEIT, **kwargs)).eval()


def test_weights_go_in_and_out():
    model, x, plan = dense(), images(), schedule()
    slim = by_name(schedule=plan)
    assert set(slim.state_dict()) == {*model.state_dict(), "lifespan"}
    slim.load_state_dict(model.state_dict(), strict=True)
    assert slim.schedule == plan and torch.equal(slim(x), apply(model, plan)(x))
    fresh, state = by_name(schedule=schedule((17, 9, 9, 9))), slim.state_dict()
    fresh.load_state_dict(state, strict=True)  # brings its schedule
    assert fresh.schedule == plan and torch.equal(fresh(x), slim(x))
    fresh.schedule = other = schedule((17, 9, 9, 9))
    assert fresh.state_dict()["lifespan"].tolist() == other.lifespan and not torch.equal(fresh(x), slim(x))
    with torch.device("meta"):
        empty = timm.create_model("ps_deit_tiny_patch16_224", schedule=plan, **DEIT)
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty.eval()(x), slim(x))
    for wrong, message in ((torch.zeros(9).long(), "size mismatch|must be 16"), (torch.full((16,), 9), "0 to 4")):
        with pytest.raises(RuntimeError, match=message):
            slim.load_state_dict({**state, "lifespan": wrong})


def test_slimming_again_and_the_other_way():
    model, x = dense(), images()
    slim, plan = apply(model, schedule()), schedule((16, 8, 8, 1))
    slim.schedule = plan
    assert torch.equal(slim(x), apply(model, plan)(x)) and counts_of(slim) == [16, 8, 1]
    dynamic = apply_dynamic(remove_patch(slim), (17, 17, 6, 1))
    assert scorer(dynamic).norm.weight.shape == (48,)
    assert set(remove_patch(dynamic).state_dict()) == set(model.state_dict()) and torch.equal(dynamic(x), model(x))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", ["deit", "lvvit"])
@torch.no_grad()
def test_traces_and_layers(kind):
    x = images(3)
    model, plan = dense(kind), schedule()
    static, dynamic = apply(model, plan), apply_dynamic(model, (17, 17, 6, 6))
    spread(scorer(dynamic))
    steps = trace(static, x).steps
    assert [(step.block, step.tokens) for step in steps] == [(0, 14), (2, 6), (3, 1)]
    for step in steps:
        assert (step.sources[1] >= 0).nonzero().flatten().tolist() == list(plan.masks[step.block])
    (step,) = trace(dynamic, x).steps
    logits, scores = scored(dynamic, x)
    assert torch.equal(logits, dynamic(x)) and scores.shape == (3, 16) and (step.block, step.tokens) == (2, 6)
    places = torch.stack([(sources == i).nonzero()[:, 0] for sources in step.sources for i in range(5)]).view(3, 5)
    assert torch.equal(places, scores.topk(5).indices)
    # what the first layer keeps is what the dense model has there
    tokens = static.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert [layer.shape for layer in tokens] == [(3, n - 1, 48) for n in COUNTS]
    first = model.blocks[0](blocks.embed_tokens(model, x))[:, 1:]
    close(tokens[0], first[:, plan.order[:13]])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("kind", ["deit", "lvvit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_parameter(kind, checkpointing):
    model, x, y = apply(dense(kind), schedule()).train(), images(8), torch.arange(8) % 5
    model.set_grad_checkpointing(checkpointing)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_dropping_acts_in_training_only():
    x = images()
    dropping = apply(of(attn_drop_rate=0.9, drop_path_rate=0.9), schedule())
    assert not torch.equal(dropping.train()(x), dropping(x))
    assert torch.equal(dropping.eval()(x), dropping(x))


def test_names_for_timm(tmp_path):
    plan = schedule()
    plan.save(tmp_path / "plan.json")
    slim = timm.create_model("ps_deit_tiny_patch16_224", schedule=str(tmp_path / "plan.json"), **DEIT).eval()
    assert slim.schedule == plan and isinstance(slim, timm.models.VisionTransformer)
    x = images()
    other = by_name(schedule=schedule((13, 9, 5, 1)))
    torch.save(other.state_dict(), tmp_path / "slim.pth")
    kwargs = dict(DEIT, schedule=plan, checkpoint_path=str(tmp_path / "slim.pth"))
    loaded = timm.create_model("ps_deit_tiny_patch16_224", **kwargs).eval()
    assert loaded.schedule.counts == (13, 9, 5, 1)  # the checkpoint's
    assert torch.equal(loaded(x), other(x))
    small = dict(img_size=64, embed_dim=48, num_heads=3, depth=4)
    assert timm.create_model("ps_lvvit_small", schedule=plan, **small).blocks[0].ls1.factor == 0.5
    with pytest.raises(ValueError, match="schedule has 12 layers, but the model has 4"):
        timm.create_model("ps_deit_tiny_patch16_224", **DEIT)


def test_a_schedule_goes_with_its_patch():
    """Weights of the dense model start it, and without its patch it is that model."""
    sizes = dict(embed_dim=32, num_heads=2, num_classes=3)
    dense = timm.create_model("deit_tiny_patch16_224", **sizes)
    slim = init_from_teacher(timm.create_model("ps_deit_tiny_patch16_224", **sizes), dense)
    assert "lifespan" in slim.state_dict()
    remove_patch(slim)
    assert slim.state_dict().keys() == dense.state_dict().keys()
    slim.load_state_dict(slim.state_dict())
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(slim.eval()(x), dense.eval()(x))
    apply_patch(slim, "tome", r=4).load_state_dict(dense.state_dict())
