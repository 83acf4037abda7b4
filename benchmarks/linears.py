"""What the linear layers alone allow on a CPU: `python benchmarks/linears.py --dtype bfloat16 --batch 8 --threads 2`.

Every linear layer of a dense and of a slim DeiT-S is taken from a run of the model with its number of rows, and run
alone as torch.compile with freezing runs it (weights packed once; in bf16 GELU in the same primitive), one after the
other, both models interleaved. A sample is a run behind four that are not timed: only then are the weights in the
caches that the other model has filled. A line a method:
  cap       dense time / slim time, with quartiles: the speed-up if all else cost nothing, or as much in proportion
  ratio     the same of these layers' FLOPs
  realised  cap / ratio: what a matrix product's rate loses on fewer rows
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tokenops
from timers import Clock
from tokenops.measuring.timing import Spread, interleaved, ratio

DENSE = "deit_small_patch16_224"
HEAD_WIDTHS = (40, 52)  # of q and k, and of v: what CAIT leaves of 64


def pruned() -> nn.Module:
    """CAIT's channels, without its merging."""
    model = timm.create_model(DENSE)
    tokenops.nn.convert_attention(model)
    qk, v = (torch.arange(width).expand(6, -1) for width in HEAD_WIDTHS)
    for block in model.blocks:
        block.attn = tokenops.nn.compact_channels(block.attn, qk, v)
    return model.eval()


def patched(method: str, **options: Any) -> nn.Module:
    return tokenops.apply_patch(timm.create_model(DENSE), method, **options).eval()


def made(name: str) -> nn.Module:
    """A registered model, seeded, for inference."""
    torch.manual_seed(0)
    return tokenops.methods.for_inference(timm.create_model(name))


METHODS: Mapping[str, Callable[[], nn.Module]] = {
    "tome": lambda: patched("tome", r=13),
    "evit": lambda: patched("evit", keep_rate=0.7),
    "evo_vit": lambda: made("evo_deit_small_patch16_224"),
    "sit": lambda: made("sit_deit_small"),
    "cait": lambda: made("cait_deit_small_patch16_224"),
    "channels": pruned,
}


class Layer(NamedTuple):
    """A linear layer as a model ran it."""

    weight: Tensor
    bias: Tensor | None
    rows: int
    gelu: str  # the approximation of a GELU right behind it; "" for none

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.weight.numel()


class Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.last: Any = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.linear:
            x, weight, bias = (*args, None)[:3]
            self.layers.append(Layer(weight, bias, x.numel() // x.shape[-1], ""))
            self.last = result
        elif function is F.gelu and args[0] is self.last:
            self.layers[-1] = self.layers[-1]._replace(gelu=(kwargs or {}).get("approximate", "none"))
        return result


@torch.inference_mode()
def layers(model: nn.Module, images: Tensor) -> list[Layer]:
    """The linear layers that the model runs, in their order."""
    with Recorder() as recorder:
        model(images)
    return recorder.layers


def frozen(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The call that torch.compile with freezing makes of the layer."""
    weight, bias, rows, gelu = layer
    if weight.dtype == torch.float32 and torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
        linear = torch.ops.mkl._mkl_linear
        if not gelu:
            return lambda x: linear(x, packed, weight, bias, rows)
        return lambda x: F.gelu(linear(x, packed, weight, bias, rows), approximate=gelu)
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # then nothing is packed
        return lambda x: F.gelu(F.linear(x, weight, bias), approximate=gelu) if gelu else F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    pointwise = torch.ops.mkldnn._linear_pointwise
    name = "gelu" if gelu else "none"
    return lambda x: pointwise(x, packed, bias, name, [], gelu)


@torch.inference_mode()
def alone(found: list[Layer]) -> Callable[[], None]:
    """A call that runs the layers; those of a width and of as many rows read the same random numbers."""
    inputs: dict[tuple[int, int], Tensor] = {}
    calls = []
    for layer in found:
        shape = (layer.rows, layer.weight.shape[1])
        if shape not in inputs:
            inputs[shape] = torch.randn(shape).to(layer.weight.dtype)
        calls.append((frozen(layer), inputs[shape]))

    def call() -> None:
        for linear, x in calls:
            linear(x)

    return call


class Cap(NamedTuple):
    """What the linear layers of two models allow."""

    speedup: Spread
    flop_ratio: float

    @property
    def realised(self) -> Spread:
        return Spread(*(value / self.flop_ratio for value in self.speedup))


@torch.inference_mode()
def cap(dense: nn.Module, slim: nn.Module, images: Tensor, rounds: int = 11) -> Cap:
    """Of two models on the same images, on a CPU."""
    found = {"dense": layers(dense, images), "slim": layers(slim, images)}
    sides = {name: alone(side) for name, side in found.items()}
    times = interleaved(sides, rounds, Clock().settled)
    flops = {name: sum(layer.flops for layer in side) for name, side in found.items()}
    return Cap(ratio(times["dense"], times["slim"]), flops["dense"] / flops["slim"])


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 32], help="images")
    parser.add_argument("--threads", type=positive, help="default: all")
    parser.add_argument("--rounds", type=positive, default=11, help="samples of either model")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    dense = timm.create_model(DENSE).to(dtype).eval()
    with threads(options.threads) as count:
        print(f"linear layers of {DENSE}, {options.dtype}, packed, {count} threads")
        for name in options.methods:
            slim = METHODS[name]().to(dtype)
            for batch in options.batch:
                found = cap(dense, slim, torch.randn(batch, 3, 224, 224).to(dtype), options.rounds)
                speedup, realised = ("{:.2f} ({:.2f}..{:.2f})".format(*s) for s in (found.speedup, found.realised))
                line = f"{name:9} B={batch:<3} cap {speedup}  ratio {found.flop_ratio:.2f}  realised {realised}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
