"""What looks at the modules of a patched model sees them, and what it gives counts; unseen, norms are fused."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from support.patched_models import METHODS, applied, images, model_of, patched
from tokenops import apply_patch, remove_patch

PARTS = ["norm1", "norm2", "attn", "attn.qkv", "mlp"]
#: how many norms of 3 blocks (two each) are applied in an operator's launch
FUSED = {"tome": 3, "evit": 2, "evo_vit": 2, "patch_slimming": 0, "sit": 0, "cait": 0}


def norms_called(model, x):
    """How many layer norms of the blocks torch computes."""
    inside = {id(block.get_submodule(name).weight) for block in model.blocks for name in ("norm1", "norm2")}

    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.layer_norm:
                given = dict(zip(("input", "normalized_shape", "weight", "bias"), args)) | (kwargs or {})
                self.calls += id(given["weight"]) in inside
            return function(*args, **(kwargs or {}))

    with Counting() as counting, torch.no_grad():
        y = model(x)
    return counting.calls, y


@pytest.mark.parametrize("method", METHODS)
def test_norms_are_fused_exactly_when_nothing_looks(method):
    model, x = patched(method), images()
    fused, expected = norms_called(model, x)
    assert fused == 6 - FUSED[method]
    some = model.blocks[1]
    handles = [
        some.norm1.register_forward_hook(lambda *_: None),
        some.norm2.register_full_backward_hook(lambda *_: None),
    ]
    calls, y = norms_called(model, x)
    assert calls - fused == {"tome": 1, "evit": 0, "evo_vit": 1}.get(method, 0)  # EViT does nothing in block 1
    torch.testing.assert_close(y, expected)
    for handle in handles:
        handle.remove()
    assert norms_called(model, x)[0] == fused
    everywhere = register_module_forward_hook(lambda *_: None)  # looks at every module
    try:
        assert norms_called(model, x)[0] == 6
    finally:
        everywhere.remove()
    assert norms_called(model, x)[0] == fused
    with FlopCounterMode(display=False):  # has hooks of every module too, which only keep their names
        assert norms_called(model, x)[0] == fused


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(module):
    """A module whose result is twice what it was."""
    last = {"attn": "proj", "mlp": "fc2"}
    name = next((own for own in last.values() if hasattr(module, own)), "")
    with torch.no_grad():
        for parameter in module.get_submodule(name).parameters():
            parameter.mul_(2)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_hook_gives_counts(method, part):
    """Twice the result is the result of twice the weights."""
    model, x = patched(method), images()
    plain = model(x)
    twin, calls = copy.deepcopy(model), []

    def twice(module, args, y):
        calls.append(module)
        return 2 * y

    for block in model.blocks:
        block.get_submodule(part).register_forward_hook(twice)
    for block in twin.blocks:
        doubled(block.get_submodule(part))
    y, expected = model(x), twin(x)
    assert calls == [block.get_submodule(part) for block in model.blocks]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y, plain, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_blocks(method):
    """What a block hands on may be replaced, and what the next one is given."""
    model, x = patched(method), images()
    first, second = model.blocks[0], model.blocks[1]

    def replaced(y):
        return 2 * y if isinstance(y, torch.Tensor) else y._replace(tokens=2 * y.tokens)

    expected = model(x)
    handle = first.register_forward_hook(lambda m, args, y: replaced(y))
    behind = model(x)
    handle.remove()
    handle = second.register_forward_pre_hook(lambda m, args: (replaced(args[0]),))
    before = model(x)
    handle.remove()
    assert torch.equal(behind, before) and not torch.allclose(behind, expected, atol=1e-2)
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_hook_fires_once_a_block(method):
    model, x, seen = patched(method).train(), images(), []

    def note(kind, part, i):
        return lambda *_: seen.append((kind, part, i))

    for i, block in enumerate(model.blocks):
        for part in ("", *PARTS):
            module = block.get_submodule(part)
            module.register_forward_pre_hook(note("pre", part, i))
            module.register_forward_hook(note("forward", part, i))
            module.register_full_backward_pre_hook(note("backward pre", part, i))
            module.register_full_backward_hook(note("backward", part, i))
    model(x).square().sum().backward()
    expected = [
        (kind, part, i)
        for kind in ("pre", "forward", "backward pre", "backward")
        for part in ("", *PARTS)
        for i in range(3)
    ]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("method", METHODS)
def test_backward_hooks_change_gradients(method):
    """Half the gradient behind norm2 is half the gradient of its weight."""
    model, x = patched(method).train(), images()
    model(x).square().sum().backward()
    before = model.blocks[2].norm2.weight.grad.clone()
    model.zero_grad()
    model.blocks[2].norm2.register_full_backward_pre_hook(lambda module, grads: (0.5 * grads[0],))
    model(x).square().sum().backward()
    torch.testing.assert_close(model.blocks[2].norm2.weight.grad, 0.5 * before, rtol=1e-4, atol=1e-5)
    assert before.abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_of_another_kind_computes_itself(method):
    model, x = model_of("plain"), images()
    twin = copy.deepcopy(model)
    for block, other in zip(model.blocks, twin.blocks):
        for name in ("norm1", "norm2"):
            norm = Doubled(32, eps=1e-6)
            norm.load_state_dict(block.get_submodule(name).state_dict())
            setattr(block, name, norm)
            doubled(other.get_submodule(name))
    expected = applied(twin, method)(x)
    torch.testing.assert_close(applied(model, method)(x), expected, rtol=1e-4, atol=1e-4)


class Squashed(nn.Module):
    def forward(self, weight):
        return weight.tanh()


CHANGES = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.3),
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Squashed()),
    "weight_norm": lambda module: parametrizations.weight_norm(module),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_pruned_and_parametrized_weights_train(method, change, before):
    parts = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1"]
    if change == "weight_norm":
        parts = parts[2:]  # of matrices
    model, x = model_of("plain").train(), images()
    if not before:
        applied(model, method)
    changed = [block.get_submodule(part) for block in model.blocks for part in parts]
    for module in changed:
        CHANGES[change](module)
    if before:
        applied(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        for module in changed:
            assert all(parameter.grad is not None for parameter in module.parameters())
            assert (
                change != "prune" or ((module.weight_orig.grad == 0) == (module.weight_mask == 0)).float().mean() > 0.9
            )
        optimizer.step()
    assert losses[2] < losses[0] and losses[1] != losses[0]


@pytest.mark.parametrize("change", ["prune", "parametrize"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_norm_is_what_its_weights_are(method, change):
    """The fused norm would be one of the weights before."""
    model, x = patched(method), images()
    twin = copy.deepcopy(model)
    for block, other in zip(model.blocks, twin.blocks):
        for name in ("norm1", "norm2"):
            norm = block.get_submodule(name)
            CHANGES[change](norm)
            with torch.no_grad():
                other.get_submodule(name).weight.copy_(norm.weight)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", [True, False])
def test_weights_that_are_kept_elsewhere(method, before):
    accelerate = pytest.importorskip("accelerate")
    model, x = model_of("plain"), images()
    dense, expected = model(x), patched(method)(x)
    if not before:
        applied(model, method)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[1].norm2.weight.is_meta
    if before:
        applied(model, method)
    torch.testing.assert_close(model(x), expected)
    assert model.blocks[1].norm2.weight.is_meta
    assert torch.equal(remove_patch(model)(x), dense)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not model.blocks[1].norm2.weight.is_meta and torch.equal(model(x), dense)


@pytest.mark.parametrize("kind", ["average", "scalar", "channel", "linear", "content"])
def test_merges_of_weights_that_are_kept_elsewhere(kind):
    """Tokens are merged before a layer whose weights are not there yet, or behind it."""
    accelerate = pytest.importorskip("accelerate")
    model, x = apply_patch(model_of("plain"), "cait", **METHODS["cait"][1], kind=kind), images()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * (".merge." in name))
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_observers_of_quantisation_see_data(method):
    model, x = patched(method), images()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    observed = quantization.prepare(model)
    linear = {name: module for name, module in observed.named_modules() if type(module) is nn.Linear}
    torch.testing.assert_close(observed(x), model(x))
    blocks = [name for name in linear if name.startswith("blocks") and "slimming" not in name]
    assert len(blocks) == 12
    for name in blocks:
        observer = linear[name].activation_post_process
        assert observer.min_val.isfinite() and observer.min_val < observer.max_val
