"""`python -m tokenops`: what runs where on this machine, what a slimmed model gains on it, and what it still sees."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .cli import CommandError
from .nn.neighbour_merging import KINDS

#: a model of every method, for the demo's second table
METHODS = (
    "sit_deit_small",
    "evit_deit_small_patch16_224",
    "evo_deit_small_patch16_224",
    "ps_deit_small_patch16_224",
    "dps_deit_small_patch16_224",
    "cait_deit_small_patch16_224",
    "evo_levit_256",
)

#: commands whose flags depend on packages that others do without: the module of each, and what it is for
LATE = {
    "train": ("train", "train or fine-tune a model, dense or with a method"),
    "eval": ("evaluate", "accuracy and throughput of a model, with a method or without"),
    "bench": ("bench", "throughput of a model with a method beside the dense one, over batch sizes"),
    "slim": ("slim", "apply a method to a model, show what it saves and what becomes of the patches"),
}


def parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line; of the commands in LATE only the one that is asked for has its flags.

    Raises:
        CommandError: packages are missing that it needs.
    """
    top = argparse.ArgumentParser(prog="python -m tokenops", description="Token reduction for vision transformers.")
    top.add_argument("--version", action="version", version=f"tokenops {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command")
    commands.add_parser("info", help="versions, devices, which backend runs each operator: for bug reports")
    demo = commands.add_parser(
        "demo",
        help="a dense model and its slimmed form side by side, on photographs",
        description="Runs a dense model and its slimmed form side by side on photographs, prints what the slimming"
        " saves, and draws which image regions the slim tokens draw on.",
    )
    add = demo.add_argument
    add(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="photographs (default: two of scikit-learn's)",
    )
    add("--model", default="sit_lvvit_xsmall", help="the slimmed model, a timm name (default: %(default)s)")
    add("--dense", default="lvvit_small", help="the dense model to compare with, a timm name (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="FILE", help="weights of the slimmed model")
    add("--dense-checkpoint", type=Path, metavar="FILE", help="weights of the dense model")
    add("--pretrained", action="store_true", help="download published weights, of those of the two that have any")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--batch", type=int, metavar="N", help="images in a batch (default: 16 on a CPU, 256 on a GPU)")
    add(
        "--repeats",
        type=int,
        metavar="N",
        help="pairs of timed runs (default: half a minute's, at least 5)",
    )
    add(
        "--methods",
        nargs="*",
        default=METHODS,
        metavar="NAME",
        help="models of all methods to compare afterwards, each with its dense form; without a name: none"
        " (default: %(default)s)",
    )
    add("--output", type=Path, default=Path("out/demo.png"), metavar="FILE", help="the picture (default: %(default)s)")
    segment = commands.add_parser(
        "segment",
        help="train a small model, dense and compressed by CAIT, to find digits in photographs",
        description="Trains a small vision transformer to say which digit, if any, each pixel of generated scenes"
        " belongs to; then the same with neighbouring tokens merged, and with channels pruned as well. Prints what"
        " each gets right and what it costs. Minutes on two CPU cores.",
    )
    add = segment.add_argument
    add("--steps", type=int, default=1000, metavar="N", help="training steps of the dense model (default: %(default)s)")
    add(
        "--keep",
        type=float,
        default=0.7,
        metavar="PART",
        help="of the merged multiply-adds, after pruning (default: %(default)s)",
    )
    add("--kind", choices=KINDS, default="average", help="how tokens are merged (default: %(default)s)")
    add("--scenes", type=int, default=300, metavar="N", help="test scenes (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and scenes (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add(
        "--output",
        type=Path,
        default=Path("out/segment.png"),
        metavar="FILE",
        help="the picture (default: %(default)s)",
    )
    for name, (module, purpose) in LATE.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if name in arguments[:1]:
            importlib.import_module(f"{__package__}.cli.{module}").add_arguments(command)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 2 when what was asked for cannot be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else ""
    try:
        args = parser(arguments).parse_args(arguments)
        if args.command in LATE:
            importlib.import_module(f"{__package__}.cli.{LATE[args.command][0]}").run(args)
        elif args.command == "info":
            from .cli.info import text

            print(text())
        elif args.command == "demo":
            from .cli.demo import run

            run(args)
        elif args.command == "segment":
            from .cli import segment

            segment.run(args)
        else:
            parser().print_help()
    except CommandError as error:
        print(f"tokenops {command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
