"""What a call costs the host, measured without a GPU: kernels are compiled for one, and launching them does nothing.

`python benchmarks/host.py`: DeiT-S at B=1, a line an operator (of), microseconds of one core's work:
  call      tokenops.x(...) without gradients
  grad      the same where autograd is told of it
  operator  the registered operator by itself: torch's dispatcher, and all of the next
  launcher  what is behind it, in Python: results, launch configuration, and the launch
  triton    the launch alone, by Triton's own way (kernel[grid](...))
A driver's launch (some 3 us) and torch's CUDA allocator are in none of them. Not to be run interpreted.
"""

import argparse
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import tokenops
from kernel_cases import SHARED_LIMIT, PretendDriver
from tokenops.ops import backends

COLUMNS = ("call", "grad", "operator", "launcher", "triton")


class IdleDriver(PretendDriver):
    """Loads every kernel and launches none."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_LIMIT[capability]},
            load_binary=lambda *binary: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any) -> None:
        pass


@contextmanager
def idle(capability: int = 90) -> Iterator[IdleDriver]:
    """In the block operators on CPU tensors launch Triton's kernels as on a GPU, and nothing runs."""
    pretended = IdleDriver(capability)
    with (
        patch.object(driver, "_active", pretended),
        patch.object(backends, "INTERPRETED", True),
        tokenops.use_backend("triton"),
    ):
        yield pretended


@contextmanager
def plain_launches() -> Iterator[list[tuple]]:
    """Yields (kernel, grid, args, kwargs) of what is launched in the block."""
    found: list[tuple] = []

    def noted(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: found.append((kernel, grid, args, kwargs))

    with patch.object(JITFunction, "__getitem__", noted):
        yield found


def calls(
    dtype: torch.dtype = torch.bfloat16, N: int = 196, M: int = 98, C: int = 384, H: int = 6, r: int = 13
) -> dict[str, tuple[Callable, tuple, dict]]:
    """Operator -> function, the tensors that may want gradients, and other arguments: one image, DeiT-S's sizes."""
    D, side = C // H, math.isqrt(N)
    random = partial(torch.randn, dtype=dtype)
    x = random(1, N + 1, C)
    q, k, v = random(1, N + 1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    index = torch.arange(M)[None]
    mlp = partial(torch.randn, dtype=torch.float32)  # the products in it are torch's, and run: they are kept small
    weights = mlp(16, 2), mlp(16), mlp(4, 16), mlp(4)
    return {
        "masked_channel_attention": (tokenops.masked_channel_attention, (q, k, v), {"scores": "class"}),
        "soft_aggregate": (tokenops.soft_aggregate, (x, random(1, N, M)), {"scale": random(1), "prefix": 1}),
        "token_mlp": (tokenops.token_mlp, (mlp(1, 2, 4), *weights), {}),
        "select_tokens": (tokenops.select_tokens, (x, torch.randn(1, N)), {"k": M, "rest": "weighted"}),
        "restore_tokens": (tokenops.restore_tokens, (x, random(1, M, C), index), {}),
        "merge_neighbours": (tokenops.merge_neighbours, (x,), {"grid": (side, side), "axis": "horizontal"}),
        "match_bipartite": (tokenops.match_bipartite, (random(1, N + 1, D),), {"r": r}),
        "merge_bipartite": (tokenops.merge_bipartite, (x, random(1, N + 1, D)), {"r": r}),
        "unmerge_bipartite": (tokenops.unmerge_bipartite, (x[:, : M + 1], torch.arange(N)[None] % M), {}),
    }


def microseconds(calls: dict[str, Callable[[], Any]], samples: int = 40, trips: int = 100) -> dict[str, float]:
    """Of each the least of the means of samples, taken in turn: others may use the machine."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(samples):
        for name, call in calls.items():
            call()
            began = time.thread_time()
            for _ in range(trips):
                call()
            least[name] = min(least[name], (time.thread_time() - began) / trips)
    return {name: value * 1e6 for name, value in least.items()}


def operators(call: Callable[[], Any]) -> list[tuple[Any, tuple]]:
    """The registered operators that a call runs, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "tokenops":
                found.append((operator, args))
            return operator(*args, **(kwargs or {}))

    with Noted():
        call()
    return found


def implementation(operator: Any) -> Callable[..., Any]:
    """The launcher behind a registered operator."""
    from tokenops.ops.schemas import MODULES

    name = operator._opname
    module = MODULES.get(("triton", name), name.rpartition("_")[0])
    return getattr(importlib.import_module(f"tokenops.ops.triton.{module}"), name)


def each(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def measured(function: Callable, tensors: tuple, options: dict) -> dict[str, float]:
    wanting = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    call = partial(function, *tensors, **options)

    def with_gradients():
        with torch.enable_grad():
            function(*wanting, **options)

    with torch.no_grad():
        ran = operators(call)
        with plain_launches() as launched:
            call()
        return microseconds(
            {
                "call": call,
                "grad": with_gradients,
                "operator": each([partial(operator, *args) for operator, args in ran]),
                "launcher": each([partial(implementation(operator), *args) for operator, args in ran]),
                "triton": each([partial(kernel[grid], *args, **kwargs) for kernel, grid, args, kwargs in launched]),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="*", default=list(calls()), choices=list(calls()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with idle():
        for name in options.operators:
            numbers = {column: round(us, 1) for column, us in measured(*calls()[name]).items()}
            print(json.dumps({"of": name, **numbers}), flush=True)


if __name__ == "__main__":
    main()
