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
        model: the model. A SiT without reverse modules leaves their entries out of an official checkpoint.
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
    """Start a SiT from its dense teacher, as the paper's training does, and return it; slimming modules stay as made.

    Args:
        student: the SiT.
        teacher: an LV-ViT of the same width and depth (for `sit_deit_*` a timm DeiT or ViT), or its state dict.

    Raises:
        RuntimeError: the teacher lacks more than the slimming modules, has something else, or another shape.
    """
    state = dict(teacher.state_dict() if isinstance(teacher, nn.Module) else teacher)
    own = student.state_dict()
    missing = [key for key in own if key not in state and not key.startswith(("tsm.", "rtsm."))]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise RuntimeError(f"init_from_teacher: the teacher lacks {missing} and has, but should not, {unexpected}")
    student.load_state_dict(state, strict=False)
    return student
