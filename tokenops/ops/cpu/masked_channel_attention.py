"""masked_channel_attention on a CPU of torch's own kernels, tile by tile: in fp64, and where there is no compiler."""

import torch

from .. import checks, packed
from ..reference import accumulation_dtype, heads_of
from ..schemas import attention_gradients, heads_inside, parts_of

_aten = torch.ops.aten

#: queries of a tile, and the probabilities that exist together (a few images' tiles, kept in cache)
QUERIES = 256
TOGETHER = 2**18


def _plain(q, k, v, *others):
    """Whether torch's flash kernel can do it."""
    sizes = q.shape[3] == v.shape[3] and q.numel() and k.numel()
    return bool(sizes) and all(other is None for other in others)


def _dense(*tensors):
    """Channels side by side in memory."""
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _times(x, mask):
    """Each head's channels times its mask, rounded to x's dtype."""
    return x if mask is None else (x * mask.unsqueeze(1)).to(x.dtype)


def _tiles(q, k, lengths):
    """(images, queries, keys) as slices; of a ragged batch one image at a time, and not those without a key."""
    (B, H, M, _), N = q.shape, k.shape[2]
    step = min(M, QUERIES)
    images = 1 if lengths is not None else max(1, TOGETHER // max(1, H * step * N))
    counts = [N] * B if lengths is None else lengths.tolist()
    for b in range(0, B, images):
        for m in range(0, M if counts[b] else 0, max(step, 1)):
            yield slice(b, b + images), slice(m, m + step), slice(counts[b])


def _probabilities(q, k, bias, scale):
    """P of a tile and its log-sum-exp, in the accumulation dtype."""
    p = torch.matmul(q, k.transpose(2, 3)).to(accumulation_dtype(q.dtype)).mul_(scale)
    if bias is not None:
        p += bias.unsqueeze(2)
        p.masked_fill_(bias.unsqueeze(2) == float("-inf"), float("-inf"))  # of a product that is NaN, too
    top = p.amax(dim=3, keepdim=True)
    top.masked_fill_(top == float("-inf"), 0.0)
    total = p.sub_(top).exp_().sum(dim=3, keepdim=True)
    lse = (top + total.log()).squeeze(3)
    return p.div_(total.masked_fill(total == 0.0, 1.0)), lse


def _composed(q, k, v, bias, lengths, scale, received, out, lse, scores):
    """Fills out, lse and scores, apart from the masks."""
    if not received and _plain(q, k, v, bias, lengths):
        found = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        out.copy_(found[0]), lse.copy_(found[1])
        if scores.numel():  # of query 0 alone: as little work as a query is
            p, _ = _probabilities(q[:, :, :1], k, None, scale)
            scores.copy_(p.squeeze(2))
        return
    out.zero_(), lse.fill_(float("-inf")), scores.zero_()
    for images, queries, keys in _tiles(q, k, lengths):
        p, lse[images, :, queries] = _probabilities(
            q[images, :, queries], k[images, :, keys], None if bias is None else bias[images, :, keys], scale
        )
        out[images, :, queries] = torch.matmul(p.to(v.dtype), v[images, :, keys])
        if scores.numel() and received:
            scores[images, :, keys] += p.sum(dim=2) / q.shape[2]
        elif scores.numel() and queries.start == 0:
            scores[images, :, keys] = p[:, :, 0]


def masked_channel_attention_fwd(
    q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads=0, channels=0, keep=True, cu_q=None,
    cu_k=None, max_q=0, max_k=0,
):  # fmt: skip
    q, k, v = parts_of(q, k, v, heads, channels)
    if cu_q is not None:
        return _sequences_fwd(q, k, v, qk_mask, v_mask, bias, scale, scores, mean, key_mean, keep, cu_q, cu_k)
    (B, H, M, _), N, DV = q.shape, k.shape[2], v.shape[3]
    checks.lengths("masked_channel_attention", "key_lengths", lengths, N)
    wide = accumulation_dtype(q.dtype)
    q, k, v = _dense(q, k, v)
    out, lse = heads_inside(q, M, DV), q.new_empty((B, H, M), dtype=wide)
    each = q.new_empty((0,) if scores == "none" else (B, H, N), dtype=wide)
    bias = None if bias is None else bias.to(wide)
    _composed(_times(q, qk_mask), k, v, bias, lengths, scale, scores == "received", out, lse, each)
    if v_mask is not None:
        out.copy_(_times(out, v_mask))
    mean_k = _within(k, lengths).mean(dim=1) if key_mean else k.new_empty((0,))
    return out, each.mean(dim=1) if mean and scores != "none" else each, lse if keep else lse.new_empty(0), mean_k


def _within(x, lengths):
    """Zeros in place of what lies beyond the lengths."""
    if lengths is None:
        return x
    return x.masked_fill((torch.arange(x.shape[2]) >= lengths.unsqueeze(1))[:, None, :, None], 0.0)


def masked_channel_attention_bwd(
    dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, lengths, out, lse, scale, scores, mean, heads=0, channels=0,
    cu_q=None, cu_k=None, max_q=0, max_k=0,
):  # fmt: skip
    made = attention_gradients(q, k, v)
    dq, dk, dv = made if k is not None else heads_of(made[0], heads, channels)
    q, k, v = parts_of(q, k, v, heads, channels)
    if cu_q is not None:
        given = dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, out, lse, scale, scores, mean
        return *made, *_sequences_bwd(*given, dq, dk, dv, cu_q, cu_k)
    (B, H, M, _), N = q.shape, k.shape[2]
    wide = accumulation_dtype(q.dtype)
    dout, q, k, v, out = _dense(dout, q, k, v, out)  # torch 2.11's kernel takes it for granted
    lse = lse.contiguous()  # what was saved may lie otherwise
    dmasks = [
        lse.new_zeros((B, H, t.shape[3]) if mask is not None else (0,)) for t, mask in ((q, qk_mask), (v, v_mask))
    ]
    dbias = lse.new_zeros((B, H, N) if bias is not None else (0,))
    if dscores is not None:
        share = 1 / ((M if scores == "received" else 1) * (H if mean else 1))
        dscores = (dscores.unsqueeze(1).expand(B, H, N) if mean else dscores) * share
    wide_bias = None if bias is None else bias.to(wide)
    if _plain(q, k, v, dscores, dlse, qk_mask, v_mask, bias, lengths):
        given = dout, q, k, v, out, lse
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False, scale=scale)
        dq.copy_(found[0]), dk.copy_(found[1]), dv.copy_(found[2])
    else:
        given = dout, dscores, dlse, q, k, v, qk_mask, v_mask, wide_bias, lengths, scale, scores == "received"
        _composed_bwd(*given, dq, dk, dv, *dmasks, dbias)
    return (
        *made,
        *(
            q.new_empty((0,)) if mask is None else share.sum(dim=0).to(mask.dtype)
            for share, mask in zip(dmasks, (qk_mask, v_mask))
        ),
        q.new_empty((0,)) if bias is None else dbias.to(bias.dtype),
    )


def _composed_bwd(
    dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, lengths, scale, received, dq, dk, dv, dqk_mask, dv_mask, dbias
):
    """Fills the gradients."""
    wide = dbias.dtype
    if bias is not None:  # without a weight, whatever they hold
        out_of_it = bias == float("-inf")
        k = k.masked_fill(out_of_it.unsqueeze(3), 0.0)
        dscores = None if dscores is None else dscores.masked_fill(out_of_it, 0.0)
    q_masked = _times(q, qk_mask)
    wide_dk, wide_dv = torch.zeros(k.shape, dtype=wide), torch.zeros(v.shape, dtype=wide)
    dq.zero_()
    for images, queries, keys in _tiles(q, k, lengths):
        tile_q, tile_k = q_masked[images, :, queries], k[images, :, keys]
        tile_v, tile_dout = v[images, :, keys], dout[images, :, queries]
        p, _ = _probabilities(tile_q, tile_k, None if bias is None else bias[images, :, keys], scale)
        wide_dv[images, :, keys] += torch.matmul(p.to(q.dtype).transpose(2, 3), tile_dout)
        dp = torch.matmul(_times(tile_dout, v_mask), tile_v.transpose(2, 3)).to(wide)
        if dscores is not None and received:
            dp += dscores[images, :, None, keys]
        elif dscores is not None and queries.start == 0:
            dp[:, :, 0] += dscores[images, :, keys]
        delta = (p * dp).sum(dim=3, keepdim=True)
        if dlse is not None:
            delta -= dlse[images, :, queries].unsqueeze(3)
        ds = dp.sub_(delta).mul_(p)
        if bias is not None:
            dbias[images, :, keys] += ds.sum(dim=2)
        ds = ds.mul_(scale).to(q.dtype)
        tile_dq = torch.matmul(ds, tile_k)
        if qk_mask is not None:
            dqk_mask[images] += (tile_dq.to(wide) * q[images, :, queries]).sum(dim=2)
        dq[images, :, queries] = _times(tile_dq, qk_mask)
        wide_dk[images, :, keys] += torch.matmul(ds.transpose(2, 3), tile_q)
    if v_mask is not None:
        dv_mask += (wide_dv * _within(v, lengths)).sum(dim=2)
        wide_dv *= v_mask.unsqueeze(1)
    dk.copy_(wide_dk), dv.copy_(wide_dv)


def _sequences(cu_q, cu_k):
    """A function that takes the rows of queries of a tensor, and one that takes those of keys, of each sequence."""
    for queries, keys in zip(packed.each(cu_q), packed.each(cu_k)):
        yield (
            lambda t, rows=queries: None if t is None else t[:, :, rows],
            lambda t, rows=keys: None if t is None else t[:, :, rows],
        )


def _sequences_fwd(q, k, v, qk_mask, v_mask, bias, scale, scores, mean, key_mean, keep, cu_q, cu_k):
    """Of the sequences in one image, one behind the other."""
    H, wide = q.shape[1], accumulation_dtype(q.dtype)
    out, lse = heads_inside(q, q.shape[2], v.shape[3]).zero_(), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    scored = scores != "none"
    each = q.new_zeros((1, 1 if mean else H, k.shape[2]) if scored else (0,), dtype=wide)
    mean_k = k.new_zeros((1, 1, k.shape[2], k.shape[3]) if key_mean else (0,))
    for of_q, of_k in _sequences(cu_q, cu_k):
        options = scale, scores if of_q(q).shape[2] else "none", mean, key_mean
        given = (of_q(q), of_k(k), of_k(v), qk_mask, v_mask, of_k(bias), None, *options)
        one, received, one_lse, one_mean = masked_channel_attention_fwd(*given)
        of_q(out).copy_(one), of_q(lse).copy_(one_lse)
        if scored and received.numel():
            of_k(each).copy_(received.unsqueeze(1) if mean else received)
        if key_mean:
            of_k(mean_k).copy_(one_mean.unsqueeze(1))
    each, mean_k = each[:, 0] if scored and mean else each, mean_k[:, 0] if key_mean else mean_k
    return out, each, lse if keep else lse.new_empty(0), mean_k


def _sequences_bwd(
    dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, out, lse, scale, scores, mean, dq, dk, dv, cu_q, cu_k
):
    """Fills the gradients of q, k and v of the sequences in one image; gives those of masks and bias."""
    if dscores is not None and mean:
        dscores = dscores.unsqueeze(1)
    dq.zero_(), dk.zero_(), dv.zero_()
    wide = accumulation_dtype(q.dtype)
    of_masks = [q.new_zeros(0 if mask is None else mask.shape, dtype=wide) for mask in (qk_mask, v_mask)]
    dbias = q.new_empty(0) if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    for of_q, of_k in _sequences(cu_q, cu_k):
        if of_q(q).shape[2] == 0:
            continue
        given = of_k(dscores)
        given = (of_q(dout), given.squeeze(1) if given is not None and mean else given, of_q(dlse))
        given = (*given, of_q(q), of_k(k), of_k(v), qk_mask, v_mask, of_k(bias), None, of_q(out), of_q(lse))
        *made, dqk_mask, dv_mask, one = masked_channel_attention_bwd(*given, scale, scores, mean)
        for whole, part in zip((of_q(dq), of_k(dk), of_k(dv)), made):
            whole.copy_(part)
        for whole, part in zip(of_masks, (dqk_mask, dv_mask)):
            whole += part
        if bias is not None:
            of_k(dbias).copy_(one)
    of_masks = [q.new_empty(0) if m is None else of.to(m.dtype) for of, m in zip(of_masks, (qk_mask, v_mask))]
    return *of_masks, dbias
