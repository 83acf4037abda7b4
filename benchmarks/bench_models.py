"""Whole models: are the operations a method saves saved in time? Against the dense model; SiT also as published."""

import copy
import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from measure import nbytes
from published import vit
from published.sit import PublishedSiT
from tokenops.cli.comparison import dense_form, made
from tokenops.nn import convert_attention

timm = pytest.importorskip("timm")
importlib.import_module("tokenops.methods")  # registers the models

LVVIT_S = dict(embed_dim=384, num_heads=6, skip_lam=2.0)
DEIT_S = dict(embed_dim=384, num_heads=6, stem="linear", mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, aux_head=False)

#: model -> its dense form, and the sizes of the published one
MODELS = {
    "sit_lvvit_xsmall": ("lvvit_small", dict(LVVIT_S, stage_blocks=(1, 1, 1, 13))),
    "sit_lvvit_small": ("lvvit_small", dict(LVVIT_S, stage_blocks=(9, 3, 2, 2))),
    "sit_deit_small": ("deit_small_patch16_224", dict(DEIT_S, stage_blocks=(3, 3, 3, 3))),
}
QUICK = dict(embed_dim=48, num_heads=3, img_size=64)


def flops_of(model, x):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def for_inference(model):
    return getattr(model, "for_inference", model.eval)()


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("whole_batch", [True, False], ids=["batch", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_model(bench, compare, name, whole_batch, how):
    if how == "compiled" and bench.compiled != "all":
        pytest.skip("compiled models only with --compile all")
    dense_name, sizes = MODELS[name]
    B, small = bench.batch(whole_batch), QUICK if bench.quick else {}
    published = PublishedSiT(**sizes | small).to(bench.device).eval()
    model = timm.create_model(name, rtsm=False, **small)
    model.load_state_dict(published.state_dict())
    dense = timm.create_model(dense_name, **small)
    if "deit" in dense_name:
        convert_attention(dense)  # both with the best attention there is
    model, dense = (for_inference(m).to(bench.device, bench.dtype) for m in (model, dense))

    def inputs():
        return (bench.random(B, 3, *model.img_size),)

    def as_published(x):
        # its attention computes in fp32 and feeds a layer of the model's dtype: mixed precision only by autocast
        with torch.autocast(bench.device, bench.dtype, enabled=bench.dtype != torch.float32):
            return published(x.float())[0]

    (x,) = inputs()
    ours, others = model, {dense_name: dense, "published": as_published}
    flops, dense_flops = flops_of(model, x), flops_of(dense, x)
    if how == "compiled":
        ours, others = (
            torch.compile(model, dynamic=False),
            {n: torch.compile(p, dynamic=False) for n, p in others.items()},
        )
    row = compare(
        f"{name} {how}",
        shape=dict(B=B),
        inputs=inputs,
        ours=ours,
        peers=others,
        bytes=nbytes(*model.parameters(), x) + B * model.num_classes * x.element_size(),
        flops=flops,
        peer_flops={dense_name: dense_flops},
        device_time=False,
    )
    assert row["kernels"] or how == "compiled"


METHODS = (
    "evit_deit_small_patch16_224",
    "evo_deit_small_patch16_224",
    "ps_deit_small_patch16_224",
    "dps_deit_small_patch16_224",
    "cait_deit_small_patch16_224",
    "cait_deit_tiny_patch16_224",
    "evo_levit_256",
)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("batch", [None, 8, 1], ids=["batch", "eight", "single"])
@pytest.mark.parametrize("name", METHODS)
def test_method(bench, compare, name, batch, how):
    if how == "compiled" and bench.compiled != "all":
        pytest.skip("compiled models only with --compile all")
    if batch is None and bench.device == "cpu":
        pytest.skip("eight images are a CPU's batch here")
    B = bench.batch() if batch is None or bench.quick else batch
    dense_name, arguments = dense_form(name)
    sizes = (name.replace("small", "tiny").replace("256", "128s"), dense_name.replace("small", "tiny"))
    name_of, dense_of = sizes if bench.quick else (name, dense_name)
    if arguments:
        dense_of, dense_name = name_of, f"{dense_name}, all tokens"
    model, dense = (m.to(bench.device, bench.dtype) for m in (made(name_of), made(dense_of, **arguments)))

    def inputs():
        return (bench.random(B, 3, 224, 224),)

    (x,) = inputs()
    flops, dense_flops = flops_of(model, x), flops_of(dense, x)
    ours, others = model, {dense_name: dense}
    if not arguments:  # the same as a user has it
        others["sdpa"] = timm.create_model(dense_of).to(bench.device, bench.dtype).eval()
    if how == "compiled":
        ours, others = (
            torch.compile(model, dynamic=False),
            {n: torch.compile(p, dynamic=False) for n, p in others.items()},
        )
    row = compare(
        f"{name} {how}",
        shape=dict(B=B),
        inputs=inputs,
        ours=ours,
        peers=others,
        bytes=nbytes(*model.parameters(), x) + B * model.num_classes * x.element_size(),
        flops=flops,
        peer_flops=dict.fromkeys(others, dense_flops),
        device_time=False,
    )
    assert row["kernels"] or how == "compiled"


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        returned = operator._schema.returns
        view = bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        self.count += not view and operator is not torch.ops.aten._unsafe_view.default
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def operators(function, *args):
    """How many operators a call dispatches; views are not counted."""
    with Counter() as counter:
        function(*args)
    return counter.count


def operators_a_block(model, vit, images):
    """The same for one block, on average: the whole model without what a ViT with no blocks does."""
    blocks, vit.blocks = vit.blocks, nn.Sequential()
    try:
        outside = operators(vit, images)
    finally:
        vit.blocks = blocks
    return (operators(model, images) - outside) / len(blocks)


#: patches, and what each is measured against: the same method as published, and the dense model
PATCHES = {
    "tome": (dict(r=13), partial(vit.ToMe, r=13)),
    "evit": (dict(keep_rate=0.7), partial(vit.EViT, keep_rate=0.7)),
}


@pytest.mark.parametrize("batch", [None, 8, 1], ids=["batch", "eight", "single"])
@pytest.mark.parametrize("method", PATCHES)
def test_patched(bench, compare, method, batch, capsys):
    if batch is None and bench.device == "cpu":
        pytest.skip("eight images are a CPU's batch here")
    B = bench.batch() if batch is None or bench.quick else batch
    options, as_published = PATCHES[method]
    name = "deit_tiny_patch16_224" if bench.quick else "deit_small_patch16_224"
    dense = timm.create_model(name).to(bench.device, bench.dtype).eval()
    published = as_published(copy.deepcopy(dense))
    converted = copy.deepcopy(dense)
    convert_attention(converted)  # both with the best attention there is
    model = tokenops.apply_patch(copy.deepcopy(converted), method, **options)

    def inputs():
        return (bench.random(B, 3, 224, 224),)

    (x,) = inputs()
    flops, dense_flops = flops_of(model, x), flops_of(dense, x)
    row = compare(
        f"{name} {method}",
        shape=dict(B=B),
        inputs=inputs,
        ours=model,
        peers={name: converted, "sdpa": dense, "published": published},
        bytes=nbytes(*model.parameters(), x) + B * model.num_classes * x.element_size(),
        flops=flops,
        peer_flops={name: dense_flops, "sdpa": dense_flops},
        device_time=False,
    )
    counts = {
        "dense": operators_a_block(dense, dense, x),
        "published": operators_a_block(published, published.vit, x),
        "ours": operators_a_block(model, model, x),
    }
    row["operators_a_block"] = {side: round(count, 2) for side, count in counts.items()}
    with capsys.disabled():
        print(f"\n{name} {method}, operators a block: {row['operators_a_block']}")
    assert row["kernels"] and counts["ours"] < counts["published"]
