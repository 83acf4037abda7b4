"""Checkpoints that are whole or not there at all, and hold everything a run needs to go on as if never interrupted."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAST = "last.pt"


def write(path: Path, content: Any) -> None:
    """Put a file in its place when it is complete, as the disk sees it: text, or what torch.save takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # one name: of a killed process nothing else is left
    try:
        with part.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of `write`; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of `fit`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"resume: there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a strange file provokes
        raise ValueError(f"resume: {path} cannot be read: {error}") from None
    if not isinstance(state, dict) or "tokenops" not in state:
        raise ValueError(f"resume: {path} holds weights, but is no checkpoint of fit")
    return state


def where(resume: str | os.PathLike[str] | None, output: Path | None) -> Path | None:
    """The checkpoint to go on from: None to start; "auto" is the output's, if there is one."""
    if resume is None:
        return None
    if resume != "auto":
        return Path(resume)
    if output is None:
        raise ValueError("resume='auto' looks for a checkpoint in output, which is not given")
    return output / LAST if (output / LAST).is_file() else None


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators of this process."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    name, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int, process: int) -> None:
    """Every process draws its own dropped paths and mixtures."""
    random.seed(seed + process)
    np.random.seed((seed + process) % 2**32)
    torch.manual_seed(seed + process)
