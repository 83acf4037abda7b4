"""--config: the options of a command in a YAML file, as timm's train.py takes it, and what the paper says of them."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from . import CommandError

#: the key beside the options
EXPECTED = "expected"
#: what a figure is that could not be established
UNKNOWN = "not known here"


class Expected(NamedTuple):
    """Figures of a paper, `UNKNOWN` where they are: top-1 in per cent, multiply-adds in billions; where they stand."""

    top1: float | str
    gmacs: float | str
    dense_top1: float | str
    dense_gmacs: float | str
    source: str

    def __str__(self) -> str:
        top1, dense = (f"{x} %" if x != UNKNOWN else UNKNOWN for x in (self.top1, self.dense_top1))
        costs = f"GMACs {self.gmacs}", f"GMACs {self.dense_gmacs}"
        return f"top-1 {top1}, {costs[0]}; dense: top-1 {dense}, {costs[1]} ({self.source})"


class Refused(Exception):
    """What argparse says of a flag."""


class Reader(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> Any:
        raise Refused(message)


def expanded(arguments: Sequence[str], add_arguments: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """The command line with the options of --config as flags behind the command's name, where later ones win.

    Args:
        arguments: the command's name, and its flags.
        add_arguments: makes the command's flags.

    Raises:
        CommandError: the file cannot be read, or has what the flags would not take.
    """
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", nargs="?", type=Path)
    path = finder.parse_known_args(list(arguments[1:]))[0].config
    if path is None:
        return list(arguments)
    options = {key: value for key, value in read(path).items() if key != EXPECTED}
    return [arguments[0], *flags_of(path, options, add_arguments), *arguments[1:]]


def read(path: Path) -> dict[str, Any]:
    """The file's content. Raises CommandError where it is none of options."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CommandError(f"--config: {path} must have options, one a line, as in lr: 0.001")
    return content


def flags_of(
    path: Path, options: dict[str, Any], add_arguments: Callable[[argparse.ArgumentParser], None]
) -> list[str]:
    """The options as flags, each of which argparse takes."""
    reader = Reader(add_help=False)
    add_arguments(reader)
    known = {flag: action for flag, action in reader._option_string_actions.items() if flag != "--config"}
    for action in reader._actions:
        action.required = False
    found: dict[str, list[str]] = {}
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if flag not in known or key.startswith("-"):
            names = [name[2:] for name in known if name.startswith("--")]
            near = difflib.get_close_matches(flag[2:], names, 3)
            rest = f"; near it are: {', '.join(near)}" if near else ": it must be a flag's name"
            raise CommandError(f"--config {path}: {key!r} is no option{rest}")
        if flag in found:
            raise CommandError(f"--config {path}: {key!r} is there twice")
        try:
            found[flag] = flag_of(flag, known[flag], value)
            reader.parse_args(found[flag])
        except Refused as error:
            said = str(error).removeprefix(f"argument {'/'.join(known[flag].option_strings)}: ")
            raise CommandError(f"--config {path}: {key}: {value!r}: {said}") from None
    return [text for flag in found.values() for text in flag]


def flag_of(flag: str, action: argparse.Action, value: Any) -> list[str]:
    """An option as it stands on a command line; nothing for null, which leaves the default.

    Raises:
        Refused: the value is of another type than the flag's.
    """
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise Refused("it must be true or false")
        off = flag.replace("--", "--no-", 1)
        return [flag] if value else [off] if off in action.option_strings else []
    several = action.nargs in ("+", "*")
    values = value if several and isinstance(value, list) else [value]
    if any(isinstance(each, (bool, dict, list)) or not isinstance(each, (str, int, float)) for each in values):
        raise Refused("it must be a number or a word" + ", or a list of them" * several)
    return [flag, *map(str, values)] if several else [f"{flag}={value}"]


def expected(path: Path) -> Expected | None:
    """The figures in the file, None where it has none.

    Raises:
        CommandError: one is missing, is no figure, or is another than those of `Expected`.
    """
    content = read(path)
    if EXPECTED not in content:
        return None
    given, names = content[EXPECTED], Expected._fields
    if not isinstance(given, dict) or {str(key).replace("-", "_") for key in given} != set(names):
        raise CommandError(f"--config {path}: {EXPECTED} must have {', '.join(names)}, and nothing else")
    found = Expected(**{key.replace("-", "_"): value for key, value in given.items()})
    for name, figure in zip(names[:-1], found):
        if isinstance(figure, bool) or not (isinstance(figure, (int, float)) or figure == UNKNOWN):
            raise CommandError(f"--config {path}: {EXPECTED}: {name}: {figure!r}, but must be a number or {UNKNOWN!r}")
    if not isinstance(found.source, str):
        raise CommandError(f"--config {path}: {EXPECTED}: source: {found.source!r}, but it must say where they stand")
    return found
