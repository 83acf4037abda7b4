"""pytest -p gpu.outcomes: each test's outcome is a line of the run the moment it is known, and tests that are done are
not run again.

A kernel that reads or writes where it may not leaves its process without a GPU: whatever is asked of it fails from then
on. Such a process ends as soon as its test is reported, and pytest-xdist puts another in its place.
"""

import contextlib
import functools
import os
import time

import pytest

from gpu import record

LINES_OF_A_FAILURE = 12
STICKY = "sticky"


def gpu_fault() -> str | None:
    """What the GPU has to say of what was asked of it so far; None where it works."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda")  # after a capture that broke the generator believes that it goes on
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


class Faults:
    """In a process that runs tests on a GPU: whose fault it is, and the end after one."""

    def __init__(self, config):
        self.config, self.fault = config, None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        result = yield
        fault = gpu_fault()
        if fault is not None:  # launches are asynchronous: said here, it is said of the right test
            raise RuntimeError(fault)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and self.fault is None:
            self.fault = gpu_fault()
        if report.failed and self.fault is not None:
            report.user_properties.append((STICKY, self.fault))
        return report

    @pytest.hookimpl(trylast=True)  # after the report was sent, or its line written
    def pytest_runtest_logfinish(self, nodeid):
        if self.fault is not None:
            os._exit(3)


def heard(send):
    """Telling a process something that it need not live to hear: pytest-xdist finds it dead, and replaces it."""

    @functools.wraps(send)
    def tell(name, **what):
        with contextlib.suppress(OSError):  # what pytest-xdist suppresses itself for "shutdown" alone
            send(name, **what)

    return tell


class Outcomes:
    """In the process that sees every report: a line a test."""

    def __init__(self, lines):
        self.lines, self.done = lines, lines.done()
        self.reports, self.began, self.written = {}, {}, set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        # also that of a process that replaces another: pytest-xdist wants them all to have the same tests
        node.workerinput["tests_done"] = sorted(self.done)
        node.sendcommand = heard(node.sendcommand)

    def pytest_runtest_logstart(self, nodeid):
        self.began[nodeid] = time.perf_counter()

    def pytest_runtest_logreport(self, report):
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when not in ("setup", "call", "teardown"):  # pytest-xdist's, of a process that died
            self.write(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        self.write(nodeid)

    def write(self, nodeid):
        reports = self.reports.pop(nodeid, [])
        if nodeid in self.written or not reports:
            return
        self.written.add(nodeid)
        told = [r for outcome in ("failed", "skipped") for r in reports if r.outcome == outcome]
        outcome = {"failed": record.FAILED, "skipped": record.SKIPPED}[told[0].outcome] if told else record.OK
        seconds = sum(getattr(r, "duration", 0.0) for r in reports)
        if reports[-1].when not in ("setup", "call", "teardown") and nodeid in self.began:
            seconds = time.perf_counter() - self.began[nodeid]
        values = {"seconds": round(seconds, 3)}
        if told:
            values["message"] = message_of(told[0])
        self.lines.write(nodeid, outcome, **values)


def message_of(report) -> str:
    """Why a test failed or was skipped, in few lines."""
    if report.skipped:
        return str(report.longrepr[2])  # file, line, why
    text = report.longreprtext.splitlines()
    errors = [line[1:].strip() for line in text if line.startswith("E ")] or text
    where = getattr(getattr(report.longrepr, "reprcrash", None), "path", None)
    found = errors[-LINES_OF_A_FAILURE:]
    found += [f"{where}:{report.longrepr.reprcrash.lineno}"] if where else []
    if report.when != "call":
        found.insert(0, f"in {report.when}" if report.when in ("setup", "teardown") else "its process died")
    faults = [value for name, value in report.user_properties if name == STICKY]
    return "\n".join([*(f"{STICKY}: {fault}" for fault in faults), *found])


def pytest_configure(config):
    worker = hasattr(config, "workerinput")
    if not worker:
        config.pluginmanager.register(Outcomes(record.lines("tests")), "outcomes")
    if config.getoption("--device", None) == "cuda":
        config.pluginmanager.register(Faults(config), "faults")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        done = set(config.workerinput["tests_done"])
    else:
        done = config.pluginmanager.get_plugin("outcomes").done
    again = [item for item in items if item.nodeid in done]
    config.hook.pytest_deselected(items=again)
    items[:] = [item for item in items if item.nodeid not in done]
