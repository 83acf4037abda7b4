"""The specification: every operator in plain PyTorch, in the order of the public surface.

These functions define what is right. They work in any dtype (fp64 for gradient checks), on any device, contain
standard ATen operators only (so a model traced through them exports), and are what every kernel is tested against.
They check nothing: the public functions do that.

Notation: B images, P prefix tokens (class, distillation), N tokens, M slim tokens, C channels, R hidden width; H heads,
Nq queries, Nk keys, Dk and Dv channels of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packed


def keeps_dtypes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast too the tensors' own dtypes decide."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        tensor = next((t for t in (*arguments, *options.values()) if isinstance(t, Tensor)), None)
        device = "meta" if tensor is None else tensor.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **options)

    return call


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics and sums are kept in fp32, in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm(tokens: Tensor, norm: tuple[Tensor | None, Tensor | None, float], wide: torch.dtype) -> Tensor:
    """The layer norm (weight, bias, eps) of tokens over C in a wide dtype, rounded once."""
    weight, bias = (None if t is None else t.to(wide) for t in norm[:2])
    if weight is None and bias is not None:  # torch has no second gradient of a bias without a weight
        return (F.layer_norm(tokens.to(wide), tokens.shape[-1:], eps=norm[2]) + bias).to(tokens.dtype)
    return F.layer_norm(tokens.to(wide), tokens.shape[-1:], weight, bias, norm[2]).to(tokens.dtype)


@keeps_dtypes
def aggregation_weights(w: Tensor, scale: Tensor | float | None = None, mask: Tensor | None = None) -> Tensor:
    """A = softmax over the tokens (dim 1) of scale * w, (B,N,M), in the accumulation dtype.

    A token counts for a slot when the mask lets it and its logit is not -inf. A slot for which no token counts gets
    zeros (and zero gradients), never NaN.
    """
    valid = w != float("-inf")
    if mask is not None:
        valid = valid & mask.unsqueeze(-1)
    logits = w.to(accumulation_dtype(w.dtype)).masked_fill(~valid, 0.0)
    if scale is not None:
        logits = logits * (scale.to(logits.dtype).reshape(()) if isinstance(scale, Tensor) else scale)
    some = valid.any(dim=1, keepdim=True)
    logits = logits.masked_fill(~valid & some, float("-inf"))
    return torch.softmax(logits, dim=1).masked_fill(~valid, 0.0)


@keeps_dtypes
def soft_aggregate(
    x: Tensor, w: Tensor, *, scale: Tensor | float | None = None, mask: Tensor | None = None, prefix: int = 0,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """y = [x[:, :P], A^T x[:, P:]], (B,P+M,C): SiT's token slimming (TSM); packed ones are padded, and masked there."""
    if cu_seqlens is not None and max_seqlen is not None:
        counts = w.new_ones(w.shape[:1], dtype=torch.bool) if mask is None else mask
        most, ahead = min(max_seqlen, x.shape[0]), min(prefix, x.shape[0])  # no more than there are rows
        x, w, counts = (packed.padded(t, cu_seqlens, max(most, ahead)) for t in (x, w, counts))
        y = soft_aggregate(x, w[:, ahead:], scale=scale, mask=counts[:, ahead:], prefix=ahead)
        return torch.cat((y[:, :ahead], y.new_zeros(len(y), prefix - ahead, y.shape[2]), y[:, ahead:]), dim=1)
    a = aggregation_weights(w.to(accumulation_dtype(torch.promote_types(x.dtype, w.dtype))), scale, mask).to(x.dtype)
    tokens = x[:, prefix:]
    if mask is not None:
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
    return torch.cat((x[:, :prefix], torch.bmm(a.transpose(1, 2), tokens)), dim=1)


def soft_scatter(z: Tensor, w: Tensor, *, scale: Tensor | float | None = None) -> Tensor:
    """y = A z, (B,N,C), A = softmax over the M slim tokens (dim 2) of scale * w: each token mixes slim tokens."""
    return soft_aggregate(z, w.transpose(1, 2), scale=scale)


@keeps_dtypes
def token_mlp(z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """y = w2 gelu(w1 z + b1) + b2 along the tokens, (B,N,C): the token MLP of SiT's RTSM, exact (erf) GELU."""
    hidden = F.gelu(F.linear(z.transpose(1, 2), w1, b1))
    return F.linear(hidden, w2, b2).transpose(1, 2).contiguous()


def selection_order(scores: Tensor) -> Tensor:
    """The tokens of each image from the best score to the worst, (B,N) int64: equal ones by place, NaN behind all."""
    N, nan = scores.shape[1], scores.isnan()
    ordered, order = scores.masked_fill(nan, float("-inf")).sort(dim=1, descending=True)
    better = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1), (1, 0))  # how many scores are, equal ones once
    # a second sort, by numbers that are all different: ONNX has no stable one
    return order.gather(1, ((nan.gather(1, order) * N + better) * N + order).argsort(dim=1))


def rest_weights(scores: Tensor, left_out: Tensor, rest: str, normalize: bool = True) -> Tensor:
    """What each token brings to the rest token, (B,N) in the scores' dtype: 0 for those that are kept."""
    if rest == "mean":
        return left_out.to(scores.dtype) / left_out.sum(dim=1, keepdim=True).clamp(min=1)
    weights = scores.masked_fill(~left_out, 0.0)
    if not normalize:
        return weights
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


@keeps_dtypes
def select_tokens(
    x: Tensor,
    scores: Tensor,
    k: int,
    *,
    prefix: int = 1,
    rest: str = "none",
    normalize: bool = True,
    order: str = "score",
    counts: Tensor | None = None,
    companions: tuple[Tensor, ...] = (),
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """The k best tokens behind the prefix, and at the end one made of the others, (B,P+k+1,C).

    Also: the tokens' places (B,k), the companions at these places (B,k), the layer norm of the tokens, and how many
    rows of each image count (where counts are given: what is beyond is 0, and the places there are -1).
    """
    B, rows, C = x.shape
    N, dropped = rows - prefix, int(rest != "none")
    ranked = selection_order(scores)
    rank = ranked.argsort(dim=1)
    kept = torch.full((B,), k, device=x.device) if counts is None else counts.clamp(0, k)
    there = torch.arange(k, device=x.device) < kept.unsqueeze(1)
    index = ranked[:, :k].masked_fill(~there, N)
    if order == "index":
        index = torch.sort(index, dim=1).values

    # the rows to take from: x, its rest token if any, a row of zeros
    parts = [x, x.new_zeros(B, 1, C)]
    wide = accumulation_dtype(x.dtype)
    if dropped:
        left_out = rank >= kept.unsqueeze(1)
        weights = rest_weights(scores.to(wide), left_out, rest, normalize)
        others = x[:, prefix:].to(wide).masked_fill(~left_out.unsqueeze(2), 0.0)
        parts.append(torch.bmm(weights.unsqueeze(1), others).to(x.dtype))
    source = torch.cat(parts, dim=1)
    take = torch.cat((index + prefix, torch.full((B, dropped), rows, device=x.device)), dim=1)  # row `rows` is zeros
    if dropped:
        take = take.scatter(1, kept.unsqueeze(1), rows + 1)
    take = torch.cat((torch.arange(prefix, device=x.device).expand(B, -1), take), dim=1)
    tokens = source.gather(1, take.unsqueeze(2).expand(-1, -1, C))

    followers = tuple(
        torch.cat((c, c.new_zeros(B, 1)), dim=1).gather(1, index) if N else c.new_zeros(B, k) for c in companions
    )
    normed = None
    if norm is not None:
        normed = layer_norm(tokens, norm, wide)
    lengths = None if counts is None else kept + prefix + dropped
    return tokens, index.masked_fill(index == N, -1), followers, normed, lengths


@keeps_dtypes
def restore_tokens(
    base: Tensor,
    tokens: Tensor,
    index: Tensor,
    *,
    prefix: int = 1,
    companions: tuple[tuple[Tensor, Tensor], ...] | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
    """y = base with row P + index[b, j] of image b replaced by its token j, (B,P+N,C).

    tokens holds k rows, or P + k of which the first P replace the prefix. An index outside 0..N-1 replaces nothing.
    Companions are pairs, (B,N) and (B,k): of each the first with what is at the indices replaced by the second.
    """
    N = base.shape[1] - prefix
    carried = tokens.shape[1] - index.shape[1]
    place = torch.where((index >= 0) & (index < N), index, N)

    def replaced(old: Tensor, new: Tensor) -> Tensor:
        spare = torch.cat((old, old.new_zeros(old.shape[0], 1, *old.shape[2:])), dim=1)
        at = place if old.dim() == 2 else place.unsqueeze(-1).expand(-1, -1, old.shape[2])
        return spare.scatter(1, at, new)[:, :N]

    head = tokens[:, :carried] if carried else base[:, :prefix]
    y = torch.cat((head, replaced(base[:, prefix:], tokens[:, carried:])), dim=1)
    return y if companions is None else (y, tuple(replaced(old, new) for old, new in companions))


def neighbour_pairs(tokens: Tensor, grid: tuple[int, int], axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """(B,N,...) on a grid to the first and the second of each pair, (B,M,...) both, and which pairs have two, (M,).

    Where the axis is odd, the last row or column is alone: zeros stand for its second.
    """
    dim = 2 if axis == "horizontal" else 1
    tokens = tokens.unflatten(1, grid)
    there = torch.ones((1, *grid), dtype=torch.bool, device=tokens.device)
    if grid[dim - 1] % 2:
        tokens = torch.cat((tokens, torch.zeros_like(tokens.narrow(dim, 0, 1))), dim)
        there = torch.cat((there, torch.zeros_like(there.narrow(dim, 0, 1))), dim)
    first, second = (t.flatten(1, 2) for t in tokens.unflatten(dim, (-1, 2)).unbind(dim + 1))
    return first, second, there.unflatten(dim, (-1, 2)).unbind(dim + 1)[1].flatten()


def merge_weights(
    grid: tuple[int, int], axis: str, weights: Tensor | tuple | None, sizes: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """What the first and the second of each pair count, broadcasting to (B,M,C), in the accumulation dtype."""
    wide = accumulation_dtype(like.dtype)
    there = neighbour_pairs(like, grid, axis)[2].unsqueeze(-1)
    half = torch.full((), 0.5, dtype=wide, device=like.device)
    share_a, share_b = half, half
    if sizes is not None:
        a, b = (t.unsqueeze(-1) for t in neighbour_pairs(sizes.detach().to(wide), grid, axis)[:2])
        total = (a + b).masked_fill(a + b == 0, 1.0)
        share_a, share_b = (torch.where(a + b == 0, half, t / total) for t in (a, b))
    if isinstance(weights, Tensor):
        a, b = (t.unsqueeze(-1) for t in neighbour_pairs(weights.to(wide), grid, axis)[:2])
        counts_a = (a != float("-inf")) & (share_a != 0)  # the logarithm of no size is -inf
        counts_b = there & (b != float("-inf")) & (share_b != 0)
        a, b = a.masked_fill(~counts_a, 0.0), b.masked_fill(~counts_b, 0.0)
        largest = torch.where(counts_a & counts_b, torch.maximum(a, b), torch.where(counts_a, a, b)).detach()
        a = (share_a * torch.exp(a - largest)).masked_fill(~counts_a, 0.0)
        b = (share_b * torch.exp(b - largest)).masked_fill(~counts_b, 0.0)
        total = (a + b).masked_fill(a + b == 0, 1.0)
        a, b = a / total, b / total
    else:
        first, second = (0.5, 0.5) if weights is None else weights
        a, b = (w.to(wide) if isinstance(w, Tensor) else w for w in (first, second))
        a, b = 2 * share_a * a, 2 * share_b * b
    return torch.where(there, a, 1.0), torch.where(there, b, 0.0)


@keeps_dtypes
def merge_neighbours(
    x: Tensor,
    grid: tuple[int, int],
    axis: str,
    weights: Tensor | tuple | None = None,
    *,
    prefix: int = 1,
    sizes: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """y = [x[:, :P], w_a a + w_b b] of the neighbours a and b along an axis of the grid, (B,P+M,C).

    Behind y come, as asked for: the sizes (those of a pair added up), and the layer norm of y.
    """
    wide = accumulation_dtype(x.dtype)
    tokens = x[:, prefix:]
    first, second, _ = neighbour_pairs(tokens.to(wide), grid, axis)
    a, b = merge_weights(grid, axis, weights, sizes, tokens)
    results = [torch.cat((x[:, :prefix], (a * first + b * second).to(x.dtype)), dim=1)]
    if sizes is not None:
        one, other, _ = neighbour_pairs(sizes.detach().to(wide), grid, axis)
        results.append((one + other).to(sizes.dtype))
    if norm is not None:
        results.append(layer_norm(results[0], norm, wide))
    return results[0] if len(results) == 1 else tuple(results)


@keeps_dtypes
def match_bipartite(metric: Tensor, r: int, *, prefix: int = 1) -> Tensor:
    """Which of the M = N - r merged tokens each of the N tokens goes into, (B,N) int64: ToMe's matching.

    The rows behind the prefix are split by the parity of their number: even rows (A) look for the odd row (B) that is
    most like them, by the cosine of their metrics, the first of equals; the r rows of A that found the best go there.
    Order of the result: what is left of A, then B. A cosine that is no number is the least of all.
    """
    B, rows, _ = metric.shape
    N = rows - prefix
    evens, odds = (rows + 1) // 2 - (prefix + 1) // 2, rows // 2 - prefix // 2
    left = evens - r
    if r == 0:
        of_even = torch.arange(left, device=metric.device).expand(B, -1)
    else:
        unit = unit_rows(metric[:, prefix:])
        best, target = most_alike(unit[:, prefix % 2 :: 2], unit[:, 1 - prefix % 2 :: 2])
        merged = selection_order(best).argsort(dim=1) < r
        of_even = torch.where(merged, left + target, (~merged).cumsum(dim=1) - 1)
    of_odd = (left + torch.arange(odds, device=metric.device)).expand(B, -1)
    token = torch.arange(N, device=metric.device)  # the k-th of either side is token 2k or 2k + 1
    return torch.cat((of_even, of_odd), dim=1)[:, token // 2 + (token + prefix) % 2 * evens]


def unit_rows(metric: Tensor) -> Tensor:
    """Rows (B,N,D) at length 1 in the accumulation dtype; those of zeros stay so."""
    wide = metric.to(accumulation_dtype(metric.dtype))
    # rows whose squares may overflow or vanish are brought near 1 by a power of two, which rounds nothing
    high, low, down, up = (50, -40, -76, 90) if wide.dtype == torch.float32 else (450, -400, -600, 700)
    norm = wide.norm(dim=2, keepdim=True)
    power = torch.ones_like(norm).masked_fill(norm > 2.0**high, 2.0**down).masked_fill(norm < 2.0**low, 2.0**up)
    wide = wide * power
    return wide / wide.norm(dim=2, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)


def most_alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of each unit row of a (B,n,D) the greatest cosine with one of b (B,m,D), and which, the first of equals: (B,n).

    A cosine that is no number is the least of all.
    """
    cosine = torch.bmm(a, b.transpose(1, 2))
    cosine = cosine.masked_fill(cosine.isnan(), float("-inf"))
    best = cosine.amax(dim=2, keepdim=True)
    m = b.shape[1]
    return best.squeeze(2), torch.where(cosine == best, torch.arange(m, device=b.device), m).amin(dim=2)


@keeps_dtypes
def merge_bipartite(
    x: Tensor,
    index: Tensor,
    tokens: int,
    *,
    prefix: int = 1,
    sizes: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y = [x[:, :P], the means, by sizes, of the tokens that go into each], (B,P+M,C), M = tokens.

    Also: the sizes (B,P+M), their logarithm, and the layer norm of y. sizes (B,P+N) are of every row, the prefix too;
    None: 1. A token that nothing of any size goes into is 0. An index outside 0..M-1 is of no token.
    """
    wide = accumulation_dtype(x.dtype)
    shares = x.new_ones(x.shape[:2], dtype=wide) if sizes is None else sizes.detach().to(wide)
    inside = (index >= 0) & (index < tokens)
    place = torch.where(inside, index, tokens)

    def summed(values: Tensor) -> Tensor:
        at = place if values.dim() == 2 else place.unsqueeze(2).expand_as(values)
        return values.new_zeros(values.shape[0], tokens + 1, *values.shape[2:]).scatter_add(1, at, values)[:, :tokens]

    totals = summed(shares[:, prefix:])
    sums = summed(x[:, prefix:].to(wide) * shares[:, prefix:].unsqueeze(2))
    nothing = (totals == 0).unsqueeze(2)
    means = (sums / totals.unsqueeze(2).masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0).to(x.dtype)
    y = torch.cat((x[:, :prefix], means), dim=1)
    totals = torch.cat((shares[:, :prefix], totals), dim=1)
    normed = None
    if norm is not None:
        normed = layer_norm(y, norm, wide)
    return y, totals, totals.log(), normed


@keeps_dtypes
def sum_bipartite(x: Tensor, index: Tensor, tokens: int, *, prefix: int = 1) -> Tensor:
    """y = [x[:, :P], the sum of the tokens that go into each], (B,P+M,C): the transpose of `unmerge_bipartite`."""
    at = index.unsqueeze(2).expand(-1, -1, x.shape[2])
    wide = accumulation_dtype(x.dtype)
    sums = x.new_zeros(x.shape[0], tokens, x.shape[2], dtype=wide).scatter_add(1, at, x[:, prefix:].to(wide))
    return torch.cat((x[:, :prefix], sums.to(x.dtype)), dim=1)


@keeps_dtypes
def unmerge_bipartite(y: Tensor, index: Tensor, *, prefix: int = 1) -> Tensor:
    """x = [y[:, :P], y[:, P + index]], (B,P+N,C): every token gets the one it went into; 0 where it went into none."""
    tokens = torch.cat((y[:, prefix:], y.new_zeros(y.shape[0], 1, y.shape[2])), dim=1)
    M = y.shape[1] - prefix
    place = torch.where((index >= 0) & (index < M), index, M)
    return torch.cat((y[:, :prefix], tokens.gather(1, place.unsqueeze(2).expand(-1, -1, y.shape[2]))), dim=1)


@keeps_dtypes
def attention_logits(
    q: Tensor,
    k: Tensor,
    *,
    qk_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """S = scale * sum_c mask_c q_c k_c + key_bias in the accumulation dtype, and which keys count, (B,H,Nq,Nk) both.

    A key counts when it lies within its image's length and its bias is not -inf; the others' logits are 0 here.
    """
    q = q if qk_mask is None else (q * qk_mask.unsqueeze(1)).to(q.dtype)
    valid = torch.ones((q.shape[0], 1, 1, k.shape[2]), dtype=torch.bool, device=q.device)
    if key_lengths is not None:
        valid = (torch.arange(k.shape[2], device=q.device) < key_lengths.unsqueeze(1))[:, None, None]
    if key_bias is not None:
        valid = valid & (key_bias != float("-inf"))
    k = k.masked_fill(~valid.transpose(2, 3), 0.0)
    logits = torch.matmul(q, k.transpose(2, 3)).to(accumulation_dtype(q.dtype))
    logits = logits * (q.shape[3] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype).masked_fill(~valid, 0.0)
    valid = valid.expand_as(logits)
    return logits.masked_fill(~valid, 0.0), valid


def heads_of(qkv: Tensor, heads: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (B,H,N,Dk) and v (B,H,N,Dv), views of a packed projection (B, N, H * (2 Dk + Dv))."""
    wide = heads * channels
    parts = qkv.split((wide, wide, qkv.shape[2] - 2 * wide), dim=2)
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    return q, k, v


@keeps_dtypes
def masked_channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk_mask: Tensor | None = None,
    v_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    scores: str | None = None,
    heads: str = "each",
    return_lse: bool = False,
    return_key_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """O = softmax(S) V * v_mask, (B,H,Nq,Dv), S of `attention_logits`: attention that tells what it attended to.

    Behind O come, as asked for: the scores (the probabilities of query 0, or their mean over the queries; (B,H,Nk), or
    (B,Nk) averaged over the heads), log sum exp S (B,H,Nq), and the mean of k over the heads (B,Nk,Dk). A query without
    any key that counts gives zeros, and -inf as its log-sum-exp. Keys beyond a length are not looked at.
    """
    logits, valid = attention_logits(q, k, qk_mask=qk_mask, key_bias=key_bias, key_lengths=key_lengths, scale=scale)
    some = valid.any(dim=3, keepdim=True)
    logits = logits.masked_fill(~valid & some, float("-inf"))
    p = torch.softmax(logits, dim=3).masked_fill(~valid, 0.0)
    if key_lengths is not None:
        beyond = (torch.arange(k.shape[2], device=k.device) >= key_lengths.unsqueeze(1))[:, None, :, None]
        k, v = k.masked_fill(beyond, 0.0), v.masked_fill(beyond, 0.0)
    out = torch.matmul(p.to(v.dtype), v)
    results = [out if v_mask is None else (out * v_mask.unsqueeze(1)).to(v.dtype)]
    if scores is not None:
        received = p[:, :, 0] if scores == "class" else p.mean(dim=2)
        results.append(received.mean(dim=1) if heads == "mean" else received)
    if return_lse:
        results.append(torch.logsumexp(logits, dim=3).masked_fill(~some.squeeze(3), float("-inf")))
    if return_key_mean:
        results.append(k.mean(dim=1))
    return results[0] if len(results) == 1 else tuple(results)
