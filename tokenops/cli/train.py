"""`python -m tokenops train`: a model, reduced by any method, on images in a folder or a Hugging Face data set."""

import argparse
from pathlib import Path

from . import CommandError, patched

CHOICES = ("plain", "frd", "evit", "evo_vit", "cait", "dps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; their names are those of timm's train.py where it has them."""
    _add_model(parser)
    patched.add_method_arguments(parser)
    _add_objective(parser)
    _add_data(parser)
    _add_training(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="deit_small_patch16_224", metavar="NAME", help="a timm name (default: %(default)s)")
    add("--pretrained", action="store_true", help="begin with published weights")
    add("--initial-checkpoint", type=Path, metavar="FILE", help="begin with these weights, loaded before the patch")
    add("--num-classes", type=int, metavar="N", help="default: those of the data")
    add("--img-size", type=int, metavar="PX", help="default: the model's")
    add("--model-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="further arguments of the model")
    add("--drop-path", type=float, metavar="RATE", help="stochastic depth")


def _add_objective(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=CHOICES, default="plain", help="the loss and its schedule (default: %(default)s)")
    add("--teacher", metavar="NAME", help="the dense model to distil, a timm name")
    add("--teacher-checkpoint", type=Path, metavar="FILE", help="its weights")
    add("--teacher-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="further arguments of the teacher")
    add("--teacher-pretrained", action="store_true", help="its published weights")
    add("--from-teacher", action="store_true", help="begin with the teacher's weights")
    add("--prune-target", type=float, default=0.7, metavar="PART", help="MACs left by --objective cait (%(default)s)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folders train and val, each with a folder for every class; or what Hugging Face's save_to_disk wrote",
    )
    add("--train-split", default="train", metavar="NAME", help="default: %(default)s")
    add("--val-split", default="val", metavar="NAME", help="also found as validation or test; '' for no evaluation")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="of one process (default: %(default)s)")
    add("-j", "--workers", type=int, default=4, metavar="N", help="that read images (default: %(default)s)")
    add("--no-aug", action="store_true", help="train on images as they are evaluated")
    add("--aa", metavar="POLICY", help="auto augment, rand-m9-mstd0.5-inc1 for DeiT's")
    add("--reprob", type=float, default=0.0, metavar="P", help="random erasing (default: %(default)s)")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="0.8 for DeiT's (default: %(default)s)")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="1.0 for DeiT's (default: %(default)s)")
    add("--smoothing", type=float, default=0.1, metavar="S", help="of labels (default: %(default)s)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=30, metavar="N", help="default: %(default)s")
    add("--lr", type=float, default=5e-4, metavar="LR", help="default: %(default)s")
    add("--min-lr", type=float, default=1e-5, metavar="LR", help="at the end (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="default: %(default)s")
    add("--warmup-epochs", type=float, default=0, metavar="N", help="default: %(default)s")
    add("--clip-grad", type=float, metavar="NORM", help="of all gradients together (default: none)")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches of an update (default: %(default)s)")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    add("--model-ema", action="store_true", help="average the weights, and evaluate and save the average")
    add("--model-ema-decay", type=float, default=0.9998, metavar="D", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add("--output", type=Path, default=Path("out/train"), metavar="DIR", help="default: %(default)s")
    add("--resume", metavar="FILE", help="go on from a checkpoint; auto: from last.pt in --output, if it is there")
    add("--checkpoint-every", type=int, metavar="N", help="updates between checkpoints (default: an epoch)")
    add("--log-tensorboard", action="store_true", help="log for TensorBoard, too, in --output")


def run(args: argparse.Namespace) -> None:
    """Trains, prints a line. Raises CommandError for what cannot be done."""
    try:
        from ..training.command import train_with
    except ImportError as missing:
        raise CommandError(f"it needs more packages ({missing}): pip install 'tokenops[train]'") from missing
    train_with(args)
