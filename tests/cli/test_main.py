"""The command line as a user meets it: info, the demo on a tiny setting, and errors in words."""

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tokenops.__main__ import main
from tokenops.cli import columns, info
from tokenops.measuring import machine
from tokenops.measuring.progress import Bar
from tokenops.measuring.timing import Spread, interleaved, ratio, recorded_kernels
from tokenops.ops import backends, native


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tokenops", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"} | environment,
    )


def test_without_a_command_it_says_how_it_is_used(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "usage: python -m tokenops" in out and "info" in out and "demo" in out


def test_a_line_above_the_bar_is_printed_as_it_is(capsys):
    line = "a/[b]f:cat:.tif " + "x" * 100
    Bar().line(line)
    assert capsys.readouterr().err == line + "\n"


# ---- info


def operators(text):
    """Of every operator and device what the table says of each backend."""
    rows = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in backends.TABLE]
    return {(op, device): dict(zip(backends.BACKENDS, cells)) for op, device, *cells in rows}


def notes(text):
    """The footnotes below the table by their letters."""
    below = text.split("operators (")[1].split("\n\n")[1]
    found = re.findall(r"^  (\w)  (.*(?:\n     .*)*)", below, re.MULTILINE)
    return {mark: " ".join(words.split()) for mark, words in found}


def test_the_commit_is_that_of_the_sources_alone(tmp_path, monkeypatch):
    """Not of another project, within which the package is installed."""
    place = tmp_path / "tokenops" / "measuring"
    place.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(place / "machine.py"))
    assert machine.commit() is None
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C")
    for root, known in ((tmp_path, True), (tmp_path.parent, False)):
        subprocess.run([*git, root, "init", "-q"], check=True)
        subprocess.run([*git, root, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
        assert (machine.commit() is not None) == known
        shutil.rmtree(root / ".git")


def test_info_names_versions_devices_and_every_operator():
    done = run("info")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    order = ["versions\n", "\ndevices\n", "\nbuild\n", "\nenvironment\n", "\noperators", "\nmissing"]
    places = [out.index(title) for title in order]
    assert places == sorted(places) and torch.__version__ in out and "cpu " in out
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    assert set(operators(out)) == {(op, device) for op in backends.TABLE for device in devices}
    assert all(ord(c) < 128 for c in out) and max(map(len, out.splitlines())) <= 80
    said = notes(out)
    marks = {mark for cells in operators(out).values() for mark in cells.values()} - {"runs"}
    assert set(said) == marks and len(set(said.values())) == len(said), "a note for every reason, once"
    if "cuda" not in devices:
        assert any("TRITON_INTERPRET=1" in note for note in said.values()), "why Triton does not run on a CPU"


def test_info_says_which_backend_is_chosen():
    rows = operators(info.text())
    for op in backends.TABLE:
        (chosen,) = (backend for backend, cell in rows[op, "cpu"].items() if cell == "runs")
        assert chosen == backends.choose(op, "cpu", torch.float32)


def test_info_follows_the_environment_and_says_so():
    out = run("info", TOKENOPS_BACKEND="reference").stdout
    for op in backends.TABLE:
        cells = operators(out)[op, "cpu"]
        assert cells["reference"] == "runs" and notes(out)[cells["native"]] == "TOKENOPS_BACKEND asks for reference"


def test_info_reports_a_backend_that_cannot_run():
    done = run("info", TOKENOPS_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    cells = operators(done.stdout)["soft_aggregate", "cpu"]
    assert "runs" not in cells.values() and notes(done.stdout)[cells["triton"]].startswith("asked for but cannot run: ")


@pytest.mark.parametrize(("name", "best"), [("TOKENOPS_BACKEND", "auto"), ("TOKENOPS_CPU_ISA", "amx")])
def test_a_variable_that_names_nothing_is_one_line(name, best):
    done = run("info", **{name: "tritn"})
    words = f"{name}='tritn', but it must be one of {best}, "
    assert done.returncode == 2 and done.stderr.startswith(f"tokenops info: {words}")
    assert len(done.stderr.splitlines()) == 1
    script = "import torch, tokenops; tokenops.soft_aggregate(torch.zeros(1, 2, 8), torch.zeros(1, 2, 1))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {name: "tritn"}
    )
    assert f"ValueError: {words}" in done.stderr, "not left aside where no command is run"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are those of POSIX")
def test_what_cannot_be_written_is_no_traceback():
    for options in ([], ["-u"]):
        command = [sys.executable, *options, "-m", "tokenops", "info"]
        ends = os.pipe()
        os.close(ends[0])
        done = subprocess.run(command, stdout=ends[1], stderr=subprocess.PIPE, text=True)
        os.close(ends[1])
        assert (done.returncode, done.stderr) == (141, "")
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 2 and done.stderr.startswith("tokenops info: cannot write: ")
            assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def gpu(monkeypatch):
    found = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found)
    monkeypatch.setattr(native, "gpu_capability", lambda: (9, 0))


def test_info_on_a_machine_with_a_gpu(gpu):
    text = info.text()
    assert "cuda:0  NVIDIA H200, compute capability 9.0, 139 GiB" in text
    cells = operators(text)["soft_aggregate", "cuda"]
    assert cells["triton"] == "runs" and notes(text)[cells["native"]] == "there is no native path on cuda"


def test_info_names_the_command_that_brings_what_is_missing(gpu, monkeypatch):
    for name in ("timm", "accelerate", "rich", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    monkeypatch.setattr(native, "info", lambda: {"cpu": "not built", "cuda": "not built"})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = dict(info.missing())
    commands = list(found.values())
    for command in (
        "torch",
        "triton",
        "'tokenops[models]'",
        "'tokenops[train]'",
        "'tokenops[demo]'",
        "'tokenops[plot]'",
    ):
        assert any(line.startswith("pip install ") and line.endswith(command) for line in commands), command
    assert any("g++" in line for line in commands) and any("cuda-toolkit" in line for line in commands)
    assert any("build_ext --inplace" in line for line in commands)
    assert any("2.9.1 is older than 2.11" in what for what in found) and "no nvcc, so no CUDA operators:" in found


def test_info_sees_that_torch_is_for_cpus_alone(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    before = list(info.missing())
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    new = [line for line in info.missing() if line not in before]
    assert ("an NVIDIA GPU is there, but this torch is for CPUs alone:", "pip install --force-reinstall torch") in new


# ---- the demo


@pytest.fixture(scope="module")
def demo_packages():
    for package in ("timm", "torchvision", "matplotlib", "PIL", "sklearn", "rich"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, demo_packages):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    paths = []
    for i, size in enumerate([(320, 240), (250, 400)]):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


TINY = ["--model", "deit_tiny_patch16_224", "--device", "cpu", "-b", "2", "--repeats", "1"]


def test_demo_shows_every_method_in_one_model(photographs, tmp_path, capsys):
    from PIL import Image

    from tokenops.patching.engine import METHODS

    output = tmp_path / "made" / "demo.png"
    assert main(["demo", *map(str, photographs), *TINY, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ") and line.split()}
    own = [name for name, method in METHODS.items() if method.__module__.startswith("tokenops.")]
    assert list(rows)[:3] == ["method", "tokens", "dense"] and set(own) < set(rows)
    assert rows["dense"][:2] == ["196", "1.25"] and rows["evit"][:2] == ["139/99/71", "0.82"]
    assert rows["cait"][0] == "98/49" and rows["evo_vit"][0] == "98/98" and rows["sit"][0] == "98/49/24"
    assert rows["tome"][0] == "183..40" and rows["random"][0] == "138/97/68"
    for name in own:  # speed-up / FLOP ratio
        assert float(rows[name][-1]) == pytest.approx(float(rows[name][3]) / float(rows[name][-2]), abs=0.02)
    assert "random, so what a method keeps is only illustrative" in out and "top 1" not in out
    assert "Medians of 1 interleaved rounds" in out and "select_tokens" in out and "restore_tokens" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    with Image.open(output) as picture:
        assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(2**24)) > 1000


@pytest.mark.slow
def test_demo_with_weights_predicts(photographs, tmp_path, capsys):
    import timm

    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    arguments = [str(photographs[0]), *TINY, "--checkpoint", str(tmp_path / "weights.pth")]
    assert main(["demo", *arguments, "--output", str(tmp_path / "demo.png")]) == 0
    out = capsys.readouterr().out
    assert "top 1" in out and "only illustrative" not in out


@pytest.mark.slow
def test_demo_leaves_out_what_a_model_does_not_take(photographs, tmp_path, capsys):
    model = ["--model", "naflexvit_base_patch16_gap", "--device", "cpu", "-b", "1", "--repeats", "1"]
    assert main(["demo", str(photographs[0]), *model, "--output", str(tmp_path / "demo.png")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cait is left out: " in out and "needs a fixed grid" in out and " evo_vit " in out and " tome " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jpg"], "there is no file nowhere.jpg"),
        ([__file__], "is not an image that Pillow can read"),
        ([os.path.dirname(__file__)], "cannot read"),
        (["--model", "lvvit_smal"], "timm knows no model 'lvvit_smal'; near it are: lvvit_small"),
        (["--checkpoint", "nowhere.pth"], "there is no file nowhere.pth"),
        (["--checkpoint", __file__], "holds no weights"),
        (["--model", "lvvit_tiny", "--pretrained"], "no weights of lvvit_tiny can be downloaded"),
        (["--model", "resnet10t"], "--model resnet10t has no blocks that tokens go through"),
        (["--batch-size", "0"], "--batch-size=0, but it must be at least 1"),
        (["--repeats", "-3"], "--repeats=-3, but it must be at least 1"),
        (["--output", "demo.bmp"], "the name must end in .png"),
        (["--output", os.path.join(__file__, "demo.png")], "cannot write"),
    ],
)
def test_demo_says_in_words_what_is_wrong(arguments, words, demo_packages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.slow
def test_demo_with_a_backend_that_cannot_run(demo_packages, tmp_path):
    done = run("demo", *TINY, "--output", tmp_path / "demo.png", TOKENOPS_BACKEND="triton")
    assert done.returncode == 2 and "the triton backend was asked for but cannot run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_demo_on_a_gpu_that_is_not_there(demo_packages, capsys):
    assert main(["demo", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "package", "extra"), [("demo", "rich", "demo"), ("train", "accelerate", "train")])
def test_a_command_says_what_to_install(command, package, extra):
    script = "import sys; sys.modules[{!r}] = None; from tokenops.__main__ import main; sys.exit(main([{!r}]))"
    done = subprocess.run([sys.executable, "-c", script.format(package, command)], capture_output=True, text=True)
    assert done.returncode == 2 and f"pip install 'tokenops[{extra}]'" in done.stderr and "Traceback" not in done.stderr


# ---- a terminal of 80 columns, and an interruption


@pytest.mark.parametrize("command", ["", "info", "demo", "bench", "slim", "eval", "fidelity", "train"])
def test_help_fits_a_terminal(command, demo_packages, capsys, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, out.splitlines())) <= 80
    assert len(out.split("\n\n")[0].splitlines()) == 1, "the usage is a line"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize("command", ["bench", "train"])
def test_an_interruption_is_one_line(command, demo_packages, tmp_path):
    """Of a process that is at work, whose workers are interrupted with it, as a terminal does."""
    pytest.importorskip("accelerate")
    from PIL import Image

    if command == "train":
        for place in ("train/a", "train/b", "val/a", "val/b"):
            (tmp_path / place).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / place / f"{i}.png")
        small = "--img-size 32 --model-kwargs embed_dim=48 num_heads=3 depth=2 patch_size=8 --device cpu -b 4 -j 1"
        arguments = ["train", "--model", "deit_tiny_patch16_224", *small.split(), "--data-dir", str(tmp_path)]
        arguments += ["--epochs", "100000", "--output", str(tmp_path / "out")]
    else:
        arguments = ["bench", "--model", "deit_tiny_patch16_224", "--method", "evit", "--device", "cpu"]
    script = (
        "import sys, time; from tokenops.__main__ import main; from tokenops.cli import running;"
        "running.interleaved = lambda *_: (print('epoch 2/2', file=sys.stderr, flush=True), time.sleep(600));"
        f"sys.exit(main({arguments!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # what runs behind a shell ignores it
    )
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    lines = [line for line in error.splitlines() if line and not line.startswith("epoch ")]
    assert process.returncode == 130 and len(lines) == 1, error
    assert lines[0].startswith(f"tokenops {command}: interrupted")
    assert ("--resume auto" in lines[0]) is (command == "train")


def test_info_needs_torch_and_numpy_only():
    """The core dependencies alone; nothing that an extra brings is imported."""
    blocked = "timm", "torchvision", "matplotlib", "rich", "PIL", "sklearn", "triton"
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
    script += "from tokenops.__main__ import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- timing


def test_interleaving_rotates_and_keeps_rounds_together():
    order, ticks = [], iter(range(1, 100))
    times = interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"}, 3, lambda call: (call(), next(ticks))[1]
    )
    assert order == list("abcbcacab")
    assert times == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert ratio(times["c"], times["a"]) == Spread.of([3 / 1, 5 / 6, 7 / 8])


def test_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == (3, 2, 4)
    assert Spread.of([7]) == (7, 7, 7)


def test_recorded_kernels():
    import tokenops

    x, w = torch.randn(1, 5, 8), torch.randn(1, 4, 2)
    with recorded_kernels() as names:
        tokenops.soft_aggregate(x, w, prefix=1)
    assert names == {"soft_aggregate_fwd.native"}
    with recorded_kernels() as names, tokenops.use_backend("reference"):
        tokenops.soft_aggregate(x, w, prefix=1)
    assert names == set()


def test_what_first_runs_while_kernels_are_recorded_is_compiled():
    import tokenops

    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    call = torch.compile(lambda x, w: tokenops.soft_aggregate(x, w, prefix=1) + 1, backend=backend, dynamic=False)
    x, w = torch.randn(1, 5, 8), torch.randn(1, 4, 2)
    for _ in range(2):
        with torch.no_grad(), recorded_kernels() as names:
            call(x, w)
        assert len(graphs) == 1 and names == {"soft_aggregate_fwd.native"}


def test_columns_line_up():
    assert columns([("a", "bcd"), ("efg", "h", "i")]) == "  a    bcd\n  efg  h    i"
