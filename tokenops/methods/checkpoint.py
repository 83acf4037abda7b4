"""Weights from files and from teachers. Files are read with weights_only: nothing in them is executed."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar

from timm.models import load_state_dict
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def load_checkpoint(model: Model, path: str | PathLike[str]) -> Model:
    """Load a whole checkpoint, every key of it (strict), and return the model.

    Args:
        model: the model. Those by name take published checkpoints as they are.
        path: a file of torch.save (a state dict, or a dict that holds one as "model" or "state_dict", as the published
            checkpoints do) or a .safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file needs more than weights_only allows, or its keys or shapes do not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_checkpoint: there is no file {path}")
    model.load_state_dict(load_state_dict(str(path), use_ema=False, weights_only=True))
    return model


def init_from_teacher(student: Model, teacher: nn.Module | Mapping[str, Tensor]) -> Model:
    """Start a patched model from its dense teacher, and return it; what the method added stays as made.

    Args:
        student: behind `tokenops.apply_patch`, a SiT say.
        teacher: the dense model of the same width and depth, or its state dict.

    Raises:
        RuntimeError: the teacher lacks more than what was added, has something else, or another shape.
    """
    state = dict(teacher.state_dict() if isinstance(teacher, nn.Module) else teacher)
    own = student.state_dict()
    patch = getattr(student, "tokenops_patch", None)
    added = {f".{i}.{name}." for i, name in patch.added.items()} if patch is not None else set()
    held = {name for found in (student.named_parameters, student.named_buffers) for name, _ in found("", True, False)}
    missing = [key for key in own if key in held - state.keys() and not any(part in key for part in added)]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise RuntimeError(f"init_from_teacher: the teacher lacks {missing} and has, but should not, {unexpected}")
    student.load_state_dict(state, strict=False)
    return student
