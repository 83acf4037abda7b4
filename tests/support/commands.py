"""What the tests of the commands share: a small model under a timm name, and commands run in this process."""

import argparse
import importlib.util

import pytest

timm = pytest.importorskip("timm")
for package in ("torchvision", "matplotlib", "PIL", "sklearn", "rich"):
    pytest.importorskip(package)

evaluate = importlib.import_module("tokenops.cli.evaluate") if importlib.util.find_spec("accelerate") else None

MODEL = "small_vit_for_commands"
SMALL = ["--model", MODEL, "--img-size", "64", "--device", "cpu"]
DEPTH, DIM = 4, 48
QUICK = ["--repeats", "2"]


@timm.models.register_model
def small_vit_for_commands(pretrained=False, **kwargs):
    shape = dict(embed_dim=DIM, depth=DEPTH, num_heads=3)
    return timm.create_model("vit_tiny_patch16_224", **shape, **kwargs)


def parsed(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def needed(command):
    """Skips where the command's packages are not installed."""
    if command is None:
        pytest.skip("eval needs accelerate")


def run(command, *arguments):
    command.run(parsed(command, *arguments))
