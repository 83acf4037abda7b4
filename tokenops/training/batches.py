"""Batches that depend on the seed, the epoch and their number alone: not on workers, interruptions or processes."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler


class Batches(Sampler[list[int]]):
    """The indices of a process's batches in an epoch, from a step on.

    A step's images are the next ``batch_size * processes`` of a permutation made of seed and epoch; each process takes
    its part of them. All processes have as many steps: with ``drop_last`` what is too little for a step is left out,
    without, it is filled up from the beginning. With ``repeats`` every image of the permutation is there so many times
    in a row, in other processes where there are some, as ``index + repetition * length``; an epoch is no longer for it.

    Args:
        length: of the data set.
        batch_size: of one process.
        shuffle: whether there is a permutation.
        drop_last: see above.
        seed: of the permutations.
        process, processes: which of how many.
        repeats: of an image (repeated augmentation).

    Raises:
        ValueError: there is no step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        repeats: int = 1,
    ) -> None:
        together = batch_size * processes
        self.steps = length // together if drop_last else -(-length // together)
        if self.steps < 1:
            raise ValueError(f"{length} images make no batch of {batch_size} in each of {processes} processes")
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.process, self.processes, self.drop_last, self.repeats = process, processes, drop_last, repeats
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        if self.repeats > 1:
            order = (order[:, None] + self.length * np.arange(self.repeats)).ravel()[: self.length]
        together = self.batch_size * self.processes
        for step in range(self.first, self.steps):
            now = order[step * together : (step + 1) * together]
            if len(now) < together and self.processes > 1:  # one process has a smaller batch instead
                now = np.resize(np.concatenate((now, order)), together)
            size = -(-len(now) // self.processes)
            mine = slice(self.process * size, (self.process + 1) * size)
            yield now[mine if self.repeats == 1 else slice(self.process, None, self.processes)].tolist()


class Reproducible(Dataset):
    """A data set whose random augmentations depend on seed, epoch and index alone.

    Python's, numpy's and torch's global generators are seeded for every item, and put back afterwards. An index above
    the length is a repetition, as in `Batches`: the same item, augmented anew.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        repetition, item = divmod(index, len(self.dataset))
        with seeded(self.seed, int(self.epoch), item, *([repetition] if repetition else [])):
            return self.dataset[item]


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """The CPU's global generators are seeded within, and as they were afterwards."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


class TrainBatches:
    """The batches of an epoch from any step on, for this process.

    A DataLoader that shuffles or keeps the order is made anew, with `Batches` and a `Reproducible` data set. Anything
    else with a length (a loader with a sampler of its own, a list of batches) is iterated over as it is, from the
    beginning, and must itself give every process its share; its ``sampler.set_epoch`` or ``set_epoch`` is called. So is
    a stream, which has none, over and over again.

    Args:
        loader: the loader, or the list.
        seed: of order and augmentation.
        process, processes: which of how many.
        stream: batches of an epoch of what has no length.
        repeats: as in `Batches`.

    Raises:
        TypeError: the loader has no length, and ``stream`` is not given.
        ValueError: there is no batch, or ``repeats`` of a loader that is not made anew.
    """

    def __init__(
        self, loader: Any, seed: int, process: int, processes: int, stream: int | None = None, repeats: int = 1
    ) -> None:
        self.loader, self.batches, self.endless = loader, None, False
        self.dataset: Any = getattr(loader, "dataset", None)
        if isinstance(loader, DataLoader) and _known(loader):
            shuffle = isinstance(loader.sampler, RandomSampler)
            assert loader.batch_size is not None
            length = len(loader.dataset)  # type: ignore[arg-type]
            shape = (length, loader.batch_size, shuffle, loader.drop_last)
            self.batches = Batches(*shape, seed=seed, process=process, processes=processes, repeats=repeats)
            self.items = Reproducible(loader.dataset, seed)
            self.generator = torch.Generator()
            self.loader = DataLoader(
                self.items, batch_sampler=self.batches, generator=self.generator, **_options(loader)
            )
        elif repeats > 1:
            raise ValueError(f"aug_repeats={repeats} needs a train_loader that shuffles or keeps the order by itself")
        self.repeats = repeats
        try:
            self.steps = len(self.loader)
        except TypeError:  # also of a DataLoader whose data set is a stream
            if stream is None:
                raise TypeError(
                    f"train_loader: {type(loader).__name__} has no length, so steps must say how many batches there are"
                ) from None
            self.steps, self.endless = stream, True
        if not self.steps:
            raise ValueError("train_loader has no batch")

    @property
    def odd(self) -> bool:
        """Whether a batch may have an odd number of images, which mixup cannot take."""
        if self.batches is None:
            return False
        even = self.batches.drop_last or self.batches.length % (self.batches.batch_size * self.batches.processes) == 0
        return self.batches.batch_size % 2 == 1 or not even

    def epoch(self, epoch: int, first: int = 0, ready: Callable[[], object] = lambda: None) -> Iterator[Any]:
        """The batches of an epoch, from number ``first`` on; ``ready`` is called before the first of them is made."""
        if self.batches is not None:
            self.batches.epoch, self.batches.first = epoch, first
            self.items.epoch.fill_(epoch)
            self.generator.manual_seed(0)  # what workers' own seeds come from: not from the global generator
            first = 0
        for name in ("", "sampler", "batch_sampler"):
            owner: Any = getattr(self.loader, name, None) if name else self.loader
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        iterator = iter(self.loader) if not self.endless else islice(_again_and_again(self.loader), self.steps)
        for _ in range(first):
            next(iterator)
        ready()
        yield from iterator


def _again_and_again(stream: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in stream:
            empty = False
            yield batch
        if empty:
            raise ValueError("train_loader has no batch any more: give a DataLoader or a list, not an iterator")


def eval_batches(loader: Any, process: int, processes: int) -> Any:
    """A process's share of an evaluation: every image once, so shares may differ in length."""
    if processes == 1 or not (isinstance(loader, DataLoader) and _known(loader)):
        return loader
    length = len(loader.dataset)  # type: ignore[arg-type]
    mine: Sequence[int] = range(process, length, processes)
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=mine, **_options(loader))  # type: ignore


def _known(loader: DataLoader) -> bool:
    """Whether a loader's order is one of the two that can be made again."""
    samplers = (RandomSampler, SequentialSampler)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None or type(loader.sampler) not in samplers:
        return False
    whole = len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
    return whole and not getattr(loader.sampler, "replacement", False)


def _options(loader: DataLoader) -> dict[str, Any]:
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "persistent_workers")
    options = {name: getattr(loader, name) for name in names}
    if loader.num_workers:
        options.update(prefetch_factor=loader.prefetch_factor, multiprocessing_context=loader.multiprocessing_context)
    return options
