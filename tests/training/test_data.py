"""Images from folders and tables: those that cannot be read are named, counted and skipped."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFile
from torch import nn

pytest.importorskip("accelerate")

from tokenops.training import Plain, fit, loader_of, open_images, transform_for  # noqa: E402
from tokenops.training.data import FolderImages  # noqa: E402


def picture(i, size=24):
    """An image whose red channel is 10 * i, with noise that compresses badly in the others."""
    pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
    pixels[..., 0] = 10 * i
    return Image.fromarray(pixels)


def encoded(i, kind="png"):
    file = io.BytesIO()
    picture(i).save(file, kind)
    return file.getvalue()


def red(image):
    """What tells images apart."""
    return torch.tensor(float(np.asarray(image)[..., 0].mean()))


@pytest.fixture
def folder(tmp_path):
    """Two classes of four images each, in train, and of two in val."""
    for split, each in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(each):
                (tmp_path / split / name / f"{i}.png").write_bytes(encoded(label * 4 + i))
    return tmp_path


def spoil(folder):
    """A missing, a corrupt, two truncated images, in two formats, and an empty one: of cat all but 3."""
    cat, dog = folder / "train" / "cat", folder / "train" / "dog"
    whole = encoded(1)
    (cat / "1.png").write_bytes(whole[: len(whole) // 2])
    (cat / "2.png").write_bytes(b"this is no image at all")
    jpeg = encoded(5, "jpeg")
    (dog / "1.png").unlink()
    (dog / "1.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (dog / "2.png").write_bytes(b"")
    data = open_images(folder, "train", red, train=True)
    (cat / "0.png").unlink()  # once its name is known
    return data


BROKEN = ["cat/0.png", "cat/1.png", "cat/2.png", "dog/1.jpg", "dog/2.png"]


def test_a_folder_a_class(folder):
    data = open_images(folder, "train", red, train=True)
    assert data.classes == ["cat", "dog"] and len(data) == 8
    assert [data[i][1] for i in range(8)] == [0] * 4 + [1] * 4
    assert [float(data[i][0]) for i in range(8)] == pytest.approx([10 * i for i in range(8)])
    assert len(open_images(folder, "val", red)) == 4 and data.skipped() == []


def test_unreadable_images_are_replaced_in_training(folder):
    data = spoil(folder)
    found = [(round(float(data[i][0]) / 10), data[i][1]) for i in range(8)]
    #       each by the next that can be read, with its class
    assert found == [(3, 0), (3, 0), (3, 0), (3, 0), (4, 1), (7, 1), (7, 1), (7, 1)]
    assert data.skipped() == BROKEN and data.skipped(numbers=True) == [0, 1, 2, 5, 6]
    data.forget()
    assert data.skipped() == []


def test_unreadable_images_are_left_out_of_an_evaluation(folder):
    spoil(folder)
    data = open_images(folder, "train", red)
    found = [batch if batch is None else batch[1].tolist() for batch in loader_of(data, 2)]
    assert found == [None, [0, 1], None, [1]]
    assert data.skipped() == BROKEN[1:]  # 0.png is not even listed


@pytest.mark.parametrize("workers", (0, 2))
def test_training_says_what_it_skipped(folder, workers, tmp_path, capsys):
    data = spoil(folder)
    data.transform = to_tensor
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 2))
    (folder / "val" / "dog" / "4.png").write_bytes(b"broken")
    val = loader_of(open_images(folder, "val", to_tensor), 4, workers)
    options = dict(epochs=2, lr=1e-3, eval_loader=val, output=tmp_path / "out", progress=False, device="cpu")
    history = fit(Plain(model), loader_of(data, 4, workers), **options)
    names = [*BROKEN, "dog/4.png"]
    assert history.skipped == {0: names, 1: names} and [row["skipped"] for row in history.rows] == [6, 6]
    told = capsys.readouterr().err
    assert told.count("6 unreadable images: cat/0.png, cat/1.png") == 2
    assert "skipped" in (tmp_path / "out" / "log.csv").read_text().splitlines()[0]


def to_tensor(image):
    return torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1) / 255


def test_evaluation_counts_what_is_there(folder):
    from tokenops.training import evaluate

    (folder / "val" / "cat" / "0.png").write_bytes(b"broken")
    data = open_images(folder, "val", to_tensor)

    class First(nn.Module):
        weight = nn.Parameter(torch.zeros(1))

        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, x):
            return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)  # always a cat

    assert evaluate(First(), loader_of(data, 2))["top1"] == pytest.approx(100 / 3)


def test_nothing_readable_is_an_error(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"broken")
    loader = loader_of(open_images(folder, "train", to_tensor, train=True), 4)
    with pytest.raises(OSError, match="none of 8 images can be read"):
        fit(Plain(nn.Linear(1, 2)), loader, epochs=1, lr=1e-3, progress=False, device="cpu")


def test_truncated_images_are_not_let_through(folder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = spoil(folder)
    assert [data[i] is not None for i in range(8)] and data.skipped() == BROKEN
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_errors_of_transforms_are_not_hidden(folder):
    with pytest.raises(ZeroDivisionError):
        open_images(folder, "train", lambda image: 1 / 0, train=True)[0]


def test_wrong_folders(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no folder test2"):
        open_images(folder, "test2", red)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(tmp_path / "nowhere", "train", red)
    (folder / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match="bird"):
        open_images(folder, "val", red, classes=["cat", "dog"])
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no image"):
        FolderImages(tmp_path / "empty", True, red)
    with pytest.raises(ValueError, match="no folders"):
        FolderImages(tmp_path / "empty" / "a", True, red)
    with pytest.raises(ValueError, match="batch_size=9, but there are only 8"):
        loader_of(open_images(folder, "train", red, train=True), 9)


def test_hugging_face_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = encoded(1)
    rows = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(4)]
    rows[1]["bytes"] = whole[: len(whole) // 2]
    rows[2]["bytes"] = b""
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features)
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "table")
    data = open_images(tmp_path / "table", "train", red, train=True)
    assert data.classes == ["cat", "dog"]
    assert [round(float(data[i][0]) / 10) for i in range(4)] == [0, 3, 3, 3]
    assert data.skipped() == ["row 1 (1.png)", "row 2 (2.png)"]
    val = open_images(tmp_path / "table", "val", red)
    assert [val[i] is None for i in range(4)] == [False, True, True, False]
    with pytest.raises(FileNotFoundError, match="splits"):
        open_images(tmp_path / "table", "test2", red)


def test_classes_of_a_plain_column(tmp_path):
    datasets = pytest.importorskip("datasets")

    def table(*labels):
        rows = [{"bytes": encoded(1), "path": None} for _ in labels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict({"image": rows, "label": list(labels)}, features)

    splits = {"train": table(10, 3, 7, 3), "val": table(7, 10), "test": table(4)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "table")
    train = open_images(tmp_path / "table", "train", red, train=True)
    assert train.classes == ["3", "7", "10"] and train.labels == [2, 0, 1, 0]
    val = open_images(tmp_path / "table", "val", red, classes=train.classes)
    assert val.classes == train.classes and val.labels == [1, 2]
    with pytest.raises(ValueError, match=r"classes \['4'\] that the training images do not have"):
        open_images(tmp_path / "table", "test", red, classes=train.classes)


def test_transforms_are_the_models():
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=1)
    for train in (True, False):
        assert transform_for(model, train, 64)(picture(3, 80)).shape == (3, 64, 64)
    config = model.pretrained_cfg
    grey = Image.new("RGB", (80, 80), (128, 128, 128))
    expected = (128 / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(transform_for(model, False, 64)(grey)[:, 5, 5], expected)
