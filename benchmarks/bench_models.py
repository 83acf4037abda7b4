"""Whole models: are the operations a method saves saved in time? Against the dense model, and as published.

On a CPU a plain run takes the headline: every method on DeiT-S, one image and eight, against the strongest that a user
has there, the dense model compiled with its weights frozen. `--compile all` takes every model, batch and way of
running, `--compile none` all that is eager; -k chooses among these. A row whose machine did not stay the same is
refused.
"""

import copy
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from comparison import nbytes
from linears import cap
from published import vit
from published.evo_vit import PublishedEvoViT
from published.sit import PublishedSiT
from result_file import rounded
from timers import Frozen, Graphed
from tokenops.cli.models import dense_form
from tokenops.methods import for_inference  # the package registers the models
from tokenops.methods.patch_slimming import published_for
from tokenops.nn import convert_attention

timm = pytest.importorskip("timm")

#: sizes of SiT as published, on DeiT and on LV-ViT
SIT_DEIT = dict(stem="linear", mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, aux_head=False, stage_blocks=(3, 3, 3, 3))
SIT = {
    "sit_lvvit_xsmall": dict(skip_lam=2.0, stage_blocks=(1, 1, 1, 13)),
    "sit_lvvit_small": dict(skip_lam=2.0, stage_blocks=(9, 3, 2, 2)),
}
#: models that are no patched timm model: heads of 40 and 52 channels, convolutions
NARROWED = ("cait_deit_small_patch16_224", "cait_deit_tiny_patch16_224", "evo_levit_256")


def methods(ps: str, dps: str, tome: int = 13, depth: int = 12, patches: int = 196) -> dict[str, dict[str, Any]]:
    """Options of every method, at the papers' own operating points."""
    return {
        "tome": dict(r=tome),
        "evit": dict(keep_rate=0.7),
        "evo_vit": {},
        "sit": {},
        "cait": {},
        "patch_slimming": dict(schedule=published_for(ps, depth, patches)),
        "dps": dict(counts=published_for(dps, depth, patches)),
    }


#: options by the model; the papers have no counts for the last two: those of DeiT, stretched
PATCHES = {
    "deit_small_patch16_224": methods("ps_deit_small", "dps_deit_small"),
    "deit_tiny_patch16_224": methods("ps_deit_tiny", "dps_deit_tiny"),
    "deit_base_patch16_224": methods("ps_deit_base", "dps_deit_small"),
    "vit_base_patch16_224": methods("ps_deit_base", "dps_deit_small"),
    "vit_large_patch16_224": methods("ps_deit_base", "dps_deit_small", tome=8, depth=24),
    "vit_small_patch14_dinov2": methods("ps_deit_small", "dps_deit_small", tome=16, patches=256),
}
PUBLISHED = {"tome": vit.ToMe, "evit": vit.EViT}
HEADLINE, BATCHES = "deit_small", {"cuda": (256, 32, 1), "cpu": (8, 1, 32)}

FORMS = (
    *((model, method) for model, methods in PATCHES.items() for method in methods),
    *((name, None) for name in (*SIT, *NARROWED)),
)
#: relative L2 in bf16: where two scores round to one the ways choose and merge other tokens (DeiT-S with ToMe: 5.5e-2)
CHOICES = 0.25
HOWS = ("frozen", "eager", "graph", "compiled", "compiled graph")


def name_of(form):
    return " ".join(filter(None, form))


def priority(form, B, how):
    """Small models before large ones, whole batches before single images of these; then what takes long in compiling,
    and the middle batch. What shares its frozen dense forms comes together."""
    model, method = form
    order = [*PATCHES, *SIT, "evo_levit_256"].index(model.removeprefix("cait_"))
    if how == "frozen":
        return 0, order, -B
    size = min(order, 2) + 2 * (method in ("patch_slimming", "dps"))
    single = B == 1 and size > 0
    return size + 2 * single + 3 * ("compiled" in how) + 3 * (B == 32), order, HOWS.index(how), -B


def asked(bench, form, B, how):
    """Whether a session takes this row; others are not collected."""
    if B not in BATCHES[bench.device]:
        return False
    if bench.device == "cpu" and not bench.lines:
        headline = how == "frozen" and HEADLINE in form[0] and B < 32
        return {"none": how == "eager", "main": headline, "all": "graph" not in how}[bench.compiled]
    if bench.task == "compile":  # with its graph it is the same
        return how == "compiled"
    if how != "eager" and not bench.lines:  # graphs belong to an evidence run
        return how == "compiled" and bench.compiled == "all"
    return how != "frozen" and ("compiled" not in how or bench.compiled != "none")


class Sides(NamedTuple):
    ours: nn.Module
    dense: str  # timm's name
    published: nn.Module | None = None
    arguments: dict[str, Any] = {}  # of the dense one


def flops_of(model, x):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def small(bench, name):
    """What makes a model of this name quick."""
    if not bench.quick:
        return {}
    return dict(embed_dim=48, num_heads=3) | ({"img_size": 64} if "lvvit" in name else {})


def created(bench, name, **arguments):
    """timm's model for inference, in the session's dtype, its weights the same every time."""
    if name in NARROWED:
        name = name.replace("small", "tiny").replace("256", "128s") if bench.quick else name
    else:
        arguments = small(bench, name) | arguments
    if "dinov2" in name:
        arguments = {"img_size": 224} | arguments
    torch.manual_seed(0)
    with torch.device(bench.device):
        return timm.create_model(name, **arguments).to(bench.dtype).eval()


class AsPublished(nn.Module):
    """SiT's attention computes in fp32 and feeds a layer of the model's dtype: mixed precision only by autocast."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            return self.model(x.float())[0]


def sit(bench, name, dense, **sizes):
    """SiT with the weights of the published form."""
    model = created(bench, name)
    with torch.device(bench.device):
        sizes = dict(embed_dim=model.embed_dim, num_heads=model.blocks[0].attn.num_heads) | sizes | small(bench, name)
        published = PublishedSiT(**sizes).eval()
    model.load_state_dict(published.state_dict())
    return Sides(for_inference(model), dense, AsPublished(published))


def evo_vit(bench, name, dense):
    """Evo-ViT with the weights of the published form."""
    model = created(bench, name)
    with torch.device(bench.device):
        published = PublishedEvoViT(model.embed_dim, model.blocks[0].attn.num_heads).to(bench.dtype).eval()
    model.load_state_dict(published.state_dict())
    return Sides(model, dense, published)


def patched(bench, name, method):
    """A plain timm model with a method in it; of DeiT with SiT or Evo-ViT in it, the model that takes the published
    weights, which is one."""
    size = name.split("_")[1]
    if name.startswith("deit") and method == "sit":
        return sit(bench, f"sit_deit_{size}", name, **SIT_DEIT)
    if name.startswith("deit") and method == "evo_vit":
        return evo_vit(bench, f"evo_deit_{size}_patch16_224", name)
    options = PATCHES[name][method]
    published = PUBLISHED[method](created(bench, name), **options) if method in PUBLISHED else None
    model = tokenops.apply_patch(created(bench, name), method, **options)
    return Sides(model.to(bench.device, bench.dtype), name, published)


@functools.lru_cache(maxsize=1)
def sides_of(bench, form):
    name, method = form
    if method:
        return patched(bench, name, method)
    if name in SIT:
        return sit(bench, name, "lvvit_small", **SIT[name])
    dense, arguments = dense_form(name)
    return Sides(for_inference(created(bench, name)), dense, arguments=arguments)


@functools.lru_cache(maxsize=1)
def dense_forms(bench, name, arguments, how, B):
    """The dense model as it is with our attention, and as timm makes it; compiled once for all the methods on it."""
    torch._dynamo.reset()
    model = for_inference(created(bench, name, **dict(arguments)))
    if arguments:  # a form of ours that keeps all tokens
        return {f"{name}, all tokens": run_as(how, model, bench.clock)}
    converted = copy.deepcopy(model)
    convert_attention(converted)
    return {name: run_as(how, converted, bench.clock), "sdpa": run_as(how, model, bench.clock)}


def run_as(how, side, clock):
    if how == "frozen":
        return Frozen(side)
    if "compiled" in how:
        side = torch.compile(side, dynamic=False)
    return Graphed(side, clock) if "graph" in how else side


@pytest.fixture
def fresh():
    """The dense forms stay compiled: `dense_forms` begins anew. One code is compiled for all models of a class."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


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
@pytest.mark.parametrize("B", sorted({B for sizes in BATCHES.values() for B in sizes}), ids=lambda B: f"B{B}")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: name_of(form).replace(" ", "-"))
def test_model(bench, compare, form, B, how, capsys):
    B = min(B, 2) if bench.quick else B
    sides = sides_of(bench, form)
    dense = dense_forms(bench, sides.dense, tuple(sides.arguments.items()), how, B)
    size = 64 if bench.quick and "lvvit" in name_of(form) else 224

    def inputs():
        return (bench.random(B, 3, size, size),)

    x = bench.random(1, 3, size, size)
    flops = B * flops_of(sides.ours, x)
    dense_flops = B * flops_of(created(bench, sides.dense, **sides.arguments), x)
    peers = dict(dense)
    if sides.published is not None:
        peers["published"] = run_as(how, sides.published, bench.clock)
    row = compare(
        f"{name_of(form)} {how}" if not form[1] or how != "eager" else name_of(form),
        shape=dict(B=B),
        inputs=inputs,
        ours=run_as(how, sides.ours, bench.clock),
        peers=peers,
        bytes=nbytes(*sides.ours.parameters()) + B * (x.numel() + 1000) * x.element_size(),
        flops=flops,
        peer_flops=dict.fromkeys(dense, dense_flops),
        device_time=False,
        tolerance=CHOICES if bench.dtype.itemsize < 4 else None,
        steady=True,
    )
    assert bench.task == "compile" or row["kernels"] or how != "eager"
    if how == "frozen" and bench.task == "measure":
        images = inputs()[0]
        found = cap(created(bench, sides.dense, **sides.arguments), sides.ours, images, rounds=2 if bench.quick else 7)
        row["linears"] = rounded({"cap": found.speedup, "flop_ratio": found.flop_ratio})
    if form[1] in PUBLISHED and how == "eager":
        count_operators(row, sides, dense["sdpa"], x, capsys)


def count_operators(row, sides, dense, x, capsys):
    """How many operators a block dispatches, into the row; fewer than as published."""
    counts = {
        "dense": operators_a_block(dense, dense, x),
        "published": operators_a_block(sides.published, sides.published.vit, x),
        "ours": operators_a_block(sides.ours, sides.ours, x),
    }
    row["operators_a_block"] = {side: round(count, 2) for side, count in counts.items()}
    with capsys.disabled():
        print(f"\n{row['operator']}, operators a block: {row['operators_a_block']}")
    assert counts["ours"] < counts["published"]
