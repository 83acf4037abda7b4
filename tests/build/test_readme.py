"""What the documentation shows runs: the README's Python blocks, in order, and the docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import tokenops

README = Path(__file__).parents[2] / "README.md"


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a schedule
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["y"].shape == (8, 99, 384) and names["logits"].shape == (1, 1000)


MODULES = [m.name for m in pkgutil.walk_packages(tokenops.__path__, "tokenops.") if "._" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs={"torch": torch}).failed == 0


def test_the_operators_are_shown():
    text = README.read_text()
    for name in (
        "soft_aggregate",
        "soft_scatter",
        "token_mlp",
        "select_tokens",
        "merge_neighbours",
        "restore_tokens",
        "masked_channel_attention",
    ):
        assert f"`{name}(" in text
        assert ">>>" in getattr(tokenops, name).__doc__
