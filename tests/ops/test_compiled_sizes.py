"""Operators under torch.compile with dynamic shapes: values and gradients, and one compilation for any size."""

import pytest
import torch

import tokenops


def attention_of_views(qkv, bias):
    q, k, v = qkv.unflatten(-1, (3, 2, 5)).permute(2, 0, 3, 1, 4).unbind(0)
    return tokenops.masked_channel_attention(q, k, v, key_bias=bias, scores="class", heads="mean")


def attention_of_everything(q, v, n, bias, qk_mask, v_mask):
    return tokenops.masked_channel_attention(
        q, q, v, key_lengths=n, key_bias=bias, qk_mask=qk_mask, v_mask=v_mask, scores="received", return_lse=True
    )


def selected(x, scores, weight):
    chosen = tokenops.select_tokens(
        x, scores, x.shape[1] // 3, rest="weighted", companions=(scores,), norm=(weight, None, 1e-6), order="index"
    )
    return chosen.tokens, chosen.normed, *chosen.companions


def merged_twice(x, sizes, weight):
    first = tokenops.merge_bipartite(x, x.detach(), 2, sizes=sizes, norm=(weight, None, 1e-6))
    second = tokenops.merge_bipartite(first.tokens.sin(), first.normed, x.shape[1] // 4, sizes=first.sizes)
    back = tokenops.unmerge_bipartite(second.tokens, second.index.gather(1, first.index))
    return back, first.normed + second.log_sizes[:, None, None].sum()


def of_any_size(N):
    """Calls of a number of tokens, by name."""
    x, scores, w, weight = torch.randn(2, 1 + N, 6), torch.rand(2, N), torch.randn(2, N, 5), torch.rand(6)
    counts, bias, index = torch.tensor([2, 3]), torch.zeros(2, 1, 1, N), torch.arange(4).expand(2, -1)
    qkv, into, sizes = torch.randn(2, N, 30), torch.arange(N).expand(2, -1) % 4, torch.ones(2, 1 + N)
    qk, v, mlp = torch.randn(2, 2, N, 6), torch.randn(2, 2, N, 3), (torch.randn(5, 1 + N), torch.randn(5))
    return {
        "soft_aggregate": (lambda x, w, s: tokenops.soft_aggregate(x, w, scale=s, prefix=1), (x, w, torch.ones(()))),
        "soft_scatter": (tokenops.soft_scatter, (torch.randn(2, 5, 6), w)),
        "token_mlp": (tokenops.token_mlp, (x, *mlp, torch.randn(N, 5), torch.randn(N))),
        "attention": (
            lambda q, v, n: tokenops.masked_channel_attention(q, q, v, key_lengths=n, scores="class"),
            (qk, v, counts),
        ),
        "attention of views": (attention_of_views, (qkv, bias)),
        "attention of everything": (
            attention_of_everything, (qk, v, counts, bias, torch.rand(2, 6), torch.rand(2, 3))
        ),
        "packed attention": (
            lambda qkv, b: tokenops.masked_channel_attention_qkv(qkv, 2, key_bias=b, return_key_mean=True),
            (qkv, bias),
        ),
        "plain attention": (lambda qkv: tokenops.masked_channel_attention_qkv(qkv, 2), (qkv,)),
        "select_tokens": (lambda x, s, n: tokenops.select_tokens(x, s, 4, counts=n).tokens, (x, scores, counts)),
        "select_tokens, weighted": (selected, (x, scores, weight)),
        "restore_tokens": (tokenops.restore_tokens, (x, x[:, 1:5].clone(), index)),
        "match_bipartite": (lambda x: tokenops.match_bipartite(x, r=3), (x,)),
        "merge_bipartite": (merged_twice, (x, sizes, weight)),
        "unmerge_bipartite": (tokenops.unmerge_bipartite, (x[:, :5], into)),
    }  # fmt: skip


def of_any_grid(N):
    """Those of a grid's merges, whose odd and even sides are told apart."""

    def merged(image, logits, weight):
        x, (height, width) = image.flatten(1, 2), image.shape[1:3]
        y, _, normed = tokenops.merge_neighbours(
            x, (height, width), "horizontal", logits, prefix=0, sizes=logits.exp(), norm=(weight, None, 1e-6)
        )
        y = tokenops.merge_neighbours(y, (height, (width + 1) // 2), "vertical", (weight, weight), prefix=0).sin()
        return tokenops.unmerge_neighbours(y, (height, width), ("horizontal", "vertical"), prefix=0), normed

    return {"merge_neighbours": (merged, (torch.randn(2, N, N + 3, 6), torch.rand(2, N * (N + 3)), torch.rand(6)))}


CALLS = [*of_any_size(12), *of_any_grid(12)]


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("name", of_any_size(12))
def test_one_compilation_serves_every_number_of_tokens(name, path):
    """No size is written into what is compiled, by words for an error say."""
    torch._dynamo.reset()
    with tokenops.use_backend(path), torch.no_grad():
        compiled = torch.compile(of_any_size(12)[name][0], fullgraph=True, dynamic=True, backend="eager")
        compiled(*of_any_size(12)[name][1])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for N in (14, 17):
                function, tensors = of_any_size(N)[name]
                for a, b in zip(as_tuple(compiled(*tensors)), as_tuple(function(*tensors)), strict=True):
                    torch.testing.assert_close(a, b)


#: what is quick enough for each way of running it
QUICK = {
    "aot_eager": [name for name in CALLS if name not in ("merge_neighbours", "match_bipartite")],
    "inductor": ["soft_scatter", "attention of views", "merge_bipartite"],
    "aot_eager on triton": ["soft_aggregate"],
}
WAYS = [
    pytest.param(way, name, marks=() if name in quick else pytest.mark.slow)
    for way, quick in QUICK.items()
    for name in CALLS
    if name != "match_bipartite"  # has no gradient
]


@pytest.mark.parametrize("way, name", WAYS)
def test_values_and_gradients(way, name, device):
    """Of an operator between others, and of one more size where that is no matter of minutes."""
    compiler, _, path = way.partition(" on ")
    torch._dynamo.reset()
    compiled, sizes = None, (12, 17) if compiler == "aot_eager" else (12,)
    for N in sizes:
        function, tensors = (of_any_size(N) | of_any_grid(N))[name]

        def between_others(*given, function=function):
            doubled = [t * 2 if t.is_floating_point() else t for t in given]
            return [y.sin() for y in as_tuple(function(*doubled)) if y.is_floating_point()]

        compiled = compiled or torch.compile(between_others, fullgraph=True, dynamic=True, backend=compiler)
        found = []
        for f in (between_others, compiled):
            given = [t.to(device, copy=True) for t in tensors]
            leaves = [t.requires_grad_() for t in given if t.is_floating_point()]
            with tokenops.use_backend(path or "auto"):
                results = f(*given)
                grads = torch.autograd.grad(sum(y.square().sum() for y in results), leaves, materialize_grads=True)
            found.append((*results, *grads))
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)
