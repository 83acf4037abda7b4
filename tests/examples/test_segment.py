"""The example that finds digits in photographs: its scenes, what it prints and draws, errors in words."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import scenes
import segment
from scenes import Scenes, sources
from tokenops.methods.cait.segmentation import mean_iou

# ---- scenes


def test_a_scene_is_always_the_same():
    first, again, other = Scenes(5, True, 48), Scenes(9, True, 48), Scenes(5, True, 48, seed=1)
    for (x, labels), (same, same_labels), (x2, _) in zip(first, again, other, strict=False):
        assert torch.equal(x, same) and torch.equal(labels, same_labels) and not torch.equal(x, x2)
        assert x.shape == (3, 48, 48) and x.dtype == torch.float32 and -1 <= x.min() < x.max() <= 1
        assert labels.dtype == torch.int64 and 0 <= labels.min() < labels.max() <= 10
    assert len(list(first)) == 5
    assert not torch.equal(first[0][0], first[1][0]) and not torch.equal(first[0][0], Scenes(5, False, 48)[0][0])


def test_training_and_test_share_nothing():
    train, test = sources(True), sources(False)
    assert len(train.digits) + len(test.digits) == 1797 and len(test.digits) > 400
    assert set(test.labels.tolist()) == set(range(1, 11))
    for ours, theirs in zip(train.photographs, test.photographs, strict=True):
        assert ours.shape[2] + theirs.shape[2] == 640 and theirs.shape[2] > 150


def test_masks_are_exact(monkeypatch):
    """With an ink that no photograph has, what is labelled is what is mostly ink."""
    monkeypatch.setattr(scenes, "colour", lambda behind, random: torch.tensor(2.0))
    digits = 0
    for x, labels in itertools.islice(Scenes(10, True, 64), 10):
        shown = (x + 1) / 2
        assert (labels[(shown == 2).all(0)] > 0).all()
        assert shown[:, labels > 0].min() >= 1 and shown[:, labels == 0].max() <= 1.5
        digits += len(labels[labels > 0].unique())
    assert digits >= 25


# ---- the example

QUICK = ["--device", "cpu", "--steps", "20", "--scenes", "6"]


def test_segment(tmp_path, capsys, monkeypatch):
    from PIL import Image

    for name, value in dict(BATCH=2, ROUNDS=2, TIMED=2).items():
        monkeypatch.setattr(segment, name, value)
    output = tmp_path / "made" / "scenes.png"
    assert segment.main([*QUICK, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    table = {line.strip().split("  ")[0]: line for line in reversed(out.splitlines()) if line.strip()}
    assert "64 x 6" in table["tokens"] and table["tokens"].count("64 x 2, 32 x 2, 16 x 2") == 2
    macs = [float(number) for number in table["GMACs"].split()[1:]]
    assert macs[0] > 1.3 * macs[1] and macs[1] > 1.2 * macs[2]
    assert len(table["7"].split()) == 4, "a class a line"
    assert "masked_channel_attention" in out and "merge_neighbours" in out and max(map(len, out.splitlines())) <= 80
    with Image.open(output) as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_segment_counts_right_answers(monkeypatch):
    """Of a model that knows the truth the score is 1, of one that sees background only the background's."""
    test = Scenes(5, False, 32)
    truth = DataLoader(test, 5)
    monkeypatch.setattr(segment, "BATCH", 5)

    def knowing(images):
        ((_, labels),) = truth
        return F.one_hot(labels, 11).movedim(-1, 1).float()

    assert mean_iou(segment.scored(knowing, test, "cpu"))[1] == 1
    nothing = mean_iou(segment.scored(lambda x: torch.eye(11)[0].view(1, 11, 1, 1).expand(5, 11, 32, 32), test, "cpu"))
    assert nothing[0][0] > 0.5 and nothing[1] < 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "3"], "--steps=3, but it must be at least 20"),
        (["--scenes", "0"], "--scenes=0, but it must be at least 1"),
        (["--seed", "-1"], "--seed=-1, but it must be at least 0"),
        (["--keep", "0"], "--keep=0.0, but it must be above 0"),
        (["--keep", "0.01"], "with one unit of each kind"),
        (["--output", "scenes.bmp"], "the name must end in .png"),
    ],
)
def test_segment_says_in_words_what_is_wrong(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert segment.main([*QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
