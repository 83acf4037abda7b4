"""Bipartite merging inside torch's machinery, under ToMe's names, and what it says to bad input."""

import pytest
import torch
from torch import library

import tokenops
from support.bipartite import exact_metric, plain_merge
from support.compiled import ABSENT
from tokenops import reference, tome
from tokenops.ops import backends
from tokenops.ops.merge_bipartite import merge_by_index
from tokenops.ops.schemas import kernel
from tokenops.tome import Merge, bipartite_soft_matching, merge_source, merge_wavg

OPS = ("match_bipartite", "merge_bipartite", "unmerge_bipartite")
match_bipartite, merge_bipartite, unmerge_bipartite = (getattr(tokenops, op) for op in OPS)


OPERATOR = "merge_bipartite"  # of the `backend` fixture


def test_gradcheck(gradcheck, backend, device):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    x, weight, bias, sizes = leaf(2, 8, 3), leaf(3), leaf(3), torch.rand(2, 8, device=device).double()
    metric, index = exact_metric(2, 8, 16, 1, device), torch.tensor([[2, 0, 1, 2, 2], [0, 0, 3, 3, 3]], device=device)

    def f(x, weight, bias):
        merged = merge_bipartite(x, metric, 3, sizes=sizes, norm=(weight, bias, 1e-3))
        return merged.tokens, merged.normed

    gradcheck(f, (x, weight, bias))
    gradcheck(lambda y: unmerge_bipartite(y, index), (leaf(2, 5, 2),))
    merge = Merge(index, 4, 1)
    gradcheck(lambda x: merge(x, mode="sum"), (leaf(2, 6, 2),))


def test_threads_change_nothing():
    """Neither one image, which threads share, nor many, of which each thread has its own."""
    if ABSENT is not None:
        pytest.skip(ABSENT)
    before = torch.get_num_threads()
    for shape in ((1, 700, 48), (5, 200, 48)):
        x = torch.randn(shape).requires_grad_()
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            merged = merge_bipartite(x, x, 90, norm=(None, None, 1e-6))
            back = unmerge_bipartite(merged.normed, merged.index)
            results.append((*merged, back, *torch.autograd.grad(back.square().sum() + merged.tokens.sum(), x)))
        torch.set_num_threads(before)
        for more in results[1:]:
            assert all(torch.equal(mine, same) for mine, same in zip(results[0], more, strict=True))


def test_opcheck(backend, device):
    x, metric, sizes, w = torch.randn(2, 7, 4), torch.randn(2, 7, 3), torch.ones(2, 7), torch.ones(4)
    x, metric, sizes, w = (t.to(device) for t in (x, metric, sizes, w))
    library.opcheck(kernel("match_bipartite_fwd", backend), (metric, 2, 1))
    index = kernel("match_bipartite_fwd", backend)(metric, 2, 1)
    for some, weight, norm in ((None, None, False), (sizes, w, True), (sizes, None, True)):
        arguments = (x, index, 4, some, weight, None, 1, norm, 1e-5)
        library.opcheck(kernel("merge_bipartite_fwd", backend), arguments)
        y, merged, *_ = kernel("merge_bipartite_fwd", backend)(*arguments)
        library.opcheck(kernel("merge_bipartite_bwd", backend), (y, index, some, merged, 1))
        library.opcheck(kernel("merge_bipartite_matched", backend), (x, metric, 2, some, weight, None, 1, norm, 1e-5))
    library.opcheck(kernel("unmerge_bipartite_fwd", backend), (y, index, 1))
    library.opcheck(kernel("unmerge_bipartite_bwd", backend), (x, index, 4, 1))


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compile(device, compiler):
    def f(x, sizes, weight):
        first = merge_bipartite(x * 2, x, 2, sizes=sizes, norm=(weight, None, 1e-6))
        second = merge_bipartite(first.tokens.sin(), first.normed, x.shape[1] // 4, sizes=first.sizes)
        bias = second.log_sizes[:, None, None]
        return unmerge_bipartite(second.tokens, second.index.gather(1, first.index)), first.normed + bias.sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=compiler)
    for B, N, C in ((2, 12, 4), (3, 15, 8)) if compiler == "aot_eager" else ((2, 12, 4),):
        made = torch.randn(B, 1 + N, C), torch.rand(B, 1 + N), torch.rand(C)
        results = []
        for function in (f, compiled):
            leaves = [t.to(device).requires_grad_() for t in (t.clone() for t in made)]
            back, normed = function(*leaves)
            results.append((back, normed, *torch.autograd.grad(back.square().sum() + normed.sum(), leaves[::2])))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_inference_mode_func_grad_and_autocast(backend, device):
    x, metric = torch.randn(2, 7, 4, device=device), exact_metric(2, 7, 4, 1, device)
    with torch.inference_mode():
        torch.testing.assert_close(merge_bipartite(x, metric, 2)[:4], plain_merge(x, metric, 2)[:4])
    losses = [lambda x, f=f: f(x, metric, 2)[0].square().sum() for f in (merge_bipartite, plain_merge)]
    torch.testing.assert_close(*(torch.func.grad(loss)(x) for loss in losses))
    with torch.autocast(device, dtype=torch.bfloat16):
        merged = merge_bipartite(x, metric, 2, norm=(None, None, 1e-6))
        assert merged.tokens.dtype == merged.normed.dtype == merged.sizes.dtype == torch.float32


def test_gradients_that_nobody_asked_for(backend, device):
    x, w = torch.randn(2, 7, 4, device=device), torch.rand(4, device=device)
    metric, sizes = (torch.randn(s, device=device).requires_grad_() for s in ((2, 7, 3), (2, 7)))
    merged = merge_bipartite(x, metric, 2, sizes=sizes)
    assert not any(t.requires_grad for t in merged[:4])
    merged = merge_bipartite(x, metric, 2, sizes=sizes, norm=(w.requires_grad_(), None, 1e-6))
    assert [t.requires_grad for t in merged] == [False, False, False, False, True]
    merged = merge_bipartite(x.requires_grad_(), metric, 2, sizes=sizes, norm=(w, w, 1e-6))
    dx, dw, *none = torch.autograd.grad(merged.normed.square().sum(), (x, w, metric, sizes), allow_unused=True)
    assert none == [None, None]
    plain = plain_merge(x, metric, 2, sizes=sizes, norm=(w, w, 1e-6))
    torch.testing.assert_close((dx, dw), torch.autograd.grad(plain[4].square().sum(), (x, w)))
    for f in (lambda x: merge_bipartite(x, metric, 2)[0], lambda y: unmerge_bipartite(y, merged.index)):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(f, (x,), (torch.ones_like(x),))


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


# Bad input


def good():
    return {"x": torch.zeros(2, 7, 3), "metric": torch.zeros(2, 7, 4), "r": 2}


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a tensor"),
    ({"x": torch.zeros(7, 3)}, ValueError, r"x must have shape \(B,P\+N,C\), but got \(7, 3\)"),
    ({"x": torch.zeros(2, 7, 3, dtype=torch.int32)}, TypeError, "x must be float16"),
    ({"metric": torch.zeros(2, 7)}, ValueError, r"metric must have shape \(B,P\+N,D\)"),
    ({"metric": torch.zeros(2, 7, 4).long()}, TypeError, "metric must be float16"),
    ({"metric": torch.zeros(1, 7, 4)}, ValueError, "metric has 1 images, but x has 2"),
    ({"metric": torch.zeros(2, 6, 4)}, ValueError, "metric has 6 tokens, but x has 7"),
    ({"prefix": 8}, ValueError, "prefix=8"),
    ({"prefix": True}, TypeError, "prefix must be an int"),
    ({"r": 2.0}, TypeError, "r must be an int, but got 2.0"),
    ({"r": -1}, ValueError, "r=-1, but of 6 tokens after a prefix of 1 at most 3 can be merged: 0 to 3 is allowed"),
    ({"r": 4}, ValueError, "r=4, but of 6 tokens after a prefix of 1 at most 3 can be merged"),
    ({"r": 1, "prefix": 6}, ValueError, "r=1, but of 1 tokens after a prefix of 6 at most 0 can be merged"),
    ({"sizes": torch.ones(2, 6)}, ValueError, "sizes has 6 tokens, but x has 7"),
    ({"sizes": torch.ones(1, 7)}, ValueError, "sizes has 1 images, but x has 2"),
    ({"sizes": torch.ones(2, 7).long()}, TypeError, "sizes must be float16"),
    ({"norm": torch.ones(3)}, TypeError, r"norm must be \(weight, bias, eps\)"),
    ({"norm": (torch.ones(4), None, 1e-5)}, ValueError, "norm's weight has 4 channels, but x has 3"),
    ({"norm": (None, None, -1.0)}, ValueError, "norm's eps must be a number of at least 0"),
]


@pytest.mark.parametrize("change, kind, words", BAD, ids=[words for _, _, words in BAD])
def test_errors_in_words(change, kind, words):
    given = {**good(), **change}
    with pytest.raises(kind, match=f"merge_bipartite: .*{words}"):
        merge_bipartite(**given)
    if set(change) <= {"r", "prefix"} or "shape" in words and "metric" in change:
        with pytest.raises(kind, match=f"match_bipartite: .*{words}"):
            match_bipartite(**{n: v for n, v in given.items() if n != "x"})


BAD_UNMERGE = [
    ({"y": torch.zeros(2, 7)}, ValueError, r"y must have shape \(B,P\+M,C\)"),
    ({"prefix": 6}, ValueError, "prefix=6"),
    ({"index": [0]}, TypeError, "index must be a tensor"),
    ({"index": torch.zeros(2, 7).int()}, TypeError, "index must be int64, but got torch.int32"),
    ({"index": torch.zeros(7).long()}, ValueError, r"index must have shape \(B,N\)"),
    ({"index": torch.zeros(1, 7).long()}, ValueError, "index has 1 images, but y has 2"),
]


@pytest.mark.parametrize("change, kind, words", BAD_UNMERGE, ids=[words for _, _, words in BAD_UNMERGE])
def test_unmerge_errors_in_words(change, kind, words):
    given = {"y": torch.zeros(2, 5, 3), "index": torch.zeros(2, 7).long(), **change}
    with pytest.raises(kind, match=f"unmerge_bipartite: .*{words}"):
        unmerge_bipartite(**given)


BAD_TOME = [
    (lambda: bipartite_soft_matching(torch.zeros(3, 4), 1), ValueError, "bipartite_soft_matching: metric must have"),
    (
        lambda: bipartite_soft_matching(torch.zeros(1, 3, 4), 1.5),
        TypeError,
        "bipartite_soft_matching: r must be an int",
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
            for call in calls:
                with pytest.raises(IndexError, match=rf"index\[1, 2\]={bad}, but it must be from 0 to 3"):
                    call()
            continue
        with tokenops.use_backend("reference"):
            plain = reference.merge_bipartite(x, index, 4)[0], reference.unmerge_bipartite(x[:, :5], index)
        for call, expected in zip(calls, plain):
            found = call()
            torch.testing.assert_close(found, expected)
            grads = (torch.autograd.grad(t.square().sum(), x)[0] for t in (found, expected))
            torch.testing.assert_close(*grads)


def test_the_compiled_code_checks_again(device):
    """Called past the public function, the kernels still refuse what they cannot take."""
    if device == "cpu" and ABSENT is not None:
        pytest.skip(ABSENT)
    x, w, sizes = (t.to(device) for t in (torch.zeros(2, 7, 4), torch.zeros(4), torch.ones(2, 7)))
    index = torch.zeros(2, 6, dtype=torch.int64, device=device)

    def refuses(name, good, changes):
        kernel(name, "native")(*good.values())
        for change in changes:
            with pytest.raises(RuntimeError, match="must"):
                kernel(name, "native")(*{**good, **change}.values())

    refuses(
        "match_bipartite_fwd",
        {"metric": x, "r": 3, "prefix": 1},
        [{"metric": x[0]}, {"metric": x.int()}, {"r": 4}, {"r": -1}, {"prefix": 8}, {"prefix": -1}],
    )
    refuses(
        "merge_bipartite_fwd",
        dict(x=x, index=index, tokens=4, sizes=sizes, weight=w, bias=None, prefix=1, norm=True, eps=0.0),
        [
            {"x": x[0]}, {"x": x.int()}, {"index": index[:1]}, {"index": index.int()}, {"index": index[:, :5]},
            {"tokens": -1}, {"sizes": sizes[:, 1:]}, {"sizes": sizes.long()}, {"weight": w[:3]}, {"prefix": 2},
        ],
    )  # fmt: skip
    refuses(
        "merge_bipartite_matched",
        dict(x=x, metric=x, r=2, sizes=sizes, weight=w, bias=None, prefix=1, norm=True, eps=0.0),
        [
            {"x": x[0]}, {"x": x.int()}, {"x": x[:, 1:]}, {"metric": x[:1]}, {"metric": x.int()}, {"r": 4}, {"r": -1},
            {"sizes": sizes[:, 1:]}, {"sizes": sizes.long()}, {"weight": w[:3]}, {"weight": w.long()}, {"prefix": 8},
        ],
    )  # fmt: skip
    refuses(
        "merge_bipartite_bwd",
        {"dy": x, "index": index, "sizes": sizes, "merged": sizes, "prefix": 1},
        [{"dy": x[0]}, {"index": index[:1]}, {"sizes": sizes[:, 1:]}, {"merged": sizes[:, 1:]},
         {"merged": sizes.double()}, {"prefix": 8}],
    )  # fmt: skip
    out = torch.tensor([0, 6, -1, 1 << 40, 5, -(1 << 40)], device=device).expand(2, -1)  # of no token: 0
    dx = kernel("merge_bipartite_bwd", "native")(torch.ones_like(x), out, None, sizes, 1)
    assert dx[:, :, 0].tolist() == [[1, 1, 0, 0, 0, 1, 0]] * 2
    refuses(
        "unmerge_bipartite_fwd",
        {"y": x, "index": index, "prefix": 1},
        [{"y": x[0]}, {"index": index.int()}, {"index": index[0]}, {"prefix": -1}],
    )
    refuses(
        "unmerge_bipartite_bwd",
        {"dx": x, "index": index, "tokens": 4, "prefix": 1},
        [{"dx": x[0]}, {"index": index[:, :5]}, {"tokens": -1}, {"prefix": 2}],
    )


def test_automatic_choice(device, ran_kernels):
    with ran_kernels() as names:
        merged = merge_bipartite(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good().items()})
        unmerge_bipartite(merged.tokens, merged.index)
    reason = backends.why_not("merge_bipartite", "native", device, torch.float32)
    expected = {"merge_bipartite_matched.native", "unmerge_bipartite_fwd.native"}
    assert names == (expected if reason is None else set())


def test_tome_is_public():
    assert tokenops.tome is tome
