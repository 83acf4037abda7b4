"""Which operator runs the attention of a patched model's blocks, and that it is handed the projection as it is."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenops
from support.compiled import needs_compiled
from support.patched_models import images, model_of
from tokenops import apply_patch
from tokenops.nn import convert_attention
from tokenops.ops import native
from tokenops.ops.masked_channel_attention import FASTER

BF16 = torch.bfloat16
ISA = native.attention_isa(BF16)
OURS = "tokenops.masked_channel_attention_fwd.native"
pytestmark = needs_compiled


class Attentions(TorchDispatchMode):
    """Notes each attention that runs: ours on a packed projection, ours on q, k and v, torch's, or a softmax."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == OURS:
            self.seen.append("packed" if args[1] is None else "apart")
        elif "scaled_dot_product" in str(func):
            self.seen.append("sdpa")
        elif "_softmax" in str(func):
            self.seen.append("softmax")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def attentions(run, *args, **kwargs):
    with Attentions() as noted:
        run(*args, **kwargs)
    return noted.seen


@pytest.fixture
def swift(monkeypatch):
    """Ours counts as much the faster, whatever the machine."""
    monkeypatch.setitem(FASTER, (BF16, ISA), 2.2)


def evit(family="plain", dtype=BF16, **sizes):
    """EViT in the block in the middle: the first and the last do nothing of their own."""
    options = dict(keep_rate=0.5, reduction_loc=(1,))
    return apply_patch(model_of(family, **sizes).to(dtype), "evit", **options)


def of_transformers(kind, implementation="sdpa"):
    pytest.importorskip("transformers")
    from support import hf_models

    model = hf_models.model_of(kind, attn_implementation=implementation).to(BF16)
    return apply_patch(model, "evit", keep_rate=0.5, reduction_loc=(1,))


def test_idle_blocks_take_what_the_machine_has():
    """In bfloat16 ours on AMX tiles, which is twice as fast as torch's, and else torch's."""
    idle = "packed" if ISA == "amx" else "sdpa"
    assert attentions(evit(), images().to(BF16)) == [idle, "packed", idle]
    with native.limit_cpu_isa("avx512"):
        assert attentions(evit(), images().to(BF16)) == ["sdpa", "packed", "sdpa"]
    assert attentions(evit(dtype=torch.float32), images()) == ["sdpa", "packed", "sdpa"]


@pytest.mark.usefixtures("swift")
def test_idle_blocks_where_ours_is_much_faster(monkeypatch):
    model, x = evit(), images().to(BF16)
    assert attentions(model, x) == ["packed"] * 3
    with torch.autocast("cpu", BF16):
        assert attentions(model, x) == ["sdpa", "packed", "sdpa"]
        assert attentions(evit(dtype=torch.float32), images()) == ["sdpa", "packed", "sdpa"]
    with tokenops.use_backend("reference"):
        assert attentions(model, x) == ["sdpa", "softmax", "sdpa"]
    tokens, attention = torch.randn(2, 17, 32).to(BF16), model.blocks[0].attn
    mask = torch.zeros(2, 1, 17, 17).to(BF16)
    assert attentions(attention, tokens) == ["packed"]
    for given in (dict(attn_mask=mask), dict(is_causal=True)):
        assert attentions(attention, tokens, **given) == ["sdpa"]
    assert attentions(attention, tokens, mask) == ["sdpa"]
    monkeypatch.setitem(FASTER, (BF16, ISA), 1.4)  # not worth other bits than the model's own
    assert attentions(model, x) == ["sdpa", "packed", "sdpa"]


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("kind", ["vit", "clip", "siglip"])
def test_idle_blocks_of_transformers(kind):
    """The first three: SigLIP's head that pools is an attention too."""
    x = images().to(BF16)
    assert attentions(of_transformers(kind), pixel_values=x)[:3] == ["apart"] * 3
    asks_for_weights = of_transformers(kind, "eager")
    assert attentions(asks_for_weights, pixel_values=x)[:3] == ["softmax", "apart", "softmax"]


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("family", ["layer_scale", "norms", "eva"])
def test_only_what_nothing_comes_between_is_packed(family):
    kinds = {"layer_scale": "packed"}
    assert attentions(evit(family), images().to(BF16)) == [kinds.get(family, "apart")] * 3


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("part", ["q_norm", "k_norm"])
def test_what_a_hook_makes_of_the_queries_counts(part):
    model, x = evit(), images().to(BF16)
    expected, twin = model(x), copy.deepcopy(model)
    with torch.no_grad():
        for block in twin.blocks:
            of_part = slice(0, 32) if part == "q_norm" else slice(32, 64)
            block.attn.qkv.weight[of_part] *= 2
            block.attn.qkv.bias[of_part] *= 2
    for block in model.blocks:
        block.attn.get_submodule(part).register_forward_hook(lambda module, args, y: 2 * y)
    assert attentions(model, x) == ["apart"] * 3
    torch.testing.assert_close(model(x), twin(x), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(model(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("change", ["written out", "wide", "dropped"])
def test_an_attention_that_ours_is_not_keeps_its_bits(change):
    """Where the model asks for the whole matrix, or its heads are too wide, or weights are dropped."""
    sizes = {"written out": dict(embed_dim=96), "wide": dict(embed_dim=320), "dropped": dict(attn_drop_rate=0.5)}[
        change
    ]
    plain = model_of("plain", **sizes).to(BF16)
    patched = apply_patch(copy.deepcopy(plain), "cait", points={1: "horizontal"})
    for model in (plain, patched):
        model.train(change == "dropped")
        for block in model.blocks:
            block.attn.fused_attn = change != "written out"
    tokens, found = 3 * torch.randn(2, 17, plain.embed_dim).to(BF16), []
    for model in (plain, patched):
        torch.manual_seed(4)
        found.append(model.blocks[0].attn(tokens))
    assert torch.equal(*found)
    assert "packed" not in attentions(patched.blocks[0].attn, tokens)


@pytest.mark.usefixtures("swift")
def test_masks_of_channels_are_not_lost_where_weights_are_dropped():
    model = evit(attn_drop_rate=0.5).train()
    convert_attention(model)
    attention, tokens = model.blocks[0].attn, torch.randn(2, 17, 32).to(BF16)
    attention.v_mask = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="v_mask cannot be had with dropout"):
        attention(tokens)
    few = attention(tokens, ask=tokenops.patching.blocks.Ask(rows=5))
    assert torch.equal(few, attention.proj.bias.expand(2, 5, 32))
