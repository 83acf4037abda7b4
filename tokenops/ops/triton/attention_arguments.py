"""What the kernels of attention, forward and backward, are launched with: tiles of channels, strides, stand-ins."""

from .common import ALL_REGISTERS, FUSION, architecture, before_hopper, dot_options, index_type, tile, unit


def columns(dtype, *widths):
    """(BLOCK, TAIL) of the columns that hold the channels of heads of these widths, of which the others are padding.

    With tf32x3 chunks lose more than the padding they save: three times the operands, a tail too narrow for the warps.
    Before Hopper a tail of 32 spills.
    """
    chunked = dtype.itemsize == 2 and 64 < max(widths) <= (80 if before_hopper() else 96)
    return [(64, tile(D - 64, 16, 32)) if chunked and D > 64 else (tile(D, 16, 128), 0) for D in widths]


def layout(dtype, DK, DV):
    """Whether heads are padded to 128 channels, and whether they are in chunks."""
    blocks, tails = zip(*columns(dtype, DK, DV))
    return 128 in blocks, any(tails)


def config(dtype, DK, DV, warps, stages):
    (BLOCK_DK, TAIL_DK), (BLOCK_DV, TAIL_DV) = columns(dtype, DK, DV)
    options = {"num_warps": warps, "num_stages": stages, **FUSION}
    padded, chunked = layout(dtype, DK, DV)
    if dtype.itemsize == 2 and (chunked and architecture() != 90 or padded and before_hopper()):
        options |= ALL_REGISTERS
    return {"BLOCK_DK": BLOCK_DK, "BLOCK_DV": BLOCK_DV, "TAIL_DK": TAIL_DK, "TAIL_DV": TAIL_DV, **options}


def shared_arguments(q, k, v, qk_mask, v_mask, bias, lengths, *others):
    """What every kernel takes: strides in units, those of the bias, constants."""
    UNIT = unit(*(s for t in (q, k, v, *others) for s in t.stride()[:3]))
    optional = {"QK_MASK": qk_mask, "V_MASK": v_mask, "BIAS": bias, "LENGTHS": lengths}
    constants = {f"HAS_{name}": t is not None for name, t in optional.items()}
    indexed = (q, k, v, *others) if bias is None else (q, k, v, *others, bias)
    constants |= dot_options(q.dtype) | {"UNIT": UNIT, "INDEX": index_type(*indexed)}
    constants |= {"DK": q.shape[3], "DV": v.shape[3]}
    strides = [(*(s // UNIT for s in t.stride()[:3]), t.stride()[3]) for t in (q, k, v, *others)]
    return strides, (0, 0, 0) if bias is None else bias.stride(), constants


def stand_ins(q, qk_mask, v_mask, bias, lengths, cu_q, cu_k):
    """The optional tensors as kernels take them: of no strides but the bias's, q for a missing one."""
    qk_mask, v_mask, *counts = (q if t is None else t.contiguous() for t in (qk_mask, v_mask, lengths, cu_q, cu_k))
    return qk_mask, v_mask, q if bias is None else bias, *counts


def tail(rows, block, all_masked=False):
    """The size of the tiles behind the whole ones."""
    return tile(rows if all_masked else rows % block, 16, block)
