"""The example of a small Qwen2.5-VL that reads photographs: what it prints, errors in words."""

import pytest

from tokenops import kept_counts

pytest.importorskip("transformers")

import vlm  # noqa: E402

QUICK = ["--device", "cpu", "--tokens", "24", "--rounds", "2"]


def test_vlm(capsys, monkeypatch):
    monkeypatch.setattr(vlm, "QUESTION", 7)
    assert vlm.main([*QUICK, "--keep", "0.5", "0.1"]) == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    (shapes,) = [line for line in lines if line.startswith("Two photographs")]
    sides = [int(word) for word in shapes.replace(",", "").split() if word.isdigit()]
    images = [sides[0] * sides[1] // 4, sides[2] * sides[3] // 4]
    assert images[0] > images[1] and "7 words" in shapes

    def row(name):
        return [line.removeprefix(name).split("  ") for line in lines if line.startswith(name)]

    counts = [images, kept_counts(images, 0.5), kept_counts(images, 0.1)]
    (shown,) = row("image tokens")
    assert [cell.strip() for cell in shown if cell] == [" + ".join(map(str, of)) for of in counts]
    (shown,) = row("tokens of the prompt")
    assert [int(cell) for cell in shown if cell] == [sum(of) + 4 + 7 for of in counts]
    for name in ("prefill, ms", "with the tower, ms"):
        assert len(row(name)) == 1 and row(name)[0][-1].endswith(")")
    assert len(row("speed-up")) == 2 and "masked_channel_attention" in out and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0.5", "1"], "--keep=1.0, but it must be above 0 and below 1"),
        (["--keep", "0"], "--keep=0.0, but it must be above 0"),
        (["--tokens", "3"], "--tokens=3, but it must be at least 16"),
        (["--rounds", "0"], "--rounds=0, but it must be at least 1"),
        (["--seed", "-1"], "--seed=-1, but it must be at least 0"),
    ],
)
def test_vlm_says_in_words_what_is_wrong(arguments, words, capsys):
    assert vlm.main([*QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
