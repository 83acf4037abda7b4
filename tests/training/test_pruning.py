"""CAIT's objective: a pruner chooses while the model learns, and the model is compacted in the middle of it."""

import pytest

from support.cait_pruning import SMALL, batch, model_of
from support.small_training import QUIET

pytest.importorskip("accelerate")

import torch  # noqa: E402

from tokenops.methods.cait.compactors import CompactorPruner  # noqa: E402
from tokenops.methods.cait.pruning import ChannelPruner  # noqa: E402
from tokenops.methods.cait.segmentation import SegmentationModel  # noqa: E402
from tokenops.methods.cait.structure import Structure  # noqa: E402
from tokenops.training import Pruned, fit  # noqa: E402


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", (ChannelPruner, CompactorPruner))
def test_the_model_is_compacted_when_the_pruner_is_done(kind):
    model, (x, target) = model_of(), batch(0)
    pruner = kind(model, 0.7, steps=(0, 2), every=1, multiples=SMALL)
    objective = Pruned(model, pruner, teacher=model_of()).train()
    optimizers = objective.optimizers(1e-3, 0.05)
    assert len(optimizers) == (2 if kind is CompactorPruner else 1)
    masks = {id(layer.mask) for layer in pruner.layers}
    assert all(id(p) not in masks for g in optimizers[0].param_groups for p in g["params"])
    before = sum(p.numel() for p in model_of().parameters())
    for step in range(2):
        loss, _ = objective(x, target)
        loss.backward()
        assert objective.before_step() is (step == 0) and objective.settled is objective.final is False
        changed = objective.after_step()
    assert changed and objective.settled and objective.final and not objective.after_step()
    assert sum(p.numel() for p in objective.model.parameters()) < before
    assert len(objective.optimizers(1e-3, 0.05)) == 1
    assert objective.compacted_at == 2
    fresh = model_of()
    again = Pruned(fresh, kind(fresh, 0.7, steps=(0, 2), every=1, multiples=SMALL))
    again.load_extra_state(objective.extra_state())
    again.load_state_dict(objective.state_dict())
    close(again.model.eval()(x), objective.model.eval()(x))


@pytest.mark.parametrize("kind, settle", [(ChannelPruner, {}), (CompactorPruner, {"settle": 2})])
@pytest.mark.parametrize("after", [0, 3])
def test_compaction_in_the_middle_or_at_the_very_end_changes_nothing(kind, settle, after):
    """As good as not trained, the compacted model says what the masked one says."""
    model = model_of()
    pruner = kind(model, 0.7, steps=(0, 3), every=1, multiples=SMALL, **settle)
    steps = 3 + settle.get("settle", 0)
    objective, batches = Pruned(model, pruner, smoothing=0.1), [batch(seed) for seed in range(4)]
    fit(objective, batches, steps=steps + after, lr=1e-9, **QUIET)
    assert objective.compacted_at == steps and Structure.of(objective.model) != Structure.of(model)
    x, _ = batch(9)
    close(objective.model.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match=f"schedule ends {steps} steps from now, behind {steps - 1} updates"):
        model = model_of()
        again = Pruned(model, kind(model, 0.7, steps=(0, 3), every=1, multiples=SMALL, **settle))
        fit(again, batches, steps=2 * steps - 2, accumulation=2, lr=1e-9, **QUIET)


def test_a_part_of_a_model_is_pruned_with_a_teacher(tmp_path):
    backbone, dense = model_of(num_classes=0), model_of(num_classes=0)
    pruner = ChannelPruner(backbone, 0.7, steps=(1, 4), every=1, multiples=SMALL)
    made = [SegmentationModel(part, (0, 2), 5, width=16) for part in (backbone, dense)]
    objective = Pruned(made[0], pruner, teacher=made[1], smoothing=0.1)
    batches = [(x, (x.mean(1) > 0).long()) for x, _ in map(batch, range(3))]
    seen = []
    options = dict(epochs=10, lr=2e-3, output=tmp_path, progress=lambda step, loss: seen.append((step, float(loss))))
    history = fit(objective, batches, **options, device="cpu")
    assert objective.model is made[0] and objective.compacted_at == 4
    rows = [(row.qk, row.v, row.hidden) for row in pruner.report()]
    assert rows == [(w.qk, w.v, w.hidden) for w in Structure.of(objective.model.backbone).widths]
    assert min(hidden for _, _, hidden in rows) < 128 and not any("mask" in name for name in objective.state_dict())
    assert [step for step, _ in seen] == list(range(30))
    means = [sum(loss for _, loss in seen[i : i + 3]) / 3 for i in range(0, 30, 3)]
    assert [row["loss"] for row in history.rows] == pytest.approx(means) and means[-1] < 0.8 * means[0]
    fresh = model_of(num_classes=0)
    again = Pruned(
        SegmentationModel(fresh, (0, 2), 5, width=16),
        ChannelPruner(fresh, 0.7, steps=(1, 4), every=1, multiples=SMALL),
        teacher=made[1],
    )
    fit(again, batches, **{**options, "progress": False}, resume="auto", device="cpu")
    close(again.model.eval()(batches[0][0]), objective.model.eval()(batches[0][0]))


def test_the_pruner_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the model or a part of it"):
        Pruned(model_of(), ChannelPruner(model_of(), 0.7, steps=(0, 2), multiples=SMALL))
