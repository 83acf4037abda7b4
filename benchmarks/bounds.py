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
from reference_passes import BANDWIDTH, CONDITIONS, LOCALS, NATIVE, OPERATORS, PASSES, RANGES, Native, Pass
from sass import Code, Loop, disassembled
from tokenops.ops import native

NOTES = Path(__file__).with_name("NOTES.md")
KERNELS = Path(native.LIBRARY).parent / "ops" / "triton"

MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.9e9  # of an H200
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block costs beside its own
PRODUCTS = 512  # of bf16, that a scheduler's tensor core adds a cycle
SPECIAL = 8  # cycles of a warp's instruction on the unit of special functions


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
    shares: list[float] | None = None  # of the programs that come to each loop; None: all, or as many as its trips


@functools.cache
def _parsed(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text() if path.is_file() else "")
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


def _value(text: str, names: dict):
    tl = SimpleNamespace(
        range=lambda *places, **options: range(*places),
        cdiv=lambda a, b: -(-a // b),
        minimum=min,
        maximum=max,
        cast=lambda value, kind: value,
    )
    return eval(text, {"tl": tl, **names})


def source_trips(kernel: str, loop: Loop, code: Code, arguments: dict) -> tuple[float, float]:
    """The trips of a loop of a Triton kernel, as the `for` says that it comes from, and the share of programs in it."""
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
        share = 1.0
        while not isinstance(node.parent, ast.FunctionDef):  # type: ignore[attr-defined]
            node, child = node.parent, node  # type: ignore[attr-defined]
            if isinstance(node, ast.For) and loop.parent is not None:
                break  # of which the outer loop is
            if isinstance(node, ast.If):
                test = ast.unparse(node.test)
                true = _value(CONDITIONS.get((kernel, test), test), names)
                share *= true if child in node.body else 1 - true
    except NameError as error:
        raise Unknown(f"`for` in line {line} of {Path(path).name}: {error}") from error
    return count, share


def of_launch(launch: Launch) -> Kernel:
    """A Triton kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(launch.binary.asm["cubin"])
        code = disassembled(cubin)[launch.kernel]
    lines = [code.instructions[code.block(loop.latches[0])[-1]].line for loop in code.loops]
    if len(set(lines)) < len(lines):
        raise Unknown(f"{len(lines)} loops found, {len(set(lines))} known: one `for` became several loops")
    found = [source_trips(launch.kernel, loop, code, launch.arguments) for loop in code.loops]
    trips, shares = [count * share for count, share in found], [share for _, share in found]
    values = resources(launch.binary, 90)
    return Kernel(code, trips, launch.programs, values["warps"], values["registers"], values["shared"], shares=shares)


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
    operations, stalls = kernel.code.counts(kernel.code.executions(kernel.trips, kernel.full, kernel.shares))
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
    built = native.info()
    passes = [one for one in PASSES if one.operator in operators]
    built_by_nvcc = None
    if "9.0" in built.get("architectures", ()):
        built_by_nvcc = native_kernels(native.LIBRARY, {one.native for one in passes})
    for one in passes:
        seen: dict[str, int] = {}
        for launch in _launches(one.operator, one.case):
            seen[launch.kernel] = seen.get(launch.kernel, 0) + 1
            name = launch.kernel + (f"#{seen[launch.kernel]}" if seen[launch.kernel] > 1 else "")
            if name in one.triton:
                made[f"{one.operator}, {one.name}: {name}"] = _row(one, name, of_launch, launch)
        if one.native:
            name = f"{one.operator}, {one.name}: {one.native}"
            if built_by_nvcc is not None:
                made[name] = _row(one, one.native, built_by_nvcc.get, one.native)
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
