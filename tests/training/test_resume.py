"""Checkpoints: a run that was interrupted goes on to the same bits, and no file is ever half written."""

import csv
import math
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from support.cait_pruning import SMALL, model_of

pytest.importorskip("accelerate")

from support.small_training import QUIET, Noisy, Small, images, state  # noqa: E402
from tokenops.methods import load_checkpoint  # noqa: E402
from tokenops.methods.cait.compactors import CompactorPruner  # noqa: E402
from tokenops.methods.cait.pruning import ChannelPruner  # noqa: E402
from tokenops.training import Plain, Pruned, checkpoint, fit  # noqa: E402
from tokenops.training import model_of as weights_in  # noqa: E402


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Interrupted(Plain):
    """Dies behind so many updates."""

    left = 10**9

    def after_step(self):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return False


def interrupted_and_resumed(tmp_path, make, after, workers=0, eval_workers=0, **kwargs):
    """The state and the history of a run, and of another that was interrupted; nothing but files goes on."""
    found = []
    for name in ("whole", "halves"):
        for left in (10**9,) if name == "whole" else (after, 10**9):
            torch.manual_seed(3)
            data, objective = Noisy(), make(left)
            loader, evaluated = DataLoader(data, 4, shuffle=True, num_workers=workers), DataLoader(data, 9)
            if eval_workers:
                options = dict(num_workers=eval_workers, persistent_workers=True)
                evaluated = DataLoader(TensorDataset(data.images, data.labels), 9, **options)
            torch.manual_seed(left % 1000)  # what is left in the generators does not matter
            options = dict(epochs=3, lr=1e-2, output=tmp_path / name, resume="auto", checkpoint_every=2, seed=5)
            try:
                history = fit(objective, loader, eval_loader=evaluated, **options, **QUIET, **kwargs)
            except KeyboardInterrupt:
                assert left == after
        found.append((state(objective), history))
    return found


@pytest.mark.parametrize(
    "after, accumulation, workers, eval_workers",
    [
        (3, 1, 0, 0),
        pytest.param(9, 1, 1, 0, marks=pytest.mark.slow),
        (4, 2, 0, 0),
        pytest.param(6, 1, 0, 0, marks=pytest.mark.slow),
        pytest.param(7, 1, 0, 1, marks=pytest.mark.slow),  # stops behind an epoch
    ],
)
def test_resumed_run_has_the_same_bits(tmp_path, after, accumulation, workers, eval_workers):
    from timm.data import Mixup

    def make(left):
        objective = Interrupted(Small(dropout=0.3))
        objective.left = left
        return objective

    mixup = Mixup(0.8, 1.0, num_classes=3)
    options = dict(ema=0.9, mixup=mixup, accumulation=accumulation, workers=workers, eval_workers=eval_workers)
    (whole, first), (halves, second) = interrupted_and_resumed(tmp_path, make, after, **options)
    same(whole, halves)
    assert first.rows == second.rows and len(first.rows) == 3
    same(*(checkpoint.read(tmp_path / name / "last.pt")["ema"] for name in ("whole", "halves")))
    with open(tmp_path / "halves" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in first.rows]


@pytest.mark.parametrize(
    "kind, after",
    [
        pytest.param(ChannelPruner, 2, marks=pytest.mark.slow),
        pytest.param(ChannelPruner, 5, marks=pytest.mark.slow),
        (CompactorPruner, 2),
    ],
)
def test_pruned_run_is_compacted_and_resumed(tmp_path, kind, after):
    """Interrupted before and behind the compaction."""
    batches = [(torch.randn(2, 3, 64, 64), torch.tensor([i, i + 1])) for i in range(3)]
    found = []

    class Dies(Pruned):
        def before_step(self):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().before_step()

    for name in ("whole", "halves"):
        for left in (10**9,) if name == "whole" else (after + 1, 10**9):
            torch.manual_seed(2)
            model = model_of()
            objective = Dies(model, kind(model, 0.8, steps=(0, 3), every=1, multiples=SMALL))
            objective.left = left
            options = dict(output=tmp_path / name, resume="auto", checkpoint_every=1, ema=0.5)
            try:
                fit(objective, batches, epochs=2, lr=1e-3, **options, **QUIET)
            except KeyboardInterrupt:
                assert left != 10**9
        found.append(objective)
    assert all(each.compacted_at is not None for each in found)
    assert sum(p.numel() for p in found[0].parameters()) < sum(p.numel() for p in model_of().parameters())
    same(*(state(each) for each in found))


def test_resume_asks_for_the_same_batches(tmp_path):
    data = images()
    options = dict(epochs=1, lr=1e-2, output=tmp_path, **QUIET)
    fit(Plain(Small()), DataLoader(data, 8), **options)
    with pytest.raises(ValueError, match="batches an epoch was 3, but is now 6"):
        fit(Plain(Small()), DataLoader(data, 4), resume="auto", **options)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(Plain(Small()), DataLoader(data, 4), resume=tmp_path / "nowhere.pt", **options)
    with pytest.raises(ValueError, match="no checkpoint of fit"):
        fit(Plain(Small()), DataLoader(data, 8), resume=tmp_path / "model.pt", **options)


def test_resume_says_what_does_not_fit(tmp_path):
    data = images()
    options = dict(epochs=2, lr=1e-2, **QUIET)
    fit(Plain(Small()), DataLoader(data, 8), output=tmp_path, **options)
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    with pytest.raises(ValueError, match="last.pt is of another model"):
        fit(Plain(other), DataLoader(data, 8), resume=tmp_path / "last.pt", **options)
    pruned = model_of()
    objective = Pruned(pruned, ChannelPruner(pruned, 0.8, steps=(0, 3), every=1, multiples=SMALL))
    with pytest.raises(ValueError, match="objective was Plain, but is now Pruned"):
        fit(objective, DataLoader(data, 8), resume=tmp_path / "last.pt", **options)
    with pytest.raises(ValueError, match="no state of a pruner"):
        objective.load_extra_state({})
    whole = (tmp_path / "last.pt").read_bytes()
    for broken in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "last.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="last.pt cannot be read"):
            fit(Plain(Small()), DataLoader(data, 8), resume=tmp_path / "last.pt", **options)


def test_saved_model_loads(tmp_path):
    data = images()
    model = Small()
    fit(Plain(model), DataLoader(data, 8), epochs=1, lr=1e-2, output=tmp_path, **QUIET)
    same(state(load_checkpoint(Small(), tmp_path / "model.pt")), state(model))
    for name in ("model.pt", "last.pt"):
        same(weights_in(tmp_path / name), state(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "log.csv", "model.pt"]


class Worse(Plain):
    """Right in epoch 1 alone: the model says the epoch's number."""

    last = 0  # that is not final

    def begin_epoch(self, epoch, epochs):
        self.epoch = epoch
        with torch.no_grad():
            self.model.head.weight.zero_()
            self.model.head.bias.copy_(torch.tensor([0.0, 0, 0]).index_fill(0, torch.tensor([epoch % 3]), 9.0))

    @property
    def final(self):
        return self.epoch > self.last


def learn_worse(output, objective=None, epochs=3, **kwargs):
    data, options = images(9), dict(lr=1e-9, min_lr=0, **QUIET)
    evaluated = DataLoader(TensorDataset(data.tensors[0], torch.ones(9, dtype=torch.int64)), 3)
    objective = Worse(Small()) if objective is None else objective
    loaders = dict(train_loader=DataLoader(data, 9), eval_loader=evaluated)
    return fit(objective, epochs=epochs, output=output, **loaders, **options, **kwargs)


def test_best_model_is_kept(tmp_path):
    history = learn_worse(tmp_path)
    assert history.best == 100 and history.best_epoch == 1 and history.saved == tmp_path / "model.pt"
    assert weights_in(tmp_path / "model.pt")["head.bias"].argmax() == 1
    assert weights_in(tmp_path / "last.pt")["head.bias"].argmax() == 2


def test_only_epochs_of_the_final_model_compete(tmp_path):
    objective = Worse(Small())
    objective.last = 1
    for epoch in range(3):  # an epoch at a time
        history = learn_worse(tmp_path, objective, epoch + 1, resume="auto")
        assert history.saved == tmp_path / "model.pt"
        assert weights_in(tmp_path / "model.pt")["head.bias"].argmax() == epoch
        assert (history.best, history.best_epoch) == ((None, None) if epoch < 2 else (0, 2))


def test_resumed_into_another_folder(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    learn_worse(first, epochs=2)
    history = learn_worse(second, epochs=2, resume=first / "last.pt")  # nothing is left to do
    assert history.saved is None and not (second / "model.pt").exists()
    history = learn_worse(second, epochs=3, resume=first / "last.pt")
    assert history.saved == second / "model.pt" and weights_in(history.saved)["head.bias"].argmax() == 2
    assert history.best_epoch == 2
    assert learn_worse(first, epochs=3, resume="auto").best_epoch == 1


def test_loss_that_is_not_finite_stops_and_spares_the_checkpoint(tmp_path):
    class Breaks(Plain):
        def forward(self, x, y):
            loss, parts = super().forward(x, y)
            self.calls = getattr(self, "calls", 0) + 1
            return loss * (math.nan if self.calls > 4 else 1), parts

    with pytest.raises(FloatingPointError, match="epoch 1"):
        fit(Breaks(Small()), DataLoader(images(), 8), epochs=9, lr=1e-2, output=tmp_path, checkpoint_every=1, **QUIET)
    saved = checkpoint.read(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 1)
    assert all(value.isfinite().all() for value in saved["objective"].values())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.write(path, "old")
    with pytest.raises(Exception, match="pickle"):
        checkpoint.write(path, {"x": lambda: 0})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_run_that_ended_within_an_epoch_is_not_prolonged(tmp_path):
    """Its last epoch was cut: what would be the next one leaves out the rest of it."""
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)]

    def run(steps):
        return fit(Plain(Small()), batches, steps=steps, lr=1e-3, output=tmp_path, resume="auto", **QUIET)

    run(5)
    assert len(run(5).rows) == 2
    with pytest.raises(ValueError, match="resume: the run ended within an epoch, behind 5 batches: it cannot go on"):
        run(9)


def test_a_run_of_whole_epochs_is_prolonged(tmp_path):
    batches, updates = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)], []
    for steps in (6, 8):
        options = dict(steps=steps, output=tmp_path, resume="auto", **QUIET)
        fit(Plain(Small()), batches, lr=1e-3, **options | dict(progress=lambda number, _: updates.append(number)))
    assert updates == list(range(8))


@pytest.mark.parametrize("kind", [ChannelPruner, partial(CompactorPruner, settle=3)], ids=["gates", "compactors"])
def test_a_choice_made_final_by_hand_is_compacted_behind_a_whole_update(kind):
    model, updates = model_of(), []
    pruner = kind(model, 0.8, steps=(0, 2), every=1, multiples=SMALL)
    pruner.freeze()
    objective, weight = Pruned(model, pruner), model.patch_embed.proj.weight.clone()
    size = model.patch_embed.img_size
    batches = [(torch.randn(2, 3, *size), torch.tensor([0, 1]))]
    rows = fit(objective, batches, steps=1, lr=1e-3, **QUIET | dict(progress=lambda u, _: updates.append(u))).rows
    assert updates == [0] and objective.compacted_at == 0 and rows[0]["lr"] < 1e-3
    assert not torch.equal(objective.model.patch_embed.proj.weight, weight)
