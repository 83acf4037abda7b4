"""The state of a forward is a value: threads, copies, checkpointing and traces see what they see in any model."""

import copy
import functools
import io
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from support.patched_models import METHODS, SIZES, blocks_of, gradients, images, model_of, patched, tokens_behind
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, trace
from tokenops.patching import blocks

#: six blocks, so that sequences of two and of three hold several that reduce
DEEP = {
    "tome": dict(r=[1, 2, 0, 2, 1, 1]),
    "evit": dict(keep_rate=[1, 0.8, 1, 0.7, 1, 0.6]),
    "evo_vit": dict(stages=(2, 4)),
    "patch_slimming": dict(schedule=[17, 15, 15, 11, 9, 4]),
    "sit": dict(keeping_ratio=0.6, locations=(1, 3, 4)),
    "cait": dict(points={1: "horizontal", 3: "vertical"}),
}


def deep(method, model=None):
    """With a method in a model of six blocks."""
    model = model_of("plain", depth=6) if model is None else model
    torch.manual_seed(3)  # token slimmings are drawn
    return apply_patch(model, method, **DEEP[method]).train()


def snapshot(model):
    """Everything that modules hold: the identity of each attribute, and the values of the small ones."""

    def held(value):
        if isinstance(value, dict):
            return id(value), {name: held(inner) for name, inner in value.items()}
        if isinstance(value, torch.Tensor):
            return id(value), value._version, value.data_ptr()
        return id(value), repr(value) if isinstance(value, (bool, int, float, str, tuple, type(None))) else ""

    return {name: (type(m), {key: held(value) for key, value in vars(m).items()}) for name, m in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_no_attribute_of_any_module_changes(method, training):
    model, x, seen = patched(method).train(training), images(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(snapshot(model) == before))
    before = snapshot(model)
    y = model(x)
    assert len(seen) > 60 and all(seen) and snapshot(model) == before
    y.sum().backward()
    trace(model, x)
    model.forward_intermediates(x, output_fmt="NLC")
    assert snapshot(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_see_each_other(method):
    model, wrong = patched(method), []
    batches = [images(2 + i) * (1 + i) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in batches]

    def work(i):
        for _ in range(25):
            with torch.no_grad():
                if not torch.equal(model(batches[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_before_one_backward(method):
    model, first, second = patched(method).train(), images(), 2 * images(3)
    apart = [{name: grad.clone() for name, grad in gradients(model, x)[0].items()} for x in (first, second)]
    model.zero_grad()
    y, z = model(first), model(second)
    (y.square().sum() + z.square().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_within_a_forward(method):
    model, x, other, inner = patched(method), images(), -2 * images(3), []
    expected, of_other = model(x), model(other)

    def again(module, args, y):
        if len(inner) < 3:
            inner.append(None)
            inner[inner.index(None)] = model(other)

    handles = [block.register_forward_hook(again) for block in model.blocks]
    y = model(x)
    for handle in handles:
        handle.remove()
    assert torch.equal(y, expected) and len(inner) == 3 and all(torch.equal(z, of_other) for z in inner)


@pytest.mark.parametrize("method", METHODS)
def test_replicas_in_threads(method):
    """As DataParallel makes them: shallow copies of every module, which keep the classes."""
    model, x = patched(method), images(4)

    def replica(module):
        new = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            new._modules[name] = replica(child)
        for name, parameter in module._parameters.items():
            setattr(new, name, parameter)
        return new

    replicas = [replica(model) for _ in range(4)]
    assert all(a is not b and type(a) is type(b) for a, b in zip(replicas[0].blocks, model.blocks))
    found = [None] * 4

    def work(i):
        with torch.no_grad():
            found[i] = replicas[i](x[i : i + 1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(found), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(nn.DataParallel(model)(x), model(x))


def wrapping(implementation, what=Block):
    return dict(
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, what),
    )


class ByHand(nn.Module):
    """Runs the blocks of a model in pieces that are computed again."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for i in (0, 1, 4):
            x = checkpoint(model.blocks[i : {0: 1, 1: 4, 4: 6}[i]], x, use_reentrant=False)
        return model.forward_head(model.norm(x))


@pytest.mark.parametrize("how", ["each", "every 2", "every 3", "wrapped", "wrapped before", "attention", "by hand"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(method, how):
    x = images(4)
    plain, whole = gradients(deep(method), x)
    if how == "wrapped before":
        model = model_of("plain", depth=6).train()
        apply_activation_checkpointing(model, **wrapping(CheckpointImpl.NO_REENTRANT))
        deep(method, model)
    else:
        model = deep(method)
    if how == "each":
        model.set_grad_checkpointing()
    elif how.startswith("every"):
        from timm.models import checkpoint_seq

        every = int(how[-1])
        run = functools.partial(checkpoint_seq, every=every)
        model.blocks.forward = functools.partial(run, list(model.blocks))
    elif how == "wrapped":
        apply_activation_checkpointing(model, **wrapping(CheckpointImpl.NO_REENTRANT))
    elif how == "attention":
        for block in model.blocks:
            block.attn = checkpoint_wrapper(block.attn, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    found, kept = gradients(ByHand(model) if how == "by hand" else model, x)
    found = {name.removeprefix("model."): grad for name, grad in found.items()}
    assert found.keys() == plain.keys()
    for name, grad in plain.items():
        assert torch.equal(found[name], grad), name
    assert kept < (0.95 if how == "attention" else 0.6) * whole


@pytest.mark.parametrize("method", METHODS)
def test_a_wrapped_model_is_patched_and_set_like_another(method):
    model, x = model_of("plain", depth=6), images()
    dense = model(x)
    apply_activation_checkpointing(model, **wrapping(CheckpointImpl.NO_REENTRANT))
    deep(method, model).eval()
    twin = deep(method).eval()
    if method == "tome":
        model.r = twin.r = (2, -0.5)
    assert torch.equal(model(x), twin(x)) and tokens_behind(model, x) == tokens_behind(twin, x)
    assert len(blocks_of(model)) == 6
    features = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for y, expected in zip(features, twin.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)):
        assert torch.equal(y, expected)
    assert torch.equal(remove_patch(model)(x), dense)


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("which", ["all", 0, 1, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_that_loses_a_state_is_refused(method, which):
    """Reentrant checkpointing takes tensors alone: gradients are right, or the error says so."""
    model, x = deep(method), images()
    expected, _ = gradients(model, x)
    expected = {name: grad.clone() for name, grad in expected.items()}
    wrapped = [checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.REENTRANT) for block in model.blocks]
    carries = {"tome": range(6), "evo_vit": (1, 2, 3, 5)}.get(method, ())
    for i in range(6) if which == "all" else [which]:
        model.blocks[i] = wrapped[i]
    if carries and which == "all" or which in carries:
        with pytest.raises(ValueError, match="use_reentrant=True takes it apart, so pass use_reentrant=False"):
            gradients(model, x)
    else:
        found, _ = gradients(model, x)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_of_attention_is_refused_where_scores_learn():
    model = patched("evit").train()
    for block in model.blocks:
        block.attn = checkpoint_wrapper(block.attn, checkpoint_impl=CheckpointImpl.REENTRANT)
    with pytest.raises(
        ValueError, match="scores .* would lose their gradients: checkpoint it with use_reentrant=False"
    ):
        model(images())
    with torch.no_grad():
        torch.testing.assert_close(model(images()), patched("evit")(images()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_traced_saved_and_loaded(method):
    model, x = deep(method).eval(), images()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for other in (-2 * x, images(5)):
        torch.testing.assert_close(loaded(other), model(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_symbolic_traces_are_refused(method):
    words = r"cannot be traced symbolically .* use its forward_intermediates, timm's features_only"
    with pytest.raises(ValueError, match=words):
        torch.fx.symbolic_trace(patched(method))
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    with pytest.raises(ValueError, match=words):
        extraction.create_feature_extractor(patched(method), ["blocks.1"])


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    "method, others", [*((m, {}) for m in METHODS), ("cait", dict(layout="block", kind="channel"))]
)
def test_a_patch_before_there_are_weights(method, others, assign):
    options = METHODS[method][1] | others
    model, x = apply_patch(model_of("plain"), method, **options), images()
    with torch.device("meta"):
        empty = VisionTransformer(**SIZES).eval()
        apply_patch(empty, method, **options)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    if not assign:
        empty.to_empty(device="cpu")
        for buffer in empty.buffers():
            assert not buffer.is_meta
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty(x), model(x))
    twin = copy.deepcopy(empty)
    assert torch.equal(twin(x), model(x)) and torch.equal(twin.double()(x.double()), model.double()(x.double()))


def sized(method, side):
    options = dict(METHODS[method][1])
    if method == "patch_slimming":
        options = dict(schedule=[37, 20, 10])
    return apply_patch(model_of("plain", img_size=side), method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_another_grid_of_as_many_patches(method):
    """48 x 48 and 32 x 72 pixels are 36 patches both, with other neighbours."""
    model, wide = sized(method, 48), torch.randn(2, 3, 32, 72)
    assert trace(model, torch.randn(2, 3, 48, 48)).grid == (6, 6)
    model.set_input_size((32, 72))
    if method in ("cait", "patch_slimming"):
        words = "the images give 4 x 9 patches, but the method was fitted to a grid of 6 x 6: remove_patch"
        for run in (model, functools.partial(trace, model), functools.partial(model.forward_intermediates)):
            with pytest.raises(ValueError, match=words):
                run(wide)
        applied = dict(points={0: "horizontal"}) if method == "cait" else dict(schedule=[37, 20, 10])
        apply_patch(remove_patch(model), method, **applied)
    assert trace(model, wide).grid == (4, 9) and model(wide).shape == (2, 5)


@pytest.mark.parametrize("method", ["tome", "evit", "evo_vit"])
def test_the_grid_of_a_trace_is_that_of_the_images(method):
    model = patched(method, "dynamic")
    assert trace(model, torch.randn(1, 3, 128, 72)).grid == (16, 9)
    assert trace(model, torch.randn(1, 3, 96, 96)).grid == (12, 12)


def in_the_middle(model, x):
    """Maps of a model whose stages are blocks 2, 3 and 4, 5; with the tokens that are in a stage."""
    maps = model.forward_intermediates(x, intermediates_only=True)
    flat = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    return [y.flatten(2).transpose(1, 2) for y in maps], flat


def test_maps_in_the_middle_of_a_stage_have_every_token():
    model, x = apply_patch(model_of("plain", depth=6), "evo_vit", stages=(2, 4)), images()
    maps, flat = in_the_middle(model, x)
    assert [y.shape[1] for y in flat] == [16, 16, 8, 16, 8, 16] and all(y.shape == (2, 16, 32) for y in maps)
    for step in trace(model, x).steps:
        i = step.block
        for b in range(2):
            for patch in range(16):
                token = int(step.sources[b, patch])
                assert torch.equal(maps[i][b, patch], maps[i - 1][b, patch] if token < 0 else flat[i][b, token])
                behind = torch.equal(maps[i + 1][b, patch], maps[i - 1][b, patch])
                assert behind == (token < 0)  # those that waited are as before the stage, the others are not
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    for y, before in zip(normed, maps, strict=True):
        torch.testing.assert_close(y.flatten(2).transpose(1, 2), model.norm(before), rtol=1e-5, atol=1e-5)
    layers = model.get_intermediate_layers(x, n=[2, 4], reshape=True)
    assert all(torch.equal(y.flatten(2).transpose(1, 2), maps[i]) for y, i in zip(layers, (2, 4), strict=True))
    shallow = model.get_intermediate_layers(x, n=[2, 4])
    assert all(torch.equal(y, flat[i]) for y, i in zip(shallow, (2, 4), strict=True))


def test_backbones_have_every_token():
    sizes = dict(img_size=64, patch_size=16, embed_dim=32, num_heads=2, depth=6)
    backbone = timm.create_model("deit_tiny_patch16_224", features_only=True, out_indices=(1, 2, 3, 4, 5), **sizes)
    redrawn(backbone)
    x = images(side=64)
    dense = backbone(x)
    apply_patch(backbone, "evo_vit", stages=(2, 4))
    maps, _ = in_the_middle(backbone.model, x)
    found = backbone(x)
    torch.testing.assert_close(found[0], dense[0], rtol=1e-4, atol=1e-4)
    assert len(found) == 5
    for y, expected in zip(found, maps[1:], strict=True):
        assert torch.equal(y.flatten(2).transpose(1, 2), expected) and y.shape == (2, 32, 4, 4)


@pytest.mark.parametrize("kind", ["class", "received"])
def test_weights_that_are_dropped_are_softmax_and_dropout(kind):
    """With the numbers of one seed: values, scores and gradients of the whole matrix written out."""
    model = model_of("norms", attn_drop_rate=0.3).train()
    block = model.blocks[1]
    x, bias = torch.randn(2, 17, 32, requires_grad=True), torch.randn(2, 17)
    torch.manual_seed(7)
    y, scores, keys = blocks.attend(block, x, key_bias=bias, scores=kind, key_mean=True)
    attention, normed = block.attn, block.norm1(x)
    q, k, v = attention.qkv(normed).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    weights = (q @ k.transpose(-2, -1) / 4 + bias[:, None, None]).softmax(dim=-1)
    torch.manual_seed(7)
    out = attention.norm((F.dropout(weights, 0.3) @ v).transpose(1, 2).reshape(2, 17, 32))
    expected = x + block.ls1(attention.proj(out))
    seen = (weights[:, :, 0] if kind == "class" else weights.mean(dim=2)).mean(dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, seen)
    torch.testing.assert_close(keys, k.mean(dim=1))
    leaves = [x, attention.qkv.weight, attention.proj.weight, block.norm1.weight]
    found = torch.autograd.grad((y * y).sum() + (scores * scores).sum(), leaves)
    wanted = torch.autograd.grad((expected * expected).sum() + (seen * seen).sum(), leaves)
    for grad, of in zip(found, wanted):
        torch.testing.assert_close(grad, of, rtol=1e-4, atol=1e-4)
    without = blocks.attend(block.eval(), x, key_bias=bias, scores=kind)[0]
    assert not torch.allclose(without, y, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_dropped_weights_train(method):
    """In training they are drawn anew, in evaluation not at all; checkpointing draws the same again."""
    model, x = patched(method, attn_drop_rate=0.3), images()
    assert torch.equal(model(x), patched(method)(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(5)
    expected = {name: grad.clone() for name, grad in gradients(model, x)[0].items()}
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    found, _ = gradients(model, x)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad)
        assert grad.isfinite().all()
