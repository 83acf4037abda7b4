"""Runs the tests on kernels that are wrong on purpose, one mutation at a time; those that no test notices survive.

python tests/mutants/run.py [pattern ...] [--jobs N] [--list] [--out FILE]; a pattern is a part of a mutant's name.
Every mutant runs in a copy of the tree, which has to pass the same tests unmutated first; one whose tests find no end
is killed too. One that does not apply or compile is an error of the list. Exit code 1 if any survives, 2 on errors.
"""

import argparse
import contextlib
import fnmatch
import functools
import importlib.util
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mutants import Mutant  # noqa: E402
from mutants.listed import MUTANTS  # noqa: E402

NEEDED = ("tokenops", "csrc", "tests", "benchmarks", "pyproject.toml", "setup.py")
FOLDERS = ("csrc/cuda", "csrc/cpu", "tokenops/ops/triton")  # compiled ones first: they take longest
LIBRARY = "tokenops/_C.abi3.so"
LIMIT = 600.0  # seconds of a mutant's tests

#: whose tests notice what is wrong in a file that no operator is named after: modules tests/ops/test_NAME*.py
OPERATORS = {
    "csrc/cpu/attention*": ("attention_amx", "masked_channel_attention"),
    "csrc/cpu/avx512.h": ("attention_amx", "soft_aggregate", "token_mlp"),
    "csrc/cpu/bfloat16.h": ("masked_channel_attention", "merge_neighbours"),
    "csrc/cpu/choice.h": ("select_tokens",),
    "csrc/cpu/isa.*": ("attention_amx", "masked_channel_attention", "soft_aggregate", "token_mlp"),
    "csrc/cpu/match_bipartite.cpp": ("merge_bipartite",),
    "csrc/cpu/match_tiles.h": ("merge_bipartite",),
    "csrc/cpu/rows.h": ("merge_neighbours", "restore_tokens", "select_tokens"),
    "csrc/cpu/soft_aggregate*": ("soft_aggregate",),
    "csrc/cpu/tile*": ("attention_amx", "soft_aggregate", "token_mlp"),
    "csrc/cpu/token_mlp*": ("token_mlp",),
    "csrc/cpu/vector_rows.h": ("merge_neighbours",),
    "tokenops/ops/triton/ahead.py": ("host",),
    "tokenops/ops/triton/launch.py": ("host",),
    "tokenops/ops/triton/common.py": ("masked_channel_attention", "merge_neighbours", "soft_aggregate"),
    "tokenops/ops/triton/masked_channel_attention*.py": ("masked_channel_attention", "launches"),
    "tokenops/ops/triton/match_bipartite.py": ("merge_bipartite",),
    "tokenops/ops/triton/attention_arguments.py": ("masked_channel_attention", "launches"),
    "tokenops/ops/triton/sequences.py": ("masked_channel_attention_packed",),
    "tokenops/ops/triton/match_packed.py": ("merge_bipartite_packed",),
}
#: which tests of the emulation do, as pytest -k has it
EMULATED = {
    "choose.cuh": "select_tokens",
    "companions.cuh": "restore_tokens",
    "match_bipartite.cuh": "bipartite and match",
    "merge_bipartite.cuh": "bipartite and not match",
    "merge_neighbours.cuh": "merge_neighbours",
    "mma.cuh": "tensor_cores or match",
    "numbers.cuh": "merge_neighbours",
    "pairs.cuh": "merge_neighbours",
    "restore_tokens.cuh": "restore_tokens",
    "rows.cuh": "bipartite and not match",
    "select_tokens.cuh": "select_tokens",
    "sum_rows.cuh": "sum_rows",
}
#: and which of an operator's do for a CPU, whatever instruction set they run by
NATIVE = "native or composed or amx or on_tiles or instruction_set"


def folder_of(mutant):
    return str(Path(mutant.file).parent)


def suite(mutant):
    """(modules of tests, -k) of all that covers the mutant's file."""
    path = Path(mutant.file)
    if folder_of(mutant) == "csrc/cuda":
        return ("test_emulation*.py",), EMULATED[path.name]
    found = [names for pattern, names in OPERATORS.items() if fnmatch.fnmatch(mutant.file, pattern)]
    names = found[0] if found else (path.stem,)
    names = *names, *["every_operator"] * ("every_operator" in mutant.tests)
    return tuple(f"test_{name}*.py" for name in names), NATIVE if path.suffix != ".py" else "triton"


def expression(mutant):
    every = suite(mutant)[1]
    return f"({every}) and ({mutant.tests})" if mutant.tests else every


class Result(NamedTuple):
    mutant: Mutant
    verdict: str  # killed, survived or error
    reason: str
    seconds: float


class Broken(Exception):
    """The list, or the tree that it is about, is not in order."""


def mutated(mutant, text):
    count = text.count(mutant.before)
    if count != 1:
        raise Broken(f"{mutant.file} has {mutant.before!r} {count} times")
    return text.replace(mutant.before, mutant.after)


def command(arguments, cwd, **environment):
    """(exit code, output)"""
    arguments, environment = [str(argument) for argument in arguments], {**os.environ, **environment}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout + done.stderr


def compiled(arguments, cwd):
    code, output = command(arguments, cwd)
    if code:
        raise Broken(f"does not compile: {errors(output) or output[-500:]}")


def errors(output):
    """What a compiler had against it (sanitizers say "runtime error"), or Python against a name."""
    return "; ".join(re.findall(r"\S+:\d+:\d+: (?:fatal )?error: .*|NameError: .*", output)[:3])


class Library:
    """setup.py's commands for the CPU library, of which each object can be made again by itself."""

    def __init__(self, tree, folder, jobs):
        self.folder = folder
        os.environ |= {"TOKENOPS_BUILD": "cpu", "TOKENOPS_BUILD_CACHE": ""}  # every object is made
        commands = self.commands_of(tree)
        self.link, self.objects = commands[-1], {Path(c[c.index("-c") + 1]): c for c in commands[:-1]}
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda c: compiled(c, tree), self.objects.values()))
        compiled(self.link, tree)

    def commands_of(self, tree):
        """What setup.py would run in the tree, and the note it would leave there."""
        import setuptools

        spec = importlib.util.spec_from_file_location("tokenops_setup", tree / "setup.py")
        module, commands = importlib.util.module_from_spec(spec), []
        before, setuptools.setup, here = setuptools.setup, lambda **options: None, Path.cwd()
        try:
            os.chdir(tree)
            spec.loader.exec_module(module)
            self.info = module.plan.info()
            module.run = commands.append
            build = types.SimpleNamespace(get_ext_fullpath=lambda name: self.folder / "base.so", build_temp=self.folder)
            build.compile = functools.partial(module.Build.compile, build)
            module.Build.build_extension(build, types.SimpleNamespace(name="tokenops._C"))
        finally:
            os.chdir(here)
            setuptools.setup = before
        return commands

    def install(self, tree):
        shutil.copy(self.folder / "base.so", tree / LIBRARY)
        (tree / "tokenops/_build_info.json").write_text(json.dumps(self.info))

    def rebuild(self, tree, file):
        """The tree's library, of the objects that `file` is a part of as they are there and the others as they were."""
        link = [tree / LIBRARY if part == self.folder / "base.so" else part for part in self.link]
        for source, make in self.objects.items():
            if file in includes(tree / source, tree):
                old = make[-1]
                new = tree / old.name
                compiled([*make[:-1], new], tree)
                link = [new if part == old else part for part in link]
        compiled(link, tree)


def includes(source, tree):
    """Which files of the tree the source is made of, itself among them."""
    found, new = set(), [source.resolve()]
    while new:
        path = new.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(), re.M)
            new += [(path.parent / name).resolve() for name in names]
    return {str(path.relative_to(tree.resolve())) for path in found}


class Tests:
    """pytest in a tree, by a process that stays."""

    def __init__(self, tree):
        self.tree, self.output = tree, tree / "output"
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        warm = [sys.executable, tree / "tests/mutants/warm.py"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(warm, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, modules, expression, limit):
        """(exit code, output), None for a code where it ran out of time; the first failure ends it."""
        found = {file for pattern in modules for file in (self.tree / "tests/ops").glob(pattern)}
        arguments = [
            "-x",
            "-q",
            "--tb=short",
            "-m",
            "not slow",
            *sorted(str(file.relative_to(self.tree)) for file in found),
        ]
        job = [*arguments, "-k", expression], limit, str(self.output)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        return code, self.output.read_text(errors="replace")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def copy(folder):
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    code, output = command(
        [sys.executable, "-c", "import tokenops; print(tokenops.__file__)"], folder, PYTHONPATH=folder
    )
    if code or Path(output.strip().splitlines()[-1]).parent != folder / "tokenops":
        raise Broken(f"the copy's tokenops is not what is imported there, but {output}")
    return folder


stamps = itertools.count(10**9)


def write(path, text):
    """With a time of its own, by which Python and caches see that it changed."""
    path.write_text(text)
    stamp = next(stamps)
    os.utime(path, (stamp, stamp))


def judge(mutant, tests, library, limit):
    """(verdict, reason)"""
    tree = tests.tree
    path, text = tree / mutant.file, (ROOT / mutant.file).read_text()
    changed = mutated(mutant, text)
    if path.suffix == ".py":
        try:
            compile(changed, mutant.file, "exec")
        except SyntaxError as error:
            raise Broken(f"does not compile: {error}") from None
    try:
        write(path, changed)
        if folder_of(mutant) == "csrc/cpu":
            library.rebuild(tree, mutant.file)
        code, output = tests(suite(mutant)[0], expression(mutant), limit)
    finally:
        write(path, text)
        if folder_of(mutant) == "csrc/cpu":
            library.install(tree)
    if code is None:
        return "killed", f"out of time: {limit:.0f} s"
    if code == 0:
        return "survived", ""
    if code < 0:
        return "killed", f"the tests crashed: {signal.Signals(-code).name}"
    if errors(output):
        raise Broken(f"does not compile: {errors(output)}")
    if code != 1:
        raise Broken(f"the tests did not run: {output[-500:]}")
    return "killed", next(iter(re.findall(r"^(?:FAILED|ERROR) (.*)", output, re.M)), output[-200:])


def baselines(mutants):
    """(modules, -k) of all tests that these mutants rely on."""
    groups = defaultdict(list)
    for mutant in mutants:
        groups[suite(mutant)].append(mutant.tests)
    for (modules, every), narrower in groups.items():
        some = " or ".join(f"({tests})" for tests in sorted(set(narrower)))
        yield modules, f"({every}) and ({some})" if all(narrower) else every


class Progress:
    """A bar, where rich is installed and someone looks."""

    def __init__(self, total):
        self.bar = None
        with contextlib.suppress(ImportError):
            import rich.progress

            columns = rich.progress.Progress.get_default_columns()
            console = rich.console.Console(stderr=True)
            self.bar = rich.progress.Progress(*columns, console=console, disable=not console.is_terminal)
            self.task = self.bar.add_task("mutants", total=total)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.bar:
            self.bar.stop()

    def step(self):
        if self.bar:
            self.bar.advance(self.task)


def run(mutants, jobs=2, limit=LIMIT, out=None):
    """The results, in the order of the mutants."""
    mutants = list(mutants)
    order = sorted(mutants, key=lambda mutant: FOLDERS.index(folder_of(mutant)))
    with contextlib.ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-"))).resolve()
        pool, free = stack.enter_context(ThreadPoolExecutor(jobs)), queue.Queue()
        trees = [copy(room / f"tree{number}") for number in range(jobs)]
        library = None
        if any(folder_of(mutant) == "csrc/cpu" for mutant in mutants):
            (room / "objects").mkdir()
            library = Library(trees[0], room / "objects", jobs)
            for tree in trees:
                library.install(tree)
        for tree in trees:
            free.put(stack.enter_context(contextlib.closing(Tests(tree))))

        @contextlib.contextmanager
        def one_of_the_trees():
            tests = free.get()
            try:
                yield tests
            finally:
                free.put(tests)

        def check(selection):
            with one_of_the_trees() as tests:
                code, output = tests(*selection, 6 * limit)
            if code != 0:
                raise Broken(f"the tests fail without any mutation ({selection[1]}): {output[-3000:]}")

        def verdict(mutant):
            start = time.monotonic()
            with one_of_the_trees() as tests:
                try:
                    found = judge(mutant, tests, library, limit)
                except Broken as error:
                    found = "error", str(error)
            return Result(mutant, *found, round(time.monotonic() - start, 1))

        list(pool.map(check, baselines(order)))
        results = {}
        with Progress(len(order)) as progress:
            for future in as_completed([pool.submit(verdict, mutant) for mutant in order]):
                result = future.result()
                results[result.mutant] = result
                progress.step()
                if out:
                    line = result._asdict() | {"mutant": str(result.mutant)}
                    with open(out, "a") as file:
                        print(json.dumps(line), file=file)
        return [results[mutant] for mutant in mutants]


def summary(results):
    of = defaultdict(list)
    for result in results:
        of[result.verdict].append(result)
    late = sum(result.reason.startswith("out of time") for result in of["killed"])
    lines = [
        f"{len(results)} mutants: {len(of['killed'])} killed{f' ({late} by time-out)' * bool(late)}, "
        f"{len(of['survived'])} survived, {len(of['error'])} errors"
    ]
    lines += [f"{r.verdict}: {r.mutant} {r.reason}".rstrip() for kind in ("survived", "error") for r in of[kind]]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", metavar="pattern", help="a part of what --list prints (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree at work (default: 2)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a mutant's tests (default: 600)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--out", help="append results to this file, a JSON object a line")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.patterns or any(pattern in str(m) for pattern in options.patterns)]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    try:
        results = run(chosen, options.jobs, options.limit, options.out)
    except Broken as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(results))
    verdicts = {result.verdict for result in results}
    return 1 if "survived" in verdicts else 2 if "error" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
