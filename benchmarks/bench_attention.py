"""masked_channel_attention: attention with scores, against SDPA without, SDPA with a class row, and the N x N way.

Every side reads q, k and v from one packed projection and gives the heads side by side, as a block does.
"""

import importlib.util
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from comparison import PASSES, nbytes
from tokenops import masked_channel_attention, reference


class Case(NamedTuple):
    name: str
    H: int
    N: int = 197
    DK: int = 64
    DV: int = 64
    scores: str | None = "class"
    extra: str | None = None  # "bias" (ToMe's log sizes) or "lengths" (a ragged batch)
    batch: str = "batch"
    main: bool = False

    def __str__(self):
        return self.name


CASES = (
    Case("deit-tiny", 3),
    Case("deit-small", 6, main=True),
    Case("deit-base", 12),
    Case("deit-small-99", 6, N=99),
    Case("deit-small-577", 6, N=577),
    Case("single", 6, batch="single"),
    Case("middle", 6, batch="middle"),
    Case("received", 6, scores="received"),
    Case("compact-40-52", 6, DK=40, DV=52),
    Case("compact-24-64", 6, DK=24, DV=64),
    Case("bias", 6, extra="bias"),
    Case("lengths", 6, extra="lengths"),
)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def heads(qkv, case):
    """q, k and v as views of the packed projection."""
    sizes = [case.H * d for d in (case.DK, case.DK, case.DV)]
    return [x.unflatten(2, (case.H, -1)).transpose(1, 2) for x in qkv.split(sizes, dim=2)]


def joined(out):
    return out.transpose(1, 2).flatten(2)


def extras(case, qkv):
    """Keyword arguments of the operator, and the mask that SDPA takes instead."""
    B, N = qkv.shape[:2]
    generator = torch.Generator().manual_seed(0)
    if case.extra == "bias":
        bias = torch.randint(1, 5, (B, 1, 1, N), generator=generator).log().to(qkv)
        return {"key_bias": bias}, bias
    if case.extra == "lengths":
        lengths = torch.randint(N // 3, N + 1, (B,), generator=generator).to(qkv.device)
        return {"key_lengths": lengths}, (torch.arange(N, device=qkv.device) < lengths[:, None])[:, None, None]
    return {}, None


def ours(qkv, case, given, attend=masked_channel_attention):
    out, scores = attend(*heads(qkv, case), scores=case.scores, **given)
    return joined(out), scores


def eager(qkv, case, mask):
    """As the papers' code has it: the matrix, of which the scores are a row or a mean."""
    q, k, v = heads(qkv, case)
    logits = (q * case.DK**-0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    p = logits.softmax(dim=-1)
    return joined(p @ v), p[:, :, 0] if case.scores == "class" else p.mean(dim=2)


def sdpa(qkv, case, mask, backend=None):
    """No scores."""
    q, k, v = heads(qkv, case)
    if backend is None:
        return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    with sdpa_kernel(backend):
        return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def sdpa_and_row(qkv, case, mask):
    """The class row beside SDPA: exact, four more operators."""
    q, k, v = heads(qkv, case)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    row = (q[:, :, :1] * case.DK**-0.5) @ k.transpose(-2, -1)
    if mask is not None:
        row = row.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else row + mask
    return joined(out), row.softmax(dim=-1).squeeze(2)


def sdpa_and_columns(qkv, case, colsum):
    """The column sums by flash-colreduce, beside SDPA."""
    q, k, v = heads(qkv, case)
    return joined(F.scaled_dot_product_attention(q, k, v)), colsum(q, k) / q.shape[2]


def flex(qkv, case, attend):
    q, k, v = heads(qkv, case)
    return joined(attend(q.contiguous(), k.contiguous(), v.contiguous()))


def runs(side, qkv):
    try:
        with torch.no_grad():
            side(qkv)
    except Exception:  # there are as many kinds as there are compilers
        return False
    return True


def peers_of(bench, case, qkv, mask, passes):
    peers = {"eager": partial(eager, case=case, mask=mask)}
    for name, backend in BACKENDS.items():
        side = partial(sdpa, case=case, mask=mask, backend=backend)
        if runs(side, qkv):
            peers[f"sdpa {name}"] = side
    if case.scores == "class":
        peers["sdpa + row"] = partial(sdpa_and_row, case=case, mask=mask)
    if bench.wants_compiled(case.main):
        peers["eager compiled"] = torch.compile(peers["eager"], dynamic=False, fullgraph=True)
        if bench.device == "cuda" or passes == "forward":
            from torch.nn.attention.flex_attention import flex_attention

            side = partial(flex, case=case, attend=torch.compile(flex_attention, dynamic=False))
            if runs(side, qkv):
                peers["flex"] = side
    if bench.device == "cuda" and case.scores == "received" and importlib.util.find_spec("flash_colreduce"):
        from flash_colreduce import flash_colsum

        peers["sdpa + colreduce"] = partial(sdpa_and_columns, case=case, colsum=flash_colsum)
    return peers


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(bench, compare, case, passes):
    B, N = bench.batch(case.batch), 24 if bench.quick else case.N
    width = case.H * (2 * case.DK + case.DV)

    def inputs():
        return (bench.random(B, N, width),)

    (qkv,) = inputs()
    given, mask = extras(case, qkv)
    out = qkv.new_empty(B, N, case.H * case.DV)
    scores = nbytes(qkv.new_empty(B, case.H, N, dtype=torch.float32))
    forward, backward = nbytes(qkv, out) + scores, nbytes(qkv, qkv, out, out)  # backward reads qkv, out, dout
    flops = 2 * B * case.H * N * N * (case.DK + case.DV)
    again = 2 * B * case.H * N * N * (3 * case.DK + 2 * case.DV)
    shape = dict(B=B, N=N, H=case.H, Dk=case.DK, Dv=case.DV)
    compare(
        " ".join(["attention", case.scores or "", case.extra or ""]).strip(),
        passes=passes,
        shape=shape,
        inputs=inputs,
        ours=partial(ours, case=case, given=given),
        peers=peers_of(bench, case, qkv, mask, passes),
        bytes=forward + (backward if passes != "forward" else 0),
        flops=flops + (again if passes != "forward" else 0),
        truth=partial(ours, case=case, given=given, attend=reference.masked_channel_attention),
        errors=True,
    )


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("compact")], ids=str)
def test_compact_heads(bench, compare, case, passes):
    """Heads of fewer channels against the whole ones: are the operations that pruning saves saved in time?"""
    B, N = bench.batch(), 24 if bench.quick else case.N
    whole = case._replace(DK=64, DV=64)

    def inputs():
        return tuple(bench.random(B, N, c.H * (2 * c.DK + c.DV)) for c in (case, whole))

    qkv, _ = inputs()
    out = qkv.new_empty(B, N, case.H * case.DV)

    def flops(c):
        again = 3 * c.DK + 2 * c.DV if passes != "forward" else 0
        return 2 * B * c.H * N * N * (c.DK + c.DV + again)

    compare(
        "attention, compact heads",
        passes=passes,
        shape=dict(B=B, N=N, H=case.H, Dk=case.DK, Dv=case.DV),
        inputs=inputs,
        ours=lambda qkv, dense: joined(masked_channel_attention(*heads(qkv, case))),
        peers={"heads of 64": lambda qkv, dense: joined(masked_channel_attention(*heads(dense, whole)))},
        truth=lambda qkv, dense: joined(reference.masked_channel_attention(*heads(qkv, case))),
        peer_flops={"heads of 64": flops(whole)},
        bytes=nbytes(qkv, out) + (nbytes(qkv, qkv, out, out) if passes != "forward" else 0),
        flops=flops(case),
    )
