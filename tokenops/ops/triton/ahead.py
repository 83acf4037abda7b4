"""Kernels compiled before they are launched, several at a time: what `tokenops.warm_up` does where Triton compiles."""

import importlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton import AsyncCompileMode

from ..schemas import MODULES
from .common import INTERPRETED


def compile_all(calls: Iterable[tuple[str, tuple]], workers: int | None = None) -> int:
    """How many kernels the calls launch, (operator, arguments on the meta device): they are loaded or compiled now.

    Python's lock is free during most of a compilation, so threads share the work. A kernel that does not compile says
    so when it is launched; interpreted ones are not compiled.
    """
    if INTERPRETED:
        return 0
    workers = workers or min(16, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool, ignore_errors=True) as mode:
        for name, arguments in calls:
            _launcher(name)(*arguments)
        return len(mode.future_kernels)


def _launcher(name: str) -> Any:
    module = importlib.import_module(f".{MODULES.get(('triton', name), name.rpartition('_')[0])}", __package__)
    return getattr(module, name)
