"""The specification: every operator in plain PyTorch, in the order of the public surface.

These functions define what is right. They work in any dtype (fp64 for gradient checks), on any device, contain
standard ATen operators only (so a model traced through them exports), and are what every kernel is tested against.
They check nothing: the public functions do that.

Notation: B images, P prefix tokens (class, distillation), N tokens, M slim tokens, C channels, R hidden width; H heads,
Nq queries, Nk keys, Dk and Dv channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics and sums are kept in fp32, in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def soft_aggregate(
    x: Tensor, w: Tensor, *, scale: Tensor | float | None = None, mask: Tensor | None = None, prefix: int = 0
) -> Tensor:
    """y = [x[:, :P], A^T x[:, P:]], (B,P+M,C): SiT's token slimming (TSM), class token carried along."""
    a = aggregation_weights(w.to(accumulation_dtype(torch.promote_types(x.dtype, w.dtype))), scale, mask).to(x.dtype)
    tokens = x[:, prefix:]
    if mask is not None:
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
    return torch.cat((x[:, :prefix], torch.bmm(a.transpose(1, 2), tokens)), dim=1)


def soft_scatter(z: Tensor, w: Tensor, *, scale: Tensor | float | None = None) -> Tensor:
    """y = A z, (B,N,C), A = softmax over the M slim tokens (dim 2) of scale * w: each token mixes slim tokens."""
    return soft_aggregate(z, w.transpose(1, 2), scale=scale)


def token_mlp(z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """y = w2 gelu(w1 z + b1) + b2 along the tokens, (B,N,C): the token MLP of SiT's RTSM, exact (erf) GELU."""
    hidden = F.gelu(F.linear(z.transpose(1, 2), w1, b1))
    return F.linear(hidden, w2, b2).transpose(1, 2)


def restore_tokens(base: Tensor, tokens: Tensor, index: Tensor, *, prefix: int = 1) -> Tensor:
    """y = base with row P + index[b, j] of image b replaced by its token j, (B,P+N,C).

    tokens holds k rows, or P + k of which the first P replace the prefix. An index outside 0..N-1 replaces nothing.
    """
    rows = base.shape[1]
    carried = tokens.shape[1] - index.shape[1]
    target = torch.where((index >= 0) & (index < rows - prefix), index + prefix, rows)
    spare = torch.cat((base, base[:, :1]), dim=1) if rows else base.new_empty(base.shape[0], 1, base.shape[2])
    y = spare.scatter(1, target.unsqueeze(-1).expand(-1, -1, base.shape[2]), tokens[:, carried:])[:, :rows]
    return torch.cat((tokens[:, :carried], y[:, carried:]), dim=1) if carried else y


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
        k = k.masked_fill(~valid.transpose(2, 3), 0.0)
    logits = torch.matmul(q, k.transpose(2, 3)).to(accumulation_dtype(q.dtype))
    logits = logits * (q.shape[3] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        valid = valid & (key_bias != float("-inf"))
        logits = logits + key_bias.to(logits.dtype).masked_fill(~valid, 0.0)
    valid = valid.expand_as(logits)
    return logits.masked_fill(~valid, 0.0), valid


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
