"""The benchmarks run, write valid results, and the report makes tables and plots of them. No time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenops

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def bench(results, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--quick"]
    done = subprocess.run(
        [*command, f"--results={results}", *arguments],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One session over the operators, a second one over a model: its rows are merged into the same file."""
    folder = tmp_path_factory.mktemp("results")
    operators = sorted(path.name for path in BENCHMARKS.glob("bench_*.py") if path.name != "bench_models.py")
    bench(folder, *operators, "-k", "single or M98-C384 or photographs")
    (file,) = folder.glob("*.json")
    before = json.loads(file.read_text())
    bench(folder, "bench_models.py", "-k", "sit_lvvit_xsmall and B8 and eager", "--compile", "none")
    return folder, before, json.loads(file.read_text())


def test_operators_and_models_are_collected_together(tmp_path):
    said = bench(tmp_path, "--collect-only")
    assert "bench_models.py::" in said and "bench_token_mlp.py::" in said and "middle" not in said


def is_spread(value):
    return len(value) == 3 and 0 < value[1] <= value[0] <= value[2]


def test_every_row_is_complete(results):
    _, _, after = results
    operators = {row["operator"] for row in after["rows"].values()}
    assert operators >= {"soft_aggregate", "soft_scatter", "restore_tokens", "token_mlp", "sit_lvvit_xsmall eager"}
    assert operators >= {
        "attention class",
        "attention packed photographs received",
        "soft_aggregate packed photographs",
    }
    for name, row in after["rows"].items():
        assert name.startswith(f"{row['operator']} {row['passes']} ") and name.endswith(f"{row['dtype']} 1 thread")
        assert row["run"] in after["runs"] and row["dtype"] == "float32"
        assert row["kernels"], f"{name}: none of our kernels ran"
        assert is_spread(row["us"]) and row["bytes"] > 0 and row["flops"] >= 0 and row["floor_us"] > 0
        assert row["of_floor"] == pytest.approx(row["floor_us"] / row["us"][0], rel=1e-2)
        assert len(row["peers"]) >= 2
        assert all(is_spread(peer["us"]) and is_spread(peer["ratio"]) for peer in row["peers"].values())


def test_a_run_says_where_its_figures_come_from(results):
    _, _, after = results
    for run in after["runs"].values():
        assert run["torch"] == torch.__version__ and run["threads"] == 1 and run["driver"] is None and run["device"]
        assert run["copy_bytes_per_s"] > 0 and run["flops_per_s_float32"] > 0


def test_attention_says_errors_and_memory(results):
    rows = [row for row in results[2]["rows"].values() if row["operator"] == "attention class"]
    assert len(rows) == 2
    for row in rows:
        assert {"eager", "sdpa flash", "sdpa math", "sdpa + row"} <= set(row["peers"])
        for side in (row, *row["peers"].values()):
            assert 0 < side["error"] < 1e-5 and side["peak_bytes"] > 0
        matrix = 4 * row["shape"]["B"] * row["shape"]["H"] * row["shape"]["N"] ** 2
        assert row["peers"]["eager"]["peak_bytes"] >= 2 * matrix  # the logits and their softmax


def test_a_second_session_keeps_the_rows_of_the_first(results):
    _, before, after = results
    assert all(after["rows"][name] == row for name, row in before["rows"].items())
    assert len(after["rows"]) == len(before["rows"]) + 1 and len(after["runs"]) == 2


def test_a_model_row_says_what_is_realised(results):
    row = results[2]["rows"]["sit_lvvit_xsmall eager forward B2 float32 1 thread"]
    dense = row["peers"]["lvvit_small"]
    assert dense["flop_ratio"] > 1
    assert dense["realised"] == pytest.approx(dense["ratio"][0] / dense["flop_ratio"], rel=1e-2)
    published = row["peers"]["published"]
    assert "realised" not in published and is_spread(published["speed_up"])
    assert row["threads"] == 1 and row["rounds"] >= 3
    assert all(figures["median"] > 0 and figures["moved"] >= 0 for figures in row["machine"].values())


@pytest.mark.slow
def test_a_headline_row(tmp_path):
    """What a plain run takes: dense forms, ours and the published form, compiled with frozen weights."""
    bench(tmp_path, "bench_models.py", "-k", "deit_small and tome and B8")
    (file,) = tmp_path.glob("*.json")
    (row,) = json.loads(file.read_text())["rows"].values()
    assert row["operator"] == "deit_small_patch16_224 tome frozen"
    assert set(row["peers"]) == {"deit_small_patch16_224", "sdpa", "published"}


def session_of(rates):
    """A session that measures for real, where the machine's copies and products have these rates, beat by beat."""
    import measure
    import timers

    class Pulse(timers.Pulse):
        beats = iter(rates)

        def beat_again(self):
            pass

        def beat(self):
            for name in self.rates:
                self.rates[name].append(next(self.beats))

    session = measure.Bench("cpu", torch.float32, quick=False, compiled="none")
    session.budget, session.rounds = 0.01, 1
    return session, Pulse


STEADY = dict(
    shape={"B": 1}, inputs=lambda: (torch.ones(3),), bytes=12, flops=6, ours=lambda x: x, steady=True, device_time=False
)


def test_a_row_of_a_machine_that_moved_is_refused(monkeypatch):
    import measure

    session, pulse = session_of([100.0, 50.0, 116.0, 50.0] * measure.TRIES)
    monkeypatch.setattr(measure, "Pulse", pulse)
    with pytest.raises(pytest.skip.Exception, match="refused, the machine's own rates moved by more than 15%"):
        session.compare("nothing", peers={"dense": lambda x: x}, peer_flops={"dense": 12}, **STEADY)
    assert session.rows == {} and session.text() == session.refused
    assert "copy_bytes_per_s by 16%, flops_per_s by 0%" in session.refused[0]


def test_a_row_is_tried_again(monkeypatch):
    import measure

    session, pulse = session_of([100.0, 50.0, 116.0, 50.0, 100.0, 50.0, 114.0, 49.0])
    monkeypatch.setattr(measure, "Pulse", pulse)
    monkeypatch.setattr(measure.Bench, "copy_bytes_per_s", 1.0)
    monkeypatch.setattr(measure.Bench, "flops_per_s", 1.0)
    row = session.compare("nothing", peers={"dense": lambda x: x}, peer_flops={"dense": 12}, **STEADY)
    assert row["machine"] == {
        "copy_bytes_per_s": {"median": 107.0, "moved": 0.14},
        "flops_per_s": {"median": 49.5, "moved": 0.02041},
    }
    assert not session.refused and row["peers"]["dense"]["flop_ratio"] == 2


def frozen_row(dtype, B, ours, dense, sdpa, published):
    def peer(us, **more):
        return {"us": [us] * 3, "ratio": [us / ours, 0.9 * us / ours, 1.1 * us / ours], **more}

    realised = [{"flop_ratio": 2.0, "realised": us / ours / 2} for us in (dense, sdpa)]
    speed_up = min(dense, sdpa) / published
    return {
        "operator": "vit tome frozen",
        "passes": "forward",
        "dtype": dtype,
        "shape": {"B": B},
        "held": "1 thread",
        "run": "now",
        "us": [ours] * 3,
        "peers": {
            "vit": peer(dense, **realised[0]),
            "sdpa": peer(sdpa, **realised[1]),
            "published": peer(published, speed_up=[speed_up, speed_up - 0.1, speed_up + 0.1]),
        },
    }


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
@pytest.mark.parametrize("gelu", ["", "none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_linear_layer_is_the_layer(monkeypatch, dtype, gelu):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import linears

    weight, bias, x = (torch.randn(*size).to(dtype) for size in ((64, 32), (64,), (98, 32)))
    with torch.inference_mode():
        found = linears.frozen(linears.Layer(weight, bias, 98, gelu))(x)
        right = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        right = torch.nn.functional.gelu(right, approximate=gelu) if gelu else right
    few = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=8e-3, atol=1e-2)
    torch.testing.assert_close(found.double(), right, **few)


def test_a_table_of_frozen_models():
    """A line a row: against timm's model, what the linear layers realise, the published form, and our dense model."""
    run = {"device": "Xeon", "instructions": "AMX", "threads": 2, "driver": None, "torch": "2", "triton": "3"}
    rows = {
        "a": frozen_row("bfloat16", 8, ours=100.0, dense=180.0, sdpa=160.0, published=120.0),
        "b": frozen_row("float32", 1, ours=100.0, dense=150.0, sdpa=200.0, published=120.0),
    }
    rows["a"]["linears"] = {"cap": [1.8, 1.7, 1.9], "flop_ratio": 2.0}
    text = "<!-- results:cpu frozen -->\n<!-- /results -->\n"
    text = report().filled(text, {"cpu-x": {"runs": {"now": run | {"commit": "a"}}, "rows": rows}})
    for line in (
        "batch | FLOP ratio | speed-up | realised | linears | published | by fewer tokens alone | realised",
        "vit tome, 1 thread | bfloat16 | 8 | 2.00 | 1.60 (1.44..1.76) | 0.80 | 0.90 | 1.33 | 1.80 (1.62..1.98) | 0.90",
        "vit tome, 1 thread | float32 | 1 | 2.00 | 2.00 (1.80..2.20) | 1.00 |  | 1.67 | 1.50 (1.35..1.65) | 0.75",
    ):
        assert f" {line} |\n" in text
    assert "- Xeon with AMX; threads 2; torch 2;" in text


def test_a_table_of_gains():
    """A method a line, the fastest first: of a small batch in 16 bits alone."""
    rows = {
        "a": frozen_row("bfloat16", 8, ours=100.0, dense=180.0, sdpa=160.0, published=120.0),
        "b": frozen_row("bfloat16", 8, ours=100.0, dense=180.0, sdpa=260.0, published=120.0),
        "c": frozen_row("bfloat16", 1, ours=100.0, dense=150.0, sdpa=200.0, published=120.0),
        "d": frozen_row("float32", 8, ours=100.0, dense=150.0, sdpa=200.0, published=120.0),
    }
    for row, method in zip(rows.values(), ("tome", "sit", "evit", "evo_vit")):
        row["operator"] = f"deit_small_patch16_224 {method} frozen"
    run = {"device": "Xeon", "threads": 1, "driver": None, "torch": "2", "triton": "3", "commit": "a"}
    text = "<!-- results:cpu gains -->\n<!-- /results -->\n"
    text = report().filled(text, {"cpu-x": {"runs": {"now": run}, "rows": rows}})
    assert [line for line in text.splitlines() if line.startswith("|") and "---" not in line] == [
        "| method | operations saved | times as fast | as published | by fewer tokens alone |",
        "| `sit` | 50% | 2.60 (2.34..2.86) | 2.17 | 1.80 (1.62..1.98) |",
        "| `tome` | 50% | 1.60 (1.44..1.76) | 1.33 | 1.80 (1.62..1.98) |",
    ]


def test_where_figures_come_from_is_said_once_for_each_machine():
    run = {"device": "Xeon", "instructions": "AMX", "threads": 1, "driver": None, "torch": "2", "triton": "3"}
    runs = [
        run | {"commit": "a", "copy_bytes_per_s": 1.5e10, "flops_per_s_float32": 2e11},
        run | {"commit": "b", "copy_bytes_per_s": 1e10},
        run | {"commit": "a", "copy_bytes_per_s": 1.5e10, "flops_per_s_bfloat16": 9e11},
        run | {"commit": "c", "torch": "1"},
    ]
    assert report().origins(runs).replace("\n  ", " ").splitlines() == [
        "- Xeon with AMX; threads 1; torch 2; triton 3; commits a, b; ceilings 10..15 GB/s copy,"
        " 0.2 TFLOP/s float32 matmul, 0.9 TFLOP/s bfloat16 matmul",
        "- Xeon with AMX; threads 1; torch 1; triton 3; commit c; ceilings of the session",
    ]


def test_a_wrong_peer_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measure

    session = measure.Bench("cpu", torch.float32, quick=True, compiled="none")
    sizes = dict(shape={"B": 1}, inputs=lambda: (torch.ones(3),), bytes=12, flops=0)
    with pytest.raises(AssertionError, match="wrong and ours differ in result 0"):
        session.compare("double", ours=lambda x: 2 * x, peers={"wrong": lambda x: 3 * x}, **sizes)
    with pytest.raises(AssertionError, match="result 1"):  # the same values, but no gradient flows
        peers = {"wrong": lambda x: (2 * x).detach() + 0 * x}
        session.compare("double", ours=lambda x: 2 * x, peers=peers, passes="forward+backward", **sizes)
    assert session.rows == {}


def checked(ours, passes="forward+backward"):
    """The row of restore_tokens done in some way, checked against fp64 as an evidence run's smoke step does it."""
    import measure
    from tokenops import reference

    session = measure.Bench("cpu", torch.float32, quick=True, compiled="none", task="check")
    index = torch.stack([torch.randperm(6)[:3] for _ in range(2)])
    fields = dict(shape={"B": 2}, inputs=lambda: (torch.randn(2, 7, 8), torch.randn(2, 3, 8)), bytes=1, flops=0)
    peers = {"reference": lambda base, tokens: reference.restore_tokens(base, tokens, index)}
    return session.compare("restore_tokens", ours=lambda b, t: ours(b, t, index), peers=peers, passes=passes, **fields)


def test_a_check_sees_what_is_right():
    row = checked(tokenops.restore_tokens)
    errors = row["backends"]["native"]["errors"]
    assert set(errors) == {"result 0", "gradient 0", "gradient 1"} and "wrong" not in row
    assert row["backends"]["native"]["kernels"] == ["restore_tokens_bwd.native", "restore_tokens_fwd.native"]


def unwritten(base, tokens, index):
    y = tokenops.restore_tokens(base, tokens, index)
    return torch.cat((y[:1], torch.empty_like(y[1:])))


class Gradient(torch.autograd.Function):
    """Nothing, but a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy


@pytest.mark.parametrize(
    "ours, said",
    (
        (lambda *tensors: 1.01 * tokenops.restore_tokens(*tensors), "result 0 is 1.0e-02 from fp64"),
        (unwritten, "result 0 is nan from fp64"),
        (lambda b, t, i: tokenops.restore_tokens(Gradient.apply(b), t, i), "gradient 0 is 1.0e-02 from fp64"),
        (lambda *tensors: tokenops.reference.restore_tokens(*tensors), "none of its kernels ran"),
    ),
)
def test_a_check_sees_what_is_wrong(ours, said):
    with pytest.raises(AssertionError, match=said):
        checked(ours)


def report():
    spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_fills_the_readme_and_draws(results, tmp_path):
    folder, _, after = results
    stem = next(folder.glob("*.json")).stem
    (folder / "accuracy.json").write_text('{"run": {}, "rows": {"dense": {}}}')  # that of accuracy.py is not read
    assert stem.startswith("cpu")
    readme = tmp_path / "README.md"
    places = "<!-- results:cpu -->\nold\n<!-- /results -->\nbetween\n<!-- results:cpu models -->\n<!-- /results -->\n"
    readme.write_text(f"# title\n{places}end\n")
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--results", str(folder), "--pages", str(readme)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    text = readme.read_text()
    assert text.startswith("# title\n<!-- results:cpu -->\n\n|") and "old" not in text and "between" in text
    assert text.count("| sit_lvvit_xsmall eager, 1 thread |") == 2
    rows = after["rows"].values()
    assert text.count("| soft_aggregate |") == sum(row["operator"] == "soft_aggregate" for row in rows)
    assert text.endswith("<!-- /results -->\nend\n")
    assert report().filled(text, {stem: after}) == text, "filling in again changes nothing"
    for kind in ("operators", "models"):
        assert (folder / f"{stem}-{kind}.png").stat().st_size > 5000


def test_report_leaves_a_place_without_results(capsys):
    text = "<!-- results:nvidia -->\nmeasured elsewhere\n<!-- /results -->"
    assert report().filled(text, {"cpu-x": {"rows": {}, "runs": {}}}) == text
    assert "results:nvidia stays as it is: no result file begins so (cpu-x)" in capsys.readouterr().out


@pytest.mark.slow
def test_accuracy_trains_measures_and_draws(tmp_path):
    """The quick run: all methods and claims; a second one finds every cell there, and tells the same."""
    page = tmp_path / "results.md"
    page.write_text("<!-- accuracy -->\nold\n<!-- /accuracy -->\n")
    paths = os.pathsep.join((str(BENCHMARKS), str(BENCHMARKS.parent / "examples")))
    command = [sys.executable, "-m", "accuracy", "--quick", "--levels", "0.6", "0.25", "--rounds", "2"]
    command += ["--cells", str(tmp_path / "cells"), "--results", str(tmp_path), "--page", str(page)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "accuracy.json").read_text())
    rows, dense = found["rows"], found["rows"]["dense, 1"]
    assert 80 < dense["accuracy"]["mean"] <= 100
    for level in (0.6, 0.25):
        for name in ("SiT with FRD", "ToMe, not trained", "narrower dense"):
            row = rows[f"{name}, {level}"]
            assert row["macs"] == pytest.approx(level * dense["macs"], rel=0.25) and is_spread(row["speed_up"])
            low, mean, high = (row["accuracy"][part] for part in ("low", "mean", "high"))
            assert 0 <= low <= mean <= high <= 100 and len(row["accuracy"]["seeds"]) == 1
    assert {claim["outcome"] for claim in found["claims"]} <= {"not shown", "no difference shown"}, "of a single seed"
    assert found["run"]["data"] == "digits" and found["run"]["seeds"] == 1
    text = page.read_text()
    assert "| SiT with FRD |" in text and "old" not in text
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and "images/s" not in again.stderr, "nothing is trained a second time"
    told = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["accuracy"] for row in told["rows"].values()] == [row["accuracy"] for row in rows.values()]


@pytest.mark.slow
def test_rotary_tells_every_choice():
    command = [sys.executable, str(BENCHMARKS / "rotary.py"), "--seeds", "1", "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 13 and lines[0].startswith("dense: ")
    for line in lines:
        accuracy, spread = (float(part) for part in line.split(": ")[1].split("  (")[0].split(" +- "))
        assert 0 <= accuracy <= 100 and spread == 0
