"""Operators under torch.compile with dynamic shapes: one compilation, whatever the number of tokens."""

import pytest
import torch

import tokenops


def of_any_size(N):
    """Calls of a number of tokens, by name; those of the grid's merges are of its sides."""
    x, scores, w = torch.randn(2, 1 + N, 6), torch.rand(2, N), torch.randn(2, N, 5)
    counts, bias, index = torch.tensor([2, 3]), torch.zeros(2, 1, 1, N), torch.arange(4).expand(2, -1)
    qkv, into, sizes = torch.randn(2, N, 30), torch.arange(N).expand(2, -1) % 4, torch.ones(2, 1 + N)
    qk, v = torch.randn(2, 2, N, 6), torch.randn(2, 2, N, 3)
    return {
        "soft_aggregate": (lambda x, w: tokenops.soft_aggregate(x, w, prefix=1), (x, w)),
        "soft_scatter": (tokenops.soft_scatter, (torch.randn(2, 5, 6), w)),
        "attention": (
            lambda q, v, n: tokenops.masked_channel_attention(q, q, v, key_lengths=n, scores="class"),
            (qk, v, counts),
        ),
        "packed attention": (
            lambda qkv, b: tokenops.masked_channel_attention_qkv(qkv, 2, key_bias=b, return_key_mean=True),
            (qkv, bias),
        ),
        "plain attention": (lambda qkv: tokenops.masked_channel_attention_qkv(qkv, 2), (qkv,)),
        "select_tokens": (lambda x, s, n: tokenops.select_tokens(x, s, 4, counts=n).tokens, (x, scores, counts)),
        "restore_tokens": (tokenops.restore_tokens, (x, x[:, 1:5], index)),
        "match_bipartite": (lambda x: tokenops.match_bipartite(x, r=3), (x,)),
        "merge_bipartite": (lambda x, s: tokenops.merge_bipartite(x, x, r=3, sizes=s).tokens, (x, sizes)),
        "unmerge_bipartite": (tokenops.unmerge_bipartite, (x[:, :5], into)),
    }


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


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)
