"""What all models by name have in common: they compile, checkpoint, run in half precision, copy, pickle and train."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from support import cait_merging, sit_models
from support.models import (
    SMALL,
    all_close,
    close,
    gradients,
    images,
    meta,
    operators_between,
    small,
    train_a_little,
    train_still,
)
from support.weights import spread
from tokenops import apply_patch
from tokenops.methods import models
from tokenops.methods.cait import Merge, Structure, prunable
from tokenops.methods.patch_slimming import Schedule

COUNTS = (14, 6, 1)
SCHEDULE = Schedule.from_counts(COUNTS, (4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist())
MERGES = Structure((Merge(0, "horizontal"), Merge(1, "vertical")))
#: three blocks, every one of which that may do something does
NAMED = {
    "evit": ("evit_deit_tiny_patch16_224", dict(reduction_loc=(0, 1))),
    "evo_vit": ("evo_deit_tiny_patch16_224", dict(stages=(1, 2))),
    "evo_vit, layer-wise": ("evo_deit_tiny_patch16_224", dict(stages=(1, 2), stage_wise=False)),
    "sit": ("sit_lvvit_tiny", dict(stage_blocks=(1, 1, 1))),
    "patch_slimming": ("ps_deit_tiny_patch16_224", dict(schedule=SCHEDULE)),
    "dps": ("dps_deit_tiny_patch16_224", dict(counts=(17, 6, 1), after=1)),
    "cait": ("cait_lvvit_tiny", dict(structure=MERGES)),
}
evit = partial(small, "evit_deit_tiny_patch16_224")
evo_vit = partial(small, "evo_deit_tiny_patch16_224")
OPTIONS = dict(SMALL, drop_path_rate=0.5)
#: merges of other weights and layouts
MERGED = {"scalar": "raster", "channel": "raster", "linear": "block", "content": "block"}
#: whose tokens hang on scores, which rounding changes
CHOOSING = ("evit", "evo_vit", "evo_vit, layer-wise", "dps")
EVERY = pytest.mark.parametrize("name", [*NAMED, *MERGED])


def model_of(name):
    if name in MERGED:
        model = prunable(timm.create_model("deit_tiny_patch16_224", depth=3, **OPTIONS))
        merges = dict(points={0: "horizontal", 1: "vertical"}, kind=name, layout=MERGED[name])
        return spread(apply_patch(model, "cait", **merges)).eval()
    known, options = NAMED[name]
    depth = {} if "stage_blocks" in options else {"depth": 3}
    return spread(timm.create_model(known, **depth, **OPTIONS, **options)).eval()


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("train", [False, True])
def test_compiles_whole(name, train):
    model = train_still(model_of(name)) if train else model_of(name)
    for module in model.modules():
        module.drop_prob = 0.0  # of the paths
    x, more = images(model), images(model, 5)
    torch._dynamo.reset()
    if train:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = gradients(model, model(x).square().mean())
        all_close(gradients(model, compiled(x).square().mean()), expected)
    else:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.inference_mode():
            close(compiled(x), model(x))
            with torch.compiler.set_stance("fail_on_recompile"):
                close(compiled(more), model(more))


@EVERY
def test_gradient_checkpointing_changes_nothing_and_recomputes(name):
    model, calls = train_still(model_of(name)), []
    x = images(model)
    model.blocks[2].mlp.fc1.register_forward_pre_hook(lambda *_: calls.append(1))

    def run():
        torch.manual_seed(1)
        loss = model(x).square().mean()
        return loss, gradients(model, loss)

    loss, grads = run()
    assert len(calls) == 1
    model.set_grad_checkpointing()
    again, checkpointed = run()
    assert len(calls) == 3 and torch.equal(loss, again)
    all_close(checkpointed, grads)
    torch.manual_seed(2)
    assert not torch.equal(model(x).square().mean(), again) and torch.equal(model.eval()(x), model(x))


@pytest.mark.usefixtures("on_device")
@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(name, dtype, device):
    model = model_of(name)
    x = images(model, 4)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast(device, dtype):
            auto = model(x)
        pure = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert auto.dtype == pure.dtype == dtype
    share = 0.1 if name in CHOOSING else 8 * torch.finfo(dtype).eps
    for got in (auto, pure):
        assert (got - exact).norm() <= share * exact.norm()
    with torch.autocast(device, dtype):
        found = gradients(model, F.cross_entropy(model(x), torch.arange(4)))
    assert found and all(grad.isfinite().all() for grad in found.values())


@pytest.mark.usefixtures("on_device")
@EVERY
def test_is_a_plain_module_of_timm(name):
    model = model_of(name)
    x = images(model, 3)
    expected = model(x)
    assert isinstance(model, timm.models.VisionTransformer)
    close(torch.cat([model(image[None]) for image in x]), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        spread(other).load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(x), expected) and not any("constant" in key for key in other.state_dict())
    layer = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layer) == {key for key, _ in model.named_parameters()} and layer["cls_token"] == 0
    assert layer["blocks.1.norm1.weight"] != layer["blocks.2.norm1.weight"]
    for key in layer:  # what a method adds to a block is of its layer
        if key.startswith("blocks.1."):
            assert layer[key] == layer["blocks.1.norm1.weight"], key
    model.reset_classifier(3)
    assert model(x).shape == (3, 3)


#: what trains: the parts that a method treats apart among timm's, and every merge that is a weight
TRAINED = {
    "evit": partial(evit, init_values=0.1, qk_norm=True),
    "evo_vit": partial(evo_vit, init_values=0.1, qk_norm=True),
    "evo_vit, layer-wise": partial(evo_vit, stage_wise=False, init_values=0.1, qk_norm=True),
    **{
        f"cait, {kind}": partial(cait_merging.merged, name, kind=kind)
        for name, kind in (("deit3", "average"), ("deit", "scalar"), ("deit", "channel"), ("distilled", "linear"))
    },
}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", TRAINED)
def test_trains(name):
    model = TRAINED[name]()
    x, target = images(model, 4), torch.arange(4)
    train_a_little(model, lambda: F.cross_entropy(model(x), target))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "make, start, end",
    [(evit, "blocks.3.attn.proj", "blocks.3.mlp.fc1"), (evo_vit, "blocks.3.mlp.fc2", "blocks.4.attn.qkv")],
)
def test_the_choice_is_one_launch(make, start, end, chosen):
    names = operators_between(make(), start, end)
    assert names == ["aten.add.Tensor", *(f"tokenops.{name}" for name in chosen("select_tokens_fwd"))]


ONCE = Structure((Merge(0, "vertical"),))


@pytest.mark.parametrize(
    "name, kwargs, shapes, blocks",
    [
        ("evit_deit_tiny_patch16_224", dict(SMALL, out_indices=(2, 9)), [(16, 48), (9, 48)], 10),
        ("evo_deit_tiny_patch16_224", dict(SMALL, out_indices=(5, 11)), [(48, 4, 4)] * 2, 12),
        ("sit_lvvit_xsmall", sit_models.TINY, [(16, 32), (8, 32), (4, 32)], 4),
        ("sit_lvvit_xsmall", dict(sit_models.TINY, out_indices=[1]), [(8, 32)], 2),
        ("lvvit_small", dict(SMALL, depth=4), [(48, 4, 4)] * 3, 4),
        *(
            (name, dict(SMALL, depth=4, structure=ONCE, out_indices=(0, 2)), [(48, 4, 4)] * 2, 3)
            for name in ("cait_deit_tiny_patch16_224", "cait_lvvit_tiny")
        ),
    ],
)
def test_features_only(name, kwargs, shapes, blocks):
    features = timm.create_model(name, features_only=True, **kwargs).eval()
    assert [f.shape[1:] for f in features(images(features.model))] == shapes and len(features.model.blocks) == blocks
    channels = [shape[0] if len(shape) == 3 else shape[1] for shape in shapes]
    assert features.feature_info.channels() == channels
    assert features.feature_info.reduction() == [16] * len(shapes)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_deits_weights_are_evits(size):
    meta(f"evit_deit_{size}_patch16_224").load_state_dict(meta(f"deit_{size}_patch16_224").state_dict(), strict=True)


NAMES = """
    evit_deit_tiny_patch16_224 evit_deit_small_patch16_224 evit_deit_base_patch16_224
    evo_deit_tiny_patch16_224 evo_deit_small_patch16_224 evo_deit_base_patch16_224
    evo_deit_small_patch16_384 evo_deit_base_patch16_384
    evo_levit_128s evo_levit_128 evo_levit_192 evo_levit_256 evo_levit_384
    evo_levit_128s_img384 evo_levit_128_img384 evo_levit_192_img384 evo_levit_256_img384 evo_levit_384_img384
    sit_lvvit_tiny sit_lvvit_xsmall sit_lvvit_small sit_lvvit_medium sit_lvvit_large
    sit_deit_tiny sit_deit_small sit_deit_base lvvit_tiny lvvit_small lvvit_medium lvvit_large
    ps_deit_tiny_patch16_224 ps_deit_small_patch16_224 ps_deit_base_patch16_224 ps_lvvit_small
    dps_deit_tiny_patch16_224 dps_deit_small_patch16_224 dps_lvvit_small
    cait_deit_tiny_patch16_224 cait_deit_small_patch16_224 cait_deit_base_patch16_224 cait_lvvit_tiny cait_lvvit_small
"""


def test_names():
    names = NAMES.split()
    assert {named.name for named in models._models()} == set(names) <= set(timm.list_models())
    assert not timm.list_pretrained(names)
    for name, side in (("sit_lvvit_large", 288), ("evo_deit_base_patch16_384", 384), ("evo_levit_384_img384", 384)):
        assert timm.get_pretrained_cfg(name).input_size == (3, side, side)
    for name in ("evit_deit_tiny_patch16_224", "sit_lvvit_tiny", "ps_deit_tiny_patch16_224"):
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            timm.create_model(name, pretrained=True)
