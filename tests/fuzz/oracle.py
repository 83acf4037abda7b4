"""What is right: every public operator from its docstring and formula, in fp64, as plainly as can be; differentiable.

Nothing of tokenops is used. The signatures are those of tokenops, so a call can be made of either. `rounded` stands
where code of lower precision may keep a number in the tensors' dtype (`fuzz.rounding` measures what that costs).
"""

from typing import NamedTuple

import torch

from fuzz.rounding import Recomputed, rounded

INF = float("inf")


def softmax(logits, counts):
    """Along dim 0, of those that count; zeros where none does. And the log of the sum, -inf there."""
    logits = torch.where(counts, logits, 0.0)
    highest = torch.where(counts, logits, -INF).detach()
    highest = highest.amax(dim=0) if len(logits) else highest.new_zeros(logits.shape[1:])
    some = counts.any(dim=0)
    highest = torch.where(some, highest, 0.0)
    e = torch.where(counts, torch.exp(logits - highest), 0.0)
    total = e.sum(dim=0)
    lse = torch.where(some, highest + torch.log(torch.where(some, total, 1.0)), -INF)
    return e / torch.where(some, total, 1.0), lse


def layer_norm(x, norm):
    """Over the last dimension; norm is (weight, bias, eps)."""
    weight, bias, eps = norm
    if x.shape[-1] == 0:
        return x.clone()
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return rounded(y if bias is None else y + bias)


def stacked(images, like, *shape):
    """Images one upon the other, of which there may be none."""
    return torch.stack(images) if images else like.new_zeros((0, *shape))


def soft_aggregate(x, w, *, scale=None, mask=None, prefix=0):
    scale = 1.0 if scale is None else scale.reshape(()) if isinstance(scale, torch.Tensor) else scale
    images = []
    for b in range(len(x)):
        counts = w[b] != -INF
        tokens = x[b, prefix:]
        if mask is not None:
            counts = counts & mask[b][:, None]
            tokens = torch.where(mask[b][:, None], tokens, 0.0)
        a, _ = softmax(torch.where(counts, w[b], 0.0) * scale, counts)
        y = (rounded(a)[:, :, None] * tokens[:, None, :]).sum(dim=0)
        images.append(torch.cat([x[b, :prefix], rounded(y)]))
    return stacked(images, x, prefix + w.shape[2], x.shape[2])


def soft_scatter(z, w, *, scale=None):
    scale = 1.0 if scale is None else scale.reshape(()) if isinstance(scale, torch.Tensor) else scale
    images = []
    for b in range(len(z)):
        counts = (w[b] != -INF).T
        a, _ = softmax(torch.where(counts, w[b].T, 0.0) * scale, counts)  # over the slim tokens
        images.append(rounded((rounded(a)[:, :, None] * z[b][:, None, :]).sum(dim=0)))
    return stacked(images, z, w.shape[1], z.shape[2])


def token_mlp(z, w1, b1, w2, b2):
    images = []
    for b in range(len(z)):
        hidden = (w1[:, :, None] * z[b][None]).sum(dim=1)
        hidden = rounded(hidden if b1 is None else hidden + b1[:, None])
        hidden = rounded(0.5 * hidden * (1.0 + torch.erf(hidden / 2**0.5)))
        y = (w2[:, :, None] * hidden[None]).sum(dim=1)
        images.append(rounded(y if b2 is None else y + b2[:, None]))
    return stacked(images, z, w2.shape[0], z.shape[2])


def masked_channel_attention(
    q,
    k,
    v,
    *,
    qk_mask=None,
    v_mask=None,
    key_bias=None,
    key_lengths=None,
    scale=None,
    scores=None,
    heads="each",
    return_lse=False,
    return_key_mean=False,
):
    (B, H, Nq, Dk), (Nk, Dv) = q.shape, v.shape[2:]
    scale = Dk**-0.5 if scale is None else scale
    bias = None if key_bias is None else key_bias.expand(B, H, 1, Nk)
    outs, received, lses, means = [], [], [], []
    for b in range(B):
        within = torch.arange(Nk) < (Nk if key_lengths is None else int(key_lengths[b]))
        for h in range(H):
            counts = within if bias is None else within & (bias[b, h, 0] != -INF)
            query = q[b, h] if qk_mask is None else rounded(q[b, h] * qk_mask[h])
            key, value = torch.where(counts[:, None], k[b, h], 0.0), torch.where(within[:, None], v[b, h], 0.0)
            s = scale * rounded((query[None] * key[:, None]).sum(dim=2), forward=False)  # (Nk, Nq)
            if bias is not None:
                s = s + torch.where(counts, bias[b, h, 0], 0.0)[:, None]
            again = Recomputed()
            p, lse = softmax(again.logits(s), counts[:, None].expand(Nk, Nq))
            p = again.probabilities(rounded(p, forward=False), lse)
            out = rounded((rounded(p)[:, :, None] * value[:, None]).sum(dim=0))
            outs.append(out if v_mask is None else rounded(out * v_mask[h]))
            lses.append(lse)
            if scores is not None:
                told = again.scores(p, lse)
                received.append(told[:, 0] if scores == "class" else told.mean(dim=1))
        means.append(rounded(torch.where(within[:, None], k[b], 0.0).mean(dim=0)))
    results = [stacked(outs, q, Nq, Dv).reshape(B, H, Nq, Dv)]
    if scores is not None:
        each = stacked(received, q, Nk).reshape(B, H, Nk)
        results.append(each.mean(dim=1) if heads == "mean" else each)
    if return_lse:
        results.append(stacked(lses, q, Nq).reshape(B, H, Nq))
    if return_key_mean:
        results.append(stacked(means, q, Nk, Dk))
    return results[0] if len(results) == 1 else tuple(results)


class Selection(NamedTuple):
    tokens: torch.Tensor
    index: torch.Tensor
    companions: tuple
    normed: torch.Tensor | None
    lengths: torch.Tensor | None


def best_first(scores):
    """Places by score, the largest first, of equals the lower place, NaN behind every number."""
    scores = scores.tolist()
    return sorted(
        range(len(scores)), key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0, i)
    )


def select_tokens(
    x, scores, k, *, prefix=1, rest="none", normalize=True, order="score", counts=None, companions=(), norm=None
):
    B, C = len(x), x.shape[2]
    images, index, followers = [], [], [[] for _ in companions]
    for b in range(B):
        kept = k if counts is None else int(counts[b])
        ranked = best_first(scores[b].detach())
        chosen, others = ranked[:kept], ranked[kept:]
        chosen = sorted(chosen) if order == "index" else chosen
        rows = [x[b, :prefix], x[b, prefix:][chosen]]
        if rest != "none":
            left = x[b, prefix:][others]
            if rest == "mean":
                weights = x.new_ones(len(others)) / max(1, len(others))
            else:
                weights = scores[b][others]
                total = weights.sum()
                if normalize and total != 0:
                    weights = weights / total
            rows.append(rounded((weights[:, None] * left).sum(dim=0, keepdim=True)))
        rows.append(x.new_zeros((k - kept, C)))
        images.append(torch.cat(rows))
        index.append(chosen + [-1] * (k - kept))
        for companion, follower in zip(companions, followers):
            follower.append(torch.cat([companion[b][chosen], companion.new_zeros(k - kept)]))
    tokens = stacked(images, x, prefix + k + (rest != "none"), C)
    return Selection(
        tokens,
        torch.tensor(index, dtype=torch.int64).reshape(B, k),
        tuple(stacked(follower, companion, k) for companion, follower in zip(companions, followers)),
        None if norm is None else layer_norm(tokens, norm),
        None if counts is None else counts + (prefix + (rest != "none")),
    )


def restore_tokens(base, tokens, index, *, prefix=1, companions=None):
    def replaced(old, new):
        """Rows of `old` but where an index is: there that of `new`."""
        rows = list(old.unbind(0))
        for j, place in enumerate(places):
            if place >= 0:
                rows[place] = new[j]
        return torch.stack(rows) if rows else old.clone()

    carried = tokens.shape[1] - index.shape[1]
    images, found = [], [[] for _ in companions or ()]
    for b in range(len(base)):
        places = index[b].tolist()
        head = tokens[b, :carried] if carried else base[b, :prefix]
        images.append(torch.cat([head, replaced(base[b, prefix:], tokens[b, carried:])]))
        for (old, new), put in zip(companions or (), found):
            put.append(replaced(old[b], new[b]))
    y = stacked(images, base, *base.shape[1:])
    if companions is None:
        return y
    return y, tuple(stacked(put, old, old.shape[1]) for (old, _), put in zip(companions, found))


def merge_neighbours(x, grid, axis, weights=None, *, prefix=1, sizes=None, norm=None):
    height, width = grid
    down, across = (2, 1) if axis == "vertical" else (1, 2)
    pairs = []
    for i in range(0, height, down):
        for j in range(0, width, across):
            other = (i + 1, j) if axis == "vertical" else (i, j + 1)
            alone = other[0] >= height or other[1] >= width
            pairs.append((i * width + j, None if alone else other[0] * width + other[1]))
    one = [a for a, _ in pairs]
    two = [a if b is None else b for a, b in pairs]
    alone = torch.tensor([b is None for _, b in pairs], dtype=torch.bool)
    images, merged = [], []
    for b in range(len(x)):
        tokens = x[b, prefix:]
        first = second = torch.full((len(pairs), 1), 0.5, dtype=x.dtype)
        if isinstance(weights, torch.Tensor):
            logits = torch.stack([weights[b][one], weights[b][two]])
            counts = logits != -INF
            if sizes is not None:
                s = torch.stack([sizes[b][one], sizes[b][two]]).detach()
                equal = s.sum(dim=0) == 0  # two sizes of 0
                counts = counts & ((s > 0) | equal)
                logits = logits + torch.where(s > 0, s, 1.0).log()
            first, second = softmax(torch.where(counts, logits, 0.0), counts)[0].unsqueeze(2)
        else:
            if sizes is not None:
                s = torch.stack([sizes[b][one], sizes[b][two]]).detach().unsqueeze(2)
                total = s.sum(dim=0)
                share = torch.where(total == 0, 0.5, s / torch.where(total == 0, 1.0, total))
                first, second = share
            if weights is not None:
                alpha, beta = (t.reshape(-1) if isinstance(t, torch.Tensor) else t for t in weights)
                first, second = 2 * first * alpha, 2 * second * beta
        y = first * tokens[one] + second * tokens[two]
        images.append(torch.cat([x[b, :prefix], rounded(torch.where(alone[:, None], tokens[one], y))]))
        if sizes is not None:
            merged.append(sizes[b][one] + torch.where(alone, 0.0, sizes[b][two]))
    y = stacked(images, x, prefix + len(pairs), x.shape[2])
    results = [y]
    if sizes is not None:
        results.append(stacked(merged, sizes, len(pairs)))
    if norm is not None:
        results.append(layer_norm(y, norm))
    return results[0] if len(results) == 1 else tuple(results)


def centres(full, small, factor):
    """Of each place between which two merged places its centre lies, and how near to the second."""
    found = []
    for i in range(full):
        at = max(0.0, (i + 0.5) / factor - 0.5)
        low = min(int(at), small - 1)
        found.append((low, min(low + 1, small - 1), at - low))
    return found


def unmerge_neighbours(x, grid, merges, *, prefix=1, mode="repeat"):
    height, width = grid
    down, across = 2 ** merges.count("vertical"), 2 ** merges.count("horizontal")
    small_h, small_w = -(-height // down), -(-width // across)
    tokens = x[:, prefix:]
    if mode == "repeat":
        places = [(i // down) * small_w + j // across for i in range(height) for j in range(width)]
        return torch.cat([x[:, :prefix], tokens[:, places]], dim=1)
    rows, columns = centres(height, small_h, down), centres(width, small_w, across)
    total = 0
    for i in range(2):
        for j in range(2):
            places = [r[i] * small_w + c[j] for r in rows for c in columns]
            near = [(r[2] if i else 1 - r[2]) * (c[2] if j else 1 - c[2]) for r in rows for c in columns]
            total = total + x.new_tensor(near)[:, None] * tokens[:, places]
    return torch.cat([x[:, :prefix], rounded(total)], dim=1)


def cosines(metric):
    """Of every two rows, as if there were no largest and no smallest number."""
    size = metric.abs().amax(dim=1, keepdim=True) if metric.shape[1] else metric.new_zeros((len(metric), 1))
    unit = metric / torch.where(size == 0, 1.0, size)
    length = (unit * unit).sum(dim=1, keepdim=True).sqrt()
    unit = unit / torch.where(length == 0, 1.0, length)  # a row of zeros is like every other by 0
    return (unit[:, None] * unit[None]).sum(dim=2)


def match_bipartite(metric, r, *, prefix=1):
    B, rows = metric.shape[:2]
    even = [n for n in range(prefix, rows) if n % 2 == 0]
    odd = [n for n in range(prefix, rows) if n % 2 == 1]
    index = torch.zeros((B, rows - prefix), dtype=torch.int64)
    for b in range(B):
        likeness = cosines(metric[b].detach().double())
        likeness = torch.where(likeness.isnan(), -INF, likeness).tolist()
        to = {i: max(odd, key=lambda j: (likeness[i][j], -j)) for i in even} if odd else {}
        going = sorted(to, key=lambda i: (-likeness[i][to[i]], i))[:r]
        staying = [i for i in even if i not in going]
        order = {n: m for m, n in enumerate(staying + odd)}
        for n in range(prefix, rows):
            index[b, n - prefix] = order[to[n] if n in going else n]
    return index


class Merged(NamedTuple):
    tokens: torch.Tensor
    index: torch.Tensor
    sizes: torch.Tensor
    log_sizes: torch.Tensor
    normed: torch.Tensor | None


def grouped(values, index, tokens):
    """(N,...) to (tokens,...): the sums of those that go there."""
    goes = torch.arange(tokens)[:, None] == index[None]
    return torch.where(goes.reshape(*goes.shape, *[1] * (values.dim() - 1)), values[None], 0.0).sum(dim=1)


def merge_by_index(x, index, tokens, prefix, sizes=None, norm=None):
    sizes = x.new_ones(x.shape[:2]).detach() if sizes is None else sizes.detach()
    images, totals = [], []
    for b in range(len(x)):
        total = grouped(sizes[b, prefix:], index[b], tokens)
        sums = grouped(sizes[b, prefix:, None] * x[b, prefix:], index[b], tokens)
        means = rounded(sums / torch.where(total == 0, 1.0, total)[:, None])
        images.append(torch.cat([x[b, :prefix], means]))
        totals.append(torch.cat([sizes[b, :prefix], total]))
    y = stacked(images, x, prefix + tokens, x.shape[2])
    totals = stacked(totals, sizes, prefix + tokens)
    return y, totals, totals.log(), None if norm is None else layer_norm(y, norm)


def merge_bipartite(x, metric, r, *, prefix=1, sizes=None, norm=None):
    index = match_bipartite(metric, r, prefix=prefix)
    y, totals, logs, normed = merge_by_index(x, index, index.shape[1] - r, prefix, sizes, norm)
    return Merged(y, index, totals, logs, normed)


def unmerge_bipartite(y, index, *, prefix=1):
    images = [torch.cat([y[b, :prefix], y[b, prefix:][index[b]]]) for b in range(len(y))]
    return stacked(images, y, prefix + index.shape[1], y.shape[2])


class tome:
    """As the module of that name."""

    @staticmethod
    def bipartite_soft_matching(metric, r, class_token=False, distill_token=False):
        prefix = class_token + distill_token
        N = max(0, metric.shape[1] - prefix)
        r = max(0, min(r, N // 2))
        index = match_bipartite(metric, r, prefix=prefix)

        def merge(x, mode="mean"):
            if mode == "mean":
                return merge_by_index(x, index, N - r, prefix)[0]
            images = [torch.cat([x[b, :prefix], grouped(x[b, prefix:], index[b], N - r)]) for b in range(len(x))]
            return rounded(stacked(images, x, prefix + N - r, x.shape[2]))

        merge.by = lambda x, sizes: merge_by_index(x, index, N - r, prefix, sizes)
        return merge, lambda y: unmerge_bipartite(y, index, prefix=prefix)

    @staticmethod
    def merge_wavg(merge, x, size=None):
        y, totals, _, _ = merge.by(x, None if size is None else size.squeeze(2))
        return y, totals.unsqueeze(2)

    @staticmethod
    def merge_source(merge, x, source=None):
        return merge(torch.eye(x.shape[1]).expand(len(x), -1, -1) if source is None else source, mode="sum")
