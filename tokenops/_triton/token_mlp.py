"""token_mlp on Triton. The hidden activations h = gelu(w1 z + b1) live in registers, a tile at a time, in every kernel.

Forward: a program owns a tile of the result and walks over the hidden rows. Backward, three kernels: dz likewise; dw1
(with db1) and dw2 by programs that own a tile of the weights and walk over a share of the images, whose partial sums
are added afterwards, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import launches
from .common import FUSION, before_hopper, dot_options, index_type, tile


@triton.jit
def _tile(ptr, i, j, rows, columns, stride_i, stride_j, DOT: tl.constexpr, INDEX: tl.constexpr):
    """Rows i and columns j of a matrix, 0 outside it."""
    offsets = i.to(INDEX)[:, None] * stride_i + j.to(INDEX)[None, :] * stride_j
    return tl.load(ptr + offsets, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0).to(DOT)


@triton.jit
def _product(
    acc, a_ptr, b_ptr, b_tile, i, j, rows, K, columns, stride_ai, stride_ak, stride_bk, stride_bj,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    ONE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a[i, :] b[:, j]; where one tile covers the inner size (ONE), b's is given."""
    if ONE:
        k = tl.arange(0, BLOCK_K)
        a = _tile(a_ptr, i, k, rows, K, stride_ai, stride_ak, DOT, INDEX)
        acc = tl.dot(a, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = _tile(a_ptr, i, k, rows, K, stride_ai, stride_ak, DOT, INDEX)
            b = _tile(b_ptr, k, j, K, columns, stride_bk, stride_bj, DOT, INDEX)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _bias(b_ptr, i, size, stride, rows: tl.constexpr, columns: tl.constexpr, ACC: tl.constexpr, HAS: tl.constexpr):
    """What the sums of a tile start from: the bias of its rows, or 0."""
    acc = tl.zeros((rows, columns), ACC)
    if HAS:
        acc += tl.load(b_ptr + i.to(tl.int64) * stride, mask=i < size, other=0.0).to(ACC)[:, None]
    return acc


@triton.jit
def _gelu_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return _gelu_cdf(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit
def token_mlp_fwd_kernel(
    z_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr,
    M, R, N, C,
    stride_zb, stride_zm, stride_zc, stride_w1r, stride_w1m, stride_b1, stride_w2n, stride_w2r, stride_b2,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, ONE_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c, tiles_n = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    c = (program % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // tiles_c) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (program // (tiles_c * tiles_n)).to(tl.int64)
    z_ptr += b * stride_zb
    y_ptr += b * N * C

    z = _tile(z_ptr, tl.arange(0, BLOCK_M), c, M, C, stride_zm, stride_zc, DOT, INDEX)
    acc = _bias(b2_ptr, n, N, stride_b2, BLOCK_N, BLOCK_C, ACC, HAS_B2)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        pre = _bias(b1_ptr, r, R, stride_b1, BLOCK_R, BLOCK_C, ACC, HAS_B1)
        pre = _product(
            pre, w1_ptr, z_ptr, z, r, c, R, M, C, stride_w1r, stride_w1m, stride_zm, stride_zc,
            ACC, DOT, PRECISION, INDEX, ONE_M, BLOCK_M,
        )  # fmt: skip
        hidden = (pre * _gelu_cdf(pre)).to(DOT)
        w2 = _tile(w2_ptr, n, r, N, R, stride_w2n, stride_w2r, DOT, INDEX)
        acc = tl.dot(w2, hidden, acc, input_precision=PRECISION, out_dtype=ACC)
    offsets = n.to(INDEX)[:, None] * C + c[None, :]
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit
def token_mlp_bwd_z_kernel(
    dy_ptr, z_ptr, w1_ptr, b1_ptr, w2_ptr, dz_ptr,
    M, R, N, C,
    stride_dyb, stride_dyn, stride_dyc, stride_zb, stride_zm, stride_zc,
    stride_w1r, stride_w1m, stride_b1, stride_w2n, stride_w2r,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_B1: tl.constexpr, ONE_M: tl.constexpr, ONE_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c, tiles_m = tl.cdiv(C, BLOCK_C), tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    c = (program % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (program // tiles_c) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (program // (tiles_c * tiles_m)).to(tl.int64)
    dy_ptr += b * stride_dyb
    z_ptr += b * stride_zb
    dz_ptr += b * M * C

    z = _tile(z_ptr, tl.arange(0, BLOCK_M), c, M, C, stride_zm, stride_zc, DOT, INDEX)
    dy = _tile(dy_ptr, tl.arange(0, BLOCK_N), c, N, C, stride_dyn, stride_dyc, DOT, INDEX)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        pre = _bias(b1_ptr, r, R, stride_b1, BLOCK_R, BLOCK_C, ACC, HAS_B1)
        pre = _product(
            pre, w1_ptr, z_ptr, z, r, c, R, M, C, stride_w1r, stride_w1m, stride_zm, stride_zc,
            ACC, DOT, PRECISION, INDEX, ONE_M, BLOCK_M,
        )  # fmt: skip
        dhidden = _product(
            tl.zeros((BLOCK_R, BLOCK_C), ACC), w2_ptr, dy_ptr, dy, r, c, R, N, C,
            stride_w2r, stride_w2n, stride_dyn, stride_dyc,
            ACC, DOT, PRECISION, INDEX, ONE_N, BLOCK_N,
        )  # fmt: skip
        dpre = (dhidden * _gelu_slope(pre)).to(DOT)
        w1 = _tile(w1_ptr, m, r, M, R, stride_w1m, stride_w1r, DOT, INDEX)
        acc = tl.dot(w1, dpre, acc, input_precision=PRECISION, out_dtype=ACC)
    offsets = m.to(INDEX)[:, None] * C + c[None, :]
    tl.store(dz_ptr + offsets, acc.to(dz_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def token_mlp_bwd_weight_kernel(
    dy_ptr, z_ptr, w1_ptr, b1_ptr, w2_ptr, dweight_ptr, db1_ptr,
    B, M, R, N, C, share,
    stride_dyb, stride_dyn, stride_dyc, stride_zb, stride_zm, stride_zc,
    stride_w1r, stride_w1m, stride_b1, stride_w2n, stride_w2r,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    HAS_B1: tl.constexpr, ONE_M: tl.constexpr, ONE_N: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A share of dw1 and db1 (FIRST), or of dw2 transposed: sums over images and channels."""
    tiles_c, tiles_r = tl.cdiv(C, BLOCK_C), tl.cdiv(R, BLOCK_R)
    columns = M if FIRST else N
    BLOCK: tl.constexpr = BLOCK_M if FIRST else BLOCK_N
    program = tl.program_id(0)
    r = (program % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile_k = (program // tiles_r) % tl.cdiv(columns, BLOCK)
    k = tile_k * BLOCK + tl.arange(0, BLOCK)
    split = program // (tiles_r * tl.cdiv(columns, BLOCK))

    acc = tl.zeros((BLOCK_R, BLOCK), ACC)
    db1 = tl.zeros((BLOCK_R,), ACC)
    for item in range(split * share, tl.minimum((split + 1) * share, B * tiles_c)):
        b = tl.cast(item // tiles_c, tl.int64)
        c = (item % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        z_image, dy_image = z_ptr + b * stride_zb, dy_ptr + b * stride_dyb
        z = _tile(z_image, tl.arange(0, BLOCK_M), c, M, C, stride_zm, stride_zc, DOT, INDEX)
        pre = _bias(b1_ptr, r, R, stride_b1, BLOCK_R, BLOCK_C, ACC, HAS_B1)
        pre = _product(
            pre, w1_ptr, z_image, z, r, c, R, M, C, stride_w1r, stride_w1m, stride_zm, stride_zc,
            ACC, DOT, PRECISION, INDEX, ONE_M, BLOCK_M,
        )  # fmt: skip
        if FIRST:
            dy = _tile(dy_image, tl.arange(0, BLOCK_N), c, N, C, stride_dyn, stride_dyc, DOT, INDEX)
            dhidden = _product(
                tl.zeros((BLOCK_R, BLOCK_C), ACC), w2_ptr, dy_image, dy, r, c, R, N, C,
                stride_w2r, stride_w2n, stride_dyn, stride_dyc,
                ACC, DOT, PRECISION, INDEX, ONE_N, BLOCK_N,
            )  # fmt: skip
            left = dhidden * _gelu_slope(pre)
            db1 += tl.sum(left, axis=1)
            right = _tile(z_image, k, c, M, C, stride_zm, stride_zc, DOT, INDEX)
        else:
            left = pre * _gelu_cdf(pre)
            right = _tile(dy_image, k, c, N, C, stride_dyn, stride_dyc, DOT, INDEX)
        acc = tl.dot(left.to(DOT), tl.trans(right), acc, input_precision=PRECISION, out_dtype=ACC)
    offsets = (tl.cast(split, tl.int64) * R + r)[:, None] * columns + k[None, :]
    tl.store(dweight_ptr + offsets, acc, mask=(r < R)[:, None] & (k < columns)[None, :])
    if FIRST:
        if tile_k == 0:
            tl.store(db1_ptr + tl.cast(split, tl.int64) * R + r, db1, mask=r < R)


#: programs that fill a large GPU; the number of partial sums follows from it, so results do not depend on the device
PROGRAMS = 264


def _config(dtype, M, R, N, C, largest_n, stages):
    wide = dtype.itemsize > 2
    return {
        "BLOCK_M": tile(M, 16, 32 if wide else 128),
        "BLOCK_R": tile(R, 16, 16 if wide else 64),  # 32 x 32 takes half as many registers again as 16 x 64
        "BLOCK_N": tile(N, 16, 32 if wide else largest_n),
        "BLOCK_C": tile(C, 16, 64),
        "num_warps": 4 if wide else 8,
        "num_stages": stages,
        **FUSION,
    }


def _stride(bias):
    return 0 if bias is None else bias.stride(0)


def token_mlp_fwd(z, w1, b1, w2, b2):
    (B, M, C), R, N = z.shape, w1.shape[0], w2.shape[0]
    y = z.new_empty((B, N, C))
    # all of N in one tile: a second one would compute the hidden rows, half of the work, again
    default = _config(z.dtype, M, R, N, C, largest_n=256, stages=1 if before_hopper() or z.dtype.itemsize > 4 else 2)
    config = launches.overlaid("token_mlp_fwd", z.dtype, B, (M, R, N, C), default)
    grid = (B * triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(C, config["BLOCK_C"]),)
    if grid[0]:
        token_mlp_fwd_kernel[grid](
            z, w1, w1 if b1 is None else b1, w2, w2 if b2 is None else b2, y,
            M, R, N, C,
            *z.stride(), *w1.stride(), _stride(b1), *w2.stride(), _stride(b2),
            **dot_options(z.dtype), INDEX=index_type(z, w1[None], w2[None], y),
            HAS_B1=b1 is not None, HAS_B2=b2 is not None, ONE_M=M <= config["BLOCK_M"], **config,
        )  # fmt: skip
    return y


def token_mlp_bwd(dy, z, w1, b1, w2):
    (B, M, C), R, N = z.shape, w1.shape[0], w2.shape[0]
    dz = z.new_empty(z.shape)
    accumulator = torch.float64 if z.dtype == torch.float64 else torch.float32
    wide, old = z.dtype.itemsize > 2, before_hopper()
    tensors = (dy, z, w1, w1 if b1 is None else b1, w2)
    strides = (*dy.stride(), *z.stride(), *w1.stride(), _stride(b1), *w2.stride())
    common = {
        **dot_options(z.dtype),
        "INDEX": index_type(dy, z, w1[None], w2[None], dz),
        "HAS_B1": b1 is not None,
    }

    def ones(config):
        return {"ONE_M": M <= config["BLOCK_M"], "ONE_N": N <= config["BLOCK_N"]}

    default = _config(z.dtype, M, R, N, C, largest_n=64, stages=1 if wide else 2)
    config = launches.overlaid("token_mlp_bwd_z", z.dtype, B, (M, R, N, C), default)
    grid = (B * triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_C"]),)
    if grid[0]:
        token_mlp_bwd_z_kernel[grid](*tensors, dz, M, R, N, C, *strides, **common, **ones(config), **config)

    def weight(first):
        # fp32: a second stage takes 40 to 80 registers for dw1; without one dw2 spills to reach the next occupancy
        stages = 1 if (first if wide else old) else 2
        default = _config(z.dtype, M, R, N, C, largest_n=64 if first or old else 128, stages=stages)
        kernel = "token_mlp_bwd_w1" if first else "token_mlp_bwd_w2"
        config = launches.overlaid(kernel, z.dtype, B, (M, R, N, C), default)
        columns = M if first else N
        tiles = triton.cdiv(R, config["BLOCK_R"]) * triton.cdiv(columns, config["BLOCK_M" if first else "BLOCK_N"])
        items = B * triton.cdiv(C, config["BLOCK_C"])
        share = max(triton.cdiv(items, max(PROGRAMS // max(tiles, 1), 1)), 4)  # the partial sums stay small
        splits = max(triton.cdiv(items, share), 1)
        partial, db1 = z.new_empty((splits, R, columns), dtype=accumulator), z.new_empty((splits, R), dtype=accumulator)
        if tiles:
            token_mlp_bwd_weight_kernel[(tiles * splits,)](
                *tensors, partial, db1, B, M, R, N, C, share, *strides, **common, **ones(config), FIRST=first, **config
            )
        return partial.sum(dim=0), db1.sum(dim=0)

    dw1, db1 = weight(first=True)
    dw2, _ = weight(first=False)
    db2 = dy.sum(dim=(0, 2), dtype=accumulator)
    return dz, dw1.to(w1.dtype), db1.to(w1.dtype), dw2.t().to(w2.dtype).contiguous(), db2.to(w2.dtype)
