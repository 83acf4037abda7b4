"""Real processes: two under gloo train like one with the double batch; one that is killed goes on as if it was not."""

import json
import multiprocessing
import os
import signal
import socket
import time
import traceback

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

from tokenops.methods.cait.blocks import prunable  # noqa: E402
from tokenops.methods.cait.pruning import ChannelPruner  # noqa: E402
from tokenops.training import FeatureRecalibration, Plain, Pruned, SlowFast, fit, model_of  # noqa: E402
from tokenops.training.data import Images  # noqa: E402

SIZES = dict(embed_dim=32, num_heads=2, img_size=32, num_classes=3)


processes = multiprocessing.get_context("forkserver")  # which imports once for all of them
processes.set_forkserver_preload(["timm", "accelerate", "tokenops.training"])


def start(function, folder, *arguments, **environment):
    process = processes.Process(target=run, args=(function, folder, arguments, environment), daemon=True)
    process.start()
    return process


def run(function, folder, arguments, environment):
    """In the new process; what goes wrong is told in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function(folder, *arguments)
    except BaseException:
        folder.mkdir(exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        raise


def finished(process, folder, timeout=120):
    process.join(timeout)
    error = folder / "error.txt"
    assert process.exitcode == 0, error.read_text() if error.is_file() else f"exit code {process.exitcode}"


def images():
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 3)


def objective(kind):
    torch.manual_seed(1)
    if kind == "frd":
        student = timm.create_model("sit_lvvit_tiny", stage_blocks=(1, 1), stem="linear", **SIZES)
        return FeatureRecalibration(student, timm.create_model("lvvit_tiny", depth=2, stem="linear", **SIZES))
    if kind == "evo_vit":
        return SlowFast(timm.create_model("evo_deit_tiny_patch16_224", depth=3, patch_size=8, **SIZES))
    if kind == "cait":  # compacted behind its first update
        model = prunable(timm.create_model("deit_tiny_patch16_224", depth=2, patch_size=8, **SIZES))
        multiples = dict(qk=4, v=4, hidden=16)
        return Pruned(model, ChannelPruner(model, 0.7, steps=(0, 1), every=1, multiples=multiples))
    model = timm.create_model("sit_lvvit_tiny", stage_blocks=(1, 1), stem="linear", **SIZES)
    return Plain(model)  # its reverse modules get no gradient


class Unreadable(Images):
    """Image 3 cannot be read."""

    def name(self, index):
        return f"image {index}"

    def data(self, index):
        raise OSError("broken")

    def _read(self, index):
        return super()._read(index) if index == 3 else index


def learn(folder, kind, batch_size, accumulation=1):
    """Trains, and writes the gradients of every update."""
    made, gradients = objective(kind), []
    step = made.before_step

    def keep():
        gradients.append({n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None})
        return step()

    made.before_step = keep
    options = dict(epochs=2, lr=1e-3, accumulation=accumulation, clip=1.0, ema=0.9, progress=False, device="cpu")
    loader = DataLoader(images(), batch_size, shuffle=True)
    history = fit(made, loader, eval_loader=DataLoader(images(), 3), output=folder / "run", **options)
    rank = os.environ.get("RANK", "0")
    torch.save({"gradients": gradients, "rows": history.rows}, folder / f"{rank}.pt")


def unreadable(folder):
    pairs = [(torch.randn(3, 8, 8), i % 3) for i in range(6)]
    data = Unreadable([0, 1, 2] * 2, ["a", "b", "c"], True, lambda i: pairs[i][0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    history = fit(Plain(model), DataLoader(data, 1), epochs=2, lr=1e-3, progress=False, device="cpu")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([history.skipped, history.rows]))


def slow(folder):
    """A training that takes a while between its checkpoints, resumed if there is one."""

    class Slow(Plain):
        def after_step(self):
            time.sleep(float(os.environ.get("PAUSE", "0")))
            return False

    torch.manual_seed(1)
    model = timm.create_model("deit_tiny_patch16_224", depth=1, drop_path_rate=0.3, patch_size=8, **SIZES)
    history = fit(
        Slow(model),
        DataLoader(images(), 2, shuffle=True),
        epochs=3,
        lr=1e-3,
        ema=0.9,
        output=folder,
        resume="auto",
        checkpoint_every=1,
        progress=False,
        device="cpu",
    )
    (folder / "rows.json").write_text(json.dumps(history.rows))


def two(function, folder, *arguments):
    """A function in two processes that know of each other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pair = [start(function, folder, *arguments, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(2)]
    try:
        for process in pair:
            finished(process, folder)
    finally:
        for process in pair:
            process.kill()


@pytest.mark.parametrize("kind, accumulation", [("frd", 1), ("evo_vit", 1), ("plain", 2), ("cait", 1)])
def test_two_processes_are_one_with_the_double_batch(tmp_path, kind, accumulation):
    (tmp_path / "two").mkdir()
    two(learn, tmp_path / "two", kind, 4 // accumulation, accumulation)
    learn(tmp_path, kind, 8 // accumulation, accumulation)
    one = torch.load(tmp_path / "0.pt")
    assert len(one["gradients"]) == 2
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"{rank}.pt")
        for ours, theirs in zip(found["gradients"], one["gradients"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert (ours[name] - theirs[name]).abs().max() <= 1e-6, name
        for ours, theirs in zip(found["rows"], one["rows"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    weights, expected = (model_of(folder / "run" / "last.pt") for folder in (tmp_path / "two", tmp_path))
    for name in expected:  # AdamW's first steps are signs: what has no gradient but rounding is left out
        close = (weights[name] - expected[name]).abs() <= 1e-6
        tiny = one["gradients"][-1].get(name, torch.zeros(())).abs() < 1e-5
        assert bool((close | tiny).all()), name
    if kind == "cait":
        assert len(expected["blocks.0.mlp.fc1.bias"]) < 128


def test_processes_tell_each_other_what_they_could_not_read(tmp_path):
    two(unreadable, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    skipped, rows = found[0]
    assert skipped == {"0": ["image 3"], "1": ["image 3"]} and [row["skipped"] for row in rows] == [1, 1]


def test_killed_in_mid_epoch_and_resumed_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(start(slow, whole), whole)
    process, last = start(slow, killed, PAUSE="0.5"), killed / "last.pt"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if last.is_file() and place(last) >= (1, 1):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (1, 1) <= place(last) < (2, 0), "it was killed too late"
    assert not (killed / "rows.json").exists()
    finished(start(slow, killed), killed)
    assert (killed / "rows.json").read_text() == (whole / "rows.json").read_text()
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (killed, whole))
    for part in ("objective", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])


def place(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    return saved["epoch"], saved["step"]
