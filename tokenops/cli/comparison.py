"""The demo's second part: every method beside its dense form, one row a method, and what each keeps of a photograph."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenops

from .. import use_backend
from ..nn import convert_attention
from . import CommandError, columns
from .models import Settings, backends, caller, counted, displayed, methods, prepare, quartiles, timm
from .timing import Spread, clock, interleaved, ratio, recorded_kernels

if TYPE_CHECKING:
    from PIL import Image

BATCH = 8  # on a CPU, unless --batch is given; on a GPU the demo's
SECONDS = 40  # of timing, when the number of repeats is not given
PANELS = 3  # stages shown of a photograph, at most
PICTURED = 2  # photographs


class Row(NamedTuple):
    """A method and what was found of it."""

    name: str
    dense: str
    macs: float  # an image
    dense_macs: float
    kept: list[int]  # patch tokens of each stage that reduces them
    ms: Spread  # an image
    speedup: Spread

    @property
    def realised(self) -> float:
        return self.speedup.median / (self.dense_macs / self.macs)


def check(names: Sequence[str]) -> None:
    known = [name for name in timm.list_models() if dense_form(name)]
    for name in names:
        if name not in known:
            raise CommandError(f"--methods: there is no method's model {name!r}; there are: {', '.join(known)}")


def dense_form(name: str) -> tuple[str, dict[str, Any]] | None:
    """The dense model of a method's (a timm name and arguments), None for other models."""
    if name.startswith("evo_levit_"):
        return name, {"keeping_ratio": 1.0}
    found = re.fullmatch(r"(sit|evit|evo|ps|dps|cait)_((deit|lvvit)_\w+)", name)
    if found is None:
        return None
    dense = found[2].replace("xsmall", "small")
    return dense if "_patch" in dense or "lvvit" in dense else f"{dense}_patch16_224", {}


def run(
    names: Sequence[str],
    photographs: Sequence["Image.Image"],
    settings: Settings,
    output: Path,
    advance: Callable[[str, float], None],
) -> str:
    """The table and where the picture is; models have random weights, the same of each kind."""
    from . import picture  # with matplotlib, which the benchmarks that take models from here may lack

    if settings.device == "cpu" and settings.batch == 16:
        settings = settings._replace(batch=BATCH)
    path = output.with_name(f"{output.stem}-methods{output.suffix}")
    rows, overlays = [], []
    models: dict[str, nn.Module] = {}
    partner = {}
    for name in names:
        dense, arguments = dense_form(name) or (name, {})
        label = f"{dense}, all tokens" if arguments else dense
        partner[name] = label
        for key, model, extra in ((label, dense, arguments), (name, name, {})):
            if key not in models:
                advance(f"making {key}", 0.1 * len(models) / (2 * len(names)))
                models[key] = made(model, **extra)
    inputs = {name: prepare(model, photographs) for name, model in models.items()}
    with use_backend("auto"):
        for j, name in enumerate(names):
            advance(f"what {name} keeps", 0.1 + 0.1 * j / len(names))
            x = inputs[name][:PICTURED]
            overlays.append((name, [displayed(models[name], image) for image in x], kept(models[name], x)))
        macs = {name: counted(model, inputs[name][:1])[0] for name, model in models.items()}
    try:
        calls = {name: caller(model, inputs[name], settings) for name, model in models.items()}
        seconds = clock(settings.device)
        with recorded_kernels() as kernels:
            for call in calls.values():
                call()
        one = sum(seconds(call) for call in calls.values())
        repeats = settings.repeats or min(max(math.ceil(SECONDS / one), 5), 30)
        done = iter(range(1, repeats + 1))
        times = interleaved(
            calls,
            repeats,
            seconds,
            lambda: advance(f"{repeats} rounds of all models", 0.2 + 0.7 * next(done) / repeats),
        )
    except RuntimeError as error:
        raise CommandError(str(error)) from None
    for name, _, maps in overlays:
        dense = partner[name]
        ms = Spread.of([1e3 * t / settings.batch for t in times[name]])
        numbers = [tokens_of(m) for m in maps]
        rows.append(Row(name, dense, macs[name], macs[dense], numbers, ms, ratio(times[dense], times[name])))
    advance("drawing", 0.95)
    picture.draw_methods(path, f"{settings.dtype}, batches of {settings.batch}, random weights", overlays, rows, PANELS)
    return (
        f"Every method beside its dense form, batches of {settings.batch}, {repeats} interleaved rounds, the same"
        f" attention everywhere:\n\n{columns(table(rows))}\n\nBackends: {', '.join(backends(kernels))}\n\n"
        f"Picture: {path}"
    )


def made(name: str, **arguments: Any) -> nn.Module:
    """A model for inference, seeded, its attention ours."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **arguments)
    if name.startswith("deit_"):  # timm's own modules
        convert_attention(model)
    return methods.for_inference(model)


def tokens_of(stage: Tensor) -> int:
    """How many tokens a stage of `kept` has, in the first image."""
    if stage.dtype == torch.int64:
        return int(stage[0].max()) + 1
    return int(stage[0].sum()) if stage.dtype == torch.bool else stage.shape[1]


@torch.inference_mode()
def kept(model: Any, x: Tensor) -> list[Tensor]:
    """Of each stage (B, h, w) bool, which patches are kept; or int64, which token each was merged into; or of slim
    tokens (B, K, h, w), what they draw on.
    """
    if hasattr(model, "tokenops_patch"):
        found = tokenops.trace(model, x)
        return [_drawn(step, found.grid) for step in found.steps]
    return [m for m in model.kept_maps(x) if not m.all()]


def _drawn(step: Any, grid: tuple[int, int]) -> Tensor:
    """A step of a trace as one of `kept`: tokens that are one patch each say which patches are kept."""
    if step.weights is not None:
        return step.weights.unflatten(2, grid)
    sources = step.sources.unflatten(1, grid)
    most = step.sources[0].bincount() if (step.sources[0] >= 0).all() else torch.ones(1)
    return sources if most.max() > 1 else sources >= 0


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = ("method", "patch tokens", "GMACs", "dense", "ms an image", "speed-up", "FLOP ratio", "realised")
    return [
        header,
        *(
            (
                row.name,
                ", ".join(map(str, row.kept)),
                f"{row.macs / 1e9:.2f}",
                f"{row.dense} {row.dense_macs / 1e9:.2f}",
                quartiles(row.ms),
                quartiles(row.speedup),
                f"{row.dense_macs / row.macs:.2f}",
                f"{row.realised:.2f}",
            )
            for row in rows
        ),
    ]
