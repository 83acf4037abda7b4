"""`python -m tokenops train` learns a small data set, and says clearly what it cannot do."""

import argparse
import csv
import importlib
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("accelerate")

from tokenops import apply_patch  # noqa: E402
from tokenops.cli import CommandError, methods, models, train  # noqa: E402
from tokenops.methods.cait.structure import Structure  # noqa: E402
from tokenops.training import History  # noqa: E402

SMALL = "--model-kwargs embed_dim=48 num_heads=3 depth=2 patch_size=8 --img-size 32 --device cpu --workers 0"
FEW = "--batch-size 8 --no-aug --smoothing 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stripes, lying and standing, of any colour, phase and width: 24 to learn and 16 to be tested, one broken."""
    root, noise = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for split, each in (("train", 24), ("val", 16)):
        for name in ("lying", "standing"):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                wave = np.sin(np.arange(32) * noise.uniform(0.7, 1.3) + noise.uniform(0, 6))
                image = wave[:, None] * np.ones(32) if name == "lying" else wave * np.ones((32, 1))
                colour = noise.uniform(60, 120, 3)
                pixels = 128 + image[..., None] * colour + noise.normal(0, 10, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    (root / "train" / "lying" / "7.png").write_bytes(b"broken")
    return root


def command(folder, output, text):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(["--data-dir", str(folder), "--output", str(output), *text.split()])


def test_learns(folder, tmp_path, capsys):
    text = f"--model deit_tiny_patch16_224 {SMALL} {FEW} --epochs 12 --lr 3e-3 --warmup-epochs 1 --clip-grad 1"
    train.run(command(folder, tmp_path, text))
    told = capsys.readouterr()
    out = " ".join(told.out.split())
    assert out.startswith("best top-1 ") and float(out.split()[2]) >= 90
    assert f"saved in {tmp_path / 'model.pt'}" in out and "unreadable images: 1" in out
    assert "lying/7.png" in told.err
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert max(float(row["top1"]) for row in rows) == pytest.approx(float(out.split()[2]), abs=0.01)


def test_every_option_at_once_and_resumed(folder, tmp_path, capsys):
    text = (
        f"--model evo_deit_tiny_patch16_224 {SMALL.replace('depth=2', 'depth=3')} --objective evo_vit --batch-size 8"
        " --lr 1e-3 --weight-decay 0.1 --min-lr 1e-6 --amp --mixup 0.8 --cutmix 1 --model-ema --model-ema-decay 0.5"
        " --grad-accum-steps 2 --seed 3 --drop-path 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --checkpoint-every 1"
    )
    train.run(command(folder, tmp_path, f"{text} --epochs 1"))
    before = torch.load(tmp_path / "last.pt", weights_only=True)
    train.run(command(folder, tmp_path, f"{text} --epochs 2 --resume auto"))
    rows = torch.load(tmp_path / "last.pt", weights_only=True)["rows"]
    assert rows[0] == before["rows"][0] and [row["epoch"] for row in rows] == [0, 1] and "ema_top1" in rows[1]


def weights(path, name, **sizes):
    """A file with a model's weights, for a teacher."""
    torch.save(timm.create_model(name, num_classes=2, **sizes).state_dict(), path)
    return path


def test_recalibration_from_a_teacher(folder, tmp_path, capsys):
    sizes = "embed_dim=48 num_heads=3"
    text = f"--img-size 64 --device cpu --workers 0 {FEW} --epochs 1 --lr 1e-3 --from-teacher"
    student = f"--model sit_lvvit_tiny --model-kwargs {sizes} stage_blocks=(1,1) --objective frd"
    file = weights(tmp_path / "teacher.pt", "lvvit_tiny", img_size=64, embed_dim=48, num_heads=3, depth=2)
    teacher = f"--teacher lvvit_tiny --teacher-checkpoint {file} --teacher-kwargs {sizes} depth=2"
    train.run(command(folder, tmp_path, f"{student} {teacher} {text}"))
    row = torch.load(tmp_path / "last.pt", weights_only=True)["rows"][0]
    assert row["loss"] == pytest.approx(row["cls"] + 2 * row["token"] + 2 * row["logits"], abs=1e-5)


def test_a_convolutional_teacher_takes_no_img_size(folder, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "fit", lambda objective, *_, **kwargs: seen.append(objective) or History())
    file = weights(tmp_path / "teacher.pt", "resnet10t")
    text = f"--model deit_tiny_patch16_224 {SMALL} {FEW} --teacher resnet10t --teacher-checkpoint {file}"
    train.run(command(folder, tmp_path, text))
    assert torch.equal(seen[0]._teachers[0].fc.weight, torch.load(file)["fc.weight"])


@pytest.mark.parametrize(
    "method",
    (
        "tome --r 2 1 0 1",
        "tome --merged-tokens 2",
        "evit --keep-rate 0.6 --reduction-loc 1",
        "patch_slimming --counts 17 9 5 5",
        "evo_vit --stages 2",
        "sit --keeping-ratio 0.5 --locations 2",
        "cait --points 1:vertical",
    ),
)
def test_patched_models(folder, tmp_path, capsys, method):
    text = f"--model deit_tiny_patch16_224 {SMALL.replace('depth=2', 'depth=4')} {FEW} --epochs 1 --lr 1e-3"
    aim = "--objective evit" if "evit" in method else ""
    if "sit" in method:
        sizes = "embed_dim=48 num_heads=3 depth=4 patch_size=8"
        shape = dict(img_size=32, embed_dim=48, num_heads=3, depth=4, patch_size=8)
        file = weights(tmp_path / "teacher.pt", "deit_tiny_patch16_224", **shape)
        aim = f"--objective frd --teacher deit_tiny_patch16_224 --teacher-kwargs {sizes} --teacher-checkpoint {file}"
    train.run(command(folder, tmp_path, f"{text} --method {method} {aim}"))
    names = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert any(".slimming." in name for name in names) is ("sit" in method)


@pytest.mark.parametrize("model", ("cait_deit_tiny_patch16_224", "deit_tiny_patch16_224 --method cait --kind average"))
def test_cait_is_pruned(folder, tmp_path, capsys, model):
    model = f"--model {model} --img-size 64 --device cpu --workers 0 {FEW} --objective cait"
    sizes = "--model-kwargs embed_dim=64 num_heads=2"
    train.run(command(folder, tmp_path, f"{model} {sizes} --prune-target 0.8 --epochs 1 --lr 1e-3"))
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["state_dict"]["blocks.0.mlp.fc1.weight"].shape[0] <= 256 and "structure" in saved
    assert sum(v.numel() for n, v in saved["state_dict"].items() if ".mlp.fc1" in n) < 12 * 256 * 65
    again, _ = loaded(f"{model} {sizes}", tmp_path / "model.pt")
    torch.testing.assert_close(again.state_dict(), saved["state_dict"], rtol=0, atol=0)
    assert not any(module.training for module in again.modules())
    assert Structure.of(again).to_json() == saved["structure"] and again(torch.randn(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("--epochs 300 --shrink-start-epoch 10 --shrink-epochs 100", 10 / 300, 110 / 300),
        ("--epochs 290 --cooldown-epochs 10 --shrink-start-epoch 10 --shrink-epochs 100", 10 / 300, 110 / 300),
        ("", 0.1, 0.35),
    ],
)
def test_epochs_in_which_the_keep_rate_shrinks(folder, tmp_path, text, start, end):
    args = command(folder, tmp_path, f"--model evit_deit_tiny_patch16_224 {SMALL} --objective evit {text}")
    objective = train.objective(args, train.made(args, 2)[0], None, 4)
    assert (objective.start, objective.end) == pytest.approx((start, end))


def test_what_is_erased_is_pixels(folder, tmp_path):
    args = command(folder, tmp_path, f"--model deit_tiny_patch16_224 {SMALL} --reprob 0.25 --remode pixel")
    images, _ = train.data(args)
    train.transformed(args, train.made(args, 2)[0], images, None)
    (erasing,) = [part for part in images.transform.transforms if type(part).__name__ == "RandomErasing"]
    assert erasing.per_pixel and erasing.probability == 0.25


def test_weights_in_a_file_are_not_downloaded(tmp_path):
    """There are none of this model to download, which would be said."""
    small = dict(img_size=32, embed_dim=48, num_heads=3, stage_blocks=(1, 1))
    file = weights(tmp_path / "own.pt", "sit_lvvit_tiny", **small)
    made = train._create("--model", "sit_lvvit_tiny", True, file, small | {"num_classes": 2})
    assert torch.equal(made.head.weight, torch.load(file)["head.weight"])
    with pytest.raises(CommandError, match="no weights of sit_lvvit_tiny can be downloaded"):
        train._create("--model", "sit_lvvit_tiny", True, None, small)


def loaded(text, path):
    """What `eval --checkpoint` makes; the sizes of --model-kwargs are given to it."""
    parser = argparse.ArgumentParser()
    models.add_model_arguments(parser)
    methods.add_method_arguments(parser)
    args, _ = parser.parse_known_args([*text.split(), "--checkpoint", str(path), "--num-classes", "2"])
    return models.make(args, embed_dim=64, num_heads=2)


def test_a_compacted_model_takes_no_other_method(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=64, num_heads=2, depth=12)
    apply_patch(model, "cait")
    torch.save({"state_dict": model.state_dict(), "structure": Structure.of(model).to_json()}, tmp_path / "model.pt")
    text = "--model deit_tiny_patch16_224 --img-size 64"
    with pytest.raises(CommandError, match="compacted by cait, and takes no --method tome"):
        loaded(f"{text} --method tome --r 2", tmp_path / "model.pt")
    with pytest.raises(CommandError, match="model.pt is not of deit_tiny_patch16_224: .* 12 blocks"):
        parser = argparse.ArgumentParser()
        models.add_model_arguments(parser)
        methods.add_method_arguments(parser)
        models.make(parser.parse_args([*text.split(), "--checkpoint", str(tmp_path / "model.pt")]), depth=3)


@pytest.mark.parametrize(
    "text, what",
    [
        ("--model vit_tinny", "--model: timm knows no model 'vit_tinny'; near it are: vit_tiny_"),
        (
            "--teacher resnet_50 --teacher-pretrained",
            "--teacher: timm knows no model 'resnet_50'; near it are: resnet50",
        ),
        ("--objective frd", "--teacher is missing"),
        ("--r 4", "--r belongs to --method tome or random, not to none"),
        ("--method tome", "--method tome needs --r"),
        ("--teacher deit_tiny_patch16_224", "give --teacher-pretrained or --teacher-checkpoint"),
        ("--batch-size 0", "--batch-size=0"),
        ("--grad-accum-steps 0", "--grad-accum-steps=0"),
        ("--workers -1", "--workers=-1"),
        ("--num-classes 1", "--num-classes=1, but the data has 2 classes"),
        ("--resume BROKEN", "7.png cannot be read"),
        ("--batch-size 1000", "batch_size=1000, but there are only 48 images"),
        ("--resume gone.pt", "gone.pt"),
        ("--epochs 0", "--epochs=0"),
        ("--seed -1", "--seed=-1"),
        (f"--seed {2**64}", "--seed=18446744073709551616, but it must be at most"),
        ("--cooldown-epochs -1", "--cooldown-epochs=-1"),
        ("--aug-repeats 0", "--aug-repeats=0, but it must be at least 1"),
        ("--lr-base -1", "lr=-0.03125, but it must be above 0"),
        ("--shrink-epochs 3", "--shrink-start-epoch and --shrink-epochs belong to --objective evit, not plain"),
        ("--objective evit --method evit --shrink-epochs -1", "--shrink-epochs=-1"),
        ("--drop-path 3", "--drop-path=3.0, but it must be at least 0 and below 1"),
        ("--reprob -0.1", "--reprob=-0.1, but it must be at least 0 and below 1"),
        ("--aa foo", "--aa foo is no policy of timm's"),
        ("--initial-checkpoint gone.pt", "gone.pt"),
        ("--model-kwargs depth", "NAME=VALUE"),
        ("--train-split other", "no folder other"),
        ("--objective evo_vit", "stage_wise"),
    ],
)
def test_says_what_it_cannot_do(folder, tmp_path, text, what):
    text = text.replace("BROKEN", str(folder / "train" / "lying" / "7.png"))
    with pytest.raises(CommandError, match=what):
        few = FEW.replace("--no-aug", "") if "--aa" in text else FEW
        train.run(command(folder, tmp_path, f"--model deit_tiny_patch16_224 {SMALL} {few} {text}"))


def test_a_folder_with_a_run_is_not_written_over_nor_mixed_with_another_run(folder, tmp_path, capsys):
    text = f"--model deit_tiny_patch16_224 {SMALL} {FEW} --lr 1e-3"
    train.run(command(folder, tmp_path, f"{text} --epochs 1 --method tome --r 2"))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(CommandError, match="has a run already: --resume auto goes on, or take another folder"):
        train.run(command(folder, tmp_path, f"{text} --epochs 1"))
    with pytest.raises(CommandError, match="resume: method was tome, but is now evit"):
        train.run(command(folder, tmp_path, f"{text} --epochs 2 --method evit --resume auto"))
    assert (tmp_path / "last.pt").read_bytes() == before


def test_ctrl_c_while_a_file_is_written_is_ctrl_c(folder, tmp_path, monkeypatch):
    """torch.save makes a RuntimeError of it; any other RuntimeError is a line."""

    def fit(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(KeyboardInterrupt, match="there is no checkpoint yet"):
        train.run(command(folder, tmp_path, f"--model deit_tiny_patch16_224 {SMALL} {FEW}"))
    monkeypatch.setattr(train, "fit", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(CommandError, match="inconsistent tensor size"):
        train.run(command(folder, tmp_path, f"--model deit_tiny_patch16_224 {SMALL} {FEW}"))


@pytest.mark.parametrize("within", [False, True], ids=["a file", "under a file"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_done(folder, tmp_path, within, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").write_text("what is there stays")
    output = tmp_path / "file" / "out" if within else tmp_path / "file"
    with pytest.raises(CommandError, match="--output: .* cannot be a folder"):
        train.run(command(folder, output, f"--model deit_tiny_patch16_224 {SMALL} {FEW}"))
    assert (tmp_path / "file").read_text() == "what is there stays"


@pytest.mark.parametrize("package", ("accelerate", "rich", "timm"))
def test_says_what_to_install(monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("tokenops.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"tokenops\[train\]"):
        importlib.import_module("tokenops.training")
