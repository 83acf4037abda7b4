"""token_mlp on a GPU: one Triton kernel for the hidden activations, torch's products (cuBLAS) for all that is long.

The kernel multiplies with w1, whose rows are short, and applies the GELU, so that the hidden activations are written
once and what came before them never. Backward it writes them again, and turns their gradient into that of what the GELU
was applied to. So many images are taken together that a GPU's L2 holds their hidden activations.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import token_mlp_grouped
from ..token_mlp_grouped import each, groups
from . import launches
from .common import FUSION, cast, dot_options, for_any, index_type, rows, tile
from .launch import Launch, Layout, launch, planned

#: of the hidden activations that exist together: most of the 50 MB of L2 of an H100
HIDDEN_BYTES = 40 * 10**6
#: programs that fill a large GPU several times; sums follow from their number, so it does not depend on the device
PROGRAMS = 528
#: w1 is read so many columns at a time as the compiler knows a size to be a multiple of
COLUMNS = 16
#: one hidden row more of each would be b2's, but rows of w2 are to lie a multiple of 16 bytes apart
SPARE = 8


@triton.jit
def _tail(x, ACC: tl.constexpr, SHORT: tl.constexpr):
    """The normal distribution's tail beyond |x|, as one exponential: to 3e-7 (SHORT), which 16 bits do not hold, or to
    7.6e-9. libdevice's erf takes three times as many instructions, and a GELU more than its products."""
    x = tl.abs(x)
    if ACC == tl.float64:  # interpreted only
        return 0.5 * (1.0 - tl.erf(x * 0.7071067811865476))
    elif SHORT:
        p = -0.000518858579
        p = p * x + 0.00738720073
        p = p * x - 0.052538017
        p = p * x - 0.459276684
        p = p * x - 1.15108314
        return tl.exp2(p * x - 1.00000084)
    else:
        p = -2.77205092e-06
        p = p * x + 3.86207687e-05
        p = p * x - 0.000182547706
        p = p * x - 0.000145869879
        p = p * x + 0.00707547143
        p = p * x - 0.0525050284
        p = p * x - 0.459204907
        p = p * x - 1.15110572
        return tl.exp2(p * x - 0.999999978)


@for_any("M")
def token_mlp_kernel(
    z_ptr, w1_ptr, b1_ptr, hidden_ptr, gradient_ptr, db1_ptr,
    M, K, R, C, share,
    stride_zb, stride_zm, stride_zc, stride_w1r, stride_w1m, stride_b1, stride_hidden,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_B1: tl.constexpr, SPARE: tl.constexpr, BACKWARD: tl.constexpr, SHORT: tl.constexpr, ONE_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A share of the hidden rows of an image, at a tile of its channels. w1 has K columns, zeros behind the M."""
    tiles_c, shares = tl.cdiv(C, BLOCK_C), tl.maximum(tl.cdiv(R, share), 1)
    program = tl.program_id(0)
    c = (program % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (program // tiles_c) % shares * share
    b = (program // (tiles_c * shares)).to(tl.int64)
    z_ptr += b * stride_zb
    hidden_ptr += b * stride_hidden
    gradient_ptr += b * R * C
    db1_ptr += (b * tiles_c + program % tiles_c) * R

    if SPARE:
        behind = hidden_ptr + (R + tl.arange(0, SPARE)).to(INDEX)[:, None] * C + c[None, :]
        tl.store(behind, 1.0 / SPARE, mask=(first == 0) & (c < C)[None, :])
    m = tl.arange(0, BLOCK_M)
    z = rows(z_ptr, m, c, m < M, C, stride_zm, stride_zc, DOT, INDEX)
    for start in range(first, tl.minimum(first + share, R), BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        offsets = r.to(INDEX)[:, None] * C + c[None, :]
        inside = (r < R)[:, None] & (c < C)[None, :]
        if BACKWARD:  # comes while the product is made
            gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0)
        pre = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        if ONE_M:
            w1 = rows(w1_ptr, r, m, r < R, K, stride_w1r, stride_w1m, DOT, INDEX)
            pre = tl.dot(w1, z, pre, input_precision=PRECISION, out_dtype=ACC)
        else:
            for start_m in range(0, M, BLOCK_M):
                k = start_m + tl.arange(0, BLOCK_M)
                w1 = rows(w1_ptr, r, k, r < R, K, stride_w1r, stride_w1m, DOT, INDEX)
                z = rows(z_ptr, k, c, k < M, C, stride_zm, stride_zc, DOT, INDEX)
                pre = tl.dot(w1, z, pre, input_precision=PRECISION, out_dtype=ACC)
        if HAS_B1:
            pre += tl.load(b1_ptr + r.to(tl.int64) * stride_b1, mask=r < R, other=0.0).to(ACC)[:, None]

        tail = _tail(pre, ACC, SHORT)
        cdf = tl.where(pre < 0, tail, 1 - tail)
        tl.store(hidden_ptr + offsets, cast(pre * cdf, hidden_ptr.dtype.element_ty), mask=inside)
        if BACKWARD:
            slope = cdf + pre * tl.exp2(pre * pre * -0.7213475204444817 - 1.3257480647361595)  # the density
            dpre = gradient.to(ACC) * slope
            tl.store(gradient_ptr + offsets, cast(dpre, gradient_ptr.dtype.element_ty), mask=inside)
            tl.store(db1_ptr + r, tl.sum(dpre, axis=1), mask=r < R)


def _config(dtype, M, R, C, backward):
    wide = dtype.itemsize > 2
    one = M <= (32 if wide else 128)
    return {
        "BLOCK_M": tile(M, 16, 32 if wide else 128 if one else 64),
        "BLOCK_R": tile(R, 16, 32 if wide else 64),
        "BLOCK_C": tile(C, 16, 128 if one and not wide and not backward else 64),  # else 255 registers, and spills
        "num_warps": 4,
        "num_stages": 1 if one else 2,  # one tile of w1 a trip: other blocks hide its latency
        **FUSION,
    }


def _aligned(w1):
    """w1 with columns of zeros up to a multiple of COLUMNS."""
    lacking = -w1.shape[1] % COLUMNS
    return F.pad(w1, (0, lacking)) if lacking else w1


def _together(z, R):
    """How many images' hidden activations exist together, about as many each time."""
    B, _, C = z.shape
    times = max(math.ceil(B * R * C * z.itemsize / HIDDEN_BYTES), 1)
    return max(math.ceil(B / times), 1)


class _Hidden(NamedTuple):
    launch: Launch
    tiles_c: int  # that leave shares of b1's gradient


@planned
def _plan(z, w1, b1, hidden, images, spare, backward):
    """Of some of all the images."""
    (B, M, C), (R, K) = z.shape, w1.shape
    kernel, default = "token_mlp_bwd" if backward else "token_mlp_fwd", _config(z.dtype, M, R, C, backward)
    config = launches.overlaid(kernel, z.dtype, images, (M, R, C), default)
    tiles_r, tiles_c = triton.cdiv(R, config["BLOCK_R"]), triton.cdiv(C, config["BLOCK_C"])
    share = max(B * tiles_c * tiles_r // PROGRAMS, 1) * config["BLOCK_R"]
    constants = {
        **dot_options(z.dtype),
        "INDEX": index_type(z, Layout((1, R, K), (0, *w1.stride()), w1.dtype), hidden),
        "HAS_B1": b1 is not None,
        "SPARE": spare,
        "BACKWARD": backward,
        "SHORT": z.dtype.itemsize == 2,
        "ONE_M": M <= config["BLOCK_M"],
        **config,
    }
    strides = *z.stride(), *w1.stride(), 0 if b1 is None else b1.stride()[0], hidden.stride()[0]
    programs = B * tiles_c * max(triton.cdiv(R, share), 1)
    return _Hidden(Launch(programs, (M, K, R, C, share, *strides), constants), tiles_c)


def token_mlp_fwd(z, w1, b1, w2, b2):
    (B, _, C), (N, R) = z.shape, w2.shape
    together, w1 = _together(z, R), _aligned(w1)
    y, spare = z.new_empty(B, N, C), 0 if b2 is None else SPARE
    buffer = z.new_empty(min(B, together), R + spare, C)
    if spare:  # baddbmm would write b2 into y and read it again: columns of w2 instead, for hidden rows that sum to 1
        w2 = torch.cat((w2, b2.unsqueeze(1).expand(N, SPARE)), dim=1)
    for z_g, y_g in groups(together, z, y):
        hidden = buffer[: z_g.shape[0]]
        plan = _plan(z_g, w1, b1, hidden, B, spare, False)
        launch(token_mlp_kernel, plan.launch, (z_g, w1, w1 if b1 is None else b1, hidden, hidden, hidden))
        torch.bmm(each(w2, z_g), hidden, out=y_g)
    return y


def token_mlp_bwd(dy, z, w1, b1, w2):
    (B, M, _), R = z.shape, w1.shape[0]
    w1 = _aligned(w1)

    def activations(z_g, hidden, gradient):
        plan = _plan(z_g, w1, b1, hidden, B, 0, True)
        size = (z_g.shape[0] * plan.tiles_c, R)
        db1 = z.new_empty(size, dtype=torch.promote_types(z.dtype, torch.float32))
        launch(token_mlp_kernel, plan.launch, (z_g, w1, w1 if b1 is None else b1, hidden, gradient, db1))
        return db1.sum(dim=0)

    return token_mlp_grouped.token_mlp_bwd(dy, z, w1[:, :M], w2, _together(z, R), activations)
