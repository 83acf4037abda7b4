"""`make accuracy`: trains what is missing, tells the table, the claims and the speeds, and fills in the page."""

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenops.measuring import machine

from . import measures, models, page
from .cells import Cell, all_made
from .claims import CLAIMS, LEVELS, outcomes, trend
from .data import ROOT
from .intervals import difference, interval, paired
from .models import Settings
from .recipes import METHODS

NARROW = "narrower dense"
FROM_SCRATCH = (NARROW, "Evo-ViT from scratch", "dropping from scratch")


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="accuracy", description=__doc__)
    add = options.add_argument
    add(
        "--quick", action="store_true", help="digits, one seed and few steps: shows that everything runs, ranks nothing"
    )
    add("--seeds", type=int, metavar="N", help="default: 3, quick 1")
    add(
        "--levels", type=float, nargs="*", default=list(LEVELS), choices=LEVELS, metavar="PART", help="of multiply-adds"
    )
    add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME", help="default: all")
    add("--claims", action=argparse.BooleanOptionalAction, default=True, help="train what claims need beside methods")
    add("--cells", type=Path, default=ROOT / "out/accuracy", metavar="DIR", help="where cells are kept")
    add("--processes", type=int, default=2, metavar="N", help="that train at a time (default: %(default)s); 0: none")
    add("--rounds", type=int, metavar="N", help="of timing (default: 15, quick 3)")
    add("--frozen", action=argparse.BooleanOptionalAction, default=True, help="time compiled models, too, if not quick")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="of accuracy.json and .png; default: benchmarks/results, of a part out",
    )
    add("--page", type=Path, metavar="FILE", help="to fill in; default: docs/results.md, of a part none")
    for name, value in Settings()._asdict().items():
        if name != "data":
            add(f"--{name.replace('_', '-')}", type=type(value), metavar="X", help=f"default: {value}")
    args = options.parse_args()
    if args.seeds is not None and args.seeds < 1:
        options.error(f"argument --seeds: {args.seeds}, but there must be at least one")
    return args


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


def trained(cells: Iterable[Cell], settings: Settings, args: argparse.Namespace) -> measures.Groups:
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
    groups: measures.Groups = {}
    for cell in cells:
        if cell in found:
            groups.setdefault((cell.name, cell.level), {})[cell.seed] = found[cell]
    return groups


def table(groups: measures.Groups, speeds: Mapping[tuple[str, float], Any]) -> dict[str, dict[str, Any]]:
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
    start = time.perf_counter()
    plan = planned(args.seeds or (1 if args.quick else 3), args.levels, args.methods, args.claims)
    groups = trained(plan, settings, args)
    if ("dense", 1.0) not in groups:
        raise SystemExit(f"--processes 0, and {args.cells} has no dense model of these settings")
    rounds = args.rounds or (3 if args.quick else 15)
    rows = table(groups, measures.throughput(groups, settings, args.cells, rounds))
    if args.frozen and not args.quick:
        for (name, level), speed_up in measures.frozen(groups, settings, args.cells, rounds).items():
            rows[f"{name}, {level:g}"]["speed_up_frozen"] = speed_up
    scores = {key: {seed: row.scores for seed, row in found.items()} for key, found in groups.items()}
    costs = {key: float(np.mean([row.macs for row in found.values()])) for key, found in groups.items()}
    found = outcomes(scores, costs)
    gain = trend(scores, next(claim for claim in CLAIMS if claim.text.startswith("soft")))
    trends = {} if gain is None else {"soft aggregation gains more, the fewer are kept": gain}
    fidelity = measures.fidelity(settings, args.cells, min(groups["dense", 1.0]))
    seeds = sorted({seed for each in groups.values() for seed in each})
    hours = sum(row["seconds"] for row in rows.values()) / 3600
    facts = machine.facts("cpu") | {"commit": machine.commit(), "seconds": round(time.perf_counter() - start)}
    facts |= {"seeds": len(seeds), "hours_of_cells": hours, "precision": models.amp()} | settings._asdict()
    origin = page.origin(
        f"{facts['device']}; {settings.data}; torch {facts['torch']}; commit {facts['commit']}; {len(seeds)} seeds;"
        f" {settings.dense_steps} and {settings.steps} steps of {settings.batch} images; {hours:.1f} hours of a core,"
        f" precision {models.amp()}; the dense model's training:"
        f" {rows['dense, 1']['training_images_per_second']:.0f} images/s a core."
    )
    names = [name for name in METHODS if name in args.methods]
    parts = [page.accuracies(rows, names), page.gains(rows, names)]
    parts += [page.speeds(rows, names, "eager, float32", "speed_up")]
    if "speed_up_frozen" in rows["dense, 1"]:
        parts.append(page.speeds(rows, names, "compiled with frozen weights, bfloat16", "speed_up_frozen"))
    parts += [page.claims(found, trends), page.heads(rows)] if found else []
    text = "\n\n".join([*parts, page.fidelity(fidelity, measures.COMPARED), origin])
    whole = settings == Settings() and {key for key in groups} == {(cell.name, cell.level) for cell in full()}
    results = args.results or ROOT / ("benchmarks/results" if whole else "out/accuracy-part")
    results.mkdir(parents=True, exist_ok=True)
    kept = {
        "run": facts,
        "rows": rows,
        "claims": [
            {
                **each.claim._asdict(),
                "level": each.level,
                "cost": each.cost,
                "difference": each.difference._asdict(),
                "outcome": each.verdict,
            }
            for each in found
        ],
        "trends": {name: each._asdict() for name, each in trends.items()},
        "fidelity": fidelity,
    }
    (results / "accuracy.json").write_text(json.dumps(kept, indent=1) + "\n")
    page.draw(rows, names, results / "accuracy.png")
    print(text)
    if filled := args.page or (ROOT / "docs/results.md" if whole else None):
        place = re.compile(r"(<!-- accuracy -->\n).*?(<!-- /accuracy -->)", re.DOTALL)
        filled.write_text(place.sub(lambda old: f"{old[1]}\n{text}\n\n{old[2]}", filled.read_text()))
    print(f"\n{results / 'accuracy.png'}, {results / 'accuracy.json'}")


def full() -> list[Cell]:
    """The cells of a run without options."""
    return planned(1, LEVELS, list(METHODS), True)


if __name__ == "__main__":
    main()
