"""The training loop: one call for a CPU, a GPU, or many processes under torchrun or accelerate launch."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import checkpoint
from .batches import TrainBatches
from .evaluation import Totals, autocast, evaluate, moved
from .objectives import Objective
from .report import Report

#: the model alone: the best, or the last without an evaluation; that of a compacted one says its structure
MODEL = "model.pt"


@dataclass
class History:
    """What happened: a row for every epoch, as in the log; the best top-1; seconds of all sessions; what was skipped.

    ``best`` is of the epochs in which the objective was `final`, None while it is not. ``saved`` is the model's file,
    if there is one. ``skipped`` is, for every epoch in which there were any, the images that could not be read.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    skipped: dict[int, list[str]] = field(default_factory=dict)
    saved: Path | None = None


def fit(
    objective: Objective,
    train_loader: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup_epochs: float = 0,
    min_lr: float = 1e-5,
    cooldown_epochs: int = 0,
    accumulation: int = 1,
    clip: float | None = None,
    amp: str | None = None,
    ema: float | None = None,
    mixup: Any = None,
    aug_repeats: int = 1,
    eval_loader: Any = None,
    output: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    tensorboard: bool = False,
    progress: bool | Callable[[int, Tensor], object] = True,
    seed: int = 0,
    device: str | None = None,
) -> History:
    """Train an objective's model, in place; a run that is killed and resumed ends in the same bits as one that is not.

    In several processes the gradient is that of all their batches together. The learning rate warms up linearly and
    falls along a cosine, update by update; groups keep their multiples of it.

    Args:
        objective: what is trained, and with which loss; `objective.model` is another model behind CAIT's compaction.
        train_loader: a DataLoader of (images, target), whose order and augmentation then come from `seed`, epoch and
            index; or see `TrainBatches`. Its batch size is that of one process.
        epochs: how many; or
        steps: how many batches in all, the last epoch ending with them. What has no length (a stream) is gone through
            again and again for one epoch of so many.
        lr: the highest learning rate.
        weight_decay, betas: AdamW's.
        warmup_epochs: of the linear warm-up.
        min_lr: at the end of the cosine.
        cooldown_epochs: so many more, at `min_lr`.
        accumulation: batches of an update.
        clip: the largest norm of all gradients together.
        amp: "no", "bf16" or "fp16" (a GPU's); what accelerate launch was told if not given.
        ema: decay of the averaged weights, which are then evaluated, too, and saved.
        mixup: timm.data.Mixup, or another function of (images, target).
        aug_repeats: how often an image is there in a row, augmented anew (repeated augmentation); an epoch has as many
            images as without.
        eval_loader: of the evaluation behind every epoch.
        output: a folder for checkpoints (``last.pt``), the model (``model.pt``: the best, and the last until the
            objective is `final`; averaged with `ema`) and ``log.csv``.
        resume: a checkpoint to go on from, or "auto": that of `output` if there is one.
        checkpoint_every: updates between checkpoints within an epoch; there is one behind every epoch.
        tensorboard: log for TensorBoard, too, in `output`.
        progress: show a bar on a terminal, and a line an epoch; or call this behind every update, with its number from
            0 and its loss in this process.
        seed: of everything random; a process adds its number for what it draws itself (dropped paths, mixup).
        device: "cpu" where a GPU is not to be used, else None.

    Returns:
        The `History`.

    Raises:
        ValueError: an argument is out of range, the checkpoint is of another run, or there are fewer updates than the
            objective needs.
        FloatingPointError: the loss is not finite. The last checkpoint is from before.
        FileNotFoundError: there is no such checkpoint.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs={epochs} and steps={steps}, but one of them must be given, and not both")
    for name, value, least in (
        ("epochs", epochs, 1),
        ("steps", steps, 1),
        ("accumulation", accumulation, 1),
        ("checkpoint_every", checkpoint_every, 1),
        ("warmup_epochs", warmup_epochs, 0),
        ("min_lr", min_lr, 0),
        ("cooldown_epochs", cooldown_epochs, 0),
        ("aug_repeats", aug_repeats, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}, but it must be at least {least}")
    if steps is not None and cooldown_epochs:
        raise ValueError(f"cooldown_epochs={cooldown_epochs} goes with epochs, not with steps={steps}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}, but it must be above 0")
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema={ema}, but it must be at least 0 and below 1")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip={clip}, but it must be above 0")
    if device not in (None, "cpu"):
        raise ValueError(f"device={device!r}, but it must be 'cpu', or None for the GPU of this process if it has one")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads and modes that rest for a while
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])
    amp = str(accelerator.mixed_precision) if amp is None else amp
    accelerator.native_amp = False  # autocast is ours: a process may train twice, each time in another precision
    if amp not in ("no", "bf16", "fp16"):
        raise ValueError(f"amp={amp!r}, but it must be 'no', 'bf16' or 'fp16'")
    if amp == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU: on a CPU it must be 'no' or 'bf16'")
    checkpoint.seed_everything(seed, accelerator.process_index)
    mine = (accelerator.process_index, accelerator.num_processes)
    batches = TrainBatches(train_loader, seed, *mine, stream=steps, repeats=aug_repeats)
    total = batches.steps * (epochs + cooldown_epochs) if epochs is not None else steps or 0
    whole, rest = divmod(total, batches.steps)
    objective.planned(whole * -(-batches.steps // accumulation) - (-rest // accumulation))
    if mixup is not None and batches.odd:
        raise ValueError("mixup takes even batches: train_loader needs an even batch_size and drop_last=True")
    folder = None if output is None else Path(output)
    source = checkpoint.where(resume, folder)
    run = _Run(objective, accelerator, batches, amp)
    run.rates, run.cooldown = (lr, weight_decay, betas), cooldown_epochs
    run.plan = (total / batches.steps, warmup_epochs, min_lr, accumulation, clip)
    run.ema_decay, run.mixup, run.eval_loader, run.output, run.seed = ema, mixup, eval_loader, folder, seed
    run.every, run.total = checkpoint_every, total
    state = None if source is None else checkpoint.read(source)
    if state is not None:
        run.check(state)
    run.prepare()
    if state is not None:
        try:
            run.restore(state)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"resume: {source} is of another model or objective: {error}") from error
    with Report(folder, accelerator.is_main_process, progress, tensorboard) as report:
        return run.all_epochs(report)


class _Run:
    """What `fit` does, and where it is."""

    rates: tuple[float, float, tuple[float, float]]
    plan: tuple[float, float, float, int, float | None]
    ema_decay: float | None
    cooldown: int  # epochs, of those in the plan
    every: int | None
    output: Path | None
    mixup: Any
    eval_loader: Any
    seed: int
    total: int  # batches

    def __init__(self, objective: Objective, accelerator: Any, batches: TrainBatches, amp: str) -> None:
        self.objective, self.accelerator, self.batches, self.amp = objective, accelerator, batches, amp
        self.device = accelerator.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.history, self.totals = History(), Totals()
        self.epoch = self.step = 0  # the next batch
        self.ema: Any = None
        self.wrapped: Any = None  # the objective, in several processes with gradients that are averaged
        self.random: Any = None  # generators to be set, of a checkpoint
        self.started = time.perf_counter()
        patch = getattr(objective.model, "tokenops_patch", None)
        self.made = {"objective": type(objective).__name__, "method": None if patch is None else patch.method.name}

    def prepare(self) -> None:
        """Everything that is made of the objective's parameters."""
        self.wrapped = None
        self.accelerator.free_memory()
        self.objective.to(self.device)
        self.ema = None
        if self.ema_decay is not None and self.objective.settled:
            self.ema = ModelEmaV3(self.objective.model, decay=self.ema_decay)
        self.wrapped = self.accelerator.prepare(self.objective.train())
        self.optimizers = self.objective.optimizers(*self.rates)

    def all_epochs(self, report: Report) -> History:
        epochs = self.plan[0]
        while self.epoch < epochs:
            self.one_epoch(report)
            row = self.end_epoch()
            self.epoch, self.step, self.totals = self.epoch + 1, 0, Totals()
            report.epoch(row, math.ceil(epochs), self.history)
            self.save()
        self.accelerator.wait_for_everyone()
        self.history.seconds += time.perf_counter() - self.started
        return self.history

    def one_epoch(self, report: Report) -> None:
        epochs, _, _, accumulation, _ = self.plan
        last = round(min(1.0, epochs - self.epoch) * self.batches.steps)
        self.objective.train()
        self.objective.begin_epoch(self.epoch, math.ceil(epochs))
        if self.ema is not None:
            for name, value in self.objective.mode.items():
                setattr(self.ema.module, name, value)
        batches = self.batches.epoch(self.epoch, self.step, self._set_random_state)
        before = self.epoch * -(-self.batches.steps // accumulation)
        updates = 0
        while group := list(islice(batches, min(accumulation, max(last - self.step, 0)))):
            loss = self.update(group)
            self.step += len(group)
            updates += 1
            done = (self.epoch + self.step / self.batches.steps) / epochs
            number = before - (-self.step // accumulation) - 1
            report.advance(f"epoch {self.epoch + 1}/{math.ceil(epochs)}", done, number, loss)
            if self.every and self.step < last and updates % self.every == 0:
                self.save()

    def update(self, group: list[Any]) -> Tensor:
        """One step of the optimizers, with the mean of the batches' gradients; returns that of their losses."""
        clip, mean = self.plan[4], torch.zeros((), device=self.device)
        for i, batch in enumerate(group):
            images, target = moved(batch, self.device)
            if self.mixup is not None:
                images, target = self.mixup(images.clone(), target)
            waiting = i + 1 < len(group)
            with self.accelerator.no_sync(self.wrapped) if waiting else nullcontext():
                with autocast(self.device, self.amp):
                    loss, parts = self.wrapped(images, target)
                self.scaler.scale(loss / len(group)).backward()
            self.totals.add({"loss": loss.detach(), **parts}, len(images))
            mean += loss.detach() / len(group)
        self.set_learning_rates(self.step + len(group))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.objective.before_step():
            if clip is not None:
                nn.utils.clip_grad_norm_([p for g in self.optimizers[0].param_groups for p in g["params"]], clip)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.objective.zero_grad()
        if self.objective.after_step():
            self.prepare()
        elif self.ema is not None:
            self.ema.update(self.objective.model)
        return mean

    def set_learning_rates(self, batches: int) -> None:
        """Of the update behind which so many of the epoch's batches are done."""
        epochs, warmup_epochs, min_lr, _, _ = self.plan
        now, falling = self.epoch + batches / self.batches.steps, epochs - self.cooldown
        rate = learning_rate(now, falling, self.rates[0], warmup_epochs, min_lr)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "lr_scale" in group:
                    group["lr"] = rate * group["lr_scale"]

    def end_epoch(self) -> dict[str, float]:
        """The epoch's row: means over all processes, and the evaluation."""
        history = self.history
        self.set_learning_rates(self.step)  # of optimizers that are new behind a compaction, too
        row = {"epoch": self.epoch, "lr": self.optimizers[0].param_groups[0]["lr"]}
        row |= self.checked(self.totals.means(self.accelerator))
        if self.eval_loader is not None:
            models = {"": self.objective.model, **({"ema_": self.ema.module} if self.ema is not None else {})}
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # loaders draw seeds
                for prefix, model in models.items():
                    scores = evaluate(model, self.eval_loader, self.accelerator, self.amp)
                    row |= {f"{prefix}{name}": value for name, value in scores.items()}
            top1 = row.get("ema_top1", row["top1"])
            if not self.objective.final:
                history.best = history.best_epoch = None
            elif history.best is None or top1 > history.best:
                history.best, history.best_epoch = top1, self.epoch
        row |= self.forget_skipped()
        history.rows.append(row)
        return row

    def forget_skipped(self) -> dict[str, float]:
        """How many images could not be read in the epoch, where data sets tell; the history keeps their names."""
        found = [self.batches.dataset, getattr(self.eval_loader, "dataset", None)]
        found = [dataset for dataset in found if hasattr(dataset, "skipped")]
        names = sorted(set(gather_object([name for dataset in found for name in dataset.skipped()])))
        for dataset in found:
            dataset.forget()
        if names:
            self.history.skipped[self.epoch] = names
        return {"skipped": len(names)} if found else {}

    def checked(self, means: dict[str, float]) -> dict[str, float]:
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss of epoch {self.epoch} is {means['loss']} after {self.step} batches: try a lower lr or clip"
            )
        return means

    def save(self) -> None:
        """The checkpoint, and behind an epoch the model where it is the best one."""
        if self.output is None:
            return
        if self.step:
            self.checked(self.totals.means(self.accelerator))
        dataset = self.batches.dataset
        skipped = dataset.skipped(numbers=True) if hasattr(dataset, "skipped") else []
        own = (checkpoint.random_state(self.device), self.totals.state(), skipped)
        processes = gather_object([own])
        if not self.accelerator.is_main_process:
            return
        history = self.history
        best = self.eval_loader is None or history.best_epoch in (None, self.epoch - 1)
        if self.step == 0 and best:
            model = self.objective.model if self.ema is None else self.ema.module
            content = {"state_dict": model.state_dict(), **self.objective.extra_state(), "epoch": self.epoch - 1}
            checkpoint.write(self.output / MODEL, content)
            history.saved = self.output / MODEL
        state = {
            "tokenops": 1,
            "settings": self.settings(),
            "total": self.total,
            "epoch": self.epoch,
            "step": self.step,
            "objective": self.objective.state_dict(),
            "extra": self.objective.extra_state(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "rows": history.rows,
            "best": (history.best, history.best_epoch),
            "skipped": history.skipped,
            "seconds": history.seconds + time.perf_counter() - self.started,
            "processes": processes,
        }
        checkpoint.write(self.output / checkpoint.LAST, state)

    def settings(self) -> dict[str, Any]:
        """What cannot change between an interruption and its resumption."""
        return {
            **self.made,
            "seed": self.seed,
            "processes": self.accelerator.num_processes,
            "batches an epoch": self.batches.steps,
            "accumulation": self.plan[3],
            "aug repeats": self.batches.repeats,
            "ema": self.ema_decay is not None,
            "amp": self.amp,
        }

    def check(self, state: dict[str, Any]) -> None:
        """That a checkpoint fits; the objective becomes what it was, but for its weights."""
        for name, value in self.settings().items():
            before = state["settings"].get(name, value)
            if before != value:
                raise ValueError(f"resume: {name} was {before}, but is now {value}")
        planned = state.get("total", self.total)
        if planned < min(self.total, state["epoch"] * self.batches.steps):
            raise ValueError(f"resume: the run ended within an epoch, behind {planned} batches: it cannot go on")
        self.objective.load_extra_state(state["extra"])

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was."""
        self.objective.load_state_dict(state["objective"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.epoch, self.step = state["epoch"], state["step"]
        history = self.history
        history.rows, history.skipped, history.seconds = state["rows"], state["skipped"], state["seconds"]
        history.best, history.best_epoch = state["best"]
        if self.output is not None and (self.output / MODEL).is_file():
            history.saved = self.output / MODEL
        elif self.output is not None:  # it is another folder: the next model is its best
            history.best = history.best_epoch = None
        self.random, totals, skipped = state["processes"][self.accelerator.process_index]
        self.totals = Totals(totals, self.device)
        if skipped:
            self.batches.dataset.skip(skipped)

    def _set_random_state(self) -> None:
        if self.random is not None:
            checkpoint.set_random_state(self.random, self.device)
            self.random = None


def learning_rate(epoch: float, epochs: float, lr: float, warmup_epochs: float = 0, min_lr: float = 0.0) -> float:
    r"""Linear from 0 to ``lr`` in the warm-up, then a cosine to ``min_lr``; epochs may be fractions.

    >>> [round(learning_rate(e, 12, 1.0, warmup_epochs=2), 2) for e in (0, 1, 2, 7, 12)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    t = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    least = min(min_lr, lr)
    return least + (lr - least) * (1 + math.cos(math.pi * min(t, 1.0))) / 2


def model_of(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The model's state dict in a file of `fit`: ``model.pt``, or a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "state_dict" in state:
        return state["state_dict"]
    return {k.removeprefix("model."): v for k, v in state["objective"].items() if k.startswith("model.")}
