"""What the documentation shows runs: the Python blocks of every page, in order, and the docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import tokenops
from tokenops import methods  # noqa: F401  they say their names to the engine
from tokenops.__main__ import parser
from tokenops.patching import engine

ROOT = Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "docs/results.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks], ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they save what they make
    torch.manual_seed(0)
    names, known = {}, set(engine.METHODS)
    try:
        for block in BLOCKS[page]:
            exec(compile(block, str(page), "exec"), names)
    finally:
        for name in engine.METHODS.keys() - known:  # a page shows how a method is added
            del engine.METHODS[name]
    if page == README:
        assert names["y"].shape == (8, 99, 384) and names["logits"].shape == (1, 1000)


def test_there_are_examples():
    for name in ("README.md", "docs/getting-started.md", "docs/operators.md", "docs/methods/tome.md"):
        assert BLOCKS[ROOT / name]


def test_commands_are_read():
    """Every call of the command line that a page shows has the flags that there are."""
    calls = set()
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            calls |= {line.partition("#")[0].strip() for line in lines if line.startswith("python -m tokenops ")}
    assert {call.split()[3] for call in calls} >= {"info", "demo", "bench", "slim", "eval", "fidelity", "train"}
    for arguments in [call.split()[3:] for call in calls]:
        assert parser(arguments).parse_args(arguments).command == arguments[0]


def test_links():
    """Of those pages that Sphinx does not read."""
    for page in (README, ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        assert links and all((ROOT / link).exists() for link in links if "://" not in link)


def test_sizes():
    """A README of one page; lines that fit a terminal, but for the tables that are generated."""
    assert len(README.read_text().splitlines()) <= 130
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120 or (page == RESULTS and line.startswith("|")), f"{page}:{number}"


def test_the_version_is_said():
    assert f"\nversion: {tokenops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {tokenops.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


MODULES = [m.name for m in pkgutil.walk_packages(tokenops.__path__, "tokenops.") if "._" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs={"torch": torch}).failed == 0


def test_operators_and_methods_are_shown():
    readme, operators = README.read_text(), (ROOT / "docs/operators.md").read_text()
    for name in (
        "soft_aggregate",
        "soft_scatter",
        "token_mlp",
        "select_tokens",
        "merge_neighbours",
        "merge_bipartite",
        "restore_tokens",
        "masked_channel_attention",
    ):
        assert f"| `{name}` |" in readme and f"| `{name}(" in operators
        assert ">>>" in getattr(tokenops, name).__doc__
    assert len(engine.METHODS) >= 8
    for name in engine.METHODS:
        assert f'[`"{name}"`](docs/methods/{name}.md)' in readme and (ROOT / f"docs/methods/{name}.md").exists()
