"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("", "benchmarks", "tests"))


def python(*arguments, **environment):
    """What it prints; one that fails is a failure of the test. It does not interpret Triton unless told to."""
    settings = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment}
    given = [str(argument) for argument in arguments]
    environment = {name: str(value) for name, value in (os.environ | settings).items() if value is not None}
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
