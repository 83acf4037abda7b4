"""`python -m tokenops`: what runs where on this machine, what a slimmed model gains on it, and what it still sees."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .cli import CommandError
from .ops import backends


class Command(NamedTuple):
    """A command: its module of `tokenops.cli`, which has ``add_arguments`` and ``run``; what it is for; its extra."""

    module: str
    purpose: str
    extra: str


COMMANDS = {
    "info": Command("info", "versions, devices, which backend runs each operator, and what is missing", "demo"),
    "demo": Command("demo", "every method in one model, on two photographs: what each gains and keeps", "demo"),
    "bench": Command("bench", "throughput of a model with a method beside the dense one, over batch sizes", "demo"),
    "slim": Command("slim", "put a method into a model, show what it saves and what becomes of the patches", "demo"),
    "eval": Command("evaluate", "accuracy and throughput of a model, with a method or without", "train"),
    "fidelity": Command("fidelity", "what a method keeps of a model's answers, on images without labels", "train"),
    "train": Command("train", "train or fine-tune a model, dense or with a method", "train"),
}


def parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line; only the command that is asked for has its flags, as these need packages.

    Raises:
        CommandError: packages are missing that it needs.
    """
    program = "tokenops" if Path(sys.argv[0]).name == "tokenops" else "python -m tokenops"
    top = argparse.ArgumentParser(prog=program, description="Token reduction for vision transformers.")
    top.add_argument("--version", action="version", version=f"tokenops {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command")
    for name, (_, purpose, _) in COMMANDS.items():
        usage = f"{program} {name} [options]" + (" [IMAGE ...]" if name in ("demo", "slim", "fidelity") else "")
        command = commands.add_parser(
            name, help=purpose, usage=usage, description=f"{purpose[0].upper()}{purpose[1:]}."
        )
        if name in arguments[:1]:
            module_of(name).add_arguments(command)
    return top


def module_of(name: str) -> Any:
    """The module of a command."""
    module, _, extra = COMMANDS[name]
    try:
        return importlib.import_module(f"{__package__}.cli.{module}")
    except ImportError as missing:
        raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[{extra}]'") from missing


def expanded(arguments: list[str]) -> list[str]:
    """The command line with what stands in the files it names, where a command has such ("train": --config)."""
    expand = getattr(module_of(arguments[0]), "expanded", list) if arguments and arguments[0] in COMMANDS else list
    return expand(arguments)


def check_environment() -> None:
    try:
        backends.check_environment()
    except ValueError as error:
        raise CommandError(str(error)) from None


def silence() -> None:
    """What is left to be written to stdout is thrown away, so that Python does not try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0, 2 when what was asked for cannot be done, 130 when interrupted, 141 when nobody reads on.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    try:
        args = parser(arguments).parse_args(expanded(arguments))
        if args.command is None:
            parser().print_help()
        else:
            check_environment()
            module_of(args.command).run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        silence()
        return 141
    except OSError as error:
        if error.filename is not None:
            raise
        silence()
        print(f"tokenops {name}: cannot write: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"tokenops {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ntokenops {name}: interrupted{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
