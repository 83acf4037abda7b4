"""merge_neighbours on Triton: a program makes BLOCK_N rows of one image's result out of the neighbours they come from.

The prefix and the end of an odd axis have no second neighbour: those rows are copied. Backward a program has the same
rows, writes the gradients of all their neighbours, and sums what is learned over its rows: torch adds the sums up.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..schemas import merged_tokens
from .common import FUSION, cast, for_any, tile, write_rows
from .launch import Launch, launch, planned


@triton.jit
def _neighbours(row, P, H, W, rows, VERTICAL: tl.constexpr):
    """The rows of x that rows of the result come from (the first of two), and which have a second, a step away."""
    token = tl.maximum(row - P, 0)
    if VERTICAL:
        i, j = 2 * (token // W), token % W
        second = i + 1 < H
    else:
        columns = tl.cdiv(W, 2)
        i, j = token // columns, 2 * (token % columns)
        second = j + 1 < W
    place = tl.where(row < P, row, P + i * W + j)
    return place.to(tl.int64), (row >= P) & (row < rows) & second


@triton.jit
def _both(ptrs, there, paired, step, ACC: tl.constexpr):
    """The values of both neighbours, 0 where there is none."""
    a = tl.load(ptrs, mask=there, other=0.0)
    b = tl.load(ptrs + step, mask=paired, other=0.0)
    return cast(a, ACC), cast(b, ACC)


@triton.jit
def _counts(
    sizes_ptr, logits_ptr, token, paired, step, stride_sn, stride_ln,
    SIZES: tl.constexpr, LOGITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What both neighbours count: twice their shares, or the softmax of their logits."""
    share_a = tl.full(token.shape, 0.5, ACC)
    share_b = share_a
    if SIZES:
        size_a, size_b = _both(sizes_ptr + token * stride_sn, paired, paired, step * stride_sn, ACC)
        some = size_a + size_b != 0
        total = tl.where(some, size_a + size_b, 1.0)
        share_a = tl.where(some, size_a / total, 0.5)
        share_b = tl.where(some, size_b / total, 0.5)
    if LOGITS:
        logit_a, logit_b = _both(logits_ptr + token * stride_ln, paired, paired, step * stride_ln, ACC)
        if SIZES:  # what has no size does not count: its logit is log 0
            logit_a = tl.where(share_a == 0, float("-inf"), logit_a)
            logit_b = tl.where(share_b == 0, float("-inf"), logit_b)
        largest = tl.maximum(logit_a, logit_b)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        share_a *= tl.exp(logit_a - largest)
        share_b *= tl.exp(logit_b - largest)
        total = share_a + share_b
        total = tl.where(total == 0, 1.0, total)
        return share_a / total, share_b / total
    else:
        return 2 * share_a, 2 * share_b


@triton.jit
def _factor(ptr, number, c, C, stride, GIVEN: tl.constexpr, ACC: tl.constexpr):
    """alpha or beta of channels c."""
    if GIVEN:
        return cast(tl.load(ptr + c * stride, mask=c < C, other=0.0), ACC)
    else:
        return tl.full(c.shape, number, ACC)


@for_any("H", "W", "P", "rows", "blocks", "stride_lb", "stride_sb", "mean_ptr", "deviation_ptr")
def merge_neighbours_fwd_kernel(
    x_ptr, first_ptr, second_ptr, logits_ptr, sizes_ptr, weight_ptr, bias_ptr,
    y_ptr, merged_ptr, normed_ptr, mean_ptr, deviation_ptr, alpha: tl.float64, beta: tl.float64, eps: tl.float64,
    H, W, C, P, rows, blocks, slices,
    stride_xb, stride_xn, stride_xc, stride_f, stride_s, stride_lb, stride_ln, stride_sb, stride_sn,
    VERTICAL: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LOGITS: tl.constexpr, SIZES: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    slice, block = tl.program_id(0) % slices, tl.program_id(0) // slices
    image = (block // blocks).to(tl.int64)
    row = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    place, paired = _neighbours(row, P, H, W, rows, VERTICAL)
    there = row < rows
    step = tl.cast(W if VERTICAL else 1, tl.int64)
    sizes_ptr += image * stride_sb
    logits_ptr += image * stride_lb
    if SIZES:
        if slice == 0:
            tokens = there & (row >= P)
            size_a, size_b = _both(sizes_ptr + (place - P) * stride_sn, tokens, paired, step * stride_sn, ACC)
            size = cast(size_a + size_b, merged_ptr.dtype.element_ty)
            tl.store(merged_ptr + image * (rows - P) + row - P, size, mask=tokens)

    one, two = there[:, None] & (c < C)[None, :], paired[:, None] & (c < C)[None, :]
    x_ptrs = x_ptr + image * stride_xb + place[:, None] * stride_xn + c[None, :] * stride_xc
    x_a = tl.load(x_ptrs, mask=one, other=0.0)
    x_b = tl.load(x_ptrs + step * stride_xn, mask=two, other=0.0)
    count_a, count_b = _counts(sizes_ptr, logits_ptr, place - P, paired, step, stride_sn, stride_ln, SIZES, LOGITS, ACC)
    weight_a, weight_b = count_a[:, None], count_b[:, None]
    if not LOGITS:
        weight_a *= _factor(first_ptr, alpha, c, C, stride_f, FIRST, ACC)[None, :]
        weight_b *= _factor(second_ptr, beta, c, C, stride_s, SECOND, ACC)[None, :]
    y = cast(weight_a * cast(x_a, ACC) + weight_b * cast(x_b, ACC), y_ptr.dtype.element_ty)
    write_rows(
        tl.where(two, y, x_a), row, there, c, image, C, rows, tl.full((), eps, ACC), y_ptr, normed_ptr,
        mean_ptr, deviation_ptr, weight_ptr, bias_ptr, NORM, WEIGHT, BIAS, ACC,
    )  # fmt: skip


@for_any("H", "W", "P", "rows", "tokens", "images", "blocks", "programs", "stride_lb", "stride_sb")
def merge_neighbours_bwd_kernel(
    dy_ptr, x_ptr, first_ptr, second_ptr, logits_ptr, sizes_ptr, dx_ptr, dfirst_ptr, dsecond_ptr, dlogits_ptr,
    alpha: tl.float64, beta: tl.float64, H, W, C, P, rows, tokens, images, blocks, slices, programs,
    stride_yb, stride_yn, stride_yc, stride_xb, stride_xn, stride_xc, stride_f, stride_s,
    stride_lb, stride_ln, stride_sb, stride_sn,
    VERTICAL: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LOGITS: tl.constexpr, SIZES: tl.constexpr,
    LEARNED: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program has some blocks of rows, and of them a slice of the channels; all of them where logits are learned."""
    slice, program = tl.program_id(0) % slices, tl.program_id(0) // slices
    step = tl.cast(W if VERTICAL else 1, tl.int64)
    c = (slice * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    sum_a = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    sum_b = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for block in range(program, images * blocks, programs):
        image = (block // blocks).to(tl.int64)
        row = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        place, paired = _neighbours(row, P, H, W, rows, VERTICAL)
        there = row < rows
        count_a, count_b = _counts(
            sizes_ptr + image * stride_sb, logits_ptr + image * stride_lb, place - P, paired, step, stride_sn,
            stride_ln, SIZES, LOGITS, ACC,
        )  # fmt: skip
        one, two = there[:, None] & (c < C), paired[:, None] & (c < C)
        dy_ptrs = dy_ptr + image * stride_yb + row.to(tl.int64)[:, None] * stride_yn + c * stride_yc
        dy = tl.load(dy_ptrs, mask=one, other=0.0)
        wide = cast(dy, ACC)
        weight_a, weight_b = count_a[:, None], count_b[:, None]
        if not LOGITS:
            weight_a *= _factor(first_ptr, alpha, c, C, stride_f, FIRST, ACC)
            weight_b *= _factor(second_ptr, beta, c, C, stride_s, SECOND, ACC)
        dx_a = tl.where(two, cast(weight_a * wide, dx_ptr.dtype.element_ty), dy)
        dx_b = cast(weight_b * wide, dx_ptr.dtype.element_ty)
        dx_ptrs = dx_ptr + (image * tokens + place)[:, None] * C + c
        tl.store(dx_ptrs, dx_a, mask=one)
        tl.store(dx_ptrs + step * C, dx_b, mask=two)
        if LEARNED:
            x_ptrs = x_ptr + image * stride_xb + place[:, None] * stride_xn + c * stride_xc
            x_a, x_b = _both(x_ptrs, two, two, step * stride_xn, ACC)
            if FIRST:
                sum_a += tl.where(two, count_a[:, None] * x_a * wide, 0.0)
            if SECOND:
                sum_b += tl.where(two, count_b[:, None] * x_b * wide, 0.0)
            if LOGITS:
                both = count_a * count_b
                dlogits = tl.where(paired & (both != 0), both * tl.sum(wide * (x_a - x_b), axis=1), 0.0)
                dlogits_ptrs = dlogits_ptr + image * (tokens - P) + place - P
                tl.store(dlogits_ptrs, cast(dlogits, dlogits_ptr.dtype.element_ty), mask=there & (row >= P))
                tl.store(dlogits_ptrs + step, cast(-dlogits, dlogits_ptr.dtype.element_ty), mask=paired)
    at = program.to(tl.int64) * C + c
    if LEARNED and FIRST:
        tl.store(dfirst_ptr + at, tl.sum(sum_a, axis=0)[None, :], mask=c < C)
    if LEARNED and SECOND:
        tl.store(dsecond_ptr + at, tl.sum(sum_b, axis=0)[None, :], mask=c < C)


def _weights(x, first, second, logits, sizes, vertical):
    """Of the weights and sizes: strides, and which of them there are."""
    strides = [0 if t is None or t.shape[0] == 1 else t.stride()[0] for t in (first, second)]
    strides += [stride for t in (logits, sizes) for stride in ((0, 0) if t is None else t.stride())]
    given = {
        "VERTICAL": vertical,
        "FIRST": first is not None,
        "SECOND": second is not None,
        "LOGITS": logits is not None,
        "SIZES": sizes is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    return strides, given


@planned
def _fwd_plan(x, first, second, logits, sizes, weight, bias, height, width, vertical, prefix, norm):
    B, _, C = x.shape
    rows = prefix + merged_tokens(height, width, vertical)
    block_c = triton.next_power_of_2(max(C, 16)) if norm else tile(C, 16, 256)
    block_n = max(1, min(32, (4096 if norm else 2048) // block_c))
    blocks, slices = triton.cdiv(rows, block_n), max(1, triton.cdiv(C, block_c))
    strides, constants = _weights(x, first, second, logits, sizes, vertical)
    constants |= {"NORM": norm, "WEIGHT": weight is not None, "BIAS": bias is not None}
    constants |= {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 8 if norm else 4, **FUSION}
    scalars = (height, max(width, 1), C, prefix, rows, blocks, slices, *x.stride(), *strides)
    return Launch(B * blocks * slices, scalars, constants)


class _Backward(NamedTuple):
    launch: Launch
    programs: int  # that leave sums behind


@planned
def _bwd_plan(dy, x, first, second, logits, sizes, height, width, vertical, prefix):
    B, rows, C = dy.shape
    learned = x is not None
    block_c = triton.next_power_of_2(max(C, 16)) if learned and logits is not None else tile(C, 16, 256)
    block_n = max(1, min(32, (1024 if learned else 2048) // block_c))
    blocks, slices = triton.cdiv(rows, block_n), max(1, triton.cdiv(C, block_c))
    programs = B * blocks
    if learned and logits is None:  # each leaves sums behind: few enough to add up, enough to fill a GPU
        programs = min(programs, max(1, 2048 // slices))
    strides, constants = _weights(dy, first, second, logits, sizes, vertical)
    constants |= {"LEARNED": learned, "BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4, **FUSION}
    scalars = (
        height, max(width, 1), C, prefix, rows, prefix + height * width, B, blocks, slices, programs,
        *dy.stride(), *(x if learned else dy).stride(), *strides,
    )  # fmt: skip
    return _Backward(Launch(programs * slices, scalars, constants), programs)


def merge_neighbours_fwd(
    x, first, second, logits, sizes, weight, bias, height, width, vertical, prefix, alpha, beta, norm, eps
):
    (B, _, C), M = x.shape, merged_tokens(height, width, vertical)
    rows = prefix + M
    y, wide = x.new_empty(B, rows, C), accumulation_dtype(x.dtype)
    merged = x.new_empty(0) if sizes is None else sizes.new_empty(B, M)
    normed = x.new_empty(B, rows, C) if norm else x.new_empty(0)
    statistics = x.new_empty(2, B, rows, dtype=wide) if norm else x.new_empty(0, dtype=wide)
    mean, deviation = statistics if norm else (statistics, statistics)
    given = [x if t is None else t for t in (first, second, logits, sizes, weight, bias)]  # x stands in for the others
    plan = _fwd_plan(x, first, second, logits, sizes, weight, bias, height, width, vertical, prefix, norm)
    tensors = (x, *given, y, merged, normed, mean, deviation)
    launch(merge_neighbours_fwd_kernel, plan, tensors, (alpha, beta, eps))
    return y, merged, normed, statistics


def merge_neighbours_bwd(dy, x, first, second, logits, sizes, height, width, vertical, prefix, alpha, beta):
    B, _, C = dy.shape
    learned = x is not None
    dx = dy.new_empty((B, prefix + height * width, C))
    dlogits = logits.new_empty(logits.shape) if learned and logits is not None else dy.new_empty((0,))
    plan = _bwd_plan(dy, x, first, second, logits, sizes, height, width, vertical, prefix)
    wide, size = accumulation_dtype(dy.dtype), (plan.programs, C)
    sums = [dy.new_empty(size, dtype=wide) if learned and t is not None else None for t in (first, second)]
    given = [dy if t is None else t for t in (x, first, second, logits, sizes)]
    tensors = (dy, *given, dx, *(dx if s is None else s for s in sums), dlogits)
    launch(merge_neighbours_bwd_kernel, plan.launch, tensors, (alpha, beta))
    return dx, *(_added(s, t, dy) for s, t in zip(sums, (first, second))), dlogits


def _added(sums, weight, like):
    """The programs' sums, (programs, C), to the gradient of a weight of C or of one element."""
    if sums is None:
        return like.new_empty((0,))
    return (sums.sum(0) if weight.shape[0] == sums.shape[1] else sums.sum().reshape(1)).to(weight.dtype)
