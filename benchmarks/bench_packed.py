"""Packed sequences: attention with scores, and what makes fewer tokens of them, of photographs of mixed sizes and of
what Qwen's towers see.

The peers of attention give no scores but where it says so: "recomputed" ones come of softmax(Q K^T) a sequence, as
methods that prune behind flash attention make them (whole where that takes no more than 2^30 numbers, else by rows).
Who pads has its padding to make and to take away here, as tokens are packed on every side. Of equal lengths a peer is
the batched form.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from comparison import PASSES, nbytes
from measure import Bench
from published.vit import merge_as_published
from tokenops import (
    kept_counts,
    masked_channel_attention,
    match_bipartite,
    merge_bipartite,
    reference,
    select_tokens,
    soft_aggregate,
)

AT_ONCE = 2**30  # numbers of a matrix of probabilities
C = 384  # channels of what is reduced


class Work(NamedTuple):
    name: str
    H: int = 12
    D: int = 64
    main: bool = False

    def lengths(self, device: str, quick: bool) -> list[int]:
        """Of the sequences: on a CPU fewer, and shorter ones, than on a GPU."""
        few = 3 if quick else 8 if device == "cpu" else 256
        if self.name == "photographs":  # of any size between 8 x 8 and 32 x 32 patches
            draw = random.Random(0)
            return [draw.randint(64, 1024) // (16 if quick else 1) for _ in range(few)]
        if self.name == "equal":
            return [12 if quick else 197] * (few if device == "cuda" else 2 * few)
        side = 250 if self.name == "large-image" else 10 if quick else 46 if device == "cpu" else 94  # patches
        if self.name == "windows":
            cut = [min(8, side - begin) for begin in range(0, side, 8)]
            return [height * width for height in cut for width in cut]
        return [side**2]

    def __str__(self) -> str:
        return self.name


#: photographs and images of one size in a tower like SigLIP 2's; windows and full attention of one image in Qwen's
WORKS = (
    Work("photographs", main=True),
    Work("windows", 16, 80),
    Work("single-image", 16, 80),
    Work("large-image", 16, 80),
    Work("equal"),
)


class Packed:
    """The boundaries of sequences, and where their rows are among padded ones."""

    def __init__(self, lengths: list[int], device: str) -> None:
        self.lengths, self.rows, self.longest = lengths, sum(lengths), max(lengths)
        self.ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        sizes = torch.tensor(lengths)
        self.there = (torch.arange(self.longest) < sizes[:, None]).to(device)
        self.back = self.there.flatten().nonzero().squeeze(1)
        self.places = self.there.flatten().cumsum(0).sub(1).clamp(min=0)
        self.options = {"cu_seqlens": self.ends, "max_seqlen": self.longest}
        self.equal = min(lengths) == self.longest and len(lengths) > 1

    def pad(self, x: Tensor) -> Tensor:
        """(S, longest, ...): behind a sequence its last row again and again."""
        return x.index_select(0, self.places).unflatten(0, self.there.shape)

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.back)


def ours(qkv, packed, H, scores):
    q, k, v = qkv.unflatten(1, (3, H, -1)).unbind(1)
    if scores is None:
        return masked_channel_attention(q, k, v, **packed.options).flatten(1)
    out, found = masked_channel_attention(q, k, v, scores=scores, heads="mean", **packed.options)
    return out.flatten(1), found


def batched(qkv, packed, H, scores):
    q, k, v = qkv.unflatten(0, packed.there.shape).unflatten(2, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if scores is None:
        return masked_channel_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    out, found = masked_channel_attention(q, k, v, scores=scores, heads="mean")
    return out.transpose(1, 2).flatten(2).flatten(0, 1), found.flatten()


def each_of(qkv: Tensor, packed: Packed, H: int) -> Iterator[tuple[Tensor, ...]]:
    """q, k and v (1, H, n, D) of each sequence."""
    for one in qkv.split(packed.lengths):
        yield one.unflatten(1, (3, H, -1)).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)


def parts(q: Tensor, k: Tensor) -> Iterator[Tensor]:
    """The rows of softmax(Q K^T), as many at once as may be."""
    for some in q.split(max(AT_ONCE // (k.shape[1] * k.shape[2]), 1), dim=2):
        wide = torch.promote_types(q.dtype, torch.float32)
        yield torch.softmax((some * q.shape[3] ** -0.5) @ k.transpose(-2, -1), dim=-1, dtype=wide)


def summary(p: Iterator[Tensor], scores: str, rows: int) -> Tensor:
    """Mean of the heads: the first row, or the mean of all."""
    if scores == "class":
        return next(p)[0, :, 0].mean(dim=0)
    return sum(some[0].sum(dim=(0, 1)) / some.shape[1] for some in p) / rows


def exact(qkv, packed, H, scores):
    """By the matrix, a sequence and some rows at a time."""
    out, found = [], []
    for q, k, v in each_of(qkv, packed, H):
        out.append(torch.cat([p.to(v.dtype) @ v for p in parts(q, k)], dim=2))
        if scores is not None:
            found.append(summary(parts(q, k), scores, q.shape[2]))
    joined = torch.cat([o[0].transpose(0, 1).flatten(1) for o in out])
    return (joined, torch.cat(found)) if found else joined


@torch.no_grad()
def recomputed(qkv, packed, H, scores):
    if scores == "class":
        each = ((q[:, :, :1], k) for q, k, _ in each_of(qkv, packed, H))
    else:
        each = ((q, k) for q, k, _ in each_of(qkv, packed, H))
    return torch.cat([summary(parts(q, k), scores, q.shape[2]) for q, k in each])


def sdpa_each(qkv, packed, H):
    out = [F.scaled_dot_product_attention(q, k, v) for q, k, v in each_of(qkv, packed, H)]
    return torch.cat([o[0].transpose(0, 1).flatten(1) for o in out])


def sdpa_padded(qkv, packed, H):
    q, k, v = packed.pad(qkv).unflatten(2, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=packed.there[:, None, None])
    return packed.unpad(out.transpose(1, 2)).flatten(1)


def varlen(qkv, packed, H):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unflatten(1, (3, H, -1)).unbind(1)
    return varlen_attn(q, k, v, packed.ends, packed.ends, packed.longest, packed.longest).flatten(1)


def with_scores(attend, qkv, packed, H, scores):
    return attend(qkv, packed, H), recomputed(qkv, packed, H, scores)


def peers_of(qkv, packed, H, scores):
    ways = {"sdpa each": sdpa_each}
    if len(packed.lengths) > 1:
        ways["sdpa padded"] = sdpa_padded
    try:
        with torch.no_grad():
            varlen(qkv, packed, H)
        ways["varlen"] = varlen
    except (ImportError, RuntimeError):  # no torch has it on a CPU, or in fp32
        pass
    peers = {name: partial(way, packed=packed, H=H) for name, way in ways.items()}
    if scores is not None:
        fastest = "varlen" if "varlen" in ways else "sdpa each"
        again = partial(with_scores, ways[fastest], packed=packed, H=H, scores=scores)
        peers[f"{fastest} + recomputed"] = again
    else:
        peers["matrix"] = partial(exact, packed=packed, H=H, scores=None)
    return peers | ({"batched": partial(batched, packed=packed, H=H, scores=scores)} if packed.equal else {})


def asked(bench, work, passes, scores=None, operator=None):
    """Full attention of a large image needs a GPU; what scores cost, and other ones, is measured of photographs; what
    is left of a sequence is asked where there are several."""
    if work.name == "large-image":
        return bench.device == "cuda" and not bench.quick and scores == "received" and bench.dtype.itemsize == 2
    if operator is not None:
        return work.name in ("photographs", "equal")
    return scores == "received" or work.name == "photographs"


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("scores", ["received", "class", None], ids=["scores", "class", "alone"])
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_attention(bench, compare, work, scores, passes):
    packed, (H, D) = Packed(work.lengths(bench.device, bench.quick), bench.device), work[1:3]

    def inputs():
        return (bench.random(packed.rows, 3 * H * D),)

    (qkv,) = inputs()
    out = qkv[:, : H * D]
    pairs = sum(n * n for n in packed.lengths)
    forward = nbytes(qkv, out) + 4 * packed.rows * (scores is not None)
    products = 2 if passes == "forward" else 7
    compare(
        f"attention packed {work.name} {scores or ''}".strip(),
        passes=passes,
        shape=dict(B=len(packed.lengths), T=packed.rows, longest=packed.longest, H=H, D=D),
        inputs=inputs,
        ours=partial(ours, packed=packed, H=H, scores=scores),
        peers=peers_of(qkv, packed, H, scores),
        bytes=forward + (nbytes(qkv, qkv, out, out) if passes != "forward" else 0),
        flops=2 * pairs * H * D * products,
        truth=partial(exact, packed=packed, H=H, scores=scores),
        errors=True,
    )


class Reduced(NamedTuple):
    """A reduction of sequences: how it is compared."""

    shape: dict[str, int]
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    batched: Callable[..., Tensor]
    peers: dict[str, Callable[..., Tensor]]
    truth: Callable[..., Tensor]
    rows: int  # of the result
    products: int


def slimming(bench: Bench, packed: Packed) -> Reduced:
    """Every sequence to M mixtures."""
    M, S = 98, len(packed.lengths)

    def each(x, w):
        parts = zip(x.split(packed.lengths), w.split(packed.lengths))
        return torch.stack([torch.softmax(logits, dim=0).t() @ tokens for tokens, logits in parts])

    def padded(x, w):
        logits = packed.pad(w).masked_fill(~packed.there[:, :, None], float("-inf"))
        return torch.softmax(logits, dim=1).transpose(1, 2) @ packed.pad(x)

    return Reduced(
        shape=dict(M=M, C=C),
        inputs=lambda: (bench.random(packed.rows, C), bench.random(packed.rows, M)),
        ours=partial(soft_aggregate, **packed.options),
        batched=lambda *given: soft_aggregate(*(t.unflatten(0, packed.there.shape) for t in given)),
        peers={"each": each, "padded": padded},
        truth=partial(reference.soft_aggregate, **packed.options),
        rows=S * M,
        products=packed.rows * M * C,
    )


def selection(bench: Bench, packed: Packed) -> Reduced:
    """The better half of every sequence, as it lies."""
    counts = kept_counts(packed.lengths, 0.5)
    k, rows = max(counts), sum(counts)
    of_each = torch.tensor(counts, device=bench.device)

    def inputs():
        return bench.random(packed.rows, C), torch.rand(packed.rows, device=bench.device)

    def ours(x, scores):
        options = packed.options | {"counts": of_each, "capacity": rows}
        return select_tokens(x, scores, k, prefix=0, order="index", **options).tokens

    def batched(x, scores):
        x, scores = (t.unflatten(0, packed.there.shape) for t in (x, scores))
        return select_tokens(x, scores, k, prefix=0, order="index").tokens.flatten(0, 1)

    def each(x, scores):
        parts = zip(x.split(packed.lengths), scores.split(packed.lengths), counts)
        return torch.cat([tokens[given.topk(n).indices.sort().values] for tokens, given, n in parts])

    def padded(x, scores):
        places = packed.pad(scores).masked_fill(~packed.there, float("-inf")).argsort(dim=1, descending=True)
        kept = places.argsort(dim=1) < of_each[:, None]
        return x[packed.unpad(kept)]

    return Reduced(dict(k=k, C=C), inputs, ours, batched, {"each": each, "padded": padded}, each, rows, 0)


def merging(bench: Bench, packed: Packed) -> Reduced:
    """A quarter of every sequence merged into the others."""
    D, less = 64, [(n - 1) // 4 for n in packed.lengths]
    of_each, rows = torch.tensor(less, device=bench.device), packed.rows - sum(less)

    def inputs():
        return bench.random(packed.rows, C), torch.randn(packed.rows, D, device=bench.device)

    def ours(x, metric):
        return merge_bipartite(x, metric, of_each, capacity=rows, **packed.options).tokens

    def batched(x, metric):
        return merge_bipartite(*(t.unflatten(0, packed.there.shape) for t in (x, metric)), less[0]).tokens.flatten(0, 1)

    def of(merge):
        def each(x, metric):
            parts = zip(x[None].split(packed.lengths, 1), metric.detach().float()[None].split(packed.lengths, 1), less)
            return torch.cat([merge(*part)[0] for part in parts])

        return each

    def by_reference(x, metric, r):
        return reference.merge_bipartite(x, match_bipartite(metric, r), x.shape[1] - 1 - r)[0]

    def by_authors(x, metric, r):
        return merge_as_published(metric, r, x, x.new_ones(*x.shape[:2], 1))[0]

    peers = {"each": of(by_reference), "published, each": of(by_authors)}
    products = D * sum((n // 2) ** 2 for n in packed.lengths)
    return Reduced(dict(C=C, D=D), inputs, ours, batched, peers, peers["each"], rows, products)


OPERATORS = {"soft_aggregate": slimming, "select_tokens": selection, "merge_bipartite": merging}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_reduction(bench, compare, work, operator, passes):
    packed = Packed(work.lengths(bench.device, bench.quick), bench.device)
    case = OPERATORS[operator](bench, packed)
    given = nbytes(*case.inputs())
    y = case.rows * C * bench.dtype.itemsize
    learns = operator == "soft_aggregate"
    compare(
        f"{operator} packed {work.name}",
        passes=passes,
        shape=dict(B=len(packed.lengths), T=packed.rows, longest=packed.longest, **case.shape),
        inputs=case.inputs,
        ours=case.ours,
        peers=case.peers | ({"batched": case.batched} if packed.equal else {}),
        bytes=given + y + (y + given * (1 + learns) if passes != "forward" else 0),
        flops=2 * case.products * (3 if learns and passes != "forward" else 1),
        truth=case.truth,
        errors=True,
    )
