"""What every method costs in accuracy and saves in time, on real handwritten digits: `make accuracy`.

scikit-learn's 1797 digits, 8 x 8 pixels made 32 x 32, and a ViT of 6 blocks on 64 patches of them. A dense model is
trained for every seed; each method begins as that model, is brought to the same parts of its multiply-adds, and is
fine-tuned for as many epochs as the others (token merging is also shown without training). Then accuracy on images that
no training saw, throughput measured side by side in one run, a table, a plot, and results/accuracy.json.
"""

import argparse
import copy
import io
import json
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from tokenops import training
from tokenops.measuring import machine
from tokenops.measuring.timing import Spread, clock, interleaved, ratio
from tokenops.methods import cait, patch_slimming
from tokenops.nn import convert_attention

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=2, num_classes=10)
#: the blocks that see fewer tokens than the one before
PLACES = (2, 4)
LEVELS = {"mild": 0.65, "strong": 0.45}  # parts of the dense model's multiply-adds
BATCH, TIMED = 32, 128  # images of a step, and of a timed call


class Settings(NamedTuple):
    seeds: int = 3
    dense_epochs: int = 16
    epochs: int = 5
    lr: float = 1e-3
    rounds: int = 15
    processes: int = 2


class Digits(NamedTuple):
    """Training, and test images ``(n, 3, 32, 32)`` with their labels."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls) -> "Digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        found = load_digits()
        pixels = torch.from_numpy(found.images).float().div(8).sub(1).unsqueeze(1)
        images = F.interpolate(pixels, (32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
        labels = torch.from_numpy(found.target)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
        return cls(*(t.contiguous() for t in (images[train], labels[train], images[test], labels[test])))

    def loader(self) -> DataLoader:
        return DataLoader(Moved(self.images, self.labels), BATCH, shuffle=True, drop_last=True)

    @torch.inference_mode()
    def accuracy(self, model: Any) -> float:
        """Per cent of the test images."""
        right = model.eval()(self.test_images).argmax(1) == self.test_labels
        return 100 * right.double().mean().item()


class Moved(Dataset):
    """Images, each moved by up to two of their 32 pixels."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        dy, dx = torch.randint(-2, 3, (2,)).tolist()
        return self.images[index].roll((dy, dx), dims=(1, 2)), self.labels[index]  # the border is empty


def vit(kind: Any = VisionTransformer, **options: Any) -> Any:
    """A model that learns fast from few images: two convolutions make the patches, and places weigh as much as they."""
    model = kind(**SIZES, weight_init="jax", **options)  # timm's default init suits wide models
    width = SIZES["embed_dim"]
    first, second = nn.Conv2d(3, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)
    model.patch_embed.proj = nn.Sequential(first, nn.GELU(), second)
    model.pos_embed.data.mul_(10)
    return model


def macs(model: Any) -> float:
    """Multiply-adds of one image, in millions."""
    was_training = model.training
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(2, 3, 32, 32))
    model.train(was_training)
    return counter.get_total_flops() / 4e6


def train(objective: Any, digits: Digits, seed: int, epochs: int, lr: float, warmup: float = 1) -> Any:
    """The objective's model, trained."""
    loop: dict[str, Any] = dict(warmup_epochs=warmup, clip=1.0, progress=False, device="cpu")
    training.fit(objective, digits.loader(), epochs=epochs, lr=lr, seed=seed, **loop)
    return objective.model


def reached(make: Callable[[float], Any], target: float) -> Any:
    """The model whose multiply-adds come nearest to the target; the more, the larger what `make` is given (0 to 1)."""
    low, high, found = 0.0, 1.0, []
    for _ in range(9):
        middle = (low + high) / 2
        model = make(middle)
        cost = macs(model)
        found.append((abs(cost - target), len(found), model))
        low, high = (middle, high) if cost < target else (low, middle)
    return min(found)[2]


class Run(NamedTuple):
    """One dense model, the level to bring it to, and what a method may use."""

    dense: Any
    target: float  # of the multiply-adds, in millions
    digits: Digits
    seed: int
    settings: Settings

    def patched(self, method: str, option: Callable[[float], dict[str, Any]]) -> Any:
        return reached(
            lambda part: tokenops.apply_patch(copy.deepcopy(self.dense), method, **option(part)), self.target
        )

    def fine_tuned(self, objective: Any) -> Any:
        return train(objective, self.digits, self.seed, self.settings.epochs, self.settings.lr)

    def plain(self, model: Any) -> Any:
        return self.fine_tuned(training.Plain(model))


def sit(run: Run, recalibrate: bool) -> Any:
    model = run.patched("sit", lambda part: dict(keeping_ratio=max(part, 0.126), locations=PLACES))
    if not recalibrate:
        return run.plain(model)
    return run.fine_tuned(training.FeatureRecalibration(model, run.dense, smoothing=0.0))


def evit(run: Run, fuse: bool) -> Any:
    return run.plain(
        run.patched("evit", lambda part: dict(keep_rate=max(part, 0.02), reduction_loc=PLACES, fuse_token=fuse))
    )


def evo_vit(run: Run) -> Any:
    def make(part: float) -> Any:
        model = vit(global_pool="avg", fc_norm=True)
        names = (name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name for name in dense)
        model.load_state_dict(dict(zip(names, dense.values())))
        return tokenops.apply_patch(model, "evo_vit", prune_ratio=max(part, 1 / 64), stages=PLACES)

    dense = run.dense.state_dict()
    return run.fine_tuned(training.SlowFast(reached(make, run.target))).eval()


def slim_schedule(run: Run) -> Any:
    """A schedule of Patch Slimming that costs the target: its counts come from tolerances, searched by halves."""
    sample = run.digits.images[:: max(1, len(run.digits.images) // 96)]
    found: list = []

    def make(part: float) -> Any:
        tolerance = 0.5 * (1 - part) ** 3 + 1e-4
        search = patch_slimming.search(run.dense, sample, tolerance, 4, epochs=0, progress=False)
        found.append((search.model, search.schedule))
        return search.model

    model = reached(make, run.target)
    return next(schedule for searched, schedule in found if searched is model)


def patch_slim(run: Run) -> Any:
    return run.plain(tokenops.apply_patch(copy.deepcopy(run.dense), "patch_slimming", schedule=slim_schedule(run)))


def dynamic_slim(run: Run) -> Any:
    """Two steps down, where the other methods have theirs."""

    def make(part: float) -> Any:
        counts = [65 if i < PLACES[0] else 1 + round(64 * part ** (1 if i < PLACES[1] else 2)) for i in range(6)]
        return tokenops.apply_patch(copy.deepcopy(run.dense), "dps", counts=counts, after=PLACES[0])

    return run.fine_tuned(training.PatchRanking(reached(make, run.target), run.dense))


def cait_compressed(run: Run) -> Any:
    """Merged where the others reduce (at the mild level once), then channels pruned for what is missing."""
    model, dense = copy.deepcopy(run.dense), macs(run.dense)
    points = {PLACES[0] - 1: "horizontal", PLACES[1] - 1: "vertical"}
    if run.target / dense > 0.5:
        points = {PLACES[1] - 1: "horizontal"}
    cait.prunable(tokenops.apply_patch(model, "cait", points=points))
    steps = run.settings.epochs * (len(run.digits.images) // BATCH)
    part = min(1.0, run.target / macs(model))
    pruner = cait.ChannelPruner(
        model, part, steps=(0, max(2, steps // 2)), every=max(1, steps // 40), multiples={"hidden": 8, "qk": 2, "v": 2}
    )
    return run.fine_tuned(training.Pruned(model, pruner, teacher=run.dense, smoothing=0.0))


def tome(run: Run, tuned: bool) -> Any:
    model = run.patched("tome", lambda part: dict(r=round(32 * (1 - part))))
    return run.plain(model) if tuned else model


METHODS: dict[str, Callable[[Run], Any]] = {
    "SiT with FRD": lambda run: sit(run, True),
    "SiT": lambda run: sit(run, False),
    "EViT": lambda run: evit(run, True),
    "EViT, dropping only": lambda run: evit(run, False),
    "Evo-ViT": evo_vit,
    "Patch Slimming": patch_slim,
    "DPS (reconstruction)": dynamic_slim,
    "CAIT (reconstruction)": cait_compressed,
    "ToMe, not trained": lambda run: tome(run, False),
    "ToMe": lambda run: tome(run, True),
}


def dense_model(seed: int, settings: Settings) -> Any:
    torch.manual_seed(seed)
    return train(training.Plain(vit()), Digits.load(), seed, settings.dense_epochs, settings.lr, warmup=3)


def reduced_model(name: str, part: float, saved: bytes, seed: int, settings: Settings) -> Any:
    """By a method, to a part of the multiply-adds of a dense model."""
    dense = loaded(saved)
    torch.manual_seed(seed)
    return METHODS[name](Run(dense, part * macs(dense), Digits.load(), seed, settings))


def in_a_process(make: Callable[..., Any], *arguments: Any) -> tuple[float, float, bytes]:
    """Million multiply-adds, accuracy, and the model as bytes."""
    torch.set_num_threads(1)  # two small models at once train faster than one on two cores
    model = make(*arguments)
    return macs(model), Digits.load().accuracy(model), saved(model)


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


def throughput(models: dict[str, Any], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Images a second, and how many times as fast as the dense model, of all models in the same rounds."""
    images = torch.randn(TIMED, 3, 32, 32)
    dense = copy.deepcopy(models["dense"])
    convert_attention(dense)  # both with the best attention there is
    sides = {name: partial(m.eval(), images) for name, m in {**models, "dense": dense}.items()}

    with torch.inference_mode():
        times = interleaved(sides, rounds, clock("cpu"))
    speeds = {name: list(Spread.of([TIMED / t for t in ts])) for name, ts in times.items()}
    return {name: (speeds[name], list(ratio(times["dense"], ts))) for name, ts in times.items()}


def measured(settings: Settings, methods: Sequence[str]) -> dict[str, Any]:
    """Everything: trained and tested in a few processes, then timed in this one."""
    seeds, found = range(settings.seeds), {}
    with Progress() as progress, ProcessPoolExecutor(settings.processes, get_context("spawn")) as pool:
        task = progress.add_task("training", total=settings.seeds * (1 + len(LEVELS) * len(methods)))

        def finished(futures: dict[Any, tuple[str, int]]) -> None:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress.update(task, advance=1, description="{}, seed {}".format(*futures[future]))

        finished({pool.submit(in_a_process, dense_model, seed, settings): ("dense", seed) for seed in seeds})
        jobs = [(seed, level, name) for seed in seeds for level in LEVELS for name in methods]
        given = {job: (job[2], LEVELS[job[1]], found["dense", job[0]][2], job[0], settings) for job in jobs}
        finished(
            {pool.submit(in_a_process, reduced_model, *given[job]): (f"{job[2]}, {job[1]}", job[0]) for job in jobs}
        )
    names = ["dense", *(f"{name}, {level}" for level in LEVELS for name in methods)]
    rows = {name: [found[name, seed][:2] for seed in seeds] for name in names}
    timed = {name: loaded(found[name, 0][2]) for name in names}
    speeds = throughput(timed, settings.rounds)
    return {
        name: {
            "macs": float(np.mean([cost for cost, _ in found])),
            "accuracy": [accuracy for _, accuracy in found],
            "images_per_second": speeds[name][0],
            "speed_up": speeds[name][1],
        }
        for name, found in rows.items()
    }


def table(rows: dict[str, Any], origin: str) -> str:
    """The result as Markdown, a line a method and level."""
    lines = [
        "| method | MMACs | of the dense | top-1 (seeds) | images/s | speed-up | realised |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = rows["dense"]["macs"]
    for name, row in rows.items():
        seeds = ", ".join(f"{a:.1f}" for a in row["accuracy"])
        speed_up, part = row["speed_up"], row["macs"] / dense
        lines.append(
            f"| {name} | {row['macs']:.2f} | {part:.2f} | {np.mean(row['accuracy']):.1f} ({seeds}) |"
            f" {row['images_per_second'][0]:.0f} | {speed_up[0]:.2f} ({speed_up[1]:.2f}..{speed_up[2]:.2f}) |"
            f" {speed_up[0] * part:.2f} |"
        )
    return "\n".join(lines) + "\n\n" + textwrap.fill(origin, 118, break_long_words=False, break_on_hyphens=False)


def draw(rows: dict[str, Any], path: Path) -> None:
    """Accuracy against multiply-adds, and against measured speed-up; a line a method, its seeds as a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
    left, right = figure.subplots(ncols=2, sharey=True)
    dense = rows["dense"]
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in rows if name != "dense"))
    for axes, key in ((left, "macs"), (right, "speed_up")):
        at = (lambda row: row["macs"]) if key == "macs" else (lambda row: row["speed_up"][0])
        for i, name in enumerate(names):
            points = [dense, *(rows[f"{name}, {level}"] for level in LEVELS)]
            means = np.array([np.mean(row["accuracy"]) for row in points])
            low, high = (np.array([f(row["accuracy"]) for row in points]) for f in (min, max))
            axes.errorbar(
                [at(row) for row in points],
                means,
                yerr=[means - low, high - means],
                fmt="osD^vP*Xh<"[i % 10] + "-",
                color=f"C{i}",
                lw=1,
                ms=6,
                elinewidth=0.7,
                label=name,
            )
        axes.plot(at(dense), np.mean(dense["accuracy"]), "k*", ms=13, label="dense")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(lw=0.3)
    left.set(xlabel="million multiply-adds an image", ylabel="top-1 on test digits, %")
    right.set(xlabel="measured speed-up over the dense model, on a CPU")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle("accuracy against cost: mean of the seeds, bars from the worst to the best", fontsize=10)
    figure.savefig(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in Settings()._asdict().items():
        options.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    options.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    given = vars(options.parse_args())
    folder, page, methods = given.pop("results"), given.pop("page"), given.pop("methods")
    start = time.perf_counter()
    rows = measured(Settings(**given), methods)
    facts = machine.facts("cpu") | {"commit": machine.commit(), "seconds": round(time.perf_counter() - start)}
    origin = (
        f"{facts['device']}; threads {facts['threads']}; torch {facts['torch']}; commit {facts['commit']};"
        f" {given['seeds']} seeds, {given['epochs']} epochs of fine-tuning; made in {facts['seconds']} s."
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.json").write_text(json.dumps({"run": facts | given, "rows": rows}, indent=1) + "\n")
    draw(rows, folder / "accuracy.png")
    text = table(rows, origin)
    print(text)
    place = re.compile(r"(<!-- accuracy -->\n).*?(<!-- /accuracy -->)", re.DOTALL)
    page.write_text(place.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page.read_text()))
    print(f"{folder / 'accuracy.png'}, {folder / 'accuracy.json'}")


if __name__ == "__main__":
    main()
