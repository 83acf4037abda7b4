"""The score is a sum over paths of heads; the search is algorithm 1; its schedule; the scorer learns what it finds."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from support.models import masks_of
from support.weights import spread
from tokenops import apply_patch
from tokenops.methods import lv_vit, patch_slimming
from tokenops.methods.patch_slimming import (
    Schedule,
    blocks,
    impact_scores,
    ranking_loss,
    scored,
    search,
    teacher_lifespans,
)

SIZES = dict(img_size=64, embed_dim=32, num_heads=2, depth=4, num_classes=5)


def dense(kind="deit", **kwargs):
    sizes = {**SIZES, **kwargs}
    if kind == "lvvit":
        return spread(lv_vit(skip_lam=2.0, mlp_ratio=3.0, qkv_bias=False, **sizes)).eval()
    model = spread(timm.create_model("deit_tiny_patch16_224", **sizes)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)  # attention that differs between tokens
        for block, factor in zip(model.blocks[1:3], (16, 4)):  # early layers that need more of them
            block.attn.proj.weight.mul_(factor)
    return model


def images(batch=3, size=64):
    return torch.randn(batch, 3, size, size)


def probabilities(block, x, alive):
    """P (B, H, 1+N, 1+N) by the definition; dead keys have none."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (qkv[0] @ qkv[1].mT) * attention.head_dim**-0.5
    return logits.masked_fill(~alive[:, None, None], float("-inf")).softmax(-1)


def brute_force(model, x, layer, masks):
    """The mean over every path of heads of ||A[:, i] U[i, :]||^2, from masks (L, B, 1+N): nothing is factorised."""
    z = blocks.embed_tokens(model, x)
    for block in model.blocks[: layer - 1]:
        z = block(z)
    everything = torch.ones(z.shape[:2], dtype=torch.bool)
    U = probabilities(model.blocks[layer - 1], z, everything) @ z.abs().unsqueeze(1)
    z, alive, maps = model.blocks[layer - 1](z), everything, []
    for block, mask in zip(model.blocks[layer:], masks[layer:], strict=True):
        P = probabilities(block, z, alive)
        maps.append(P * mask[:, None, :, None])
        full = z.clone()
        for b in range(len(z)):  # dead keys are taken out for good
            full[b, alive[b]] = block(z[b : b + 1, alive[b]])[0]
        z, alive = full, mask
    H, scores = U.shape[1], []
    for h, *path in itertools.product(range(H), repeat=1 + len(maps)):
        A = torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1)
        for P, k in zip(maps, path):
            A = P[:, k] @ A
        scores.append(torch.einsum("bni,bic->bnic", A, U[:, h]).square().sum((1, 3)))
    return torch.stack(scores).mean(0)[:, 1:]


@pytest.mark.parametrize("kind", ["deit", "lvvit"])
@pytest.mark.parametrize("counts", [(5, 4, 3, 1), (5, 5, 5, 2), (3, 1, 1, 1)])
@torch.no_grad()
def test_impact_is_the_sum_over_all_paths_of_heads(kind, counts):
    model, x = dense(kind, img_size=32).double(), images(3, 32).double()
    per_image = torch.stack([torch.randperm(4) for _ in range(3)])
    for order in (torch.tensor([2, 0, 3, 1]), per_image):
        masks = masks_of(order.expand(3, -1), counts)
        for layer in (1, 2, 3, 4):
            found = impact_scores(model, x, layer, counts, order)
            assert found.shape == (3, 4) and found.dtype == torch.float64
            torch.testing.assert_close(found, brute_force(model, x, layer, masks), rtol=1e-10, atol=0)


@torch.no_grad()
def test_impact_of_an_image_is_its_own_and_the_order_s_tail_does_not_matter():
    model, x, counts = dense(), images(), (17, 12, 5, 1)
    order = torch.randperm(16)
    found = impact_scores(model, x, 2, counts, order)
    assert found.std(1).min() > 0
    torch.testing.assert_close(found[1:2], impact_scores(model, x[1:2], 2, counts, order), rtol=1e-4, atol=0)
    shuffled = torch.cat((order[:4].flip(0), order[4:].flip(0)))
    same = impact_scores(model, x, 2, (17, 17, 5, 1), order), impact_scores(model, x, 2, (17, 17, 5, 1), shuffled)
    torch.testing.assert_close(*same, rtol=1e-4, atol=0)


def features(model, x, layer):
    x = blocks.embed_tokens(model, x)
    for block in model.blocks[:layer]:
        x = block(x)
    return x


def error_behind(result, frozen, x, layer, kind):
    """E at the next layer's rows, by masks of the found schedule, on the original's features."""
    student, plan = result.model, result.schedule
    z = features(frozen, x, layer - 1)
    order = torch.tensor(plan.order)
    z, target = blocks.rows_of(z, order), blocks.rows_of(features(frozen, x, layer + 1), order)
    n, above = plan.counts[layer - 1], plan.counts[layer]
    got = blocks.slim_block(student.blocks[layer], blocks.slim_block(student.blocks[layer - 1], z, n), above)
    target = target[:, :above]
    by = {"relative": target.square().sum(), "mse": target.numel(), "raw": len(x)}[kind]
    return ((got - target).square().sum() / by).item()


@pytest.mark.parametrize("kind", ["deit", "lvvit"])
def test_search_finds_a_schedule_within_the_tolerance(kind):
    model, x = dense(kind), images(6)
    before = copy.deepcopy(model.state_dict())
    result = search(model, x, 1e-3, 3, epochs=1, lr=1e-4, batch_size=4)
    plan = result.schedule
    assert plan.counts[-1] == 1 and plan.depth == 4 and plan.counts[0] > 1
    assert result.model.schedule == plan and not result.model.training
    for layer in (1, 2, 3):
        n, above, error = plan.counts[layer - 1], plan.counts[layer], result.errors[layer - 1]
        tried = [c for c in result.candidates if c.layer == layer]
        if above == 17:
            assert not tried and n == 17 and error == 0
            continue
        assert [c.tokens for c in tried[:-1]] == [above + 3 * i for i in range(len(tried) - 1)]
        assert tried[-1].tokens == n <= above + 3 * (len(tried) - 1)
        assert all(c.error > 1e-3 for c in tried[:-1]) and tried[-1].error == error
        assert error <= 1e-3 or n == 17
        with torch.no_grad():
            assert error_behind(result, model, x, layer, "relative") == pytest.approx(error, rel=1e-3)
    # the given model is as it was, the found one shares nothing with it, and only blocks before the last were tuned
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    changed = {
        key for key, value in result.model.state_dict().items() if key in before and (value != before[key]).any()
    }
    assert {key.split(".")[1] for key in changed} == {str(c - 1) for c in {c.layer for c in result.candidates}}
    assert {key.split(".")[0] for key in changed} == {"blocks"}
    flags = {p.requires_grad for name, p in result.model.named_parameters() if "aux" not in name}
    assert flags == {True}


def test_each_layer_keeps_the_highest_impact():
    model, x = dense(), images(4)
    plan = search(model, x, 1e-2, 4, epochs=0, batch_size=3, progress=False).schedule
    order, counts = torch.tensor(plan.order), plan.counts
    assert len(set(counts)) > 2
    for layer in (3, 2, 1):
        score = impact_scores(model, x, layer, counts, order).sum(0)
        kept, above = set(plan.masks[layer - 1]), set(plan.masks[layer])
        others = [i for i in score.argsort(descending=True).tolist() if i not in above]
        assert kept == above | set(others[: len(kept) - len(above)])


def test_tolerance_decides():
    model, x = dense(), images(2)
    everything = search(model, x, 0.0, 8, epochs=0, progress=False)
    assert everything.schedule.counts == (17, 17, 17, 1)
    assert everything.errors[:2] == [0.0, 0.0] and [c.tokens for c in everything.candidates] == [1, 9, 17]
    torch.testing.assert_close(everything.model(x), model(x), rtol=1e-5, atol=1e-5)
    nothing = search(model, x, 1e6, epochs=0, progress=False)
    assert nothing.schedule.counts == (1, 1, 1, 1) and len(nothing.candidates) == 3
    counts = [search(model, x, t, 2, epochs=0, progress=False).schedule.counts for t in (1e-3, 1e-2, 1e-1)]
    assert counts[0] != counts[2]
    for strict, loose in itertools.pairwise(counts):
        assert all(a >= b for a, b in zip(strict, loose))


@pytest.mark.parametrize("error", ["mse", "raw"])
def test_errors_are_normalised_as_asked(error):
    model, x = dense(), images(3)
    result = search(model, x, 1e6, error=error, epochs=0, batch_size=2, progress=False)
    for layer in (1, 2, 3):
        with torch.no_grad():
            expected = error_behind(result, model, x, layer, error)
        assert result.errors[layer - 1] == pytest.approx(expected, rel=1e-3)


def test_tuning_lowers_the_error():
    model, x = dense(), images(8)
    plain = search(model, x, 1e6, epochs=0, progress=False)
    tuned = search(model, x, 1e6, epochs=5, lr=1e-3, progress=False)
    assert tuned.errors[2] < 0.9 * plain.errors[2]
    assert tuned.schedule.counts == plain.schedule.counts


def test_images_may_be_batches():
    model, x = dense(), images(4)
    expected = search(model, x, 1e-2, 4, epochs=1, batch_size=2, progress=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(4)), batch_size=2)
    for batches in (loader, [x[:2], x[2:]]):
        found = search(model, batches, 1e-2, 4, epochs=1, progress=False)
        assert found.schedule == expected.schedule and found.errors == expected.errors


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(model=nn.Linear(2, 2)), TypeError, "but got Linear"),
        (dict(model="slim"), TypeError, "must be a dense VisionTransformer"),
        (dict(images=torch.zeros(0, 3, 64, 64)), ValueError, "there are no images"),
        (dict(images=[3]), TypeError, "must be tensors or start with one, but got int"),
        (dict(tolerance=-1.0), ValueError, "tolerance=-1.0"),
        (dict(tolerance=float("nan")), ValueError, "tolerance=nan"),
        (dict(tolerance="0.1"), TypeError, "tolerance must be a number, but got '0.1'"),
        (dict(granularity=0), ValueError, "granularity=0, but it must be at least 1"),
        (dict(granularity=1.5), TypeError, "granularity must be an int, but got 1.5"),
        (dict(epochs=-1), ValueError, "epochs=-1"),
        (dict(batch_size=0), ValueError, "batch_size=0"),
        (dict(error="l1"), ValueError, "error='l1', but it must be one of 'relative', 'mse', 'raw'"),
    ],
)
def test_errors(kwargs, error, message):
    if kwargs.get("model") == "slim":
        kwargs = dict(model=apply_patch(dense(), "patch_slimming", schedule=(9, 9, 9, 1)))
    with pytest.raises(error, match=message):
        search(**{"model": dense(), "images": images(1), "progress": False, **kwargs})


@pytest.mark.parametrize("kind", ["deit", "lvvit"])
@pytest.mark.parametrize("counts", [(17, 12, 12, 4), (17, 17, 9, 1), (1, 1, 1, 1)])
@torch.no_grad()
def test_lifespans_are_algorithm_1_for_each_image(kind, counts):
    model, x = dense(kind).double(), images(2).double()
    found = teacher_lifespans(model, x, counts)
    assert found.shape == (2, 16)
    for layer, n in enumerate(counts, 1):
        assert ((found >= layer).sum(1) == n - 1).all()
    for b in range(2):
        order: list[int] = []
        for layer in (4, 3, 2, 1):
            if counts[layer - 1] - 1 == len(order):
                continue
            ranked = torch.tensor(order + [i for i in range(16) if i not in order])
            score = impact_scores(model, x[b : b + 1], layer, counts, ranked)[0]
            best = [i for i in score.argsort(descending=True).tolist() if i not in order]
            order += best[: counts[layer - 1] - 1 - len(order)]
            assert set(order) == {i for i in range(16) if found[b, i] >= layer}


def test_ranking_loss():
    scores = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], requires_grad=True)
    lifespan = torch.tensor([[3, 1, 1], [2, 2, 2]])
    loss = ranking_loss(scores, lifespan)
    expected = torch.nn.functional.softplus(torch.tensor([2.0 - 1.0, 4.0 - 1.0])).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1] and not scores.grad[1].any()
    assert ranking_loss(scores, torch.zeros(2, 3)) == 0
    assert ranking_loss(scores.bfloat16(), lifespan).dtype == torch.float32


def test_the_scorer_learns_the_teacher_s_order():
    teacher, x, y = dense(), images(16), torch.arange(16) % 5
    student = apply_patch(copy.deepcopy(teacher), "dps", counts=(17, 17, 6, 1), after=2).train()
    lifespan = teacher_lifespans(teacher, x, (17, 17, 6, 1))
    assert len(lifespan.unique(dim=0)) > 4  # it does depend on the image

    def agreement():
        order = scored(student.eval(), x)[1].argsort(dim=1, descending=True)
        student.train()
        return lifespan.gather(1, order[:, :5]).ge(3).float().mean().item()

    first = agreement()
    rest = [p for name, p in student.named_parameters() if ".scorer." not in name]
    groups = [dict(params=rest, lr=1e-4), dict(params=student.blocks[2].scorer.parameters(), lr=2e-2)]
    optimizer, losses = torch.optim.AdamW(groups), []
    for step in range(30):
        logits, scores = scored(student, x)
        task = nn.functional.cross_entropy(logits, y)
        ranking = ranking_loss(scores, lifespan)
        optimizer.zero_grad()
        (task + ranking).backward()
        if step == 0:
            missing = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
            assert not missing, missing
        optimizer.step()
        losses.append((task.item(), ranking.item()))
    assert losses[-1][0] < losses[0][0] - 0.2 and losses[-1][1] < 0.5 * losses[0][1]
    assert agreement() > max(0.7, first + 0.2)


def test_the_scorer_leaves_the_tokens_alone():
    student = apply_patch(dense(), "dps", counts=(17, 17, 6, 1))
    _, scores = scored(student, images(2))
    ranking_loss(scores, torch.randint(0, 4, (2, 16))).backward()
    assert all(".scorer." in name for name, p in student.named_parameters() if p.grad is not None)
    assert all(p.grad is not None for p in student.blocks[2].scorer.parameters())


def test_schedule():
    plan = Schedule.from_counts([5, 4, 2, 1], (2, 2), order=[3, 0, 2, 1])
    assert plan.masks == ((0, 1, 2, 3), (0, 2, 3), (3,), ())
    assert plan.counts == (5, 4, 2, 1) and plan.depth == 4 and plan.patches == 4
    assert plan.lifespan == [2, 1, 2, 3] and plan.order == [3, 0, 2, 1]
    assert Schedule.from_lifespan(plan.lifespan, 4, (2, 2)) == plan
    assert Schedule((2, 2), ((3, 1), (1,))).masks == ((1, 3), (1,))
    assert patch_slimming.centre_order((3, 3))[0] == 4 and set(patch_slimming.centre_order((3, 3))[-4:]) == {0, 2, 6, 8}
    assert Schedule.from_counts([2], (1, 3)).masks == ((1,),)


def test_schedule_file(tmp_path):
    plan = Schedule.from_counts((14, 14, 6, 1), (4, 4))
    plan.save(tmp_path / "plan.json")
    assert Schedule.load(tmp_path / "plan.json") == plan
    assert len((tmp_path / "plan.json").read_text().splitlines()) == 4 + 2
    with pytest.raises(FileNotFoundError):
        Schedule.load(tmp_path / "none.json")


GOOD = '{"format": "tokenops.patch_slimming", "version": 1, "grid": [2, 2], "layers": 2, "kept": [[0, 1], [1]]}'


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("}", "", "must be JSON"),
        (GOOD, "[]", "must be a JSON object"),
        ("tokenops.patch", "other", "format"),
        ('"version": 1', '"version": 2', "version is 2"),
        ("[2, 2]", "[2]", r"grid must be \[height, width\]"),
        ("[2, 2]", "[2, 0]", "grid must be"),
        ('"layers": 2', '"layers": 3', "says it has 3 layers, but keeps positions for 2"),
        ("[0, 1]", "[0, 4]", "layer 1 keeps position 4, but the grid 2 x 2 has positions 0 to 3"),
        ("[0, 1]", "[0, -1]", "position -1"),
        ("[0, 1]", "[0, 0, 1]", "layer 1 has a position twice"),
        ("[0, 1]", "[0, 1.5]", "layer 1 has 1.5"),
        ("[0, 1]", "[0, true, 1]", "layer 1 has True"),
        ("[[0, 1], [1]]", "[[0], [1]]", "layer 2 keeps position 1, which layer 1 dropped"),
        ("[[0, 1], [1]]", "[0, 1]", "kept must be a list of positions"),
    ],
)
def test_errors_of_schedule_files(old, new, message):
    assert Schedule.from_json(GOOD).counts == (3, 2)
    with pytest.raises(ValueError, match=message):
        Schedule.from_json(GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Schedule.from_counts([4, 5], (2, 2)), ValueError, "layer 2 5 tokens, but 1 .* to 4"),
        (lambda: Schedule.from_counts([6], (2, 2)), ValueError, "layer 1 6 tokens, but 1 .* to 5"),
        (lambda: Schedule.from_counts([0], (2, 2)), ValueError, "layer 1 0 tokens"),
        (lambda: Schedule.from_counts([], (2, 2)), ValueError, "counts is empty"),
        (lambda: Schedule.from_counts([2.0], (2, 2)), TypeError, "layer 1 has 2.0"),
        (lambda: Schedule.from_counts([2], (2, 2), [0, 1, 2, 2]), ValueError, "positions 0 to 3 once"),
        (lambda: Schedule.from_lifespan([0, 1, 2], 2, (2, 2)), ValueError, "must be 4 numbers of layers"),
        (lambda: Schedule.from_lifespan([0, 1, 2, 3], 2, (2, 2)), ValueError, "0 to 2"),
        (lambda: Schedule((2, 2), ()), ValueError, "masks is empty"),
        (lambda: patch_slimming.uniform_pyramid(4, 16, 0.0), ValueError, "keep=0.0"),
        (lambda: patch_slimming.uniform_pyramid(4, 16, 0.5, start=4), ValueError, "start=4, but it must be 0 to 3"),
        (lambda: patch_slimming.uniform_pyramid(4, 16, 0.5, step=0), ValueError, "step=0"),
    ],
)
def test_errors_of_schedules(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_uniform_pyramid():
    assert patch_slimming.uniform_pyramid(4, 196, 0.5) == (96, 48, 32, 1)
    assert patch_slimming.uniform_pyramid(4, 196, 0.5, start=2, step=1) == (197, 197, 99, 1)
    assert patch_slimming.uniform_pyramid(3, 16, 1.0) == (17, 17, 1)
