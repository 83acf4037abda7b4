"""`python -m tokenops demo`: a dense model and its slimmed form side by side on photographs."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import use_backend
from . import CommandError, columns, machine
from .timing import Spread, clock, interleaved, ratio, recorded_kernels

try:
    import timm
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    from .. import methods  # registers the models with timm, and our FLOP formulas with torch
    from . import picture
except ImportError as missing:
    raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[demo]'") from missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS = 30  # of timing, when the number of repeats is not given
UNSTEADY = 0.25  # quartiles that lie further apart than this part of the median call for a warning
PICTURED = 3  # photographs in the picture, at most


class Side(NamedTuple):
    """One of the two models and what was found of it."""

    name: str
    weights: str  # where they come from; "" for random ones
    macs: float  # an image
    parameters: int
    tokens: list[int]  # that enter each block, prefix included
    ms: Spread  # an image

    @property
    def images_per_second(self) -> Spread:
        return Spread(*(1e3 / t for t in (self.ms.median, self.ms.high, self.ms.low)))


class Settings(NamedTuple):
    device: str
    dtype: str
    batch: int
    repeats: int | None


class Findings(NamedTuple):
    """What both models did in the same rounds."""

    dense: Side
    slim: Side
    speedup: Spread
    repeats: int
    kernels: set[str]

    @property
    def flop_ratio(self) -> float:
        return self.dense.macs / self.slim.macs


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the picture. Raises CommandError for what cannot be done."""
    settings = checked(args)
    picture.check(args.output)
    photographs = load_photographs(args.images)
    with progress_bar() as advance:
        advance("making the models", 0.0)
        torch.manual_seed(0)
        slim, slim_weights = make(args.model, args.checkpoint, args.pretrained, slimmed=True)
        dense, dense_weights = make(args.dense, args.dense_checkpoint, args.pretrained, slimmed=False)
        if args.pretrained and not (slim_weights or dense_weights):
            names = f"{args.dense} or {args.model}"
            raise CommandError(f"--pretrained, but no weights of {names} can be downloaded: use --checkpoint")
        x = prepare(slim, photographs)

        advance("which regions the slim tokens draw on", 0.05)
        with use_backend("auto"):  # on the CPU, whichever backend was asked for
            maps = deepcopy(slim).double().aggregation_maps(x[:PICTURED].double())

        found = measure(
            (args.dense, dense, dense_weights), (args.model, slim, slim_weights), photographs, settings, advance
        )

        advance("drawing", 0.95)
        where = f"{machine.device_name(settings.device)}, {settings.dtype}, batches of {settings.batch}"
        where += f", threads: {torch.get_num_threads()}" if settings.device == "cpu" else ""
        shown = [displayed(slim, image) for image in x[:PICTURED]]
        subtitle = f"{where}; {weights_note(found)}"
        picture.draw(args.output, summary(found), subtitle, shown, maps, (found.dense, found.slim))
    print(f"{summary(found)}\n{where}\n{weights_note(found)}\n\n{columns(table(found))}\n\n{remarks(found)}")
    for side, model in ((found.dense, dense), (found.slim, slim)):
        if side.weights:
            print(f"\ntop 5 of {side.name}\n{columns(top5(model, prepare(model, photographs)))}")
    print(f"\nPicture: {args.output}")


def checked(args: argparse.Namespace) -> Settings:
    """The options that need no model, with their defaults."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda was asked for, but torch sees no GPU")
    for option, value in (("--batch", args.batch), ("--repeats", args.repeats)):
        if value is not None and value < 1:
            raise CommandError(f"{option}={value}, but it must be at least 1")
    if args.model == args.dense:
        raise CommandError(f"--model and --dense are both {args.model}: there is nothing to compare")
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    return Settings(device, dtype, args.batch or (256 if device == "cuda" else 16), args.repeats)


Named = tuple[str, nn.Module, str]  # name, model, where its weights come from


def measure(
    dense: Named,
    slim: Named,
    photographs: Sequence[Image.Image],
    settings: Settings,
    advance: Callable[[str, float], None],
) -> Findings:
    """Counts both models and times them in turn."""
    advance("warming up", 0.1)
    inputs = {name: prepare(model, photographs) for name, model, _ in (dense, slim)}
    with use_backend("auto"):
        counts = {name: counted(model, inputs[name][:1]) for name, model, _ in (dense, slim)}
    try:
        calls = {name: caller(model, inputs[name], settings) for name, model, _ in (dense, slim)}
        seconds = clock(settings.device)
        with recorded_kernels() as kernels:
            seconds(calls[slim[0]])
        seconds(calls[dense[0]])
        a_pair = sum(seconds(call) for call in calls.values())
        repeats = settings.repeats or min(max(math.ceil(SECONDS / a_pair), 5), 30)
        done = iter(range(1, repeats + 1))

        def after_round() -> None:
            advance(f"{repeats} pairs of timed runs", 0.15 + 0.75 * next(done) / repeats)

        times = interleaved(calls, repeats, seconds, after_round)
    except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
        raise CommandError(str(error)) from None
    one, other = (
        Side(name, weights, *counts[name], Spread.of([1e3 * t / settings.batch for t in times[name]]))
        for name, _, weights in (dense, slim)
    )
    return Findings(one, other, ratio(times[dense[0]], times[slim[0]]), repeats, kernels)


def load_photographs(paths: Sequence[Path]) -> list[Image.Image]:
    """The user's pictures, or the two photographs of scikit-learn."""
    if paths:
        return [open_image(path) for path in paths]
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as missing:
        raise CommandError("give it photographs, or pip install scikit-learn, which brings two along") from missing
    return [Image.fromarray(image) for image in load_sample_images().images]


def open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}") from None
    except UnidentifiedImageError:
        raise CommandError(f"{path} is not an image that Pillow can read") from None
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error}") from None


def make(name: str, checkpoint: Path | None, pretrained: bool, slimmed: bool) -> tuple[Any, str]:
    """The model as it is for inference, and where its weights come from ("" for random ones)."""
    known = timm.list_models("sit_*")
    if slimmed and name not in known:
        raise CommandError(f"there is no slimmed model {name!r}; there are: {', '.join(known)}")
    if not timm.models.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise CommandError(f"timm knows no model {name!r}" + (f"; near it are: {', '.join(close)}" if close else ""))
    download = pretrained and checkpoint is None and timm.models.is_model_pretrained(name)
    try:
        only_slimmed: dict[str, Any] = {"rtsm": False} if slimmed else {}
        model = timm.create_model(name, pretrained=download, **only_slimmed)
    except (OSError, RuntimeError) as error:
        raise CommandError(f"cannot make {name}: {error}") from None
    if checkpoint is not None:
        try:
            timm.models.load_checkpoint(model, str(checkpoint), weights_only=True)
        except FileNotFoundError:
            raise CommandError(f"there is no file {checkpoint}") from None
        except Exception as error:  # torch.load and load_state_dict raise whatever a strange file provokes
            raise CommandError(f"{checkpoint} does not hold weights of {name}: {error}") from None
    model.eval()
    weights = f"{checkpoint}" if checkpoint else "published weights" if download else ""
    return (model.for_inference() if isinstance(model, methods.LVViT) else model), weights


def prepare(model: nn.Module, photographs: Sequence[Image.Image]) -> Tensor:
    """The photographs as the model wants them: resized, cropped, normalised."""
    transform = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(photograph) for photograph in photographs])


def displayed(model: nn.Module, x: Tensor) -> np.ndarray:
    """What the model sees of a photograph, (H, W, 3) between 0 and 1."""
    config = resolve_data_config({}, model=model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


@torch.inference_mode()
def counted(model: nn.Module, x: Tensor) -> tuple[float, int, list[int]]:
    """Multiply-adds of an image, parameters, and the tokens that enter each block."""
    tokens: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        for block in getattr(model, "blocks", ())
    ]
    with FlopCounterMode(display=False) as counter:
        model(x)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / 2 / len(x), sum(p.numel() for p in model.parameters()), tokens


def caller(model: nn.Module, x: Tensor, settings: Settings) -> Callable[[], Tensor]:
    """A call of the model on a batch of the photographs in turn."""
    model = deepcopy(model).to(settings.device, DTYPES[settings.dtype])
    x = x[torch.arange(settings.batch) % len(x)].to(settings.device, DTYPES[settings.dtype])
    return torch.inference_mode()(lambda: model(x))


@torch.inference_mode()
def top5(model: nn.Module, x: Tensor) -> list[tuple[str, ...]]:
    names = timm.data.ImageNetInfo()
    rows = []
    for i, p in enumerate(model(x).softmax(dim=-1)):
        best = p.topk(min(5, len(p)))
        labels = [names.index_to_description(int(j)) if len(p) == 1000 else f"class {int(j)}" for j in best.indices]
        rows.append(
            (f"photograph {i + 1}", *(f"{v:.0%} {label.split(',')[0]}" for v, label in zip(best.values, labels)))
        )
    return rows


def summary(found: Findings) -> str:
    speedup, flops = found.speedup.median, found.flop_ratio
    return (
        f"{found.slim.name}: {speedup:.2f}x as fast as {found.dense.name} with {flops:.2f}x fewer FLOPs"
        f" (realised: {speedup / flops:.2f})"
    )


def weights_note(found: Findings) -> str:
    random = [side.name for side in (found.dense, found.slim) if not side.weights]
    if not random:
        return f"weights: {found.dense.name} {found.dense.weights}, {found.slim.name} {found.slim.weights}"
    note = f"random weights ({', '.join(random)}): speed and FLOPs hold"
    return note + (", the overlay is only illustrative" if found.slim.name in random else "")


def table(found: Findings) -> list[tuple[str, ...]]:
    dense, slim, speedup = found.dense, found.slim, found.speedup

    def both(title: str, show: Callable[[Side], str], last: str = "") -> tuple[str, ...]:
        return title, show(dense), show(slim), last

    return [
        both("", lambda s: s.name, "ratio"),
        both("tokens x blocks", lambda s: stages(s.tokens)),
        both("GMACs an image (GFLOPs / 2)", lambda s: f"{s.macs / 1e9:.2f}", f"{found.flop_ratio:.2f}"),
        both("parameters", lambda s: f"{s.parameters / 1e6:.1f} M", f"{dense.parameters / slim.parameters:.2f}"),
        both("ms an image", lambda s: quartiles(s.ms), quartiles(speedup)),
        both("images a second", lambda s: quartiles(s.images_per_second)),
        both("realised: speed-up / FLOP ratio", lambda s: "", f"{speedup.median / found.flop_ratio:.2f}"),
    ]


def remarks(found: Findings) -> str:
    kernels = ", ".join(backends(found.kernels)) or "plain PyTorch (the reference), no tokenops kernel ran"
    lines = [
        f"Medians of {found.repeats} interleaved pairs, quartiles in brackets; the same attention on both sides.",
        f"Backends: {kernels}",
    ]
    if found.speedup.high - found.speedup.low > UNSTEADY * found.speedup.median:
        lines.append("The times vary much: this machine was busy with something else, so take the ratio with care.")
    return "\n".join(lines)


def quartiles(value: Spread) -> str:
    """12.3 (12.1..12.9)"""
    digits = max(0, 2 - math.floor(math.log10(value.median)))
    return "{:.{d}f} ({:.{d}f}..{:.{d}f})".format(*value, d=digits)


def stages(tokens: Sequence[int]) -> str:
    """[197, 99, 99] -> "197 x 1, 99 x 2"."""
    return ", ".join(f"{n} x {tokens.count(n)}" for n in dict.fromkeys(tokens)) or "unknown"


def backends(kernels: set[str]) -> list[str]:
    """{"soft_aggregate_fwd.native"} -> ["soft_aggregate on native"]."""
    return sorted({f"{kernel.split('_fwd')[0]} on {kernel.split('.')[-1]}" for kernel in kernels})


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """advance(what, fraction): a bar on stderr where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda what, fraction: None
        return
    parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)
