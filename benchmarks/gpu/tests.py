"""The tests of the device, spread over the cores; gpu/outcomes.py notes each outcome as it falls."""

import importlib.util
import sys

from . import options, processes

#: what a rehearsal takes of the tests: one file of an operator
FILE = "tests/ops/test_restore_tokens.py"


def main() -> int:
    device = options(__doc__).device
    rehearsal = device == "cpu"
    command = processes.python("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu.outcomes")
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "2" if rehearsal else "14", "--dist", "worksteal", "--max-worker-restart", "50"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=60", "--timeout-method=thread"]
    command += ["--device", device]
    process = processes.start([*command, FILE, "-m", "not slow"] if rehearsal else [*command, "tests"])
    code = process.wait()
    return 0 if code in (0, 1) else code  # failed tests have their lines


if __name__ == "__main__":
    sys.exit(main())
