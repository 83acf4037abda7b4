"""The command line as a user meets it: info, the demo on a tiny setting, and errors in words."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tokenops.__main__ import main
from tokenops.cli import columns, info
from tokenops.cli.timing import Spread, interleaved, ratio, recorded_kernels
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


# ---- info


def test_info_names_versions_devices_and_every_operator_on_every_device():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout and "cpu " in done.stdout
    lines = done.stdout.splitlines()
    for op, devices in backends.TABLE.items():
        for device in devices:
            assert any(line.split()[:2] == [op, device] for line in lines), f"{op} on {device} is not in\n{done.stdout}"
    assert "TRITON_INTERPRET=1" in done.stdout, "why Triton does not run on a CPU"
    assert all(ord(c) < 128 for c in done.stdout)


def operators(text):
    return {
        tuple(line.split()[:2]): line
        for line in text.splitlines()
        if line.split()[:1] and line.split()[0] in backends.TABLE
    }


def test_info_says_which_backend_is_chosen(monkeypatch):
    rows = operators(info.text())
    for op in backends.TABLE:
        assert rows[op, "cpu"].split()[2] == backends.choose(op, "cpu", torch.float32)


def test_info_follows_the_environment_and_says_so():
    done = run("info", TOKENOPS_BACKEND="reference")
    rows = operators(done.stdout)
    assert all(rows[op, "cpu"].split()[2] == "reference" for op in backends.TABLE)
    assert "TOKENOPS_BACKEND asks for reference" in done.stdout


def test_info_reports_a_backend_that_cannot_run():
    done = run("info", TOKENOPS_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    assert operators(done.stdout)["soft_aggregate", "cpu"].split()[2] == "error"
    assert "asked for but cannot run" in done.stdout


def test_info_on_a_machine_with_a_gpu(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    monkeypatch.setattr(native, "gpu_capability", lambda: (9, 0))
    text = info.text()
    assert "cuda:0  NVIDIA H200, compute capability 9.0, 139 GiB" in text
    row = operators(text)["soft_aggregate", "cuda"]
    assert row.split()[2] == "triton" and "soft_aggregate has no native path on cuda" in row


# ---- the demo


@pytest.fixture(scope="module")
def demo_packages():
    for package in ("timm", "torchvision", "matplotlib", "PIL", "sklearn"):
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


SMALL = ["--methods", "--model", "sit_lvvit_tiny", "--dense", "lvvit_tiny", "--batch", "2", "--device", "cpu"]


def test_demo(photographs, tmp_path, capsys):
    from PIL import Image

    output = tmp_path / "made" / "demo.png"
    assert main(["demo", *map(str, photographs), *SMALL, "--repeats", "2", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    first, *lines = out.splitlines()
    assert first.startswith("sit_lvvit_tiny: ") and "as fast as lvvit_tiny with 3.50x fewer FLOPs" in first
    assert any(line.startswith("random weights") for line in lines)
    table = {line.strip().split("  ")[0]: line for line in lines}
    assert "197 x 14" in table["tokens x blocks"] and "197 x 1, 99 x 1, 50 x 1, 25 x 11" in table["tokens x blocks"]
    assert table["GMACs an image (GFLOPs / 2)"].split()[-3:] == ["3.46", "0.99", "3.50"]
    assert "soft_aggregate on native" in out and "Medians of 2 interleaved pairs" in out
    assert "top 5" not in out, "random weights predict nothing"
    with Image.open(output) as picture:
        assert picture.size == (1512, 1122)
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_merged_patches_have_their_mean_colour_and_a_line_between_tokens(demo_packages):
    import numpy as np

    from tokenops.cli.picture import mosaic

    photograph = np.zeros((4, 8, 3))
    photograph[:, 4:] = 1.0
    whole, halves = (mosaic(photograph, np.array([tokens])) for tokens in ([0, 0], [0, 1]))
    np.testing.assert_allclose(whole[0, :, 0], [0.325] * 4 + [0.675] * 4)
    np.testing.assert_allclose(halves[0, :, 0], [0.0] * 4 + [1.0] * 4)
    np.testing.assert_allclose(mosaic(0.5 * photograph, np.array([[0, 1]]))[0, :, 0], [0.0] * 4 + [1.0] + [0.5] * 3)


@pytest.mark.slow
def test_demo_compares_the_methods(photographs, tmp_path, capsys):
    """A row a method beside its dense form, and a picture of what each keeps."""
    from PIL import Image

    names = ["sit_deit_tiny", "evit_deit_tiny_patch16_224", "evo_deit_tiny_patch16_224", "ps_deit_tiny_patch16_224"]
    names += ["dps_deit_tiny_patch16_224", "cait_deit_tiny_patch16_224", "evo_levit_128"]
    output = tmp_path / "demo.png"
    arguments = [*map(str, photographs), *SMALL, "--methods", *names, "--repeats", "1", "--output", str(output)]
    assert main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()[:1] and line.split()[0] in names}
    assert list(rows) == names
    assert "98, 49, 24" in rows["sit_deit_tiny"] and "deit_tiny_patch16_224 1.25" in rows["sit_deit_tiny"]
    assert "138, 97, 68" in rows["evit_deit_tiny_patch16_224"] and "98, 98" in rows["evo_deit_tiny_patch16_224"]
    assert "98, 49" in rows["cait_deit_tiny_patch16_224"] and "0.63" in rows["cait_deit_tiny_patch16_224"]
    assert "98, 24, 8" in rows["evo_levit_128"] and "evo_levit_128, all tokens 0.41" in rows["evo_levit_128"]
    assert "select_tokens on native" in out and "restore_tokens on native" in out
    with Image.open(tmp_path / "demo-methods.png") as picture:
        assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_demo_with_weights_predicts(photographs, tmp_path, capsys):
    import timm

    torch.save(timm.create_model("sit_lvvit_tiny").state_dict(), tmp_path / "weights.pth")
    arguments = [str(photographs[0]), *SMALL, "--repeats", "1", "--checkpoint", str(tmp_path / "weights.pth")]
    assert main(["demo", *arguments, "--output", str(tmp_path / "demo.png")]) == 0
    out = capsys.readouterr().out
    assert "top 5 of sit_lvvit_tiny" in out and "top 5 of lvvit_tiny" not in out
    assert "random weights (lvvit_tiny): speed and FLOPs hold\n" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jpg"], "there is no file nowhere.jpg"),
        ([__file__], "is not an image that Pillow can read"),
        ([os.path.dirname(__file__)], "cannot read"),
        (["--model", "sit_lvvit_huge"], "there is no slimmed model 'sit_lvvit_huge'; there are: sit_deit_base"),
        (["--model", "lvvit_small"], "there is no slimmed model 'lvvit_small'"),
        (["--dense", "lvvit_huge"], "timm knows no model 'lvvit_huge'; near it are: lvvit_large"),
        (["--checkpoint", "nowhere.pth"], "there is no file nowhere.pth"),
        (["--checkpoint", __file__], "does not hold weights of sit_lvvit_tiny"),
        (["--pretrained"], "no weights of lvvit_tiny or sit_lvvit_tiny can be downloaded"),
        (["--dense", "sit_lvvit_tiny"], "--model and --dense are both sit_lvvit_tiny"),
        (["--methods", "evit_huge"], "--methods: there is no method's model 'evit_huge'; there are: cait_deit_base"),
        (["--methods", "deit_tiny_patch16_224"], "there is no method's model 'deit_tiny_patch16_224'"),
        (["--batch", "0"], "--batch=0, but it must be at least 1"),
        (["--repeats", "-3"], "--repeats=-3, but it must be at least 1"),
        (["--output", "demo.bmp"], "the name must end in .png"),
        (["--output", os.path.join(__file__, "demo.png")], "cannot write"),
    ],
)
def test_demo_says_in_words_what_is_wrong(arguments, words, demo_packages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.slow
def test_demo_with_a_backend_that_cannot_run(demo_packages, tmp_path):
    done = run("demo", *SMALL, "--output", tmp_path / "demo.png", TOKENOPS_BACKEND="triton")
    assert done.returncode == 2 and "the triton backend was asked for but cannot run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_demo_on_a_gpu_that_is_not_there(demo_packages, capsys):
    assert main(["demo", *SMALL[:-1], "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_says_what_to_install():
    blocked = "import sys; sys.modules['timm'] = None; from tokenops.__main__ import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'tokenops[demo]'" in done.stderr and "Traceback" not in done.stderr


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
