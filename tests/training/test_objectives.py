"""Every objective is the formula of its paper, trains what it should and leaves teachers alone."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from support.weights import spread

pytest.importorskip("accelerate")

from tokenops import apply_patch  # noqa: E402
from tokenops.methods import patch_slimming  # noqa: E402
from tokenops.nn import ReverseTokenSlimming, TokenSlimming  # noqa: E402
from tokenops.patching.site import Site  # noqa: E402
from tokenops.patching.views import patches_behind  # noqa: E402
from tokenops.training import (  # noqa: E402
    FeatureRecalibration,
    PatchRanking,
    Plain,
    ShrinkingKeepRate,
    SlowFast,
)

SIZE = dict(embed_dim=32, num_heads=2, img_size=64, num_classes=5)
LEVIT = dict(img_size=64, num_classes=5, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(3, 1, 1))


def make(name, **kwargs):
    return spread(timm.create_model(name, **{**SIZE, **kwargs}))


def sit():
    return make("sit_lvvit_tiny", stage_blocks=(1, 1, 2))


def lvvit():
    return make("lvvit_tiny", depth=4)


def evit(**kwargs):
    return make("evit_deit_tiny_patch16_224", depth=4, reduction_loc=(1, 2), keep_rate=0.5, **kwargs)


def deit(**kwargs):
    return make("deit_tiny_patch16_224", depth=4, **kwargs)


class Cnn(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 8, 9, 8), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 5))


@pytest.fixture
def batch():
    return torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 4])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def smoothed(target, smoothing, classes=5):
    return F.one_hot(target, classes) * (1 - smoothing) + smoothing / classes


def cross_entropy(logits, probabilities):
    return -(probabilities * logits.log_softmax(1)).sum(1).mean()


def divergence(teacher, student):
    p = teacher.softmax(1)
    return (p * (p.log() - student.softmax(1).log())).sum(1).mean()


def test_plain_is_smoothed_cross_entropy(batch):
    model = deit()
    loss, _ = Plain(model, smoothing=0.2)(*batch)
    close(loss, cross_entropy(model(batch[0]), smoothed(batch[1], 0.2)))


def test_probabilities_are_not_smoothed_again(batch):
    model, target = deit(), torch.rand(3, 5).softmax(1)
    loss, _ = Plain(model, smoothing=0.2)(batch[0], target)
    close(loss, cross_entropy(model(batch[0]), target))


def test_plain_distils(batch):
    model, teacher = deit(), deit()
    loss, _ = Plain(model, teacher=teacher, distillation=0.7, temperature=2.0)(*batch)
    s, t = model(batch[0]), teacher(batch[0])
    close(loss, cross_entropy(s, F.one_hot(batch[1], 5)) + 0.7 * 4 * divergence(t / 2, s / 2))


def test_recalibration_of_a_sit(batch):
    student, teacher = sit(), lvvit()
    objective = FeatureRecalibration(student, teacher, smoothing=0.1, temperature=3.0)
    loss, parts = objective(*batch)
    x, y = (m._pos_embed(m.patch_embed(batch[0])) for m in (student, teacher))
    token = 0
    for i, (block, other) in enumerate(zip(student.blocks, teacher.blocks)):
        x, y = block(x), other(y)
        z = x if i >= 2 else student.blocks[i + 1].slimming(x, prefix=1)  # which the next block gets
        token = token + (objective.rtsm[i](z[:, 1:]) - y[:, 1:]).square().mean() / 4
    s, t = student.head(student.norm(x)[:, 0]), teacher.head(teacher.norm(y)[:, 0])
    cls, logits = cross_entropy(s, smoothed(batch[1], 0.1)), 9 * divergence(t / 3, s / 3)
    close(loss, cls + 2 * token + 2 * logits)
    for name, value in {"cls": cls, "token": token, "logits": logits}.items():
        close(parts[name], value.detach())


def test_recalibration_of_any_model_whose_tokens_get_fewer(batch):
    student, teacher = evit().train(), deit()
    student.norm.eval()
    mode = [m.training for m in student.modules()]
    objective = FeatureRecalibration(student, teacher, smoothing=0)
    assert [m.training for m in student.modules()] == mode
    assert [type(m) is ReverseTokenSlimming for m in objective.rtsm] == [False, True, True, True]
    x, y = (m.norm_pre(m._pos_embed(m.patch_embed(batch[0]))) for m in (student, teacher))
    token = 0
    for i, other in enumerate(teacher.blocks):
        x, y = student.blocks[i](x), other(y)
        token = token + (objective.rtsm[i](x[:, 1:]) - y[:, 1:]).square().mean() / 4
    s, t = student.head(student.norm(x)[:, 0]), teacher.head(teacher.norm(y)[:, 0])
    loss, _ = objective(*batch)
    close(loss, F.cross_entropy(s, batch[1]) + 2 * token + 2 * divergence(t, s))


def test_a_cnn_teaches_the_distillation_head(batch):
    student, cnn = make("deit_tiny_distilled_patch16_224", depth=2), Cnn()
    teacher = copy.deepcopy(student)
    objective = FeatureRecalibration(student, teacher, smoothing=0, cnn_teacher=cnn).train()
    loss, parts = objective(*batch)
    s, distilled = student(batch[0])
    t = teacher(batch[0])
    hard = F.cross_entropy(distilled, cnn(batch[0]).argmax(1))
    close(parts["hard"], hard.detach())
    close(loss, F.cross_entropy(s, batch[1]) + 2 * parts["token"] + 2 * divergence(t, s) + hard)
    loss.backward()
    assert student.head_dist.weight.grad.abs().sum() > 0


def test_evo_vit_halves_its_two_heads(batch):
    model = make("evo_deit_tiny_patch16_224", depth=6)
    objective = SlowFast(model, smoothing=0.1)
    spread(objective.norm_cls)
    loss, _ = objective(*batch)
    pooled, cls = model(batch[0]), objective.head_cls(objective.norm_cls(model.forward_features(batch[0])[:, 0]))
    assert not torch.allclose(pooled, cls)
    target = smoothed(batch[1], 0.1)
    close(loss, cross_entropy(pooled, target) / 2 + cross_entropy(cls, target) / 2)


def test_evo_levit_learns_its_teachers_classes(batch):
    model, teacher = spread(timm.create_model("evo_levit_128s", **LEVIT)).train(), Cnn()
    loss, _ = SlowFast(model, teacher=teacher)(*batch)
    mean, mean_dist, cls, cls_dist = model(batch[0])
    taught = teacher(batch[0]).argmax(1)
    labels = (F.cross_entropy(mean, batch[1]) + F.cross_entropy(cls, batch[1])) / 2
    close(loss, labels / 2 + (F.cross_entropy(mean_dist, taught) + F.cross_entropy(cls_dist, taught)) / 4)


def test_evo_vit_is_layer_wise_for_two_thirds():
    model = timm.create_model("evo_levit_128s", **LEVIT)
    objective, seen = SlowFast(model), []
    for epoch in range(6):
        objective.begin_epoch(epoch, 6)
        seen.append((model.stage_wise, model.learn_tradeoff))
        assert objective.final is model.stage_wise
    assert seen == [(False, False)] * 4 + [(True, True)] * 2
    for epochs in (1, 2):  # two thirds end behind the beginning of the last
        objective.begin_epoch(epochs - 1, epochs)
        assert model.stage_wise and model.learn_tradeoff and objective.final


def test_keep_rate_shrinks():
    model = evit()
    objective, seen = ShrinkingKeepRate(model, start=0.2, end=0.6), []
    for epoch in range(10):
        objective.begin_epoch(epoch, 10)
        assert model.blocks[0].tokenops_role.part == model.blocks[3].tokenops_role.part == 1
        seen.append(model.blocks[1].tokenops_role.part)
        assert objective.final is (epoch >= 6)
    between = [0.5 + 0.5 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert seen == pytest.approx([1, 1, *between, 0.5, 0.5, 0.5, 0.5])


def test_keep_rate_of_a_patched_model_shrinks(batch):
    model = apply_patch(deit(), "evit", keep_rate=0.5)
    objective, seen = ShrinkingKeepRate(model, start=0, end=1), []
    for epoch in range(3):
        objective.begin_epoch(epoch, 3)
        seen.append(model.keep_rate)
    assert seen == pytest.approx([1, 0.75, 0.5])


def test_keep_rates_of_blocks_shrink_each_to_its_own():
    model = apply_patch(deit(), "evit", keep_rate=[0.5, 1, 0.25, 1])
    objective, seen = ShrinkingKeepRate(model, start=0, end=1), []
    for epoch in range(3):
        objective.begin_epoch(epoch, 3)
        seen.append([block.tokenops_role.part for block in model.blocks])
    assert seen == [[1, 1, 1, 1], pytest.approx([0.75, 1, 0.625, 1]), [0.5, 1, 0.25, 1]] and objective.final


def test_recalibration_of_images_of_other_channels():
    grey = dict(in_chans=1, stem="linear")
    objective = FeatureRecalibration(
        make("sit_deit_tiny", stage_blocks=(1, 1, 2), **grey), make("lvvit_tiny", depth=4, **grey, mlp_ratio=4.0)
    )
    loss, _ = objective(torch.randn(2, 1, 64, 64), torch.tensor([0, 3]))
    assert loss.isfinite() and [type(m).__name__ for m in objective.rtsm].count("ReverseTokenSlimming") == 4


@pytest.mark.parametrize("epochs, start, end", [(1, 0.1, 0.35), (2, 0.8, 1.0), (3, 0.0, 1.0)])
def test_keep_rate_has_shrunk_in_the_last_epoch(epochs, start, end):
    objective = ShrinkingKeepRate(evit(), start=start, end=end)
    objective.begin_epoch(epochs - 1, epochs)
    assert objective.model.blocks[1].tokenops_role.part == 0.5 and objective.final
    if epochs > 1:
        objective.begin_epoch(0, epochs)
        assert objective.model.blocks[1].tokenops_role.part == 1 and not objective.final


@pytest.mark.parametrize(
    "method, options, left",
    [
        ("sit", dict(keeping_ratio=0.5), (8, 4, 2, 2)),  # as the next block gets them
        ("tome", dict(r=4), (12, 8, 4, 2)),
        ("evit", dict(keep_rate=0.5), (16, 9, 6, 4)),
    ],
)
def test_recalibration_of_a_patched_model(method, options, left, batch):
    teacher = deit()
    student = apply_patch(copy.deepcopy(teacher), method, **options)
    objective = FeatureRecalibration(student, teacher, smoothing=0).train()
    found = [m.mlp1.fc1.in_features if isinstance(m, ReverseTokenSlimming) else 16 for m in objective.rtsm]
    assert found == list(left)
    loss, parts = objective(*batch)
    with patches_behind(Site(student)) as ours, patches_behind(Site(teacher)) as theirs:
        s, t = student(batch[0]), teacher(batch[0])
    pairs = zip(objective.rtsm, ours, theirs)
    token = sum((reverse(x) - y).square().mean() for reverse, x, y in pairs) / 4
    close(loss, F.cross_entropy(s, batch[1]) + 2 * token + 2 * divergence(t, s))
    loss.backward()
    assert all(p.grad.any() for module in objective.rtsm for p in module.parameters())
    assert all(m.scale.grad.any() for m in student.modules() if isinstance(m, TokenSlimming))
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_a_teacher_stays_in_evaluation_mode(batch):
    student, teacher = deit(), deit(drop_rate=0.5)
    objective = Plain(student, teacher=teacher, distillation=1.0).train()
    expected = objective(*batch)[0]
    teacher.train()
    close(objective(*batch)[0], expected)


def test_ranking(batch):
    teacher = deit()
    student = apply_patch(copy.deepcopy(teacher), "dps", counts=[17, 9, 5, 3], after=1)
    loss, _ = PatchRanking(student, teacher, ranking=0.3)(*batch)
    logits, scores = patch_slimming.scored(student, batch[0])
    lifespan = patch_slimming.teacher_lifespans(teacher, batch[0], [17, 9, 5, 3])
    pairs = [
        F.softplus(s[j] - s[i])
        for s, life in zip(scores, lifespan)
        for i in range(16)
        for j in range(16)
        if life[i] > life[j]
    ]
    close(loss, F.cross_entropy(logits, batch[1]) + 0.3 * torch.stack(pairs).mean())


CASES = {
    "plain": lambda: Plain(deit(), teacher=deit()),
    "frd": lambda: FeatureRecalibration(sit(), lvvit()),
    "frd, hooks": lambda: FeatureRecalibration(evit(), deit()),
    "evit": lambda: ShrinkingKeepRate(evit()),
    "evo_vit": lambda: SlowFast(make("evo_deit_tiny_patch16_224", depth=6)),
    "dps": lambda: (lambda t: PatchRanking(apply_patch(copy.deepcopy(t), "dps", counts=[17, 9, 5, 3], after=1), t))(
        deit()
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_everything_learns_but_teachers(name, batch):
    objective = CASES[name]().train()
    loss, _ = objective(*batch)
    loss.backward()
    still = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # the bias of TSM's slots is cancelled by its softmax
    assert {n for n in still if not n.endswith("weight.3.bias")} == set()
    grouped = [p for group in objective.parameter_groups(1e-3, 0.05) for p in group["params"]]
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) and {id(p) for p in grouped} == {id(p) for p in trained}
    for teacher in objective._teachers:
        assert not any(m.training for m in teacher.modules())
        for p in teacher.parameters():
            assert p.grad is None
            assert all(p is not mine for mine in objective.parameters())
    teachers = sum(len(t.state_dict()) for t in objective._teachers)
    assert teachers == 0 or len(objective.state_dict()) < len(objective.model.state_dict()) + teachers
    assert all(n.startswith(("model.", "rtsm.", "norm_cls.", "head_cls.")) for n in objective.state_dict())


def test_teachers_follow_to_a_dtype():
    objective = Plain(deit(), teacher=deit()).double()
    assert {p.dtype for p in objective._teachers[0].parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ("frd", "frd, hooks"))
def test_recalibration_groups(name):
    objective = CASES[name]()
    groups = objective.parameter_groups(1e-3, 0.05)
    of = {id(p): group for group in groups for p in group["params"]}
    for module in objective.modules():
        if isinstance(module, ReverseTokenSlimming):
            for p in module.parameters():
                assert of[id(p)]["lr"] == 5e-3 and of[id(p)]["lr_scale"] == 5 and of[id(p)]["weight_decay"] == 0.05
        if isinstance(module, TokenSlimming):
            assert module.scale.ndim == 3 and of[id(module.scale)]["weight_decay"] == 0.05
            assert of[id(module.scale)]["lr"] == 1e-3 and of[id(module.weight[3].bias)]["weight_decay"] == 0
    model = objective.model
    for p in (model.cls_token, model.pos_embed, model.head.bias, model.norm.weight):
        assert of[id(p)]["weight_decay"] == 0 and of[id(p)]["lr_scale"] == 1
    assert of[id(model.head.weight)]["weight_decay"] == 0.05


@pytest.mark.parametrize(
    "make_it, error, what",
    [
        (lambda: Plain(deit(), smoothing=1.0), ValueError, "smoothing=1.0"),
        (lambda: FeatureRecalibration(sit(), make("lvvit_tiny", depth=3)), ValueError, "3 blocks"),
        (lambda: FeatureRecalibration(sit(), make("lvvit_tiny", depth=4, embed_dim=64)), ValueError, "64 channels"),
        (lambda: FeatureRecalibration(deit(), evit()), ValueError, "16 patch tokens behind block 1"),
        (lambda: SlowFast(deit()), TypeError, "stage_wise"),
        (lambda: SlowFast(make("evo_deit_tiny_patch16_224", depth=6), teacher=deit()), ValueError, "teacher"),
        (
            lambda: SlowFast(
                apply_patch(deit(class_token=False, global_pool="avg", fc_norm=True), "evo_vit", stages=(1,))
            ),
            ValueError,
            "must have a class token",
        ),
        (lambda: ShrinkingKeepRate(deit()), TypeError, "keep rate"),
        (lambda: PatchRanking(deit(), deit()), TypeError, "scorer"),
    ],
)
def test_refuses(make_it, error, what):
    with pytest.raises(error, match=what):
        make_it()


def test_recalibration_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_labels=5)
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 32, 32)
    with patches_behind(Site(model)) as tokens:
        output = model(images)
    for mine, theirs in zip(tokens, model(images, output_hidden_states=True).hidden_states[1:], strict=True):
        close(mine, theirs[:, 1:])
    teacher = copy.deepcopy(model)
    loss, parts = FeatureRecalibration(model, teacher, smoothing=0)(images, torch.tensor([0, 1]))
    close(loss, F.cross_entropy(output.logits, torch.tensor([0, 1])))


def test_a_teacher_whose_blocks_are_not_known_is_refused_by_name():
    with pytest.raises(TypeError, match="FeatureRecalibration: the teacher must be a model that apply_patch takes"):
        FeatureRecalibration(sit(), torch.nn.Linear(2, 2))
