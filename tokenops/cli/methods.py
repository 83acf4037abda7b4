"""--method and its options: a flag for every argument of every registered method, from its signature and docstring."""

import argparse
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import tokenops

from .. import methods  # noqa: F401  they say their names to the engine
from ..patching.engine import METHODS
from . import CommandError

#: other names of an option; torchrun takes --r for its own
ALIASES = {"r": ("--merged-tokens",)}
#: options that a method takes by the flag of another's
ALSO = {("patch_slimming", "counts"): "schedule"}
#: options that a method cannot do without, although they have a default, and the flags that give them
NEEDED = {"tome": ("r",), "patch_slimming": ("schedule", "counts")}
#: flags that are a part of an option: what they go with, and what they say
PARTS = {"inflect": ("r", "how it changes over the depth, from -1 to 1")}


class Flag(NamedTuple):
    """A flag: an argument of one method, or of several that share its name."""

    name: str
    methods: tuple[str, ...]
    help: str
    kwargs: dict[str, Any]  # what argparse takes
    lone: bool = False  # a single value is one, not a list of one
    loads: Any = None  # what reads a file, where one may be given

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def number(text: str) -> float:
    """ "8" -> 8, "0.5" -> 0.5."""
    value = float(text)
    return int(value) if value.is_integer() else value


def pair(text: str) -> tuple[int, str]:
    """2:vertical -> (2, "vertical")."""
    block, colon, word = text.partition(":")
    if not (block.isdecimal() and colon and word):
        raise argparse.ArgumentTypeError(f"{text!r}, but it must be a block and a word: 2:vertical")
    return int(block), word


def number_or_path(text: str) -> int | Path:
    return int(text) if text.lstrip("-").isdecimal() else Path(text)


SCALARS: dict[Any, tuple[Any, str]] = {float: (number, "X"), int: (int, "N"), str: (str, "WORD")}


def flags() -> dict[str, Flag]:
    """Of all registered methods; names that several have are one flag."""
    found: dict[str, Flag] = {}
    for method, kind in METHODS.items():
        hints, words = get_type_hints(kind.__init__), documented(kind)
        for name, parameter in inspect.signature(kind).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if name in found:
                found[name] = found[name]._replace(methods=(*found[name].methods, method))
            else:
                found[name] = Flag(name, (method,), words.get(name, ""), *reading(hints.get(name, str)))
    for (method, name), _ in ALSO.items():
        found[name] = found[name]._replace(methods=(*found[name].methods, method))
    for name, (whole, text) in PARTS.items():
        found[name] = Flag(name, found[whole].methods, text, *reading(float))
    return found


def documented(kind: type) -> dict[str, str]:
    """What the docstring of a class says of its arguments, as plain text."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^Args:\n((?:[ ].*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section[1]) if section else ():
        names, colon, words = entry.strip().partition(":")
        words = re.sub(r":math:`([^`]*)`", lambda maths: maths[1].replace("\\", ""), " ".join(words.split()))
        if colon:
            found |= dict.fromkeys(names.split(", "), words.replace("`", "").rstrip("."))
    return found


def reading(hint: Any) -> tuple[dict[str, Any], bool, Any]:
    """How argparse reads an annotation: its arguments, whether one value may stand alone, and what loads a file."""
    kinds = [kind for kind in united(hint) if kind is not type(None)]
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}, False, None
    if any(issubclass(get_origin(kind) or object, Mapping) for kind in kinds):
        return {"type": pair, "nargs": "+", "metavar": "BLOCK:WORD"}, False, None
    lists = [get_args(kind)[0] for kind in kinds if isinstance(get_origin(kind), type) and get_args(kind)]
    loads = next((kind.load for kind in kinds if hasattr(kind, "load")), None)
    if loads is not None:
        return {"type": number_or_path, "nargs": "+", "metavar": "FILE|N"}, False, loads
    scalars = [kind for kind in kinds if kind in SCALARS]
    read, metavar = SCALARS[next((kind for kind in SCALARS if kind in (*scalars, *lists)), str)]
    kwargs: dict[str, Any] = {"type": read, "metavar": metavar} | ({"nargs": "+"} if lists else {})
    return kwargs, bool(scalars and lists), None


def united(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or what is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def add_method_arguments(parser: argparse.ArgumentParser, default: str = "none") -> None:
    """--method and the options of all methods, behind the command's own; those not given are left to `apply_patch`."""
    group = parser.add_argument_group("method")
    choices = ("none", *METHODS)
    group.add_argument(
        "--method", choices=choices, default=default, metavar="NAME", help=f"{', '.join(choices)} (default: {default})"
    )
    for flag in flags().values():
        text = f"{', '.join(flag.methods)}: {flag.help}".replace("%", "%%")
        kwargs: dict[str, Any] = {"dest": f"method_{flag.name}", "help": text, **flag.kwargs}
        try:
            group.add_argument(flag.option, *ALIASES.get(flag.name, ()), **kwargs)
        except argparse.ArgumentError:  # the command has a flag of that name
            group.add_argument(f"--{flag.methods[0]}-{flag.option[2:]}", **kwargs)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as the command line has them."""
    found = {name.removeprefix("method_"): value for name, value in vars(args).items() if name.startswith("method_")}
    return {name: value for name, value in found.items() if value is not None}


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of --method that were given, as `tokenops.apply_patch` takes them.

    Raises CommandError for those of other methods, and where one is missing.
    """
    method, known, found = args.method, flags(), given(args)
    for name in found:
        if method not in known[name].methods:
            owners = " or ".join(known[name].methods)
            raise CommandError(f"{known[name].option} belongs to --method {owners}, not to {method}")
    for needed in needs(method):
        if not any(name in found for name in needed):
            raise CommandError(f"--method {method} needs {' or '.join(known[name].option for name in needed)}")
    options: dict[str, Any] = {}
    for name, value in found.items():
        own = ALSO.get((method, name), name)
        if own in options:
            raise CommandError(f"{known[own].option} and {known[name].option} say the same: give one of them")
        options[own] = read(known[name], value)
    for name, (whole, _) in PARTS.items():
        if name in options:
            if isinstance(options.get(whole, ()), Sequence):
                raise CommandError(f"{known[name].option} goes with one number of {known[whole].option}")
            options[whole] = options[whole], options.pop(name)
    return options


def needs(method: str) -> Iterator[tuple[str, ...]]:
    """The names of which one must be given, for every option that a method cannot do without."""
    if method in METHODS:
        parameters = inspect.signature(METHODS[method]).parameters.values()
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        yield from ((p.name,) for p in parameters if p.default is p.empty and p.kind not in kinds)
    if method in NEEDED:
        yield NEEDED[method]


def read(flag: Flag, value: Any) -> Any:
    """An option's value as the method takes it."""
    if flag.kwargs.get("type") is pair:
        return dict(value)
    if flag.loads is not None and any(isinstance(each, Path) for each in value):
        try:
            return flag.loads(value[0])
        except OSError as error:
            raise CommandError(f"{flag.option}: cannot read {value[0]}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise CommandError(f"{flag.option} {value[0]} is no JSON") from None
        except (TypeError, ValueError) as error:
            raise CommandError(f"{flag.option} {value[0]}: {error}") from None
    return value[0] if flag.lone and len(value) == 1 else value


def method_label(args: argparse.Namespace) -> str:
    """ "tome r=13": the method and the options that were given."""
    return " ".join([args.method, *(f"{name}={shown(value)}" for name, value in given(args).items())])


def shown(value: Any) -> str:
    """[197, 99] -> "197,99", of long lists the ends."""
    if isinstance(value, tuple):
        return ":".join(map(shown, value))
    if isinstance(value, list):
        parts = [shown(each) for each in value]
        return ",".join(parts if len(parts) < 6 else [*parts[:2], "..", parts[-1]])
    return str(value)


def swept(method: str) -> Flag | None:
    """The first option of a method, where it is a number: what --sweep and --levels set."""
    if method not in METHODS:
        return None
    flag = flags().get(next(iter(inspect.signature(METHODS[method]).parameters), ""))
    numeric = flag is not None and flag.kwargs.get("type") is number and (flag.lone or "nargs" not in flag.kwargs)
    return flag if numeric else None


def settings(args: argparse.Namespace, option: str, values: Sequence[float] | None) -> list[argparse.Namespace]:
    """The arguments, or those with each value of an option (--sweep) for what is `swept`."""
    if values is None:
        return [args]
    flag = swept(args.method)
    if flag is None:
        raise CommandError(f"{option} goes with --method {', '.join(filter(swept, METHODS))}, not with {args.method}")
    if flag.name in given(args):
        raise CommandError(f"{option} sets {flag.option}: give one of them")
    each = [[value] if flag.lone else value for value in dict.fromkeys(values)]
    return [argparse.Namespace(**{**vars(args), f"method_{flag.name}": value}) for value in each]


def apply(model: Any, args: argparse.Namespace, **more: Any) -> Any:
    """The model with --method, in place; without options on the command line `more` are those."""
    options = more or method_options(args)
    if args.method == "none":
        return model
    try:
        return tokenops.apply_patch(model, args.method, **options)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--method {args.method}: {str(error).removeprefix(f'{args.method}: ')}") from None
