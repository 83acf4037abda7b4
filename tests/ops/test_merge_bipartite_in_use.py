"""Bipartite merging inside torch's machinery, under ToMe's names, and what it says to bad input."""

import itertools

import pytest
import torch

import tokenops
from support.bipartite import plain_merge
from support.compiled import ABSENT
from support.threads import by_threads
from tokenops import reference, tome
from tokenops.ops.merge_bipartite import merge_by_index
from tokenops.ops.schemas import kernel
from tokenops.tome import (
    Merge,
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)

OPS = ("match_bipartite", "merge_bipartite", "unmerge_bipartite")
match_bipartite, merge_bipartite, unmerge_bipartite = (getattr(tokenops, op) for op in OPS)


OPERATOR = "merge_bipartite"  # of the `backend` fixture


def test_threads_change_nothing():
    """Neither one image, which threads share, nor many, of which each thread has its own."""
    if ABSENT is not None:
        pytest.skip(ABSENT)
    for shape in ((1, 700, 48), (5, 200, 48)):
        x = torch.randn(shape).requires_grad_()

        def call(x=x):
            merged = merge_bipartite(x, x, 90, norm=(None, None, 1e-6))
            back = unmerge_bipartite(merged.normed, merged.index)
            return *merged[:5], back, *torch.autograd.grad(back.square().sum() + merged.tokens.sum(), x)

        by_threads(call, 1, 2, 4)


def test_gradients_that_nobody_asked_for(backend, device):
    x, w = torch.randn(2, 7, 4, device=device), torch.rand(4, device=device)
    metric, sizes = (torch.randn(s, device=device).requires_grad_() for s in ((2, 7, 3), (2, 7)))
    merged = merge_bipartite(x, metric, 2, sizes=sizes)
    assert not any(t.requires_grad for t in merged[:4])
    merged = merge_bipartite(x, metric, 2, sizes=sizes, norm=(w.requires_grad_(), None, 1e-6))
    assert [t.requires_grad for t in merged[:5]] == [False, False, False, False, True]
    merged = merge_bipartite(x.requires_grad_(), metric, 2, sizes=sizes, norm=(w, w, 1e-6))
    dx, dw, *none = torch.autograd.grad(merged.normed.square().sum(), (x, w, metric, sizes), allow_unused=True)
    assert none == [None, None]
    plain = plain_merge(x, metric, 2, sizes=sizes, norm=(w, w, 1e-6))
    torch.testing.assert_close((dx, dw), torch.autograd.grad(plain[4].square().sum(), (x, w)))


# ToMe's names


@pytest.mark.parametrize("class_token, distill_token", ((False, False), (True, False), (True, True)))
def test_tome(backend, device, class_token, distill_token):
    """Each function is what plain torch makes of the index."""
    P, x, keys = class_token + distill_token, torch.randn(2, 11, 6, device=device), torch.randn(2, 11, 4, device=device)
    merge, unmerge = bipartite_soft_matching(keys, 3, class_token, distill_token)
    assert torch.equal(merge.index, match_bipartite(keys, 3, prefix=P)) and merge.tokens == 11 - P - 3
    one_hot = torch.zeros(2, 8, 11, device=device)  # which rows make up which
    one_hot[:, range(P), range(P)] = 1
    one_hot[:, P:, P:] = torch.nn.functional.one_hot(merge.index, merge.tokens).mT.float()
    torch.testing.assert_close(merge(x, mode="sum"), one_hot @ x)
    torch.testing.assert_close(merge(x), one_hot @ x / one_hot.sum(dim=2, keepdim=True))
    y = torch.randn(2, 8, 6, device=device)
    torch.testing.assert_close(unmerge(y), one_hot.mT @ y)
    size = torch.randint(1, 5, (2, 11, 1), device=device).float()
    averaged, total = merge_wavg(merge, x, size)
    torch.testing.assert_close(total, one_hot @ size)
    torch.testing.assert_close(averaged, one_hot @ (x * size) / total)
    torch.testing.assert_close(merge_wavg(merge, x)[1], one_hot.sum(dim=2, keepdim=True))
    source = merge_source(merge, x)
    assert torch.equal(source, one_hot)
    again, _ = bipartite_soft_matching(y, 2, class_token, distill_token)
    assert torch.equal(merge_source(again, y, source), again(one_hot, mode="sum"))


def test_tome_takes_what_there_is(backend, device):
    x = torch.randn(1, 7, 4, device=device)
    assert [bipartite_soft_matching(x, r, True)[0](x).shape[1] for r in (-1, 0, 2, 3, 100)] == [7, 7, 5, 4, 4]
    assert bipartite_soft_matching(x[:, :1], 5, True)[0](x[:, :1]).shape[1] == 1


def test_every_kth_token_takes_the_others(backend, device):
    """The likeness of 0 and 4 with 1 is equal to that with 3: the first. What is behind the last whole group stays."""
    metric = torch.tensor([[1.0, 1], [1, 0], [3, 1], [0, 1], [2, 2], [0, 7], [9, 1]], device=device)[None]
    merge, unmerge = kth_bipartite_soft_matching(metric, 2)  # 1, 3 and 5 are left; 5 is as 3, and later
    assert merge.index.tolist() == [[0, 0, 0, 1, 0, 2, 0]] and merge.tokens == 3
    x = torch.arange(1.0, 8, device=device).view(1, 7, 1).requires_grad_()
    y, size = merge_wavg(merge, x)
    assert size.flatten().tolist() == [5, 1, 1]
    torch.testing.assert_close(y.flatten(), torch.tensor([18.0 / 5, 4, 6], device=device))  # 1, 2, 3, 5, 7; 4; 6
    assert merge(x, mode="sum").flatten().tolist() == [18, 4, 6]
    torch.testing.assert_close(unmerge(y), y[:, merge.index[0]])
    y[:, 0].sum().backward()
    expected = [0.2, 0.2, 0.2, 0, 0.2, 0, 0.2]
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(expected, device=device))
    for k, left in ((-1, 7), (1, 7), (3, 2), (4, 1), (7, 1), (8, 7)):
        merge, unmerge = kth_bipartite_soft_matching(metric, k)
        assert merge(x).shape[1] == left and unmerge(merge(x)).shape[1] == 7
        if left == 7:
            assert torch.equal(merge(x), x)


def test_drawn_tokens_go_into_the_others(device):
    """Sources and destinations are read off the sizes; each source is where a loop over the destinations puts it."""
    metric = torch.randn(8, 9, 4, device=device)
    draw = torch.Generator().manual_seed(5)
    merge, unmerge = random_bipartite_soft_matching(metric, 6, generator=draw)
    again, _ = random_bipartite_soft_matching(metric.double(), 6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.index, merge.index) and merge.tokens == 3
    drawn = torch.rand(8, 9, generator=torch.Generator().manual_seed(5), device="cpu").argsort(dim=1)
    for b in range(8):
        kept = sorted(drawn[b, 6:].tolist())
        likeness = torch.cosine_similarity(metric[b, :, None], metric[b, None, kept], dim=-1)
        expected = [kept.index(i) if i in kept else int(likeness[i].argmax()) for i in range(9)]
        assert merge.index[b].tolist() == expected
    assert len({tuple(row) for row in drawn[:, :6].sort(dim=1).values.tolist()}) > 1, "every image has a draw"
    x = torch.randn(8, 9, 5, device=device)
    torch.testing.assert_close(merge(unmerge(merge(x))), merge(x))
    assert not torch.equal(random_bipartite_soft_matching(metric, 6, generator=draw)[0].index, merge.index)
    torch.manual_seed(3)
    first = random_bipartite_soft_matching(metric, 4)[0].index
    torch.manual_seed(3)
    assert torch.equal(random_bipartite_soft_matching(metric, 4)[0].index, first)
    lefts = [random_bipartite_soft_matching(metric, r)[0](x).shape[1] for r in (-1, 0, 8, 9, 100)]
    assert lefts == [9, 9, 1, 1, 1] and random_bipartite_soft_matching(metric[:, :0], 2)[0].tokens == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_likenesses_that_are_no_numbers(dtype, device):
    """As in `match_bipartite`: the least; that of zeros is 0, and lengths do not count."""
    nan, big, small = float("nan"), torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny
    rows = [[nan, 0], [nan, 1], [0, 0], [0, -1], [-small, 0], [big, -big], [big, big], [small, small]]
    metric = torch.tensor(rows, dtype=dtype, device=device)[None]
    with torch.autocast(device, dtype=torch.bfloat16):
        # of 1, 3, 5 and 7 are left: for 0 all are no numbers, the first; 2 is 0 to the rest, -inf to 1
        assert kth_bipartite_soft_matching(metric, 2)[0].index.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]


# Bad input


BAD_TOME = [
    (lambda: bipartite_soft_matching(torch.zeros(3, 4), 1), ValueError, "bipartite_soft_matching: metric must have"),
    (
        lambda: bipartite_soft_matching(torch.zeros(1, 3, 4), 1.5),
        TypeError,
        "bipartite_soft_matching: r must be an int",
    ),
    (lambda: kth_bipartite_soft_matching(torch.zeros(3, 4), 2), ValueError, "kth_bipartite_soft_matching: metric must"),
    (lambda: kth_bipartite_soft_matching(torch.zeros(1, 3, 4), True), TypeError, "k must be an int, but got True"),
    (lambda: random_bipartite_soft_matching(None, 2), TypeError, "random_bipartite_soft_matching: metric must be"),
    (lambda: random_bipartite_soft_matching(torch.zeros(1, 3, 4), 0.5), TypeError, "r must be an int, but got 0.5"),
    (
        lambda: random_bipartite_soft_matching(torch.zeros(1, 3, 4), 1, generator=7),
        TypeError,
        "generator must be a torch.Generator or None, but got int",
    ),
    (lambda: merge_wavg(None, torch.zeros(1, 3, 4)), TypeError, "merge_wavg: merge must come from"),
    (lambda: merged()(torch.zeros(1, 5, 4)), ValueError, "merge: x has 5 tokens, but merge has 4"),
    (lambda: merged()(torch.zeros(2, 4, 4)), ValueError, "merge: x has 2 images, but merge has 1"),
    (lambda: merged()(torch.zeros(1, 4, 4), mode="max"), ValueError, "mode='max', but it must be 'mean' or 'sum'"),
    (
        lambda: merge_wavg(merged(), torch.zeros(1, 4, 4), torch.ones(1, 4)),
        ValueError,
        r"size must have shape \(B,N,1\)",
    ),
]


def merged():
    return bipartite_soft_matching(torch.zeros(1, 4, 2), 1)[0]


@pytest.mark.parametrize("call, kind, words", BAD_TOME, ids=[words for _, _, words in BAD_TOME])
def test_tome_errors_in_words(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_indices_out_of_range(backend, device):
    """On a CPU the compiled code says which; elsewhere they are of no token, and nothing is read or written there."""
    x = torch.randn(2, 6, 3, device=device).requires_grad_()
    for bad in (4, -1, 1 << 40):
        index = torch.tensor([[0, 1, 2, 3, 0], [3, 2, bad, 1, 0]], device=device)
        calls = [
            lambda: merge_by_index("merge", x, index, 4, 1)[0],
            lambda: unmerge_bipartite(x[:, :5], index),
            lambda: Merge(index, 4, 1)(x, mode="sum"),
        ]
        if device == "cpu" and backend == "native":
            for call, path in itertools.product(calls, ("native", "reference")):
                words = rf"index\[1, 2\]={bad}, but it must be from 0 to 3: there are 4 tokens"
                with tokenops.use_backend(path), pytest.raises(IndexError, match=words):
                    call()
            continue
        with tokenops.use_backend("reference"):
            plain = reference.merge_bipartite(x, index, 4)[0], reference.unmerge_bipartite(x[:, :5], index)
        for call, expected in zip(calls, plain):
            found = call()
            torch.testing.assert_close(found, expected)
            grads = (torch.autograd.grad(t.square().sum(), x)[0] for t in (found, expected))
            torch.testing.assert_close(*grads)


def test_gradients_of_indices_out_of_range(device):
    """They are of no token: 0."""
    x, sizes = torch.ones(2, 7, 4, device=device), torch.ones(2, 7, device=device)
    out = torch.tensor([0, 6, -1, 1 << 40, 5, -(1 << 40)], device=device).expand(2, -1)
    if device == "cpu" and ABSENT is not None:
        pytest.skip(ABSENT)
    dx = kernel("merge_bipartite_bwd", "native")(x, out, None, sizes, 1)
    assert dx[:, :, 0].tolist() == [[1, 1, 0, 0, 0, 1, 0]] * 2


def test_tome_is_public():
    assert tokenops.tome is tome
