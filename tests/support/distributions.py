"""The three files of a release, and each of them tried in an empty environment, offline: `make dist`.

`python -m support.distributions [PYTHON ...]` writes dist/; the wheels are tried with every PYTHON, of an environment
that has torch, which it lends. How the compiled wheel is built stands in pyproject.toml, for cibuildwheel as well.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
LIMIT = 60e6  # bytes of the compiled wheel
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
NOT_BUILT = "installed with TOKENOPS_BUILD=none"


def release(dist: Path, lenders: Sequence[str]) -> None:
    compiled_how = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["environment"]
    here, elsewhere = sysconfig.get_platform().replace("-", "_"), "macosx_14_0_arm64"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = timed(sdist, bare_clone(scratch / "clone"), dist)
        pure = timed(wheel, source, dist, TOKENOPS_BUILD="none")
        compiled = timed(wheel, source, dist, **compiled_how)
        checked_pure(pure, NOT_BUILT)
        assert checked_compiled(compiled)["cuda"] is None
        for version in PYTHONS:
            assert picked(dist, version, here) == compiled.name
            assert picked(dist, version, elsewhere) == pure.name
        for lender in lenders:
            try_installed(compiled, lender, scratch, "native")
            try_installed(pure, lender, scratch, "reference", NOT_BUILT)
        try_installed(source, sys.executable, scratch, "native", **compiled_how)


def call(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """What a command that has to succeed prints; RuntimeError with what it complains of."""
    done = attempt(*command, cwd=cwd, **environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def attempt(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    settings = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=cwd, env={**os.environ, **settings}, capture_output=True, text=True)


def timed(make, *arguments, **environment: str) -> Path:
    start = time.perf_counter()
    file = make(*arguments, **environment)
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB in {time.perf_counter() - start:.0f} s", flush=True)
    return file


def bare_clone(folder: Path) -> Path:
    """A copy of what a bare clone holds, so that building leaves no trace in this one."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in ("configs", "csrc", "tokenops", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def sdist(sources: Path, folder: Path) -> Path:
    call(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=sources, TOKENOPS_BUILD="none")
    (made,) = folder.glob("*.tar.gz")
    return made


def wheel(source: Path, folder: Path, **environment: str) -> Path:
    """Of a source tree or distribution."""
    before = set(folder.glob("*.whl"))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    call(*pip, "--wheel-dir", folder, source, **environment)
    (made,) = set(folder.glob("*.whl")) - before
    return made


def checked_wheel(file: Path, tag: str) -> tuple[list[str], dict]:
    """The files of a wheel of this tag, which are the package without tests and sources, and what it says was built."""
    assert re.fullmatch(rf"tokenops-[\d.]+-{tag}\.whl", file.name), file.name
    with zipfile.ZipFile(file) as archive:
        names, info = archive.namelist(), json.loads(archive.read("tokenops/_build_info.json"))
    unwanted = re.compile(r"(?!tokenops/|tokenops-[\d.]+\.dist-info/)|.*(test_|bench_|conftest|\.(cpp|cuh?|h)$)")
    assert not [name for name in names if unwanted.match(name)], names
    data = ("py.typed", "ops/triton/launches.json", "patching/supported.json")
    assert {f"tokenops/{name}" for name in data} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    return names, info


def checked_pure(file: Path, why: str) -> None:
    names, info = checked_wheel(file, "py3-none-any")
    assert not [name for name in names if name.endswith(".so")]
    assert info["cpu"] == info["cuda"] == why, info


def checked_compiled(file: Path) -> dict:
    names, info = checked_wheel(file, r"cp310-abi3-[\w.]*linux[\w.]+")
    assert "tokenops/_C.abi3.so" in names and info["cpu"] is None and info["torch"], info
    assert file.stat().st_size < LIMIT, f"{file.name} has {file.stat().st_size} bytes, but {LIMIT:.0f} are too many"
    return info


def picked(folder: Path, version: str, platform: str) -> str:
    """The wheel that the pip of another Python and platform takes from a folder."""
    asked = ("--only-binary", ":all:", "--python-version", version, "--platform", platform, "--target", "unused")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", "--no-deps")
    report = json.loads(call(*pip, *asked, "--find-links", folder, "tokenops"))
    (found,) = report["install"]
    return found["download_info"]["url"].rpartition("/")[2]


def try_installed(file: Path, lender: str, folder: Path, *expected: str, **environment: str) -> None:
    """Installs into an empty environment, to which `lender` lends torch and what builds; then the smoke test there."""
    env = Path(tempfile.mkdtemp(dir=folder))
    python, pip = env / "bin/python", ("--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed")
    call(lender, "-m", "venv", "--without-pip", env)
    (site,) = env.glob("lib/python3*/site-packages")
    lent = call(lender, "-c", r"import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')")
    (site / "lent.pth").write_text(lent)
    call(lender, "-m", "pip", "--python", python, "install", *pip, file, **environment)
    place = smoke(python, *expected, cwd=env)
    assert place.is_relative_to(site), place
    version = call(env / "bin/tokenops", "--version", cwd=env).strip()
    print(f"{file.name}: {' '.join(expected)} with {call(python, '--version').strip()}, {version}", flush=True)
    shutil.rmtree(env)


def smoke(python: str | Path, *expected: str, cwd: Path, **environment: str) -> Path:
    """Runs smoke.py away from this tree; the place of the tokenops that it found."""
    done = call(python, SMOKE, *expected, cwd=cwd, **{"PYTHONPATH": "", "TRITON_INTERPRET": "0", **environment})
    return Path(done.strip())


if __name__ == "__main__":
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    release(ROOT / "dist", sys.argv[1:] or [sys.executable])
