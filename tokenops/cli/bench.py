"""`python -m tokenops bench`: throughput of a model with a method beside the dense one, over batch sizes."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import use_backend
from . import CommandError, machine, patched, results
from .demo import progress_bar
from .models import backends, counted, quartiles
from .timing import Spread, ratio, recorded_kernels

SECONDS = 10  # of timing at a batch size, where the number of repeats is not given


class Row(NamedTuple):
    """What both models did in the same rounds at a batch size."""

    batch_size: int
    dense: Spread  # images a second
    patched: Spread
    speedup: Spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    patched.add_model_arguments(parser)
    patched.add_method_arguments(parser)
    patched.add_running_arguments(parser)
    add = parser.add_argument
    add("-b", "--batch-size", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    add("--compile", action="store_true", help="torch.compile both models")
    add("--repeats", type=int, metavar="N", help=f"pairs of timed runs (default: {SECONDS} seconds', at least 5)")
    add("--output", type=Path, metavar="FILE", help="results as .csv or .json")


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the results. Raises CommandError for what cannot be done."""
    how = patched.running(args)
    patched.at_least(1, batch_size=args.batch_size, repeats=args.repeats)
    results.check_output(args.output)
    if args.method == "none":
        patched.dense_form(args)
    with progress_bar() as advance:
        advance("making the models", 0.0)
        torch.manual_seed(0)
        slim, _ = patched.make(args)
        against, dense = patched.dense_of(slim, args)
        dense, slim = (patched.for_inference(model) for model in (dense, slim))
        images = torch.randn(max(args.batch_size), *patched.input_size(slim))
        with use_backend("auto"):
            (dense_macs, _, _), (macs, _, _) = (counted(model, images[:1]) for model in (dense, slim))
        dense, slim = (placed(model, how, args.compile) for model in (dense, slim))
        rows: list[Row] = []
        kernels: set[str] = set()
        failed = ""
        for i, batch_size in enumerate(args.batch_size):
            x = how.placed(images[:batch_size])
            calls = {"dense": results.caller(dense, x, how), "patched": results.caller(slim, x, how)}
            try:
                if not args.compile:  # what is compiled can not be watched
                    with recorded_kernels() as found:
                        calls["patched"]()
                    kernels |= found
                advance(f"batches of {batch_size}", i / len(args.batch_size))
                times = results.timed(calls, how, args.repeats, SECONDS)
            except RuntimeError as error:  # out of memory, or a backend that was asked for and cannot run
                failed = f"--batch-size {batch_size}: {error}"
                break
            speeds = {name: Spread.of([batch_size / seconds for seconds in times[name]]) for name in calls}
            speedup = ratio(times["dense"], times["patched"])
            rows.append(Row(batch_size, speeds["dense"], speeds["patched"], speedup))
    if not rows:
        raise CommandError(failed)
    report(args, how, against, dense_macs / macs, (dense_macs, macs), rows, kernels)
    if failed:
        print(f"\nStopped at {failed}")
    if args.output:
        facts = {
            "model": args.model,
            "method": patched.method_label(args),
            "against": against,
            "dtype": str(how),
            "compile": args.compile,
            "dense_gmacs": dense_macs / 1e9,
            "gmacs": macs / 1e9,
            **machine.facts(how.device.type),
        }
        results.save(args.output, facts, [entry(row, dense_macs / macs) for row in rows])
        print(f"\nResults: {args.output}")


def placed(model: nn.Module, how: patched.Running, compiled: bool) -> Any:
    model = how.placed(model)
    return torch.compile(model) if compiled else model


def report(
    args: argparse.Namespace,
    how: patched.Running,
    against: str,
    flops: float,
    macs: tuple[float, float],
    rows: list[Row],
    kernels: set[str],
) -> None:
    name = patched.named(args)
    speedups = ", ".join(f"{row.speedup.median:.2f}x" for row in rows)
    sizes = ", ".join(str(row.batch_size) for row in rows)
    realised = ", ".join(f"{row.speedup.median / flops:.2f}" for row in rows)
    print(
        f"{name}: {speedups} as fast as {against} at batches of {sizes},"
        f" with {flops:.2f}x fewer FLOPs (realised: {realised})"
    )
    where = f"{machine.device_name(how.device.type)}, {how}" + (", compiled" if args.compile else "")
    print(where + (f", threads: {torch.get_num_threads()}" if how.device.type == "cpu" else ""))
    print(f"GMACs an image: {macs[0] / 1e9:.3g} dense, {macs[1] / 1e9:.3g} reduced\n")
    results.show(
        [
            ("batch", "dense, images/s", "reduced, images/s", "speed-up", "realised"),
            *(
                (
                    str(row.batch_size),
                    quartiles(row.dense),
                    quartiles(row.patched),
                    quartiles(row.speedup),
                    f"{row.speedup.median / flops:.2f}",
                )
                for row in rows
            ),
        ]
    )
    print("\nMedians of interleaved pairs, quartiles in brackets; realised is speed-up / FLOP ratio.")
    if kernels or not args.compile:
        ran = ", ".join(backends(kernels)) or "plain PyTorch (the reference), no tokenops kernel ran"
        print(f"Backends: {ran}")


def entry(row: Row, flops: float) -> dict[str, float]:
    """A row of the file: medians, and quartiles behind them."""
    found: dict[str, float] = {"batch_size": row.batch_size}
    sides = {"dense_images_per_second": row.dense, "images_per_second": row.patched, "speedup": row.speedup}
    for name, value in sides.items():
        found |= {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
    return found | {"flop_ratio": flops, "realised": row.speedup.median / flops}
