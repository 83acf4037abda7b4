"""warm_up: a model's kernels are compiled before its first use, several at a time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class WarmUp(NamedTuple):
    """What `warm_up` did.

    Attributes:
        kernels: how many Triton kernels it made ready, several at a time; 0 where the model launches none.
        seconds: how long all took.
        unforeseen: None; or why the model could not be followed to its end without running it (an operation that
            depends on data, say): kernels behind that point were compiled one after another, as without a warm-up.
    """

    kernels: int
    seconds: float
    unforeseen: str | None


def warm_up(
    model: Callable[..., Any], *inputs: Any, backward: bool | None = None, workers: int | None = None
) -> WarmUp:
    """Compile the Triton kernels of a model before its first use, several at a time, and run it once.

    A kernel is compiled when it is first launched, which takes about a second, and a whole model has a dozen. This
    follows the model without running it, compiles every kernel that it would launch, and then runs it once, so that
    everything else that a first call sets up is there too.

    Args:
        model: a module, or any function of ``inputs``. Modules' buffers and torch's random numbers are as before
            afterwards, and no gradients are left; what else a model keeps of a call is of the one call.
        inputs: what the model is called with: tensors as they will be, in shape, dtype, strides and device (other
            numbers of images can need other kernels). Autocast, ``use_backend`` and grad mode count as they are set
            around this call.
        backward: whether the backward pass is warmed up too; None: if the module is in training mode.
        workers: how many kernels are compiled at a time; None: one a processor, 16 at most.

    Returns:
        `WarmUp`: the number of kernels, the seconds, and why not all were foreseen. On a CPU no kernel is compiled, and
        the model only runs.

    Raises:
        TypeError: model cannot be called, backward is no bool, or workers is no int.
        ValueError: workers is below 1.

    What the model itself raises is raised.

    >>> warm_up(nn.Linear(4, 2), torch.randn(1, 4)).kernels
    0
    """
    if not callable(model):
        raise TypeError(f"warm_up: model must be callable, but got {type(model).__name__}")
    if backward is not None and not isinstance(backward, bool):
        raise TypeError(f"warm_up: backward must be a bool or None, but got {backward!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
        raise TypeError(f"warm_up: workers must be an int or None, but got {workers!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"warm_up: workers={workers}, but it must be at least 1")
    began, kernels = time.perf_counter(), 0
    backward = getattr(model, "training", False) if backward is None else backward
    parameters = [p for p in _of(model, "parameters") if p.requires_grad]
    wanted = [*parameters, *(t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad)]
    device = next((t.device for t in (*tree_leaves(inputs), *parameters) if isinstance(t, Tensor)), torch.device("cpu"))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), _undone(model, device):
        calls, unforeseen = _foreseen(model, inputs, wanted if backward else None)
        if calls:
            from .triton.ahead import compile_all

            kernels = compile_all(((name, _on_meta(given)) for name, given in calls), workers)
        _run(model, inputs, wanted if backward else None)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return WarmUp(kernels, time.perf_counter() - began, unforeseen)


class _Like(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Like":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def _on_meta(arguments: tuple) -> tuple:
    return tree_map_only(_Like, _Like.made, arguments, is_leaf=lambda a: isinstance(a, _Like))


class _Calls(TorchDispatchMode):
    """Keeps which of our operators run on Triton in the block, each kind of call once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[str, tuple]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "tokenops" and func._overloadname == "triton":
            call = func._opname, tree_map_only(Tensor, _Like.of, args)
            self.found[repr(call)] = call
        return func(*args, **(kwargs or {}))


def _foreseen(model: Any, inputs: tuple, wanted: list[Tensor] | None) -> tuple[list[tuple[str, tuple]], str | None]:
    """The calls of our operators on Triton in a pass that nothing computes, and why that did not get to its end."""
    unforeseen = None
    with FakeTensorMode(allow_non_fake_inputs=True), _Calls() as calls:
        try:
            _run(model, inputs, wanted)
        except Exception as error:
            unforeseen = f"{type(error).__name__}: {error}"
    return list(calls.found.values()), unforeseen


def _run(model: Any, inputs: tuple, wanted: list[Tensor] | None) -> None:
    """Forward, and where gradients are `wanted` backward, which leaves none behind."""
    with torch.enable_grad() if wanted else nullcontext():
        results = tree_leaves(model(*inputs))
        losses = [t.float().sum() for t in results if isinstance(t, Tensor) and t.requires_grad]
    if wanted and losses:
        torch.autograd.grad(sum(losses[1:], losses[0]), wanted, allow_unused=True)


@contextmanager
def _undone(model: Any, device: torch.device) -> Iterator[None]:
    """Buffers and random numbers are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in _of(model, "buffers")]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _of(model: Any, what: str) -> list[Tensor]:
    return list(getattr(model, what)()) if isinstance(model, nn.Module) else []
