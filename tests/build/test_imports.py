"""What importing costs: `import tokenops` brings in torch and its own few modules, nothing that is slow to import."""

import subprocess
import sys

import pytest
import torch

from tokenops.ops import native

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
