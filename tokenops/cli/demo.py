"""`python -m tokenops demo`: what `bench` and `slim` do, of every method in one model, on two photographs."""

import argparse
from copy import deepcopy
from typing import Any, NamedTuple

import torch

import tokenops

from ..measuring.progress import Bar
from ..measuring.timing import ratio
from ..methods import patch_slimming
from . import CommandError, columns, models, paragraph, picture, running
from .methods import METHODS
from .models import Counts
from .running import quartiles
from .slim import add_photographs

SECONDS = 45  # of timing all models, when the number of repeats is not given
PICTURED = 2  # photographs


class Slimmed(NamedTuple):
    """The model with a method, what it costs, and where its patches go."""

    model: Any
    counts: Counts
    trace: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_photographs(parser, "out/demo.png")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help=f"rounds of all models (default: {SECONDS} seconds', at least 5)"
    )
    models.add_model_arguments(parser)
    running.add_running_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, draws. Raises CommandError for what cannot be done."""
    how = running.running(args)
    models.at_least(1, batch_size=args.batch_size, repeats=args.repeats)
    picture.check(args.output, (".png", ".pdf", ".svg", ".jpg"))
    photographs = models.photographs(args.images)
    args.method = "none"
    with Bar() as advance:
        advance("making the models", 0.0)
        torch.manual_seed(0)
        dense, weights = models.make(args)
        x = models.prepared(dense, photographs)
        before = models.counted(dense, x[:1])
        if not before.tokens:
            raise CommandError(f"--model {args.model} has no blocks that tokens go through: take a vision transformer")
        found: dict[str, Slimmed] = {}
        left_out = []
        for i, method in enumerate(METHODS):
            advance(method, 0.1 * i / len(METHODS))
            try:
                model = tokenops.apply_patch(deepcopy(dense), method, **operating_point(method, before.tokens))
                found[method] = Slimmed(model, models.counted(model, x[:1]), models.traced(model, x[:PICTURED]))
            except (TypeError, ValueError) as error:
                left_out.append(f"{method} is left out: {error}")
        if not found:
            raise CommandError(f"--model {args.model} takes no method: {'; '.join(left_out)}")
        copies = {"dense": how.copied(dense), **{name: how.copied(each.model) for name, each in found.items()}}
        batch = how.placed(x[torch.arange(args.batch_size) % len(x)])
        times = running.timed(
            copies, batch, how, args.repeats, SECONDS, lambda part: advance("timing", 0.15 + 0.75 * part)
        )
        advance("drawing", 0.95)
        gains = [
            picture.Gain(name, before.macs / each.counts.macs, ratio(times.seconds["dense"], times.seconds[name]))
            for name, each in found.items()
        ]
        where = how.where(f"batches of {args.batch_size}")
        note = f"weights: {weights or 'random, so what a method keeps is only illustrative'}"
        shown = [models.displayed(dense, image) for image in x[:PICTURED]]
        title = f"{args.model}: what each method keeps, and what it gains\n{where}; {note}"
        picture.draw_methods(args.output, title, shown, [each.trace for each in found.values()], gains)
    best = max(gains, key=lambda gain: gain.speedup.median)
    first = f"{args.model}: up to {best.speedup.median:.2f}x as fast, with {best.name}, as without a method"
    for line in (first, where, note):
        print(paragraph(line))
    prefix = getattr(dense, "num_prefix_tokens", 1)
    rows = [
        ("method", "patch", "GMACs", "ms an", "speed-up", "FLOP", "realised"),
        ("", "tokens", "", "image", "", "ratio", ""),
        ("dense", str(before.tokens[0] - prefix), f"{before.macs / 1e9:.2f}", ms(times, "dense", args), "1", "1", ""),
    ]
    for gain, each in zip(gains, found.values()):
        costs = f"{each.counts.macs / 1e9:.2f}", ms(times, gain.name, args), quartiles(gain.speedup, 2)
        rows.append((gain.name, kept(each.trace, prefix), *costs, f"{gain.flops:.2f}", f"{gain.realised:.2f}"))
    print(f"\n{columns(rows)}\n\n{running.remarks(times, [gain.speedup for gain in gains])}")
    for line in left_out:
        print(paragraph(line))
    if models.trained(weights):
        every = {"dense": dense, **{name: each.model for name, each in found.items()}}
        guesses = [
            (name, *(best[0] for best in models.guesses(model, x[:PICTURED], 1))) for name, model in every.items()
        ]
        print(f"\ntop 1\n{columns(guesses)}")
    print(f"\nPicture: {args.output}")


def operating_point(method: str, tokens: list[int]) -> dict[str, Any]:
    """What the methods need that have no default: the papers' own choices for DeiT-S, for as many blocks and tokens."""
    if method == "tome":
        return {"r": 13 * 12 / len(tokens) * tokens[0] / 197}
    if method in ("patch_slimming", "dps"):
        name, option = ("ps_deit_small", "schedule") if method == "patch_slimming" else ("dps_deit_small", "counts")
        return {option: patch_slimming.published_for(name, len(tokens), tokens[0] - 1)}
    return {}


def kept(trace: Any, prefix: int) -> str:
    """Patch tokens behind the steps of a trace: "138/97/68", of many the first and the last."""
    counts = [step.tokens - prefix for step in trace.steps]
    return "/".join(map(str, counts)) if len(counts) < 4 else f"{counts[0]}..{counts[-1]}"


def ms(times: running.Times, name: str, args: argparse.Namespace) -> str:
    return f"{times.ms(name, args.batch_size).median:.3g}"
