"""The flags for a model, and the models: timm's and ours by name, the hub's, Hugging Face folders, checkpoints."""

import argparse
import difflib
import json
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokenops

from ..methods.cait.merging import merges_of
from ..methods.cait.structure import Structure, restructure
from ..patching.images import open_rgb
from ..patching.site import Site
from . import CommandError
from .methods import METHODS, apply, method_label, method_options

MODEL = "deit_small_patch16_224"
SEEDS = 2**64 - 1  # the greatest that torch takes
#: what names a model of the Hugging Face hub, or a folder of timm's
HUB = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")
#: the classifiers of transformers whose blocks can be patched
HUGGING_FACE = (
    "beit",
    "clip",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "metaclip_2",
    "siglip",
    "vit",
    "vit_msn",
)


#: behind where weights come from, if they have none for the classifier
HEADLESS = ", its head random"


class Made(NamedTuple):
    """A model in eval mode, and where its weights come from ("" for random ones)."""

    model: Any
    weights: str


def trained(weights: str) -> bool:
    """Whether a model of these weights (`Made`) can tell classes."""
    return bool(weights) and HEADLESS not in weights


class Classifier(nn.Module):
    """A classifier of transformers, called as timm's are: images to logits, with what timm's transforms go by."""

    def __init__(self, model: Any, preprocessor: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.num_classes = model.config.num_labels
        size = getattr(model.config, "vision_config", model.config).image_size
        cropped = preprocessor.get("do_center_crop", False)
        self.pretrained_cfg = {
            "input_size": (3, size, size),
            "mean": tuple(preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
            "std": tuple(preprocessor.get("image_std", (0.5, 0.5, 0.5))),
            "interpolation": {2: "bilinear", 3: "bicubic"}.get(preprocessor.get("resample", 2), "bilinear"),
            "crop_pct": 1.0,
            "crop_mode": "center" if cropped else "squash",
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and its weights, under timm's names."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=MODEL, metavar="NAME", help=f"{NAMES} (default: %(default)s)")
    add("--pretrained", action="store_true", help="download the published weights")
    add("--checkpoint", type=Path, metavar="FILE", help="weights of the model, or of the model with its method")
    add("--img-size", type=int, metavar="N", help="pixels of an image's side (default: the model's own)")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's own)")


NAMES = "a timm name, ours among them; or hf-hub:OWNER/NAME or a Hugging Face folder, which bring their weights"


def create(flag: str, name: str, pretrained: bool = False, **kwargs: Any) -> Made:
    """A dense model by name, with random or published weights; `kwargs` go to timm.create_model.

    Raises CommandError, in one line: there is no such model, it does not take the arguments, or the net is not there.
    """
    remote = name.startswith(HUB)
    if not remote and Path(name).is_dir():
        return from_folder(flag, Path(name), kwargs)
    check_name(flag, name)
    if pretrained and not remote and not timm.models.is_model_pretrained(name):
        raise CommandError(f"--pretrained, but no weights of {name} can be downloaded: use --checkpoint")
    download = pretrained or remote
    hub_logging.set_verbosity_error()  # it would tell of every try
    try:
        model: Any = timm.create_model(name, pretrained=download, **kwargs)
    except OSError as error:
        asked = flag if remote else "--pretrained" if flag == "--model" else f"{flag}-pretrained"
        offline = isinstance(error, LocalEntryNotFoundError)
        why = "no connection to the hub, and not in its cache" if offline else f"{type(error).__name__}: {error}"
        said = f"the weights of {name} cannot be downloaded ({' '.join(why.split())})"
        raise CommandError(f"{asked}: {said}: give a folder, or a --checkpoint without --pretrained") from None
    except Exception as error:  # whatever a model makes of its arguments
        raise CommandError(f"{flag}: cannot make {name} with {kwargs}: {one_line(error)}") from None
    if "img_size" in kwargs:  # what transforms go by
        size = kwargs["img_size"]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    headless = download and model.num_classes != model.pretrained_cfg.get("num_classes")
    return Made(model.eval(), ("published weights" if download else "") + HEADLESS * headless)


def check_name(flag: str, name: str) -> None:
    """Raises CommandError, with what is near, where a name is of no model."""
    if not (name.startswith(HUB) or Path(name).is_dir() or timm.models.is_model(name)):
        near = nearest(name)
        rest = f"; near it are: {', '.join(near)}" if near else ": timm.list_models() tells all"
        raise CommandError(f"{flag}: timm knows no model {name!r}{rest}")


def nearest(name: str) -> list[str]:
    """The models whose names, or the beginnings of these, are most like it."""
    forms: dict[str, str] = {}
    for model in timm.list_models():
        for form in (model, model[: len(name)]):
            forms.setdefault(form, model)
    return list(dict.fromkeys(forms[form] for form in difflib.get_close_matches(name, forms, 5)))


def one_line(error: BaseException, most: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + " ..."


def from_folder(flag: str, folder: Path, kwargs: dict[str, Any]) -> Made:
    """A model in a folder as the hub has them: timm's, or one of transformers' that can be patched."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it must be an object, but is {one_line(ValueError(config), 60)}")
    except (OSError, ValueError) as error:
        raise CommandError(f"{flag} {folder}: a folder of a model needs its config.json: {error}") from None
    if "architecture" in config:
        made = create(flag, f"local-dir:{folder}", **kwargs)
        return Made(made.model, str(folder) + HEADLESS * (not trained(made.weights)))
    if config.get("model_type") not in HUGGING_FACE:
        kinds = ", ".join(HUGGING_FACE)
        raise CommandError(
            f"{flag} {folder}: its model_type is {config.get('model_type')!r}, but it must be of timm, or {kinds}"
        )
    classes = kwargs.pop("num_classes", None)
    if kwargs:
        raise CommandError(f"{flag} {folder}: a model of transformers takes no {', '.join(kwargs)}")
    try:
        from transformers import AutoModelForImageClassification
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # it would tell of a head without weights, as `Made` does
        transformers_logging.disable_progress_bar()
        other = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
        how = {"local_files_only": True, "output_loading_info": True}
        model, loading = AutoModelForImageClassification.from_pretrained(folder, **how, **other)
        preprocessor = folder / "preprocessor_config.json"
        classifier = Classifier(model, json.loads(preprocessor.read_text()) if preprocessor.is_file() else {})
        headless = bool(loading["missing_keys"] or loading["mismatched_keys"])
        return Made(classifier.eval(), str(folder) + HEADLESS * headless)
    except ImportError as missing:
        raise CommandError(f"{flag} {folder} needs transformers: pip install 'tokenops[hf]' ({missing})") from None
    except Exception as error:  # whatever a strange folder provokes
        raise CommandError(f"{flag} {folder}: {type(error).__name__}: {one_line(error)}") from None


def dense(args: argparse.Namespace, **kwargs: Any) -> Made:
    """--model without its method. A --checkpoint is loaded by `make`, which knows whether it is of the dense model."""
    at_least(1, img_size=args.img_size, num_classes=args.num_classes)
    wanted = {"img_size": args.img_size, "num_classes": args.num_classes}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    return create("--model", args.model, args.pretrained and args.checkpoint is None, **wanted | kwargs)


def make(args: argparse.Namespace, **kwargs: Any) -> Made:
    """`dense`, --method applied, and --checkpoint loaded, be it of the dense, the patched or the compacted model."""
    method_options(args)  # what is wrong with them is said before a model is made
    state, structure = read_checkpoint(args.checkpoint) if args.checkpoint else (None, None)
    model, weights = dense(args, **kwargs)
    plain = state is not None and structure is None and state.keys() == model.state_dict().keys()
    if plain:
        load(model, state, args)
    before = model.state_dict().keys()
    model = apply(model, args) if structure is None else compacted(model, structure, args)
    if state is not None and not plain:
        load(model, state, args)
    weights = str(args.checkpoint) if args.checkpoint else weights
    if weights and (plain or state is None) and model.state_dict().keys() - before:
        weights += f", what {args.method} adds to it untrained"
    return Made(model, weights)


def compacted(model: Any, structure: str, args: argparse.Namespace) -> Any:
    """The model with the merges and widths that `train --objective cait` left; --method cait adds nothing to them."""
    if args.method not in ("none", "cait"):
        raise CommandError(f"--checkpoint: {args.checkpoint} is compacted by cait, and takes no --method {args.method}")
    try:
        found = Structure.from_json(structure)
        if any(merge is not None for merge in merges_of(model)):
            found = Structure(widths=found.widths)
        return restructure(model, found).eval()
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"--checkpoint: {args.checkpoint} is not of {args.model}: {error}") from None


def read_checkpoint(path: Path) -> tuple[Any, str | None]:
    """The weights, and what says the `Structure` of a compacted model."""
    if not path.is_file():
        raise CommandError(f"--checkpoint: there is no file {path}")
    try:
        state = load_state_dict(str(path), weights_only=True)
        if path.suffix == ".safetensors":
            return state, None
        content = torch.load(path, map_location="cpu", weights_only=True)
        structure = content.get("structure")
    except Exception as error:  # torch.load raises whatever a strange file provokes
        raise CommandError(f"--checkpoint: {path} holds no weights: {one_line(error)}") from None
    if "optimizers" in content:
        raise CommandError(f"--checkpoint: {path} is a checkpoint to resume from: take model.pt beside it")
    return state, structure


def load(model: Any, state: Any, args: argparse.Namespace) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        said = f"{args.checkpoint} does not hold weights of {args.model}: {one_line(error)}"
        raise CommandError(f"--checkpoint: {said}") from None


def dense_form(name: str) -> tuple[str, dict[str, Any]] | None:
    """The dense model of a method's (a timm name and arguments), None for other models."""
    if name.startswith("evo_levit_"):
        return name, {"keeping_ratio": 1.0}
    found = re.fullmatch(r"(sit|evit|evo|ps|dps|cait)_((deit|lvvit)_\w+)", name)
    if found is None:
        return None
    form = found[2].replace("xsmall", "small")
    return form if "_patch" in form or "lvvit" in form else f"{form}_patch16_224", {}


def check_reduced(args: argparse.Namespace) -> None:
    """Raises CommandError where there is no such model, and where neither --method nor the model reduces anything."""
    check_name("--model", args.model)
    if args.method == "none" and dense_form(args.model) is None:
        known = ", ".join(METHODS)
        raise CommandError(f"--method none, and {args.model} reduces nothing: choose a --method, {known}")


def dense_of(made: Any, args: argparse.Namespace) -> tuple[str, Any]:
    """Name and model to compare with: a copy without --method; of a model of ours its dense form, of random weights."""
    if args.method != "none" and hasattr(made, "tokenops_patch"):
        return "the dense model", tokenops.remove_patch(deepcopy(made))
    name, arguments = (args.method == "none" and dense_form(args.model)) or (args.model, {})  # a compacted model's own
    others = {"model": name, "checkpoint": None, "pretrained": False}
    model, _ = dense(argparse.Namespace(**{**vars(args), **others}), **arguments)
    return name + (", all tokens" if arguments else ""), model


def at_least(least: float, **values: float | Sequence[float] | None) -> None:
    """Raises CommandError for a flag's value below the least: at_least(1, batch_size=args.batch_size)."""
    for name, value in values.items():
        for one in value if isinstance(value, Sequence) else (value,):
            if one is not None and one < least:
                raise CommandError(f"--{name.replace('_', '-')}={one}, but it must be at least {least}")


def check_seed(seed: int) -> None:
    """Raises CommandError for a seed that torch does not take."""
    at_least(0, seed=seed)
    if seed > SEEDS:
        raise CommandError(f"--seed={seed}, but it must be at most {SEEDS}")


def named(args: argparse.Namespace) -> str:
    """The model, and its method if there is one."""
    return args.model if args.method == "none" else f"{args.model} with {method_label(args)}"


class Counts(NamedTuple):
    """What a model costs."""

    macs: float  # an image
    parameters: int
    tokens: list[int]  # that enter each block


@torch.inference_mode()
def counted(model: Any, x: Tensor) -> Counts:
    """Multiply-adds of an image, parameters, and the tokens that enter each block; by the operators' own formulas."""
    tokens: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        tokens.append(x.shape[1])

    hooks = [part.register_forward_pre_hook(before, with_kwargs=True) for part in attentions(model)]
    with FlopCounterMode(display=False) as counter, tokenops.use_backend("auto"):
        model(x)
    for hook in hooks:
        hook.remove()
    return Counts(counter.get_total_flops() / 2 / len(x), sum(p.numel() for p in model.parameters()), tokens)


def traced(model: Any, x: Tensor) -> Any:
    """Where the patches go, whatever backend was asked for."""
    with tokenops.use_backend("auto"):
        return tokenops.trace(model, x)


def attentions(model: Any) -> list[nn.Module]:
    """The attention of every block, which is called with its tokens."""
    try:
        site = Site(model)
        return [next(iter(family.attentions_of(block)), block) for block, family in zip(site.blocks, site.families)]
    except (TypeError, ValueError):  # blocks of another kind
        return [getattr(block, "attn", block) for block in getattr(model, "blocks", ())]


# ---- photographs


def photographs(paths: Sequence[Path]) -> list[Image.Image]:
    """The user's pictures, or the two photographs of scikit-learn."""
    if paths:
        return [open_image(path) for path in paths]
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def open_image(path: Path) -> Image.Image:
    try:
        return open_rgb(path)
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}") from None
    except UnidentifiedImageError:
        raise CommandError(f"{path} is not an image that Pillow can read") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {error}") from None


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images a model takes."""
    return resolve_data_config({}, model=model)["input_size"]


def prepared(model: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """Photographs as the model wants them: resized, cropped, normalised."""
    transform: Any = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(image) for image in images])


def displayed(model: nn.Module, x: Tensor) -> np.ndarray:
    """What the model sees of a photograph, (H, W, 3) uint8."""
    config = resolve_data_config({}, model=model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (255 * (x * std + mean).clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


@torch.inference_mode()
def guesses(model: nn.Module, x: Tensor, count: int = 5) -> list[list[str]]:
    """The likeliest classes of every photograph: "45% tabby"."""
    names = ImageNetInfo()
    found = []
    with tokenops.use_backend("auto"):
        probabilities = model(x).softmax(dim=-1)
    for p in probabilities:
        best = p.topk(min(count, len(p)))
        labels = [names.index_to_description(int(j)) if len(p) == 1000 else f"class {int(j)}" for j in best.indices]
        found.append([f"{v:.0%} {label.split(',')[0]}" for v, label in zip(best.values, labels)])
    return found
