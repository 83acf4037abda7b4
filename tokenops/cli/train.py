"""`python -m tokenops train`: a model, reduced by any method, on images in a folder or a Hugging Face data set."""

import argparse
import ast
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import nn

from ..methods import init_from_teacher, load_checkpoint
from ..methods.cait.blocks import prunable
from ..methods.cait.pruning import ChannelPruner
from ..training import OBJECTIVES, Objective, fit, loader_of, open_images, transform_for
from ..training.checkpoint import LAST
from . import CommandError, config, models, paragraph
from .methods import add_method_arguments, apply, method_options

#: what can be switched on, and off again where --config has it on
SWITCH: dict[str, Any] = dict(action=argparse.BooleanOptionalAction, default=False)
#: without --lr and --lr-base
LR = 5e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; their names are those of timm's train.py where it has them."""
    text = "options as YAML, one a line under the flag's name (lr: 0.001), over which flags win"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    _add_model(parser)
    _add_objective(parser)
    _add_data(parser)
    _add_training(parser)
    add_method_arguments(parser)


def expanded(arguments: Sequence[str]) -> list[str]:
    """The command line with the options of --config before its own."""
    return config.expanded(arguments, add_arguments)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=models.MODEL, metavar="NAME", help=f"{models.NAMES} (default: %(default)s)")
    add("--pretrained", **SWITCH, help="begin with published weights")
    add("--initial-checkpoint", type=Path, metavar="FILE", help="begin with these weights, loaded before the patch")
    add("--num-classes", type=int, metavar="N", help="default: those of the data")
    add("--img-size", type=int, metavar="PX", help="default: the model's")
    add("--model-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="further arguments of the model")
    add("--drop-path", type=float, metavar="RATE", help="stochastic depth")


def _add_objective(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=tuple(OBJECTIVES), default="plain", help="loss and schedule (default: %(default)s)")
    add("--teacher", metavar="NAME", help="the dense model to distil, a timm name")
    add("--teacher-checkpoint", type=Path, metavar="FILE", help="its weights")
    add("--teacher-kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="further arguments of the teacher")
    add("--teacher-pretrained", **SWITCH, help="its published weights")
    add("--from-teacher", **SWITCH, help="begin with the teacher's weights")
    add("--shrink-start-epoch", type=int, metavar="N", help="the keep rate begins to shrink (default: a tenth)")
    add("--shrink-epochs", type=int, metavar="N", help="in which it shrinks (default: a quarter of all)")
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
    workers = min(4, os.cpu_count() or 1)
    add("-j", "--workers", type=int, default=workers, metavar="N", help="processes that read images (%(default)s)")
    add("--no-aug", action="store_true", help="train on images as they are evaluated")
    add("--aa", metavar="POLICY", help="auto augment, rand-m9-mstd0.5-inc1 for DeiT's")
    add("--reprob", type=float, default=0.0, metavar="P", help="random erasing (default: %(default)s)")
    add("--remode", choices=("const", "rand", "pixel"), default="const", help="what erases (default: %(default)s)")
    add("--aug-repeats", type=int, default=1, metavar="N", help="augmentations of an image in a row; 3 for DeiT's")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="0.8 for DeiT's (default: %(default)s)")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="1.0 for DeiT's (default: %(default)s)")
    add("--smoothing", type=float, default=0.1, metavar="S", help="label smoothing (default: %(default)s)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=30, metavar="N", help="default: %(default)s")
    add("--lr", type=float, metavar="LR", help=f"default: --lr-base, or else {LR}")
    add("--lr-base", type=float, metavar="LR", help="of --lr-base-size images: all processes' batch size multiplies it")
    add("--lr-base-size", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--min-lr", type=float, default=1e-5, metavar="LR", help="at the end (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="default: %(default)s")
    add("--warmup-epochs", type=float, default=0, metavar="N", help="default: %(default)s")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="at --min-lr, behind the others")
    add("--clip-grad", type=float, metavar="NORM", help="of all gradients together (default: none)")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches of an update (default: %(default)s)")
    add("--amp", **SWITCH, help="mixed precision")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    add("--model-ema", **SWITCH, help="average the weights, and evaluate and save the average")
    add("--model-ema-decay", type=float, default=0.9998, metavar="D", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add("--output", type=Path, default=Path("out/train"), metavar="DIR", help="default: %(default)s")
    add("--resume", metavar="FILE", help="go on from a checkpoint; auto: from last.pt in --output, if it is there")
    add("--checkpoint-every", type=int, metavar="N", help="updates between checkpoints (default: an epoch)")
    add("--log-tensorboard", **SWITCH, help="log for TensorBoard, too, in --output")


def run(args: argparse.Namespace) -> None:
    """Trains, prints a line. Raises CommandError for what cannot be done."""
    try:
        trained(args)
    except CommandError as error:
        if args.config is None:
            raise
        raise CommandError(f"{error} (with the options of --config {args.config})") from error
    except KeyboardInterrupt:
        there = (args.output / LAST).is_file()
        raise KeyboardInterrupt(
            f"the same command with --resume auto goes on from {args.output / LAST}"
            if there
            else "there is no checkpoint yet (--checkpoint-every N writes one within an epoch, --resume auto reads it)"
        ) from None


def trained(args: argparse.Namespace) -> None:
    expected = None if args.config is None else config.expected(args.config)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda was asked for, but torch sees no GPU")
    models.at_least(1, batch_size=args.batch_size, epochs=args.epochs, grad_accum_steps=args.grad_accum_steps)
    models.at_least(1, aug_repeats=args.aug_repeats, lr_base_size=args.lr_base_size)
    models.at_least(0, workers=args.workers, mixup=args.mixup, cutmix=args.cutmix, cooldown_epochs=args.cooldown_epochs)
    models.at_least(0, shrink_start_epoch=args.shrink_start_epoch, shrink_epochs=args.shrink_epochs)
    models.check_seed(args.seed)
    for flag, rate in (("--drop-path", args.drop_path or 0), ("--reprob", args.reprob)):
        if not 0 <= rate < 1:
            raise CommandError(f"{flag}={rate}, but it must be at least 0 and below 1")
    method_options(args)  # what is wrong with them is said before a model is made
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output: {args.output} cannot be a folder: {error}") from None
    if args.resume is None and (args.output / LAST).is_file():
        raise CommandError(f"--output: {args.output} has a run already: --resume auto goes on, or take another folder")
    torch.manual_seed(args.seed)
    try:
        train, val = data(args)
        if args.num_classes is not None and args.num_classes < len(train.classes):
            raise CommandError(f"--num-classes={args.num_classes}, but the data has {len(train.classes)} classes")
        model, teacher = made(args, len(train.classes))
        transformed(args, model, train, val)
        together = args.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        aim = objective(args, model, teacher, len(train) // together)
        classes = args.num_classes or len(train.classes)
        mixed = args.mixup > 0 or args.cutmix > 0
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes) if mixed else None
        history = fit(
            aim,
            loader_of(train, args.batch_size, args.workers),
            epochs=args.epochs,
            lr=learning_rate(args, together),
            weight_decay=args.weight_decay,
            warmup_epochs=args.warmup_epochs,
            min_lr=args.min_lr,
            cooldown_epochs=args.cooldown_epochs,
            accumulation=args.grad_accum_steps,
            clip=args.clip_grad,
            amp={"bfloat16": "bf16", "float16": "fp16"}[args.amp_dtype] if args.amp else None,
            ema=args.model_ema_decay if args.model_ema else None,
            mixup=mixup,
            aug_repeats=args.aug_repeats,
            eval_loader=None if val is None else loader_of(val, args.batch_size, args.workers),
            output=args.output,
            resume=args.resume,
            checkpoint_every=args.checkpoint_every,
            tensorboard=args.log_tensorboard,
            seed=args.seed,
            device="cpu" if args.device == "cpu" else None,
        )
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError, RuntimeError) as error:
        if interrupted(error):
            raise KeyboardInterrupt from None
        raise CommandError(str(error)) from error
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    best = "" if history.best is None else f"best top-1 {history.best:.2f} % (epoch {(history.best_epoch or 0) + 1}), "
    unread = len({name for names in history.skipped.values() for name in names})
    print(paragraph(f"{best}{history.seconds:.0f} s, unreadable images: {unread}, saved in {history.saved}"))
    if expected is not None:
        print(paragraph(f"paper: {expected}"))


def learning_rate(args: argparse.Namespace, together: int) -> float:
    """--lr, or --lr-base for the images of an update, of which all processes have so many in a batch."""
    if args.lr is not None:
        return args.lr
    return LR if args.lr_base is None else args.lr_base * together * args.grad_accum_steps / args.lr_base_size


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what an error comes from: torch.save makes another one of it."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or interrupted(error.__context__))


def data(args: argparse.Namespace) -> tuple[Any, Any]:
    """The training images, and those of the evaluation or None; `transformed` gives them what depends on a model."""
    train = open_images(args.data_dir, args.train_split, train=True)
    if not args.val_split:
        return train, None
    return train, open_images(args.data_dir, args.val_split, classes=train.classes)


def transformed(args: argparse.Namespace, model: nn.Module, train: Any, val: Any) -> None:
    """Images are read as the model wants them."""
    plain = transform_for(model, False, args.img_size)
    erased = dict(re_prob=args.reprob, re_mode=args.remode)
    augmented = partial(transform_for, model, True, args.img_size, auto_augment=args.aa, **erased)
    try:
        train.transform = plain if args.no_aug else augmented()
    except AssertionError as error:
        raise CommandError(f"--aa {args.aa} is no policy of timm's: {error}") from None
    if val is not None:
        val.transform = plain


def made(args: argparse.Namespace, classes: int) -> tuple[nn.Module, nn.Module | None]:
    """The model, patched, and its teacher."""
    if args.teacher and not args.teacher_pretrained and args.teacher_checkpoint is None:
        raise CommandError("--teacher has no weights: give --teacher-pretrained or --teacher-checkpoint")
    sizes: dict[str, Any] = {"num_classes": args.num_classes or classes}
    if args.img_size is not None:
        sizes["img_size"] = args.img_size
    rates = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    further = _arguments("--model-kwargs", args.model_kwargs)
    model = _create("--model", args.model, args.pretrained, args.initial_checkpoint, sizes | rates | further)
    teacher = None
    if args.teacher:
        teacher = _teacher(args, sizes)
    elif args.teacher_checkpoint or args.from_teacher or args.objective in ("frd", "dps"):
        raise CommandError("--teacher is missing: --objective frd and dps, and --from-teacher, need the dense model")
    if args.from_teacher and teacher is not None:
        try:
            init_from_teacher(model, teacher)
        except RuntimeError as error:
            raise CommandError(f"--from-teacher: {error}") from None
    return apply(model, args), teacher


def objective(args: argparse.Namespace, model: nn.Module, teacher: nn.Module | None, batches: int) -> Objective:
    """What the options ask for."""
    options: dict[str, Any] = {"smoothing": args.smoothing}
    if teacher is not None:
        options["teacher"] = teacher
    if args.objective == "frd" and args.img_size is not None:
        options["img_size"] = args.img_size
    if args.objective == "evit":
        begin, long = (
            part if number is None else number / (args.epochs + args.cooldown_epochs)
            for number, part in ((args.shrink_start_epoch, 0.1), (args.shrink_epochs, 0.25))
        )
        options.update(start=begin, end=begin + long)
    elif args.shrink_start_epoch is not None or args.shrink_epochs is not None:
        raise CommandError(f"--shrink-start-epoch and --shrink-epochs belong to --objective evit, not {args.objective}")
    if args.objective == "cait":
        prunable(model)
        updates = args.epochs * -(-batches // args.grad_accum_steps)
        schedule = dict(steps=(updates // 20, max(updates // 2, 1)), every=max(updates // 40, 1))
        options["pruner"] = ChannelPruner(model, args.prune_target, **schedule)  # type: ignore[arg-type]
    return OBJECTIVES[args.objective](model, **options)


def _teacher(args: argparse.Namespace, sizes: dict[str, Any]) -> nn.Module:
    """The dense model. --img-size is for one that takes it: convolutions take images of any size."""
    weights = args.teacher_pretrained, args.teacher_checkpoint
    further = _arguments("--teacher-kwargs", args.teacher_kwargs)
    try:
        return _create("--teacher", args.teacher, *weights, sizes | further)
    except CommandError as error:
        if "img_size" not in sizes or "unexpected keyword argument 'img_size'" not in str(error):
            raise
    return _create("--teacher", args.teacher, *weights, {"num_classes": sizes["num_classes"]} | further)


def _arguments(flag: str, given: list[str]) -> dict[str, Any]:
    """NAME=VALUE as a dict, values as Python writes them, or else text."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise CommandError(f"{flag} {each}: it must be NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _create(flag: str, name: str, pretrained: bool, checkpoint: Path | None, sizes: dict[str, Any]) -> nn.Module:
    model = models.create(flag, name, pretrained and checkpoint is None, **sizes).model
    try:
        return model if checkpoint is None else load_checkpoint(model, checkpoint)
    except (RuntimeError, ValueError, TypeError, FileNotFoundError) as error:
        raise CommandError(f"{name}: {models.one_line(error)}") from error
