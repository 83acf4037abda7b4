"""Packed sequences to select from, and the loop over them that says what is right."""

import torch

from tokenops import select_tokens


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def loop(x, scores, k, lengths, *, prefix=1, rest="none", counts=None, companions=(), norm=None, capacity, **options):
    """Every sequence by the batched operator: tokens, companions, the norm if asked for, index and lengths."""
    rows, places, followers, normed, made, begin = [], [], [[] for _ in companions], [], [], 0
    for s, n in enumerate(lengths):
        piece = slice(begin, begin + n)
        head = min(prefix, n)
        keep = min(k if counts is None else int(counts[s]), n - head)
        fused = rest if keep < n - head else "none"
        chosen = select_tokens(
            x[piece].unsqueeze(0), scores[begin + head : begin + n].unsqueeze(0), keep,
            prefix=head, rest=fused, norm=norm, **options,
        )  # fmt: skip
        kept = torch.cat((torch.arange(head, device=x.device), head + chosen.index[0]))
        rows.append(chosen.tokens[0])
        places.append(torch.cat((begin + kept, kept.new_full((int(fused != "none"),), -1))))
        for i, companion in enumerate(companions):
            here = companion[piece][kept]
            followers[i] += [here, here.new_zeros((int(fused != "none"), *here.shape[1:]))]
        if norm is not None:
            normed.append(chosen.normed[0])
        made.append(rows[-1].shape[0])
        begin += n

    def together(parts, like, value=0):
        whole = torch.cat([like.new_zeros((0, *like.shape[1:])), *parts])
        return torch.cat((whole, whole.new_full((capacity - whole.shape[0], *like.shape[1:]), value)))

    tokens = together(rows, x)
    if norm is not None:  # that of a row of zeros is the bias
        bias = x.new_zeros(x.shape[1]) if norm[1] is None else norm[1]
        normed = torch.cat((*normed, bias.expand(capacity - sum(made), -1)))
    index = together(places, torch.zeros(0, dtype=torch.int64, device=x.device), -1)
    return tokens, [together(parts, like) for parts, like in zip(followers, companions)], normed, index, made
