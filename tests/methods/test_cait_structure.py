"""Structures of compressed models: their text, their costs, and the models made and loaded by them."""

import json

import pytest
import timm
import torch
from torch import nn

from support.cait_merging import KINDS, MODELS, SMALL, dense, lively, merged
from support.models import close, flops, images, meta
from tokenops import apply_patch
from tokenops.methods.cait import (
    Merge,
    Structure,
    Widths,
    load_compressed,
    macs,
    prunable,
    restructure,
    save_compressed,
    token_counts,
)


def counted(model):
    """(tokens into attention, tokens into fc2) a block, as they run."""
    seen = []
    for block in model.blocks:
        fc2 = block.mlp.fc2
        block.attn.register_forward_pre_hook(lambda _, args: seen.append([args[0].shape[1]]))
        fc2.register_forward_pre_hook(lambda _, args: seen[-1].append(args[0].shape[1]))
    model(torch.empty(1, 3, *model.patch_embed.img_size, device=model.cls_token.device))
    return [tuple(pair) for pair in seen]


@torch.no_grad()
def test_tokens_of_the_default_merges():
    halves = [(197, 197)] * 3 + [(197, 99)] + [(99, 99)] * 3 + [(99, 50)] + [(50, 50)] * 4
    model = apply_patch(meta("deit_small_patch16_224").eval(), "cait")
    assert token_counts(model) == counted(model) == halves
    model = apply_patch(meta("deit_small_patch16_224").eval(), "cait", kind="channel", layout="block")
    assert token_counts(model) == counted(model) == [(197, 197)] * 4 + [(99, 99)] * 4 + [(50, 50)] * 4
    lv_vit = apply_patch(meta("lvvit_small").eval(), "cait")
    assert [i for i, block in enumerate(lv_vit.blocks) if hasattr(block, "merge")] == [4, 10]
    assert token_counts(lv_vit) == counted(lv_vit)
    assert [n for n, _ in token_counts(lv_vit)] == [197] * 5 + [99] * 6 + [50] * 5
    assert token_counts(meta("deit_small_patch16_224")) == [(197, 197)] * 12


def counted_macs(model):
    return flops(model, torch.empty(1, 3, *model.patch_embed.img_size)) / 2


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_what_torch_counts(name):
    model = dense(name, img_size=(64, 80))
    assert macs(model) == counted_macs(model)
    assert macs(prunable(model)) == counted_macs(model)
    for kind in KINDS:
        model = merged(name, {0: "horizontal", 2: "horizontal", 3: "vertical"}, kind, img_size=(64, 80))
        assert macs(model) == counted_macs(model)
    model = restructure(dense(name), narrow(name))
    assert macs(model) == counted_macs(model)
    model.reset_classifier(0)
    assert macs(model) == counted_macs(model)


def narrow(name, layout="raster"):
    """A structure whose blocks differ, as far as a model's norms let them."""
    fixed, hidden = name == "no prefix", {"swiglu": None, "scaled mlp": 192, "lvvit": 144}.get(name, 192)
    widths = tuple(
        Widths(
            16 if fixed else 8 + 2 * i, 16 - 3 * i, hidden if hidden in (None, 192) and name != "deit" else 64 + 16 * i
        )
        for i in range(4)
    )
    return Structure((Merge(0, "horizontal", "channel"), Merge(1, "vertical", "linear")), layout, widths)


def test_macs_of_other_heads():
    model = merged(global_pool="")
    assert macs(model) == counted_macs(model)
    with pytest.raises(ValueError, match="global_pool='map'"):
        macs(MODELS["deit"](global_pool="map"))
    model = dense()
    model.patch_embed = nn.Identity()
    model.patch_embed.grid_size = (4, 4)
    with pytest.raises(TypeError, match="patch embedding|PatchEmbed"):
        macs(model)


@torch.no_grad()
def test_registered_models():
    names = [name for name in timm.list_models("cait_*") if "deit" in name or "lvvit" in name]
    assert names == [f"cait_deit_{s}_patch16_224" for s in ("base", "small", "tiny")] + [
        f"cait_lvvit_{s}" for s in ("small", "tiny")
    ]
    for name, least, most in (  # GMAC: where the published 1.7x and 1.9x lie; the rest as their docstrings say
        ("cait_deit_tiny_patch16_224", 0.6, 0.7),
        ("cait_deit_small_patch16_224", 2.1, 2.3),
        ("cait_deit_base_patch16_224", 8.21, 8.22),
        ("cait_lvvit_tiny", 1.79, 1.80),
        ("cait_lvvit_small", 2.74, 2.75),
    ):
        model = meta(name).eval()
        assert least <= macs(model) / 1e9 <= most
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
        found = Structure.of(model)
        assert all(w.qk % 16 == w.v % 16 == w.hidden % 128 == 0 for w in found.widths) and len(found.merges) == 2
        plain = meta(name.removeprefix("cait_"))
        assert list(restructure(plain, found).state_dict()) == list(model.state_dict())


def test_a_structure_makes_a_registered_model(tmp_path):
    wanted = narrow("deit", layout="block")
    wanted.save(tmp_path / "structure.json")
    for given in (wanted, tmp_path / "structure.json", str(tmp_path / "structure.json")):
        model = timm.create_model("cait_deit_tiny_patch16_224", structure=given, **SMALL)
        assert Structure.of(model) == wanted
    with pytest.raises(ValueError, match="the structure has 4 blocks, but the model has 12"):
        timm.create_model("cait_deit_tiny_patch16_224", structure=wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["raster", "block"])
@torch.no_grad()
def test_save_and_load(name, layout, tmp_path):
    wanted = narrow(name, layout)
    model = lively(restructure(dense(name), wanted))
    assert Structure.of(model) == wanted
    save_compressed(model, tmp_path / "model")
    again = load_compressed(dense(name), tmp_path / "model")
    x = images(model)
    assert type(again) is type(model) and torch.equal(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match="size mismatch|Missing key|Unexpected key"):
        other = dict(embed_dim=96) if name == "lvvit" else dict(num_classes=7)
        load_compressed(dense(name, **other), tmp_path / "model")


@torch.no_grad()
def test_masked_models_are_saved_with_their_masks(tmp_path):
    model = prunable(merged())
    for block in model.blocks[1:]:
        block.attn.qk_mask, block.attn.v_mask = torch.rand(2, 3, 16).unbind(0)
        block.mlp.mask = nn.Parameter(torch.rand(192))
    save_compressed(model, tmp_path)
    assert Structure.of(model).widths == (Widths(16, 16, 192),) * 4
    again = load_compressed(dense(), tmp_path)
    x = images(model)
    assert torch.equal(again(x), model(x)) and again.blocks[0].mlp.mask is None


@torch.no_grad()
def test_restructured_weights_are_the_first_of_the_dense_ones():
    model = dense()
    weight, fc2 = model.blocks[1].attn.qkv.weight.clone(), model.blocks[1].mlp.fc2.weight.clone()
    scale = model.blocks[1].attn.scale
    restructure(model, Structure(widths=(Widths(16, 16, 192), Widths(5, 3, 64), *[Widths(16, 16, 192)] * 2)))
    block = model.blocks[1]
    q, k, v = block.attn.qkv.weight.split([15, 15, 9])
    for got, whole, channels in zip((q, k, v), weight.chunk(3), (5, 5, 3)):
        assert torch.equal(got.unflatten(0, (3, -1)), whole.unflatten(0, (3, 16))[:, :channels])
    assert torch.equal(block.mlp.fc2.weight, fc2[:, :64]) and block.mlp.fc1.out_features == block.mlp.fc2.in_features
    assert block.attn.scale == scale and type(model) is timm.models.VisionTransformer


STRUCTURE = Structure((Merge(1, "vertical"), Merge(2, "horizontal", "content")), widths=(Widths(4, 8, 32),) * 4)


def test_structures_are_text():
    for given in (STRUCTURE, Structure(), Structure((Merge(0, "horizontal"),), "block"), narrow("swiglu")):
        assert Structure.from_json(given.to_json()) == given
    assert json.loads(STRUCTURE.to_json())["widths"] == [dict(qk=4, v=8, hidden=32)] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="other"), "JSON object with format 'tokenops.cait'"),
        (lambda d: d.update(version=2), "version is 2, but this package reads 1"),
        (lambda d: d.update(version=True), "version is True"),
        (lambda d: d.pop("layout"), "keys format, layout, merges, version, widths"),
        (lambda d: d.update(depth=4), r"must have the keys .* but has \['depth'"),
        (lambda d: d.update(layout="hilbert"), "layout='hilbert'"),
        (lambda d: d.update(layout=["raster"]), r"layout=\['raster'\]"),
        (lambda d: d.update(layout="block"), "layout='block' merges horizontally, then vertically"),
        (lambda d: d.update(merges=None), "merges must be a list, but got None"),
        (
            lambda d: d.update(merges=["vertical"]),
            r"merges\[0\] must have the keys axis, block, kind, but has 'vertical'",
        ),
        (lambda d: d["merges"][0].pop("kind"), r"merges\[0\] must have the keys axis, block, kind"),
        (lambda d: d["merges"][1].update(size=2), r"merges\[1\] must have the keys"),
        (lambda d: d["merges"][0].update(block=-1), "block must be an int from 0, but got -1"),
        (lambda d: d["merges"][0].update(block=1.0), "block must be an int from 0, but got 1.0"),
        (lambda d: d["merges"][0].update(block=2), r"ascending blocks, but got \[2, 2\]"),
        (lambda d: d["merges"][1].update(block=4), "widths has 4 blocks, but merges are behind"),
        (lambda d: d["merges"][0].update(axis="up"), "axis='up'"),
        (lambda d: d["merges"][0].update(kind=["average"]), r"kind=\['average'\]"),
        (lambda d: d.update(widths={}), "widths must be a list"),
        (lambda d: d.update(widths=[]), "widths has 0 blocks"),
        (lambda d: d["widths"][0].update(qk=0), "qk must be an int above 0, but got 0"),
        (lambda d: d["widths"][0].update(qk=None), "qk must be an int above 0, but got None"),
        (lambda d: d["widths"][0].update(v=True), "v must be an int above 0, but got True"),
        (lambda d: d["widths"][0].update(hidden="32"), "hidden must be an int above 0, but got '32'"),
    ],
)
def test_wrong_structures_are_refused(change, message):
    text = json.loads(STRUCTURE.to_json())
    change(text)
    with pytest.raises(ValueError, match=message):
        Structure.from_json(json.dumps(text))


def test_other_texts_and_arguments_are_refused():
    for text, message in (("{", "must be JSON"), ("[]", "JSON object with format"), ("null", "JSON object")):
        with pytest.raises(ValueError, match=message):
            Structure.from_json(text)
    with pytest.raises(ValueError, match="merges must be a tuple of Merge"):
        Structure(({"block": 1},))
    with pytest.raises(TypeError, match="Structure, but got dict"):
        restructure(dense(), {})
    assert Structure.of(dense()) == Structure(widths=(Widths(16, 16, 192),) * 4)
    with pytest.raises(TypeError, match="Structure.of takes .* but got VisionTransformer behind evit"):
        Structure.of(apply_patch(dense(), "evit"))
    wide = (Widths(16, 16, 192),) * 4
    for name, widths, message in (
        ("deit", wide[1:], "the structure has 3 blocks, but the model has 4"),
        ("deit", (Widths(16, 17, 192), *wide[1:]), "v=17 in block 0, but the model has 16"),
        ("deit", (Widths(16, 16, None), *wide[1:]), "hidden=None in block 0, but the model has 192"),
        ("swiglu", wide, "hidden=192 in block 0, but the model has None"),
        ("scaled mlp", (Widths(16, 16, 128), *wide[1:]), "norm over all of them"),
        ("no prefix", (Widths(8, 16, 192), *wide[1:]), "norm over all of them"),
    ):
        model = dense(name)
        x = images(model)
        before = model(x)
        with pytest.raises(ValueError, match=message):
            restructure(model, Structure((Merge(0, "vertical"),), widths=widths))
        close(model(x), before)  # nothing was merged or taken away
    with pytest.raises(ValueError, match="merged already"):
        restructure(merged(), Structure((Merge(0, "vertical"),)))
