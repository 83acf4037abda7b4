"""Every public operator and what draws its calls."""

from fuzz import bipartite_calls, calls

CALLS = {
    function.__name__: function
    for function in (
        calls.soft_aggregate,
        calls.soft_scatter,
        calls.token_mlp,
        calls.masked_channel_attention,
        calls.select_tokens,
        calls.restore_tokens,
        calls.merge_neighbours,
        calls.unmerge_neighbours,
        bipartite_calls.match_bipartite,
        bipartite_calls.merge_bipartite,
        bipartite_calls.unmerge_bipartite,
        bipartite_calls.tome,
    )
}
