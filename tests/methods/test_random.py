"""Merging at random, the baseline of ToMe, against the same written out plainly; dropping is in patching's tests."""

import pytest
import torch

from support.patched_models import embedded, gradients, images, model_of, softmax_attention, tokens_behind
from tokenops import apply_patch, remove_patch, trace
from tokenops.patching.visualize import visualize


def plain_random(model, x, rates):
    """Tokens behind the last block, their sizes, and the token of every patch: draws as the method makes them."""
    x, P = embedded(model, x), model.num_prefix_tokens
    sizes, source = torch.ones(x.shape[:2]), torch.arange(x.shape[1] - P).repeat(len(x), 1)
    for block, r in zip(model.blocks, rates):
        y, _, keys = softmax_attention(block.attn, block.norm1(x), sizes.log())
        x = x + block.ls1(y)
        drawn = torch.rand(len(x), x.shape[1] - P).argsort(dim=1)
        tokens, counts = [], []
        for b in range(len(x)):
            kept = sorted(drawn[b, r:].tolist())
            groups = {j: [j] for j in kept}
            for i in drawn[b, :r].tolist():
                likeness = torch.cosine_similarity(keys[b, P + i], keys[b, [P + j for j in kept]], dim=-1)
                groups[kept[int(likeness.argmax())]].append(i)
            rows = [torch.tensor(groups[j]) + P for j in kept]
            means = [(sizes[b, row, None] * x[b, row]).sum(0) / sizes[b, row].sum() for row in rows]
            tokens.append(torch.stack([*x[b, :P], *means]))
            counts.append(torch.stack([*sizes[b, :P], *(sizes[b, row].sum() for row in rows)]))
            into = {i: m for m, j in enumerate(kept) for i in groups[j]}
            source[b] = torch.tensor([into[int(i)] for i in source[b]])
        x, sizes = torch.stack(tokens), torch.stack(counts)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, sizes, source


@pytest.mark.parametrize("family", ["plain", "registers", "norms", "average"])
@torch.no_grad()
def test_equals_the_merging_written_plainly(family):
    model, x = model_of(family), images()
    P = model.num_prefix_tokens
    torch.manual_seed(7)
    tokens, sizes, source = plain_random(model, x, (3, 5, 2))
    apply_patch(model, "random", r=[3, 5, 2])
    torch.manual_seed(7)
    y = model(x)
    if family == "average":  # counted by sizes
        mean = (model.norm(tokens) * sizes[..., None]).sum(1) / 16
        torch.testing.assert_close(y, model.head(model.fc_norm(mean)), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(y, model.forward_head(model.norm(tokens)), rtol=1e-4, atol=1e-4)
    torch.manual_seed(7)
    found = trace(model, x)
    assert [step.tokens for step in found.steps] == [P + 13, P + 8, P + 6]
    assert torch.equal(found.steps[-1].sources, source)
    assert visualize(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), found).width > 100


def test_as_many_are_merged_as_by_tome():
    x, dense = images(), model_of("plain")
    model, tome = apply_patch(model_of("plain"), "random", r=8), apply_patch(model_of("plain"), "tome", r=8)
    assert tokens_behind(model, x) == tokens_behind(tome, x) == [9, 5, 3] and not hasattr(model, "keep_rate")
    model.r = tome.r = (3, -1)
    assert tokens_behind(model, x) == tokens_behind(tome, x) == [11, 8, 8]
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(1)
    assert torch.equal(model(x), first) and not torch.allclose(first, tome(x), atol=1e-3)
    model.r = 0
    assert torch.equal(model(x), dense(x))
    with pytest.raises(ValueError, match="r=-1"):
        model.r = -1
    assert torch.equal(remove_patch(model)(x), dense(x)) and not hasattr(model, "r")


def test_maps_gradients_and_a_compiler():
    model, x = apply_patch(model_of("layer_scale"), "random", r=3), images()
    found, _ = gradients(model, x)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if name.endswith("attn.proj.weight"))
    assert [tuple(y.shape) for y in model.forward_intermediates(x, intermediates_only=True)] == [(2, 32, 4, 4)] * 3
    torch.compiler.reset()  # variants of other models count too
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("more", [dict(keep_rate=0.7), dict(reduction_loc=(1,)), dict(fuse_token=True)])
def test_merging_and_dropping_are_two_things(more):
    with pytest.raises(ValueError, match="random: r=3 merges in every block, but keep_rate, .* give r or these"):
        apply_patch(model_of("plain"), "random", r=3, **more)
