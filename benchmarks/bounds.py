"""The least time that each kernel needs on an H200, from its machine code alone: `python benchmarks/bounds.py`.

For the reference sizes (B=256, bf16, sm_90, DeiT-S: 196 tokens behind a class token, C=384) every kernel is compiled as
a user's call compiles it, its loops are found in SASS and get their trips: from the `range` of the source line they
come from (Triton), or from a table beside the kernels (CUDA C++, whose library has no lines). A loop that is not known
makes the bound unknown, aloud. The bound is the largest of

- issue: instructions of all warps of the blocks on the busiest multiprocessor, over its 4 schedulers, one a cycle each.
  It holds whatever is resident: blocks that share a multiprocessor share these slots;
- stalls: one warp's chain of stall counts, times the waves of blocks (whole ones, as many blocks as fit being resident);
- matrix and special: what the tensor cores, and the unit of exp, log, roots and reciprocals, take at their peak rates;
- bytes: every input read once and every output written once, at the rate of a copy.

It is no prediction: nothing waits for memory, barriers or matrix instructions, no bank conflicts, no tail but whole
blocks; a program does the mean of all programs' work, and code that a branch may skip counts as skipped.
"""

import argparse
import ast
import functools
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from kernel_cases import TOOLS, launches, resources
from sass import Code, Irreducible, Loop, disassembled

MULTIPROCESSORS, SCHEDULERS, CLOCK, BANDWIDTH = 132, 4, 1.9e9, 4.3e12  # of an H200
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block costs beside its own
PRODUCTS = 512  # of bf16, that a scheduler's tensor core adds a cycle
SPECIAL = 8  # cycles of a warp's instruction on the unit of special functions

B, N, M, C, H, D = 256, 196, 98, 384, 6, 64
ROW = B * C * 2  # bytes of a token in all images
HEADS = B * H * (N + 1) * 4  # a number for each head and query

#: names in the ranges of kernels that are no arguments of theirs, or mean something else in a function they call
LOCALS: dict[str, dict[str, str]] = {
    "soft_aggregate_fwd_kernel": {"N": "N * N_UNIT", "M": "M * M_UNIT"},
    "soft_aggregate_bwd_kernel": {"N": "N * N_UNIT", "M": "M * M_UNIT"},
    "token_mlp_bwd_z_kernel": {"K": "N", "BLOCK_K": "BLOCK_N", "ONE": "ONE_N"},  # all of M is one tile
    "token_mlp_bwd_weight_kernel": {"K": "N", "BLOCK_K": "BLOCK_N", "ONE": "ONE_N", "tiles_c": "tl.cdiv(C, BLOCK_C)"},
    "masked_channel_attention_fwd_kernel": {"length": "N", "whole": "N // BLOCK_N * BLOCK_N"},
    "masked_channel_attention_bwd_q_kernel": {"length": "N", "whole": "N // BLOCK_N * BLOCK_N if SPLIT else 0"},
    "masked_channel_attention_bwd_kv_kernel": {"queries": "M", "whole": "M // BLOCK_M * BLOCK_M if SPLIT else 0"},
    "masked_channel_attention_received_kernel": {"heads": "H // GROUPS", "group": "0"},
    "match_bipartite_fwd_kernel": {"count_a": "(N + P) // 2 - P // 2", "count_b": "N - count_a"},
}
#: how many trips a loop has whose range is data, or differs between programs: their mean
RANGES = {
    ("token_mlp_bwd_weight_kernel", "range(split * share, tl.minimum((split + 1) * share, B * tiles_c))"): (
        "B * tiles_c / tl.cdiv(B * tiles_c, share)"
    ),
    # a tile of rows takes as many rounds as the most tokens that any of them is made of: at least one
    ("sum_rows_kernel", "range(0, tl.max(count))"): "1",
    ("merge_neighbours_bwd_kernel", "range(program, images * blocks, programs)"): "images * blocks / programs",
}
#: the share of programs in which a condition around a loop holds
CONDITIONS = {
    ("soft_aggregate_fwd_kernel", "tile_m == 0"): "1 / tl.cdiv(M, BLOCK_M)",
    ("soft_aggregate_bwd_kernel", "tile_n == 0"): "1 / tl.cdiv(N, BLOCK_N)",
    ("masked_channel_attention_fwd_kernel", "program < side"): "0",  # no means over the heads
    ("masked_channel_attention_fwd_kernel", "tile_m == 0"): "1 / tl.cdiv(M, BLOCK_M)",
    ("masked_channel_attention_bwd_q_kernel", "RECEIVED or tile_m == 0"): "1 if RECEIVED else 1 / tl.cdiv(M, BLOCK_M)",
}


class Unknown(ValueError):
    """Why a kernel has no bound."""


class Kernel(NamedTuple):
    """What a bound is made of."""

    code: Code
    trips: list[float]
    programs: int
    warps: int
    registers: int
    shared: int
    bytes: float


@functools.cache
def _parsed(path: str) -> ast.Module:
    tree = ast.parse(Path(path).read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def _value(text: str, names: dict):
    tl = SimpleNamespace(cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, cast=lambda value, kind: value)
    return eval(text, {"tl": tl, **names})


def source_trips(kernel: str, loop: Loop, code: Code, arguments: dict) -> float:
    """The trips of a loop of a Triton kernel, as the `for` says that it comes from."""
    places = {code.instructions[code.block(latch)[-1]].line for latch in loop.latches}
    path, line = next(iter(places)) if len(places) == 1 and None not in places else ("", 0)
    found = [node for node in ast.walk(_parsed(path)) if isinstance(node, ast.For) and node.lineno == line] if path else []
    if not found:
        raise Unknown(f"the loop at instruction {code.block(loop.header)[0]} comes from no `for`: {places}")
    (node,) = found
    names = dict(arguments)
    for name, value in LOCALS.get(kernel, {}).items():
        names[name] = _value(value, names)
    text = ast.unparse(node.iter)
    try:
        if (kernel, text) in RANGES:
            count = _value(RANGES[kernel, text], names)
        else:
            count = len(_value(text, names))
        while not isinstance(node.parent, ast.FunctionDef):  # type: ignore[attr-defined]
            node, child = node.parent, node  # type: ignore[attr-defined]
            if isinstance(node, ast.If):
                test = ast.unparse(node.test)
                share = _value(CONDITIONS.get((kernel, test), test), names)
                count *= share if child in node.body else 1 - share
    except NameError as error:
        raise Unknown(f"`for` in line {line} of {Path(path).name}: {error}") from error
    return count


def of_launch(launch, bytes: float) -> Kernel:
    """A Triton kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(launch.binary.asm["cubin"])
        code = disassembled(cubin)[launch.kernel]
    lines = [code.instructions[code.block(loop.latches[0])[-1]].line for loop in code.loops]
    if len(set(lines)) < len(lines):
        raise Unknown(f"{len(lines)} loops found, {len(set(lines))} known: one `for` became several loops")
    trips = [source_trips(launch.kernel, loop, code, launch.arguments) for loop in code.loops]
    values = resources(launch.binary, 90)
    return Kernel(code, trips, launch.programs, values["warps"], values["registers"], values["shared"], bytes)


def resident(kernel: Kernel) -> int:
    """Blocks that a multiprocessor holds at once."""
    of_a_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = REGISTERS // SCHEDULERS // of_a_warp * SCHEDULERS // kernel.warps
    by_shared = SHARED // (kernel.shared + RESERVED)
    return min(by_registers, by_shared, WARPS // kernel.warps, BLOCKS)


def matrix_cycles(operations: dict[str, float]) -> float:
    """Cycles of a scheduler's tensor core for a warp's matrix instructions; four warps share an HGMMA."""
    cycles = 0.0
    for operation, times in operations.items():
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32\.BF16", operation):
            cycles += times * math.prod(map(int, shape.groups())) / 4 / PRODUCTS
        elif shape := re.match(r"HMMA\.(16)(8)(16)\.F32\.BF16", operation):
            cycles += times * math.prod(map(int, shape.groups())) / PRODUCTS
        elif "MMA" in operation:
            raise Unknown(f"{operation}: its rate is not known")
    return cycles


def bound(kernel: Kernel) -> dict:
    """The bound in us, by what it is reached, and what it follows from."""
    operations, stalls = kernel.code.counts(kernel.code.executions(kernel.trips))
    blocks, most = resident(kernel), math.ceil(kernel.programs / MULTIPROCESSORS)
    special = sum(times for operation, times in operations.items() if operation.startswith("MUFU"))
    turns = most * kernel.warps / SCHEDULERS  # of a warp on the busiest multiprocessor's schedulers
    cycles = {
        "issue": turns * operations.total(),
        "stalls": math.ceil(most / blocks) * stalls,
        "matrix": turns * matrix_cycles(operations),
        "special": turns * special * SPECIAL,
    }
    times = {name: count / CLOCK * 1e6 for name, count in cycles.items()} | {"bytes": kernel.bytes / BANDWIDTH * 1e6}
    limit = max(times, key=lambda name: times[name])
    return {
        "bound": round(times[limit], 1),
        "limit": limit,
        **{name: round(value, 1) for name, value in times.items()},
        "registers": kernel.registers,
        "warps": kernel.warps,
        "programs": kernel.programs,
        "blocks": blocks,
        "waves": round(kernel.programs / MULTIPROCESSORS / blocks, 1),
    }
