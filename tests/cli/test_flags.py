"""Flags of the commands: what they become, models they make, and errors in words."""

import argparse
import sys
from collections.abc import Mapping, Sequence

import pytest
import torch

from support.commands import MODEL, SMALL, evaluate, needed, parsed, run, timm
from tokenops.cli import CommandError, bench, methods, models, slim
from tokenops.methods.patch_slimming import Schedule
from tokenops.patching.engine import METHODS, Method, Role


def test_a_checkpoint_of_the_patched_model(tmp_path):
    arguments = [*SMALL, "--method", "sit", "--keeping-ratio", 0.6]
    model, source = models.make(parsed(bench, *arguments))
    assert source == ""
    torch.save(model.state_dict(), tmp_path / "sit.pth")
    again, source = models.make(parsed(bench, *arguments, "--checkpoint", tmp_path / "sit.pth"))
    assert source.endswith("sit.pth") and len(again.state_dict()) > len(
        timm.create_model(MODEL, img_size=64).state_dict()
    )
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    name, dense = models.dense_of(again, parsed(bench, *arguments))
    assert dense.state_dict().keys() == timm.create_model(MODEL, img_size=64).state_dict().keys() and hasattr(
        again, "tokenops_patch"
    )


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("tome --r 8", {"r": 8}),
        ("tome --r 8 --inflect -1 --no-prop-attn", {"r": (8, -1.0), "prop_attn": False}),
        ("tome --r 4 3 2", {"r": [4, 3, 2]}),
        ("evit --keep-rate 0.6", {"keep_rate": 0.6}),
        ("evit --keep-rate 1 0.5 --fuse-token", {"keep_rate": [1.0, 0.5], "fuse_token": True}),
        ("evo_vit --stages 2 4 --tradeoff 0.3", {"stages": [2, 4], "tradeoff": 0.3}),
        ("patch_slimming --counts 17 9 1", {"schedule": [17, 9, 1]}),
        ("sit --locations 3", {"locations": [3]}),
        (
            "cait --points 2:vertical 4:horizontal --kind scalar",
            {"points": {2: "vertical", 4: "horizontal"}, "kind": "scalar"},
        ),
        ("random --r 13", {"r": 13}),
        ("none", {}),
    ],
)
def test_options_of_methods(flags, options):
    assert methods.method_options(parsed(bench, "--method", *flags.split())) == options


@pytest.fixture
def toy():
    """A method that is registered for one test: it keeps everything, and its options are of every kind."""

    class Toy(Method):
        """Nothing.

        Args:
            strength: how much of nothing,
                100 % of it if not given.
            places: where, :math:`x` of ``y``.
            by: the word for it.
            loud: whether to say so.
            seed: which a command has a flag for, too.
            axes: of places.
            plan: how, or its file.
        """

        name = "toy"

        def __init__(
            self,
            size: int,
            strength: float | Sequence[float] = 1.0,
            places: Sequence[int] = (),
            by: str = "word",
            loud: bool | None = None,
            seed: int = 0,
            axes: Mapping[int, str] | None = None,
            plan: Schedule | Sequence[int] | None = None,
        ):
            self.given = size, strength, places, by, loud, seed, axes, plan

        def roles(self, site):
            return [Role(site.prefix, False)] * site.depth

    yield Toy
    del METHODS["toy"]


def test_a_new_method_has_its_flags_at_once(toy, capsys):
    for command in (bench, slim):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        text = " ".join(parser.format_help().split())
        assert "--strength X [X ...] toy: how much of nothing, 100 % of it if not given" in text
        assert "--places N [N ...] toy: where, x of y" in text and "--loud, --no-loud toy: whether to say so" in text
        assert "tome, random, toy" in text
    flags = "--size 3 --strength 2 --places 1 2 --by heart --no-loud --seed 5 --axes 1:up --plan 9 5"
    made, _ = models.make(parsed(bench, *SMALL, "--method", "toy", *flags.split()))
    found = made.tokenops_patch.method
    assert isinstance(found, toy) and found.given == (3, 2, [1, 2], "heart", False, 5, {1: "up"}, [9, 5])
    assert parsed(slim, "--seed", "3", "--toy-seed", "4").seed == 3, "the command's own flag is not another's"
    with pytest.raises(CommandError, match="--method toy needs --size"):
        models.make(parsed(bench, *SMALL, "--method", "toy"))
    with pytest.raises(CommandError, match="--loud belongs to --method toy, not to evit"):
        models.make(parsed(bench, *SMALL, "--method", "evit", "--loud"))


def test_every_option_has_a_flag_that_says_what_it_is():
    from inspect import signature

    known = methods.flags()
    for name, method in METHODS.items():
        if method.__module__.startswith("tokenops."):
            for option in signature(method).parameters:
                assert name in known[option].methods and len(known[option].help) > 5, option


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("vit_tinny", "vit_tiny_patch16_224"),
        ("deit_smal_patch16_224", "deit_small_patch16_224"),
        ("evit_deit_smal", "evit_deit_small_patch16_224"),
        ("resnet_50", "resnet50"),
        ("sit_lvvit_xsmal", "sit_lvvit_xsmall"),
    ],
)
def test_near_names(name, first):
    assert models.nearest(name)[0] == first


def test_a_name_like_no_other():
    assert models.nearest("qqqq") == []
    with pytest.raises(CommandError, match="knows no model 'qqqq': timm.list_models"):
        models.create("--model", "qqqq")


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (bench, [], "--method none, and small_vit_for_commands reduces nothing: choose a --method, cait, evit"),
        (bench, ["--method", "tome"], "--method tome needs --r"),
        (bench, ["--method", "patch_slimming"], "--method patch_slimming needs --schedule or --counts"),
        (bench, ["--method", "dps"], "--method dps needs --counts"),
        (bench, "--method patch_slimming --counts 9 --schedule 9".split(), "--schedule and --counts say the same"),
        (bench, ["--method", "evit", "--r", "3"], "--r belongs to --method tome or random, not to evit"),
        (bench, ["--method", "tome", "--r", "3", "4", "--inflect", "1"], "--inflect goes with one number of --r"),
        (bench, ["--method", "evit", "--keep-rate", "2"], "--method evit: keep_rate=2, but it must be above 0"),
        (bench, ["--method", "patch_slimming", "--counts", "9"], "--method patch_slimming: "),
        (bench, ["--method", "patch_slimming", "--schedule", "no.json"], "--schedule: cannot read no.json: No such"),
        (bench, ["--method", "patch_slimming", "--schedule", __file__], "must be JSON"),
        (
            bench,
            ["--method", "patch_slimming", "--schedule", sys.executable],
            f"--schedule {sys.executable} is no JSON",
        ),
        (bench, ["--method", "cait", "--layout", "foo"], "--method cait: layout='foo', but it must be"),
        (bench, ["--method", "cait", "-b", "0"], "--batch-size=0, but it must be at least 1"),
        (bench, ["--method", "cait", "--repeats", "0"], "--repeats=0, but it must be at least 1"),
        (bench, ["--method", "cait", "--output", "a.txt"], "--output a.txt: the name must end in .csv or .json"),
        (bench, ["--method", "cait", "--output", f"{__file__}/a.csv"], "--output: cannot write"),
        (bench, ["--method", "cait", "--device", "tpu"], "--device tpu, but it must be cpu, cuda"),
        (bench, ["--method", "cait", "--device", "meta"], "--device meta, but it must be cpu, cuda"),
        (bench, ["--method", "cait", "--amp", "--dtype", "bfloat16"], "--amp and --dtype bfloat16"),
        (
            bench,
            ["--method", "cait", "--model", "deit_huge"],
            "--model: timm knows no model 'deit_huge'; near it are: deit3_huge",
        ),
        (bench, ["--method", "cait", "--model", "resnet18", "--img-size", "64"], "cannot make resnet18"),
        (bench, ["--method", "cait", "--num-classes", "0"], "--num-classes=0, but it must be at least 1"),
        (bench, ["--method", "cait", "--checkpoint", "no.pth"], "--checkpoint: there is no file no.pth"),
        (bench, ["--method", "cait", "--checkpoint", __file__], "holds no weights"),
        (bench, ["--method", "cait", "--model", "sit_deit_tiny"], "--method cait: apply_patch"),
        (
            bench,
            ["--method", "cait", "--model", "lvvit_tiny", "--pretrained"],
            "--pretrained, but no weights of lvvit_tiny can be downloaded",
        ),
        (slim, ["--method", "none"], "--method none slims nothing: choose one of cait"),
        (slim, ["--output", "slim.csv"], "--output slim.csv: the name must end in .png"),
        (slim, ["--output", "slim.svg"], "--output slim.svg: the name must end in .png"),
        (slim, ["--data-dir", "."], "--data-dir goes with --method patch_slimming"),
        (
            slim,
            ["--method", "patch_slimming", "--data-dir", "nowhere"],
            "--data-dir nowhere has no image that can be read",
        ),
        (slim, ["--method", "patch_slimming", "--granularity", "0"], "--granularity=0, but it must be at least 1"),
        (slim, ["--save", f"{__file__}/a.pth"], "--save: cannot write"),
        (slim, ["--save", "a.json"], "--save a.json: .json is for the schedule beside the weights"),
        (slim, ["--seed", str(2**64)], f"--seed={2**64}, but it must be at most {2**64 - 1}"),
        (bench, ["--model", "vit_tinny"], "--model: timm knows no model 'vit_tinny'; near it are: vit_tiny"),
        (slim, ["nowhere.jpg"], "there is no file nowhere.jpg"),
        (evaluate, [], "--data-dir nowhere, --split val: there is no folder nowhere"),
        (evaluate, ["--sweep", "1"], "--sweep goes with --method evit, evo_vit, sit, tome, random, not with none"),
        (evaluate, ["--method", "evit", "--keep-rate", "0.5", "--sweep", "1"], "--sweep sets --keep-rate: give one"),
        (evaluate, ["--workers", "-1"], "--workers=-1, but it must be at least 0"),
    ],
)
def test_errors_in_words(command, arguments, words, tmp_path, monkeypatch):
    needed(command)
    monkeypatch.chdir(tmp_path)
    required = ["--data-dir", "nowhere"] if command is evaluate else []
    size = [] if "--model" in arguments else SMALL
    with pytest.raises(CommandError) as error:
        run(command, *required, *size, *arguments)
    assert words in str(error.value)


def test_points_are_a_block_and_an_axis(capsys):
    with pytest.raises(SystemExit):
        parsed(bench, "--points", "2-vertical")
    assert "'2-vertical', but it must be a block and a word: 2:vertical" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(CommandError, match="--device cuda:1 was asked for, but torch sees no GPU"):
        run(bench, "--method", "cait", "--device", "cuda:1")
