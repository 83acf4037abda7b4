"""The commands eval, bench and slim in this process: printed figures against counts of their own, files, errors."""

import csv
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tokenops
from support.commands import DEPTH, DIM, MODEL, QUICK, SMALL, evaluate, parsed, run, timm
from tokenops.cli import CommandError, bench, count_of, make_folder, models, paragraph, running, slim
from tokenops.measuring.timing import ratio
from tokenops.methods.patch_slimming import Schedule


def macs(before, after, classes=1000):
    """Multiply-adds of the model at 64 pixels: tokens that go into each block's attention, and into its MLP."""
    total = 16 * 3 * 16 * 16 * DIM + classes * DIM
    for n, m in zip(before, after, strict=True):
        total += n * 4 * DIM * DIM + 2 * n * n * DIM + m * 8 * DIM * DIM
    return total


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", line)]


def flat(text):
    """Without the breaks of lines."""
    return " ".join(text.split())


def row_of(text, start):
    return next(line for line in text.splitlines() if line.strip().startswith(start))


# ---- bench


def test_bench_counts_and_saves(tmp_path, capsys):
    output = tmp_path / "made" / "bench.json"
    run(bench, *SMALL, "--method", "tome", "--r", 4, "-b", 1, 3, *QUICK, "--output", output)
    out = capsys.readouterr().out
    reduced = macs([17, 13, 9, 5], [13, 9, 5, 3])  # at most half of the patch tokens are merged
    dense = macs([17] * DEPTH, [17] * DEPTH)
    found = json.loads(output.read_text())
    assert found["dense_gmacs"] == pytest.approx(dense / 1e9)
    assert found["gmacs"] == pytest.approx(reduced / 1e9, rel=0.02)
    assert (found["model"], found["method"], found["dtype"]) == (MODEL, "tome r=4", "float32")
    assert found["torch"] == torch.__version__ and found["against"] == "the dense model"
    assert [row["batch_size"] for row in found["rows"]] == [1, 3]
    flops = found["dense_gmacs"] / found["gmacs"]
    for row in found["rows"]:
        assert row["flop_ratio"] == pytest.approx(flops)
        assert row["realised"] == pytest.approx(row["speedup"] / flops)
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["images_per_second_low"] <= row["images_per_second"] <= row["images_per_second_high"]
    first, second = flat(out), row_of(out, "GMACs an image")
    assert first.startswith(f"{MODEL} with tome r=4: ") and "as fast as the dense model at batches of 1, 3" in first
    assert f"{flops:.2f}x fewer FLOPs" in first
    assert numbers(second) == pytest.approx([dense / 1e9, reduced / 1e9], rel=0.01)
    assert row_of(out, "3 ").split()[0] == "3" and "native (masked_channel_attention, merge_bipartite" in out
    assert max(map(len, out.split("Results:")[0].splitlines())) <= 80


def test_bench_takes_ratios_of_the_same_rounds(tmp_path, monkeypatch):
    """Every second call is slow where the other is too: the ratio is steady."""
    times = {"dense": [2.0, 20.0], "reduced": [1.0, 10.0]}
    monkeypatch.setattr(running, "timed", lambda *args, **kwargs: running.Times(times, set()))
    run(bench, *SMALL, "--method", "cait", "-b", 4, "--output", tmp_path / "bench.csv")
    (row,) = csv.DictReader((tmp_path / "bench.csv").open())
    assert [float(row[name]) for name in ("speedup", "speedup_low", "speedup_high")] == [2, 2, 2]
    assert float(row["dense_images_per_second"]) == pytest.approx((4 / 2 + 4 / 20) / 2)
    assert float(row["images_per_second"]) == pytest.approx((4 / 1 + 4 / 10) / 2)
    assert row["method"] == "cait" and row["batch_size"] == "4" and float(row["realised"]) < 2


def test_bench_compares_our_models_with_their_dense_form(capsys):
    run(bench, "--model", "sit_deit_tiny", "--device", "cpu", "-b", 1, *QUICK)
    out = capsys.readouterr().out
    assert "as fast as deit_tiny_patch16_224 at batches of 1, with 2.11x" in flat(out)
    assert out.startswith("sit_deit_tiny: ") and "soft_aggregate" in row_of(out, "Backends: native")


def test_bench_tells_what_did_not_fit(monkeypatch, capsys):
    def clock(device):
        return lambda call: seconds_of(call().shape[0])

    def seconds_of(images):
        if images > 1:
            raise RuntimeError("out of memory")
        return 1.0

    monkeypatch.setattr(running, "clock", clock)
    run(bench, *SMALL, "--method", "cait", "-b", 1, 2, *QUICK)
    assert "Stopped at --batch-size 2: out of memory" in capsys.readouterr().out
    with pytest.raises(CommandError, match="--batch-size 2: out of memory"):
        run(bench, *SMALL, "--method", "cait", "-b", 2, *QUICK)


def test_bench_compiles_both(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    run(bench, *SMALL, "--method", "cait", "-b", 1, *QUICK, "--compile")
    assert [hasattr(model, "tokenops_patch") for model in compiled] == [False, True]
    assert ", compiled" in flat(capsys.readouterr().out)


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--amp", "--channels-last"]])
def test_bench_in_bf16(flags, capsys):
    run(bench, *SMALL, "--method", "evit", "--keep-rate", 0.5, "-b", 1, "--repeats", 1, *flags)
    assert "bfloat16" in flat(capsys.readouterr().out)


# ---- slim


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i, size in enumerate([(90, 70), (64, 100), (80, 80), (70, 70)]):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator).numpy()
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_slim_prints_draws_and_saves(photographs, tmp_path, capsys):
    output, weights = tmp_path / "made" / "slim.png", tmp_path / "slim.pth"
    arguments = ["--method", "evit", "--keep-rate", 0.5, "--reduction-loc", 1, 2, "--no-fuse-token", "-b", 2]
    run(slim, *photographs[:2], *SMALL, *arguments, *QUICK, "--output", output, "--save", weights)
    out = capsys.readouterr().out
    first, *lines = out.splitlines()
    assert flat(out).startswith(f"{MODEL} with evit keep_rate=0.5 reduction_loc=1,2 fuse_token=False: ")
    assert "tokens that enter each block: 17 x 4; slim 17 x 2, 9 x 1, 5 x 1" in lines
    assert max(map(len, lines)) <= 80 or len(str(tmp_path)) > 50, "paths alone are longer"
    dense, reduced = macs([17] * DEPTH, [17] * DEPTH), macs([17, 17, 9, 5], [17, 9, 5, 5])
    line = numbers(row_of(out, "GMACs an image"))
    assert line == pytest.approx([dense / 1e9, reduced / 1e9, dense / reduced], rel=0.01)
    parameters = sum(p.numel() for p in timm.create_model(MODEL, img_size=64).parameters())
    assert numbers(row_of(out, "parameters"))[:2] == [round(parameters / 1e6, 2)] * 2
    assert "weights: random" in out and "top 5" not in out and f"Weights: {weights}" in out
    with Image.open(output) as picture:  # the image and two steps, for each of two photographs
        assert picture.size == (8 + 3 * (64 + 8), 2 * (8 + 64 + 22 + 8))
    timm.create_model(MODEL, img_size=64).load_state_dict(torch.load(weights, weights_only=True))


def test_slim_says_what_it_measured_before_it_draws(photographs, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise CommandError("the disk is full")

    monkeypatch.setattr(slim.picture, "draw_tokens", full)
    with pytest.raises(CommandError, match="the disk is full"):
        run(slim, photographs[0], *SMALL, *QUICK, "-b", 1, "--output", tmp_path / "slim.png")
    out = capsys.readouterr().out
    assert "ms an image" in out and "Picture: " not in out


def test_files_that_cannot_be_written_are_found_before(tmp_path):
    kept = tmp_path / "kept.csv"
    kept.write_text("a")
    for path in (kept, tmp_path / "new" / "a.csv"):
        make_folder(path)
    assert kept.read_text() == "a" and list((tmp_path / "new").iterdir()) == []
    with pytest.raises(CommandError, match="--save: cannot write .*: File name too long"):
        make_folder(tmp_path / ("a" * 300), "--save")
    with pytest.raises(CommandError, match="cannot write .*: Is a directory"):
        make_folder(tmp_path)


def test_numbers_of_things_and_lines_read_well(monkeypatch):
    assert [count_of(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert running.running(parsed(bench, *SMALL)).where().endswith(", 1 thread")
    for room in range(40):
        text = paragraph("a" * (80 - room) + " " + running.stages([197, 197, 99, 99]))
        assert "197 x 2" in text and "99 x 2" in text and max(map(len, text.splitlines())) <= 80


def test_slim_lists_tokens_that_all_differ():
    assert running.stages([197, 181, 165]) == "197, 181, 165"
    assert running.stages([197, 99, 99]) == "197 x 1, 99 x 2"


def test_slim_searches_a_schedule(photographs, tmp_path, capsys):
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    for i, path in enumerate(photographs):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    weights = tmp_path / "slim.pth"
    arguments = ["--method", "patch_slimming", "--data-dir", tmp_path / "data", "--epochs", 1, "--granularity", 6]
    arguments += ["--tolerance", 0.5, "-b", 1, *QUICK, "--output", tmp_path / "slim.png", "--save", weights]
    run(slim, photographs[0], *SMALL, *arguments)
    out = capsys.readouterr().out
    assert "1 image left out: " in out and "bad.png" in out
    schedule = Schedule.load(tmp_path / "slim.json")
    counts = list(schedule.counts)
    assert schedule.grid == (4, 4) and counts[-1] == 1 and counts[0] == max(counts)
    entering = [17, *counts[:-1]]
    assert f"; slim {running.stages(entering)}" in flat(out)
    # weights were tuned, and eval and bench run on with both files
    state, start = torch.load(weights, weights_only=True), dense_state()
    assert state.keys() == start.keys() and any((state[name] != start[name]).any() for name in state)
    arguments = [*SMALL, "--method", "patch_slimming", "--schedule", tmp_path / "slim.json", "--checkpoint", weights]
    made, source = models.make(parsed(bench, *arguments))
    assert source == str(weights) and made.tokenops_patch.method.name == "patch_slimming"
    torch.testing.assert_close(made.state_dict(), state, rtol=0, atol=0)


def dense_state():
    torch.manual_seed(0)
    return timm.create_model(MODEL, img_size=64).state_dict()


def test_slim_with_weights_guesses(photographs, tmp_path, capsys):
    torch.save({"model": dense_state()}, tmp_path / "dense.pth")
    arguments = ["--method", "cait", "--points", "1:vertical", "2:horizontal", "--checkpoint", tmp_path / "dense.pth"]
    run(slim, photographs[0], *SMALL, *arguments, "-b", 3, *QUICK, "--output", tmp_path / "slim.png")
    out = capsys.readouterr().out
    assert "cait points=1:vertical,2:horizontal" in flat(out) and "17 x 2, 9 x 1, 5 x 1" in out
    assert "top 5 of the dense model" in out and "top 5 of the slim model" in out and "random" not in out


# ---- eval


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven classes, of which the split lacks one, a hidden folder among them, and a file that is no image."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("data")
    (folder / "train" / ".cache").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for label in range(7):
        (folder / "train" / f"class {label}").mkdir(parents=True)
        for i in range(2 if label != 1 else 0):
            path = folder / "val" / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.randint(0, 256, (70, 64, 3), dtype=torch.uint8, generator=generator).numpy()).save(
                path
            )
    (folder / "val" / "class 4" / "1.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    model = timm.create_model(MODEL, img_size=64, num_classes=7)
    torch.nn.init.normal_(model.head.weight)  # guesses that differ
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(model.state_dict(), path)
    return path


def by_hand(data, checkpoint, method=None, **options):
    """top-1, top-5 and loss of 11 readable images, one at a time."""
    model = timm.create_model(MODEL, img_size=64, num_classes=7)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    if method:
        tokenops.apply_patch(model, method, **options)
    model.eval()
    config = timm.data.resolve_data_config({"img_size": 64}, model=model)
    transform = timm.data.create_transform(**config)
    first, five, loss, images = 0, 0, 0.0, 0
    for path in sorted((data / "val").rglob("*.png")):
        if path.read_bytes() == b"no image":
            continue
        label = int(path.parent.name.split()[1])
        with torch.no_grad(), Image.open(path) as image:
            logits = model(transform(image.convert("RGB"))[None])[0]
        best = logits.topk(5).indices.tolist()
        first, five, images = first + (label == best[0]), five + (label in best), images + 1
        loss += F.cross_entropy(logits, torch.tensor(label)).item()
    assert images == 11
    return 100 * first / images, 100 * five / images, loss / images


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "SECONDS", 0.01)


def evaluation(data, checkpoint, *arguments):
    flags = ["--num-classes", 7, "--data-dir", data, "--checkpoint", checkpoint, "-b", 4, "-j", 0]
    run(evaluate, *SMALL, *flags, *arguments)


@pytest.mark.parametrize(("arguments", "method"), [([], {}), (["--method", "evit"], {"method": "evit"})])
def test_eval_scores_every_readable_image(data, checkpoint, arguments, method, tmp_path, quick, capsys):
    evaluation(data, checkpoint, *arguments, "--output", tmp_path / "eval.json")
    out = capsys.readouterr().out
    top1, top5, loss = by_hand(data, checkpoint, **method)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert (found["images"], found["unreadable"], found["split"]) == (11, 1, "val")
    (row,) = found["rows"]
    assert row["top1"] == pytest.approx(top1) and row["top5"] == pytest.approx(top5)
    assert row["loss"] == pytest.approx(loss, rel=1e-4) and top1 < top5
    assert out.splitlines()[0].endswith(f"top-1 {top1:.2f} % of 11 images")
    assert "1 could not be read: class 4/1.png" in flat(out) and f"weights: {checkpoint}" in flat(out)
    assert row["gmacs"] < 0.9 * macs([17] * DEPTH, [17] * DEPTH, 7) / 1e9 or not method


def test_eval_sweeps(data, checkpoint, tmp_path, quick, capsys):
    evaluation(data, checkpoint, "--method", "tome", "--sweep", 0, 3, "--output", tmp_path / "eval.csv")
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "eval.csv").open()))
    assert [row["method"] for row in rows] == ["tome r=0", "tome r=3"]
    for row, r in zip(rows, (0, 3)):
        top1, top5, loss = by_hand(data, checkpoint, "tome", r=r)
        assert [float(row[name]) for name in ("top1", "top5")] == pytest.approx([top1, top5])
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
        line = numbers(row_of(out, f"tome r={r}").split("=")[1])
        assert line[1] == pytest.approx(top1, abs=0.01) and line[3] == pytest.approx(loss, abs=1e-3)
    assert float(rows[0]["gmacs"]) == pytest.approx(macs([17] * DEPTH, [17] * DEPTH, 7) / 1e9)
    assert float(rows[1]["gmacs"]) < float(rows[0]["gmacs"]) and math.isclose(float(rows[0]["images"]), 11)


def test_eval_checks_every_setting_before_the_first_is_evaluated(data, checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("one was evaluated"))
    with pytest.raises(CommandError, match="--method evit: keep_rate=2"):
        evaluation(data, checkpoint, "--method", "evit", "--sweep", 0.5, 2)


def test_eval_of_what_datasets_saved(data, checkpoint, tmp_path, quick, capsys):
    datasets = pytest.importorskip("datasets")
    paths = [data / "val" / f"class {label}" / "0.png" for label in (2, 0)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(7)])}
    )
    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "label": [2, 0]}, features=features)
    datasets.DatasetDict({"validation": table}).save_to_disk(tmp_path / "saved")
    evaluation(tmp_path / "saved", checkpoint)
    assert "of 2 images" in capsys.readouterr().out.splitlines()[0]


def test_eval_says_what_is_wrong_with_the_data(data, checkpoint, tmp_path):
    few = r"has 7 classes \(class 0, class 1, .*\), but the model 6, .*: --num-classes 7 with a --checkpoint"
    with pytest.raises(CommandError, match=few):
        run(evaluate, *SMALL, "--num-classes", 6, "--data-dir", data)
    with pytest.raises(CommandError, match="has 7 classes .*, but the model 1000, so that its answers say nothing"):
        run(evaluate, *SMALL, "--data-dir", data)
    with pytest.raises(CommandError, match="does not hold weights of small_vit_for_commands"):
        run(evaluate, *SMALL, "--num-classes", 6, "--data-dir", data, "--checkpoint", checkpoint)
    sizes = dict(img_size=64, depth=3, num_classes=5)
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), tmp_path / "five", model_args=sizes)
    with pytest.raises(CommandError, match="five, its head random, so that its answers say nothing"):
        run(evaluate, "--model", tmp_path / "five", "--num-classes", 7, "--data-dir", data)
    with pytest.raises(CommandError, match="--split nothing: .* has no folder nothing"):
        evaluation(data, checkpoint, "--split", "nothing")
    (tmp_path / "val" / "only").mkdir(parents=True)
    (tmp_path / "val" / "only" / "bad.png").write_bytes(b"no image")
    with pytest.raises(CommandError, match="no image: 1 could not be read: only/bad.png"):
        run(evaluate, *SMALL, "--num-classes", 1, "--data-dir", tmp_path, "-j", 0)


def test_eval_numbers_folders_with_imagenets_names_as_imagenet_does(tmp_path, quick, capsys, monkeypatch):
    """A model of 1000 classes on three of them."""
    from timm.data import ImageNetInfo

    seen = []
    for label in (3, 500, 999):
        path = tmp_path / "val" / ImageNetInfo().index_to_label_name(label) / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(path)
    original = evaluate.evaluate

    def watched(model, loader, **how):
        seen.extend(loader.loader.dataset.labels)
        return original(model, loader, **how)

    monkeypatch.setattr(evaluate, "evaluate", watched)
    run(evaluate, *SMALL, "--data-dir", tmp_path, "-b", 4, "-j", 0)
    assert seen == [3, 500, 999] and "of 3 images" in capsys.readouterr().out


# ---- times


def test_timing_has_as_many_rounds_as_fit(monkeypatch):
    monkeypatch.setattr(running, "clock", lambda device: lambda call: call() or 0.1)
    sides = {"a": lambda x: None, "b": lambda x: None}
    how = running.running(parsed(bench, *SMALL))
    for seconds, repeats, rounds in [(2.0, None, 10), (0.1, None, 5), (100.0, None, 50), (2.0, 3, 3)]:
        done = []
        times = running.timed(sides, torch.zeros(1), how, repeats, seconds, done.append)
        assert {name: len(found) for name, found in times.seconds.items()} == {"a": rounds, "b": rounds}
        assert done == pytest.approx([(i + 1) / rounds for i in range(rounds)])


def test_times_that_vary_much_are_called_so():
    for dense, said in (([1.0, 1.0, 1.0], False), ([3.0, 1.0, 0.2], True)):
        times = running.Times({"dense": dense, "slim": [1.0] * 3}, set())
        assert ("vary much" in running.remarks(times, [ratio(dense, times.seconds["slim"])])) is said
