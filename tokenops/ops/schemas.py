"""Every schema and every fake: what torch knows of our operators without running them.

An operator has one overload a backend (`tokenops::soft_aggregate_fwd.triton`), so a trace, a profile and a test can all
see which kernel ran. Implementations are imported on their first call; compiled ones register themselves from C++.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import vmap
from .backends import COMPILED_ON_CPU, COMPOSED, TABLE
from .reference import accumulation_dtype, heads_of

_SCHEMAS = {
    # packed sequences are the rows of one image
    "soft_aggregate_fwd": "(Tensor x, Tensor w, Tensor? scale, float factor, Tensor? mask, SymInt prefix,"
    " Tensor? cu_seqlens=None, SymInt max_seqlen=0) -> (Tensor y, Tensor saved)",
    "soft_aggregate_bwd": "(Tensor dy, Tensor x, Tensor w, Tensor? scale, float factor, Tensor? mask, Tensor? y,"
    " Tensor saved, SymInt prefix, Tensor? cu_seqlens=None, SymInt max_seqlen=0)"
    " -> (Tensor dx, Tensor dw, Tensor dscale)",
    "token_mlp_fwd": "(Tensor z, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2) -> Tensor",
    "token_mlp_bwd": "(Tensor dy, Tensor z, Tensor w1, Tensor? b1, Tensor w2)"
    " -> (Tensor dz, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    # without k and v, q is all three side by side, of so many heads with so many channels of q; lse is empty or kept;
    # with boundaries there is one image, whose rows are sequences
    "masked_channel_attention_fwd": "(Tensor q, Tensor? k, Tensor? v, Tensor? qk_mask, Tensor? v_mask, Tensor? bias,"
    " Tensor? lengths, float scale, str scores, bool mean, bool key_mean, SymInt heads=0, SymInt channels=0,"
    " bool keep=True, Tensor? cu_q=None, Tensor? cu_k=None, SymInt max_q=0, SymInt max_k=0)"
    " -> (Tensor out, Tensor scores, Tensor lse, Tensor key_mean)",
    "masked_channel_attention_bwd": "(Tensor dout, Tensor? dscores, Tensor? dlse, Tensor q, Tensor? k, Tensor? v,"
    " Tensor? qk_mask, Tensor? v_mask, Tensor? bias, Tensor? lengths, Tensor out, Tensor lse, float scale, str scores,"
    " bool mean, SymInt heads=0, SymInt channels=0, Tensor? cu_q=None, Tensor? cu_k=None, SymInt max_q=0,"
    " SymInt max_k=0)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dqk_mask, Tensor dv_mask, Tensor dbias)",
    "select_tokens_fwd": "(Tensor x, Tensor scores, SymInt k, Tensor? counts, Tensor[] companions, Tensor? weight,"
    " Tensor? bias, SymInt prefix, str rest, bool best_first, bool norm, float eps)"
    " -> (Tensor tokens, Tensor index, Tensor normed, Tensor statistics, Tensor fused, Tensor[] companions)",
    "select_tokens_bwd": "(Tensor dtokens, Tensor[] dcompanions, Tensor index, Tensor scores, Tensor? counts,"
    " Tensor? x, Tensor? fused, SymInt prefix, str rest) -> (Tensor dx, Tensor dscores, Tensor[] dcompanions)",
    "restore_tokens_fwd": "(Tensor base, Tensor tokens, Tensor index, SymInt prefix, Tensor[] olds, Tensor[] news)"
    " -> (Tensor y, Tensor[] companions)",
    "restore_tokens_bwd": "(Tensor dy, Tensor index, SymInt prefix, SymInt carried, Tensor[] dcompanions)"
    " -> (Tensor dbase, Tensor dtokens, Tensor[] dolds, Tensor[] dnews)",
    "merge_neighbours_fwd": "(Tensor x, Tensor? first, Tensor? second, Tensor? logits, Tensor? sizes, Tensor? weight,"
    " Tensor? bias, SymInt height, SymInt width, bool vertical, SymInt prefix, float alpha, float beta, bool norm,"
    " float eps) -> (Tensor y, Tensor sizes, Tensor normed, Tensor statistics)",
    "merge_neighbours_bwd": "(Tensor dy, Tensor? x, Tensor? first, Tensor? second, Tensor? logits, Tensor? sizes,"
    " SymInt height, SymInt width, bool vertical, SymInt prefix, float alpha, float beta)"
    " -> (Tensor dx, Tensor dfirst, Tensor dsecond, Tensor dlogits)",
    "match_bipartite_fwd": "(Tensor metric, SymInt r, SymInt prefix) -> Tensor",
    "match_packed_fwd": "(Tensor metric, Tensor cu_seqlens, SymInt max_seqlen, SymInt prefix)"
    " -> (Tensor best, Tensor target)",
    "match_packed_places": "(Tensor best, Tensor target, Tensor counts, Tensor cu_seqlens, SymInt prefix) -> Tensor",
    "merge_bipartite_fwd": "(Tensor x, Tensor index, SymInt tokens, Tensor? sizes, Tensor? weight, Tensor? bias,"
    " SymInt prefix, bool norm, float eps)"
    " -> (Tensor y, Tensor sizes, Tensor log_sizes, Tensor normed, Tensor statistics)",
    "merge_bipartite_matched": "(Tensor x, Tensor metric, SymInt r, Tensor? sizes, Tensor? weight, Tensor? bias,"
    " SymInt prefix, bool norm, float eps)"
    " -> (Tensor y, Tensor index, Tensor sizes, Tensor log_sizes, Tensor normed, Tensor statistics)",
    "merge_bipartite_bwd": "(Tensor dy, Tensor index, Tensor? sizes, Tensor merged, SymInt prefix) -> Tensor",
    "unmerge_bipartite_fwd": "(Tensor y, Tensor index, SymInt prefix) -> Tensor",
    "unmerge_bipartite_bwd": "(Tensor dx, Tensor index, SymInt tokens, SymInt prefix) -> Tensor",
    # order has the rows by where they go, and offsets where those of each of `rows` begin in it, at most `most` of them
    "sum_rows_fwd": "(Tensor x, Tensor dest, SymInt rows, Tensor? weight, Tensor order, Tensor offsets, SymInt most,"
    " Tensor? factor, Tensor? bias, bool mean, bool norm, float eps)"
    " -> (Tensor y, Tensor totals, Tensor normed, Tensor statistics)",
    "sum_rows_bwd": "(Tensor dy, Tensor dest, Tensor? weight, Tensor? totals, Tensor? x) -> (Tensor dx, Tensor dots)",
}


def _wide(x, w):
    return accumulation_dtype(torch.promote_types(x.dtype, w.dtype))


def _slim(x, w, prefix, cu_seqlens):
    """New slim tokens."""
    images = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((images, prefix + w.shape[2], x.shape[2]))


def _soft_aggregate_fwd(x, w, scale, factor, mask, prefix, cu_seqlens=None, max_seqlen=0):
    y = _slim(x, w, prefix, cu_seqlens)
    # of each slot the largest scaled logit (times log2(e)), the inverse sum and the mean logit
    return y, x.new_empty((3, y.shape[0], w.shape[2]), dtype=_wide(x, w))


def tokens_last(w):
    """Whether the logits (B,N,M) lie in memory as (B,M,N): the CPU path follows memory."""
    return w.stride(1) == 1 and w.stride(2) != 1 and w.shape[2] != 1


def like_logits(w, dtype):
    """A new (B,N,M) tensor in the order that w has in memory."""
    B, N, M = w.shape
    return (
        w.new_empty((B, M, N), dtype=dtype).transpose(1, 2) if tokens_last(w) else w.new_empty((B, N, M), dtype=dtype)
    )


def _soft_aggregate_fwd_native(x, w, scale, factor, mask, prefix, cu_seqlens=None, max_seqlen=0):
    return _slim(x, w, prefix, cu_seqlens), like_logits(w, x.dtype)  # y and the weights


def _soft_aggregate_bwd(dy, x, w, scale, factor, mask, y, saved, prefix, cu_seqlens=None, max_seqlen=0):
    return x.new_empty(x.shape), torch.empty_like(w), x.new_empty((0,) if scale is None else (), dtype=_wide(x, w))


def _soft_aggregate_bwd_native(dy, x, w, scale, factor, mask, y, saved, prefix, cu_seqlens=None, max_seqlen=0):
    dx, _, dscale = _soft_aggregate_bwd(dy, x, w, scale, factor, mask, y, saved, prefix)
    return dx, like_logits(w, w.dtype), dscale


def _token_mlp_fwd(z, w1, b1, w2, b2):
    return z.new_empty((z.shape[0], w2.shape[0], z.shape[2]))


def _token_mlp_bwd(dy, z, w1, b1, w2):
    hidden, tokens = w1.shape[0], w2.shape[0]
    return (
        z.new_empty(z.shape),
        w1.new_empty(w1.shape),
        w1.new_empty((hidden,)),
        w2.new_empty(w2.shape),
        w2.new_empty((tokens,)),
    )


def heads_inside(like, N, D):
    """A new (B,H,N,D) tensor that lies in memory as (B,N,H,D): its heads are put side by side without a copy."""
    B, H = like.shape[:2]
    return like.new_empty_strided((B, H, N, D), (N * H * D, D, H * D, 1))


def parts_of(q, k, v, heads, channels):
    """q, k and v, which may be side by side in q."""
    return heads_of(q, heads, channels) if k is None else (q, k, v)


def _masked_channel_attention_fwd(
    q, k, v, qk_mask, v_mask, bias, lengths, scale, scores, mean, key_mean, heads=0, channels=0, keep=True, cu_q=None,
    cu_k=None, max_q=0, max_k=0,
):  # fmt: skip
    q, k, v = parts_of(q, k, v, heads, channels)
    (B, H, M, _), (N, D) = q.shape, k.shape[2:]
    wide = accumulation_dtype(q.dtype)
    return (
        heads_inside(q, M, v.shape[3]),
        q.new_empty((0,) if scores == "none" else (B, N) if mean else (B, H, N), dtype=wide),
        q.new_empty((B, H, M) if keep else (0,), dtype=wide),
        k.new_empty((B, N, D) if key_mean else (0,)),
    )


def attention_gradients(q, k, v):
    """New ones of q, k and v; of those side by side one tensor, and two that are empty."""
    if k is None:
        return q.new_empty(q.shape), q.new_empty((0,)), q.new_empty((0,))
    return tuple(heads_inside(t, *t.shape[2:]) for t in (q, k, v))


def _masked_channel_attention_bwd(
    dout, dscores, dlse, q, k, v, qk_mask, v_mask, bias, lengths, out, lse, scale, scores, mean, heads=0, channels=0,
    cu_q=None, cu_k=None, max_q=0, max_k=0,
):  # fmt: skip
    return (
        *attention_gradients(q, k, v),
        *(q.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (qk_mask, v_mask, bias)),
    )


def _select_tokens_fwd(x, scores, k, counts, companions, weight, bias, prefix, rest, best_first, norm, eps):
    (B, _, C), wide = x.shape, accumulation_dtype(x.dtype)
    rows = prefix + k + int(rest != "none")
    return (
        x.new_empty((B, rows, C)),
        scores.new_empty((B, k), dtype=torch.int64),
        x.new_empty((B, rows, C) if norm else (0,)),
        x.new_empty((2, B, rows) if norm else (0,), dtype=wide),  # mean and inverse standard deviation
        # what a normalized rest's gradient needs: the sum of the weights, and the token before it was rounded
        x.new_empty((B, 1 + C) if rest == "normalized" else (0,), dtype=wide),
        [c.new_empty((B, k)) for c in companions],
    )


def _select_tokens_bwd(dtokens, dcompanions, index, scores, counts, x, fused, prefix, rest):
    B, N = scores.shape
    weighted = rest in ("weighted", "normalized")
    return (
        dtokens.new_empty((B, prefix + N, dtokens.shape[2])),
        scores.new_empty((B, N) if weighted else (0,)),
        [d.new_empty((B, N)) for d in dcompanions],
    )


def _restore_tokens_fwd(base, tokens, index, prefix, olds, news):
    return base.new_empty(base.shape), [old.new_empty(old.shape) for old in olds]


def _restore_tokens_bwd(dy, index, prefix, carried, dcompanions):
    B, k = index.shape
    return (
        dy.new_empty(dy.shape),
        dy.new_empty((B, carried + k, dy.shape[2])),
        [d.new_empty(d.shape) for d in dcompanions],
        [d.new_empty((B, k)) for d in dcompanions],
    )


def merged_tokens(height, width, vertical):
    """M, how many tokens of a grid are left."""
    return (height + 1) // 2 * width if vertical else height * ((width + 1) // 2)


def _merge_neighbours_fwd(
    x, first, second, logits, sizes, weight, bias, height, width, vertical, prefix, alpha, beta, norm, eps
):
    (B, _, C), M = x.shape, merged_tokens(height, width, vertical)
    return (
        x.new_empty((B, prefix + M, C)),
        x.new_empty((0,)) if sizes is None else sizes.new_empty((B, M)),
        x.new_empty((B, prefix + M, C) if norm else (0,)),
        # mean and inverse standard deviation
        x.new_empty((2, B, prefix + M) if norm else (0,), dtype=accumulation_dtype(x.dtype)),
    )


def _merge_neighbours_bwd(dy, x, first, second, logits, sizes, height, width, vertical, prefix, alpha, beta):
    def gradient(t):
        return dy.new_empty((0,)) if x is None or t is None else t.new_empty(t.shape)

    dx = dy.new_empty((dy.shape[0], prefix + height * width, dy.shape[2]))
    return dx, gradient(first), gradient(second), gradient(logits)


def _match_bipartite_fwd(metric, r, prefix):
    return metric.new_empty((metric.shape[0], metric.shape[1] - prefix), dtype=torch.int64)


def _match_packed_fwd(metric, cu_seqlens, max_seqlen, prefix):
    rows = metric.shape[:1]
    return metric.new_empty(rows, dtype=accumulation_dtype(metric.dtype)), metric.new_empty(rows, dtype=torch.int64)


def _match_packed_places(best, target, counts, cu_seqlens, prefix):
    return target.new_empty(target.shape)


def _merge_bipartite_fwd(x, index, tokens, sizes, weight, bias, prefix, norm, eps):
    (B, _, C), wide = x.shape, accumulation_dtype(x.dtype)
    rows = prefix + tokens
    return (
        x.new_empty((B, rows, C)),
        x.new_empty((B, rows), dtype=wide),
        x.new_empty((B, rows), dtype=wide),
        x.new_empty((B, rows, C) if norm else (0,)),
        x.new_empty((2, B, rows) if norm else (0,), dtype=wide),  # mean and inverse standard deviation
    )


def _merge_bipartite_matched(x, metric, r, sizes, weight, bias, prefix, norm, eps):
    index = _match_bipartite_fwd(metric, r, prefix)
    y, *others = _merge_bipartite_fwd(x, index, index.shape[1] - r, sizes, weight, bias, prefix, norm, eps)
    return y, index, *others


def _merge_bipartite_bwd(dy, index, sizes, merged, prefix):
    return _unmerge_bipartite_fwd(dy, index, prefix)


def _unmerge_bipartite_fwd(y, index, prefix):
    return y.new_empty((y.shape[0], prefix + index.shape[1], y.shape[2]))


def _unmerge_bipartite_bwd(dx, index, tokens, prefix):
    return dx.new_empty((dx.shape[0], prefix + tokens, dx.shape[2]))


def _sum_rows_fwd(x, dest, rows, weight, order, offsets, most, factor, bias, mean, norm, eps):
    C, wide = x.shape[1], accumulation_dtype(x.dtype)
    return (
        x.new_empty((rows, C)),
        x.new_empty((rows,), dtype=wide),
        x.new_empty((rows, C) if norm else (0,)),
        x.new_empty((2, rows) if norm else (0,), dtype=wide),  # mean and inverse standard deviation
    )


def _sum_rows_bwd(dy, dest, weight, totals, x):
    rows, wide = dest.shape[0], accumulation_dtype(dy.dtype)
    return dy.new_empty((rows, dy.shape[1])), dy.new_empty((0 if x is None else rows,), dtype=wide)


#: where an implementation is not in the file of its operator's name
MODULES = {
    ("triton", "masked_channel_attention_bwd"): "masked_channel_attention_bwd",
    ("triton", "unmerge_bipartite_fwd"): "merge_bipartite",
    ("triton", "unmerge_bipartite_bwd"): "merge_bipartite",
}

_library = torch.library.Library("tokenops", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _late(module: str, name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """An implementation that is imported when it is first called (importing triton takes most of a second).

    The tensors' dtypes decide, so autocast is kept out of what it is composed of; the tensors' GPU is made the current
    one, which is where Triton launches.
    """

    implementation = None

    def call(*args):
        nonlocal implementation
        if implementation is None:
            implementation = getattr(importlib.import_module(module, __package__), name)
        first = args[0]
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return call(*args)
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return implementation(*args)
        return implementation(*args)

    return call


def _overloads() -> list[tuple[str, str]]:
    """(name, backend) of all there are."""
    found = [(name, backend) for name in _SCHEMAS for backend in ("native", "triton")]
    return found + [(name, "composed") for name in _SCHEMAS if name.rpartition("_")[0] in COMPOSED]


def _register() -> None:
    for name, schema in _SCHEMAS.items():
        for backend in [of for other, of in _overloads() if other == name]:
            overload, op = f"{name}.{backend}", name.rpartition("_")[0]
            _library.define(overload + schema, tags=_TAGS)
            torch.library.register_fake(
                f"tokenops::{overload}", globals().get(f"_{name}_{backend}", globals()[f"_{name}"]), lib=_library
            )
            for device, backends in TABLE[op].items():
                composed = backend == "composed" and device == "cpu"
                if composed or backend in backends and not (backend == "native" and op in COMPILED_ON_CPU):
                    room = "triton" if backend == "triton" else device
                    module = f".{room}.{MODULES.get((room, name), op)}"
                    _library.impl(overload, _late(module, name), device.upper())
            batched = vmap.rule(name, backend, getattr(getattr(torch.ops.tokenops, name), backend))
            torch.library.register_vmap(f"tokenops::{overload}", batched, lib=_library)


_register()

# Parts of the CPU path, compiled, called below autograd only.
_library.define("token_mlp_tiles_fwd(Tensor z, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2) -> Tensor", tags=_TAGS)
_library.define(
    "token_mlp_tiles_bwd(Tensor dy, Tensor z, Tensor w1, Tensor? b1, Tensor w2)"
    " -> (Tensor dz, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    tags=_TAGS,
)


def kernel(name: str, backend: str) -> Any:
    """The registered operator `name` on `backend`: kernel("soft_aggregate_fwd", "triton")."""
    return KERNELS[name, backend]


KERNELS: dict[tuple[str, str], Any] = {
    (name, backend): getattr(getattr(torch.ops.tokenops, name), backend) for name, backend in _overloads()
}
