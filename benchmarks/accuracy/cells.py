"""Cells: one trained and tested model each, made in a few processes and kept, so that a killed run goes on."""

import base64
import hashlib
import inspect
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenops.measuring import machine

from . import models, recipes, scenery
from .data import load
from .models import Settings
from .recipes import Run


class Cell(NamedTuple):
    """A model: what it is called (``dense``, or a recipe's name), its part of the multiply-adds, and its seed."""

    name: str
    level: float
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, {self.level:g}, seed {self.seed}"

    @property
    def teacher(self) -> "Cell | None":
        """The cell of the model that this one begins as."""
        teacher = scenery.TEACHERS.get(self.name, None if self.name == "dense" else "dense")
        return None if teacher is None else Cell(teacher, 1.0, self.seed)


class Found(NamedTuple):
    """What became of a cell.

    Attributes:
        macs: of an image, in millions.
        parameters: how many.
        scores: of every test image: whether it is classified right, or what a map of it scores. Float64.
        seconds: of everything.
        speed: images a second in training; 0 where nothing was trained.
        commit: that it was made with.
    """

    macs: float
    parameters: int
    scores: np.ndarray
    seconds: float
    speed: float
    commit: str | None


def dense(run: Run) -> Any:
    torch.manual_seed(run.seed)
    return run.from_scratch(models.Plain(models.vit(run.settings), run.settings.smoothing))


RECIPES: dict[str, Callable[[Run], Any]] = {
    "dense": dense,
    **recipes.METHODS,
    **recipes.VARIANTS,
    **scenery.RECIPES,
}


def folder_of(cell: Cell, settings: Settings, root: Path) -> Path:
    """Its name says the settings, and the source here of what made this model and its teacher, and of its test.

    Not that of tokenops, torch or timm: results name the commit and the versions. Remove the folder where these matter.
    """
    chain = [cell] if cell.teacher is None else [cell, cell.teacher]
    tested = scenery.scores if cell.name in scenery.RECIPES else models.right
    text = repr((settings, cell, [sources(made) for made in (*(RECIPES[each.name] for each in chain), tested)]))
    name = re.sub(r"[^\w.]+", "-", str(cell))
    return root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def sources(made: Any) -> list[str]:
    """The source of a function or class of this package, and of those, and the constants, that it names."""
    found: dict[Any, str] = {}
    left = [made]
    while left:
        now = left.pop()
        if now in found:
            continue
        found[now] = inspect.getsource(now)
        for name in set(re.findall(r"\w+", found[now])):
            for module in (inspect.getmodule(now), models, recipes):
                other = getattr(module, name, None)
                if inspect.isfunction(other) or inspect.isclass(other):
                    if other.__module__.startswith(f"{__package__}.") and other is not Settings:
                        left.append(other)
                elif name.isupper() and not inspect.ismodule(other) and other is not None:
                    found[name] = repr(other)
    return sorted(found.values())


def kept(folder: Path) -> Found | None:
    """What a cell's folder has, if it is complete."""
    file = folder / "found.json"
    if not file.is_file():
        return None
    row = json.loads(file.read_text())
    return Found(**row | {"scores": np.frombuffer(base64.b64decode(row["scores"]), np.float16).astype(np.float64)})


def model_of(cell: Cell, settings: Settings, root: Path) -> Any:
    return torch.load(folder_of(cell, settings, root) / "model.pt", weights_only=False)


def make(cell: Cell, settings: Settings, root: Path) -> None:
    """Trained from its last checkpoint if there is one, tested, and kept."""
    torch.set_num_threads(1)  # two small models at once train faster than one on two cores
    folder, start = folder_of(cell, settings, root), time.perf_counter()
    checkpoints = folder / "training"
    checkpoints.mkdir(parents=True, exist_ok=True)
    teacher = None if cell.teacher is None else model_of(cell.teacher, settings, root)
    run = Run(teacher, cell.level, cell.seed, settings, checkpoints)
    torch.manual_seed(cell.seed)  # of modules that a method adds
    model = RECIPES[cell.name](run).eval()
    speed = models.speed(checkpoints)
    torch.manual_seed(cell.seed)  # of tokens that are drawn
    scenes = cell.name in scenery.RECIPES
    scores = scenery.scores(model) if scenes else models.right(model, load(settings.data)).numpy()
    row = {
        "macs": models.macs(model, scenery.SHAPE) if scenes else models.macs(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scores": base64.b64encode(scores.astype(np.float16).tobytes()).decode(),
        "seconds": time.perf_counter() - start,
        "speed": speed,
        "commit": machine.commit(),
    }
    torch.save(model, folder / "model.pt")
    (folder / "found.part").write_text(json.dumps(row))
    os.replace(folder / "found.part", folder / "found.json")
    shutil.rmtree(checkpoints)


def end_with_parent() -> None:
    """A process that trains ends with the one that asked for it, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def all_made(
    cells: Iterable[Cell], settings: Settings, root: Path, processes: int
) -> Iterator[tuple[Cell, Found, bool]]:
    """Every cell as it is ready, and whether it was kept before: its teacher first, so many at a time.

    With no process, those that are kept alone.
    """
    cells = list(dict.fromkeys(cells))
    waiting = []
    for cell in cells:
        found = kept(folder_of(cell, settings, root))
        if found is None:
            waiting.append(cell)
        else:
            yield cell, found, True
    if not waiting or not processes:
        return
    load(settings.data)  # a download is one process' work
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool:
        running: dict[Future, Cell] = {}
        try:
            while waiting or running:
                for cell in list(waiting):
                    if len(running) < processes and cell.teacher not in (*waiting, *running.values()):
                        waiting.remove(cell)
                        running[pool.submit(make, cell, settings, root)] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    future.result()
                    found = kept(folder_of(cell, settings, root))
                    assert found is not None
                    yield cell, found, False
        finally:
            for future in running:
                future.cancel()
