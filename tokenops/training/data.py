"""Image classification data: a folder a class, or Hugging Face datasets on disk; unreadable images cost nothing."""

import io
from abc import abstractmethod
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..patching.images import open_rgb, rgb

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: names a split may have on disk, the first that is there is taken
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test", "eval")}


class Images(Dataset):
    """Images and their classes. One that cannot be read (missing, corrupt, truncated) is noted.

    In training the next readable one takes its place, so that batches keep their size in every process; in evaluation
    it is left out: the item is None, and `collate` drops it.

    Args:
        labels: the class of every image.
        classes: their names.
        train: see above.
        transform: from a PIL image in RGB to a tensor; an attribute, which may be set later.
    """

    def __init__(self, labels: Sequence[int], classes: Sequence[str], train: bool, transform: Any) -> None:
        self.labels, self.classes, self.train, self.transform = list(labels), list(classes), train, transform
        self._why: Exception | None = None
        self._unreadable = torch.zeros(len(self.labels), dtype=torch.bool).share_memory_()  # workers write into it

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called."""

    @abstractmethod
    def data(self, index: int) -> Any:
        """A file's bytes, or an image that is one already. Raises whatever is wrong."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int] | None:
        for i in range(index, index + (len(self) if self.train else 1)):
            i %= len(self)
            image = self._read(i)
            if image is not None:
                return self.transform(image), self.labels[i]
        if self.train:
            raise OSError(f"none of {len(self)} images can be read, as {self.name(index)}: {self._why}")
        return None

    def _read(self, index: int) -> Any:
        try:
            data = self.data(index)
            return open_rgb(io.BytesIO(data)) if isinstance(data, bytes) else rgb(data)
        except Exception as error:  # what a broken file makes a decoder raise is anything
            self._unreadable[index], self._why = True, error
            return None

    def skipped(self, numbers: bool = False) -> list[Any]:
        """The images that this process could not read since `forget`: their names, or numbers."""
        found = self._unreadable.nonzero()[:, 0].tolist()
        return found if numbers else [self.name(i) for i in found]

    def skip(self, indices: Sequence[int]) -> None:
        """Note images as `skipped`, those of an interrupted epoch."""
        self._unreadable[list(indices)] = True

    def forget(self) -> None:
        self._unreadable.zero_()


class FolderImages(Images):
    """A folder with a folder for every class.

    Args:
        folder: that folder.
        train, transform: as in :class:`Images`.
        classes: the folders' names, to number classes as in training; all folders in order if not given.

    Raises:
        ValueError: there is no class, no image, or a class that is not in ``classes``.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        train: bool,
        transform: Callable[..., Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        found = class_folders(self.folder)
        if not found:
            raise ValueError(f"{folder} has no folders: there must be one for every class")
        names = found if classes is None else list(classes)
        if extra := sorted(set(found) - set(names)):
            raise ValueError(f"{folder} has classes {extra} that the training images do not have")
        self.paths, labels = [], []
        for label, name in enumerate(names):
            files = image_files(self.folder / name)
            self.paths += files
            labels += [label] * len(files)
        if not labels:
            raise ValueError(f"{folder} has no image: files must end in {', '.join(EXTENSIONS)}")
        super().__init__(labels, names, train, transform)

    def name(self, index: int) -> str:
        return str(self.paths[index].relative_to(self.folder))

    def data(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


class TableImages(Images):
    """A split of Hugging Face's `datasets`, with a column of images and one of classes.

    Args:
        table: the split.
        train, transform: as in :class:`Images`.
        classes: names of the classes; the column's own, or its values in order, if not given.

    Raises:
        ValueError: there is no such column, or a class that is not in ``classes``.
    """

    def __init__(
        self, table: Any, train: bool, transform: Callable[..., Any] | None = None, classes: Sequence[str] | None = None
    ) -> None:
        import datasets

        features = table.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        kinds = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        kinds += [name for name in ("label", "labels", "fine_label", "class") if name in features]
        if not images or not kinds:
            raise ValueError(f"the data set has columns {list(features)}, but needs one of images and one of classes")
        self.column = images[0]
        self.table = table.cast_column(self.column, datasets.Image(decode=False))  # read here, where it may fail
        values = table[kinds[0]]
        own = getattr(features[kinds[0]], "names", None)
        if own is None:
            own = [str(name) for name in (sorted(set(values)) if classes is None else classes)]
            if extra := sorted({str(value) for value in values} - set(own)):
                raise ValueError(f"the data set has classes {extra} that the training images do not have")
            number = {name: i for i, name in enumerate(own)}
            values = [number[str(value)] for value in values]
        super().__init__(values, own, train, transform)

    def name(self, index: int) -> str:
        path = self.table[index][self.column].get("path")
        return f"row {index}" + (f" ({path})" if path else "")

    def data(self, index: int) -> bytes:
        found = self.table[index][self.column]
        return found["bytes"] if found.get("bytes") is not None else Path(found["path"]).read_bytes()


class UnlabelledImages(Images):
    """Images without classes, for evaluation: every label is 0.

    Args:
        images: files, folders with the folders within, in the order of their names, or PIL images.
        transform: as in :class:`Images`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder has no image, or nothing is given.
    """

    def __init__(self, images: Sequence[Any], transform: Callable[..., Any] | None = None) -> None:
        self.images: list[Any] = []
        for image in images:
            path = Path(image) if isinstance(image, (str, PathLike)) else None
            if path is None:
                self.images.append(image)
            elif path.is_dir():
                if not (files := image_files(path)):
                    raise ValueError(f"{path} has no image: files must end in {', '.join(EXTENSIONS)}")
                self.images += files
            elif path.is_file():
                self.images.append(path)
            else:
                raise FileNotFoundError(f"there is no file or folder {path}")
        if not self.images:
            raise ValueError("there is no image: images is empty")
        super().__init__([0] * len(self.images), [], False, transform)

    def name(self, index: int) -> str:
        image = self.images[index]
        return str(image) if isinstance(image, Path) else f"image {index}"

    def data(self, index: int) -> Any:
        image = self.images[index]
        return image.read_bytes() if isinstance(image, Path) else image


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and the folders within, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def class_folders(folder: Path) -> list[str]:
    """The names of the classes whose folders are there, in order; hidden folders are none."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def open_images(
    root: str | PathLike[str],
    split: str,
    transform: Callable[..., Any] | None = None,
    train: bool = False,
    classes: Sequence[str] | None = None,
) -> Images:
    """A split of the data in a folder: folders ``train`` and ``val`` of classes, or what ``save_to_disk`` wrote.

    Args:
        root: the folder.
        split: "train" or "val" (also validation, test, eval), or another name that is there.
        transform, train, classes: as in :class:`FolderImages`.

    Raises:
        FileNotFoundError: there is no such folder or split.
        ImportError: the data is Hugging Face's, whose package is not installed.
        ValueError: see the two classes.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    names = SPLITS.get(split, (split,))
    if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError as missing:
            raise ImportError(f"{root} needs Hugging Face's package: pip install datasets") from missing
        tables = load_from_disk(str(folder))
        if not isinstance(tables, DatasetDict):
            tables = {"train": tables}
        for name in names:
            if name in tables:
                return TableImages(tables[name], train, transform, classes)
        raise FileNotFoundError(f"{root} has splits {sorted(tables)}, but none of {names}")
    for name in names:
        if (folder / name).is_dir():
            return FolderImages(folder / name, train, transform, classes)
    raise FileNotFoundError(f"{root} has no folder {' or '.join(names)}")


def transform_for(model: torch.nn.Module, train: bool, img_size: int | None = None, **kwargs: Any) -> Any:
    """timm's transform, with the size, mean and interpolation of the model's configuration.

    Args:
        model: of timm.
        train: with augmentation.
        img_size: another size.
        **kwargs: further arguments of timm.data.create_transform (``scale``, ``auto_augment``, ``re_prob``, ...).
    """
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({} if img_size is None else {"img_size": img_size}, model=model)
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(is_training=train, **{name: config[name] for name in wanted if name in config}, **kwargs)


def loader_of(images: Images, batch_size: int, workers: int = 0, **kwargs: Any) -> DataLoader:
    """A DataLoader: shuffled and of whole batches in training, every image once in evaluation.

    Raises:
        ValueError: training has too few images for a batch.
    """
    if images.train and len(images) < batch_size:
        raise ValueError(f"batch_size={batch_size}, but there are only {len(images)} images")
    shape: dict[str, Any] = dict(shuffle=images.train, drop_last=images.train)
    options: dict[str, Any] = dict(persistent_workers=True) if workers else {}
    gather = default_collate if images.train else collate
    return DataLoader(images, batch_size, num_workers=workers, collate_fn=gather, **shape, **options, **kwargs)


def collate(items: list[Any]) -> Any:
    """A batch of those that could be read; None if there is none."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None
