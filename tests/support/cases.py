"""The sizes the operators are tested at, each with its reason, and the dtypes."""

from collections import namedtuple

import torch

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW)
#: of most sizes in the interpreter, where fp16 and fp64 take the same ways; the first size of a table has them all
QUICK = (torch.float32, torch.bfloat16)


def sizes(name, fields):
    """A kind of sizes, each with the reason it is there; a test's id names them."""

    def __str__(case):
        *numbers, _ = zip(case._fields, case)
        return "-".join(
            f"{field.replace('prefix', 'P')}{'' if n is True else n}" for field, n in numbers if n is not False
        )

    made = namedtuple(name, f"{fields} why")
    made.__str__ = __str__
    return made


# of soft_aggregate and, with N and M exchanged, soft_scatter
Aggregate = sizes("Aggregate", "B N M C prefix")
AGGREGATE = (
    Aggregate(2, 12, 5, 16, 1, "everything inside one tile"),
    Aggregate(1, 1, 1, 1, 0, "the smallest there is"),
    Aggregate(2, 1, 3, 8, 1, "one token: the softmax is 1, more slots than tokens"),
    Aggregate(3, 7, 1, 8, 0, "one slot: the mean of everything"),
    Aggregate(2, 9, 20, 24, 2, "more slots than tokens, two prefix tokens"),
    Aggregate(2, 33, 17, 37, 1, "odd everywhere, one past a power of two"),
    Aggregate(1, 196, 98, 64, 1, "SiT's first slimming, several tiles of tokens"),
    Aggregate(1, 70, 131, 40, 1, "several tiles of slots"),
    Aggregate(1, 24, 12, 272, 1, "several tiles of channels"),
    Aggregate(0, 5, 3, 4, 1, "no image"),
    Aggregate(2, 5, 0, 4, 1, "no slot: only the prefix is left"),
    Aggregate(2, 5, 3, 0, 1, "no channel"),
)


# of restore_tokens; `carried` says that tokens bring the prefix with them
Restore = sizes("Restore", "B N k C prefix carried")
RESTORE = (
    Restore(2, 12, 5, 16, 1, False, "16-byte units in every dtype"),
    Restore(2, 12, 5, 16, 1, True, "tokens replace the prefix too"),
    Restore(1, 1, 1, 1, 0, False, "the smallest there is"),
    Restore(2, 9, 4, 6, 2, True, "rows of 12 bytes: 4-byte units in bf16, two prefix tokens"),
    Restore(3, 33, 17, 37, 1, False, "odd everywhere: units of one element"),
    Restore(1, 196, 98, 384, 1, False, "DeiT-S, one image: many chunks of rows"),
    Restore(2, 40, 40, 20, 0, False, "every token is replaced, no prefix; 8-byte units in bf16"),
    Restore(2, 5, 2, 300, 1, True, "a row of more units than a block has threads in fp64"),
    Restore(1, 300, 150, 1, 1, False, "rows of one element: long chunks, since indices outweigh rows"),
    Restore(2, 5, 0, 4, 1, False, "no token: a copy"),
    Restore(2, 5, 0, 4, 2, True, "only the prefix is replaced"),
    Restore(0, 5, 3, 4, 1, True, "no image"),
    Restore(2, 0, 0, 4, 1, False, "only a prefix"),
    Restore(2, 0, 0, 4, 0, False, "nothing at all"),
    Restore(2, 5, 3, 0, 1, False, "no channel"),
)


# of select_tokens
Select = sizes("Select", "B N k C prefix")
SELECT = (
    Select(2, 12, 5, 16, 1, "16-byte accesses in every dtype"),
    Select(1, 1, 1, 1, 0, "the smallest there is: nothing is left out"),
    Select(3, 33, 17, 37, 1, "odd everywhere: accesses of one element"),
    Select(2, 9, 9, 24, 2, "every token is kept, two prefix tokens"),
    Select(2, 9, 8, 24, 1, "one token is left out"),
    Select(2, 5, 0, 4, 1, "none is kept: only the prefix and the rest"),
    Select(1, 70, 33, 272, 1, "several tiles of tokens and slices of channels"),
    Select(0, 5, 3, 4, 1, "no image"),
    Select(2, 0, 0, 4, 1, "only a prefix"),
    Select(2, 5, 3, 0, 1, "no channel: the choice alone"),
)
#: what the interpreter is too slow for
SELECT_LARGE = (
    Select(1, 196, 98, 384, 1, "DeiT-S, one image: sliced over the chip"),
    Select(2, 700, 300, 8, 1, "more tokens than a block has threads"),
)


# of merge_neighbours
Merge = sizes("Merge", "B H W C prefix")
MERGE = (
    Merge(2, 4, 6, 16, 1, "16-byte accesses in every dtype"),
    Merge(1, 1, 1, 1, 0, "the smallest there is: a token alone"),
    Merge(3, 5, 7, 37, 2, "odd everywhere: tokens that are alone, accesses of one element, two prefix tokens"),
    Merge(1, 7, 2, 300, 1, "rows of more than one tile of channels"),
    Merge(0, 4, 2, 8, 1, "no image"),
    Merge(2, 0, 3, 8, 1, "no row: only a prefix"),
    Merge(2, 2, 2, 0, 1, "no channel"),
)
#: what the interpreter is too slow for
MERGE_LARGE = (Merge(2, 14, 14, 384, 1, "DeiT-S"),)


# of masked_channel_attention
Attend = sizes("Attend", "B H M N DK DV")
ATTEND = (
    Attend(2, 2, 5, 5, 8, 8, "everything inside one tile"),
    Attend(1, 1, 1, 1, 1, 1, "the smallest there is: the softmax is 1"),
    Attend(2, 3, 13, 29, 24, 64, "narrow keys, wide values; fewer queries than keys"),
    Attend(2, 3, 33, 17, 37, 5, "odd everywhere; more queries than keys"),
    Attend(1, 2, 70, 70, 40, 52, "a compacted DeiT head: several tiles of queries and keys"),
    Attend(1, 2, 1, 150, 64, 64, "a class token's attention: one query"),
    Attend(1, 1, 9, 300, 16, 128, "the widest values, many tiles of keys"),
    Attend(3, 1, 4, 6, 128, 3, "the widest keys"),
    Attend(0, 2, 3, 4, 8, 8, "no image"),
    Attend(2, 2, 0, 4, 8, 8, "no query"),
    Attend(2, 2, 3, 0, 8, 8, "no key: zeros"),
    Attend(2, 2, 5, 7, 72, 80, "two chunks of channels: 64 and, behind them, 8 or 16"),
    Attend(1, 2, 20, 70, 65, 96, "the narrowest and the widest second chunk, several tiles of keys"),
    Attend(1, 1, 3, 9, 88, 40, "two chunks of the keys' channels, one of the values'"),
)
CHUNKED = ATTEND[-3:]


# of token_mlp
TokenMlp = sizes("TokenMlp", "B M R N C")
TOKEN_MLP = (
    TokenMlp(2, 5, 12, 7, 9, "everything inside one tile"),
    TokenMlp(1, 1, 1, 1, 1, "the smallest there is"),
    TokenMlp(3, 24, 100, 40, 140, "several tiles of hidden rows and channels, several partial sums"),
    TokenMlp(1, 140, 70, 300, 24, "more tokens in and out than a tile holds"),
    TokenMlp(9, 3, 8, 5, 6, "more images than the CPU path takes together"),
    TokenMlp(0, 3, 4, 5, 6, "no image"),
    TokenMlp(2, 3, 0, 5, 6, "no hidden row, which leaves b2"),
)


# of merge_bipartite: r of N tokens are merged, compared by D numbers
Bipartite = sizes("Bipartite", "B N r C D prefix")
BIPARTITE = (
    Bipartite(2, 12, 3, 16, 16, 1, "16-byte accesses in every dtype"),
    Bipartite(1, 2, 1, 2, 1, 0, "the smallest that merges"),
    Bipartite(3, 33, 9, 37, 37, 1, "odd everywhere: accesses of one element"),
    Bipartite(2, 33, 17, 24, 4, 0, "all of one side go, no prefix: nothing but the other side is left"),
    Bipartite(2, 9, 4, 8, 4, 2, "two prefix tokens: the other parity"),
    Bipartite(2, 10, 0, 8, 4, 1, "nothing to merge: a copy"),
    Bipartite(1, 70, 20, 140, 64, 1, "several tiles of tokens and of channels"),
    Bipartite(2, 1, 0, 8, 4, 1, "one token: nothing to compare it with"),
    Bipartite(2, 2, 1, 8, 4, 3, "more of the prefix than of the others"),
    Bipartite(0, 6, 2, 8, 4, 1, "no image"),
    Bipartite(2, 0, 0, 8, 4, 1, "only a prefix"),
    Bipartite(2, 6, 2, 0, 4, 1, "no channel"),
)
#: what the interpreter is too slow for
BIPARTITE_LARGE = (
    Bipartite(2, 196, 13, 384, 64, 1, "DeiT-S"),
    Bipartite(1, 1025, 300, 8, 16, 1, "many tiles on both sides"),
)
