"""What the tests of masked_channel_attention share: inputs, and a run that names everything it gets."""

import math
from contextlib import contextmanager

import pytest
import torch

import tokenops
from support.compiled import ABSENT
from support.runs import double
from support.tolerance import assert_as_good_as_plain
from tokenops import reference
from tokenops.ops import native

INF = float("inf")
FLOATS = ("q", "k", "v", "qk_mask", "v_mask", "key_bias")
SCORES = [(None, "each"), ("class", "each"), ("class", "mean"), ("received", "each"), ("received", "mean")]
EVERYTHING = dict(return_lse=True, return_key_mean=True)
attention = tokenops.masked_channel_attention


def inputs(case, dtype, device, everything=False):
    """q, k and v, and, with everything, soft masks, bias (a key left out) and lengths (an empty and a full image)."""
    B, H, M, N, DK, DV, _ = case
    tensors = dict(
        q=torch.randn(B, H, M, DK, device=device),
        k=torch.randn(B, H, N, DK, device=device),
        v=torch.randn(B, H, N, DV, device=device),
    )
    if everything:
        bias = torch.randn(B, 1, 1, N, device=device)
        bias[..., : N // 5] = -INF
        tensors |= dict(
            qk_mask=torch.rand(H, DK, device=device), v_mask=torch.rand(H, DV, device=device), key_bias=bias
        )
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if everything:
        lengths = [0, N, (2 * N + 2) // 3] if B > 2 else [(2 * N + 2) // 3, N]
        tensors["key_lengths"] = torch.tensor(lengths[:B], dtype=torch.int64, device=device)
    return tensors


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def packed_inputs(lengths, dtype, device, of_keys=None, slack=0, H=2, DK=8, DV=8, everything=False):
    """q, k and v of sequences one behind the other, of one projection where they are as many; slack rows are NaN."""
    T, N = sum(lengths) + slack, sum(of_keys or lengths) + slack
    if DK == DV and of_keys is None:
        q, k, v = torch.randn(T, 3, H, DK, device=device).unbind(1)
    else:
        q, k, v = (torch.randn(n, H, D, device=device) for n, D in ((T, DK), (N, DK), (N, DV)))
    tensors = {"q": q, "k": k, "v": v}
    if everything:
        tensors |= {"qk_mask": torch.rand(H, DK, device=device), "v_mask": torch.rand(H, DV, device=device)}
        bias = torch.randn(H, N, device=device)
        bias[:, ::5] = -INF
        tensors["key_bias"] = bias
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    for name in ("q", "k", "v", "key_bias"):
        if slack and name in tensors:
            tensors[name].narrow(tensors[name].dim() - 1 if name == "key_bias" else 0, -slack, slack).fill_(math.nan)
    tensors |= {"cu_seqlens": boundaries(lengths, device), "max_seqlen": max(lengths, default=0)}
    if of_keys is not None:
        tensors |= {"cu_seqlens_k": boundaries(of_keys, device), "max_seqlen_k": max(of_keys)}
    return tensors


def run(function, tensors, upstream=None, **options):
    """Every result and every gradient, by name; the upstream gradients are those of `upstream`'s results, or random."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_() if name in FLOATS else t
        for name, t in tensors.items()
    }
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    gradients = [torch.randn_like(r, dtype=torch.float32) for r in results] if upstream is None else upstream
    wanted = [leaf for name, leaf in leaves.items() if name in FLOATS]
    # the log-sum-exp of a query without keys is -inf and constant
    outputs = [torch.where(r == -INF, 0.0, r) for r in results]
    grads = torch.autograd.grad(outputs, wanted, [g.to(r.dtype) for g, r in zip(gradients, results)], allow_unused=True)
    named = {f"result {i}": r.detach() for i, r in enumerate(results)}
    return named | {f"d{n}": g for n, g in zip((n for n in leaves if n in FLOATS), grads)}, gradients


def check(case, dtype, device, scores, heads, everything=False, draws=4):
    """Every result and gradient is as good as plain PyTorch's, over several draws of fp32 inputs together.

    The largest of a few roundings is luck: of one draw alone ours were 0.5 to 5.6 times plain PyTorch's.
    """
    as_good_as_plain(lambda: inputs(case, dtype, device, everything), dtype, scores, heads, draws)


def as_good_as_plain(draw, dtype, scores, heads, draws=4):
    """The same of inputs drawn by a function."""
    found = [compared(draw(), scores, heads) for _ in range(draws if dtype == torch.float32 else 1)]
    for what in found[0]:
        ours, plain, truth, allowed = zip(*(draw[what] for draw in found), strict=True)
        assert_as_good_as_plain(torch.stack(ours), torch.stack(plain), torch.stack(truth), what, max(allowed))


def specified(**arguments):
    """The reference, of packed sequences too."""
    if "cu_seqlens" not in arguments:
        return reference.masked_channel_attention(**arguments)
    with tokenops.use_backend("reference"):
        return attention(**arguments)


def compared(t, scores, heads):
    """By name: ours, plain PyTorch's, the truth, and the size of what cancels."""
    found = {}
    truth, upstream = run(specified, double(t), scores=scores, heads=heads, **EVERYTHING)
    ours, _ = run(attention, t, upstream, scores=scores, heads=heads, **EVERYTHING)
    plain, _ = run(specified, t, upstream, scores=scores, heads=heads, **EVERYTHING)
    # what cancels in dS = P * (dP - D), D = sum of dO * O, where O is rounded; a score is no larger
    cancels = (upstream[0].double() * truth["result 0"]).abs().sum(dim=-1).max().item() if truth["dq"].numel() else 0.0
    size = {"dq": "k", "dk": "q", "dqk_mask": "q"}
    for what, right in truth.items():
        if right is None:
            continue
        empty = right == -INF
        assert torch.equal(ours[what] == -INF, empty), what
        reach = t[size[what]].nan_to_num().abs().max().item() if what in size and t[size[what]].numel() else 1.0
        allowed = cancels * reach if what in ("dq", "dk", "dqk_mask", "dkey_bias") else 0.0
        found[what] = (*(value.masked_fill(empty, 0.0) for value in (ours[what], plain[what], right)), allowed)
    return found


@contextmanager
def limited(isa, dtype):
    """In the block attention of a dtype runs on a CPU by this instruction set; skips where there is no such."""
    if ABSENT is not None:
        pytest.skip(ABSENT)
    with native.limit_cpu_isa(isa):
        if native.attention_isa(dtype) != isa:
            pytest.skip(f"{isa} in {dtype} is not for this machine")
        with tokenops.use_backend("native"):
            yield
