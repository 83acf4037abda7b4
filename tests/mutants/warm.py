"""A process that has imported what all tests do, and forks for every run of pytest: torch alone takes seconds.

Reads lines of JSON, [arguments, seconds, file for the output], and answers with exit codes: null where time ran out.
"""

import contextlib
import json
import os
import signal
import sys
import time

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, as tests/conftest.py has it


def run(arguments, limit, output):
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 3
        try:
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end, status = time.monotonic() + limit, None
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
        status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it started
    if status is None:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401

    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
