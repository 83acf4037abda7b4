"""The training loop: large batches, learning rates, averages and checkpoints are what their formulas say."""

import contextlib
import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

pytest.importorskip("accelerate")

from support.small_training import QUIET, Noisy, Small, images, state  # noqa: E402
from tokenops.training import (  # noqa: E402
    FeatureRecalibration,
    Plain,
    ShrinkingKeepRate,
    SlowFast,
    checkpoint,
    evaluate,
    fit,
    learning_rate,
    loop,
)
from tokenops.training.batches import Batches, Reproducible, TrainBatches  # noqa: E402


class Recorded(Plain):
    """Keeps the gradients of every update."""

    def before_step(self):
        found = [p.grad.clone() for p in self.model.parameters()]
        self.gradients = [*getattr(self, "gradients", []), found]
        return True


def test_accumulation_is_the_large_batch():
    data, runs = images(), []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        torch.manual_seed(1)
        objective = Recorded(Small())
        history = fit(objective, DataLoader(data, size), epochs=2, lr=1e-2, accumulation=accumulation, **QUIET)
        runs.append((objective, history))
    assert len(runs[0][0].gradients) == 6
    for objective, history in runs[1:]:
        for ours, theirs in zip(objective.gradients, runs[0][0].gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert history.rows[-1]["loss"] == pytest.approx(runs[0][1].rows[-1]["loss"], abs=1e-5)


def test_a_few_steps_by_hand():
    """AdamW, two groups, warm-up, cosine and clipping, written down."""
    data = images(12)
    torch.manual_seed(1)
    model = Small()
    by_hand = Small()
    by_hand.load_state_dict(model.state_dict())
    fit(
        Plain(model, smoothing=0.1),
        DataLoader(data, 4),
        epochs=2,
        lr=1e-2,
        weight_decay=0.1,
        warmup_epochs=1,
        min_lr=1e-3,
        clip=0.5,
        **QUIET,
    )
    matrices, vectors = ([p for p in by_hand.parameters() if (p.ndim > 1) is want] for want in (True, False))
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups)
    for step in range(6):
        x, y = (part[step % 3 * 4 :][:4] for part in data.tensors)
        F.cross_entropy(by_hand(x), y, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        done = (step + 1) / 3
        rate = 1e-2 * done if done < 1 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (done - 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(state(model), state(by_hand), rtol=1e-5, atol=1e-6)


def test_steps_end_an_epoch_where_they_are_done():
    """Ten batches of four an epoch; and a stream, which is one epoch, whatever its passes are."""
    data = [tuple(part[i : i + 4] for part in images(16).tensors) for i in range(0, 16, 4)]

    def learnt(batches, **options):
        torch.manual_seed(1)
        objective = Recorded(Small())
        return objective, fit(objective, batches, lr=1e-2, min_lr=0.0, **options, **QUIET)

    listed, history = learnt(data, steps=10, accumulation=2)
    assert len(listed.gradients) == 5 and [row["epoch"] for row in history.rows] == [0, 1, 2]
    assert history.rows[-1]["lr"] == 0
    streamed, history = learnt(DataLoader(Stream(data), batch_size=None), steps=10, accumulation=2)
    assert len(history.rows) == 1
    torch.testing.assert_close(state(streamed.model), state(listed.model))
    whole, _ = learnt(data, steps=8)
    torch.testing.assert_close(state(whole.model), state(learnt(data, epochs=2)[0].model))
    with pytest.raises(ValueError, match="not an iterator"):
        learnt(iter(data), steps=5)
    with pytest.raises(TypeError, match="has no length, so steps must say"):
        learnt(iter(data), epochs=1)


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_groups_keep_their_multiples():
    sizes = dict(embed_dim=32, num_heads=2, img_size=64, num_classes=5)
    student = timm.create_model("sit_lvvit_tiny", stage_blocks=(1, 1), **sizes)
    objective = FeatureRecalibration(student, timm.create_model("lvvit_tiny", depth=2, **sizes))
    seen = []
    make = objective.optimizers
    objective.optimizers = lambda *rates: seen.extend(make(*rates)) or seen
    before = state(objective)
    batches = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))] * 2
    fit(objective, batches, epochs=1, lr=1e-3, min_lr=1e-4, **QUIET)
    assert [group["lr"] for group in seen[0].param_groups] == pytest.approx([1e-4, 1e-4, 5e-4])
    still = {name for name, value in objective.state_dict().items() if torch.equal(value, before[name])}
    assert still <= {"model.blocks.1.slimming.weight.3.bias"}


def test_learning_rate():
    found = [learning_rate(epoch, 12, 1.0, warmup_epochs=2, min_lr=0.1) for epoch in (0, 1, 2, 7, 12, 15)]
    assert found == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])
    assert learning_rate(0, 1, 1e-6, min_lr=1e-5) == 1e-6  # never above lr


def test_average_of_weights(tmp_path):
    model, seen = Small(), []

    class Watched(Plain):
        def after_step(self):
            seen.append(state(self.model))
            return False

    average = state(model)
    data = images(12)
    options = dict(epochs=2, lr=1e-2, ema=0.7, output=tmp_path, eval_loader=DataLoader(data, 5))
    fit(Watched(model), DataLoader(data, 4), **options, **QUIET)
    assert len(seen) == 6
    for weights in seen:
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in weights.items()}
    saved = checkpoint.read(tmp_path / "last.pt")
    torch.testing.assert_close(saved["ema"], average)
    averaged = Small()
    averaged.load_state_dict(average)
    assert saved["rows"][-1]["ema_eval_loss"] == pytest.approx(evaluate(averaged, DataLoader(data, 12))["eval_loss"])


def test_evaluation():
    model, data = Small(0.5).train(), images(10)
    found = evaluate(model, DataLoader(data, 4))
    logits = model.eval()(data.tensors[0])
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, data.tensors[1]))
    assert found["top1"] == pytest.approx(10 * right) and "top5" not in found
    assert found["eval_loss"] == pytest.approx(F.cross_entropy(logits, data.tensors[1]).item(), abs=1e-6)
    model.train()
    model.head.eval()  # a part that rests
    for loader in (DataLoader(data, 4), DataLoader(data, 4, collate_fn=lambda items: 1 / 0)):
        with contextlib.suppress(ZeroDivisionError):
            evaluate(model, loader)
        assert model.training and model.drop.training and not model.head.training


def test_bf16_runs_in_bf16():
    seen = []

    class Watched(Small):
        def forward(self, x):
            y = self.fc(x.flatten(1))
            seen.append(y.dtype)
            return self.head(F.gelu(y))

    model = Watched()
    history = fit(Plain(model), DataLoader(images(), 8), epochs=8, lr=1e-2, amp="bf16", **QUIET)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_epochs_are_permutations_and_processes_share_them():
    whole = Batches(22, 8, seed=3, drop_last=True)
    seen = []
    for epoch in range(2):
        whole.epoch = epoch
        seen.append([sorted(batch) for batch in whole])
        halves = [Batches(22, 4, seed=3, drop_last=True, process=p, processes=2) for p in range(2)]
        for half in halves:
            half.epoch = epoch
        assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == seen[-1]
        whole.first = 1
        assert [sorted(batch) for batch in whole] == seen[-1][1:] and len(whole) == 1
        whole.first = 0
    assert len({i for batch in seen[0] for i in batch}) == 16 and seen[0] != seen[1]
    last = [list(Batches(9, 2, shuffle=False, process=p, processes=2))[-1] for p in range(2)]
    assert last == [[8, 0], [1, 2]]
    assert list(Batches(9, 4, shuffle=False))[-1] == [8]
    with pytest.raises(ValueError, match="3 images make no batch of 2 in each of 2 processes"):
        Batches(3, 2, drop_last=True, processes=2)


def test_repeats_stand_in_a_row_and_in_other_processes():
    assert list(Batches(4, 2, shuffle=False, repeats=3)) == [[0, 4], [8, 1]]
    assert list(Batches(4, 4, repeats=1, seed=5)) == list(Batches(4, 4, seed=5))
    shares = [list(Batches(6, 3, shuffle=False, process=p, processes=2, repeats=3)) for p in range(2)]
    assert shares == [[[0, 12, 7]], [[6, 1, 13]]]
    shuffled = next(iter(Batches(9, 9, seed=1, repeats=3)))
    assert [i % 9 for i in shuffled] == [i for i in next(iter(Batches(9, 9, seed=1)))[:3] for _ in range(3)]


def test_repeats_are_augmented_anew_and_are_the_same_image():
    items = Reproducible(Noisy(4), seed=1)
    (first, label), (again, same), (third, _) = items[1], items[5], items[9]
    assert label == same and not torch.equal(first, again) and not torch.equal(again, third)
    assert torch.equal(items[5][0], again)
    seen = []
    batches = TrainBatches(DataLoader(Noisy(12), 6, shuffle=True), 0, 0, 1, repeats=3)
    for _, labels in batches.epoch(0):
        seen += labels.tolist()
    assert len(seen) == 12 and all(len(set(seen[i : i + 3])) == 1 for i in range(0, 12, 3))
    history = fit(Plain(Small()), DataLoader(Noisy(12), 6), epochs=1, lr=1e-3, aug_repeats=3, **QUIET)
    assert math.isfinite(history.rows[0]["loss"])
    with pytest.raises(ValueError, match="aug_repeats=3 needs a train_loader that shuffles or keeps the order"):
        fit(Plain(Small()), [next(iter(DataLoader(images(), 8)))], epochs=1, lr=1e-3, aug_repeats=3, **QUIET)
    with pytest.raises(ValueError, match="aug_repeats=0, but it must be at least 1"):
        fit(Plain(Small()), DataLoader(images(), 8), epochs=1, lr=1e-3, aug_repeats=0, **QUIET)


def test_the_cool_down_is_at_the_lowest_rate():
    loader = DataLoader(images(), 8)
    history = fit(Plain(Small()), loader, epochs=2, cooldown_epochs=2, lr=1e-2, min_lr=1e-3, **QUIET)
    assert [row["lr"] for row in history.rows] == pytest.approx([5.5e-3, 1e-3, 1e-3, 1e-3])
    with pytest.raises(ValueError, match="cooldown_epochs=2 goes with epochs, not with steps=3"):
        fit(Plain(Small()), loader, steps=3, cooldown_epochs=2, lr=1e-2, **QUIET)


@pytest.mark.parametrize("samples, steps", [(6, 2), (24, 6), (48, 12), (None, 3)])
def test_epochs_of_another_length_are_the_samplers(samples, steps):
    data = images(12)
    batches = TrainBatches(DataLoader(data, 4, sampler=RandomSampler(data, num_samples=samples)), 0, 0, 1)
    assert batches.steps == steps and (batches.batches is None) is (samples is not None)
    assert len(list(batches.epoch(0))) == steps


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    items = Reproducible(Noisy(4), seed=1)
    first = [items[i][0] for i in range(4)]
    torch.manual_seed(9)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert all(torch.equal(items[i][0], first[i]) for i in (2, 1, 3, 0))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[1])
    items.epoch.fill_(1)
    assert not torch.equal(items[0][0], first[0])
    items.epoch.fill_(0)
    items.seed = 2
    assert not torch.equal(items[0][0], first[0])


def test_evo_vit_trains_in_both_modes():
    model = timm.create_model(
        "evo_deit_tiny_patch16_224", depth=6, embed_dim=32, num_heads=2, img_size=64, num_classes=3
    )
    data = TensorDataset(torch.randn(4, 3, 64, 64), torch.arange(4) % 3)
    modes = []
    model.norm.register_forward_hook(lambda *_: modes.append(model.stage_wise))
    fit(SlowFast(model), DataLoader(data, 4), epochs=3, lr=1e-3, **QUIET)
    assert modes == [False, False, True]


@pytest.mark.parametrize("kind", ["evit", "evo_vit"])
def test_averaged_weights_are_evaluated_as_the_model_runs(kind, monkeypatch):
    """Keep rate and stages follow the epoch in both, whatever the model began with."""
    sizes = dict(depth=3, embed_dim=32, num_heads=2, img_size=64, num_classes=3)
    if kind == "evit":
        model = timm.create_model("evit_deit_tiny_patch16_224", keep_rate=1.0, **sizes)
        objective, name = ShrinkingKeepRate(model, keep_rate=0.5), "keep_rate"
    else:
        objective, name = SlowFast(timm.create_model("evo_deit_tiny_patch16_224", **sizes)), "stage_wise"
    data, seen = TensorDataset(torch.randn(4, 3, 64, 64), torch.arange(4) % 3), []
    monkeypatch.setattr(
        loop, "evaluate", lambda model, *rest: seen.append(getattr(model, name)) or evaluate(model, *rest)
    )
    fit(objective, DataLoader(data, 4), epochs=3, lr=1e-3, ema=0.5, eval_loader=DataLoader(data, 4), **QUIET)
    assert len(seen) == 6 and seen[::2] == seen[1::2] and seen[0] != seen[-1]


def test_tensorboard(tmp_path):
    fit(Plain(Small()), DataLoader(images(), 8), epochs=1, lr=1e-2, output=tmp_path, tensorboard=True, **QUIET)
    assert list(tmp_path.glob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "options, what",
    [
        (dict(epochs=0), "epochs=0"),
        (dict(epochs=None, steps=0), "steps=0"),
        (dict(steps=3), "epochs=1 and steps=3"),
        (dict(lr=0), "lr=0"),
        (dict(accumulation=0), "accumulation=0"),
        (dict(ema=1.0), "ema=1.0"),
        (dict(clip=0), "clip=0"),
        (dict(amp="fp8"), "amp='fp8'"),
        (dict(device="cuda:1"), "device='cuda:1', but it must be 'cpu', or None"),
        (dict(amp="fp16"), "needs a GPU"),
        (dict(resume="auto"), "output, which is not given"),
        (dict(mixup=lambda x, y: (x, y), batch=3), "even batch_size"),
    ],
)
def test_refuses(options, what):
    loader = DataLoader(images(12), options.pop("batch", 4))
    with pytest.raises(ValueError, match=what):
        fit(Plain(Small()), loader, **{**dict(epochs=1, lr=1e-3), **QUIET, **options})
