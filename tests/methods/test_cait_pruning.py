"""What is pruned: the choice within a budget, costs, Taylor scores, regrowth, one choice in all processes."""

import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.cait_pruning import SIZES, SMALL, batch, learn, model_of
from tokenops import apply_patch
from tokenops.methods.cait.blocks import prunable
from tokenops.methods.cait.compact import compact
from tokenops.methods.cait.compactors import (
    CompactorPruner,
)
from tokenops.methods.cait.costs import ChannelCosts, choose_channels, cubic_keep, latency_costs, mac_costs
from tokenops.methods.cait.pruning import ChannelPruner, parameters_to_train
from tokenops.methods.cait.structure import macs


def score_by(pruner, values):
    """Give every mask the gradient whose square is its score in ``values``: one tensor, or a number, a layer."""
    for layer, value in zip(pruner.layers, values):
        layer.mask.grad = torch.as_tensor(value).float().sqrt().expand(layer.mask.shape).clone()


def masks_of(model):
    return {name: value for name, value in model.state_dict().items() if name.endswith("mask")}


# the choice


@pytest.mark.parametrize(
    "scores, costs, multiples, budget, expected",
    [
        # one head: the least goes, then the next
        ([[[1, 4, 2, 3]]], [1], [1], 4, [[[1, 1, 1, 1]]]),
        ([[[1, 4, 2, 3]]], [1], [1], 3, [[[0, 1, 1, 1]]]),
        ([[[1, 4, 2, 3]]], [1], [1], 1, [[[0, 1, 0, 0]]]),
        # between two units' sums the budget is undercut, by less than a unit
        ([[[1, 4, 2, 3]]], [1], [1], 2.5, [[[0, 1, 0, 1]]]),
        # two heads keep as many channels, each its own: groups of the best (4 + 8), second (3 + 7) and third (0 + 1)
        ([[[0, 4, 3], [8, 1, 7]]], [1], [1], 4, [[[0, 1, 1], [1, 0, 1]]]),
        # by fours in twos: units {6, 5} and {4, 1}
        ([[[4, 6, 5, 1]]], [1], [2], 3, [[[0, 1, 1, 0]]]),
        # what is left over of 5 is a unit of its own
        ([[[5, 4, 3, 2, 1]]], [1], [2], 4, [[[1, 1, 1, 1, 0]]]),
        # jointly: the same score for twice the cost goes first
        ([[[5, 2]], [[5, 2]]], [2, 1], [1, 1], 5, [[[1, 0]], [[1, 1]]]),
        # by score over cost, not by score: 3/4 goes before 1/1
        ([[[9, 3]], [[9, 1]]], [4, 1], [1, 1], 6, [[[1, 0]], [[1, 1]]]),
        # a layer of nothing but zeros keeps its first unit
        ([[[0, 0]], [[3, 2]]], [1, 1], [1, 1], 2, [[[1, 0]], [[1, 0]]]),
        # two heads cost twice what one does: 4 channels against 2 of the same mean score
        ([[[2, 1], [2, 1]], [[2, 1.5]]], [1, 1], [1, 1], 4, [[[1, 0], [1, 0]], [[1, 1]]]),
    ],
)
def test_choice(scores, costs, multiples, budget, expected):
    kept = choose_channels([torch.tensor(score).float() for score in scores], costs, multiples, budget)
    assert [mask.int().tolist() for mask in kept] == expected


def test_choice_without_costs_and_of_the_same_channels():
    scores = [torch.tensor([[9.0, 3.0]]), torch.tensor([[9.0, 1.0]])]
    kept = choose_channels(scores, [4, 1], [1, 1], 9, per_cost=False)
    assert [mask.tolist() for mask in kept] == [[[True, True]], [[True, False]]]
    score = torch.tensor([[5.0, 1.0, 4.0], [0.0, 6.0, 3.0]])
    assert choose_channels([score], [1], [1], 4)[0].int().tolist() == [[1, 0, 1], [0, 1, 1]]
    assert choose_channels([score], [1], [1], 4, same_channels=True)[0].int().tolist() == [[0, 1, 1], [0, 1, 1]]


def test_choice_meets_every_budget_within_one_unit():
    scores = [torch.rand(3, 10), torch.rand(1, 17), torch.rand(2, 8) * 5]
    costs, multiples = [7.0, 2.0, 11.0], [4, 3, 2]
    largest = max(len(s) * m * c for s, m, c in zip(scores, multiples, costs))
    before = None
    for budget in range(sum(int(s.numel() * c) for s, c in zip(scores, costs)), 150, -7):
        kept = choose_channels(scores, costs, multiples, budget)
        cost = sum(float(mask.sum()) * c for mask, c in zip(kept, costs))
        assert budget - largest < cost <= budget
        for mask, score, multiple in zip(kept, scores, multiples):
            count = mask.sum(1).unique()
            assert len(count) == 1 and count >= 1 and (count % multiple == 0 or count == mask.shape[1])
            assert (score.masked_fill(~mask, math.inf).amin(1) >= score.masked_fill(mask, -1).amax(1)).all()
        if before is not None:  # a smaller budget only takes away
            assert all((later <= earlier).all() for later, earlier in zip(kept, before))
        before = kept
    with pytest.raises(ValueError, match="more than budget=100"):
        choose_channels(scores, costs, multiples, 100)


def test_cubic_schedule():
    assert [cubic_keep(t, 10, 20, 0.2) for t in (0, 10)] == [1.0, 1.0]
    assert cubic_keep(15, 10, 20, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    assert cubic_keep(12, 10, 20, 0.2) == pytest.approx(0.2 + 0.8 * 0.512)
    assert [cubic_keep(t, 10, 20, 0.2) for t in (20, 99)] == [0.2, 0.2]


# costs


def test_mac_costs_are_by_tokens():
    costs = mac_costs(model_of())
    # 16 patches and a class token, 8 and one, 4 and one; before fc2 they are merged already
    assert costs.qk == costs.v == tuple(2 * n * 32 + n * n for n in (17, 9, 5))
    assert costs.hidden == tuple((n + m) * 32 for n, m in ((17, 9), (9, 5), (5, 5)))
    model = prunable(apply_patch(timm.create_model("deit_small_patch16_224"), "cait"))
    published = [round(c / 1000) for c in mac_costs(model).qk[3::4]]
    assert published == [190, 86, 41]


@pytest.mark.parametrize("kind", ["deit", "lvvit"])
def test_cost_is_that_of_the_compact_model(kind):
    model = model_of(kind)
    pruner = ChannelPruner(model, 0.7, steps=(0, 1), every=1, multiples=SMALL)
    assert pruner.costs.total == macs(model) == pruner.cost
    score_by(pruner, [torch.rand_like(layer.mask) for layer in pruner.layers])
    assert pruner.step()
    small = compact(model)
    assert macs(small) == pruner.cost <= pruner.budget < pruner.costs.total
    rows = pruner.report()
    assert sum(row.dense_cost - row.cost for row in rows) == pruner.costs.total - pruner.cost
    for row, block in zip(rows, small.blocks):
        assert row[1:4] == (block.attn.head_dim, block.attn.v_head_dim, block.mlp.fc1.out_features)


def test_latency_costs():
    model = model_of(embed_dim=64, depth=2)
    model.train().norm.eval()
    costs = latency_costs(model, batch_size=2, seconds=0.01)
    assert model.training and model.blocks.training and not model.norm.training
    each = [*costs.qk, *costs.v, *costs.hidden]
    assert len(each) == 6 and min(each) > 0 and costs.unit == "us a batch of 2"
    # the channels cost no more than the model they are in, which takes some 0.1 ms to 1 s
    channels = sum(2 * 32 * (q + v) + 256 * h for q, v, h in zip(costs.qk, costs.v, costs.hidden))
    assert 50 < costs.total < 1e6 and channels <= 1.001 * costs.total
    fixed = ChannelCosts((4.0, 2.0), (4.0, 2.0), (1.0, 1.0), 2000.0, "us")
    pruner = ChannelPruner(model, 1500.0, steps=(0, 1), every=1, costs=fixed)
    score_by(pruner, [1.0] * 6)
    pruner.step()
    assert pruner.budget == 1500 and 1500 - 2 * 16 * 4 < pruner.cost <= 1500


# Taylor scores


@pytest.mark.parametrize("kind", ["deit", "lvvit"])
def test_mask_gradients_are_those_of_finite_differences(kind):
    model = model_of(kind).double().eval()
    x, y = batch()
    pruner = ChannelPruner(model, 0.7, steps=(0, 9), multiples=SMALL)
    masks = [layer.mask for layer in pruner.layers]
    with torch.no_grad():
        for mask in masks:
            mask.data = (torch.rand_like(mask, dtype=torch.float64) > 0.4).double()

    def loss():
        return nn.functional.cross_entropy(model(x.double()), y)

    loss().backward()
    for mask in masks:
        flat, gradient = mask.data.flatten(), mask.grad.flatten()
        assert (gradient != 0).all()  # where the mask is 0 too
        for value in (0.0, 1.0):
            i = int((flat == value).nonzero()[0])
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    mask.view(-1)[i] = value + step
                    ends.append(loss().item())
                    mask.view(-1)[i] = value
            torch.testing.assert_close(gradient[i].item(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-9)


def test_scores_are_running_means_of_squares():
    pruner = ChannelPruner(model_of(), 0.7, steps=(0, 9), multiples=SMALL, beta=0.75)
    gradients = [torch.randn(len(pruner.scores)) for _ in range(3)]
    expected = torch.zeros_like(pruner.scores)
    for gradient in gradients:
        expected = 0.75 * expected + 0.25 * gradient**2
        for layer, part in zip(pruner.layers, pruner._parts(gradient)):
            layer.mask.grad = part.reshape(layer.mask.shape)
        pruner.step()
        assert all(layer.mask.grad is None for layer in pruner.layers)
    torch.testing.assert_close(pruner.scores, expected)
    score_by(pruner, [math.inf] + [1.0] * 8)  # what a gradient scaler skips
    pruner.step()
    torch.testing.assert_close(pruner.scores, expected)
    with pytest.raises(RuntimeError, match="behind loss.backward"):
        pruner.step()


def test_pruned_channels_return():
    model = model_of(merges=None)
    costs = mac_costs(model)
    target = costs.total - sum(2 * 8 * cost for cost in costs.qk)
    pruner = ChannelPruner(model, target, steps=(0, 4), every=1, multiples=SMALL, beta=0.0)
    low = torch.arange(16) < 8
    for best in (~low, low):
        for _ in range(2):
            score_by(pruner, [best if layer.kind == "qk" else torch.tensor(100.0) for layer in pruner.layers])
            assert pruner.step()
        for block in model.blocks:
            mask = block.attn.qk_mask
            assert (mask[:, best] == 1).all() and (mask[:, ~best] == 0).all()
    assert pruner.frozen


def test_regrowth_while_training():
    """Masked channels are scored by the loss: those that would help it come back."""
    model, (x, y) = model_of(), batch(size=8)
    pruner = ChannelPruner(model, 0.8, steps=(0, 40), every=4, multiples=dict(qk=1, v=1, hidden=1), beta=0.5)
    optimizer, seen, returned = torch.optim.AdamW(parameters_to_train(model), lr=3e-3), None, 0
    for _ in range(40):
        if learn(model, pruner, optimizer, x, y):
            now = torch.cat([kept.flatten() for kept in pruner.kept])
            returned += 0 if seen is None else int((now & ~seen).sum())
            seen = now
    assert returned > 0 and pruner.frozen and pruner.cost <= pruner.budget


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("kind", ["deit", "lvvit"])
def test_heads_and_kinds_stay_consistent(kind, same):
    model, (x, y) = model_of(kind, num_heads=4, embed_dim=64), batch()
    target = 0.7 if kind == "lvvit" else 0.45  # convolutions are not pruned
    pruner = ChannelPruner(model, target, steps=(1, 6), every=2, multiples=SMALL, same_channels=same)
    optimizer = torch.optim.SGD(parameters_to_train(model), lr=0.01)
    for _ in range(6):
        learn(model, pruner, optimizer, x, y)
    largest = max(layer.heads * layer.multiple * layer.cost for layer in pruner.layers)
    assert pruner.frozen and pruner.budget - largest < pruner.cost <= pruner.budget == target * macs(model)
    free = 0
    for block in model.blocks:
        attn = block.attn
        # one mask is all there is for q and k, so they cannot differ
        assert set(dict(attn.named_parameters(recurse=False))) == {"qk_mask", "v_mask"}
        for mask, multiple in ((attn.qk_mask, 4), (attn.v_mask, 2), (block.mlp.mask.unsqueeze(0), 16)):
            count = mask.sum(1).unique()
            assert ((mask == 0) | (mask == 1)).all() and len(count) == 1
            assert count >= multiple and count % multiple == 0
            free += int((mask != mask[0]).any())
    assert (free == 0) == same


def test_every_kind_keeps_a_unit():
    model = model_of()
    pruner = ChannelPruner(model, 1.0, steps=(0, 1), every=1, multiples=SMALL)
    fixed = macs(model) - sum(layer.heads * layer.width * layer.cost for layer in pruner.layers)
    least = fixed + sum(layer.heads * layer.multiple * layer.cost for layer in pruner.layers)
    pruner = ChannelPruner(model_of(), least, steps=(0, 1), every=1, multiples=SMALL)
    score_by(pruner, [0.0] * 3 + [1.0] * 6)
    pruner.step()
    assert pruner.cost == least
    assert [row[1:4] for row in pruner.report()] == [(4, 2, 16)] * 3
    with pytest.raises(ValueError, match="with one unit of each kind in every block the model still costs"):
        ChannelPruner(model_of(), least - 1, steps=(0, 1), multiples=SMALL)


def test_useless_channels_are_found():
    model, (x, y) = model_of(merges=None), batch(size=8)
    useless = {}
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            qk, v, hidden = torch.randperm(16)[:8], torch.randperm(16)[:8], torch.randperm(128)[:64]
            weight, bias = block.attn.qkv.weight.unflatten(0, (3, 2, 16)), block.attn.qkv.bias.unflatten(0, (3, 2, 16))
            weight[:2, :, qk] = bias[:2, :, qk] = 0  # q and k, so that no gradient revives them
            weight[2, :, v] = bias[2, :, v] = 0
            block.attn.proj.weight.unflatten(1, (2, 16))[:, :, v] = 0
            block.mlp.fc1.weight[hidden] = block.mlp.fc1.bias[hidden] = 0
            block.mlp.fc2.weight[:, hidden] = 0
            useless[i] = dict(qk=qk, v=v, hidden=hidden)
    before = nn.functional.cross_entropy(model(x), y).item()
    gone = mac_costs(model)
    target = gone.total - sum(2 * 8 * (q + v) + 64 * h for q, v, h in zip(gone.qk, gone.v, gone.hidden))
    pruner = ChannelPruner(model, target, steps=(1, 6), every=1, multiples=SMALL)
    optimizer = torch.optim.SGD(parameters_to_train(model), lr=1e-2)
    for _ in range(6):
        learn(model, pruner, optimizer, x, y)
    assert pruner.cost == target
    for layer, kept in zip(pruner.layers, pruner.kept):
        expected = torch.ones(layer.heads, layer.width, dtype=torch.bool)
        expected[:, useless[layer.block][layer.kind]] = False
        assert torch.equal(kept, expected), (layer.block, layer.kind)
    assert nn.functional.cross_entropy(model(x), y).item() < before  # it has learned, and lost nothing


@pytest.mark.parametrize("make", [ChannelPruner, CompactorPruner])
@pytest.mark.parametrize("stop", [3, 9])
def test_training_resumes(make, stop):
    options = dict(target=0.7, steps=(1, 8), every=2, multiples=SMALL)
    groups = {}

    def fresh():
        model = model_of().eval()
        pruner = make(model, **options)
        parameters = [*parameters_to_train(model), *getattr(pruner, "parameters", list)()]
        return model, pruner, torch.optim.SGD(parameters, lr=0.05)

    def run(model, pruner, optimizer, steps):
        for step in steps:
            learn(model, pruner, optimizer, *batch(step))

    torch.manual_seed(1)
    model, pruner, optimizer = fresh()
    start = copy.deepcopy(model.state_dict())
    run(model, pruner, optimizer, range(10))
    groups["whole"] = model.state_dict()

    model, pruner, optimizer = fresh()
    model.load_state_dict(start)
    run(model, pruner, optimizer, range(stop))
    saved = copy.deepcopy((pruner.state_dict(), model.state_dict()))
    model, pruner, optimizer = fresh()
    pruner.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    run(model, pruner, optimizer, range(stop, 10))
    assert pruner.frozen and set(model.state_dict()) == set(groups["whole"])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, groups["whole"][name], rtol=1e-6, atol=1e-7)
    other = make(model_of(depth=2, merges=None), **options)
    with pytest.raises(ValueError, match=r"state is of \d+ channels, but this model has \d+"):
        other.load_state_dict(saved[0])


def test_masks_are_not_trained():
    model = model_of("lvvit")  # its auxiliary head is frozen
    names = {id(p): name for name, p in model.named_parameters()}
    ChannelPruner(model, 0.7, steps=(0, 9), multiples=SMALL)
    masks = [p for name, p in model.named_parameters() if name.endswith("mask")]
    assert len(masks) == len(masks_of(model)) == 9 and all(mask.requires_grad for mask in masks)
    assert {names[id(p)] for p in parameters_to_train(model)} == {n for n in names.values() if "aux" not in n}


def train_masks(rank, world, wrap):
    """One process of several, which sees its part of every batch: its scores and masks."""
    torch.manual_seed(3)
    model = model_of()
    pruner = ChannelPruner(model, 0.6, steps=(0, 6), every=2, multiples=SMALL)
    optimizer = torch.optim.SGD(parameters_to_train(model), lr=0.02)
    wrapped = DistributedDataParallel(model) if wrap else model
    for step in range(8):  # beyond the last step of the schedule, too
        x, y = (part.chunk(world)[rank] for part in batch(step, 8))
        loss = nn.functional.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        pruner.step()
        if wrap or world == 1:  # without the wrapper the processes' weights would drift apart
            optimizer.step()
    return pruner.scores, masks_of(model)


def one_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    torch.save([train_masks(rank, 2, wrap) for wrap in (True, False)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_choose_as_one(tmp_path):
    mp.spawn(one_process, (tmp_path,), nprocs=2)
    (first, first_bare), (second, second_bare) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    scores, masks = train_masks(0, 1, False)
    assert any(mask.min() == 0 for mask in masks.values())
    torch.testing.assert_close(first[0], scores, rtol=1e-3, atol=1e-9)
    for (one_scores, one), (other_scores, other) in (
        (first, second),
        (first_bare, second_bare),
        (first, (None, masks)),
    ):
        assert other_scores is None or torch.equal(one_scores, other_scores)
        assert all(torch.equal(mask, other[name]) for name, mask in one.items()) and len(one) == 9


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(model=timm.create_model("deit_tiny_patch16_224", **SIZES)), TypeError, "prunable"),
        (dict(model=nn.Linear(2, 2)), TypeError, "Linear has none"),
        (dict(target=0.0), ValueError, "target=0.0"),
        (dict(target=math.nan), ValueError, "target=nan"),
        (dict(target=0.01), ValueError, "still costs"),
        (dict(target=1000.0), ValueError, "1000 MACs"),
        (dict(steps=(3, 3)), ValueError, r"steps=\(3, 3\)"),
        (dict(steps=(-1, 3)), ValueError, r"steps=\(-1, 3\)"),
        (dict(every=0), ValueError, "every=0"),
        (dict(beta=1.0), ValueError, "beta=1.0"),
        (dict(multiples=dict(qk=0)), ValueError, "multiples={'qk': 0}"),
        (dict(multiples=dict(q=4)), ValueError, "multiples={'q': 4}"),
        (dict(kinds=("q",)), ValueError, r"kinds=\('q',\)"),
        (dict(kinds=()), ValueError, r"kinds=\(\)"),
        (dict(costs="flops"), ValueError, "costs='flops'"),
        (dict(costs=ChannelCosts((1.0,), (1.0,), (1.0,), 9.0, "s")), ValueError, "qk has 1 blocks, but the model 3"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        ChannelPruner(**{"model": model_of(), "target": 0.7, "steps": (0, 9), **kwargs})


def test_norms_over_channels_are_refused():
    model = prunable(timm.models.VisionTransformer(**SIZES, qk_norm=True))
    with pytest.raises(ValueError, match="block 0: q_norm is a norm over the qk channels"):
        ChannelPruner(model, 0.8, steps=(0, 9))
    assert not masks_of(model)
    pruner = ChannelPruner(model, 0.8, steps=(0, 1), every=1, multiples=SMALL, kinds=("v", "hidden"))
    score_by(pruner, [1.0] * 6)
    pruner.step()
    assert pruner.cost <= pruner.budget and {row.qk for row in pruner.report()} == {16}
    with pytest.raises(ValueError, match="has a mask of its v channels already"):
        ChannelPruner(model, 0.8, steps=(0, 9), kinds=("v",))
    for block in model.blocks:
        block.mlp.norm, block.mlp.mask = nn.LayerNorm(128), None
    with pytest.raises(ValueError, match="norm is a norm over the hidden channels"):
        ChannelPruner(model, 0.8, steps=(0, 9), kinds=("hidden",))


def test_other_mlps_stay_as_they_are():
    model = prunable(timm.models.VisionTransformer(**SIZES, mlp_layer=timm.layers.GluMlp)).eval()
    pruner, x = ChannelPruner(model, 0.9, steps=(0, 1), every=1, multiples=SMALL), batch()[0]
    assert [layer.kind for layer in pruner.layers] == ["qk", "v"] * 3
    score_by(pruner, [torch.rand(2, 16) for _ in range(6)])
    pruner.step()
    small = compact(model)
    assert macs(small) == pruner.cost <= pruner.budget and {row.hidden for row in pruner.report()} == {0}
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no such channels"):
        ChannelPruner(small, 0.9, steps=(0, 9), kinds=("hidden",))
