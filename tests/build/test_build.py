"""What setup.py makes: one wheel for every Python and torch, honest about what it holds; and kernels without spills."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from support.distributions import (
    NOT_BUILT,
    ROOT,
    attempt,
    bare_clone,
    checked_compiled,
    checked_pure,
    release,
    sdist,
    smoke,
    wheel,
)
from tokenops.ops import native

MODERN = tuple(int(part) for part in setuptools.__version__.split(".")[:2]) >= (70, 1)
NO_COMPILER = "there was no C++ compiler when tokenops was installed"

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
NVCC = shutil.which("nvcc") or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_setuptools = pytest.mark.skipif(not MODERN, reason=f"needs setuptools 70.1, this is {setuptools.__version__}")
# of the library in use
needs_library = pytest.mark.skipif(native.info()["cpu"] is not None, reason=str(native.info()["cpu"]))
needs_cuda_in_it = pytest.mark.skipif(native.info()["cuda"] is not None, reason=str(native.info()["cuda"]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return bare_clone(tmp_path_factory.mktemp("sources") / "tokenops")


@pytest.fixture(scope="module")
def archive(sources, tmp_path_factory):
    return sdist(sources, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(autouse=True)
def objects(monkeypatch):
    """What `make` compiled is there, so that no test compiles the same again."""
    monkeypatch.setenv("TOKENOPS_BUILD_CACHE", os.environ.get("TOKENOPS_BUILD_CACHE", str(ROOT / "build/objects")))


def setup_py(sources, *arguments, **environment):
    return attempt(sys.executable, "setup.py", *arguments, cwd=sources, **environment)


def unpacked_smoke(folder, *expected):
    """The smoke test of a package that is on the path, not installed."""
    assert smoke(sys.executable, *expected, cwd=folder, PYTHONPATH=str(folder)).is_relative_to(folder)


def undefined(library):
    """The symbols a library wants from others, without those of libc and libstdc++."""
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    names = [line.split()[-1] for line in listing.splitlines()]
    runtime = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ZNSt|^_ZSt\d+__throw_\w+$|^_ITM_\w+$|^__gmon_start__$")
    return {name for name in names if not runtime.search(name)}


def assert_stable(library):
    strangers = {name for name in undefined(library) if not re.fullmatch(r"(aoti_)?torch_[a-z]\w*", name)}
    assert not strangers, f"not of the stable ABI: {sorted(strangers)}"
    assert undefined(library)  # nm saw something


@needs_sources
@needs_compiler
@needs_setuptools
def test_wheel(archive, tmp_path, monkeypatch):
    made = wheel(archive, tmp_path, TOKENOPS_BUILD="cpu")
    assert checked_compiled(made)["cuda"] == "installed with TOKENOPS_BUILD=cpu"
    shutil.unpack_archive(made, tmp_path / "content", "zip")
    assert_stable(tmp_path / "content/tokenops/_C.abi3.so")
    unpacked_smoke(tmp_path / "content", "native")
    monkeypatch.setattr("support.distributions.LIMIT", made.stat().st_size)
    with pytest.raises(AssertionError, match="are too many"):
        checked_compiled(made)


@needs_sources
@needs_setuptools
@pytest.mark.parametrize("mode, why", {"none": NOT_BUILT, "auto": NO_COMPILER}.items())
def test_pure_wheel_without_a_compiler(archive, tmp_path, mode, why):
    made = wheel(archive, tmp_path, TOKENOPS_BUILD=mode, PATH="", CXX="")
    checked_pure(made, why)
    shutil.unpack_archive(made, tmp_path / "content", "zip")
    unpacked_smoke(tmp_path / "content", "reference", why)


@needs_sources
@pytest.mark.parametrize(
    "environment, words",
    [
        ({"TOKENOPS_BUILD": "gpu"}, "TOKENOPS_BUILD='gpu', but it must be one of auto, cpu, cuda, none"),
        ({"TOKENOPS_BUILD": "cpu", "CXX": "no-such"}, "TOKENOPS_BUILD=cpu, but that cannot be built: there was no C++"),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "Hoper", "TOKENOPS_BUILD": "cuda"},
            "'Hoper' is neither of the form 9.0, 9.0a or 9.0+PTX, nor native",
            marks=needs_nvcc,
        ),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "99.0", "TOKENOPS_BUILD": "cuda"}, "does not know 99.0", marks=needs_nvcc
        ),
    ],
)
def test_errors_in_words(sources, environment, words):
    done = setup_py(sources, "--version", **environment)
    assert done.returncode != 0 and words in done.stderr


@needs_sources
@needs_nvcc
@pytest.mark.parametrize(
    "architectures, words",
    (
        ("Hopper", None),
        ("Ampere;Ada", None),
        ("Hoper", "building without CUDA: TORCH_CUDA_ARCH_LIST='Hoper': 'Hoper' is neither of the form"),
        ("native", "building without CUDA: TORCH_CUDA_ARCH_LIST=native, but there is no GPU"),
    ),
)
def test_architectures_by_name(sources, architectures, words):
    """What torch takes is taken, and where CUDA is optional nothing that is asked for ends the build."""
    if architectures == "native" and torch.cuda.is_available():
        words = None
    done = setup_py(sources, "--version", TORCH_CUDA_ARCH_LIST=architectures, TOKENOPS_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert words in done.stderr if words else "without CUDA" not in done.stderr


@needs_sources
@needs_nvcc
def test_before_ampere(tmp_path):
    """There are no tensor cores for what the matching multiplies: it compiles all the same."""
    source = tmp_path / "matching.cu"
    kernel = "(const void*) tokenops::match_bipartite_kernel<tokenops::BFloat16, 8>"
    source.write_text(f'#include "{ROOT}/csrc/cuda/match_bipartite.cuh"\nconst void* kernel = {kernel};\n')
    command = [NVCC, "-std=c++17", "-arch=sm_75", "-cubin", "-o", tmp_path / "matching.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert b"match_bipartite_kernel" in (tmp_path / "matching.cubin").read_bytes()


NVCC_THAT_FAILS = """#!/bin/sh
case "$*" in
  --list-gpu-code) echo sm_80; echo sm_90 ;;
  --version) echo "release 13.0, V13.0.1" ;;
  *) echo "nvcc fatal: no licence today" >&2; exit 1 ;;
esac
"""


@needs_sources
@needs_compiler
def test_an_nvcc_that_fails_is_left_out_aloud_unless_it_was_asked_for(sources, tmp_path):
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC_THAT_FAILS)
    nvcc.chmod(0o755)
    build = ("build", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    environment = {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": ""}
    done = setup_py(sources, *build, TOKENOPS_BUILD="auto", **environment)
    assert done.returncode == 0, done.stderr
    assert "compute capability 10.0+PTX: left out" in done.stderr
    assert "CUDA not built: nvcc failed when tokenops was installed: nvcc fatal: no licence today" in done.stderr
    unpacked_smoke(tmp_path / "lib", "native")
    done = setup_py(sources, *build, TOKENOPS_BUILD="cuda", **environment)
    assert done.returncode != 0 and "TOKENOPS_BUILD=cuda, but that cannot be built" in done.stderr


@needs_sources
def test_source_distribution_holds_the_native_sources_and_recipes_and_no_tests(archive):
    listing = subprocess.check_output(["tar", "tzf", archive], text=True)
    for source in (*(ROOT / "csrc").rglob("*.*"), *(ROOT / "configs").iterdir()):
        assert f"/{source.relative_to(ROOT)}\n" in listing
    assert "/tests/" not in listing


@needs_library
def test_this_library_is_stable():
    assert_stable(native.LIBRARY)


def test_info_tells_what_was_built():
    info = native.info()
    assert info["cpu"] == native.why_not("cpu")
    if info["cuda"] is None:
        assert info["architectures"] and info["nvcc"]


# What was compiled is kept, for the same sources and commands only

COMPILER_THAT_NOTES = """#!/bin/sh
case "$*" in
  --version) echo "noting 1.0"; exit ;;
  --list-gpu-code) echo sm_80; echo sm_90; exit ;;
esac
echo "$*" >> "$(dirname "$0")/log"
while [ "$1" != -o ]; do shift; done
echo object > "$2"
"""


@needs_sources
def test_objects_are_kept_by_what_they_are_made_from(sources, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "nvcc"):
        (tools / name).write_text(COMPILER_THAT_NOTES.replace("noting 1.0", "release 13.0, V13.0.1"))
        (tools / name).chmod(0o755)
    copy = tmp_path / "copy"
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("tests", "build"))
    cpp, cu = (sorted(path.name for path in copy.glob(f"csrc/{kind}")) for kind in ("cpu/*.cpp", "cuda/*.cu"))

    def compiled(mode, architectures=""):
        (tools / "log").unlink(missing_ok=True)
        folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
        environment = {"TOKENOPS_BUILD": mode, "CXX": str(tools / "c++"), "CUDA_HOME": str(tmp_path)}
        environment |= {"TORCH_CUDA_ARCH_LIST": architectures, "TOKENOPS_BUILD_CACHE": str(tmp_path / "objects")}
        done = setup_py(copy, "build", *folders, **environment)
        assert done.returncode == 0, done.stderr
        commands = [line for line in (tools / "log").read_text().splitlines() if " -shared " not in line]
        return sorted(re.search(r" -c \S*?([^/ ]+) ", command)[1] for command in commands), commands

    assert compiled("cpu")[0] == cpp
    assert compiled("cpu")[0] == []
    names, commands = compiled("cuda", "9.0+PTX")
    assert names == cu  # C++ is the same
    for command in commands:
        assert re.findall(r"-gencode=(\S+)", command) == [
            "arch=compute_90,code=sm_90",
            "arch=compute_90,code=compute_90",
        ]
    assert compiled("cuda", "8.0")[0] == cu  # for another card
    assert compiled("cuda", "9.0+PTX")[0] == []
    assert compiled("cuda", "Hopper")[0] == []  # the same by its name
    header = copy / "csrc/common.h"
    header.write_text(header.read_text() + "// changed\n")
    assert compiled("cpu")[0] == cpp


# The CUDA kernels


@needs_sources
@needs_compiler
@needs_nvcc
@pytest.mark.slow
def test_one_library_holds_cuda_too_and_still_loads(sources, tmp_path):
    """Compiled anew, for an architecture without tensor cores of bfloat16 and one with."""
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    environment = {"TOKENOPS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "7.5;9.0+PTX", "TOKENOPS_BUILD_CACHE": ""}
    done = setup_py(sources, "build", *folders, **environment)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "lib/tokenops/_build_info.json").read_text())
    assert info["cuda"] is None and info["architectures"] == ["7.5", "9.0", "9.0+PTX"] and info["nvcc"]
    library = tmp_path / "lib/tokenops/_C.abi3.so"
    assert_stable(library)
    assert b"restore_tokens_bwd_kernel" in library.read_bytes()
    unpacked_smoke(tmp_path / "lib", "native")


@needs_sources
@needs_compiler
@needs_nvcc
@needs_setuptools
@pytest.mark.slow
def test_a_release(tmp_path):
    release(tmp_path, [sys.executable])
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".gz", ".whl", ".whl"]


def cuobjdump():
    """With CUDA, or in triton's package."""
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or shutil.which(str(Path(NVCC or "nvcc").parent / "cuobjdump")) or bundled


@needs_cuda_in_it
def test_cuda_kernels_do_not_spill():
    """Of the library in use, on every architecture that it was built for."""
    info = native.info()
    command = [cuobjdump(), "--dump-resource-usage", native.LIBRARY]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^arch = sm_(\d+)$", said, flags=re.M)[1:]
    kernels = {}
    for capability, text in zip(parts[::2], parts[1::2], strict=True):
        usage = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        kernels.setdefault(capability, []).extend(usage)
    assert set(kernels) == {name.replace(".", "") for name in info["architectures"] if not name.endswith("PTX")}
    for capability, usage in kernels.items():
        names = {name for name, *_ in usage}
        for operator in ("restore_tokens", "select_tokens", "merge_neighbours", "match_bipartite", "merge_bipartite"):
            assert any(operator in name for name in names), (capability, operator)
        assert [row for row in usage if row[1] != "0" or row[3] != "0"] == [], f"spills on sm_{capability}"
        assert 0 < max(int(shared) for *_, shared, _ in usage) <= 48 * 1024
