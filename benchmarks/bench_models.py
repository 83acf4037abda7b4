"""Whole models: are the operations a method saves saved in time? Against the dense model, and as published."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from comparison import nbytes
from published import vit
from published.evo_vit import PublishedEvoViT
from published.sit import PublishedSiT
from timers import Graphed
from tokenops.cli.comparison import dense_form, made
from tokenops.methods import for_inference  # the package registers the models
from tokenops.nn import convert_attention

timm = pytest.importorskip("timm")

LVVIT_S = dict(embed_dim=384, num_heads=6, skip_lam=2.0)
DEIT_S = dict(embed_dim=384, num_heads=6, stem="linear", mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, aux_head=False)

#: SiT's models: the dense form, and the sizes of the published one
SIT = {
    "sit_deit_small": ("deit_small_patch16_224", dict(DEIT_S, stage_blocks=(3, 3, 3, 3))),
    "sit_lvvit_xsmall": ("lvvit_small", dict(LVVIT_S, stage_blocks=(1, 1, 1, 13))),
    "sit_lvvit_small": ("lvvit_small", dict(LVVIT_S, stage_blocks=(9, 3, 2, 2))),
}
QUICK = dict(embed_dim=48, num_heads=3, img_size=64)

METHODS = (
    "evo_deit_small_patch16_224",
    "cait_deit_small_patch16_224",
    "evit_deit_small_patch16_224",
    "ps_deit_small_patch16_224",
    "dps_deit_small_patch16_224",
    "cait_deit_tiny_patch16_224",
    "evo_levit_256",
)

#: patches: options by the model, and the method as published
TOME, EVIT = dict(r=13), dict(keep_rate=0.7)
PATCHES = {
    "deit_small_patch16_224": {"tome": TOME, "evit": EVIT},
    "vit_base_patch16_224": {"tome": TOME, "evit": EVIT, "evo_vit": {}, "sit": {}, "cait": {}},
    "vit_large_patch16_224": {"tome": dict(r=8), "evit": EVIT, "evo_vit": {}, "sit": {}, "cait": {}},
}
PUBLISHED = {"tome": vit.ToMe, "evit": vit.EViT}

FORMS = (
    *((model, method) for model, methods in PATCHES.items() for method in methods),
    *((name, None) for name in (*SIT, *METHODS)),
)
#: relative L2 in bf16: where two scores round to one the ways choose and merge other tokens (DeiT-S with ToMe: 5.5e-2)
CHOICES = 0.25
HOWS = ("eager", "graph", "compiled", "compiled graph")


def name_of(form):
    return " ".join(filter(None, form))


def priority(form, batch, how):
    """Small models before large ones, whole batches before single images of these; then what takes long in compiling,
    and the middle batch."""
    model, method = form
    size = ["deit_small" in model, "base" in model, "large" in model].index(True) if method else 0
    size += model in (*SIT, *METHODS) and model not in ("sit_deit_small", *METHODS[:2])
    single = batch == "single" and size > 0
    return size + 2 * single + 3 * ("compiled" in how) + 3 * (batch == "middle")


class Sides(NamedTuple):
    ours: nn.Module
    dense_name: str
    peers: dict[str, Callable]
    dense: tuple[str, ...]  # those of the peers that are dense


def flops_of(model, x):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def sit(bench, name):
    dense_name, sizes = SIT[name]
    small = QUICK if bench.quick else {}
    published = PublishedSiT(**sizes | small).eval()
    model = timm.create_model(name, **small)
    model.load_state_dict(published.state_dict())
    dense = timm.create_model(dense_name, **small)
    peers = {}
    if "deit" in dense_name:
        peers["sdpa"] = copy.deepcopy(dense).to(bench.dtype).eval()
        convert_attention(dense)  # both with the best attention there is
    model, dense = (for_inference(m).to(bench.dtype) for m in (model, dense))

    def as_published(x):
        # its attention computes in fp32 and feeds a layer of the model's dtype: mixed precision only by autocast
        with torch.autocast(bench.device, bench.dtype, enabled=bench.dtype != torch.float32):
            return published(x.float())[0]

    return Sides(model, dense_name, {dense_name: dense, **peers, "published": as_published}, (dense_name, *peers))


def method(bench, name):
    dense_name, arguments = dense_form(name)
    sizes = (name.replace("small", "tiny").replace("256", "128s"), dense_name.replace("small", "tiny"))
    name_of, dense_of = sizes if bench.quick else (name, dense_name)
    if arguments:
        dense_of, dense_name = name_of, f"{dense_name}, all tokens"
    model, dense = (m.to(bench.dtype) for m in (made(name_of), made(dense_of, **arguments)))
    peers = {dense_name: dense}
    if not arguments:  # the same as a user has it
        peers["sdpa"] = timm.create_model(dense_of).to(bench.dtype).eval()
    dense = tuple(peers)
    if name == "evo_deit_small_patch16_224":
        published = PublishedEvoViT(model.embed_dim, model.embed_dim // 64).to(bench.dtype).eval()
        model.load_state_dict(published.state_dict())
        peers["published"] = published
    return Sides(model, dense_name, peers, dense)


def patched(bench, name, how):
    options = PATCHES[name][how]
    dense = timm.create_model("deit_tiny_patch16_224" if bench.quick else name).to(bench.dtype).eval()
    published = PUBLISHED[how](copy.deepcopy(dense), **options) if how in PUBLISHED else None
    converted = copy.deepcopy(dense)
    convert_attention(converted)  # both with the best attention there is
    model = tokenops.apply_patch(copy.deepcopy(converted), how, **options).to(bench.device, bench.dtype)
    peers = {name: converted, "sdpa": dense} | ({"published": published} if published else {})
    return Sides(model, name, peers, (name, "sdpa"))


@functools.lru_cache(maxsize=1)
def sides_of(bench, form):
    name, patch = form
    with torch.device(bench.device):
        torch.manual_seed(0)
        return patched(bench, name, patch) if patch else sit(bench, name) if name in SIT else method(bench, name)


def run_as(how, side, clock):
    if "compiled" in how:
        side = torch.compile(side, dynamic=False)
    return Graphed(side, clock) if "graph" in how else side


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


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("batch", ["batch", "single", "middle", "eight"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: name_of(form).replace(" ", "-"))
def test_model(bench, compare, form, batch, how, capsys):
    if how != "eager" and not bench.lines and (bench.compiled != "all" or how != "compiled"):
        pytest.skip("compiled models are asked for by --compile all; graphs belong to an evidence run")
    if "compiled" in how and bench.compiled == "none":
        pytest.skip("--compile none")
    if bench.task == "compile" and how != "compiled":
        pytest.skip("nothing to compile, or the same as without the graph")
    name, patch = form
    of_a_cpu = batch != "eight" if name in SIT else batch != "batch" and "base" not in name and "large" not in name
    if bench.device == "cpu" and not of_a_cpu and not bench.quick:
        pytest.skip("on a CPU: SiT at 16 images and 1, the others at 8 and 1, but ViT-B and ViT-L")
    B = bench.batch(batch)
    sides = sides_of(bench, form)
    size = 64 if bench.quick and name in SIT else 224

    def inputs():
        return (bench.random(B, 3, size, size),)

    (x,) = inputs()
    flops, dense_flops = flops_of(sides.ours, x), flops_of(sides.peers[sides.dense_name], x)
    row = compare(
        f"{name_of(form)} {how}" if not patch or how != "eager" else name_of(form),
        shape=dict(B=B),
        inputs=inputs,
        ours=run_as(how, sides.ours, bench.clock),
        peers={peer: run_as(how, side, bench.clock) for peer, side in sides.peers.items()},
        bytes=nbytes(*sides.ours.parameters(), x) + B * 1000 * x.element_size(),
        flops=flops,
        peer_flops=dict.fromkeys(sides.dense, dense_flops),
        device_time=False,
        tolerance=CHOICES if bench.dtype.itemsize < 4 else None,
    )
    assert bench.task == "compile" or row["kernels"] or how != "eager"
    if patch and how == "eager" and "published" in sides.peers:
        count_operators(row, sides, x, capsys)


def count_operators(row, sides, x, capsys):
    """How many operators a block dispatches, into the row; fewer than as published."""
    published = sides.peers["published"]
    counts = {
        "dense": operators_a_block(sides.peers["sdpa"], sides.peers["sdpa"], x),
        "published": operators_a_block(published, published.vit, x),
        "ours": operators_a_block(sides.ours, sides.ours, x),
    }
    row["operators_a_block"] = {side: round(count, 2) for side, count in counts.items()}
    with capsys.disabled():
        print(f"\n{row['operator']}, operators a block: {row['operators_a_block']}")
    assert counts["ours"] < counts["published"]
