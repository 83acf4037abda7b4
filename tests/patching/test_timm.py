"""apply_patch on the other kinds of blocks of timm, torchvision and open_clip, and on timm's trunks."""

import copy

import pytest
import torch

from support.patched_models import BEHIND, METHODS, images, tokens_behind
from support.timm_models import FREE, PLACED, made
from tokenops import apply_patch, remove_patch, trace
from tokenops.patching.site import Site

PAIRS = [(family, method) for family in (*FREE, *PLACED) for method in METHODS]
#: every family and every method, and all their pairs where time does not count
CASES = [pair if i % 7 in (0, 3) else pytest.param(*pair, marks=pytest.mark.slow) for i, pair in enumerate(PAIRS)]


def applied(family, method):
    model = made(family)
    torch.manual_seed(3)
    return apply_patch(model, method, **METHODS[method][1])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family, method", CASES)
def test_nothing_changes_where_nothing_is_reduced(family, method, device):
    model, x = made(family), images()
    expected, names = model(x), list(model.state_dict())
    apply_patch(model, method, **METHODS[method][0])
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5 if device == "cpu" else 1e-4)
    assert torch.equal(remove_patch(model)(x), expected)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family, method", CASES)
def test_tokens_become_fewer_and_everything_learns(family, method):
    model, x = made(family), images()
    expected, site = model(x), Site(model)
    expected.square().sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    model.zero_grad()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    apply_patch(model, method, **METHODS[method][1])
    counts = [site.prefix + n for n in BEHIND[method]]
    if method == "tome" and not site.pools_class():
        counts[-1] = site.prefix + 16  # brought back
    assert tokens_behind(model, x) == counts
    y = model(x)
    assert not torch.allclose(y, expected, atol=1e-3)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(2)]), y, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert not {name for name in learnt if model.get_parameter(name).grad is None}
    assert torch.equal(remove_patch(model)(x), twin(x))


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FREE, *PLACED])
@pytest.mark.filterwarnings("ignore")
def test_compiles_whole(family):
    model, x = applied(family, "evit" if family in PLACED else "tome"), images()
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*FREE, *PLACED])
def test_where_patches_go(family):
    model, x = applied(family, "evo_vit"), images()
    found = trace(model, x)
    assert found.grid == (4, 4) and [step.block for step in found.steps] == [1, 2]
    if family in FREE and "open_clip" in family:
        with pytest.raises(ValueError, match="forward_intermediates .* remove_patch"):
            model.forward_intermediates(x)
    elif hasattr(model, "forward_intermediates"):
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(y.shape) for y in maps] == [(2, 32, 4, 4)] * 3


def test_images_of_any_size_with_rotary_positions():
    model, x = made("dinov3"), images(side=48)
    expected = model(x)
    apply_patch(model, "evit", keep_rate=1, fuse_token=False)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.keep_rate = 0.5
    assert [tokens_behind(model, images(side=side))[-1] for side in (48, 32)] == [10, 7]


def test_parallel_attentions_are_called_and_told_of():
    model, x, seen = made("side_by_side"), images(), []
    for path in model.blocks[0].attns:
        path.attn.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    apply_patch(model, "evit", keep_rate=0.5, reduction_loc=(0,))
    model(x)
    assert seen == [(2, 17, 32)] * 2
