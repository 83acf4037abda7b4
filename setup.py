"""Builds tokenops/_C.abi3.so from csrc/: one library for every torch from 2.11 on, with and without CUDA.

TOKENOPS_BUILD says what to build: "auto" (all that the tools at hand can), "cpu", "cuda" or "none" (pure Python: the
reference and Triton). TORCH_CUDA_ARCH_LIST names the architectures, CUDA_HOME and CXX the compilers. What was built,
and why not the rest, is kept in tokenops/_build_info.json for `python -m tokenops info`. TOKENOPS_BUILD_CACHE is a
folder where object files are kept for the next build from the same sources by the same commands.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = "8.0;9.0;10.0+PTX"
#: names that torch takes as well, in its TORCH_CUDA_ARCH_LIST
NAMED = {
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
    "Rubin": "10.7+PTX",
}
OLDEST_TORCH = (2, 11)
CXX_FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
LINK_FLAGS = ["-Xlinker", "--no-as-needed", "-ltorch", "-Xlinker", "--exclude-libs=ALL"]
INFO = "_build_info.json"


def say(message: str) -> None:
    print(f"tokenops: {message}", file=sys.stderr, flush=True)


def run(command: list) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(str(c) for c in command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_cxx() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    return None


def find_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_nvcc() -> Path | None:
    """In CUDA_HOME, on the PATH, in the usual place, or from the packages of cuda-toolkit[nvcc,cccl]."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(home, "bin/nvcc") for home in homes]
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    places += [Path("/usr/local/cuda/bin/nvcc")]
    places += [nvcc for folder in sys.path if folder for nvcc in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def of_this_machine() -> str:
    """The architectures of the GPUs that torch sees, the newest with PTX: what "native" stands for."""
    code = (
        "import torch; print(*(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())), sep=';')"
    )
    found = sorted(
        {tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", run([sys.executable, "-c", code]))}
    )
    if not found:
        raise RuntimeError("TORCH_CUDA_ARCH_LIST=native, but there is no GPU")
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX"


def asked_architectures(asked: str) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for, in numbers, ["9.0", "9.0a", "9.0+PTX"]; RuntimeError if it cannot be read."""
    names: list[str] = []
    for name in re.split(r"[;,\s]+", asked.strip() or ARCHITECTURES):
        of_name = of_this_machine() if name == "native" else NAMED.get(name, name)
        for number in of_name.split(";"):
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", number):
                raise RuntimeError(
                    f"TORCH_CUDA_ARCH_LIST={asked!r}: {name!r} is neither of the form 9.0, 9.0a or 9.0+PTX, nor native,"
                    f" {', '.join(NAMED)}"
                )
            names.append(number)
    return names


def architectures(nvcc: Path, strict: bool) -> list[str]:
    """["8.0", "9.0", "10.0", "10.0+PTX"]: what was asked for, without what this nvcc does not know (unless strict)."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    known = set(re.findall(r"sm_(\d+)", run([nvcc, "--list-gpu-code"])))
    chosen, lost_ptx = [], False
    for name in asked_architectures(asked):
        number, ptx = name.removesuffix("+PTX"), name.endswith("+PTX")
        if number.rstrip("af").replace(".", "") in known:
            chosen += [number, name][: 2 if ptx else 1]
        elif strict and asked:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST={asked!r}: {nvcc} does not know {name}")
        else:
            say(f"{nvcc} does not know compute capability {name}: left out")
            lost_ptx = lost_ptx or ptx
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of {asked or ARCHITECTURES}")
    return [*chosen, f"{chosen[-1]}+PTX"] if lost_ptx and not chosen[-1].endswith("+PTX") else chosen


def gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX").replace(".", "")
    return f"-gencode=arch=compute_{number},code={'compute' if architecture.endswith('PTX') else 'sm'}_{number}"


class Plan:
    """What will be built, decided once: `cpu` and `cuda` hold the reason why not, or None."""

    def __init__(self) -> None:
        self.mode = os.environ.get("TOKENOPS_BUILD", "auto")
        if self.mode not in MODES:
            raise SystemExit(f"TOKENOPS_BUILD={self.mode!r}, but it must be one of {', '.join(MODES)}")
        self.cxx, self.torch, self.nvcc = find_cxx(), find_torch(), find_nvcc()
        self.cpu = self.why_no_cpu()
        self.cuda = self.cpu or self.why_no_cuda()
        self.architectures: list[str] = []
        wanted = {"auto": None, "none": None, "cpu": self.cpu, "cuda": self.cuda}[self.mode]
        if wanted is not None:
            raise SystemExit(f"TOKENOPS_BUILD={self.mode}, but that cannot be built: {wanted}")
        if self.cuda is None:
            try:
                self.architectures = architectures(self.nvcc, strict=self.mode == "cuda")
            except RuntimeError as error:
                self.without_cuda(error, "there was nothing to build it for")

    def why_no_cpu(self) -> str | None:
        if self.mode == "none":
            return "installed with TOKENOPS_BUILD=none"
        if sys.platform != "linux":
            return f"compiled code is built on Linux only, and this is {sys.platform}"
        if self.cxx is None:
            return "there was no C++ compiler when tokenops was installed"
        if self.torch is None:
            return "there was no torch when tokenops was installed without build isolation"
        version = importlib.metadata.version("torch")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
            return f"torch {version} was there when tokenops was installed, and 2.11 is the oldest that serves"
        return None

    def why_no_cuda(self) -> str | None:
        if self.mode == "cpu":
            return "installed with TOKENOPS_BUILD=cpu"
        if self.nvcc is None:
            return "there was no nvcc when tokenops was installed (CUDA_HOME, PATH, or cuda-toolkit[nvcc,cccl])"
        return None

    def without_cuda(self, error: Exception, why: str = "nvcc failed") -> None:
        """In auto mode CUDA code that cannot be compiled is left out, aloud; Triton serves the GPU then."""
        if self.mode == "cuda":
            raise SystemExit(f"TOKENOPS_BUILD=cuda, but that cannot be built: {error}")
        say(f"building without CUDA: {error}")
        last = str(error).strip().splitlines()[-1]
        self.cuda, self.architectures = f"{why} when tokenops was installed: {last}", []

    def info(self) -> dict:
        return {
            "cpu": self.cpu,
            "cuda": self.cuda,
            "architectures": self.architectures,
            "torch": None if self.cpu else importlib.metadata.version("torch"),
            "compiler": None if self.cpu else run([*self.cxx, "--version"]).splitlines()[0],
            "nvcc": None if self.cuda else re.search(r"release (\S+),", run([self.nvcc, "--version"]))[1],
        }

    def write(self, folder: Path) -> None:
        (folder / INFO).write_text(json.dumps(self.info(), indent=1) + "\n")
        say(f"C++ {'built' if self.cpu is None else 'not built: ' + self.cpu}")
        say(f"CUDA {'built for ' + ', '.join(self.architectures) if self.cuda is None else 'not built: ' + self.cuda}")


class Kept:
    """Objects in TOKENOPS_BUILD_CACHE, by what they are made from: the command, the compiler, torch, all of csrc."""

    def __init__(self, command: list) -> None:
        self.folder = Path(os.environ["TOKENOPS_BUILD_CACHE"])
        self.folder.mkdir(parents=True, exist_ok=True)
        said = [shlex.join(map(str, command)), run([command[0], "--version"]), importlib.metadata.version("torch")]
        self.key = hashlib.sha256("\0".join(said).encode())
        for file in sorted(path for path in Path("csrc").rglob("*") if path.is_file()):
            self.key.update(f"\0{file}\0".encode() + file.read_bytes())

    def place(self, source: Path) -> Path:
        return self.folder / f"{source.name}-{self.key.hexdigest()[:32]}.o"

    def get(self, source: Path, target: Path) -> bool:
        there = self.place(source).exists()
        if there:
            shutil.copyfile(self.place(source), target)
        return there

    def put(self, source: Path, target: Path) -> None:
        half = self.place(source).with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, half)
        half.replace(self.place(source))  # whole or not at all


class Build(build_ext):
    """Calls the compilers itself: torch's builder refuses nvccs of other versions than torch's, and ours may differ."""

    def run(self) -> None:
        super().run()
        plan.write(Path("tokenops") if self.inplace else Path(self.build_lib, "tokenops"))

    def build_extension(self, ext: Extension) -> None:
        library, self.objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for folder in (library.parent, self.objects):
            folder.mkdir(parents=True, exist_ok=True)
        include = f"-I{plan.torch / 'include'}"
        # libtorch.so leads to libtorch_cpu and, where there is one, libtorch_cuda: needed, though it defines nothing
        link = ["-shared", f"-L{plan.torch / 'lib'}", *LINK_FLAGS, "-o", library]
        host = ["-fPIC", "-fvisibility=hidden"]
        objects = self.compile("csrc/cpu/*.cpp", [*plan.cxx, *CXX_FLAGS, *host, "-Wall", include])
        if plan.cuda is None:
            nvcc = [plan.nvcc, *(gencode(name) for name in plan.architectures)]
            nvcc += [f"-ccbin={plan.cxx[0]}"] if os.environ.get("CXX") else []
            try:
                flags = [*CXX_FLAGS, f"-Xcompiler={','.join(host)}", "--threads=0", include]
                kernels = self.compile("csrc/cuda/*.cu", [*nvcc, *flags])
                run([*nvcc, "-cudart=static", *objects, *kernels, *link])
                return
            except RuntimeError as error:
                plan.without_cuda(error)
        run([*plan.cxx, *objects, *link])

    def compile(self, pattern: str, command: list) -> list[Path]:
        kept = Kept(command) if os.environ.get("TOKENOPS_BUILD_CACHE") else None

        def made(source: Path) -> Path:
            target = self.objects / f"{source.name}.o"
            if kept is None or not kept.get(source, target):
                run([*command, "-c", source, "-o", target])
                if kept is not None:
                    kept.put(source, target)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
            return list(pool.map(made, sorted(Path().glob(pattern))))


class Pure(build_py):
    def run(self) -> None:
        super().run()
        if plan.cpu is not None and not self.editable_mode:
            plan.write(Path(self.build_lib) / "tokenops")


plan = Plan()
setup(
    license="MIT",  # for setuptools before 77
    license_expression="MIT",
    ext_modules=[] if plan.cpu else [Extension("tokenops._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": Build, "build_py": Pure},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
