"""`python -m tokenops bench`: throughput of a model with a method beside the dense one, over batch sizes."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from ..measuring import machine
from ..measuring.progress import Bar
from ..measuring.timing import Spread, ratio
from ..methods import for_inference
from . import CommandError, columns, models, paragraph, running
from .methods import add_method_arguments, method_label, method_options
from .running import quartiles

SECONDS = 10  # of timing at a batch size, where the number of repeats is not given


class Row(NamedTuple):
    """What both models did in the same rounds at a batch size."""

    batch_size: int
    dense: Spread  # images a second
    patched: Spread
    speedup: Spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-b", "--batch-size", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    add("--compile", action="store_true", help="torch.compile both models")
    add("--repeats", type=int, metavar="N", help=f"pairs of timed runs (default: {SECONDS} seconds', at least 5)")
    add("--output", type=Path, metavar="FILE", help="results as .csv or .json")
    models.add_model_arguments(parser)
    running.add_running_arguments(parser)
    add_method_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the results. Raises CommandError for what cannot be done."""
    how = running.running(args)
    models.at_least(1, batch_size=args.batch_size, repeats=args.repeats)
    running.check_output(args.output)
    method_options(args)
    models.check_reduced(args)
    with Bar() as advance:
        advance("making the models", 0.0)
        torch.manual_seed(0)
        slim, _ = models.make(args)
        against, dense = models.dense_of(slim, args)
        sides = {"dense": for_inference(dense), "reduced": for_inference(slim)}
        images = torch.randn(max(args.batch_size), *models.input_size(slim))
        macs = {name: models.counted(model, images[:1]).macs for name, model in sides.items()}
        sides = {name: how.placed(model) for name, model in sides.items()}
        if args.compile:
            sides = {name: torch.compile(model) for name, model in sides.items()}
        rows: list[Row] = []
        kernels: set[str] = set()
        failed = ""
        for i, size in enumerate(args.batch_size):
            advance(f"batches of {size}", i / len(args.batch_size))
            try:
                times = running.timed(sides, how.placed(images[:size]), how, args.repeats, SECONDS)
            except CommandError as error:
                failed = f"--batch-size {size}: {error}"
                break
            kernels |= times.kernels
            dense, slim = (Spread.of([size / t for t in times.seconds[name]]) for name in sides)
            rows.append(Row(size, dense, slim, ratio(times.seconds["dense"], times.seconds["reduced"])))
    if not rows:
        raise CommandError(failed)
    flops = macs["dense"] / macs["reduced"]
    print(report(args, how, against, macs, rows, times._replace(kernels=kernels)))
    if failed:
        print(f"\nStopped at {failed}")
    if args.output:
        facts = {
            "model": args.model,
            "method": method_label(args),
            "against": against,
            "dtype": str(how),
            "compile": args.compile,
            "dense_gmacs": macs["dense"] / 1e9,
            "gmacs": macs["reduced"] / 1e9,
            **machine.facts(how.device.type),
        }
        running.save(args.output, facts, [entry(row, flops) for row in rows])


def report(
    args: argparse.Namespace,
    how: running.Running,
    against: str,
    macs: dict[str, float],
    rows: list[Row],
    times: running.Times,
) -> str:
    flops = macs["dense"] / macs["reduced"]
    speedups = ", ".join(f"{row.speedup.median:.2f}x" for row in rows)
    sizes = ", ".join(str(row.batch_size) for row in rows)
    realised = [f"{row.speedup.median / flops:.2f}" for row in rows]
    first = (
        f"{models.named(args)}: {speedups} as fast as {against} at batches of {sizes},"
        f" with {flops:.2f}x fewer FLOPs (realised: {', '.join(realised)})"
    )
    table: list[tuple[str, ...]] = [("batch", "dense, images/s", "reduced, images/s", "speed-up", "realised")]
    for row, part in zip(rows, realised):
        table.append(
            (str(row.batch_size), quartiles(row.dense), quartiles(row.patched), quartiles(row.speedup, 2), part)
        )
    remarks = running.remarks(times, [row.speedup for row in rows])
    macs_line = f"GMACs an image: {macs['dense'] / 1e9:.3g} dense, {macs['reduced'] / 1e9:.3g} reduced"
    where = how.where(*(["compiled"] if args.compile else []))
    return f"{paragraph(first)}\n{paragraph(where)}\n{macs_line}\n\n{columns(table)}\n\n{remarks}"


def entry(row: Row, flops: float) -> dict[str, float]:
    """A row of the file."""
    sides = {"dense_images_per_second": row.dense, "images_per_second": row.patched, "speedup": row.speedup}
    realised = {"flop_ratio": flops, "realised": row.speedup.median / flops}
    return {"batch_size": row.batch_size, **running.spelled(sides), **realised}
