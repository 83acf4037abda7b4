"""What `python -m tokenops train` does: models, data and objective as its options ask for, and `fit`."""

import argparse
import ast
import os
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from torch import nn

from ..cli import CommandError, patched
from ..methods import init_from_teacher, load_checkpoint
from ..methods.cait.blocks import prunable
from ..methods.cait.pruning import ChannelPruner
from . import OBJECTIVES
from .data import loader_of, open_images, transform_for
from .loop import fit
from .objectives import Objective


def train_with(args: argparse.Namespace) -> None:
    """Trains, prints a line. Raises CommandError for what cannot be done."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda was asked for, but torch sees no GPU")
    patched.at_least(1, batch_size=args.batch_size, epochs=args.epochs, grad_accum_steps=args.grad_accum_steps)
    patched.at_least(0, workers=args.workers)
    patched.method_options(args)  # what is wrong with them is said before a model is made
    torch.manual_seed(args.seed)
    try:
        train, val = data(args)
        if args.num_classes is not None and args.num_classes < len(train.classes):
            raise CommandError(f"--num-classes={args.num_classes}, but the data has {len(train.classes)} classes")
        model, teacher = models(args, len(train.classes))
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
            lr=args.lr,
            weight_decay=args.weight_decay,
            warmup_epochs=args.warmup_epochs,
            min_lr=args.min_lr,
            accumulation=args.grad_accum_steps,
            clip=args.clip_grad,
            amp={"bfloat16": "bf16", "float16": "fp16"}[args.amp_dtype] if args.amp else None,
            ema=args.model_ema_decay if args.model_ema else None,
            mixup=mixup,
            eval_loader=None if val is None else loader_of(val, args.batch_size, args.workers),
            output=args.output,
            resume=args.resume,
            checkpoint_every=args.checkpoint_every,
            tensorboard=args.log_tensorboard,
            seed=args.seed,
            device="cpu" if args.device == "cpu" else None,
        )
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError) as error:
        raise CommandError(str(error)) from error
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    best = "" if history.best is None else f"best top-1 {history.best:.2f} % (epoch {(history.best_epoch or 0) + 1}), "
    unread = len({name for names in history.skipped.values() for name in names})
    print(f"{best}{history.seconds:.0f} s, {unread} images unreadable, saved in {history.saved}")


def data(args: argparse.Namespace) -> tuple[Any, Any]:
    """The training images, and those of the evaluation or None; `transformed` gives them what depends on a model."""
    train = open_images(args.data_dir, args.train_split, train=True)
    if not args.val_split:
        return train, None
    return train, open_images(args.data_dir, args.val_split, classes=train.classes)


def transformed(args: argparse.Namespace, model: nn.Module, train: Any, val: Any) -> None:
    """Images are read as the model wants them."""
    plain = transform_for(model, False, args.img_size)
    augmented = partial(transform_for, model, True, args.img_size, auto_augment=args.aa, re_prob=args.reprob)
    train.transform = plain if args.no_aug else augmented()
    if val is not None:
        val.transform = plain


def models(args: argparse.Namespace, classes: int) -> tuple[nn.Module, nn.Module | None]:
    """The model, patched, and its teacher."""
    if args.teacher and not args.teacher_pretrained and args.teacher_checkpoint is None:
        raise CommandError("--teacher has no weights: give --teacher-pretrained or --teacher-checkpoint")
    sizes: dict[str, Any] = {"num_classes": args.num_classes or classes}
    if args.img_size is not None:
        sizes["img_size"] = args.img_size
    rates = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    further = _arguments("--model-kwargs", args.model_kwargs)
    model = _create(args.model, args.pretrained, args.initial_checkpoint, sizes | rates | further)
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
    return patched.apply(model, args), teacher


def objective(args: argparse.Namespace, model: nn.Module, teacher: nn.Module | None, batches: int) -> Objective:
    """What the options ask for."""
    options: dict[str, Any] = {"smoothing": args.smoothing}
    if teacher is not None:
        options["teacher"] = teacher
    if args.objective == "frd" and args.img_size is not None:
        options["img_size"] = args.img_size
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
        return _create(args.teacher, *weights, sizes | further)
    except CommandError as error:
        if "img_size" not in sizes or "unexpected keyword argument 'img_size'" not in str(error):
            raise
    return _create(args.teacher, *weights, {"num_classes": sizes["num_classes"]} | further)


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


def _create(name: str, pretrained: bool, checkpoint: Path | None, sizes: dict[str, Any]) -> nn.Module:
    try:
        model = timm.create_model(name, pretrained=pretrained, **sizes)
        return model if checkpoint is None else load_checkpoint(model, checkpoint)
    except (RuntimeError, ValueError, TypeError, FileNotFoundError) as error:
        raise CommandError(f"{name}: {error}") from error
