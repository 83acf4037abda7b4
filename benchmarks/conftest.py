"""Options, the `compare` fixture of every benchmark, and where its rows go (measure.py says how times are taken)."""

import os
from pathlib import Path

import pytest
import torch

import measure
from comparison import BATCHES
from gpu import record

RESULTS = Path(__file__).parent / "results"
STICKY = 3  # exit code of a session that an error of the device has ended


def pytest_addoption(parser):
    group = parser.getgroup("tokenops")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--dtype", choices=tuple(measure.DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    group.addoption("--quick", action="store_true", help="tiny sizes, few rounds, no file by default: does it run?")
    group.addoption("--compile", default="main", choices=("none", "main", "all"), help="torch.compile peers to take")
    group.addoption("--threads", type=int, help="CPU threads; with 1, other work on the machine disturbs least")
    group.addoption("--results", type=Path, help="folder of the result files; default: benchmarks/results")
    group.addoption(
        "--do",
        default="measure",
        choices=("measure", "check", "compile"),
        help="measure; or check every backend against fp64; or only compile the peers that are compiled",
    )
    group.addoption("--lines", metavar="STEP", help="rows become lines of this step of an evidence run, as they come")


def pytest_configure(config):
    device, dtype = config.getoption("--device"), config.getoption("--dtype")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was asked for, but torch sees no GPU")
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    step = config.getoption("--lines")
    config.bench = measure.Bench(
        device,
        measure.DTYPES[dtype],
        config.getoption("--quick"),
        config.getoption("--compile"),
        config.getoption("--do"),
        record.lines(step) if step else None,
    )


def pytest_collection_modifyitems(config, items):
    """What its module does not ask for goes; the most telling come first: the main sizes, a single image and few of
    them, then the others."""

    def params_of(item):
        return item.callspec.params if hasattr(item, "callspec") else {}

    def asked(item):
        params = params_of(item)
        if any(getattr(p, "batch", "batch") not in BATCHES[config.bench.device] for p in params.values()):
            return False
        of_module = getattr(item.module, "asked", None)
        return of_module is None or of_module(config.bench, **params)

    def priority(item):
        params = params_of(item)
        of_module = getattr(item.module, "priority", None)
        if of_module:
            return of_module(**params)
        said = [getattr(p, "batch", None) for p in params.values()]
        main = any(getattr(p, "main", False) for p in params.values())
        return (0 if main else 1 if "single" in said else 2 if "middle" in said else 3,)

    config.hook.pytest_deselected(items=[item for item in items if not asked(item)])
    items[:] = sorted(filter(asked, items), key=priority)
    # pytest-xdist cuts the list into as many pieces as there are processes: each piece begins with what is telling
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [item for first in reversed(range(processes)) for item in items[first::processes]]


def key(item):
    return f"{item.nodeid} {item.config.bench.dtype_name}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """In an evidence run: a line before, so that one which is found last says what ended the session."""
    bench = item.config.bench
    if bench.lines and key(item) not in bench.tried:
        bench.lines.write(key(item), record.STARTED)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    bench = item.config.bench
    if bench.lines and report.failed:
        bench.lines.write(key(item), record.FAILED, message=f"{call.excinfo.typename}: {call.excinfo.value}")
        try:
            bench.clock.check()
        except RuntimeError as error:
            bench.lines.write(key(item), record.FAILED, message=f"the device is lost: {error}")
            os._exit(STICKY)
    elif bench.lines and call.when == "call" and key(item) not in bench.tried:
        said = {"message": str(call.excinfo.value)} if report.skipped else {}
        bench.lines.write(key(item), record.SKIPPED if report.skipped else record.OK, **said)
    return report


def pytest_sessionfinish(session, exitstatus):
    """In an evidence run what failed has its line, and 1 is what pytest-timeout ends a session with."""
    if session.config.bench.lines and exitstatus == pytest.ExitCode.TESTS_FAILED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter, config):
    bench, folder = config.bench, config.getoption("--results")
    if folder is None and not bench.quick:
        folder = RESULTS
    if not (bench.rows or bench.refused) or bench.task != "measure" or bench.lines:
        return
    terminalreporter.section(f"side by side on {bench.device}, {bench.dtype_name}")
    for line in bench.text():
        terminalreporter.write_line(line)
    if folder is not None and bench.rows:
        terminalreporter.write_line(f"{len(bench.rows)} rows written to {bench.write(folder)}")


@pytest.fixture
def fresh():
    """Every benchmark compiles its peers anew, none hits the recompilation limit."""
    torch._dynamo.reset()


@pytest.fixture
def bench(request, fresh):
    """The session's settings, and what makes its inputs: see `measure.Bench`."""
    torch.manual_seed(0)
    bench = request.config.bench
    if key(request.node) in bench.tried:
        pytest.skip("an earlier session of this run has tried it, and its line says how it ended")
    return bench


@pytest.fixture
def compare(bench, request):
    """compare(operator, shape=..., inputs=..., ours=..., peers=..., ...): see `measure.Bench.compare`."""

    def run(operator, **kwargs):
        row = bench.compare(operator, **kwargs)
        if bench.task != "measure" or bench.lines:
            return row
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = f"{operator} {row['passes']}"
        benchmark.extra_info.update(row)
        # pytest-benchmark's own table: wall times of ours alone; the ratios are in extra_info and in the summary
        rounds = 2 if bench.quick or row["us"][0] > 1e5 else 10
        benchmark.pedantic(bench.once, rounds=rounds, iterations=1, warmup_rounds=1)
        return row

    return run
