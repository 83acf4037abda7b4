"""Where tokens are: rows of tables and biases for tokens that are left, merged or mixed, and attention by them."""

import copy

import pytest
import torch
import transformers

from support.patched_models import METHODS, ROTARY, blocks_of, images, model_of, plain, tokens_of
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, trace
from tokenops.methods.evit import _fused
from tokenops.methods.tome import _kept
from tokenops.ops.merge_bipartite import match_bipartite
from tokenops.patching import blocks, families
from tokenops.patching.positions import Positions

HF = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
TABLES = {"shared": (6, 4), "heads": (3, 6, 4), "images": (2, 1, 6, 4), "both": (2, 3, 6, 4)}


def placed(shape=(6, 4), prefix=1, **kwargs):
    torch.manual_seed(0)
    return Positions((torch.randn(shape, **kwargs),), torch.randn(1, 3, prefix + 6, prefix + 6, **kwargs), prefix)


def rows_of(table, b, h):
    """The rows (N, D) of one image and head."""
    return table.expand(2, 3, *table.shape[-2:])[b, h]


@pytest.mark.parametrize("shape", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_rows_of_tokens_are_those_of_their_patches(shape, prefix):
    positions = placed(shape, prefix)
    places = torch.tensor([[5, 0, 2], [1, 1, 4]])
    for given in (places, places[0]):
        tables, bias, *_ = positions.at(given)
        for b in range(2):
            rows = given[b] if given.dim() == 2 else given
            both = torch.cat((torch.arange(prefix), rows + prefix))
            for h in range(3):
                assert torch.equal(rows_of(tables[0], b, h), rows_of(positions.tables[0], b, h)[rows])
                assert torch.equal(rows_of(bias, b, h), positions.bias[0, h][both][:, both])


@pytest.mark.parametrize("shape", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_rows_of_merged_tokens_are_means(shape, prefix):
    """By loops over the tokens; a dropped patch counts nowhere, a token of none has zeros, of one its row."""
    positions, source = (
        placed(shape, prefix, dtype=torch.float64),
        torch.tensor([[0, 0, 1, -1, 0, 1], [3, 3, 0, 1, 1, 1]]),
    )
    tables, bias, *_ = positions.mean(source, 4)
    for b in range(2):
        members = [[i] for i in range(prefix)]
        members += [[prefix + n for n in range(6) if source[b, n] == m] for m in range(4)]
        for h in range(3):
            old, of_pairs = rows_of(positions.tables[0], b, h), positions.bias[0, h]
            for m, group in enumerate(members):
                if m >= prefix:
                    expected = (
                        torch.stack([old[n - prefix] for n in group]).mean(0) if group else torch.zeros(4).double()
                    )
                    torch.testing.assert_close(rows_of(tables[0], b, h)[m - prefix], expected)
                for k, others in enumerate(members):
                    pairs = [of_pairs[i, j] for i in group for j in others]
                    mean = torch.stack(pairs).mean() if pairs else torch.zeros(()).double()
                    torch.testing.assert_close(bias[b, h, m, k], mean)


def test_a_token_of_one_patch_has_its_row_to_the_bit():
    positions, order = placed(), torch.randperm(6)
    tables, bias, *_ = positions.mean(order.argsort()[None], 6)
    own = positions.at(order)
    assert torch.equal(tables[0][0, 0], own.tables[0]) and torch.equal(bias, own.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positions.mean(order.argsort()[None], 6).tables[0], tables[0])


@pytest.mark.parametrize("family", ROTARY)
def test_the_logit_of_equal_merged_keys_is_the_mean_of_theirs(family):
    """Which the row at the mean place does not give: a merged token is what every query sees of its patches."""
    model = model_of(family).double()
    attention, tables = model.blocks[1].attn, tuple(table.double() for table in tables_of(model))
    kind = blocks.family_of(model.blocks[1])
    prefix, ask = model.num_prefix_tokens, blocks.Ask()
    torch.manual_seed(1)
    x = torch.randn(1, prefix + 16, 32).double()
    x[:, prefix + 3] = x[:, prefix + 9] = x[:, prefix + 14]  # three equal patches, apart
    source = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 9, 10, 11, 12, 3, 13]])
    few = x[:, [*range(prefix + 9), *(prefix + n for n in (10, 11, 12, 13, 15))]]
    with torch.no_grad():
        q, k, _ = kind.heads(attention, x, ask, Positions(tables, None, prefix))
        _, merged, _ = kind.heads(attention, few, ask, Positions(tables, None, prefix).mean(source, 14))
    logits, found = q @ k.transpose(-2, -1), q @ merged.transpose(-2, -1)
    mean = logits[..., [prefix + n for n in (3, 9, 14)]].mean(-1)
    torch.testing.assert_close(found[..., prefix + 3], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[..., : prefix + 3], logits[..., : prefix + 3], rtol=1e-12, atol=1e-12)


def tables_of(model):
    """The rotary tables of the second block."""
    x = model._pos_embed(model.patch_embed(images(1).to(next(model.parameters()).dtype)))[1]
    return (x[1] if getattr(model, "rope_mixed", False) else x,)


def test_a_destination_keeps_its_own_place():
    for prefix in (0, 1, 2):
        metric = torch.randn(2, prefix + 9, 4, generator=torch.Generator().manual_seed(prefix))
        index, places = match_bipartite(metric, 3, prefix=prefix), None
        found = _kept(index, places, 6, prefix)
        for b in range(2):
            for m in range(6):
                group = [j for j in range(9) if index[b, j] == m]
                into = [j for j in group if (prefix + j) % 2] or group
                assert [found[b, m].item()] == into
        again = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(9))
        assert torch.equal(_kept(index, again, 6, prefix), again.gather(1, found))


def beit(**kwargs):
    torch.manual_seed(0)
    model = redrawn(transformers.BeitModel(transformers.BeitConfig(**HF, **kwargs)))
    for name, p in model.named_parameters():
        if "relative_position_bias_table" in name:
            p.data.normal_(0, 1)
    return model


def dinov3(**kwargs):
    torch.manual_seed(0)
    return redrawn(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HF, num_register_tokens=2, **kwargs)))


PLACED = {
    "beit": lambda: beit(use_relative_position_bias=True),
    "beit, shared": lambda: beit(use_shared_relative_position_bias=True),
    "dinov3": dinov3,
    **{family: lambda family=family: model_of(family) for family in ROTARY},
}
EVERY = {
    **METHODS,
    "tome, destination": (dict(r=0), dict(r=3, positions="destination")),
    "evit, dropping": (dict(keep_rate=1), dict(keep_rate=0.5, reduction_loc=(0, 2), fuse_token=False)),
    "random": (dict(keep_rate=1, fuse_token=True), dict(keep_rate=0.5, reduction_loc=(0, 2), fuse_token=True)),
    "cait, block": (dict(points={}), dict(points={0: "horizontal", 1: "vertical"}, layout="block")),
}


def applied(model, method, reduce=True):
    torch.manual_seed(3)
    return apply_patch(model, method.partition(",")[0], **EVERY[method][reduce])


def result(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state[:, 0]


@pytest.mark.parametrize("kind", ["beit", "beit, shared", "dinov3", "heads"])
@pytest.mark.parametrize("method", EVERY)
def test_models_that_know_places(kind, method):
    """Nothing reduced is nothing changed; a batch is its images one by one; everything learns; and back to the bit."""
    model, x = PLACED[kind]().eval(), images()
    expected = result(model, x)
    expected.square().sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    model.zero_grad()
    torch.testing.assert_close(result(applied(model, method, False), x), expected, rtol=0, atol=1e-5)
    remove_patch(model)
    y = result(applied(model, method), x)
    assert y.shape == expected.shape and not torch.allclose(y, expected, atol=1e-3)
    if method != "random":
        torch.testing.assert_close(torch.cat([result(model, one[None]) for one in x]), y, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert {name for name in learnt if model.get_parameter(name).grad is None} == set()
    assert torch.equal(result(remove_patch(model), x), expected)


#: what leaves the last block as it is
BEFORE = {
    "tome": dict(r=[3, 4, 0], prop_attn=False),
    "tome, destination": dict(r=[3, 4, 0], prop_attn=False, positions="destination"),
    "evit": dict(keep_rate=0.5, reduction_loc=(0,)),
    "evit, dropping": dict(keep_rate=0.5, reduction_loc=(0, 1), fuse_token=False),
    "sit": dict(keeping_ratio=0.5, locations=(0, 1)),
    "cait": METHODS["cait"][1],
    "cait, block": EVERY["cait, block"][1],
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in PLACED if kind != "beit"])
@pytest.mark.parametrize("method", BEFORE)
def test_the_block_behind_is_the_models_own_given_the_rows(kind, method):
    """Means over the patches that each token draws on, as the trace tells; of a destination, the row of one of them."""
    model, x = PLACED[kind]().eval(), images()
    torch.manual_seed(3)
    apply_patch(model, method.partition(",")[0], **BEFORE[method])
    block, seen = blocks_of(model)[-1], []
    block.register_forward_hook(lambda *called: seen.append(called[1:]), with_kwargs=True)
    model(x)
    (args, kwargs, found), steps = seen[0], trace(model, x).steps
    (tokens, state), prefix = args[0], block.tokenops_role.prefix
    own = families.positions(block, args[1:], kwargs, prefix)
    n = tokens.shape[1] - prefix
    weights = steps[-1].weights
    if weights is None:
        sources = steps[-1].sources
        sources = torch.where(sources < 0, n - 1, sources) if method == "evit" else sources
        into = torch.nn.functional.one_hot(sources + 1, n + 1)[..., 1:].transpose(1, 2).float()
        if method == "tome, destination":
            into = torch.nn.functional.one_hot(state.places, into.shape[2]).float() * into
            assert (into.sum(2) == 1).all()
        weights = into / into.sum(2, keepdim=True)
    tables = tuple(weights.unsqueeze(1) @ table for table in own.tables)
    if own.bias is None:
        given = {"position_embeddings": tables} if kind == "dinov3" else {"rope": tables[0]}
    else:
        whole = torch.stack([torch.block_diag(torch.eye(prefix), one) for one in weights]).unsqueeze(1)
        given = {"attention_mask": whole @ own.bias @ whole.transpose(2, 3)}
    expected = plain(block)(tokens, **given)
    expected, found = (tokens_of(y) for y in (expected, found))
    if method in ("tome", "tome, destination") and found.shape != expected.shape:  # brought back
        found = torch.stack([found[b][[*range(prefix), *firsts(state.source[b], n, prefix)]] for b in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def firsts(source, tokens, prefix):
    """A row of every token among those that were brought back."""
    return [prefix + source.tolist().index(m) for m in range(tokens)]


def test_a_fused_token_is_all_that_was_fused_into_it():
    """Fused again or kept, whichever: the patches of every token by sets."""
    for seed in range(4):
        drawn = torch.Generator().manual_seed(seed)
        source, members = torch.arange(9).expand(2, -1), [[{n} for n in range(9)] for _ in range(2)]
        for k in (5, 4, 2):
            N = len(members[0])
            index = torch.stack([torch.randperm(N, generator=drawn)[:k].sort().values for _ in range(2)])
            source = _fused(index, N).gather(1, source)
            for b in range(2):
                kept = index[b].tolist()
                others = set().union(*(members[b][i] for i in range(N) if i not in kept))
                members[b] = [members[b][i] for i in kept] + [others]
                assert all(members[b][m] == {n for n in range(9) if source[b, n] == m} for m in range(k + 1))


def test_tokens_are_compared_before_they_are_turned():
    model, asked = model_of("heads"), dict(key_mean=True)
    block, x = model.blocks[1], torch.randn(2, model.num_prefix_tokens + 16, 32)
    turned = blocks.attend(block, x, positions=Positions(tables_of(model), None, model.num_prefix_tokens), **asked)
    torch.testing.assert_close(turned[2], blocks.attend(block, x, **asked)[2])


def test_positions_are_a_choice_of_two():
    with pytest.raises(ValueError, match="tome: positions='centre', but it must be 'mean' or 'destination'"):
        apply_patch(model_of("rope"), "tome", r=2, positions="centre")


@torch.no_grad()
@pytest.mark.parametrize("positions", ["mean", "destination"])
def test_compiles_whole(positions):
    model, x = apply_patch(model_of("rope"), "tome", r=3, positions=positions), images()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
