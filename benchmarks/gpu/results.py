"""From the lines of a run to what is kept of it: benchmarks/results/<device>.json, and launches.json of the package."""

import collections
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from result_file import slug_of

from . import record
from .candidates import Config

GAIN = 0.97  # of the default's time: what is nearer to it may be noise
#: steps whose rows are results, and those of which is told how they ended
ROWS, EVIDENCE = ("operators", "models"), ("smoke", "tests", "sanitize")


class Results(NamedTuple):
    """Of the machine that the lines come from."""

    name: str  # a file's
    rehearsal: bool
    runs: dict[str, Any]
    rows: dict[str, Any]
    evidence: dict[str, Any]


def results(lines: Sequence[Mapping[str, Any]]) -> Results:
    """The last line of everything counts. ValueError: no line says what machine it was."""
    told: dict[str, Any] = {}
    rehearsal = False
    for line in lines:
        if line["step"] == "facts" and line["key"] == "machine":
            told[line["run"]] = dict(line["facts"])
        if line["step"] == "facts" and line["key"] == "ceilings":
            rates = dict(line["ceilings"])
            rehearsal = rehearsal or rates.pop("fake", False)
            told[line["run"]] |= rates
    if not told:
        raise ValueError("no line of the step facts says what machine this was")
    runs: dict[str, Any] = {}
    nearest = next(iter(told))
    for line in lines:  # of a run without this step, its facts are those of the run before
        nearest = line["run"] if line["run"] in told else nearest
        runs[line["run"]] = told[nearest]
    facts = list(runs.values())[-1]
    rows: dict[str, Any] = {}
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    for line in lines:
        if line["step"] in ROWS and line["outcome"] == record.OK and "row" in line:
            rows[line["key"]] = {"run": line["run"], **line["row"]}
        if line["step"] in EVIDENCE:
            last[line["step"], line["key"]] = line
    evidence = {step: of_step(step, list(last.values())) for step in EVIDENCE if any(s == step for s, _ in last)}
    name = slug_of(facts["device"], "cpu" if rehearsal else "cuda")
    return Results(f"rehearsal-{name}" if rehearsal else name, rehearsal, runs, rows, evidence)


def of_step(step: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many of its keys ended how, and what failed."""
    mine = [line for line in lines if line["step"] == step and "row" not in line]
    counts = collections.Counter("failed" if line["outcome"] == record.STARTED else line["outcome"] for line in mine)
    failed = [line for line in mine if line["outcome"] in (record.FAILED, record.STARTED)]
    said = {line["key"]: line.get("message", "it ended the process") for line in failed}
    return {"run": mine[-1]["run"], "counts": dict(counts), "failed": {k: v[:300] for k, v in said.items()}}


def launches(found: Iterable[Mapping[str, Any]], before: Mapping[str, Config] = {}) -> dict[str, Config]:
    """launches.json, of the sweep's lines: by entry the candidate that takes the least of the default's time; entries
    of before stay where nothing was tried.

    It gains more than 3 % at every size that has this entry, spills nothing, and has failed nowhere.
    """
    shares: dict[str, dict[str, float]] = {}
    for line in found:
        if line["step"] != "sweep" or line["gpu"] is None or not line["launch"]:
            continue
        right = line["outcome"] == record.OK and line["spills"] == 0
        share = line["us"] / line["default_us"] if right else math.inf
        of_entry = shares.setdefault(line["entry"], {})
        launch = json.dumps(line["launch"])
        of_entry[launch] = max(share, of_entry.get(launch, 0.0))
    chosen = {entry: min(of_entry.items(), key=lambda item: item[1]) for entry, of_entry in shares.items()}
    faster = {entry: json.loads(launch) for entry, (launch, share) in chosen.items() if share < GAIN}
    kept = {entry: config for entry, config in before.items() if entry not in shares}
    return dict(sorted((kept | faster).items()))


def launches_text(table: Mapping[str, Config]) -> str:
    """The file: an entry a line."""
    entries = ",\n".join(f"{json.dumps(entry)}: {json.dumps(config)}" for entry, config in table.items())
    return "{\n" + entries + "\n}\n" if entries else "{\n}\n"
