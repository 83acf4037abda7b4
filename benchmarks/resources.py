"""Registers, spills, shared memory and matrix instructions of every Triton kernel, as the Triton in use compiles it.

`make resources` compiles all cases for all targets and dtypes, shows what changed against the committed table of this
Triton, benchmarks/resources/triton-X.Y.json, and writes it. A row that spills, does not fit a block or leaves the
matrix unit, more than its committed row does, is a REGRESSION where this Triton has a table (exit code 1, and the
table is written only with --accept), and a FINDING where it has none. A part of the cases (--operators, --targets,
--dtypes) is compared and never written over a whole table.

The table also holds the bounds of bounds.py, which a whole run computes again, as does --bounds, which leaves the rows
as they are. Those of the GPU machines' Triton go into NOTES.md as well.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton

import bounds
from kernel_cases import CASES, DTYPES, PRODUCTS, SHARED_LIMIT, TARGETS, case_names, compiled_case

TABLES = Path(__file__).with_name("resources")
REGISTERS = 65536  # of a multiprocessor
OF_NOTES = "3.6"  # the Triton whose bounds are in NOTES.md


class Row(NamedTuple):
    operator: str
    case: str
    kernel: str  # the second launch of a kernel within a case is kernel#2
    dtype: str
    sm: int

    def __str__(self):
        return f"{self.operator} {self.case} {self.kernel} {self.dtype} sm_{self.sm}"

    @classmethod
    def parse(cls, text):
        *names, sm = text.split()
        return cls(*names, int(sm.removeprefix("sm_")))


def read(path):
    """(rows, whether these are all cases) of a table."""
    table = json.loads(path.read_text())
    return {Row.parse(name): values for name, values in table["rows"].items()}, table["whole"]


def read_bounds(path):
    """The bounds of a table by kernel; none where there is no table."""
    return json.loads(path.read_text()).get("bounds", {}) if path.exists() else {}


def write(path, version, rows, whole, made=None):
    """One row a line, sorted by name, so that a diff shows the rows that changed."""

    def lines(values):
        return ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values)

    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'"triton": {json.dumps(version)},\n"whole": {json.dumps(whole)},\n'
    listed = lines(sorted((str(row), value) for row, value in rows.items()))
    path.write_text(
        "{\n" + head + '"rows": {\n' + listed + '\n},\n"bounds": {\n' + lines((made or {}).items()) + "\n}\n}\n"
    )


def compute_bounds(before):
    """In a process of its own that does not interpret."""
    os.environ["TRITON_INTERPRET"] = "0"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(bounds.rows, before).result()


def bound_changes(made, before):
    """A line for every kernel whose bound is not what it was, or is not known."""
    lines = []
    for name, row in made.items():
        old = before.get(name, {})
        if "unknown" in row:
            lines.append(f"UNKNOWN BOUND: {name}: {row['unknown']}")
        elif row["bound"] != old.get("bound"):
            lines.append(f"bound: {name}: {old.get('bound', '-')} -> {row['bound']} us by {row['limit']}")
    return lines


def excess(row, values):
    """What is wrong with a row and by how much, 0 where nothing is."""
    products = row.dtype == "bf16" and row.operator in PRODUCTS
    large = products and row.sm == 90 and row.case == PRODUCTS[row.operator]
    return {
        "bytes spilled": values["spills"],
        "bytes of shared memory too many": max(0, values["shared"] - SHARED_LIMIT[row.sm]),
        "registers too many for one block": max(0, values["registers"] * values["warps"] * 32 - REGISTERS),
        "matrix unit not used": int((products and not values["mma"]) or (large and not values["matrix"])),
    }


def verdicts(rows, committed):
    """A line for everything wrong that is not as wrong in the committed rows; committed is None for a new Triton."""
    word = "FINDING" if committed is None else "REGRESSION"
    lines = []
    for row, values in sorted(rows.items()):
        before = excess(row, committed[row]) if committed and row in committed else {}
        for what, now in excess(row, values).items():
            if now > before.get(what, 0):
                lines.append(f"{word}: {row}: {now} {what}" if now > 1 else f"{word}: {row}: {what}")
    return lines


def finish(out, version, rows, whole, made, before):
    """Shows the bounds that changed, writes the table, and NOTES.md with it; 1 where a bound is not known."""
    write(out, version, rows, whole, made)
    print(*bound_changes(made, before), f"written to {out}", sep="\n")
    if out == TABLES / f"triton-{OF_NOTES}.json":
        bounds.fill_notes(made)
    return int(any("unknown" in row for row in made.values()))


def changes(rows, committed):
    """A line for every row that is new, gone or not as it was."""
    lines = []
    for row in sorted({*rows, *committed}):
        if row not in committed:
            lines.append(f"added: {row}: " + ", ".join(f"{name} {value}" for name, value in rows[row].items()))
        elif row not in rows:
            lines.append(f"gone: {row}")
        elif rows[row] != committed[row]:
            old, new = committed[row], rows[row]
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            lines.append(f"{row}: " + ", ".join(f"{n} {old.get(n, '-')} -> {new.get(n, '-')}" for n in names))
    return lines


def progress(items, total):
    """The items, with a bar on stderr where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, "compiling", total, console=Console(stderr=True))


def compile_all(operators, targets, dtypes, workers):
    """The rows of these cases, each compiled in one of a few processes that do not interpret."""
    os.environ["TRITON_INTERPRET"] = "0"
    rows = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = {
            pool.submit(compiled_case, operator, case, dtype, sm): (operator, case, dtype, sm)
            for sm in targets
            for operator in operators
            for case in case_names(operator)
            for dtype in dtypes
        }
        for job in progress(as_completed(jobs), len(jobs)):
            operator, case, dtype, sm = jobs[job]
            try:
                compiled = job.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{operator} {case} {dtype} sm_{sm} does not compile: {error}") from error
            launches = {}
            for kernel, values in compiled:
                launches[kernel] = launches.get(kernel, 0) + 1
                name = f"{kernel}#{launches[kernel]}" if launches[kernel] > 1 else kernel
                rows[Row(operator, case, name, dtype, sm)] = values
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: the cores")
    parser.add_argument("--out", type=Path, help="a file for the table; default: the committed one, for all cases")
    parser.add_argument("--accept", action="store_true", help="write the table in spite of regressions")
    parser.add_argument("--bounds", action="store_true", help="bounds only, into the committed table")
    options = parser.parse_args(arguments)
    selected = [set(options.operators), set(options.targets), set(options.dtypes)]
    whole = selected == [set(CASES), set(TARGETS), set(DTYPES)]

    version = ".".join(triton.__version__.split(".")[:2])
    table = TABLES / f"triton-{version}.json"
    if not whole and options.out and options.out.exists() and read(options.out)[1]:
        parser.error(f"{options.out} is a whole table, which a part of the cases is not written over")
    bounds_before = read_bounds(table)
    if options.bounds:
        if not table.exists():
            parser.error(f"{table} is not there: a whole run makes it")
        return finish(table, version, *read(table), compute_bounds(bounds_before), bounds_before)
    committed = read(table)[0] if table.exists() else None
    if committed is not None:
        names = [(row, (row.operator, row.sm, row.dtype)) for row in committed]
        committed = {row: committed[row] for row, parts in names if all(p in s for p, s in zip(parts, selected))}

    rows = compile_all(options.operators, options.targets, options.dtypes, options.workers)

    if committed is None:
        print(f"Triton {version} has no table yet: {len(rows)} rows")
    else:
        changed = changes(rows, committed)
        print(*changed, f"Triton {version}: {len(rows)} rows, {len(changed)} changed", sep="\n")
    wrong = verdicts(rows, committed)
    print(*wrong, sep="\n") if wrong else print("nothing new is wrong")
    regressed = bool(wrong) and committed is not None

    out = options.out or (table if whole else None)
    if out is None:
        print(f"a part of the cases: {table} is left as it is")
    elif regressed and out == table and not options.accept:
        print(f"{table} is left as it is: --accept writes it in spite of regressions")
    else:
        finish(out, version, rows, whole, compute_bounds(bounds_before) if whole else {}, bounds_before)
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
