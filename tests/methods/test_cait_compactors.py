"""Compactors: products, gradients, what they prune and fold to; the change of basis is exact and truncates best."""

import copy

import pytest
import torch
from torch import nn

from support.cait_pruning import SMALL, batch, learn, model_of
from tokenops.methods.cait.compact import compact
from tokenops.methods.cait.compactors import (
    CompactorLinear,
    CompactorPruner,
    drop_biases,
    fold_compactors,
    rotate_heads,
)
from tokenops.methods.cait.pruning import parameters_to_train
from tokenops.methods.cait.structure import macs
from tokenops.nn import Attention


def randomised(attention):
    with torch.no_grad():
        for matrix in (attention.qkv.compactor_qk, attention.qkv.compactor_v):
            matrix.normal_(std=0.4)


def test_compactors_are_the_explicit_product():
    attention = model_of().blocks[0].attn.double()
    x, qkv = torch.randn(3, 7, 32, dtype=torch.float64), attention.qkv
    before = qkv(x)
    attention.qkv = CompactorLinear(attention)
    assert set(attention.qkv.state_dict()) == {"weight", "bias", "compactor_qk", "compactor_v"}
    torch.testing.assert_close(attention.qkv(x), before)
    randomised(attention)
    expected = before.unflatten(-1, (3, 2, 16)).clone()
    for head in range(2):
        for part, matrix in enumerate((*attention.qkv.compactor_qk[:, head], attention.qkv.compactor_v[head])):
            expected[:, :, part, head] = expected[:, :, part, head] @ matrix.T
    found = attention.qkv(x)
    torch.testing.assert_close(found, expected.flatten(2))
    plain = attention.qkv.fold()
    assert type(plain) is nn.Linear and plain.weight is qkv.weight
    torch.testing.assert_close(plain(x), found)


def test_heads_of_uneven_widths_have_compactors_too():
    attention = Attention(24, 3, attn_head_dim=4, v_head_dim=6)
    x, before = torch.randn(2, 5, 24), attention.qkv.weight.clone()
    attention.qkv = CompactorLinear(attention)
    randomised(attention)
    found = attention(x)
    attention.qkv = attention.qkv.fold()
    torch.testing.assert_close(attention(x), found)
    assert (attention.qkv.weight != before).any() and attention.qkv.bias is None


@pytest.mark.parametrize("same", [False, True])
def test_masked_rows_get_the_lasso_alone(same):
    model, (x, y) = model_of(), batch()
    pruner = CompactorPruner(model, 0.6, steps=(0, 9), multiples=SMALL, strength=0.5, same_channels=same)
    for block in model.blocks:
        randomised(block.attn)
    pruner.kept = [torch.rand(kept.shape) > 0.5 for kept in pruner.kept]
    nn.functional.cross_entropy(model(x), y).backward()
    task = [p.grad.clone() for p in pruner.parameters()]
    pruner.step()
    for layer, kept, parameter, before in zip(pruner.layers, pruner.kept, pruner.parameters(), task):
        row = parameter.detach()
        if layer.kind == "hidden":
            assert (before != 0).all()
            torch.testing.assert_close(parameter.grad, 0.5 * row / row.abs() + before * kept[0])
            continue
        dims = {("qk", False): (0, 3), ("qk", True): (0, 1, 3), ("v", False): (2,), ("v", True): (0, 2)}[
            layer.kind, same
        ]
        lasso = 0.5 * row / row.square().sum(dims, keepdim=True).sqrt()
        stays = kept.unsqueeze(2)
        torch.testing.assert_close(parameter.grad, torch.where(stays, before + lasso, lasso))
        assert (before != 0).any()


def test_compactors_prune_what_matters_least():
    """Rows of planted small norm go first; at the end they are gone from the weights, and training went on."""
    model, (x, y) = model_of(), batch(size=8)
    options = dict(target=0.8, steps=(1, 6), settle=9, every=2, multiples=SMALL)
    pruner = CompactorPruner(model, strength=1e-3, **options)
    planted = [torch.rand(kept.shape).argsort(1) < kept.shape[1] // 2 for kept in pruner.kept]
    with torch.no_grad():
        for layer, small, parameter in zip(pruner.layers, planted, pruner.parameters()):
            pruner._rows(parameter, layer.kind).mul_(torch.where(small, 1e-4, 1.0).unsqueeze(2))
    optimizer = torch.optim.SGD(
        [
            dict(params=parameters_to_train(model)),
            dict(params=list(pruner.parameters()), momentum=0.9, weight_decay=0.0),
        ],
        lr=1e-2,
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [p for p in model.parameters() if p.requires_grad]
    )
    for _ in range(9):
        learn(model, pruner, optimizer, x, y)
    assert not pruner.frozen and 0 < pruner.remaining < 1e-2
    before = model.eval()(x)
    pruner.freeze()
    assert pruner.frozen and pruner.cost <= pruner.budget and not list(pruner.parameters())
    for kept, small in zip(pruner.kept, planted):
        assert (kept | small).all()  # nothing of what is large has gone
    assert not any(isinstance(module, CompactorLinear) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-2)
    small = compact(model)
    assert macs(small) == pruner.cost
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    fresh = CompactorPruner(model_of(), **options)
    fresh.load_state_dict(pruner.state_dict())
    fresh.model.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.model.eval()(x), model(x))


def test_the_lasso_empties_masked_rows():
    model, (x, y) = model_of(), batch()
    pruner = CompactorPruner(model, 0.7, steps=(0, 1), settle=90, every=1, multiples=SMALL, strength=0.005)
    optimizer = torch.optim.SGD(pruner.parameters(), lr=4.0)
    first = None
    for _ in range(90):
        learn(model, pruner, optimizer, x, y)
        first = pruner.remaining if first is None else first
    assert first > 0.9 and pruner.remaining < 0.05
    stay = [square[kept].mean() for square, kept in zip(pruner._squares(), pruner.kept)]
    assert min(stay[1::3]) > 0.1  # of v the task holds on to what it may keep


def test_unpruned_compactors_fold():
    model = model_of().eval()
    x = batch()[0]
    pruner = CompactorPruner(model, 0.6, steps=(0, 9), multiples=SMALL)
    for block in model.blocks:
        randomised(block.attn)
        nn.init.uniform_(block.mlp.mask, 0.5, 1.5)
    expected = model(x)
    for folded in (compact(model), fold_compactors(model)):
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    assert pruner.cost == pruner.costs.total
    with pytest.raises(ValueError, match="settle=-1"):
        CompactorPruner(model_of(), 0.6, steps=(0, 9), settle=-1)


# the change of basis


def attention_of(dtype=torch.float64, **kwargs):
    attention = Attention(24, 3, qkv_bias=True, **kwargs).to(dtype)
    with torch.no_grad():
        attention.qkv.weight.normal_(std=0.4)
        attention.qkv.bias.normal_()
    return attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kwargs", [{}, dict(proj_bias=False), dict(v_head_dim=5), dict(attn_head_dim=6)])
def test_rotation_is_exact(dtype, tolerance, kwargs):
    attention, x = attention_of(dtype, **kwargs), torch.randn(2, 9, 24, dtype=dtype)
    before, weight = attention(x), attention.qkv.weight
    old = weight.detach().clone()
    assert rotate_heads(attention) is attention and attention.qkv.weight is weight
    torch.testing.assert_close(attention(x), before, rtol=tolerance, atol=tolerance)
    assert ((weight - old).abs().amax(1) > 1e-3).all()
    # channels of q and k are now orthogonal, of the same length, and the longest comes first
    wide = attention.num_heads * attention.head_dim
    heads = torch.cat((weight, attention.qkv.bias.unsqueeze(1)), 1).double()[: 2 * wide].unflatten(0, (2, 3, -1))
    products = heads @ heads.mT
    lengths = products.diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(products, torch.diag_embed(lengths), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=1e-4)
    assert (lengths.diff(dim=2) <= 1e-6).all()


def test_rotation_without_a_bias():
    attention = Attention(24, 3).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(rotate_heads(copy.deepcopy(attention))(x), attention(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d", [1, 3, 5, 7])
def test_truncation_after_rotation_is_better(d):
    x = torch.randn(4, 33, 24, dtype=torch.float64)
    errors = {"before": 0.0, "after": 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        plain = attention_of()
        drop_biases(plain)
        expected = plain(x)
        for name, attention in (("before", plain), ("after", rotate_heads(copy.deepcopy(plain)))):
            q, k, v = attention.qkv.weight.detach().unflatten(0, (3, 3, 8))
            b = attention.qkv.bias.detach().unflatten(0, (3, 3, 8))[0].unsqueeze(2)
            out = attention.proj.weight.detach().unflatten(1, (3, 8)).movedim(1, 0)
            logits = torch.cat((q, b), 2).mT @ k, out @ v
            short = torch.cat((q, b), 2)[:, :d].mT @ k[:, :d], out[:, :, :d] @ v[:, :d]
            left = [(a - b).norm(dim=(1, 2)) for a, b in zip(logits, short)]
            if name == "before":
                best = left
            assert all((now <= was + 1e-9).all() for now, was in zip(left, best))  # Eckart and Young
            attention.qk_mask = attention.v_mask = (torch.arange(8) < d).double().expand(3, -1)
            errors[name] += (attention(x) - expected).square().mean().item()
    assert errors["after"] < errors["before"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: setattr(a, "qk_mask", torch.ones(3, 8)), "qk_mask"),
        (lambda a: setattr(a, "v_mask", torch.ones(3, 8)), "v_mask"),
        (lambda a: setattr(a, "q_norm", nn.LayerNorm(8)), "q_norm"),
        (lambda a: setattr(a, "norm", nn.LayerNorm(24)), "has norm"),
        (lambda a: setattr(a, "gate", nn.Linear(24, 24)), "gate"),
    ],
)
def test_rotation_is_refused(change, message):
    attention = attention_of()
    change(attention)
    with pytest.raises(ValueError, match=message):
        rotate_heads(attention)
