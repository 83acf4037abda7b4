"""What is compared: sizes, the sides of a comparison and their calls, and whether two sides agree."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenops import use_backend

if TYPE_CHECKING:
    from measure import Bench

PASSES = ("forward", "forward+backward")
RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


#: images by the name of a batch: on a GPU, on a CPU (where the middle one would tell nothing new)
BATCHES = {"cuda": {"batch": 256, "middle": 32, "single": 1}, "cpu": {"batch": 16, "single": 1}}


class Size(NamedTuple):
    """An operator's size: DeiT's 196 tokens slimmed to 98 at one width, for one of the batches."""

    C: int
    batch: str = "batch"
    main: bool = False

    def of(self, bench: "Bench") -> tuple[int, int, int, int]:
        """B, N, M, C."""
        return bench.batch(self.batch), *((24, 12, self.C // 12) if bench.quick else (196, 98, self.C))

    def __str__(self) -> str:
        return f"{self.batch}-C{self.C}"


SIZES = (Size(384, main=True), Size(384, "single"), Size(384, "middle"), Size(192), Size(768))


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors, each counted once."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Comparison(NamedTuple):
    """One operator, or model, at one size: what is done and by whom. `Bench.compare` says what the fields mean."""

    operator: str
    shape: Mapping[str, int]
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]]
    bytes: int
    flops: int
    passes: str = "forward"
    peer_flops: Mapping[str, int] = {}
    device_time: bool = True
    truth: Callable[..., Any] | None = None
    errors: bool = False
    tolerance: float | None = None
    steady: bool = False

    @property
    def op(self) -> str:
        """The operator as tokenops has it; of a model, its name."""
        return {"attention": "masked_channel_attention", "attention,": "masked_channel_attention"}.get(
            first := self.operator.split()[0], first
        )

    def calls(self, side: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
        """A call of a side on these inputs: () -> (results, gradients)."""
        return {"forward": forward, "forward+backward": forward_backward}[self.passes](side, tensors)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def forward(side: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """A call that gives the results, and no gradients."""

    @torch.no_grad()
    def call():
        return as_tuple(side(*tensors)), ()

    return call


def forward_backward(side: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """A call that gives the results, and the gradients of the inputs for one of the first result, the same for every
    side."""
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    leaves = [t for t in tensors if t.requires_grad]
    with torch.no_grad():
        like = as_tuple(side(*tensors))[0]
    generator = torch.Generator(like.device).manual_seed(0)
    dy = torch.randn(like.shape, dtype=torch.bfloat16, device=like.device, generator=generator).to(like.dtype)

    def call():
        results = as_tuple(side(*tensors))
        gradients = torch.autograd.grad(results[0], leaves, dy, allow_unused=True)
        return tuple(result.detach() for result in results), gradients

    return call


def on(backend: str, side: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors):
        with use_backend(backend):
            return side(*tensors)

    return call


def named(found: tuple[Sequence[Any], Sequence[Any]]) -> dict[str, Tensor | None]:
    """Results and gradients under names."""
    results = {f"result {i}": x if x.is_floating_point() else None for i, x in enumerate(found[0])}
    return results | {f"gradient {i}": x for i, x in enumerate(found[1])}


def relative(found: Tensor, right: Tensor) -> float:
    """Relative L2 error; a NaN in it stays one."""
    if found.shape != right.shape:
        return math.inf
    right = right.double()
    return ((found.double() - right).norm() / right.norm().clamp_min(1e-30)).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that elements which no kernel wrote are seen."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def assert_close(what: str, theirs: Any, ours: Any, tolerance: float) -> None:
    """A fast wrong answer is not worth timing. (What is right, the tests decide, with far narrower tolerances.)"""
    # results that only one side gives, and gradients of inputs that only some sides take, are not compared
    pairs = [*zip(theirs[0], ours[0]), *zip(theirs[1], ours[1], strict=True)]
    for i, (a, b) in enumerate(pairs):
        if a is None or b is None:
            continue
        if (
            a.shape == b.shape and a.numel() == 1
        ):  # a scale's gradient cancels to less than a peer's low precision holds
            continue
        error = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)
        if a.shape != b.shape or not error <= tolerance:
            raise AssertionError(f"{what} and ours differ in result {i}: {a.shape}, {b.shape}, relative L2 {error:.1e}")
