"""`make accuracy`: trains what is missing, tells the table, the claims and the speeds, and fills in the page."""

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import tokenops
from tokenops.measuring import machine
from tokenops.measuring.timing import Spread, clock, interleaved, ratio
from tokenops.nn import convert_attention
from tokenops.patching.fidelity import fidelities

from . import models, page, recipes
from .cells import Cell, Found, all_made, model_of
from .claims import CLAIMS, LEVELS, outcomes, trend
from .data import ROOT, SIZE, load
from .intervals import difference, interval, paired
from .models import Settings
from .recipes import METHODS

TIMED = 128  # images of a timed call
COMPARED = 1000  # test images of fidelity
MERGED = (2, 4, 8, 12, 16)
NARROW = "narrower dense"
FROM_SCRATCH = (NARROW, "Evo-ViT from scratch", "dropping from scratch")
HEADS = ("heads of one width", "heads with the same channels", "heads of any width")

Groups = dict[tuple[str, float], dict[int, Found]]  # by name and level; of each seed


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="accuracy", description=__doc__)
    add = options.add_argument
    add(
        "--quick", action="store_true", help="digits, one seed and few steps: shows that everything runs, ranks nothing"
    )
    add("--seeds", type=int, help="default: 3, quick 1")
    add(
        "--levels", type=float, nargs="*", default=list(LEVELS), choices=LEVELS, metavar="PART", help="of multiply-adds"
    )
    add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME", help="default: all")
    add("--claims", action=argparse.BooleanOptionalAction, default=True, help="train what claims need beside methods")
    add("--cells", type=Path, default=ROOT / "out/accuracy", metavar="DIR", help="where cells are kept")
    add("--processes", type=int, default=2, metavar="N", help="that train at a time (default: %(default)s); 0: none")
    add("--rounds", type=int, default=15, metavar="N", help="of timing (default: %(default)s)")
    add("--results", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    add("--page", type=Path, default=ROOT / "docs/results.md", metavar="FILE")
    for name, value in Settings()._asdict().items():
        if name != "data":
            add(f"--{name.replace('_', '-')}", type=type(value), metavar="X", help=f"default: {value}")
    return options.parse_args()


def planned(seeds: int, levels: Sequence[float], methods: Sequence[str], claims: bool) -> list[Cell]:
    """Seed by seed, what is trained from scratch last in each: a run that is not finished has most of the others."""
    names = [("dense", 1.0), *((name, level) for level in levels for name in methods)]
    if claims:
        names.append(("dense, fine-tuned", 1.0))
        for claim in CLAIMS:
            names += [(name, level) for level in claim.levels for name in (claim.ours, claim.theirs)]
        names.append(("scenes, dense", 1.0))
        names.append(("scenes, merged by likeness", 0.6))
    dear = [
        (name, level) for name, level in sorted(dict.fromkeys(names), key=lambda key: key[1]) if name in FROM_SCRATCH
    ]
    names = [*dict.fromkeys(name for name in names if name not in dear), *dear]
    return [Cell(name, level, seed) for seed in range(seeds) for name, level in names]


def trained(
    cells: Iterable[Cell], settings: Settings, args: argparse.Namespace
) -> dict[tuple[str, float], list[Found]]:
    """What became of every cell, seed by seed; a line for each that was made."""
    cells, found = list(cells), {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=len(cells))
        for cell, row, before in all_made(cells, settings, args.cells, args.processes):
            found[cell] = row
            progress.update(task, advance=1, description=str(cell))
            if not before:
                console.print(
                    f"{len(found)}/{len(cells)} {cell}: {100 * row.scores.mean():.2f} %, {row.macs:.2f} MMACs,"
                    f" {row.seconds:.0f} s, {row.speed:.0f} images/s",
                    highlight=False,
                )
    groups: Groups = {}
    for cell in cells:
        if cell in found:
            groups.setdefault((cell.name, cell.level), {})[cell.seed] = found[cell]
    return groups


def throughput(groups: Groups, settings: Settings, args: argparse.Namespace) -> dict[tuple[str, float], dict[str, Any]]:
    """Images a second, and how many times as fast as the dense model, of the first seed's models in the same rounds."""
    images, sides = torch.randn(TIMED, 1, SIZE, SIZE), {}
    for (name, level), found in groups.items():
        if name not in ("dense", *METHODS, *HEADS):
            continue
        model = model_of(Cell(name, level, min(found)), settings, args.cells).eval()
        model = recipes.compacted(model) if name in HEADS else model
        if name in ("dense", NARROW):
            convert_attention(model)  # all with the best attention there is
        sides[name, level] = model
    costs = {key: models.macs(model) for key, model in sides.items()}
    calls = {key: partial(model, images) for key, model in sides.items()}
    with torch.inference_mode():
        times = interleaved(calls, args.rounds, clock("cpu"))
    return {
        key: {
            "images_per_second": list(Spread.of([TIMED / t for t in ts])),
            "speed_up": list(ratio(times["dense", 1.0], ts)),
            "timed_macs": costs[key],
        }
        for key, ts in times.items()
    }


def faithful(settings: Settings, args: argparse.Namespace) -> list[dict[str, float]]:
    """What ToMe without training keeps of the first dense model, and its accuracy on the same images."""
    data = load(settings.data)
    dense = model_of(Cell("dense", 1.0, 0), settings, args.cells).eval()
    images, labels = data.normalised(data.test_images[:COMPARED]), data.test_labels[:COMPARED]
    reduced = {r: tokenops.apply_patch(models.copied(dense), "tome", r=r) for r in MERGED}
    found = fidelities(dense, {str(r): model for r, model in reduced.items()}, images.split(250))
    whole = models.macs(dense)
    return [
        {"r": r, "part": models.macs(model) / whole, "accuracy": accuracy(model, images, labels)}
        | {name: value for name, value in found[str(r)]._asdict().items() if value is not None}
        for r, model in reduced.items()
    ]


@torch.inference_mode()
def accuracy(model: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


def table(groups: Groups, speeds: Mapping[tuple[str, float], Any]) -> dict[str, dict[str, Any]]:
    """Everything of every group of cells, for the file."""
    rows = {}
    for (name, level), found in groups.items():
        scores = {seed: row.scores for seed, row in found.items()}
        narrow = {seed: row.scores for seed, row in groups.get((NARROW, level), {}).items()}
        compared = name in METHODS and name != NARROW and paired(scores, narrow)
        rows[f"{name}, {level:g}"] = {
            "macs": float(np.mean([row.macs for row in found.values()])),
            "parameters": float(np.mean([row.parameters for row in found.values()])),
            "accuracy": interval(scores.values())._asdict(),
            "above_narrow": difference(scores, narrow)._asdict() if compared else None,
            "training_images_per_second": float(np.mean([row.speed for row in found.values()])),
            "seconds": sum(row.seconds for row in found.values()),
            "commits": sorted({str(row.commit) for row in found.values()}),
            **speeds.get((name, level), {}),
        }
    return rows


def main() -> None:
    args = arguments()
    settings = Settings.quick() if args.quick else Settings()
    given = {name: vars(args)[name] for name in settings._fields if vars(args).get(name) is not None}
    settings = settings._replace(**given)
    seeds = args.seeds or (1 if args.quick else 3)
    start = time.perf_counter()
    groups = trained(planned(seeds, args.levels, args.methods, args.claims), settings, args)
    if ("dense", 1.0) not in groups:
        raise SystemExit(f"--processes 0, and {args.cells} has no dense model of these settings")
    rows = table(groups, throughput(groups, settings, args))
    scores = {key: {seed: row.scores for seed, row in found.items()} for key, found in groups.items()}
    soft = next(claim for claim in CLAIMS if claim.text.startswith("soft"))
    gain = trend(scores, soft) if len(args.levels) == len(LEVELS) else None
    trends = {} if gain is None else {"soft aggregation gains more, the fewer are kept": gain}
    found = outcomes(scores)
    facts = machine.facts("cpu") | {"commit": machine.commit(), "seconds": round(time.perf_counter() - start)}
    trained_for = sum(row["seconds"] for row in rows.values())
    facts |= {"seeds": seeds, "hours_of_cells": trained_for / 3600, "precision": models.amp()} | settings._asdict()
    origin = page.origin(
        f"{facts['device']}; {args.processes} processes of a thread; torch {facts['torch']}; commit {facts['commit']};"
        f" {seeds} seeds; cells of {trained_for / 3600:.1f} hours of a core, in {models.amp()};"
        f" dense training {rows['dense, 1']['training_images_per_second']:.0f} images/s a core."
    )
    names = [name for name in METHODS if name in args.methods]
    kept_answers = faithful(settings, args)
    parts = [page.accuracies(rows, names), page.gains(rows, names), page.speeds(rows, names)]
    parts += [page.claims(found, trends), page.heads(rows)] if found else []
    parts += [page.fidelity(kept_answers, COMPARED)]
    text = "\n\n".join([*parts, origin])
    args.results.mkdir(parents=True, exist_ok=True)
    kept = {
        "run": facts,
        "rows": rows,
        "claims": [
            {**each.claim._asdict(), "level": each.level, "difference": each.difference._asdict(), "is": each.verdict}
            for each in found
        ],
        "trends": {name: each._asdict() for name, each in trends.items()},
        "fidelity": kept_answers,
    }
    (args.results / "accuracy.json").write_text(json.dumps(kept, indent=1) + "\n")
    page.draw(rows, names, args.results / "accuracy.png")
    print(text)
    place = re.compile(r"(<!-- accuracy -->\n).*?(<!-- /accuracy -->)", re.DOTALL)
    args.page.write_text(place.sub(lambda old: f"{old[1]}\n{text}\n\n{old[2]}", args.page.read_text()))
    print(f"\n{args.results / 'accuracy.png'}, {args.results / 'accuracy.json'}")


if __name__ == "__main__":
    main()
