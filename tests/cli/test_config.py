"""`train --config`: a file's options are what flags would be, flags win over them, and what is wrong is said."""

import argparse

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate")

from tokenops.__main__ import main, parser  # noqa: E402
from tokenops.cli import CommandError, config, train  # noqa: E402

RECIPE = """
model: deit_tiny_patch16_224
model-kwargs: [embed_dim=48, num_heads=3, depth=2, patch_size=8]
img_size: 32
method: evit
keep-rate: [1, 0.5]
fuse_token: false
objective: evit
data-dir: somewhere
batch-size: 8
lr: 1e-3
warmup_epochs: 1
mixup: 0.8
aa: rand-m9-mstd0.5-inc1
amp: true
no-aug: false
pretrained: false
clip-grad:
resume: auto
device: cpu
"""
FLAGS = (
    "--model deit_tiny_patch16_224 --model-kwargs embed_dim=48 num_heads=3 depth=2 patch_size=8 --img-size 32"
    " --method evit --keep-rate 1 0.5 --no-fuse-token --objective evit --data-dir somewhere --batch-size 8 --lr 1e-3"
    " --warmup-epochs 1 --mixup 0.8 --aa rand-m9-mstd0.5-inc1 --amp --resume auto --device cpu"
).split()
EXPECTED = """
expected:
  top1: 83.2
  gmacs: 4.0
  dense-top1: not known here
  dense_gmacs: 5.5
  source: Table 2
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a file, and returns its path."""

    def write(text, name="recipe.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def parsed(*arguments):
    """What the command would run with, without --config itself."""
    arguments = train.expanded(["train", *arguments])
    found = vars(parser(arguments).parse_args(arguments))
    found.pop("config")
    return argparse.Namespace(**found)


def test_a_file_is_its_flags(recipe):
    path = recipe(RECIPE)
    assert parsed("--config", path) == parsed(*FLAGS)
    assert parsed(f"--config={path}") == parsed("--conf", path) == parsed(*FLAGS)
    args = parsed("--config", path)
    assert (args.lr, args.batch_size, args.method_keep_rate, args.method_fuse_token) == (1e-3, 8, [1, 0.5], False)
    assert args.clip_grad is None and args.amp is True and args.no_aug is False and args.epochs == 30


def test_flags_win(recipe):
    path = recipe(RECIPE)
    for arguments in (["--lr", "2", "--config", path], ["--config", path, "--lr", "2"]):
        assert parsed(*arguments) == parsed(*FLAGS, "--lr", "2")
    others = "--no-amp --keep-rate 0.7 --fuse-token --data-dir there --model-kwargs depth=3".split()
    args = parsed("--config", path, *others)
    assert args == parsed(*FLAGS, *others) and args.amp is False and args.model_kwargs == ["depth=3"]


def test_without_a_file_nothing_changes():
    assert train.expanded(["train", *FLAGS]) == ["train", *FLAGS] and train.expanded(["train"]) == ["train"]


def test_the_folder_of_the_data_is_needed(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", recipe("lr: 0.1")])
    assert "the following arguments are required: --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("learning-rate: 1", r"'learning-rate' is no option"),
        ("weight_decai: 1", r"'weight_decai' is no option; near it are: weight-decay"),
        ("--lr: 1", r"'--lr' is no option"),
        ("config: other.yaml", r"'config' is no option"),
        ("lr: 1\nmin-lr: 1\nmin_lr: 2", r"'min_lr' is there twice"),
        ("lr: fast", r"lr: 'fast': invalid float value: 'fast'"),
        ("lr: [1, 2]", r"lr: \[1, 2\]: it must be a number or a word$"),
        ("lr: true", r"lr: True: it must be a number or a word$"),
        ("lr: {base: 1}", r"lr: \{'base': 1\}: it must be a number or a word$"),
        ("epochs: 1.5", r"epochs: 1.5: invalid int value: '1.5'"),
        ("amp: 1", r"amp: 1: it must be true or false"),
        ("amp: float16", r"amp: 'float16': it must be true or false"),
        ("objective: slow", r"objective: 'slow': invalid choice: 'slow' \(choose from .*plain.*cait.*\)"),
        ("method: best", r"method: 'best': invalid choice: 'best' \(choose from .*tome.*\)"),
        ("keep-rate: much", r"keep-rate: 'much': invalid number value: 'much'"),
        ("keep-rate: [[1]]", r"keep-rate: \[\[1\]\]: it must be a number or a word, or a list of them"),
        ("keep-rate: []", r"keep-rate: \[\]: expected at least one argument"),
        ("points: [2]", r"points: \[2\]: '2', but it must be a block and a word: 2:vertical"),
        ("- lr", r"must have options, one a line, as in lr: 0.001"),
        ("1: 2", r"must have options, one a line"),
        ("lr: [", r"is no YAML: "),
        ("", r"must have options"),
    ],
)
def test_says_what_is_wrong(recipe, text, what):
    path = recipe(text)
    with pytest.raises(CommandError, match=what) as error:
        parsed("--config", path)
    assert path in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "gone.yaml")]) == 2
    assert f"tokenops train: --config: cannot read {tmp_path / 'gone.yaml'}: No such file" in capsys.readouterr().err
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    assert main(["train", "--config", str(tmp_path / "bytes.yaml")]) == 2
    assert "bytes.yaml is no YAML" in capsys.readouterr().err


def test_what_is_wrong_only_later_names_the_file(recipe, tmp_path, capsys):
    path = recipe(f"epochs: 0\ndata-dir: {tmp_path}")
    assert main(["train", "--config", path]) == 2
    told = capsys.readouterr().err
    assert told == f"tokenops train: --epochs=0, but it must be at least 1 (with the options of --config {path})\n"


def test_expected(recipe, tmp_path):
    found = config.expected(tmp_path / recipe("lr: 1" + EXPECTED))
    assert found == (83.2, 4.0, "not known here", 5.5, "Table 2")
    assert str(found) == "top-1 83.2 %, GMACs 4.0; dense: top-1 not known here, GMACs 5.5 (Table 2)"
    assert config.expected(tmp_path / recipe("lr: 1")) is None


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("  source: Table 2\n", "", "must have top1, gmacs, dense_top1, dense_gmacs, source, and nothing else"),
        ("source", "table", "must have top1, gmacs, dense_top1, dense_gmacs, source, and nothing else"),
        ("83.2", "good", "top1: 'good', but must be a number or 'not known here'"),
        ("4.0", "true", "gmacs: True, but must be a number or 'not known here'"),
        ("Table 2", "2", "source: 2, but it must say where they stand"),
    ],
)
def test_expected_is_checked(recipe, old, new, what, tmp_path, capsys):
    path = recipe(f"data-dir: {tmp_path}" + EXPECTED.replace(old, new))
    assert main(["train", "--config", path]) == 2
    told = capsys.readouterr().err
    assert what in told and path in told


def test_trains(recipe, tmp_path, capsys):
    noise = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / ("val" if i < 4 else "train") / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    path = recipe(RECIPE.replace("somewhere", str(tmp_path)) + EXPECTED)
    flags = ["--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0"]
    assert main(["train", "--config", path, "--output", str(tmp_path / "out"), *flags]) == 0
    out, err = capsys.readouterr()
    told = " ".join(out.split())
    assert "best top-1 " in told and (tmp_path / "out" / "model.pt").is_file()
    assert told.endswith("paper: top-1 83.2 %, GMACs 4.0; dense: top-1 not known here, GMACs 5.5 (Table 2)")
    assert "epoch 1/1: lr 1e-05, " in " ".join(err.split())  # the rate has fallen to min-lr


def test_the_learning_rate_of_all_processes():
    def rate(*flags):
        return train.learning_rate(parsed("--data-dir", ".", *flags), together=1024)

    assert rate() == 5e-4
    assert rate("--lr", "0.1", "--lr-base", "0.2") == 0.1
    assert rate("--lr-base", "5e-4", "--lr-base-size", "512") == pytest.approx(1e-3)
    assert rate("--lr-base", "5e-4", "--grad-accum-steps", "2") == pytest.approx(4e-3)
