"""What all models by name have in common: they compile whole, checkpoint, run in half precision, copy and pickle."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

import tokenops.methods  # noqa: F401
from support.models import SMALL, all_close, close, gradients, images
from support.weights import spread
from tokenops import apply_patch
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


def quiet(model):
    """In training mode, but for batch norms."""
    model.train().patch_embed.eval()
    return model


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("train", [False, True])
def test_compiles_whole(name, train):
    model = quiet(model_of(name)) if train else model_of(name)
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
    model, calls = quiet(model_of(name)), []
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
    assert set(layer) == {key for key, _ in model.named_parameters()}
    model.reset_classifier(3)
    assert model(x).shape == (3, 3)
