"""CAIT's losses, merged token labels, dense prediction."""

import copy
import doctest

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, jaccard_score

from tokenops import apply_patch, trace
from tokenops.methods.cait import losses, segmentation
from tokenops.methods.cait.losses import distillation_loss, merge_token_labels
from tokenops.methods.cait.merging import unmerge_tokens
from tokenops.methods.cait.segmentation import SegmentationModel, confusion, feature_maps, mean_iou
from tokenops.methods.lvvit import lv_vit


def vit(size=(32, 32), **kwargs):
    """4 blocks of 2 heads with 16 channels, on patches of 4 x 4."""
    arguments = dict(img_size=size, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    return timm.models.VisionTransformer(**{**arguments, **kwargs}).eval()


def lvvit():
    return lv_vit(img_size=64, num_classes=5, embed_dim=32, depth=4, num_heads=2, mlp_ratio=3.0, qkv_bias=False).eval()


def test_doctests():
    for module in (segmentation, losses):
        assert doctest.testmod(module).failed == 0


# ---- distillation


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)], ids=["images", "pixels"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "mixup"])
def test_distillation_loss_is_the_formula(shape, soft):
    student, teacher = (torch.randn(shape, dtype=torch.float64) * 2 for _ in range(2))
    target = torch.randint(0, 5, shape[:1] + shape[2:])
    probabilities = F.one_hot(target, 5).movedim(-1, 1).double()
    if soft:
        target = probabilities = torch.randn(shape, dtype=torch.float64).softmax(1)
    smoothed = 0.9 * probabilities + 0.1 / 5
    expected = -(smoothed * student.log_softmax(1)).sum(1).mean()
    p, q = (teacher / 2.5).softmax(1), (student / 2.5).softmax(1)
    expected += 0.7 * 2.5**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, target, 0.7, 2.5), expected)


def test_distillation_from_itself_is_cross_entropy_and_the_teacher_gets_no_gradient():
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 4, 2])
    plain = F.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(distillation_loss(logits, logits.detach(), target), plain)
    torch.testing.assert_close(distillation_loss(logits, None, target), plain)
    teacher = torch.randn(4, 5, requires_grad=True)
    distillation_loss(logits, teacher, target).backward()
    assert teacher.grad is None and logits.grad is not None


def test_distillation_loss_says_what_is_wrong():
    logits, target = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature=0"):
        distillation_loss(logits, logits, target, temperature=0)
    with pytest.raises(ValueError, match=r"teacher has shape \(4, 3\), but student \(4, 5\)"):
        distillation_loss(logits, logits[:, :3], target)


# ---- token labels


@pytest.mark.parametrize("layout", ["raster", "block"])
@pytest.mark.parametrize("merges", [1, 2, 3])
def test_token_labels_are_the_means_of_what_was_merged(layout, merges):
    """With the patch's own number as its label, a token's label says which patches are in it, and how much."""
    points = dict(list({0: "horizontal", 1: "vertical", 2: "horizontal"}.items())[:merges])
    model = apply_patch(vit(), "cait", points=points, layout=layout)
    labels = merge_token_labels(torch.eye(64)[None], model)
    assert labels.shape == (1, 64 // 2**merges, 64)
    of_patch = unmerge_tokens(model, labels, 3, prefix=0)[0]
    number = trace(model, torch.zeros(1, 3, 32, 32)).steps[-1].sources[0]
    torch.testing.assert_close(of_patch, (number[:, None] == number).float() / 2**merges)


def test_token_labels_on_an_odd_grid_follow_the_tokens():
    model = apply_patch(vit((20, 12)), "cait", points={0: "horizontal", 1: "vertical"})
    labels = merge_token_labels(torch.eye(15)[None], model)[0]
    number = trace(model, torch.zeros(1, 3, 20, 12)).steps[-1].sources[0]
    expected = torch.stack([(number == i).float() for i in range(6)])
    torch.testing.assert_close(labels, expected / expected.sum(1, keepdim=True))


def test_token_labels_of_a_dense_model_stay_and_wrong_ones_are_refused():
    labels = torch.rand(2, 64, 3)
    assert merge_token_labels(labels, vit()) is labels
    with pytest.raises(ValueError, match=r"labels must be \(B, 64, K\), but got \(2, 63, 3\)"):
        merge_token_labels(labels[:, 1:], vit())


# ---- dense prediction


@pytest.mark.parametrize("make", [vit, lvvit])
def test_maps_of_a_dense_model_are_its_intermediates(make):
    model = make()
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    for ours, theirs in zip(feature_maps(model, x, (1, 3)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", [vit, lvvit])
@pytest.mark.parametrize("mode", ["repeat", "bilinear"])
def test_maps_are_on_the_patch_grid_whatever_the_layout(make, mode):
    """Attention does not see the order of tokens, so both layouts must give the same maps."""
    raster, block = make(), None
    with torch.no_grad():
        for parameter in raster.parameters():  # otherwise patches hardly differ
            parameter.add_(0.3 * torch.randn_like(parameter))
    block = apply_patch(copy.deepcopy(raster), "cait", layout="block")
    apply_patch(raster, "cait")
    x = torch.randn(2, 3, *raster.patch_embed.img_size)
    maps = feature_maps(raster, x, (0, 1, 2, 3), mode)
    assert maps[0].std(dim=(2, 3)).mean() > 0.1
    for ours, theirs in zip(maps, feature_maps(block, x, (0, 1, 2, 3), mode), strict=True):
        assert ours.shape == (2, 32, *raster.patch_embed.grid_size)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if mode == "repeat":  # behind block 0 columns are merged, behind block 2 rows as well
        torch.testing.assert_close(maps[0][..., 0::2], maps[0][..., 1::2])
        torch.testing.assert_close(maps[3][:, :, 0::2, 0::2], maps[3][:, :, 1::2, 1::2])
        assert not torch.allclose(maps[1][:, :, 0::2], maps[1][:, :, 1::2])


@pytest.mark.parametrize("blocks", [(), (2, 1), (1, 1), (-1, 0), (0, 4)])
def test_maps_of_blocks_that_are_not_there(blocks):
    with pytest.raises(ValueError, match="increasing numbers from 0 to 3"):
        feature_maps(vit(), torch.randn(1, 3, 32, 32), blocks)


def test_the_head_learns_where_things_are():
    """Each half of a pixel-wise task with detail finer than a patch; and the head goes on with another backbone."""
    backbone = apply_patch(vit(num_classes=0), "cait", points={1: "horizontal", 2: "vertical"})
    model = SegmentationModel(backbone, (0, 3), 3, width=16, detail=4)
    images = torch.randn(4, 3, 32, 32)
    labels = (images.mean(1) > 0).long() + (torch.arange(32) < 9)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {"backbone.norm.weight", "backbone.norm.bias"}
    model.backbone = vit(num_classes=0)
    assert model(images).shape == (4, 3, 32, 32)


def test_iou_is_that_of_sklearn():
    labels, predicted = torch.randint(0, 4, (2, 3, 20, 20))
    ignored = labels.clone()
    ignored[0, 0] = 255
    counts = confusion(predicted, labels, 5)
    assert torch.equal(counts, torch.tensor(confusion_matrix(labels.flatten(), predicted.flatten(), labels=range(5))))
    assert confusion(predicted, ignored, 5).sum() == labels.numel() - 20
    each, mean = mean_iou(counts)
    expected = jaccard_score(labels.flatten(), predicted.flatten(), average=None)
    torch.testing.assert_close(each[:4], torch.tensor(expected))
    assert each[4].isnan() and mean == pytest.approx(expected.mean())
