"""What `train`, `eval`, `bench` and `slim` share: the flags for a model, its method and how it runs, and the model."""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import tokenops

from ..nn.neighbour_merging import KINDS
from ..ops.merge_neighbours import AXES
from . import CommandError

try:
    import timm
    from timm.data import resolve_data_config
    from timm.models import load_state_dict

    from .. import methods
    from ..methods.cait.merging import merges_of
    from ..methods.cait.structure import Structure, restructure
    from .models import DTYPES
except ImportError as missing:
    raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[demo]'") from missing

METHODS = ("none", "tome", "evit", "evo_vit", "patch_slimming", "sit", "cait", "dps", "random")
#: options that a method cannot do without: one of them
NEEDED = {"tome": ("r",), "patch_slimming": ("schedule", "counts"), "dps": ("counts",)}


class Option(NamedTuple):
    """A flag of a method, or of several: its argument of `tokenops.apply_patch`, and what argparse takes."""

    name: str
    method: str | tuple[str, ...]
    help: str
    kwargs: dict[str, Any]
    aliases: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def point(text: str) -> tuple[int, str]:
    """2:vertical -> (2, "vertical")."""
    block, _, axis = text.partition(":")
    if not block.isdecimal() or axis not in AXES:
        raise argparse.ArgumentTypeError(f"{text!r}, but it must be a block and {' or '.join(AXES)}: 2:{AXES[0]}")
    return int(block), axis


def number(text: str) -> float:
    """ "8" -> 8, "0.5" -> 0.5."""
    value = float(text)
    return int(value) if value.is_integer() else value


SWITCH: dict[str, Any] = dict(action=argparse.BooleanOptionalAction)
NUMBER: dict[str, Any] = dict(type=number, metavar="X")
NUMBERS: dict[str, Any] = dict(type=number, nargs="+", metavar="X")
COUNTS: dict[str, Any] = dict(type=int, nargs="+", metavar="N")
BLOCKS: dict[str, Any] = dict(type=int, nargs="+", metavar="BLOCK")
POINTS: dict[str, Any] = dict(type=point, nargs="+", metavar="BLOCK:AXIS")
OPTIONS = (
    # torchrun takes --r for its own
    Option("r", "tome", "tokens merged in every block, or a number for each", NUMBERS, ("--merged-tokens",)),
    Option("inflect", "tome", "how r changes over the depth, -1 to 1", NUMBER),
    Option("prop_attn", "tome", "attention counts a token as the patches it stands for", SWITCH),
    Option("unmerge", "tome", "every patch gets a token again behind the last block", SWITCH),
    Option("keep_rate", ("evit", "random"), "part of the tokens that stay, or a number for each block", NUMBERS),
    Option("reduction_loc", ("evit", "random"), "blocks that drop tokens, from 0", BLOCKS),
    Option("fuse_token", ("evit", "random"), "the dropped become one token", SWITCH),
    Option("prune_ratio", "evo_vit", "part of the tokens that run through a stage's blocks", NUMBER),
    Option("tradeoff", "evo_vit", "weight of a block's scores against those so far", NUMBER),
    Option("stages", "evo_vit", "blocks where stages begin, from 0", BLOCKS),
    Option("schedule", "patch_slimming", "a schedule in a JSON file", dict(type=Path, metavar="FILE")),
    Option("counts", ("patch_slimming", "dps"), "tokens left behind each block, class token included", COUNTS),
    Option("after", "dps", "so many blocks run before tokens are scored", dict(type=int, metavar="N")),
    Option("keeping_ratio", "sit", "part of the tokens that a slimming leaves", NUMBER),
    Option("locations", "sit", "blocks with a slimming before them, from 0", BLOCKS),
    Option("points", "cait", "blocks and the axis to merge along behind them", POINTS),
    Option("kind", "cait", "how neighbours are merged", dict(choices=KINDS)),
)


class Running(NamedTuple):
    """Where and in what a model runs."""

    device: torch.device
    dtype: torch.dtype  # of weights and images
    amp: torch.dtype | None  # of autocast
    channels_last: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context a model is called in."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)

    def placed(self, value: Any) -> Any:
        """A model or images on the device, in the dtype."""
        layout = {"memory_format": torch.channels_last} if self.channels_last else {}
        return value.to(device=self.device, dtype=self.dtype, **layout)

    def copied(self, model: Any) -> Any:
        """A copy of a model there; the model stays where it is."""
        return self.placed(deepcopy(model))

    def __str__(self) -> str:
        name = str(self.dtype)[6:]
        return f"{name}, autocast to {str(self.amp)[6:]}" if self.amp else name


class Made(NamedTuple):
    """A model in eval mode, and where its weights come from ("" for random ones)."""

    model: Any
    weights: str


def add_model_arguments(parser: argparse.ArgumentParser, model: str = "deit_small_patch16_224") -> None:
    """--model and its weights, under timm's names."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=model, metavar="NAME", help="a timm name, ours among them (default: %(default)s)")
    add("--pretrained", action="store_true", help="download the published weights")
    add("--checkpoint", type=Path, metavar="FILE", help="weights of the model, or of the model with its method")
    add("--img-size", type=int, metavar="N", help="pixels of an image's side (default: the model's own)")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's own)")


def add_method_arguments(parser: argparse.ArgumentParser, default: str = "none") -> None:
    """--method and the options of all methods; those not given are left to `tokenops.apply_patch`."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=METHODS, default=default, help="token reduction (default: %(default)s)")
    for option in OPTIONS:
        group.add_argument(
            option.flag, *option.aliases, help=f"{', '.join(option.methods)}: {option.help}", **option.kwargs
        )


def add_running_arguments(parser: argparse.ArgumentParser, dtype: bool = True) -> None:
    """--device, --amp, and with `dtype` --dtype."""
    add = parser.add_argument_group("running").add_argument
    add("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda where there is a GPU, else cpu)")
    add("--amp", action="store_true", help="autocast to --amp-dtype")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    if dtype:
        add("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and images (default: %(default)s)")
    add("--channels-last", action="store_true", help="images in channels-last layout")


def running(args: argparse.Namespace) -> Running:
    """--device, --dtype and --amp, checked."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}, but it must be cpu, cuda or cuda with a number: cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name} was asked for, but torch sees {torch.cuda.device_count() or 'no'} GPU")
    dtype = getattr(args, "dtype", "float32")
    if args.amp and dtype != "float32":
        raise CommandError(f"--amp and --dtype {dtype}: autocast is for float32 weights, so take one of the two")
    if device.index is not None:
        torch.cuda.set_device(device)
    return Running(device, DTYPES[dtype], DTYPES[args.amp_dtype] if args.amp else None, args.channels_last)


def method_options(args: argparse.Namespace, more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options of --method that were given, and `more`, as `tokenops.apply_patch` takes them.

    Raises CommandError for those of other methods, and where one is missing.
    """
    given = {o.name: getattr(args, o.name) for o in OPTIONS if getattr(args, o.name) is not None}
    for option in OPTIONS:
        if option.name in given and args.method not in option.methods:
            raise CommandError(f"{option.flag} belongs to --method {' or '.join(option.methods)}, not to {args.method}")
    needed = NEEDED.get(args.method, ())
    if needed and not any(name in {**given, **more} for name in needed):
        raise CommandError(f"--method {args.method} needs {' or '.join(f'--{name}' for name in needed)}")
    if "schedule" in given and "counts" in given:
        raise CommandError("--schedule and --counts say the same: give one of them")
    if "inflect" in given and len(given.get("r", ())) != 1:
        raise CommandError("--inflect goes with one number of --r, which it changes over the depth")
    options = {
        name: value[0] if name in ("r", "keep_rate") and len(value) == 1 else value for name, value in given.items()
    }
    if "inflect" in options:
        options["r"] = options["r"], options.pop("inflect")
    if "points" in options:
        options["points"] = dict(options["points"])
    if "schedule" in options:
        options["schedule"] = read_schedule(options["schedule"])
    if "counts" in options and args.method == "patch_slimming":
        options["schedule"] = options.pop("counts")
    return options | dict(more)


def read_schedule(path: Path) -> Any:
    try:
        return methods.patch_slimming.Schedule.load(path)
    except OSError as error:
        raise CommandError(f"--schedule: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"--schedule {path}: {error}") from None


def method_label(args: argparse.Namespace) -> str:
    """ "tome r=13": the method and the options that were given."""
    given = {o.name: getattr(args, o.name) for o in OPTIONS if getattr(args, o.name) is not None}
    return " ".join([args.method, *(f"{name}={shown(value)}" for name, value in given.items())])


def shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ":".join(map(shown, value)) if isinstance(value, tuple) else ",".join(map(shown, value))
    return str(value)


def apply(model: Any, args: argparse.Namespace, **options: Any) -> Any:
    """The model with --method, in place; `options` come on top of those given."""
    options = method_options(args, options)
    if args.method == "none":
        return model
    try:
        return tokenops.apply_patch(model, args.method, **options)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--method {args.method}: {error}") from None


def create(args: argparse.Namespace, **kwargs: Any) -> Made:
    """--model as timm makes it, dense, --pretrained or with random weights; `kwargs` go to timm.create_model.

    A --checkpoint is loaded by `make`, which knows whether it is of the dense model.
    """
    name = args.model
    for flag, value in (("--img-size", args.img_size), ("--num-classes", args.num_classes)):
        if value is not None and value < 1:
            raise CommandError(f"{flag}={value}, but it must be at least 1")
    if not timm.models.is_model(name):
        first = name.split("_")[0]
        close = (timm.list_models(f"{first}*") or timm.list_models(f"*{first}*"))[:8]
        near = f"; near it are: {', '.join(close)}" if close else ""
        raise CommandError(f"--model: timm knows no model {name!r}{near}")
    if args.pretrained and args.checkpoint is None and not timm.models.is_model_pretrained(name):
        raise CommandError(f"--pretrained, but no weights of {name} can be downloaded: use --checkpoint")
    download = args.pretrained and args.checkpoint is None
    wanted = {"img_size": args.img_size, "num_classes": args.num_classes}
    kwargs = {key: value for key, value in wanted.items() if value is not None} | kwargs
    try:
        model: Any = timm.create_model(name, pretrained=download, **kwargs)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise CommandError(f"cannot make {name} with {kwargs}: {error}") from None
    if args.img_size is not None:  # what transforms go by
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, args.img_size, args.img_size)}
    return Made(model.eval(), "published weights" if download else "")


def make(args: argparse.Namespace, **kwargs: Any) -> Made:
    """`create`, --method applied, and --checkpoint loaded, be it of the dense, the patched or the compacted model."""
    method_options(args)  # what is wrong with them is said before a model is made
    state, structure = read_checkpoint(args.checkpoint) if args.checkpoint else (None, None)
    model, weights = create(args, **kwargs)
    dense = state is not None and structure is None and state.keys() == model.state_dict().keys()
    if dense:
        load(model, state, args)
    model = apply(model, args) if structure is None else compacted(model, structure, args)
    if state is not None and not dense:
        load(model, state, args)
    return Made(model, str(args.checkpoint) if args.checkpoint else weights)


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
        return state, torch.load(path, map_location="cpu", weights_only=True).get("structure")
    except Exception as error:  # torch.load raises whatever a strange file provokes
        raise CommandError(f"--checkpoint: {path} holds no weights: {error}") from None


def load(model: Any, state: Any, args: argparse.Namespace) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CommandError(f"--checkpoint: {args.checkpoint} does not hold weights of {args.model}: {error}") from None


def dense_form(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The dense form of a model that reduces tokens by itself: a timm name and arguments."""
    from . import comparison

    form = comparison.dense_form(args.model)
    if form is None:
        known = ", ".join(METHODS[1:])
        raise CommandError(f"--method none, and {args.model} reduces nothing: choose a --method, {known}")
    return form


def dense_of(made: Any, args: argparse.Namespace) -> tuple[str, Any]:
    """Name and model to compare with: a copy without --method; of a model of ours its dense form, of random weights."""
    if args.method != "none" and hasattr(made, "tokenops_patch"):
        return "the dense model", tokenops.remove_patch(deepcopy(made))
    name, arguments = dense_form(args) if args.method == "none" else (args.model, {})  # a compacted model's
    others = {"model": name, "checkpoint": None, "pretrained": False}
    model, _ = create(argparse.Namespace(**{**vars(args), **others}), **arguments)
    return name + (", all tokens" if arguments else ""), model


def for_inference(model: Any) -> Any:
    """As the model runs fastest: ours know how."""
    return methods.for_inference(model)


def at_least(least: float, **values: float | Sequence[float] | None) -> None:
    """Raises CommandError for a flag's value below the least: at_least(1, batch_size=args.batch_size)."""
    for name, value in values.items():
        for one in value if isinstance(value, Sequence) else (value,):
            if one is not None and one < least:
                raise CommandError(f"--{name.replace('_', '-')}={one}, but it must be at least {least}")


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images a model takes."""
    return resolve_data_config({}, model=model)["input_size"]


def named(args: argparse.Namespace) -> str:
    """The model, and its method if there is one."""
    return args.model if args.method == "none" else f"{args.model} with {method_label(args)}"
