"""Sessions of pytest over the benchmarks, begun again where an error of the device has ended one."""

import importlib.util
import subprocess

from . import processes, record

FOLDER = processes.ROOT / "benchmarks"
MODELS = str(FOLDER / "bench_models.py")
OPERATORS = tuple(str(path) for path in sorted(FOLDER.glob("bench_*.py")) if str(path) != MODELS)
FINISHED = (0, 5)  # exit codes: all were run (conftest.py: those that failed too), there were none


def command(step: str, device: str, *arguments: str, timeout: int = 100) -> list[str]:
    """A session whose rows are lines of the step; a benchmark that takes longer than the timeout ends it."""
    extra = ["--quick"] if device == "cpu" else []
    if importlib.util.find_spec("pytest_timeout"):
        extra += [f"--timeout={timeout}", "--timeout-method=thread"]
    base = processes.python("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    return [*base, "--device", device, "--lines", step, *extra, *arguments]


def run(step: str, *commands: list[str]) -> None:
    """All at once; each again as long as it is ended early, but has found something since it began."""
    lines = record.lines(step)
    running = {i: processes.start(command) for i, command in enumerate(commands)}
    before = {i: len(lines.read(step)) for i in running}
    while running:
        for i, process in list(running.items()):
            try:
                code = process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            del running[i]
            if code in FINISHED:
                continue
            now = len(lines.read(step))
            said = f"exit code {code} of {' '.join(commands[i][-4:])}"
            lines.write(f"session {i} ended", record.FAILED, message=said)
            if now > before[i]:
                running[i], before[i] = processes.start(commands[i]), now + 1
