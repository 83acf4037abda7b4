"""What bounds.py bounds: every pass at the reference sizes, with its floor and prediction, and the trips of its loops.

B=256, bf16, DeiT-S: 196 tokens behind a class token, C=384. A loop of a Triton kernel gets its trips from the `range`
in its source, with the names and conditions that are given here; one of a CUDA C++ kernel by its place in the code.
"""

from typing import NamedTuple

BANDWIDTH, MATMUL = 4.3e12, 790e12  # of a copy and of a large product, as measured

B, N, M, C, H, D = 256, 196, 98, 384, 6, 64
ROW = B * C * 2  # bytes of a token in all images
HEADS = B * H * (N + 1) * 4  # a number for each head and query

#: names in the ranges of kernels that are no arguments of theirs, or mean something else in a function they call
LOCALS: dict[str, dict[str, str]] = {
    "soft_aggregate_fwd_kernel": {"N": "N * N_UNIT", "M": "M * M_UNIT", "first": "0", "last": "C"},  # all channels
    "soft_aggregate_bwd_kernel": {
        "N": "N * N_UNIT",
        "M": "M * M_UNIT",
        "first": "0",
        "last": "C",
        "of_dw": "tl.cdiv(N, BLOCK_N) * tl.cdiv(M, BLOCK_M)",
        "of_dx": "tl.cdiv(N, BLOCK_T)",
        "stop": "C",
    },
    "masked_channel_attention_fwd_kernel": {"length": "N", "whole": "N // BLOCK_N * BLOCK_N"},
    "masked_channel_attention_bwd_q_kernel": {"length": "N", "whole": "N // BLOCK_N * BLOCK_N if SPLIT else 0"},
    "masked_channel_attention_bwd_kv_kernel": {"queries": "M", "rest": "(M - 1) % BLOCK_M + 1 if SPLIT else M"},
    "masked_channel_attention_received_kernel": {"heads": "H // GROUPS", "group": "0"},
    "select_tokens_fwd_kernel": {"count": "k"},
    "match_bipartite_fwd_kernel": {"count_a": "(N + P) // 2 - P // 2", "count_b": "N - count_a"},
}
#: how many trips a loop has whose range is data, or differs between programs: their mean
RANGES = {
    ("token_mlp_kernel", "range(first, tl.minimum(first + share, R), BLOCK_R)"): (
        "tl.cdiv(R, BLOCK_R) / tl.cdiv(R, share)"
    ),
    # a tile of rows takes as many rounds as the most tokens that any of them is made of: at least one
    ("sum_rows_kernel", "range(0, tl.max(count))"): "1",
    ("merge_neighbours_bwd_kernel", "range(program, images * blocks, programs)"): "images * blocks / programs",
}
#: the share of programs in which a condition around a loop holds
CONDITIONS = {
    ("soft_aggregate_fwd_kernel", "tile == 0"): "1 / tl.cdiv(M, BLOCK_M)",
    ("soft_aggregate_bwd_kernel", "tile == 0"): "of_dx / (of_dw + of_dx) / tl.cdiv(N, BLOCK_T)",
    ("soft_aggregate_bwd_kernel", "place < of_dw"): "of_dw / (of_dw + of_dx)",
    ("masked_channel_attention_fwd_kernel", "program < side"): "0",  # no mean of k
    ("masked_channel_attention_fwd_kernel", "(tile_m == 0) & (M > 0)"): "1 / tl.cdiv(M, BLOCK_M)",
    ("match_bipartite_fwd_kernel", "scaled > 0"): "0",  # no row whose squares may overflow or vanish
    ("masked_channel_attention_bwd_q_kernel", "RECEIVED or tile_m == 0"): "1 if RECEIVED else 1 / tl.cdiv(M, BLOCK_M)",
}


class Pass(NamedTuple):
    """A launch, or some, with the floor and the prediction of NOTES.md."""

    operator: str
    name: str
    case: str
    bytes: float
    products: float  # of pairs of numbers, times two
    predicted: float | None
    triton: dict[str, float | None]  # the bytes of each kernel, None where they are the pass's
    native: str = ""
    made: float | None = None  # the products that our kernels make, where torch makes the others: these have no bound

    @property
    def floor(self) -> float:
        return max(self.bytes / BANDWIDTH, self.products / MATMUL) * 1e6


QUERIES, LONG = B * H * (N + 1) ** 2 * D * 2, B * 12 * 577  # products of q and k; queries of a longer case
LOGITS = B * N * M * 2
CLASS = "M197-N197-D64-64-class"
PASSES = (
    Pass(
        "soft_aggregate", "forward", "N196-M98-C384", ROW * (N + M + 2) + LOGITS, LOGITS * C, 22,
        {"soft_aggregate_fwd_kernel": None},
    ),
    Pass(
        "soft_aggregate", "backward", "N196-M98-C384", ROW * (2 * N + M + 3) + 2 * LOGITS, 2 * LOGITS * C, 50,
        {"soft_aggregate_bwd_kernel": None},
    ),
    Pass(
        "token_mlp", "forward", "M98-N196-C384", ROW * (M + N), 8 * B * C * N * (M + N), 150,
        {"token_mlp_kernel": ROW * M}, made=8 * B * C * N * M,  # the hidden activations stay in L2
    ),
    Pass(
        "token_mlp", "backward", "M98-N196-C384", ROW * (2 * M + N), 16 * B * C * N * (M + N), 350,
        {"token_mlp_kernel#2": ROW * M}, made=8 * B * C * N * M,
    ),
    Pass(
        "masked_channel_attention", "class, forward", CLASS, ROW * 4 * (N + 1) + HEADS, 2 * QUERIES, 80,
        {"masked_channel_attention_fwd_kernel": None},
    ),
    Pass(
        "masked_channel_attention", "class, backward", CLASS, ROW * 8 * (N + 1) + HEADS, 5 * QUERIES, 220,
        {
            "masked_channel_attention_bwd_q_kernel": ROW * 6 * (N + 1),
            "masked_channel_attention_bwd_kv_kernel": ROW * 6 * (N + 1),
        },
    ),
    Pass(
        "masked_channel_attention", "received (577 tokens, 12 heads), its own launch", "M577-N577-D64-64-received",
        LONG * (4 * D + 8), LONG * 577 * D * 2, None, {"masked_channel_attention_received_kernel": None},
    ),
    Pass(
        "select_tokens", "no rest, forward", "N196-k98-C384-none", ROW * 2 * (M + 1), 0, 12,
        {"select_tokens_fwd_kernel": None}, "select_tokens_fwd_kernel<BFloat16, 8, false>",
    ),
    Pass(
        "select_tokens", "no rest, backward", "N196-k98-C384-none", ROW * (M + N + 2), 0, None,
        {"select_tokens_bwd_kernel": None}, "select_tokens_bwd_kernel<BFloat16, 8>",
    ),
    Pass(
        "restore_tokens", "forward", "N196-k98-C384", ROW * 2 * (N + 1), 0, 21,
        {"restore_tokens_fwd_kernel": None}, "restore_tokens_fwd_kernel<uint4>",
    ),
    Pass(
        "restore_tokens", "backward", "N196-k98-C384", ROW * (2 * (N + 1) + M), 0, None,
        {"restore_tokens_bwd_kernel": None}, "restore_tokens_bwd_kernel<uint4>",
    ),
    Pass(
        "merge_neighbours", "average, forward", "H14-W14-C384-average", ROW * (N + M + 2), 0, 16,
        {"merge_neighbours_fwd_kernel": None}, "merge_neighbours_fwd_kernel<BFloat16, 8>",
    ),
    Pass(
        "merge_neighbours", "average, backward", "H14-W14-C384-average", ROW * (N + M + 2), 0, 17,
        {"merge_neighbours_bwd_kernel": None}, "merge_neighbours_bwd_kernel<BFloat16, 8, false>",
    ),
    Pass(
        "match_bipartite", "forward", "N196-D64-r13", B * (N + 1) * D * 2 + B * N * 8, LOGITS // 2 * D, 7,
        {"match_bipartite_fwd_kernel": None}, "match_bipartite_kernel<BFloat16, 8>",
    ),
    Pass(
        "merge_bipartite", "forward", "N196-r13-C384-sizes", ROW * (2 * (N + 1) - 13), 0, 21,
        {"sum_rows_kernel": None}, "merge_bipartite_kernel<BFloat16, 8, false>",
    ),
    Pass(
        "merge_bipartite", "with norm, forward", "N196-r13-C384-sizes-norm", ROW * (3 * (N + 1) - 26), 0, 31,
        {"sum_rows_kernel": None}, "merge_bipartite_kernel<BFloat16, 8, true>",
    ),
    Pass(
        "merge_bipartite", "backward", "N196-r13-C384-sizes", ROW * (2 * (N + 1) - 13), 0, 20,
        {"gather_rows_kernel": None}, "unmerge_bipartite_kernel<BFloat16, 8>",
    ),
    Pass(
        "unmerge_bipartite", "forward", "N196-M183-C384", ROW * (2 * (N + 1) - 13), 0, 20,
        {"gather_rows_kernel": None}, "unmerge_bipartite_kernel<BFloat16, 8>",
    ),
    Pass(
        "unmerge_bipartite", "backward", "N196-M183-C384", ROW * (2 * (N + 1) - 13), 0, 21,
        {"sum_rows_kernel": None}, "merge_bipartite_kernel<BFloat16, 8, false>",
    ),
)  # fmt: skip

#: kernels that have no floor: how long they take follows from the lengths of sequences
UNBOUND = {
    "packed_tiles_kernel",
    "packed_sums_kernel",
    "packed_gather_kernel",
    "match_packed_kernel",
    "match_packed_norms_kernel",
}


OPERATORS = sorted({one.operator for one in PASSES})


class Native(NamedTuple):
    """A launch of a CUDA C++ kernel: what its plan chooses on an H200 at the reference sizes, and its loops."""

    programs: int
    loops: (
        str  # in the order of their code, > before the inner ones: trips a warp in the mean, ! where all rows are there
    )
    dynamic: int = 0  # bytes of shared memory
    threads: int = 256


#: 0: not entered here, or the unrolled part of a loop of few trips; a fraction where only some warps have one
NATIVE = {
    # places of rows and their rest (20 rows a block), tokens, companions, units, rows
    "restore_tokens_fwd_kernel<uint4>": Native(2560, "0 0 0.5 0 >0 1! >1!", threads=240),
    # the same with lost tokens and, in the first of 10 blocks, tokens that go nowhere; as if all rows were replaced
    "restore_tokens_bwd_kernel<uint4>": Native(2560, "0 0 0.5 >0 >0 2 >0 >0 0 >0 1! >1!", threads=240),
    # digits (scores four at a time, search), compaction, sort, indices (companions), units (rows), rest
    "select_tokens_fwd_kernel<BFloat16, 8, false>": Native(512, "4 >0 >0 1 0 >0 >>0 0.5 >0 1! >3! 0 0 0 >0 >0", 392),
    # slots and their rest, tokens and their rest, rest, rows (units)
    "select_tokens_bwd_kernel<BFloat16, 8>": Native(512, "0.5 0 0.5 0 0 12.4 >2", 396),
    # pairs, units (rows)
    "merge_neighbours_fwd_kernel<BFloat16, 8>": Native(1268, "0.1 1! >1!"),
    "merge_neighbours_bwd_kernel<BFloat16, 8, false>": Native(1268, "0.1 1! >1!"),
    # even rows, odd rows, of these norms, those far from 1, columns (channels (rows of both sides, those far from 1: in
    # one of two)); digits (edges, search), compaction, numbers
    "match_bipartite_kernel<BFloat16, 8>": Native(
        256, "1 >1 >>1! >>0 >>2 >>>1! >>>>1! >>>>>0 >>>>1! >>>>>0 4 >0 >0 1 0.5 0 0.5 0"
    ),
    # origins and tokens with their rests, rows (of many, of two; what lanes do not hold; sums of lanes for the norm)
    "merge_bipartite_kernel<BFloat16, 8, false>": Native(1024, "0.2 0 0.9 0 3! >0 >>0 >0 >0 >>0 >>>0 >>0"),
    "merge_bipartite_kernel<BFloat16, 8, true>": Native(
        1024, "0.2 0 0.9 0 3! >0 >>0 >0 >0 >>0 >>>0 >>0 >0 >4 >0 >4 >0"
    ),
    # what rows are given, units (rows)
    "unmerge_bipartite_kernel<BFloat16, 8>": Native(1009, "0.2 1! >2.5!"),
}
