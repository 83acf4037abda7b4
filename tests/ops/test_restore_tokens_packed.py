"""restore_tokens of packed sequences: the way back from their selection."""

import pytest
import torch

import tokenops
from support.packed_selection import boundaries
from tokenops import restore_tokens, select_tokens

OPERATOR = "restore_tokens"  # of the `backend` fixture


def test_literal_values(backend, device):
    base = torch.tensor([0.0, 1, 2, 3, 4], device=device).unsqueeze(1)
    tokens = torch.tensor([10.0, 20, 30], device=device).unsqueeze(1)
    y = restore_tokens(base, tokens, torch.tensor([3, -1, 0], device=device), prefix=7)
    assert y.flatten().tolist() == [30, 1, 2, 10, 4]


def test_there_and_back(backend, device):
    """What is selected goes back to where it was, and the gradients with it."""
    lengths, T = (5, 0, 1, 9), 17
    x = torch.randn(T, 6, device=device, requires_grad=True)
    chosen = select_tokens(
        x, torch.rand(T, device=device), 3, cu_seqlens=boundaries(lengths, device), max_seqlen=9, rest="mean"
    )
    assert torch.equal(restore_tokens(x, chosen.tokens, chosen.index), x)
    base = torch.zeros(T, 6, device=device, requires_grad=True)
    y = restore_tokens(base, chosen.tokens, chosen.index)
    kept = chosen.index[chosen.index >= 0]
    there = torch.zeros(T, dtype=torch.bool, device=device).scatter(0, kept, True)
    assert torch.equal(y, torch.where(there.unsqueeze(1), x, 0.0))
    dbase, dx = torch.autograd.grad(y.sum(), (base, x))
    assert torch.equal(dbase, (~there).float().unsqueeze(1).expand(T, 6))
    assert torch.equal(dx, there.float().unsqueeze(1).expand(T, 6))


def test_companions(backend, device):
    base, tokens = torch.randn(6, 4, device=device), torch.randn(3, 4, device=device)
    index = torch.tensor([4, -1, 0], device=device)
    pairs = (
        (torch.arange(6, device=device), torch.tensor([70, 71, 72], device=device)),
        (torch.randn(6, 5, device=device, requires_grad=True), torch.randn(3, 5, device=device, requires_grad=True)),
        (torch.zeros(6, 2, dtype=torch.bool, device=device), torch.ones(3, 2, dtype=torch.bool, device=device)),
    )
    y, (one, wide, flags) = restore_tokens(base, tokens, index, companions=pairs)
    assert one.tolist() == [72, 1, 2, 3, 70, 5]
    for ours, (old, new) in zip((y, wide, flags), ((base, tokens), *pairs[1:])):
        expected = old.clone()
        expected[4], expected[0] = new[0], new[2]
        assert torch.equal(ours, expected)
    dold, dnew = torch.autograd.grad(wide.sum(), pairs[1])
    assert dold[:, 0].tolist() == [0, 1, 1, 1, 0, 1] and dnew[:, 0].tolist() == [1, 0, 1]


def test_many_rows(device):
    """More than a selection of images may have."""
    base, tokens = torch.zeros(70_000, 3, device=device), torch.randn(30_000, 3, device=device)
    index = torch.randperm(70_000, device=device)[:30_000]
    for path in ("native", "reference"):
        with tokenops.use_backend(path):
            y = restore_tokens(base, tokens, index)
        assert torch.equal(y[index], tokens) and int((y != 0).any(dim=1).sum()) == 30_000


@pytest.mark.parametrize("compared", (0, 2**26))
def test_by_a_map_of_rows(backend, device, monkeypatch, ran_kernels, compared):
    """What many rows are restored by on a GPU gives what the kernels give, where several go to one place too."""
    monkeypatch.setattr("tokenops.ops.restore_tokens.MOST_COMPARED", compared)
    base, tokens, wide = (torch.randn(rows, 6, device=device) for rows in (40, 12, 40))
    index = torch.randperm(40, device=device)[:12]
    index[3] = -1
    if backend == "triton" or device == "cuda":  # which do not look
        index[5] = index[7]
        index[2] = 40
    leaves = [t.requires_grad_() for t in (base, tokens, wide)]
    pairs = ((wide, tokens), (torch.arange(40, device=device), torch.arange(100, 112, device=device)))
    with ran_kernels() as names:
        y, found = restore_tokens(base, tokens, index, companions=pairs)
        ours = y, *found, *torch.autograd.grad((y + found[0]).square().sum(), leaves)
    assert any(name.startswith("sum_rows") for name in names) == (compared == 0 and backend == "triton")
    place = [int(i) if 0 <= i < 40 else None for i in index]
    expected = [t.detach().clone() for t in (base, wide, pairs[1][0])]
    for j, n in enumerate(place):
        if n is not None:
            for old, new in zip(expected, (tokens, tokens, pairs[1][1])):
                old[n] = new[j].detach()
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)
    with tokenops.use_backend("reference"), torch.no_grad():
        upstream = 2 * (expected[0] + expected[1])
    replaced = {n: j for j, n in enumerate(place) if n is not None}
    free = torch.tensor([n not in replaced for n in range(40)], device=device).unsqueeze(1)
    dtokens = torch.zeros(12, 6, device=device)
    for n, j in replaced.items():
        dtokens[j] = 2 * upstream[n]
    for a, b in zip(ours[3:], (upstream * free, dtokens, upstream * free)):
        torch.testing.assert_close(a, b)


BAD = [
    ({"tokens": torch.zeros(2, 4)}, ValueError, "tokens has 2 rows, but index has 3"),
    ({"tokens": torch.zeros(3, 5)}, ValueError, "tokens has 5 channels, but base has 4"),
    ({"tokens": torch.zeros(1, 3, 4)}, ValueError, r"tokens must have shape \(K,C\)"),
    ({"index": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"index must have shape \(K\)"),
    ({"index": torch.zeros(3, dtype=torch.int32)}, TypeError, "index must be int64"),
    ({"tokens": torch.zeros(3, 4).double()}, TypeError, "tokens must have base's dtype"),
    ({"prefix": 1.5}, TypeError, "prefix must be an int, but got 1.5"),
    ({"index": torch.tensor([0, 9, 1])}, IndexError, "=9, but base has 6 tokens"),
    ({"index": torch.tensor([0, 1, 1])}, IndexError, "is there twice"),
    (
        {"companions": ((torch.zeros(5), torch.zeros(3)),)},
        ValueError,
        r"companions\[0\]\[0\] has 5 rows, but base has 6",
    ),
    ({"companions": ((torch.zeros(6, 2), torch.zeros(3)),)}, ValueError, r"companions\[0\] must be two of"),
    ({"companions": ((torch.zeros(6), torch.zeros(3).int()),)}, TypeError, r"companions\[0\] must have one dtype"),
    ({"companions": (torch.zeros(6),)}, TypeError, "companions must be a tuple of pairs"),
]


@pytest.mark.parametrize("change, error, words", BAD)
def test_what_does_not_fit(change, error, words):
    good = {"base": torch.zeros(6, 4), "tokens": torch.zeros(3, 4), "index": torch.tensor([0, 2, 1])}
    restore_tokens(**good)
    with pytest.raises(error, match=f"^restore_tokens: .*{words}"):
        restore_tokens(**{**good, **change})
