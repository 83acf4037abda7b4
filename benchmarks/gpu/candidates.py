"""What the sweep tries: configurations of the matrix kernels at sizes of real models, and how one is launched."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

Config = dict[str, int]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Size(NamedTuple):
    """Images, tokens behind the class token, slots, channels, heads and their channels."""

    B: int
    N: int
    M: int
    C: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} N{self.N} M{self.M} C{self.C}"


DEIT_S = Size(256, 196, 98, 384, 6, 64)
DEIT_S_ALONE = DEIT_S._replace(B=1)
DEIT_S_EDGES = DEIT_S._replace(B=4), DEIT_S._replace(B=64)  # of few and of many images
WIDE = Size(256, 196, 98, 768, 12, 64), Size(256, 196, 98, 1024, 16, 64)  # ViT-B, ViT-L
TINY = Size(2, 6, 4, 8, 1, 8)


def _random(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def soft_aggregate(size: Size, dtype: torch.dtype, device: str, backward: bool) -> Callable[[], tuple]:
    from tokenops.ops.triton.soft_aggregate import soft_aggregate_bwd, soft_aggregate_fwd

    random = partial(_random, dtype=dtype, device=device)
    x, w, scale = random(size.B, size.N + 1, size.C), random(size.B, size.N, size.M), random(1)
    forward = partial(soft_aggregate_fwd, x, w, scale, 1.0, None, 1)
    if not backward:
        return forward
    y, stats = forward()
    return partial(soft_aggregate_bwd, torch.randn_like(y), x, w, scale, 1.0, None, y, stats, 1)


def token_mlp(size: Size, dtype: torch.dtype, device: str, backward: bool) -> Callable[[], tuple]:
    from tokenops.ops.triton.token_mlp import token_mlp_bwd, token_mlp_fwd

    random, R = partial(_random, dtype=dtype, device=device), 4 * size.N
    z, w1, w2 = random(size.B, size.M, size.C), random(R, size.M) / size.M**0.5, random(size.N, R) / R**0.5
    b1, b2 = random(R), random(size.N)
    if not backward:
        return lambda: (token_mlp_fwd(z, w1, b1, w2, b2),)
    return partial(token_mlp_bwd, random(size.B, size.N, size.C), z, w1, b1, w2)


def attention(size: Size, dtype: torch.dtype, device: str, backward: bool, scores: str) -> Callable[[], tuple]:
    from tokenops.ops.triton.masked_channel_attention import masked_channel_attention_fwd
    from tokenops.ops.triton.masked_channel_attention_bwd import masked_channel_attention_bwd

    qkv = _random(size.B, size.N + 1, 3 * size.H * size.D, dtype=dtype, device=device)
    q, k, v = qkv.unflatten(-1, (3, size.H, size.D)).permute(2, 0, 3, 1, 4).unbind(0)
    nothing, scale = (None,) * 4, size.D**-0.5
    forward = partial(masked_channel_attention_fwd, q, k, v, *nothing, scale, scores, False, False)
    if not backward:
        return forward
    out, score, lse, _ = forward()
    gradients = torch.randn_like(out), torch.randn_like(score), None
    return partial(masked_channel_attention_bwd, *gradients, q, k, v, *nothing, out, lse, scale, scores, False)


class Kernel(NamedTuple):
    """How a kernel is launched, and what is tried: for many images and for one, beside the launcher's own."""

    module: str  # of tokenops.ops.triton, which has the launcher and the kernel
    symbol: str
    call: Callable[[Size, torch.dtype, str], Callable[[], tuple]]
    sizes: Callable[[Size], tuple[int, ...]]  # as launches.KERNELS names them
    many: tuple[Config, ...]
    few: tuple[Config, ...]
    summed: int | None = None  # the argument whose sum over its first dimension belongs to the work


def configs(text: str) -> tuple[Config, ...]:
    """Candidates: tiles by the letter of their size, w for warps, s for stages."""
    names = {"w": "num_warps", "s": "num_stages"}
    return tuple(
        {names.get(word[0], f"BLOCK_{word[0]}"): int(word[1:]) for word in one.split()} for one in text.split(",")
    )


def _aggregate(s: Size) -> tuple[int, ...]:
    return s.N, s.M, s.C


def _mlp(s: Size) -> tuple[int, ...]:
    return s.M, 4 * s.N, s.C


def _heads(s: Size) -> tuple[int, ...]:
    return s.N + 1, s.N + 1, s.D, s.D


#: in order of the gain expected
KERNELS = {
    "masked_channel_attention_fwd": Kernel(
        "masked_channel_attention",
        "masked_channel_attention_fwd_kernel",
        partial(attention, backward=False, scores="class"),
        _heads,
        many=configs(
            "M128 w8, M128 w4, s2, s4, N32, N32 s4, M128 N32 w4, M128 N32 w8, N128 s2, M128 N128 w8 s2, M32 w2"
        ),
        few=configs("M16, M16 w2, M16 s2, M16 N32 w2, M32, M32 w2, M32 N128 s2, s2, w8"),
    ),
    "soft_aggregate_fwd": Kernel(
        "soft_aggregate",
        "soft_aggregate_fwd_kernel",
        partial(soft_aggregate, backward=False),
        _aggregate,
        many=configs("M128 w8, M128 w8 s3, M128 w8 C32, s3, C32, C32 s3, C128, w8, M32, M32 C128, N64 C128 s3"),
        few=configs("w2, C16, C16 w2, C64, M32, M32 C16, M32 C64 w8, M64 C16, M64, s3, N64 s3"),
    ),
    "token_mlp_fwd": Kernel(
        "token_mlp",
        "token_mlp_kernel",
        partial(token_mlp, backward=False),
        _mlp,
        many=configs("C64, C64 s2, C64 R128, C64 R128 w8, C256 w8, R128 w8, w8, s2, s3, M64 s2, M32 s3"),
        few=configs("C64, C32, C64 w2, R32, R32 C64, R32 C64 w2, R32 C32 w2, R16 C32 w2, s2"),
    ),
    "token_mlp_bwd": Kernel(
        "token_mlp",
        "token_mlp_kernel",
        partial(token_mlp, backward=True),
        _mlp,
        many=configs("C128, C128 w8, R128, R128 w8, C128 R128 w8, C32 R128, w8, s2, s3, M64 s2, M32 s3"),
        few=configs("C128, C32, w2, R32, R32 w2, R32 C32, R32 C32 w2, R16 C32 w2, s2"),
        summed=5,
    ),
    "soft_aggregate_bwd": Kernel(
        "soft_aggregate",
        "soft_aggregate_bwd_kernel",
        partial(soft_aggregate, backward=True),
        _aggregate,
        many=configs("s2, s4, C32, C32 s4, C128 s2, M32 w4, M32 w4 T64, T64, T256, N128, N128 w4 T64"),
        few=configs("w4, C64, C64 w4, T32, T32 w4, M32, M32 w4, N64, N64 w4, N32 C64 w4"),
    ),
    "masked_channel_attention_bwd_kv": Kernel(
        "masked_channel_attention_bwd",
        "masked_channel_attention_bwd_kv_kernel",
        partial(attention, backward=True, scores="class"),
        _heads,
        many=configs("N128 w8, N128 M32 w8, M32, M32 s3, s1, s3, w8, N32, N32 M32, M128 w8"),
        few=configs("N16, N16 M32, N16 M32 w2, N16 M128, N32, N32 M32, w8"),
    ),
    "masked_channel_attention_bwd_q": Kernel(
        "masked_channel_attention_bwd",
        "masked_channel_attention_bwd_q_kernel",
        partial(attention, backward=True, scores="class"),
        _heads,
        many=configs("M128 w8, M128 N32 w8, N32, N32 s3, s1, s3, w8, M32, N128 w8"),
        few=configs("M16, M16 N32, M16 N32 w2, M16 N128, M32, M32 N32, w8"),
    ),
    "masked_channel_attention_received": Kernel(
        "masked_channel_attention",
        "masked_channel_attention_received_kernel",
        partial(attention, backward=False, scores="received"),
        _heads,
        many=configs("M128 w8, M32, N128 w8, N32, s2, s4, w8, M16 N128"),
        few=configs("N16, N16 M128, N16 M32, N32, N32 w2, M128"),
    ),
}


class Launches:
    """Stands for a kernel in its launcher's module: runs what is launched (or only compiles it), and keeps it."""

    def __init__(self, kernel: Any, compile_only: bool = False) -> None:
        self.kernel, self.compile_only = kernel, compile_only
        self.kept: list[Callable[[], Any]] = []
        self.arguments: list[tuple] = []
        self.results: list[Any] = []  # the compiled kernels

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.arguments.append(args)
            self.kept.append(partial(self.kernel.run, *args, grid=grid, warmup=self.compile_only, **kwargs))
            self.results.append(self.kept[-1]())

        return launch


class Launched(NamedTuple):
    """One launch: what the launcher returned, the launch again with the sum that belongs to it, and what it is."""

    outputs: tuple
    again: Callable[[], object]
    binary: Any
    tensors: list[torch.Tensor]


class Group(NamedTuple):
    """A kernel at a size, with everything that is tried of it."""

    kernel: str
    size: Size
    dtype: str

    @property
    def candidates(self) -> tuple[Config, ...]:
        """The launcher's own first."""
        from tokenops.ops.triton import launches

        known = KERNELS[self.kernel]
        return {}, *(known.few if self.size.B <= launches.FEW else known.many)

    def key(self, candidate: Config) -> str:
        settings = " ".join(f"{name}={value}" for name, value in candidate.items())
        return f"{self.kernel} {self.dtype} {self.size} {settings or 'default'}"

    def entry(self, gpu: int) -> str:
        """What launches.json calls it."""
        from tokenops.ops.triton import launches

        sizes = KERNELS[self.kernel].sizes(self.size)
        return launches.name(gpu, self.kernel, DTYPES[self.dtype], self.size.B, sizes)

    def prepared(self, device: str) -> Callable[[], tuple]:
        """The launcher with inputs of its own; the passes before it run as they do without a table."""
        from tokenops.ops.triton import launches

        with launches.using({}):
            return KERNELS[self.kernel].call(self.size, DTYPES[self.dtype], device)

    def launched(self, call: Callable[[], tuple], candidate: Config, compile_only: bool = False) -> Launched:
        """The launcher run with a candidate."""
        from tokenops.ops.triton import launches

        known = KERNELS[self.kernel]
        module = importlib.import_module(f"tokenops.ops.triton.{known.module}")
        stand_in = Launches(getattr(module, known.symbol), compile_only)
        with (
            patch.object(module, known.symbol, stand_in),
            launches.using({self.kernel: candidate} if candidate else {}),
        ):
            outputs = call()
        again, arguments = stand_in.kept[0], stand_in.arguments[0]  # of several, each of some images, the first
        if known.summed is not None:
            again = partial(_both, again, partial(arguments[known.summed].sum, dim=0))
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        return Launched(outputs, again, stand_in.results[0], tensors)


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def groups(
    device: str = "cuda", dtypes: Sequence[str] = ("bf16",), kernels: Iterable[str] = KERNELS
) -> Iterator[Group]:
    """All of them, the most useful first; for a rehearsal the tiny ones."""
    sizes = (TINY,) if device == "cpu" else (DEIT_S, DEIT_S_ALONE, *DEIT_S_EDGES, *WIDE)
    for dtype in dtypes:
        for size in sizes:
            for kernel in kernels:
                if size in WIDE and kernel.startswith("masked_channel_attention"):
                    continue  # only the number of heads is another
                yield Group(kernel, size, dtype)


def compiled(group: Group, candidate: Config, target: int) -> Any:
    """The kernel compiled as the sweep will launch it, without a GPU."""
    from kernel_cases import compiling

    module = importlib.import_module(f"tokenops.ops.triton.{KERNELS[group.kernel].module}")
    others = {name for name in vars(module) if name.endswith("_kernel")} | {"masked_channel_attention_fwd_kernel"}
    with compiling(target, done=others):  # passes over the launches of all others
        return group.launched(group.prepared("meta"), candidate, compile_only=True).binary
