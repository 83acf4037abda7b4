"""Turns benchmarks/results/*.json into tables of docs/results.md and README.md, and into plots.

A page says where tables go: between `<!-- results:cpu -->` and `<!-- /results -->` come those of the result files
whose names begin with "cpu"; `<!-- results:cpu models -->` takes only the models, `operators` only the operators,
`main` only the operators at DeiT-S's size, `frozen` the models compiled with frozen weights, `gains` a few of these,
`strongest` the models against the fastest that the dense model can be made, and `evidence` what ran on the device and
how it ended. With `--lines` the lines of an evidence run are merged into the result file of their machine before; of a
rehearsal's only plots are made, beside the lines.
"""

import argparse
import importlib.util
import json
import re
import textwrap
from pathlib import Path

from gpu.record import parsed
from gpu.results import launches, launches_text
from gpu.results import results as results_of
from result_file import store, strongest

ROOT = Path(__file__).parents[1]
LAUNCHES = ROOT / "tokenops/ops/triton/launches.json"
PAGES = ROOT / "docs/results.md", ROOT / "README.md"
KINDS = "operators|models|main|frozen|gains|strongest|evidence"
MARKED = re.compile(rf"(<!-- results:(\S+)(?: ({KINDS}))? -->\n).*?(<!-- /results -->)", re.DOTALL)
#: the order of columns; others come behind
PEERS = ("reference", "published", "naive", "topk", "scatter", "eager", "sdpa flash", "sdpa + row", "compiled")
MARKERS = "osD^vP*Xhd<>"
LEGEND = "Columns with an x: times as fast as that, median and quartiles of interleaved rounds."
FROZEN = """\
Everything compiled with frozen weights. Speed-up over timm's dense model, and which part of the FLOP ratio that is;
*linears*: the part that the linear layers alone realise, each packed and run by itself; the published form's speed-up;
and *by fewer tokens alone*: ours over a dense model that has our faster attention, too. Medians and quartiles of
interleaved rounds, in which the machine's own copy and product rates moved by less than 15 % from one third of the
time to another."""
GAINS = """\
DeiT-S with each method, compiled with frozen weights, bfloat16, 8 images a batch, one thread: times as fast as timm's
dense model compiled the same way, median and quartiles; the same of the published form, where there is one; and what
is gained *by fewer tokens alone*: ours over a dense model that has our faster attention, too."""
HOW = re.compile(r"(.*?)(?: (eager|graph|frozen|compiled|compiled graph))?")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    options.add_argument("--pages", type=Path, nargs="*", default=PAGES, help="the pages with places for tables")
    options.add_argument("--lines", type=Path, help="lines.jsonl of an evidence run")
    args = options.parse_args()
    if args.lines and take(args.lines, args.results):
        return
    files = [path for path in sorted(args.results.glob("*.json")) if path.stem != "accuracy"]  # has its own table
    results = {path.stem: json.loads(path.read_text()) for path in files}
    for stem, result in results.items():
        plot(args.results, stem, result)
    for page in args.pages:
        page.write_text(filled(page.read_text(), results))
        print(page)


def take(path: Path, folder: Path) -> bool:
    """Merge an evidence run into the result file of its machine; or draw a rehearsal's, and say that it was one."""
    lines, torn = parsed(path)
    found = results_of(lines)
    print(f"{path}: {len(lines)} lines, {torn} torn, {len(found.rows)} rows of {found.name}")
    if found.rehearsal:
        runs = {run: facts | {"device": f"a rehearsal on {facts['device']}"} for run, facts in found.runs.items()}
        plot(path.parent, found.name, {"runs": runs, "rows": found.rows})
        return True
    store(folder / f"{found.name}.json", found.runs, found.rows, found.evidence)
    table = launches(lines, json.loads(LAUNCHES.read_text()))
    LAUNCHES.write_text(launches_text(table))
    print(f"{LAUNCHES}: {len(table)} launch configurations")
    return False


def plot(folder: Path, stem: str, result: dict) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    for kind, draw in (("operators", draw_operators), ("models", draw_models), ("frozen", draw_models)):
        if rows := rows_of(result, kind):
            draw(rows, result).savefig(folder / f"{stem}-{kind}.png")
            print(folder / f"{stem}-{kind}.png")


def filled(text: str, results: dict) -> str:
    """The text with every marked place filled in anew; a place that no result file belongs to stays, and it says so."""

    def fill(match):
        chosen = [result for stem, result in results.items() if stem.startswith(match[2])]
        if not chosen:
            print(
                f"results:{match[2]} stays as it is: no result file begins so ({', '.join(results) or 'there is none'})"
            )
            return match[0]
        kinds = [match[3]] if match[3] else ["models", "frozen", "operators"]
        if match[3] == "evidence":
            texts = [evidence(result) for result in chosen if "evidence" in result]
        else:
            texts = [
                table(rows, result, kind) for result in chosen for kind in kinds if (rows := rows_of(result, kind))
            ]
        return match[1] + "\n" + "\n\n".join(texts) + "\n\n" + match[4]

    return MARKED.sub(fill, text)


def rows_of(result: dict, kind: str) -> list[dict]:
    of_models = kind in ("models", "frozen", "gains", "strongest")
    rows = [row for row in result["rows"].values() if is_model(row) == of_models]
    # a model whose dense form could not run is compared with nothing
    rows = [row for row in rows if not is_model(row) or any("realised" in peer for peer in row["peers"].values())]
    if kind in ("models", "frozen", "gains"):
        rows = [row for row in rows if (HOW.fullmatch(row["operator"])[2] == "frozen") == (kind != "models")]
        return [row for row in rows if is_gain(row)] if kind == "gains" else rows
    return [row for row in rows if is_main(row)] if kind == "main" else rows


def is_main(row: dict) -> bool:
    """Forward at DeiT-S's size, a whole batch."""
    size, wanted = row["shape"], {"N": (196, 197), "M": (98,), "C": (384,), "H": (6, 14), "Dk": (64,)}
    fits = all(size[name] in values for name, values in wanted.items() if name in size)
    return fits and size["B"] > 1 and row["passes"] == "forward" and "vertical" not in row["operator"]


def is_gain(row: dict) -> bool:
    """DeiT-S with a method, a small batch in 16 bits, the processor held to one thread but to no instructions."""
    of_method = row["operator"].startswith("deit_small_patch16_224 ")
    return of_method and (row["dtype"], row["shape"]["B"], row.get("held")) == ("bfloat16", 8, "1 thread")


def is_model(row: dict) -> bool:
    """Of a model nothing but the batch is told."""
    return set(row["shape"]) == {"B"}


def evidence(result: dict) -> str:
    """What ran on the device, and how it ended."""
    lines = []
    for step, found in result["evidence"].items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found["counts"].items()))
        failed = "".join(f"\n  - {key}: {' '.join(said.split())}" for key, said in found["failed"].items())
        run = result["runs"][found["run"]]
        lines.append(f"- {step} on {run['device']}, commit {run['commit']}: {counts}{failed}")
    return "\n".join(lines)


def table(rows: list[dict], result: dict, kind: str) -> str:
    """A Markdown table and, below it, where its figures come from."""
    lines_of = {"models": model_lines, "frozen": frozen_lines, "gains": gain_lines}
    lines_of |= {"strongest": strongest_lines, "main": main_lines}
    header, lines = lines_of.get(kind, operator_lines)(rows)
    body = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]
    runs = [result["runs"][run] for run in sorted({row["run"] for row in rows})]
    return "\n".join(body) + "\n\n" + {"frozen": FROZEN, "gains": GAINS}.get(kind, LEGEND) + "\n\n" + origins(runs)


def main_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Medians only, and the peers in one cell."""
    header = ["operator", "B", "dtype", "us", "of the floor", "times as fast as"]
    return header, [
        [row["operator"], str(row["shape"]["B"]), row["dtype"], f"{row['us'][0]:.4g}", f"{row['of_floor']:.0%}"]
        + [", ".join(f"{peer} {row['peers'][peer]['ratio'][0]:.2f}" for peer in peers_of([row]))]
        for row in sorted(rows, key=order)
    ]


def operator_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    peers = peers_of(rows)
    extra = [key for key in ("host_us", "graph_us") if any(key in row for row in rows)]
    header = ["operator", "sizes", "dtype", "passes", "us", "of the floor", *extra, *(f"x {peer}" for peer in peers)]
    return header, [
        [row["operator"], sizes(row), row["dtype"], row["passes"], f"{row['us'][0]:.4g}", f"{row['of_floor']:.0%}"]
        + [f"{row[key]:.4g}" if key in row else "" for key in extra]
        + [ratio(row["peers"][peer]) if peer in row["peers"] else "" for peer in peers]
        for row in sorted(rows, key=order)
    ]


def model_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    header = [
        "model",
        "batch",
        "dtype",
        "images/s",
        "GMACs",
        "dense",
        "speed-up",
        "FLOP ratio",
        "realised",
        "x published",
    ]
    lines = []
    for row in sorted(rows, key=order):
        batch = row["shape"]["B"]
        dense = strongest(row)
        figures = row["peers"][dense]
        published = ratio(row["peers"]["published"]) if "published" in row["peers"] else ""
        speed, macs = 1e6 * batch / row["us"][0], row["flops"] / 2e9 / batch
        start = [
            row["operator"] + held(row),
            str(batch),
            row["dtype"],
            f"{speed:.4g}",
            f"{macs:.2f}",
            dense,
            ratio(figures),
        ]
        lines.append([*start, f"{figures['flop_ratio']:.2f}", f"{figures['realised']:.2f}", published])
    return header, lines


def frozen_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """A line a row: against timm's model, and the same with our attention, where there is one."""
    header = ["model", "dtype", "batch", "FLOP ratio", "speed-up", "realised", "linears", "published"]
    header += ["by fewer tokens alone", "realised"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["dtype"], -row["shape"]["B"], *order(row))):
        timms, ours, published = dense_forms(row)
        linears = row.get("linears")
        lines.append([
            HOW.fullmatch(row["operator"])[1] + held(row), row["dtype"], str(row["shape"]["B"]),
            f"{timms['flop_ratio']:.2f}", ratio(timms), f"{timms['realised']:.2f}",
            f"{linears['cap'][0] / linears['flop_ratio']:.2f}" if linears else "",
            published, *((ratio(ours), f"{ours['realised']:.2f}") if "sdpa" in row["peers"] else ("", "")),
        ])  # fmt: skip
    return header, lines


def gain_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """A method a line, the greatest speed-up first."""
    header = ["method", "operations saved", "times as fast", "as published", "by fewer tokens alone"]
    found = [(HOW.fullmatch(row["operator"])[1].partition(" ")[2], *dense_forms(row)) for row in rows]
    return header, [
        [f"`{method}`", f"{1 - 1 / timms['flop_ratio']:.0%}", ratio(timms), published, ratio(ours)]
        for method, timms, ours, published in sorted(found, key=lambda line: -line[1]["ratio"][0])
    ]


def dense_forms(row: dict) -> tuple[dict, dict, str]:
    """A frozen row against timm's model and against the one with our attention, and the published form's speed-up."""
    peers = row["peers"]
    ours = next(name for name, peer in peers.items() if "realised" in peer and name != "sdpa")
    timms, published = peers.get("sdpa", peers[ours]), peers.get("published")
    return timms, peers[ours], f"{timms['us'][0] / published['us'][0]:.2f}" if published else ""


def strongest_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Every side as fast as it can be made: the best of eager, compiled and graph."""
    forms: dict[tuple, dict[str, list]] = {}
    for row in rows:
        form, how = HOW.fullmatch(row["operator"]).groups()
        sides = forms.setdefault(
            (form + held(row), row["dtype"], row["shape"]["B"]), {"ours": [], "dense": [], "published": []}
        )
        sides["ours"].append((row["us"][0], how or "eager", 1.0))
        for name, peer in row["peers"].items():
            side = "published" if name == "published" else "dense"
            sides[side].append((peer["us"][0], how or "eager", peer.get("flop_ratio", 1.0)))
    header = ["model", "batch", "dtype", "images/s", "ours as", "dense as", "speed-up", "FLOP ratio", "realised"]
    lines = []
    for (form, dtype, batch), sides in sorted(forms.items(), key=lambda item: (*item[0][:2], -item[0][2])):
        (ours, as_, _), (dense, dense_as, flop_ratio) = min(sides["ours"]), min(sides["dense"])
        published = f"{min(sides['published'])[0] / ours:.2f}" if sides["published"] else ""
        speed = [f"{dense / ours:.2f}", f"{flop_ratio:.2f}", f"{dense / ours / flop_ratio:.2f}", published]
        lines.append([form, str(batch), dtype, f"{1e6 * batch / ours:.4g}", as_, dense_as, *speed])
    return [*header, "x published"], lines


def origins(runs: list[dict]) -> str:
    """Where the figures come from: an item for each device and torch, with the commits and rates of all its runs."""
    alike: dict[str, list[dict]] = {}
    for run in runs:
        alike.setdefault(machine(run), []).append(run)
    items = [f"- {said}; {commits(found)}; {ceilings(found)}" for said, found in alike.items()]
    return "\n".join(textwrap.fill(item, 118, subsequent_indent="  ", break_on_hyphens=False) for item in items)


def machine(run: dict) -> str:
    parts = [
        run["device"] + (f" with {run['instructions']}" if run.get("instructions") else ""),
        f"threads {run['threads']}" if run["driver"] is None else f"driver {run['driver']}",
        f"torch {run['torch']}",
        f"triton {run['triton']}",
    ]
    return "; ".join(parts)


def commits(runs: list[dict]) -> str:
    found = list(dict.fromkeys(run["commit"] for run in runs))
    return f"commit{'s' if len(found) > 1 else ''} {', '.join(found)}"


def ceilings(runs: list[dict]) -> str:
    """What copies and products were measured to reach, from the least to the most of the runs."""
    rates = {"copy_bytes_per_s": (1e9, "GB/s copy")}
    rates |= {
        key: (1e12, f"TFLOP/s {key.rpartition('_')[2]} matmul")
        for run in runs
        for key in run
        if key.startswith("flops_per_s_")
    }
    said = []
    for key, (unit, what) in rates.items():
        found = sorted({f"{run[key] / unit:.3g}": run[key] for run in runs if key in run}.items(), key=lambda x: x[1])
        if found:
            said.append("..".join(dict.fromkeys((found[0][0], found[-1][0]))) + f" {what}")
    return f"ceilings {', '.join(said) or 'of the session'}"


def order(row: dict) -> tuple:
    return row["operator"], row["dtype"], -row["shape"]["B"], *list(row["shape"].values())[1:], row["passes"]


def held(row: dict) -> str:
    """To how many threads or which instructions the processor was held."""
    return f", {row['held']}" if "held" in row else ""


def sizes(row: dict) -> str:
    return " ".join(f"{name}={size}" for name, size in row["shape"].items())


def label(row: dict) -> str:
    return f"{row['operator']} {row['passes']}, {sizes(row)}"


def ratio(peer: dict) -> str:
    return spread(peer["ratio"])


def spread(values: list[float]) -> str:
    return "{:.2f} ({:.2f}..{:.2f})".format(*values)


def peers_of(rows: list[dict]) -> list[str]:
    there = {peer for row in rows for peer, figures in row["peers"].items() if "ratio" in figures}
    return [peer for peer in PEERS if peer in there] + sorted(there - set(PEERS))


def draw_operators(rows: list[dict], result: dict):
    """How many times as fast as each peer, with quartiles, on a logarithmic axis: right of the line is faster."""
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    labels = list({label(row): None for row in sorted(rows, key=order, reverse=True)})
    figure, columns = new_figure(5 + 5 * len(dtypes), 1.4 + 0.22 * len(labels), columns=len(dtypes))
    peers = peers_of(rows)
    for axes, dtype in zip(columns, dtypes):
        for j, peer in enumerate(peers):
            there = [row for row in rows if row["dtype"] == dtype and peer in row["peers"]]
            middle, low, high = zip(*[row["peers"][peer]["ratio"] for row in there]) if there else ((), (), ())
            error = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
            y = [labels.index(label(row)) for row in there]
            style = dict(fmt=MARKERS[j % len(MARKERS)], ms=5, elinewidth=0.8, color=f"C{j % 10}", label=peer)
            axes.errorbar(middle, y, xerr=error, **style)
        axes.axvline(1, color="black", lw=1)
        axes.set_xscale("log")
        axes.set_title(dtype, loc="left", fontsize=10)
        axes.grid(axis="y", lw=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    low, high = columns[0].get_xlim()
    ticks = [t for t in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 24) if low <= t <= high]
    columns[0].set_xticks(ticks, [f"{t:g}x" for t in ticks])
    columns[0].set_xticks([], minor=True)
    columns[0].set_yticks(range(len(labels)), labels, fontsize=8)
    columns[0].set_ylim(-0.6, len(labels) - 0.4)
    figure.suptitle(f"times as fast as each peer, {device_of(result)}", fontsize=11)
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_models(rows: list[dict], result: dict):
    """Speed-up against FLOP ratio: on the diagonal every operation saved is time saved."""
    figure, axes = new_figure(10, 5.6)
    best: dict[tuple, dict] = {}  # of eager, compiled and graph
    for row in sorted(rows, key=order):
        key = HOW.fullmatch(row["operator"])[1] + held(row), row["dtype"], row["shape"]["B"]
        best[key] = min(best.get(key, row), row, key=lambda r: r["us"][0])
    points = [(row, row["peers"][strongest(row)]) for row in best.values()]
    for i, (row, dense) in enumerate(points):
        middle, low, high = dense["ratio"]
        name = f"{row['operator']}{held(row)}, batch {row['shape']['B']}, {row['dtype']}"
        error = [[middle - low], [high - middle]]
        axes.errorbar(dense["flop_ratio"], middle, yerr=error, fmt=MARKERS[i % len(MARKERS)], capsize=3, label=name)
    end = 1.1 * max(max(d["flop_ratio"], d["ratio"][2]) for _, d in points)
    axes.plot([1, end], [1, end], color="black", lw=1, label="all of the saving realised")
    axes.set(xlim=(1, end), ylim=(min([1, *(d["ratio"][1] for _, d in points)]), end))
    axes.set_xlabel("FLOPs of the dense model / FLOPs of the slimmed one")
    axes.set_ylabel("speed-up over the faster dense form, timm's or with our attention")
    axes.set_title(f"what the slimming saves, {device_of(result)}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(points) // 30, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def new_figure(width: float, height: float, columns: int = 0):
    """A figure with one axes, or with as many side by side, on the same scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    if not columns:
        return figure, figure.subplots()
    return figure, figure.subplots(ncols=columns, sharex=True, sharey=True, squeeze=False)[0]


def device_of(result: dict) -> str:
    return ", ".join(sorted({run["device"] for run in result["runs"].values()}))


if __name__ == "__main__":
    main()
