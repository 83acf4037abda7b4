"""Fidelity of a reduced model: literal tables, Spearman's ties, what every kind of model is compared by."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import tokenops
from support.fidelity import IMAGES, UNIT, Dense, Table, images, small
from tokenops import fidelity
from tokenops.methods.cait.segmentation import SegmentationModel
from tokenops.patching.fidelity import asked, fidelities, neighbours, ranks

# ---- the measures


def test_a_table_by_hand():
    """Classes differ for the second alone; of cosines one is 1, one 1 / sqrt 2, and two are 0."""
    dense = Table([[1, 0], [0, 1], [3, 0], [2, 0]], UNIT)
    reduced = Table([[4, 0], [1, 0], [1, 1], [0, -3]], UNIT)
    found = fidelity(dense, reduced, [IMAGES])
    assert found.images == 4 and found.top1 == 0.75
    assert found.cosine == pytest.approx((1 + 0 + math.sqrt(0.5) + 0) / 4)
    assert (found.difference, found.relative) == (None, None)


def test_batches_of_other_sizes_with_labels_or_empty_give_the_same():
    dense = Table([[1, 0.2], [0.3, 1], [3, 0], [2, 1.5]], UNIT)
    reduced = Table([[4, 0], [1, 0.1], [1, 1.5], [0, -3]], UNIT)
    whole = fidelity(dense, reduced, [IMAGES])
    labels = torch.zeros(3, dtype=torch.int64)
    parts = [(IMAGES[:1], labels[:1]), None, [IMAGES[1:], labels]]
    assert fidelity(dense, reduced, iter(parts)) == pytest.approx(whole)
    assert 0 < whole.top1 < 1 and -1 < whole.neighbours < 1


def circle(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


@pytest.mark.parametrize(
    ("dense", "reduced", "expected"),
    [
        # only the one in the middle has its two neighbours the other way round: 1, -1, 1
        ((0, 30, 90), (0, 60, 90), 1 / 3),
        # and it is left out where both are as near
        ((0, 30, 90), (0, 45, 90), 1.0),
        # of 0: ranks 3 2 1 and 2 3 1; of 6: 3 2 1 and 2 3 1; of 27: 2 3 1 and 3 2 1; of 90: 1 2 3 and 1 3 2
        ((0, 6, 27, 90), (0, 27, 6, 90), 0.5),
        ((0, 10, 30, 90), (0, 10, 80, 80), None),  # see below
    ],
)
def test_neighbours_by_hand(dense, reduced, expected):
    if expected is None:  # the ranks in both models, of the others in their order
        pairs = [
            ([3, 2, 1], [3, 1.5, 1.5]),  # of 0: 10, 30, 90 against 10, 80, 80
            ([3, 2, 1], [3, 1.5, 1.5]),  # of 10: 0, 30, 90, which are 10, 20 and 80 away, against 10, 70, 70
            ([2, 3, 1], [1, 2, 3]),  # of 30: 0, 10, 90, which are 30, 20 and 60 away, against 80, 70, 0
            ([1, 2, 3], [1, 2, 3]),  # of 90: 0, 10, 30 against 80, 70, 0
        ]
        expected = sum(pearson(*pair) for pair in pairs) / 4
        assert pearson(*pairs[0]) == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert neighbours(circle(*dense), circle(*reduced)) == pytest.approx(expected, abs=1e-12)


def pearson(x, y):
    x, y = ([value - sum(each) / len(each) for value in each] for each in (x, y))
    products = [sum(a * b for a, b in zip(*pair)) for pair in ((x, y), (x, x), (y, y))]
    return products[0] / math.sqrt(products[1] * products[2])


def test_ties_have_the_mean_of_their_ranks():
    rows = torch.tensor([[0.3, 0.1, 0.3, 0.9], [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert ranks(rows).tolist() == [[2.5, 1, 2.5, 4], [2.5, 2.5, 2.5, 2.5], [4, 3, 2, 1]]


@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_neighbours_are_scipys_spearman(chunk, monkeypatch):
    stats = pytest.importorskip("scipy.stats")
    monkeypatch.setattr("tokenops.patching.fidelity.CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (20, 3), generator=generator).double() + torch.tensor([0.5, 0.25, 0.0])
    y = x + torch.randint(-1, 2, (20, 3), generator=generator)
    sides = [nn.functional.normalize(each, dim=1) for each in (x, y)]
    sides = [(each @ each.T).round(decimals=10) for each in sides]
    assert any(len(row.unique()) < 19 for row in sides[0]), "there are ties"
    others = [[j for j in range(20) if j != i] for i in range(20)]
    each = [stats.spearmanr(*(side[i, others[i]].numpy() for side in sides)).statistic for i in range(20)]
    assert neighbours(x, y) == pytest.approx(sum(each) / 20)


def test_without_anything_to_rank_there_are_no_neighbours():
    assert neighbours(circle(0, 90), circle(0, 80)) is None
    assert neighbours(circle(5, 5, 5), circle(0, 10, 90)) is None
    found = fidelity(Table([[1, 0], [0, 1]], UNIT), Table([[1, 0], [0, 1]], UNIT), [torch.tensor([0, 1])])
    assert found == (2, 1.0, pytest.approx(1.0), None, None, None)


def test_dense_outputs_by_hand():
    """Tokens, and maps; of two batches of unequal size every element counts alike."""
    y = torch.tensor([[[1.0, -3.0]], [[2.0, 2.0]], [[0.0, 4.0]]])  # of mean absolute value 2
    z = y + torch.tensor([[[0.5, -0.5]], [[1.0, 0.0]], [[0.0, -1.0]]])
    for shape in ((3, 1, 2), (3, 2, 1, 1)):
        found = fidelity(Dense(y.view(shape)), Dense(z.view(shape)), [torch.arange(2), torch.tensor([2])])
        assert found.top1 is None
        assert (found.difference, found.relative) == pytest.approx((3 / 6, 3 / 6 / 2))
    cosines = [nn.functional.cosine_similarity(a, b, dim=0) for a, b in zip(y[:, 0], z[:, 0])]
    assert fidelity(Dense(y), Dense(z), [torch.arange(3)]).cosine == pytest.approx(sum(cosines).item() / 3)


def test_what_does_not_apply_is_none():
    tokens = Dense(torch.ones(3, 4, 2)), Dense(torch.ones(3, 2, 2))
    found = fidelity(*tokens, [torch.arange(3)])
    assert found == (3, None, pytest.approx(1.0), None, None, None), "all alike, and other numbers of tokens"
    nothing = Dense(torch.zeros(3, 4, 2)), Dense(torch.ones(3, 4, 2))
    assert fidelity(*nothing, [torch.arange(3)])[4:] == (1.0, None)
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    wider = Dense(rows), Dense(rows[:, :2] + 1)
    found = fidelity(*wider, [IMAGES])
    assert found.top1 is None and found.cosine is None and found.neighbours is not None


# ---- models


def test_nothing_reduced_is_no_difference():
    for model in (small(), small(num_classes=0, global_pool="")):
        found = fidelity(model, copy.deepcopy(model), [images()])
        assert found.cosine == pytest.approx(1, abs=1e-12) and found.neighbours == pytest.approx(1, abs=1e-12)
        assert found.top1 == 1.0 or found[4:] == (0.0, 0.0)
        assert (found.top1 is None) is (found.difference is not None)


def test_what_is_permuted_agrees_less():
    dense, reduced = small(), small()
    with torch.no_grad():
        reduced.head.weight.copy_(dense.head.weight.roll(1, dims=0))
    found = fidelity(dense, reduced, [images(20)])
    assert found.top1 < 1 and found.cosine == pytest.approx(1) and found.neighbours == pytest.approx(1)
    reduced = small()
    with torch.no_grad():
        for parameter in (reduced.norm.weight, reduced.norm.bias):
            parameter.uniform_(-1, 1)
    found = fidelity(dense, reduced, [images(20)])
    assert found.cosine < 0.9 and found.neighbours < 0.99


def test_more_merged_is_less_kept():
    dense = small()
    with torch.no_grad():
        for block in dense.blocks:  # tokens that differ
            block.attn.qkv.weight.mul_(20)
    levels = {r: tokenops.apply_patch(copy.deepcopy(dense), "tome", r=r) for r in (0, 2, 5)}
    found = fidelities(dense, levels, [images(16)])
    assert found[0].cosine == pytest.approx(1, abs=1e-6) and found[0].neighbours == pytest.approx(1, abs=1e-3)
    assert 1 - 1e-4 > found[2].cosine > found[5].cosine
    assert 1 - 1e-2 > found[2].neighbours > found[5].neighbours
    assert found[2] == pytest.approx(fidelity(dense, levels[2], [images(16)]))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", dict(global_pool="avg")),
        ("vit_tiny_patch16_224", dict(num_classes=0)),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_the_embedding_is_what_timm_calls_pre_logits(name, kwargs):
    model = timm.create_model(name, **{**dict(img_size=64, depth=2, num_classes=5), **kwargs}).eval()
    x = images(2)
    with torch.no_grad(), asked(model, None) as ask:
        answer = ask(x)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(answer.embedding, expected)
    assert answer.logits is ("num_classes" not in kwargs) and not any(m._forward_pre_hooks for m in model.modules())


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64)
    config = transformers.ViTConfig(**sizes, num_labels=5)
    x = images(3)
    model = transformers.ViTForImageClassification(config).eval()
    bare = {pool: transformers.ViTModel(config, add_pooling_layer=pool).eval() for pool in (False, True)}
    with torch.no_grad():
        with asked(model, None) as ask:
            answer = ask(x)
        torch.testing.assert_close(answer.embedding, model.vit(x).last_hidden_state[:, 0])
        assert answer.logits and answer.output.shape == (3, 5)
        for pool, tower in bare.items():
            with asked(tower, None) as ask:
                answer = ask(x)
            whole = tower(x)
            expected = whole.pooler_output if pool else whole.last_hidden_state.mean(dim=1)
            torch.testing.assert_close(answer.embedding, expected)
            assert not answer.logits and answer.output.shape == (3, 17, 48)
    reduced = tokenops.apply_patch(copy.deepcopy(model), "evit", keep_rate=0.5)
    found = fidelity(model, reduced, [x])
    assert found.cosine < 1 and found.top1 is not None and found.difference is None


def test_a_model_that_says_what_every_pixel_is():
    torch.manual_seed(0)
    dense = SegmentationModel(small(), (1, 2), 4)
    reduced = copy.deepcopy(dense)
    tokenops.apply_patch(reduced.backbone, "cait", points={0: "horizontal"})
    x = images(4)
    found = fidelity(dense, reduced, [x])
    with torch.no_grad():
        y, z = dense.eval()(x).double(), reduced.eval()(x).double()
    assert found.difference == pytest.approx((y - z).abs().mean().item()) and found.difference > 0
    assert found.relative == pytest.approx(((y - z).abs().mean() / y.abs().mean()).item())
    assert found.top1 is None and found.cosine < 1


def test_a_model_of_ones_own():
    """One channel, 32 pixels, within a module that knows nothing of timm, and a classifier of another name."""

    class Own(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.says = body, nn.Linear(48, 3)

        def forward(self, x):
            return self.says(self.body(x))

    torch.manual_seed(0)
    dense = Own(small(img_size=32, patch_size=4, in_chans=1, num_classes=0))
    reduced = copy.deepcopy(dense)
    tokenops.apply_patch(reduced.body, "tome", r=8)
    batches = [images(5, 32, 1), images(3, 32, 1)]
    found = fidelity(dense, reduced, batches, classifier="says")
    assert found.images == 8 and found.top1 is not None and 0 < found.cosine < 1
    assert fidelity(dense, reduced, batches).top1 is None, "that it has one, nobody says"
    with pytest.raises(ValueError, match="classifier='head', but the Own has no such module"):
        fidelity(dense, reduced, batches, classifier="head")


def test_modes_gradients_and_hooks_are_as_before():
    dense, reduced = small(proj_drop_rate=0.5).train(), tokenops.apply_patch(small(proj_drop_rate=0.5), "tome", r=2)
    reduced.train().blocks[1].eval()
    modes = [[module.training for module in model.modules()] for model in (dense, reduced)]
    first = fidelity(dense, reduced, [images()])
    assert first == fidelity(dense.eval(), reduced, [images()]), "dropout is off"
    dense.train()
    assert [[module.training for module in model.modules()] for model in (dense, reduced)] == modes
    assert all(p.grad is None for p in dense.parameters()) and torch.is_grad_enabled()
    with pytest.raises(AssertionError, match="Input height"):
        fidelity(dense, reduced, [images(size=48)])
    assert [[module.training for module in model.modules()] for model in (dense, reduced)] == modes
    assert not any(module._forward_pre_hooks for model in (dense, reduced) for module in model.modules())


def test_16_bits_and_autocast():
    dense = small()
    reduced = tokenops.apply_patch(copy.deepcopy(dense), "evit", keep_rate=0.5)
    exact = fidelity(dense, reduced, [images(16)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fidelity(dense, reduced, [images(16)])
    low = fidelity(dense.bfloat16(), reduced.bfloat16(), [images(16).bfloat16()])
    for found in (cast, low):
        assert found.cosine == pytest.approx(exact.cosine, abs=0.01) and found != exact


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    dense = small()
    reduced = tokenops.apply_patch(copy.deepcopy(dense), "tome", r=2)
    expected = fidelity(dense, reduced, [images(16)])
    found = fidelity(dense.cuda(), reduced.cuda(), [images(16)])
    assert found.cosine == pytest.approx(expected.cosine, abs=1e-4)
    assert found.neighbours == pytest.approx(expected.neighbours, abs=1e-2)


@pytest.mark.parametrize("batches", [[], [None], [torch.empty(0, dtype=torch.int64)]])
def test_no_image_is_an_error(batches):
    with pytest.raises(ValueError, match="batches has no image"):
        fidelity(Table(UNIT, UNIT), Table(UNIT, UNIT), batches)


def test_other_classes_are_an_error():
    with pytest.raises(ValueError, match="dense has 2 classes, but reduced 3"):
        fidelity(Table(UNIT, UNIT), Table(UNIT, [*UNIT, [1, 1]]), [torch.tensor([0, 1])])
