"""The command fidelity in this process: its figures against those of the models themselves, files, errors in words."""

import csv
import json
import sys

import pytest
import torch
from PIL import Image

import tokenops
from support.commands import MODEL, QUICK, SMALL, parsed, run, timm
from tokenops.cli import CommandError, models, running
from tokenops.measuring.timing import Spread
from tokenops.patching.fidelity import Fidelity

pytest.importorskip("accelerate")

from tokenops.cli import fidelity  # noqa: E402
from tokenops.training import UnlabelledImages  # noqa: E402


def flat(text):
    """Without the breaks of lines."""
    return " ".join(text.split())


def rows_of(text, title):
    """The cells of the table with this in its title, without that."""
    lines = text.split("\n\n")
    table = next(part for part in lines if title in part.splitlines()[0])
    return [line.split("  ") for line in map(str.strip, table.splitlines()[1:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight images in two folders, one that is none, and one beside them."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        pixels = 255 * torch.nn.functional.interpolate(coarse, (80, 80), mode="bilinear")[0].permute(1, 2, 0)
        Image.fromarray(pixels.byte().numpy()).save(path)
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / "b" / "bad.png").write_bytes(b"no image either")
    return folder


def lively(**kwargs):
    """A model of random weights whose tokens differ, so that merging some matters."""
    torch.manual_seed(3)
    model = timm.create_model(MODEL, img_size=64, num_classes=7, **kwargs).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
        model.head.weight.mul_(50)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lively.pt"
    torch.save(lively().state_dict(), path)
    return path


def call(*arguments):
    run(fidelity, *arguments, *SMALL, *QUICK, "-j", 0, "-b", 3)


def by_hand(folder, method, **options):
    """What `tokenops.fidelity` says of the images that can be read, prepared by timm."""
    dense, _ = models.make(parsed(fidelity, *SMALL, "--num-classes", 7))
    dense.load_state_dict(lively().state_dict())
    reduced = tokenops.apply_patch(lively(), method, **options)
    paths = sorted(path for path in folder.rglob("*.png") if path.name != "bad.png")
    x = models.prepared(dense, [models.open_image(path) for path in paths])
    return tokenops.fidelity(dense, reduced, [x])


def test_a_level_a_row(folder, checkpoint, tmp_path, capsys):
    flags = ["--num-classes", 7, "--checkpoint", checkpoint, "--method", "tome", "--levels", 0, 3, 5]
    call(folder, *flags, "--output", tmp_path / "f.json", "--plot", tmp_path / "f.png")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "f.json").read_text())
    assert (found["images"], found["unreadable"], found["method"], found["model"]) == (8, 1, "tome", MODEL)
    assert found["data"] == str(folder) and found["weights"] == str(checkpoint)
    assert [row["level"] for row in found["rows"]] == ["r=0", "r=3", "r=5"]
    expected = [by_hand(folder, "tome", r=r) for r in (0, 3, 5)]
    for row, wanted in zip(found["rows"], expected):
        for name in ("top1", "cosine", "neighbours"):
            assert row[name] == pytest.approx(getattr(wanted, name), abs=1e-6), (row["level"], name)
        assert row["difference"] is None and row["relative"] is None
        assert row["part"] == pytest.approx(row["gmacs"] / found["dense_gmacs"])
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["images_per_second_low"] <= row["images_per_second"] <= row["images_per_second_high"]
    nothing, some, many = found["rows"]
    assert nothing["top1"] == 1 and nothing["cosine"] == pytest.approx(1) and nothing["part"] == 1
    assert 1 > some["part"] > many["part"] and 1 > some["cosine"] > many["cosine"]
    assert any(row.top1 < 1 for row in expected), "the images tell levels apart"
    assert "tome: 8 images of" in flat(out) and "1 could not be read: " in flat(out) and "bad.png" in flat(out)
    kept = rows_of(out, "cosine")
    assert [[cell for cell in row if cell][0] for row in kept] == ["0", "3", "5"]
    for cells, wanted in zip(kept, expected):
        shown = [float(cell) for cell in cells[1:] if cell][1:]
        assert shown == pytest.approx([wanted.top1, wanted.cosine, wanted.neighbours], abs=1e-4)
    assert rows_of(out, "GMACs")[0][0] == "dense" and "native (masked_channel_attention, merge_bipartite" in out
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    tables = out.split("Medians of")[0].split("could be read")[-1]
    assert max(map(len, tables.splitlines())) <= 80


def test_speed_is_of_the_same_rounds(folder, tmp_path, monkeypatch):
    """Every second round is slow for all: the ratio is steady."""
    times = {"dense": [2.0, 20.0], "keep_rate=1": [2.0, 20.0], "keep_rate=0.5": [1.0, 10.0]}
    monkeypatch.setattr(running, "timed", lambda *args, **kwargs: running.Times(times, set()))
    call(folder, "--method", "evit", "--levels", 1, 0.5, "--output", tmp_path / "f.csv")
    whole, half = csv.DictReader((tmp_path / "f.csv").open())
    assert [float(half[name]) for name in ("speedup", "speedup_low", "speedup_high")] == [2, 2, 2]
    assert float(whole["speedup"]) == 1 and whole["weights"] == ""
    assert float(half["dense_images_per_second"]) == pytest.approx((3 / 2 + 3 / 20) / 2)
    assert float(half["images_per_second"]) == pytest.approx((3 / 1 + 3 / 10) / 2)
    assert (half["difference"], half["relative"]) == ("", ""), "there are none, which is not 0"
    assert float(whole["top1"]) == 1 and 0 < float(half["cosine"]) < 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("tome", ["r=1", "r=2", "r=3", "r=4", "r=5"]),  # 16 patches, 4 blocks
        ("tome --img-size 32", ["r=1", "r=2"]),  # 4 patches
        ("tome --img-size 128", ["r=3", "r=6", "r=10", "r=13", "r=16"]),  # 64 patches
        ("tome --r 3", ["tome"]),
        ("tome --levels 2 5 2", ["r=2", "r=5"]),
        ("evit", [f"keep_rate={rate}" for rate in (0.9, 0.8, 0.7, 0.6, 0.5)]),
        ("evit --keep-rate 0.7", ["evit"]),
        ("evit --levels 1 0.5 --reduction-loc 2", ["keep_rate=1", "keep_rate=0.5"]),
        ("random", [f"keep_rate={rate}" for rate in (0.9, 0.8, 0.7, 0.6, 0.5)]),
        ("random --r 2", ["random"]),
        ("evo_vit", [f"prune_ratio={ratio}" for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)]),
        ("sit", [f"keeping_ratio={ratio}" for ratio in (0.9, 0.8, 0.7, 0.6, 0.5)]),
        ("cait", ["cait"]),
        ("dps --counts 17 17 9 9", ["dps"]),
        ("patch_slimming --counts 17 17 9 1", ["patch_slimming"]),
    ],
)
def test_levels_of_every_method(flags, expected):
    args = parsed(fidelity, *SMALL, "--method", *flags.split())
    found = fidelity.levels(args)
    assert [fidelity.label(setting, args) for setting in found] == expected
    for setting in (found[0], found[-1]):
        models.make(setting)  # the model allows them


def test_two_photographs_have_no_neighbours(tmp_path, capsys):
    call("--method", "cait", "--output", tmp_path / "f.csv", "--plot", tmp_path / "f.svg")
    out = capsys.readouterr().out
    assert "2 images of two photographs of scikit-learn's" in flat(out)
    assert "neighbours: 2 images, of at least 3 that it needs" in out
    assert "weights: random, so that what is kept says nothing of a trained model" in flat(out)
    assert "The cheapest" not in out and "No cheaper" not in out
    (row,) = csv.DictReader((tmp_path / "f.csv").open())
    assert row["neighbours"] == "" and float(row["cosine"]) < 1 and row["images"] == "2"
    text = (tmp_path / "f.svg").read_text()
    assert "cosine" in text and "neighbours" not in text, "a line has a value of every level"


def test_so_many_images_spread_evenly_by_a_seed(folder, tmp_path):
    found = [fidelity.spread(100, 4, seed) for seed in range(50)]
    for numbers in found:
        assert [b - a for a, b in zip(numbers, numbers[1:])] == [25, 25, 25] and 0 <= numbers[0] < 25
    assert len({numbers[0] for numbers in found}) > 10 and found[7] == fidelity.spread(100, 4, 7)
    assert fidelity.spread(10, 4, 0) == sorted(set(fidelity.spread(10, 4, 0)))
    assert fidelity.spread(3, None, 0) == fidelity.spread(3, 3, 0) == fidelity.spread(3, 9, 0) == [0, 1, 2]
    call(folder / "a", "--num-images", 3, "--method", "cait", "--output", tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["images"] == 3


def test_a_split_of_folders_as_eval_has_it(folder, tmp_path, capsys):
    (tmp_path / "val").symlink_to(folder)
    call("--data-dir", tmp_path, "--method", "cait", "--output", tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["images"] == 8
    assert f"8 images of {tmp_path}, val" in flat(capsys.readouterr().out)


def test_what_was_not_trained_is_said(folder, checkpoint, tmp_path, capsys):
    flags = ["--num-classes", 7, "--method", "sit", "--keeping-ratio", 0.6]
    call(folder, *flags, "--checkpoint", checkpoint)
    assert f"weights: {checkpoint}, what sit adds to it untrained; 1 could not" in flat(capsys.readouterr().out)
    made, _ = models.make(parsed(fidelity, *SMALL, *flags))
    torch.save(made.state_dict(), tmp_path / "sit.pt")
    call(folder, *flags, "--checkpoint", tmp_path / "sit.pt")
    out = flat(capsys.readouterr().out)
    assert f"weights: {tmp_path / 'sit.pt'}; " in out and "untrained" not in out


@pytest.mark.parametrize("model", ["evit_deit_tiny_patch16_224", "sit_deit_tiny"])
def test_a_model_by_name_is_compared_with_itself_without_its_method(model, folder, tmp_path):
    flags = ["--device", "cpu", *QUICK, "-j", 0, "-b", 1]
    run(fidelity, folder / "a", "--model", model, "--num-images", 2, *flags, "--output", tmp_path / "f.json")
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["level"] == "none" and 0.4 < row["part"] < 0.9
    assert row["cosine"] > 0.3, "other weights would give about 0"


def test_a_folder_of_transformers(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)
    config = transformers.ViTConfig(image_size=64, patch_size=16, num_labels=7, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    flags = ["--model", tmp_path / "vit", "--device", "cpu", *QUICK, "-j", 0, "-b", 2]
    run(fidelity, folder, *flags, "--method", "tome", "--levels", 0, 4, "--output", tmp_path / "f.json")
    nothing, some = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert nothing["top1"] == 1 and some["cosine"] < nothing["cosine"] == pytest.approx(1)
    assert "of the images: r=" in flat(capsys.readouterr().out)


def test_a_model_of_tokens_has_differences(folder, tmp_path, capsys):
    kwargs = dict(img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=0, global_pool="")
    model = timm.create_model("vit_tiny_patch16_224", **kwargs)
    timm.models.save_for_hf(model, tmp_path / "tokens", model_args=kwargs)
    flags = ["--model", tmp_path / "tokens", "--device", "cpu", *QUICK, "-j", 0, "-b", 2]
    run(fidelity, folder, *flags, "--method", "tome", "--levels", 0, 4, "--output", tmp_path / "f.json")
    nothing, some = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert nothing["top1"] is None and some["top1"] is None
    assert nothing["difference"] < 1e-5 < 1e-3 < some["difference"] and 0 < some["relative"] < 2
    shown = [cell.strip() for cell in rows_of(capsys.readouterr().out, "cosine")[1] if cell.strip()]
    assert len(shown) == 6, "level, speed-up, no top-1, cosine, neighbours, and two differences"


def row(name, macs, top1, cosine=0.5, images=200, speedup=(2.0, 1.9, 2.1)):
    spread = Spread(*speedup)
    return fidelity.Row(name, macs, Fidelity(images, top1, cosine, 0.9, None, None), spread, spread)


def test_the_last_lines_say_what_the_numbers_carry():
    rows = [row("r=1", 90, 1.0), row("r=2", 80, 0.99), row("r=3", 70, 0.96), row("r=4", 60, 0.8)]
    assert list(fidelity.closing(rows, 100, "trained.pt")) == [
        "The cheapest with the same class for at least 99% of the images: r=2, at 0.80 of the multiply-adds and 2.00x"
        " the speed.",
        "The cheapest with the same class for at least 95% of the images: r=3, at 0.70 of the multiply-adds and 2.00x"
        " the speed.",
    ]
    assert list(fidelity.closing(rows, 100, "")) == [], "random weights say nothing"
    slow = [row("r=0", 100, 1.0), row("r=1", 90, 0.97, speedup=(1.1, 0.9, 1.2))]
    assert list(fidelity.closing(slow, 100, "trained.pt")) == [
        "No cheaper level has the same class for at least 99% of the images.",
        "The cheapest with the same class for at least 95% of the images: r=1, at 0.90 of the multiply-adds and 1.10x"
        " the speed, which is not faster for certain.",
    ]
    few = [row("r=1", 90, 0.9, images=20)]
    assert list(fidelity.closing(few, 100, "trained.pt")) == [
        "No cheaper level has the same class for at least 99% of the images.",
        "No cheaper level has the same class for at least 95% of the images.",
        "One image of 20 is 5.0%: show more of them before you rely on it.",
    ]
    for weights, top1 in (("a folder" + models.HEADLESS, 1.0), ("trained.pt", None)):
        by_cosine = [row("r=1", 90, top1, cosine=0.97), row("r=2", 80, top1, cosine=0.9)]
        assert list(fidelity.closing(by_cosine, 100, weights)) == [
            "No cheaper level has a mean cosine of at least 0.99.",
            "The cheapest with a mean cosine of at least 0.95: r=1, at 0.90 of the multiply-adds and 2.00x the speed.",
        ]


def test_images_without_labels(folder):
    bad, good = folder / "b" / "bad.png", folder / "a" / "0.png"
    photograph = Image.new("RGB", (4, 4), (9, 0, 0))
    images = UnlabelledImages([good, folder / "b", photograph], lambda image: image.size)
    assert [images.name(i) for i in (0, 1, 5, 6)] == [
        str(good),
        str(folder / "b" / "1.png"),
        str(bad),
        "image 6",
    ]
    assert [images[i] for i in (0, 5, 6)] == [((80, 80), 0), None, ((4, 4), 0)] and images.skipped() == [str(bad)]


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "--method none, and small_vit_for_commands reduces nothing: choose a --method, cait, evit"),
        ("--method dps", "--method dps needs --counts"),
        ("--method cait --levels 3", "--levels goes with --method evit, evo_vit, sit, tome, random, not with cait"),
        ("--levels 3 --model evit_deit_tiny_patch16_224", "--levels goes with --method evit, evo_vit, sit, tome"),
        ("--method tome --r 2 --levels 3", "--levels sets --r: give one of them"),
        ("--method evit --levels 0.5 2", "--method evit: keep_rate=2, but it must be above 0"),
        ("--method random --r 2 --levels 0.5", "--method random: r=2 merges in every block"),
        ("--method evit --r 2", "--r belongs to --method tome or random, not to evit"),
        ("--method tome --model vit_tinny", "--model: timm knows no model 'vit_tinny'; near it are: vit_tiny"),
        ("--method tome --model resnet18", "--method tome: "),
        ("--method cait -b 0", "--batch-size=0, but it must be at least 1"),
        ("--method cait -j -1", "--workers=-1, but it must be at least 0"),
        ("--method cait --num-images 0", "--num-images=0, but it must be at least 1"),
        ("--method cait --repeats 0", "--repeats=0, but it must be at least 1"),
        ("--method cait --seed -1", "--seed=-1, but it must be at least 0"),
        ("--method cait --output a.txt", "--output a.txt: the name must end in .csv or .json"),
        ("--method cait --plot a.txt", "--plot a.txt: the name must end in .png, .pdf, .svg or .jpg"),
        (f"--method cait --plot {__file__}/a.png", "--plot: cannot write"),
        ("--method cait --device tpu", "--device tpu, but it must be cpu, cuda"),
        ("--method cait --checkpoint no.pt", "--checkpoint: there is no file no.pt"),
        ("nowhere.jpg --method cait", "there is no file or folder nowhere.jpg"),
        ("empty --method cait", "empty has no image: files must end in .bmp"),
        ("bad.png --method cait -j 0", "batches has no image: 1 could not be read: bad.png"),
        ("bad.png --data-dir empty --method cait", "--data-dir empty and bad.png: give one of them"),
        ("--data-dir nowhere --method cait", "--data-dir nowhere, --split val: there is no folder nowhere"),
        ("--data-dir empty --method cait", "--data-dir empty, --split val: empty has no folder val"),
        ("--model evo_levit_128s", "--model evo_levit_128s: there is no unreduced model of the same weights"),
    ],
)
def test_errors_in_words(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    small = ["--device", "cpu"] if "--model" in arguments else SMALL
    with pytest.raises(CommandError) as error:
        run(fidelity, *small, *arguments.split())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_compacted_model_has_no_unreduced_form(tmp_path):
    from tokenops.methods.cait.structure import Structure

    plain = timm.create_model(MODEL, img_size=64)
    content = {"model": plain.state_dict(), "structure": Structure.of(plain).to_json()}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CommandError, match=r"--checkpoint .*model\.pt: there is no unreduced model"):
        call("--method", "cait", "--checkpoint", tmp_path / "model.pt")


def test_what_fails_while_comparing_is_one_line(folder, monkeypatch):
    def full(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fidelity, "fidelities", full)
    with pytest.raises(CommandError, match="^out of memory$"):
        call(folder, "--method", "cait")


def test_what_is_not_finite_is_one_line_with_its_level(folder, tmp_path, monkeypatch):
    make = models.make

    def broken(args):
        model, weights = make(args)
        if fidelity.given(args)["r"] == [5]:
            with torch.no_grad():
                model.head.bias.fill_(float("nan"))
        return model, weights

    monkeypatch.setattr(models, "make", broken)
    with pytest.raises(CommandError) as error:
        call(folder, "--method", "tome", "--levels", 3, 5, "--output", tmp_path / "f.json")
    assert str(error.value) == "fidelity: outputs or embeddings are not finite of r=5 for 8 of 8 images"
    assert not (tmp_path / "f.json").exists()


def test_missing_packages_are_named(folder, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(CommandError, match="give an IMAGE or a folder, or install what is missing: .*sklearn"):
            call("--method", "cait")
    import tokenops.cli

    monkeypatch.delattr(tokenops.cli, "picture", raising=False)
    monkeypatch.setitem(sys.modules, "tokenops.cli.picture", None)
    with pytest.raises(CommandError, match=r"--plot needs more packages .*: pip install 'tokenops\[plot\]'"):
        call(folder, "--method", "cait", "--plot", "f.png")


def test_a_method_of_ones_own_needs_its_levels(folder):
    from tokenops.patching.engine import METHODS, Method, Role

    class Toy(Method):
        """Nothing.

        Args:
            strength: how much of nothing.
        """

        name = "toy"

        def __init__(self, strength: float = 1.0):
            self.strength = strength

        def roles(self, site):
            return [Role(site.prefix, False)] * site.depth

    try:
        args = parsed(fidelity, *SMALL, "--method", "toy")
        assert [fidelity.label(setting, args) for setting in fidelity.levels(args)] == ["toy"]
        args = parsed(fidelity, *SMALL, "--method", "toy", "--levels", 1, 2)
        assert [fidelity.label(setting, args) for setting in fidelity.levels(args)] == ["strength=1", "strength=2"]
    finally:
        del METHODS["toy"]
