"""What imports what: rooms import downwards alone, and `import tokenops` nothing that is slow to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenops
from tokenops.ops import native

PACKAGE = Path(tokenops.__file__).parent
#: each imports itself and those before it
ROOMS = ("ops", "measuring", "nn", "patching", "vlm", "methods", "training", "cli")
#: modules in no room, and the highest they import: all public names, methods only when asked for one; ToMe's own names
#: for operators; the list of architectures; and the door of the command line
OUTSIDE = {
    "__init__.py": "methods",
    "tome.py": "ops",
    "architectures.py": "ops",
    "__main__.py": "cli",
}

NEW = """
import sys
import torch
before = set(sys.modules)
{what}
print(*sorted(set(sys.modules) - before))
"""


def imported(what):
    done = subprocess.run([sys.executable, "-c", NEW.format(what=what)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def imports(source, *package):
    """The full names of what a module of a package imports, at its top or within functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def upwards(source, room, *package):
    """Those that a module must not import: of higher rooms, of tokenops itself, of tests.

    The command line may import all public names, and `measuring` the version.
    """
    below = ROOMS[: ROOMS.index(room) + 1]
    for name in imports(source, *package):
        top, inner = (*name.split("."), "")[:2]
        if top in ("benchmarks", "examples", "tests", "support"):
            yield name
        elif top == "tokenops" and inner not in below:
            if inner in ROOMS or (room not in ("cli", "measuring") and len(package) > 1):
                yield name


def test_every_room_imports_downwards():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).parts
        room = inside[0] if len(inside) > 1 else OUTSIDE[inside[0]]
        if wrong := list(upwards(path.read_text(), room, "tokenops", *inside[:-1])):
            found["/".join(inside)] = wrong
    assert found == {}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from ..ops import reference\nfrom . import attention\nimport torch", []),
        ("def f():\n    from ..patching.dressing import dress_as", ["tokenops.patching.dressing.dress_as"]),
        ("from .. import methods", ["tokenops.methods"]),
        ("from .. import apply_patch", ["tokenops.apply_patch"]),
        ("import tokenops.cli.info", ["tokenops.cli.info"]),
        ("from benchmarks.published import vit", ["benchmarks.published.vit"]),
    ],
)
def test_an_import_upwards_is_seen_wherever_it_stands(source, wrong):
    assert list(upwards(source, "nn", "tokenops", "nn")) == wrong


def test_import_brings_in_nothing_but_tokenops():
    modules = imported("import tokenops")
    assert "tokenops" in modules and [name for name in modules if name.split(".")[0] != "tokenops"] == []
    assert not {"tokenops.nn", "tokenops.methods", "tokenops.patching", "tokenops.training"} & set(modules)


@pytest.mark.parametrize("arguments", ["'--help'", pytest.param("'--version'", marks=pytest.mark.slow)])
def test_help_of_the_command_line_brings_in_no_more_than_the_standard_library(arguments):
    modules = imported(
        "import contextlib\nfrom tokenops.__main__ import main\n"
        f"with contextlib.suppress(SystemExit): main([{arguments}])\nprint()"
    )
    tops = {name.split(".")[0] for name in modules}
    assert "tokenops" in tops and tops <= {"tokenops", *sys.stdlib_module_names}


def test_the_gpu_is_a_constant_to_torch_compile():
    """What native.py does by hand is what torch's decorator does, whose import takes longer than that of tokenops."""

    def decorated():
        pass

    torch.compiler.assume_constant_result(decorated)
    assert vars(decorated) and vars(native.gpu_capability) == vars(decorated)
