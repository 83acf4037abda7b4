"""The other methods by apply_patch: EViT written out plainly, and the library's own models with the same weights."""

from dataclasses import dataclass

import pytest
import torch

from support.patched_models import (
    ROTARY,
    embedded,
    images,
    model_of,
    plain,
    tokens_behind,
    tokens_of,
)
from tokenops import apply_patch, trace
from tokenops.methods import patch_slimming
from tokenops.nn import TokenSlimming
from tokenops.patching import Flow, Method, Role, blocks, engine


def test_keep_rates_may_be_set_at_any_time():
    model, x = apply_patch(model_of("plain", depth=4), "evit"), images()
    assert model.keep_rate == 0.7 and tokens_behind(model, x) == [17, 14, 12, 10]
    model.keep_rate = 1
    assert tokens_behind(model, x) == [17] * 4
    model.keep_rate = (0.5, 1, 1, 0.5)
    assert tokens_behind(model, x) == [10, 10, 10, 7]
    with pytest.raises(ValueError, match="keep_rate=0"):
        model.keep_rate = 0
    assert model.keep_rate == (0.5, 1, 1, 0.5) and tokens_behind(model, x) == [10, 10, 10, 7]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", ["eva", *ROTARY])
@pytest.mark.parametrize("method, counts", [("evit", [13, 9, 9]), ("patch_slimming", [13, 9, 9])])
def test_chosen_tokens_keep_their_positions(family, method, counts):
    """A dense block that sees the chosen tokens alone, each with its rotary position, is the block in the model."""
    model, x = model_of(family), images(1)
    prefix, seen = model.num_prefix_tokens, []
    rope = model._pos_embed(model.patch_embed(x))[1]
    if method == "evit":
        apply_patch(model, method, keep_rate=[0.75, 0.5, 1], fuse_token=False)
    else:
        apply_patch(model, method, schedule=counts)
    model.blocks[2].register_forward_hook(lambda m, args, y: seen.append((tokens_of(args[0]), tokens_of(y))))
    with torch.no_grad():
        sources = trace(model, x).steps[1].sources[0]
        before, after = seen[0]
        places = torch.stack([(sources == token).nonzero().squeeze() for token in range(before.shape[1] - prefix)])
        own = rope if rope is None else (rope[2] if model.rope_mixed else rope)
        rows = None if own is None else own[..., places, :]
        expected = plain(model.blocks[2])(before, rope=rows)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    if own is not None:
        wrong = plain(model.blocks[2])(before, rope=own[..., : len(places), :])
        assert not torch.allclose(after, wrong, atol=1e-3)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", ["eva02", "grouped"])
def test_slimmed_rotary_rows_are_those_of_the_whole_block(family):
    model, x, seen = model_of(family), images(), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: seen.append(tokens_of(y)))
    order = [5, 1, 2, 9, *(i for i in range(16) if i not in (5, 1, 2, 9))]
    schedule = patch_slimming.Schedule.from_counts([5, 5, 5], (4, 4), order)
    with torch.no_grad():
        model(x)
        apply_patch(model, "patch_slimming", schedule=schedule)(x)
    prefix = model.num_prefix_tokens
    rows = [*range(prefix), *(prefix + i for i in sorted(order[:4]))]
    torch.testing.assert_close(seen[3], seen[0][:, rows], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", ["plain", "registers", "map"])
def test_sit_mixes_tokens_before_its_blocks(family):
    model, x = model_of(family), images()
    torch.manual_seed(4)
    apply_patch(model, "sit", keeping_ratio=0.5, locations=(1, 2))
    slimmings = [model.blocks[i].slimming for i in (1, 2)]
    assert all(isinstance(slimming, TokenSlimming) for slimming in slimmings)
    with torch.no_grad():
        for slimming in slimmings:
            slimming.weight[3].weight.normal_()
        y = model.forward_features(x)
        tokens = embedded(model, x)
        for i, block in enumerate(model.blocks):
            if i:
                tokens = slimmings[i - 1](tokens, prefix=model.num_prefix_tokens)
            tokens = plain(block)(tokens)
    torch.testing.assert_close(y, model.norm(tokens), rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in slimmings[0].parameters())


def test_random_tokens_stay_and_the_others_are_gone():
    model, x = apply_patch(model_of("plain"), "random", keep_rate=0.5, reduction_loc=(0, 2)), images(64)
    seen = [step.sources >= 0 for step in trace(model, x).steps]
    assert [mask.sum(dim=1).unique().tolist() for mask in seen] == [[8], [4]]
    assert (seen[1] <= seen[0]).all()
    often = seen[0].float().mean(dim=0)  # of 64 draws, each patch in half of them: 6 deviations
    assert (often - 0.5).abs().max() < 6 * 0.5 / 8
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    model.keep_rate = 1
    assert torch.equal(model(x), model_of("plain")(x))


def test_a_method_of_ones_own():
    """Every second patch goes, behind one block: a plug-in of a few lines."""

    @dataclass(frozen=True)
    class Halved(Role):
        halves: bool = False

        @property
        def idle(self):
            return not self.halves

        def run(self, block, flow, positions, record):
            x = blocks.whole(block, flow.tokens, positions)
            x = torch.cat((x[:, : self.prefix], x[:, self.prefix :: 2]), dim=1)
            if record is not None:
                sources = torch.arange(16) // 2
                record.note(x, sources.masked_fill(torch.arange(16) % 2 == 1, -1).expand(len(x), -1))
            return Flow(x, None)

    class Half(Method):
        name, scores, setting = "half", False, "behind"

        def __init__(self, behind):
            self.value = behind

        def roles(self, site):
            return [Halved(site.prefix, False, i == self.value) for i in range(site.depth)]

    try:
        model, x = apply_patch(model_of("plain"), "half", behind=1), images()
        assert tokens_behind(model, x) == [17, 9, 9]
        assert [(step.block, step.tokens) for step in trace(model, x).steps] == [(1, 9)]
        model.behind = 0
        assert tokens_behind(model, x) == [9, 9, 9]
        other = apply_patch(model_of("plain"), Half(0))
        assert torch.equal(other(x), model(x))
        with pytest.raises(TypeError, match="behind given beside a method"):
            apply_patch(model_of("plain"), Half(0), behind=2)
    finally:
        del engine.METHODS["half"]
