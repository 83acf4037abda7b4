"""What `make accuracy` is made of: intervals, batches, what cells are kept under, recipes and claims."""

import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from accuracy import cells, claims, data, models, page, recipes  # noqa: E402
from accuracy.__main__ import planned  # noqa: E402
from accuracy.cells import Cell, kept  # noqa: E402
from accuracy.intervals import Interval, difference, interval  # noqa: E402
from tokenops.methods import cait  # noqa: E402

SMALL = models.Settings.quick()._replace(dense_steps=6, steps=4, scene_steps=3)


def test_interval_of_what_does_not_vary():
    same = interval([np.ones(50)] * 3)
    assert same == (100.0, 100.0, 100.0, (100.0, 100.0, 100.0)) and same.sign == 1
    assert difference({0: np.ones(9), 1: np.ones(9)}, {0: np.ones(9), 1: np.ones(9)}) == (0.0, 0.0, 0.0, (0.0, 0.0))


def test_interval_is_that_of_a_proportion():
    """One seed, 90 of 100 right: +-1.96 sqrt(0.09 / n)."""
    scores = np.tile(np.arange(10) > 0, 1000).astype(float)
    found = interval([scores])
    assert found.mean == pytest.approx(90)
    half = 100 * 1.96 * np.sqrt(0.09 / 10000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def seeds(scores, count=3):
    return dict.fromkeys(range(count), scores)


def test_seeds_are_paired_where_both_have_them():
    ours, theirs = {0: np.ones(4), 1: np.zeros(4)}, {1: np.ones(4), 2: np.ones(4)}
    assert difference(ours, theirs) == (-100.0, -100.0, -100.0, (-100.0,))


def test_differences_are_paired():
    """Two models that are right on the same images but for one in 100: their difference is surer than either."""
    ours = np.tile(np.arange(10) > 0, 1000).astype(float)
    theirs = ours.copy()
    theirs[10 * np.arange(100) + 5] = 0
    found = difference(seeds(ours), seeds(theirs))
    assert found.mean == pytest.approx(1.0) and found.high - found.low < 0.5 and found.sign == 1
    assert difference(seeds(theirs), seeds(ours)).sign == -1


@pytest.mark.parametrize(
    "low, high, seeds, sign",
    [
        (0.1, 0.5, (0.2, 0.3, 0.4), 1),  # mean 0.3, reach 4.303 * 0.1 / sqrt(3) = 0.25
        (-0.5, -0.1, (-0.2, -0.3, -0.4), -1),
        (-0.1, 0.5, (0.2, 0.3, 0.4), 0),  # not by the images
        (0.1, 0.5, (0.1, 0.3, 0.5), 0),  # not by the seeds: reach 0.5
        (0.0, 0.5, (0.2, 0.3, 0.4), 0),
        (0.1, 0.5, (0.3, 0.3), 0),  # too few seeds
    ],
)
def test_sign_asks_images_and_seeds(low, high, seeds, sign):
    assert Interval(float(np.mean(seeds)), low, high, seeds).sign == sign


def numbers(count=10, **options):
    """Images whose pixels all say which they are."""
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    labels = torch.arange(count)
    given = dict(mean=0.0, deviation=1 / 255, shift=0, mirrored=False) | options
    return data.Data(images, labels, images, labels, **given)


def test_batches_go_through_permutations():
    loader = data.Batches(numbers(), 4, steps=5, seed=3)  # 20 images: each of 10 twice
    labels = torch.cat([labels for _, labels in loader])
    assert sorted(labels[:10].tolist()) == sorted(labels[10:].tolist()) == list(range(10))
    assert labels[:10].tolist() != labels[10:].tolist()
    for images, labels in loader:
        assert images.shape == (4, 1, 28, 28) and torch.equal(images[:, 0, 5, 5].round().long() - 1, labels)


def test_batches_depend_on_seed_and_epoch_alone():
    def drawn(seed, epoch):
        loader = data.Batches(numbers(shift=2, mirrored=True), 4, steps=3, seed=seed)
        loader.set_epoch(epoch)
        return [(images, labels) for images, labels in loader]

    for mine, other in zip(drawn(1, 2), drawn(1, 2)):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    for seed, epoch in ((1, 3), (2, 2)):
        assert any(not torch.equal(a[1], b[1]) for a, b in zip(drawn(1, 2), drawn(seed, epoch)))
    second = torch.cat([labels for e in (0, 1) for _, labels in drawn(1, e)])
    whole = data.Batches(numbers(), 4, steps=6, seed=1)
    assert torch.equal(second, torch.cat([labels for _, labels in whole])), "an epoch goes on where the last one ended"


def test_batches_move_and_mirror():
    """A single bright pixel lands within two of where it was, or of its mirror image."""
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 10, 5] = 255
    labels = torch.zeros(1, dtype=torch.int64)
    one = data.Data(images, labels, images, labels, 0.0, 1.0, 2, True)
    loader, places = data.Batches(one, 400, steps=1, seed=0), set()
    for batch, _ in loader:
        for image in batch[:, 0]:
            (row,), (column,) = image.nonzero(as_tuple=True)
            places.add((int(row), int(column)))
    assert places == {(10 + y, x + dx) for y in range(-2, 3) for x in (5, 22) for dx in range(-2, 3)}


def test_files_are_unpacked_whole_by_many_at_once(tmp_path):
    content = bytes(range(256)) * 4000
    (tmp_path / "images.gz").write_bytes(gzip.compress(content))
    file, ready = tmp_path / "raw/images", threading.Barrier(8)

    def unpacked(_):
        ready.wait()
        data.unpack(tmp_path / "images.gz", file)
        return file.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(unpacked, range(8))) == {content}
    assert [path.name for path in file.parent.iterdir()] == ["images"]


def test_digits_are_split_without_overlap():
    found = data.load("digits")
    assert found.images.shape == (1347, 1, 28, 28) and found.test_images.shape == (450, 1, 28, 28)
    assert set(found.labels.tolist()) == set(range(10))
    _, _, train, test = data.split_digits()
    assert not set(train.tolist()) & set(test.tolist()) and len({*train.tolist(), *test.tolist()}) == 1797


def test_cells_are_kept_under_what_they_depend_on(tmp_path, monkeypatch):
    cell = Cell("SiT", 0.4, 0)
    folder = cells.folder_of(cell, SMALL, tmp_path)
    assert folder == cells.folder_of(cell, SMALL, tmp_path)
    others = [cells.folder_of(cell, SMALL._replace(lr=1.0), tmp_path)]
    others += [cells.folder_of(other, SMALL, tmp_path) for other in (cell._replace(seed=1), cell._replace(level=0.6))]
    monkeypatch.setattr(recipes, "PLACES", (2, 3))
    others.append(cells.folder_of(cell, SMALL, tmp_path))
    assert len({folder, *others}) == 5


def test_sources_are_those_that_a_recipe_calls():
    text = "\n".join(cells.sources(recipes.sit_frd))
    for part in ("def sit_frd", "def recalibrated", "def slimmed", "def fit", "class Batches", "(1, 2)"):
        assert part in text
    assert "def evo_vit" not in text and "class FreeHeads" not in text
    assert "class Muon" in "\n".join(cells.sources(cells.dense))


def test_a_cell_is_trained_once_and_goes_on(tmp_path, monkeypatch):
    """What a killed run leaves is no cell; its checkpoint is where the next one begins."""
    cell = Cell("dense", 1.0, 0)
    whole = tmp_path / "whole"
    cells.make(cell, SMALL, whole)
    expected = kept(cells.folder_of(cell, SMALL, whole))

    steps = []
    monkeypatch.setattr(models, "EPOCH", 2)
    folder = cells.folder_of(cell, SMALL, tmp_path)
    commit = cells.machine.commit

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells.machine, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        cells.make(cell, SMALL, tmp_path)
    assert kept(folder) is None and (folder / "training/last.pt").is_file()
    monkeypatch.setattr(cells.machine, "commit", commit)
    monkeypatch.setattr(data.Batches, "augmented", lambda *_: steps.append(1))
    cells.make(cell, SMALL, tmp_path)
    found = kept(folder)
    assert not steps, "the training was complete"
    assert found.macs == expected.macs and found.scores.shape == (450,) and not (folder / "training").exists()
    (again,) = cells.all_made([cell], SMALL, tmp_path, 1)
    assert again[0] == cell and again[2] and np.array_equal(again[1].scores, found.scores)


def test_every_claim_has_its_cells():
    plan = planned(2, claims.LEVELS, list(recipes.METHODS), True)
    assert len(set(plan)) == len(plan)
    for claim in claims.CLAIMS:
        for name in (claim.ours, claim.theirs):
            assert name in cells.RECIPES
            assert {Cell(name, level, seed) for level in claim.levels for seed in (0, 1)} <= set(plan)
    assert {cell.teacher for cell in plan} - {None} <= set(plan)
    first = [cell.seed for cell in plan]
    assert first == sorted(first), "whole seeds first"


def test_outcomes_say_what_intervals_carry():
    good, bad = np.ones(100), np.zeros(100)
    claim = next(claim for claim in claims.CLAIMS if claim.ours == "SiT")
    scores = {("SiT", 0.8): seeds(good), ("EViT, dropping only", 0.8): seeds(bad), ("SiT", 0.25): seeds(bad)}
    scores["EViT, dropping only", 0.25] = seeds(bad)
    costs = dict.fromkeys(scores, 5.0)
    found = {(each.claim.ours, each.level): each.verdict for each in claims.outcomes(scores, costs)}
    assert found == {("SiT", 0.8): "as claimed", ("SiT", 0.25): "not shown"}
    dear = {(each.level, each.verdict) for each in claims.outcomes(scores, costs | {("SiT", 0.8): 6.0})}
    assert (0.8, "costs 1.20 times as much: none") in dear
    scores |= {("SiT", 0.4): seeds(bad), ("EViT, dropping only", 0.4): seeds(bad)}
    gain = claims.trend(scores, claim)
    assert gain.mean == -100 and gain.sign == -1
    assert claims.trend({}, claim) is None
    lost = claims.Outcome(claim, 0.8, difference(seeds(bad), seeds(good)), 0.9)
    assert lost.verdict == "costs 0.90 times as much: none" and lost._replace(cost=1.1).verdict == "the other way"
    equal = claims.CLAIMS[0]._replace(equal=True)
    shown = claims.Outcome(equal, 0.8, difference(seeds(bad), seeds(bad)), 1.0)
    assert shown.verdict == "no difference shown"


def test_muon_takes_the_blocks_matrices():
    torch.manual_seed(0)
    for objective in (models.Plain(models.vit(SMALL)), models.SlowFast(recipes_evo())):
        adam, muon = objective.optimizers(1e-3, 0.05, (0.9, 0.98))
        theirs = [id(p) for group in muon.param_groups for p in group["params"]]
        ours = [id(p) for group in adam.param_groups for p in group["params"]]
        assert sorted(theirs + ours) == sorted({id(p) for p in objective.parameters()})
        names = {name for name, p in objective.model.named_parameters() if id(p) in theirs}
        assert len(names) == len(theirs) and all(name.startswith("blocks.") for name in names)
        assert muon.param_groups[0]["lr_scale"] == pytest.approx(14)


def recipes_evo():
    import tokenops

    return tokenops.apply_patch(models.vit(SMALL, global_pool="avg", fc_norm=True), "evo_vit", prune_ratio=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("level", claims.LEVELS)
def test_levels_are_reached(level):
    torch.manual_seed(0)
    dense = models.vit(models.Settings()).eval()
    run = recipes.Run(dense, level, 0, models.Settings())
    whole = models.macs(dense)
    for made in (recipes.slimmed(run), recipes.dropping(run, True), recipes.dropping(run, False, "random")):
        assert models.macs(made) / whole == pytest.approx(level, abs=0.03)
    assert models.macs(models.narrow(run.settings, run.target)) / whole == pytest.approx(level, abs=0.04)
    merged = models.macs(recipes.merged(run, recipes.POINTS[level])) / whole
    assert merged > level - 0.01, "channels have something left to be pruned"


def test_falling_counts():
    assert recipes.falling(0.5, 6) == [50, 25, 13, 13, 13, 13]
    assert recipes.falling(1.0, 3) == [50, 50, 50] and recipes.falling(0.0, 3) == [50, 2, 2]


def test_free_heads_keep_what_is_worth_most():
    model = cait.prunable(models.vit(SMALL))
    pruner = recipes.FreeHeads(model, 0.99, steps=(0, 2), every=1, kinds=("qk",), multiples={"qk": 1})
    scores = [torch.ones(layer.heads, layer.width) for layer in pruner.layers]
    scores[0][0] = 0.0  # a head that is worth nothing loses all but one of its channels, the other none
    gone = scores[0].shape[1] - 1
    everything = sum(score.numel() * layer.cost for score, layer in zip(scores, pruner.layers))
    chosen = pruner.choose(scores, everything - gone * pruner.layers[0].cost)
    assert [int(row.sum()) for row in chosen[0]] == [1, scores[0].shape[1]]
    assert all(bool(kept.all()) for kept in chosen[1:])
    alike = cait.ChannelPruner.choose(pruner, scores, everything - gone * pruner.layers[0].cost)
    assert all(len({int(row.sum()) for row in kept}) == 1 for kept in alike)


def test_heads_cost_as_much_as_their_widest():
    """Heads that keep 4 and 10 of 24 channels are both 10 wide."""
    model = cait.prunable(models.vit(SMALL)).eval()
    recipes.FreeHeads(model, 0.9, steps=(0, 2), every=1, kinds=("qk", "v"))
    for block in model.blocks:
        block.attn.qk_mask.data[0, 4:], block.attn.qk_mask.data[1, 10:] = 0, 0
    widths = cait.Structure.of(recipes.compacted(model)).widths
    assert {(each.qk, each.v) for each in widths} == {(10, 24)}
    assert model.blocks[0].attn.qk_mask.sum().item() == 14, "the model itself is as it was"


def test_tables_say_what_is_there():
    three = (90.0, 90.0, 90.0)
    row = {"macs": 5.0, "accuracy": Interval(90.0, 89.0, 91.0, three)._asdict(), "above_narrow": None}
    rows = {"dense, 1": row | {"macs": 10.0}, "SiT, 0.4": row | {"speed_up": [1.5, 1.4, 1.6], "macs": 4.0}}
    rows["SiT, 0.4"]["above_narrow"] = Interval(1.0, 0.5, 1.5, three)._asdict()
    rows["SiT, 0.25"] = row | {"macs": 3.0, "accuracy": Interval(90.0, 89.0, 91.0, (90.0,))._asdict()}
    assert "| SiT |  |  | 90.0 (89.0..91.0) | 90.0 (89.0..91.0) at 0.30, 1 seed |" in page.accuracies(rows, ["SiT"])
    assert "| dense | 90.0 (89.0..91.0) |  |  |  |" in page.accuracies(rows, ["SiT"])
    assert "| SiT |  |  | 1.0 (0.5..1.5) |  |" in page.gains(rows, ["SiT"])
    assert "| SiT |  |  | 1.50 (1.40..1.60), 0.60 |  |" in page.speeds(rows, ["SiT"], "eager", "speed_up")
    outcome = claims.Outcome(claims.CLAIMS[0], 0.4, Interval(-1.0, -2.0, -0.5, (-1.0, -1.1, -0.9)), 1.0)
    assert "| 0.4 | -1.0 (-2.0..-0.5) | the other way |" in page.claims([outcome], {})


def test_committed_results_are_of_these_claims():
    """What the page tells was made by what is here: every claim has its outcome, which its seeds and costs carry."""
    file = Path(__file__).parents[2] / "benchmarks/results/accuracy.json"
    found = json.loads(file.read_text())
    told = {(claim["ours"], claim["theirs"], claim["level"]) for claim in found["claims"]}
    assert told == {(claim.ours, claim.theirs, level) for claim in claims.CLAIMS for level in claim.levels}
    assert found["run"]["data"] == "fashion" and found["run"]["seeds"] == 3
    for claim in found["claims"]:
        given = claims.Claim(*(claim[name] for name in claims.Claim._fields))
        seeds = tuple(claim["difference"]["seeds"])
        assert 2 <= len(seeds) <= 3
        outcome = claims.Outcome(
            given, claim["level"], Interval(**claim["difference"] | {"seeds": seeds}), claim["cost"]
        )
        assert claim["outcome"] == outcome.verdict
    for name in recipes.METHODS:
        assert all(f"{name}, {level:g}" in found["rows"] for level in claims.LEVELS)
