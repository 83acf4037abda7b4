"""Models of other designs are refused with the reason, and the reasons are of modules that exist."""

import importlib

import pytest
import timm
import torch
import transformers

from tokenops import apply_patch
from tokenops.patching.families.refused import REFUSED, why_refused

MODELS = {
    "convit_tiny": "by a gate, with one of places",
    "crossvit_tiny_240": "small and of large patches",
    "hiera_tiny_224": "mask units",
    "levit_128s": "every two places of the grid, .* own form of Evo-ViT",
    "mixer_s32_224": "weights for every place",
    "mvitv2_tiny": "pooled on a map",
    "pit_ti_224": "shrink a map",
    "poolformerv2_s12": "pooled or convolved",
    "pvt_v2_b0": "strided convolutions",
    "resnet18": "convolutions, which have no tokens",
    "samvit_base_patch16_224": "windowed blocks take a map",
    "swin_tiny_patch4_window7_224": "within windows",
    "tnt_s_patch16_224": "pixels of each patch",
    "volo_d1_224": "outlook attention",
    "xcit_nano_12_p16_224": "between channels",
}
CONFIGS = {
    "Hiera": "mask units",
    "Swin": "within windows",
    "Timesformer": "regroups tokens",
    "VitDet": "windowed blocks",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_reason_of_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"apply_patch: timm.models.* can be patched: .*{MODELS[name]}"):
        apply_patch(model, "tome", r=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reason_of_transformers(name):
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())
    with pytest.raises(TypeError, match=f"{name}Model is no vision transformer that can be patched: .*{CONFIGS[name]}"):
        apply_patch(model, "tome", r=1)


@pytest.mark.parametrize("start", REFUSED)
def test_there_are_modules_of_that_name(start):
    path, _, rest = start.rpartition(".")
    module = importlib.import_module(path)
    assert not rest or hasattr(module, rest)


def test_others_have_no_reason():
    assert why_refused(["timm.models.vision_transformer.Block", "torch.nn.modules.linear.Linear"]) is None
