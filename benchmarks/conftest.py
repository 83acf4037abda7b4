"""Options, the `compare` fixture of every benchmark, and where its rows go (measure.py says how times are taken)."""

from pathlib import Path

import pytest
import torch

import measure

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    group = parser.getgroup("tokenops")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--dtype", choices=tuple(measure.DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    group.addoption("--quick", action="store_true", help="tiny sizes, few rounds, no file by default: does it run?")
    group.addoption("--compile", default="main", choices=("none", "main", "all"), help="torch.compile peers to take")
    group.addoption("--threads", type=int, help="CPU threads; with 1, other work on the machine disturbs least")
    group.addoption("--results", type=Path, help="folder of the result files; default: benchmarks/results")


def pytest_configure(config):
    device, dtype = config.getoption("--device"), config.getoption("--dtype")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was asked for, but torch sees no GPU")
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    config.bench = measure.Bench(
        device, measure.DTYPES[dtype], config.getoption("--quick"), config.getoption("--compile")
    )


def pytest_terminal_summary(terminalreporter, config):
    bench, folder = config.bench, config.getoption("--results")
    if folder is None and not bench.quick:
        folder = RESULTS
    if not bench.rows:
        return
    terminalreporter.section(f"side by side on {bench.device}, {bench.dtype_name}")
    for line in bench.lines():
        terminalreporter.write_line(line)
    if folder is not None:
        terminalreporter.write_line(f"{len(bench.rows)} rows written to {bench.write(folder)}")


@pytest.fixture
def bench(request):
    """The session's settings, and what makes its inputs: see `measure.Bench`."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # every benchmark compiles its peers anew, none hits the recompilation limit
    return request.config.bench


@pytest.fixture
def compare(bench, benchmark):
    """compare(operator, shape=..., inputs=..., ours=..., peers=..., ...): see `measure.Bench.compare`."""

    def run(operator, **kwargs):
        row, once = bench.compare(operator, **kwargs)
        benchmark.group = f"{operator} {row['passes']}"
        benchmark.extra_info.update(row)
        # pytest-benchmark's own table: wall times of ours alone; the ratios are in extra_info and in the summary
        rounds = 2 if bench.quick or row["us"][0] > 1e5 else 10
        benchmark.pedantic(once, rounds=rounds, iterations=1, warmup_rounds=1)
        return row

    return run
