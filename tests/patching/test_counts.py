"""tokens_left says what hooks see, for every method and family."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from support.patched_models import (
    BEHIND,
    FAMILIES,
    METHODS,
    ROTARY,
    applied,
    images,
    model_of,
    tokens_behind,
)
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, tokens_left

EVERY = {
    **{method: options for method, (_, options) in METHODS.items()},
    "dps": dict(counts=[17, 9, 4], after=1),
    "random": dict(keep_rate=0.5, reduction_loc=(0, 2)),
}


#: those of a fixed grid are not for images of any size
GRID = ("patch_slimming", "dps", "sit", "cait")
PAIRS = [(method, family) for method in EVERY for family in FAMILIES if family != "dynamic" or method not in GRID]


@pytest.mark.parametrize("method, family", PAIRS)
def test_as_many_as_hooks_see(method, family):
    model = model_of(family)
    dense = tokens_left(model, 32)
    assert list(dense.layers) == tokens_behind(model, images()) == [dense.output] * 3
    apply_patch(model, method, **EVERY[method])
    left = tokens_left(model, (32, 32))
    assert list(left.layers) == tokens_behind(model, images()) and left.output == left.layers[-1]
    if family == "average" and method in BEHIND and method != "tome":  # which gives every patch a token again
        assert list(left.layers) == BEHIND[method]
    assert tokens_left(remove_patch(model), 32) == dense


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("method", METHODS)
def test_as_many_as_hooks_see_with_rotary_positions(method, family):
    model = apply_patch(model_of(family), method, **METHODS[method][1])
    assert list(tokens_left(model).layers) == tokens_behind(model, images())


#: odd numbers of patches, merges of more than there are, stages of one block, schedules and stages that end at once
ODD = [
    ("tome", dict(r=40)),
    ("tome", dict(r=(4, -1), unmerge=False)),
    ("tome", dict(r=[0, 5, 0], unmerge=True)),
    ("evit", dict(keep_rate=[0.9, 1, 0.01])),
    ("evit", dict(keep_rate=0.34, reduction_loc=(1,), fuse_token=False)),
    ("evo_vit", dict(prune_ratio=0.34, stages=(1, 2))),
    ("evo_vit", dict(prune_ratio=0.5, stages=(1,), stage_wise=False)),
    ("patch_slimming", dict(schedule=[16, 16, 1])),
    ("dps", dict(counts=[16, 3, 2], after=0)),
    ("sit", dict(keeping_ratio=0.3, locations=(0, 2))),
    ("cait", dict(points={0: "vertical", 1: "horizontal", 2: "vertical"})),
    ("random", dict(keep_rate=0.34, reduction_loc=(0, 1, 2), fuse_token=True)),
    ("random", dict(r=5)),
]


@pytest.mark.parametrize("method, options", ODD, ids=[f"{m}-{i}" for i, (m, _) in enumerate(ODD)])
def test_odd_numbers_of_patches(method, options):
    """5 x 3 patches."""
    torch.manual_seed(0)
    sizes = dict(img_size=(40, 24), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    model = apply_patch(redrawn(VisionTransformer(**sizes)), method, **options)
    left = tokens_left(model)
    assert left.layers[0] <= 16 and min(left.layers) < 16 or method == "evo_vit"
    assert list(left.layers) == tokens_behind(model, torch.randn(1, 3, 40, 24))


def test_within_a_stage_those_that_pass_through():
    model = apply_patch(model_of("plain"), "evo_vit", prune_ratio=0.5, stages=(1,))
    assert tokens_left(model) == ((17, 9, 17), 17)
    assert tokens_behind(model, images()) == [17, 9, 17]
    model.stage_wise = False
    assert list(tokens_left(model).layers) == tokens_behind(model, images()) == [17, 17, 17]


def test_it_follows_what_is_set_and_the_size_of_the_images():
    model = apply_patch(model_of("dynamic"), "tome", r=3)
    for r, size in ((3, 32), (2, (48, 24)), (9, (8, 40))):
        model.r = r
        side = (size, size) if isinstance(size, int) else size
        assert list(tokens_left(model, size).layers) == tokens_behind(model, torch.randn(1, 3, *side))
    model.prune_intermediate_layers([1])
    assert len(tokens_left(model, 32).layers) == 2


def test_sizes_that_are_refused():
    plain, dynamic = model_of("plain"), model_of("dynamic")
    bare = model_of("dynamic")
    bare.patch_embed.img_size = None
    with pytest.raises(ValueError, match="image_size must be given"):
        tokens_left(bare)
    with pytest.raises(ValueError, match="it gives 4 x 6 patches, and the model is made for 4 x 4"):
        tokens_left(plain, (32, 48))
    with pytest.raises(ValueError, match="multiple of the patches' 8 x 8"):
        tokens_left(dynamic, 36)
    with pytest.raises(ValueError, match="less than one patch"):
        tokens_left(dynamic, 4)
    for size in (0, (32, -8)):
        with pytest.raises(ValueError, match="must be at least 1"):
            tokens_left(dynamic, size)
    for size in (True, 32.0, (32,), "32"):
        with pytest.raises(TypeError, match="image_size=.* but it must be a number of pixels, or two"):
            tokens_left(dynamic, size)
    with pytest.raises(TypeError, match="no vision transformer"):
        tokens_left(torch.nn.Linear(2, 2))


def test_a_method_that_does_not_say_is_named():
    from tokenops.patching import Flow, Method, Role

    class Last(Role):
        idle = False

        def run(self, block, flow, rope, record):
            return Flow(flow.tokens, None)

    class Nothing(Method):
        def roles(self, site):
            return [Last(site.prefix, False)] * site.depth

    model = apply_patch(model_of("plain"), Nothing())
    with pytest.raises(NotImplementedError, match="Last does not say how many tokens it leaves: define left"):
        tokens_left(model)


def test_it_runs_nothing_and_needs_no_weights():
    with torch.device("meta"):
        model = partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)()
    assert tokens_left(applied(model, "evit")).layers == tokens_left(applied(model_of("plain"), "evit")).layers


HF = {
    "Dinov2WithRegisters": {},
    "DeiT": {},
    "IJepa": {},
    "InternVLVision": dict(image_size=(32, 32), patch_size=(8, 8)),
    "SiglipVision": {},
    "ViTMAE": {},
    "VideoMAE": dict(num_frames=4),
    "Vivit": dict(num_frames=4, tubelet_size=[2, 8, 8]),
    "AST": dict(num_mel_bins=32, max_length=40),
    "Yolos": dict(num_detection_tokens=5, image_size=(32, 32), use_mid_position_embeddings=False),
}


@pytest.mark.parametrize("kind", HF)
def test_as_many_as_hooks_see_in_transformers_models(kind):
    """Videos have patches of several frames, MAE's encoder a quarter, YOLOS tokens that detect, sounds a grid."""
    transformers = pytest.importorskip("transformers")
    from support.hf_models import SIZES

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **HF[kind]})
    model = redrawn(getattr(transformers, f"{kind}Model")(config))
    x = images() if kind != "AST" else torch.randn(2, 40, 32)
    x = x[:, None].expand(-1, 4, -1, -1, -1) if "num_frames" in HF[kind] else x
    assert list(tokens_left(model).layers) == tokens_behind(model, x)
    for method in ("tome", "evit", "evo_vit"):
        apply_patch(model, method, **EVERY[method])
        assert list(tokens_left(model).layers) == tokens_behind(model, x)
        remove_patch(model)


def test_transformers_models_interpolate_but_methods_for_one_grid_do_not():
    transformers = pytest.importorskip("transformers")
    from support.hf_models import model_of as hf_model

    model, x = hf_model("vit"), torch.randn(1, 3, 48, 20)
    apply_patch(model, "evit", keep_rate=0.5)
    given = dict(interpolate_pos_encoding=True)
    assert list(tokens_left(model, (48, 20)).layers) == tokens_behind(model, x, **given) == [8, 6, 5]
    apply_patch(remove_patch(model), "cait", points={0: "vertical"})
    with pytest.raises(ValueError, match="it gives 6 x 2 patches, and the method was fitted for 4 x 4"):
        tokens_left(model, (48, 20))
    rows = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(hidden_size=48, num_hidden_layers=1))
    with pytest.raises(ValueError, match="Siglip2VisionModel takes patches as rows, so .* does not say how many"):
        tokens_left(rows, 32)
