"""The least time that each kernel needs on an H200, from its machine code alone: `python benchmarks/bounds.py`.

For the reference sizes (B=256, bf16, sm_90, DeiT-S: 196 tokens behind a class token, C=384) every kernel is compiled as
a user's call compiles it, its loops are found in SASS and get their trips: from the `range` of the source line they
come from (Triton), or from a table beside the kernels (CUDA C++, whose library has no lines). A loop that is not known
makes the bound unknown, aloud. The bound is the largest of

- issue: instructions of all warps of the blocks on the busiest multiprocessor, over its 4 schedulers, one a cycle each.
  It holds whatever is resident: blocks that share a multiprocessor share these slots;
- stalls: one warp's chain of stall counts, times the waves of blocks (whole ones; all that fit are resident);
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
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from kernel_cases import TOOLS, Launch, launches, resources
from sass import Code, Loop, disassembled
from tokenops import _native

NOTES = Path(__file__).with_name("NOTES.md")
KERNELS = Path(_native.LIBRARY).parent / "_triton"

MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.9e9  # of an H200
BANDWIDTH, MATMUL = 4.3e12, 790e12  # of a copy and of a large product, as measured
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


class Pass(NamedTuple):
    """A launch, or some, with the floor and the prediction of NOTES.md."""

    operator: str
    name: str
    case: str
    bytes: float
    products: float  # of pairs of numbers, times two
    predicted: float | None
    triton: dict[str, float | None]  # the bytes of each kernel, None where they are the pass's
    native: str = ""

    @property
    def floor(self) -> float:
        return max(self.bytes / BANDWIDTH, self.products / MATMUL) * 1e6


QUERIES, LONG = B * H * (N + 1) ** 2 * D * 2, B * 12 * 577  # products of q and k; queries of a longer case
LOGITS = B * N * M * 2
CLASS = "M197-N197-D64-64-class"
PASSES = (
    Pass(
        "soft_aggregate", "forward", "N196-M98-C384", ROW * (N + M + 2) + LOGITS, LOGITS * C, 25,
        {"soft_aggregate_fwd_kernel": None},
    ),
    Pass(
        "soft_aggregate", "backward", "N196-M98-C384", 2 * (ROW * (N + M + 2) + LOGITS), 2 * LOGITS * C, 65,
        {"soft_aggregate_bwd_kernel": None},
    ),
    Pass(
        "token_mlp", "forward", "M98-N196-C384", ROW * (M + N), 8 * B * C * N * (M + N), 130,
        {"token_mlp_fwd_kernel": None},
    ),
    Pass(
        "token_mlp", "backward", "M98-N196-C384", ROW * (2 * M + N), 16 * B * C * N * (M + N), 330,
        {
            "token_mlp_bwd_z_kernel": ROW * (2 * M + N),
            "token_mlp_bwd_weight_kernel": ROW * (M + N),
            "token_mlp_bwd_weight_kernel#2": ROW * (M + N),
        },
    ),
    Pass(
        "masked_channel_attention", "class, forward", CLASS, ROW * 4 * (N + 1) + HEADS, 2 * QUERIES, 80,
        {"masked_channel_attention_fwd_kernel": None},
    ),
    Pass(
        "masked_channel_attention", "class, backward", CLASS, ROW * 8 * (N + 1) + HEADS, 5 * QUERIES, 220,
        {
            "masked_channel_attention_bwd_q_kernel": ROW * 6 * (N + 1),
            "masked_channel_attention_bwd_kv_kernel": ROW * 6 * (N + 1),
        },
    ),
    Pass(
        "masked_channel_attention", "received (577 tokens, 12 heads), its own launch", "M577-N577-D64-64-received",
        LONG * (4 * D + 8), LONG * 577 * D * 2, None, {"masked_channel_attention_received_kernel": None},
    ),
    Pass(
        "select_tokens", "no rest, forward", "N196-k98-C384-none", ROW * 2 * (M + 1), 0, 12,
        {"select_tokens_fwd_kernel": None}, "select_tokens_fwd_kernel<BFloat16, 8, false>",
    ),
    Pass(
        "select_tokens", "no rest, backward", "N196-k98-C384-none", ROW * (M + N + 2), 0, None,
        {"select_tokens_bwd_kernel": None}, "select_tokens_bwd_kernel<BFloat16, 8>",
    ),
    Pass(
        "restore_tokens", "forward", "N196-k98-C384", ROW * 2 * (N + 1), 0, 21,
        {"restore_tokens_fwd_kernel": None}, "restore_tokens_fwd_kernel<uint4>",
    ),
    Pass(
        "restore_tokens", "backward", "N196-k98-C384", ROW * (2 * (N + 1) + M), 0, None,
        {"restore_tokens_bwd_kernel": None}, "restore_tokens_bwd_kernel<uint4>",
    ),
    Pass(
        "merge_neighbours", "average, forward", "H14-W14-C384-average", ROW * (N + M + 2), 0, 16,
        {"merge_neighbours_fwd_kernel": None}, "merge_neighbours_fwd_kernel<BFloat16, 8>",
    ),
    Pass(
        "merge_neighbours", "average, backward", "H14-W14-C384-average", ROW * (N + M + 2), 0, 17,
        {"merge_neighbours_bwd_kernel": None}, "merge_neighbours_bwd_kernel<BFloat16, 8, false>",
    ),
    Pass(
        "match_bipartite", "forward", "N196-D64-r13", B * (N + 1) * D * 2 + B * N * 8, LOGITS // 2 * D, 17,
        {"match_bipartite_fwd_kernel": None}, "match_bipartite_kernel<BFloat16, 8>",
    ),
    Pass(
        "merge_bipartite", "forward", "N196-r13-C384-sizes", ROW * (2 * (N + 1) - 13), 0, 21,
        {"sum_rows_kernel": None}, "merge_bipartite_kernel<BFloat16, 8, false>",
    ),
    Pass(
        "merge_bipartite", "with norm, forward", "N196-r13-C384-sizes-norm", ROW * (3 * (N + 1) - 26), 0, 31,
        {"sum_rows_kernel": None}, "merge_bipartite_kernel<BFloat16, 8, true>",
    ),
    Pass(
        "merge_bipartite", "backward", "N196-r13-C384-sizes", ROW * (2 * (N + 1) - 13), 0, 20,
        {"gather_rows_kernel": None}, "unmerge_bipartite_kernel<BFloat16, 8>",
    ),
    Pass(
        "unmerge_bipartite", "forward", "N196-M183-C384", ROW * (2 * (N + 1) - 13), 0, 20,
        {"gather_rows_kernel": None}, "unmerge_bipartite_kernel<BFloat16, 8>",
    ),
    Pass(
        "unmerge_bipartite", "backward", "N196-M183-C384", ROW * (2 * (N + 1) - 13), 0, 21,
        {"sum_rows_kernel": None}, "merge_bipartite_kernel<BFloat16, 8, false>",
    ),
)  # fmt: skip


OPERATORS = sorted({one.operator for one in PASSES})


class Native(NamedTuple):
    """A launch of a CUDA C++ kernel: what its plan chooses on an H200 at the reference sizes, and its loops."""

    programs: int
    loops: (
        str  # in the order of their code, > before the inner ones: trips a warp in the mean, ! where all rows are there
    )
    dynamic: int = 0  # bytes of shared memory
    threads: int = 256


#: 0: not entered here, or the unrolled part of a loop of few trips; a fraction where only some warps have one
NATIVE = {
    # places of rows and their rest (20 rows a block), tokens, companions, units, rows
    "restore_tokens_fwd_kernel<uint4>": Native(2560, "0 0 0.5 0 >0 1! >1!", threads=240),
    # the same with lost tokens and, in the first of 10 blocks, tokens that go nowhere; as if all rows were replaced
    "restore_tokens_bwd_kernel<uint4>": Native(2560, "0 0 0.5 >0 >0 2 >0 >0 0 >0 1! >1!", threads=240),
    # digits (scores four at a time, search), compaction, sort, indices (companions), units (rows), rest
    "select_tokens_fwd_kernel<BFloat16, 8, false>": Native(512, "4 >0 >0 1 0 >0 >>0 0.5 >0 1! >3! 0 0 0 >0 >0", 392),
    # slots and their rest, tokens and their rest, rest, rows (units)
    "select_tokens_bwd_kernel<BFloat16, 8>": Native(512, "0.5 0 0.5 0 0 12.4 >2", 396),
    # pairs, units (rows)
    "merge_neighbours_fwd_kernel<BFloat16, 8>": Native(1268, "0.1 1! >1!"),
    "merge_neighbours_bwd_kernel<BFloat16, 8, false>": Native(1268, "0.1 1! >1!"),
    # even rows (norms, odd rows (norms, channels)), digits (edges, search), compaction, numbers
    "match_bipartite_kernel<BFloat16, 8>": Native(256, "2 >1! >2 >>1! >>1.6! 4 >0 >0 1 0.5 0 0.5 0", 196),
    # origins and tokens with their rests, rows (of many, of two; what lanes do not hold; sums of lanes for the norm)
    "merge_bipartite_kernel<BFloat16, 8, false>": Native(1024, "0.2 0 0.9 0 3! >0 >>0 >0 >0 >>0 >>>0 >>0"),
    "merge_bipartite_kernel<BFloat16, 8, true>": Native(
        1024, "0.2 0 0.9 0 3! >0 >>0 >0 >0 >>0 >>>0 >>0 >0 >4 >0 >4 >0"
    ),
    # what rows are given, units (rows)
    "unmerge_bipartite_kernel<BFloat16, 8>": Native(1009, "0.2 1! >2.5!"),
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
    full: Collection[int] = ()  # the loops of which the fullest way is taken


@functools.cache
def _parsed(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text() if path.is_file() else "")
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
    path, line = next(iter(places)) or ("", 0)
    ours = KERNELS / Path(path).name  # code from a cache may have been compiled elsewhere
    found = [node for node in ast.walk(_parsed(ours if ours.is_file() else Path(path))) if isinstance(node, ast.For)]
    found = [node for node in found if node.lineno == line]
    if len(places) > 1 or not found:
        raise Unknown(f"the loop at instruction {code.block(loop.header)[0]} comes from no `for`: {places}")
    (node,) = found
    text, names = ast.unparse(node.iter), dict(arguments)
    try:
        for name, value in LOCALS.get(kernel, {}).items():
            names[name] = _value(value, names)
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


def of_launch(launch: Launch) -> Kernel:
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
    return Kernel(code, trips, launch.programs, values["warps"], values["registers"], values["shared"])


def _demangled(name: str) -> str:
    """restore_tokens_fwd_kernel<uint4> of what the compiler calls it."""
    found = re.match(r"_ZN8tokenops\d+(\w+?_kernel)I(.*?)EEvNS_", name)
    if not found:
        return name
    arguments = re.findall(r"NS_\d+([A-Za-z]+\d*)E|Li(\d+)E|Lb([01])E|\d+(uint\d)", found[2] + "E")
    flags = {"0": "false", "1": "true"}
    return f"{found[1]}<{', '.join(a or b or flags.get(c) or d for a, b, c, d in arguments)}>"


def native_kernels(library: Path, wanted: Collection[str]) -> dict[str, Kernel | Unknown]:
    """Kernels of NATIVE in a compiled library for sm_90."""
    kernels: dict[str, Kernel | Unknown] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", "sm_90", library], cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], text=True)
            used = {n: sizes for n, *sizes in re.findall(r"Function (\w+):\s+REG:(\d+).*?SHARED:(\d+)", usage)}
            if not any(_demangled(name) in wanted for name in used):
                continue
            for name, code in disassembled(cubin, lambda name: _demangled(name) in wanted).items():
                kernel = _demangled(name)
                try:
                    kernels[kernel] = of_native(code, NATIVE[kernel], *map(int, used[name]))
                except ValueError as error:
                    kernels[kernel] = Unknown(str(error))
    return kernels


def of_native(code: Code, known: Native, registers: int, shared: int) -> Kernel:
    loops = known.loops.split()
    if [loop.count(">") for loop in loops] != [loop.depth for loop in code.loops]:
        found = " ".join(f"{'>' * loop.depth}{code.starts[loop.header]}" for loop in code.loops)
        raise Unknown(f"{len(code.loops)} loops found, {len(loops)} known: {found}")
    trips = [float(loop.strip(">!")) for loop in loops]
    full = [place for place, loop in enumerate(loops) if loop.endswith("!")]
    warps = math.ceil(known.threads / 32)
    return Kernel(code, trips, known.programs, warps, registers, shared + known.dynamic, full=full)


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
        elif re.match(r"\w*MMA", operation):
            raise Unknown(f"{operation}: its rate is not known")
    return cycles


def bound(kernel: Kernel, bytes: float) -> dict:
    """The bound in us, by what it is reached, and what it follows from."""
    operations, stalls = kernel.code.counts(kernel.code.executions(kernel.trips, kernel.full))
    blocks, most = resident(kernel), math.ceil(kernel.programs / MULTIPROCESSORS)
    special = sum(times for operation, times in operations.items() if operation.startswith("MUFU"))
    turns = most * kernel.warps / SCHEDULERS  # of a warp on the busiest multiprocessor's schedulers
    cycles = {
        "issue": turns * operations.total(),
        "stalls": math.ceil(most / blocks) * stalls,
        "matrix": turns * matrix_cycles(operations),
        "special": turns * special * SPECIAL,
    }
    times = {name: count / CLOCK * 1e6 for name, count in cycles.items()} | {"bytes": bytes / BANDWIDTH * 1e6}
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


def rows(before: dict[str, dict] | None = None, operators: Collection[str] = OPERATORS) -> dict[str, dict]:
    """The bound of every kernel of every pass, or why it is not known, by `operator, pass: kernel`.

    Triton's are compiled by the Triton in use; without a compiled library the others stay as they were `before`.
    """
    made: dict[str, dict] = {}
    built = _native.info()
    passes = [one for one in PASSES if one.operator in operators]
    native = None
    if "9.0" in built.get("architectures", ()):
        native = native_kernels(_native.LIBRARY, {one.native for one in passes})
    for one in passes:
        seen: dict[str, int] = {}
        for launch in _launches(one.operator, one.case):
            seen[launch.kernel] = seen.get(launch.kernel, 0) + 1
            name = launch.kernel + (f"#{seen[launch.kernel]}" if seen[launch.kernel] > 1 else "")
            if name in one.triton:
                made[f"{one.operator}, {one.name}: {name}"] = _row(one, name, of_launch, launch)
        if one.native:
            name = f"{one.operator}, {one.name}: {one.native}"
            if native is not None:
                made[name] = _row(one, one.native, native.get, one.native)
            else:
                made[name] = (before or {}).get(name, {"unknown": "there is no compiled library for sm_90"})
    return made


@functools.cache
def _launches(operator: str, case: str) -> list:
    return launches(operator, case, "bf16", 90)


def _row(one: Pass, name: str, make, of) -> dict:
    try:
        kernel = make(of)
        if not isinstance(kernel, Kernel):
            raise kernel or Unknown("not in the compiled library")
        return bound(kernel, one.triton.get(name) or one.bytes)
    except ValueError as error:
        return {"unknown": str(error)}


COLUMNS = ("issue", "stalls", "matrix", "special", "bytes", "registers", "warps", "blocks", "waves")


def table(made: dict[str, dict], operators: Collection[str] = OPERATORS) -> str:
    """The rows as NOTES.md has them; times in us."""
    lines = [
        "| kernel | floor | predicted | bound | by | " + " | ".join(COLUMNS) + " |",
        "|---" * (5 + len(COLUMNS)) + "|",
    ]
    for one in (one for one in PASSES if one.operator in operators):
        predicted = "" if one.predicted is None else f"{one.predicted:g}"
        lines.append(f"| **{one.operator}, {one.name}** | {one.floor:.1f} | {predicted} |" + " |" * (2 + len(COLUMNS)))
        mine = {name: made.get(f"{one.operator}, {one.name}: {name}") for name in (*one.triton, one.native) if name}
        for name, row in mine.items():
            short = re.sub(r"<.*>", "", name) + (" (CUDA C++)" if name == one.native else "")
            if row is None or "unknown" in row:
                why = "not in the table" if row is None else row["unknown"]
                lines.append(f"| {short} | | | unknown | {why.replace('|', '/')} |" + " |" * len(COLUMNS))
            else:
                numbers = " | ".join(f"{row[column]:g}" for column in COLUMNS)
                lines.append(f"| {short} | | | {row['bound']:g} | {row['limit']} | {numbers} |")
        if len(one.triton) > 1 and all(row and "bound" in row for row in mine.values()):
            total = sum(row["bound"] for row in mine.values() if row)
            lines.append(f"| together | | | {total:g} | |" + " |" * len(COLUMNS))
    return "\n".join(lines)


def fill_notes(made: dict[str, dict], notes: Path = NOTES) -> None:
    """Writes the table between the markers of NOTES.md."""
    start, end = "<!-- bounds -->\n", "<!-- /bounds -->"
    before, rest = notes.read_text().split(start)
    notes.write_text(before + start + table(made) + "\n" + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--json", action="store_true", help="not as a table")
    options = parser.parse_args()
    made = rows(operators=options.operators)
    print(json.dumps(made) if options.json else table(made, options.operators))


if __name__ == "__main__":
    main()
