"""The CUDA kernels, compiled for the host and run under AddressSanitizer and UBSan, on any machine."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from support import emulation, neighbours
from support.cases import MERGE, MERGE_LARGE, RESTORE, SELECT, SELECT_LARGE, Merge, Restore
from support.emulation import LAYOUTS, MULTIPROCESSORS, SEED, bits, needs_compiler, tensor, told
from support.runs import double
from support.selection import EPS, OPTIONS, compare, inputs, terms
from support.selection import run as select
from tokenops import reference

pytestmark = needs_compiler


# The checks can fail: each planted bug is caught, and only there.


def test_barriers_shuffles_and_atomics(emulate):
    done = emulate.process("planted", "planted", 0, 1, 2, 3)
    assert done.returncode == 0, done.stderr
    # 64 threads hold 1 each and the first warp sums them; 16 of its lanes vote
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[64 + 16] * 32 + [0] * 32] * 3


BUGS = {
    1: "AddressSanitizer: heap-buffer-overflow",  # a global write behind the end
    2: "AddressSanitizer: heap-buffer-overflow",  # a shared one
    3: "runtime error: member access within misaligned address",
    4: "runtime error: signed integer overflow",
    5: "deadlock: the threads of a block wait at different places",
    6: "lanes of a warp wait for each other with different masks",
    7: "AddressSanitizer: stack-buffer-overflow",  # behind a barrier: switching forgets nothing
    8: "a block takes more than 48 KB of shared memory",
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(emulate, bug):
    done = emulate.process("planted", "planted", bug, SEED)
    assert done.returncode != 0 and BUGS[bug] in done.stderr


@pytest.mark.parametrize("dropped", ("nothing", "written", "read", "lanes"))
def test_a_missing_barrier_is_seen(emulate, dropped):
    """A barrier behind what is written, or read, by other warps; one of a warp alone."""
    number = ("nothing", "written", "read", "lanes").index(dropped)
    done = emulate.process("planted", "barriers", number, *range(SEED, SEED + 8))
    assert done.returncode == 0, done.stderr
    expected = [6 * ((thread + 32) % 64) + 6 for thread in range(64)]
    right = [json.loads(line) == expected for line in done.stdout.splitlines()]
    assert len(right) == 8 and all(right) == (dropped == "nothing"), (SEED, right)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_tensor_cores(emulate, dtype):
    """What the lanes of a warp hold, as the PTX ISA has it for ldmatrix.x4 and mma.m16n8k16."""
    torch.manual_seed(0)
    a, b = (torch.randint(-9, 10, shape).to(dtype) for shape in ((16, 16), (16, 8)))
    before = torch.randint(-9, 10, (16, 8)).float()
    rows, places = torch.randn(32, 8).to(dtype), torch.randperm(32)
    group, thread = (torch.arange(32)[:, None] // 4, torch.arange(32)[:, None] % 4)
    i, j, k = (torch.arange(n)[None] for n in (8, 4, 4))
    row_of_a, column_of_a = torch.where(i // 2 % 2 == 0, group, group + 8), thread * 2 + i % 2 + i // 4 * 8
    row_of_b, column_of_b = thread * 2 + j % 2 + j // 2 * 8, group.expand(32, 4)
    row, column = torch.where(k < 2, group, group + 8), thread * 2 + k % 2

    def words(fragments):
        return bits(fragments.contiguous()).view(np.uint32)

    arrays = {"rows": bits(rows), "places": places.numpy(), "words": np.zeros((32, 4), np.uint32)}
    arrays |= {"a": words(a[row_of_a, column_of_a]), "b": words(b[row_of_b, column_of_b])}
    arrays["sums"] = before[row, column].numpy()
    given = {f"{name}0": array for name, array in arrays.items()}
    results = emulate("mma", given, [(dtype == torch.float16, SEED)])
    assert np.array_equal(results["sums0"], (before + a.float() @ b.float())[row, column].numpy())
    matrices = rows[places].view(4, 8, 4, 2)
    assert np.array_equal(results["words0"], words(matrices.permute(1, 2, 0, 3)).reshape(32, 4))


def test_a_module_is_compiled_once(tmp_path, monkeypatch):
    """By threads that ask at once, and again where something that it includes is another."""
    compiler, log, source = tmp_path / "compiler", tmp_path / "log", tmp_path / "source.cpp"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {emulation.CXX} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(emulation, "CXX", str(compiler))
    source.write_text('#include "header.h"\nint f() { return n; }')
    libraries = []
    for n in range(2):
        (tmp_path / "header.h").write_text(f"constexpr int n = {n};")
        with ThreadPoolExecutor() as pool:
            libraries += pool.map(emulation.compiled, [source] * 3, [tmp_path] * 3)
        assert log.read_text().count(" -o ") == n + 1
    assert len(set(libraries)) == 2 and libraries[-1].exists() and not libraries[0].exists()


# The kernels


def last_of_equals(index, N):
    """The indices without those that replace nothing: out of range (-1 then), or repeated later."""
    index = torch.where((index >= 0) & (index < N), index, -1)
    later = torch.ones(index.shape[1], index.shape[1]).triu(1).bool()
    return torch.where(((index[:, :, None] == index[:, None, :]) & later).any(2), -1, index)


def test_restore_tokens(emulate):
    random = np.random.default_rng(0)
    long = Restore(1, 600, 300, 1, 1, False, "chunks as long as the kernel's table")
    cases = [(case, bad) for case in (*RESTORE, long) for bad in (False, True) if case.B and (case.k or not bad)]
    arrays, runs = {}, []
    for case, bad in cases:
        carried = case.carried * case.prefix
        for dtype in (np.float16, np.float32, np.float64):
            for layout in ("0", "2", "4", "8", "rows apart", "channels first"):
                # a shift must keep elements aligned; the odd layouts are run in one dtype of each case
                if layout.isdigit() and int(layout) % dtype().itemsize and layout != "0":
                    continue
                index = np.stack([random.permutation(case.N)[: case.k] for _ in range(case.B)]).astype(np.int64)
                if bad:
                    index = random.integers(-2, case.N + 3, (case.B, case.k))
                    index[:, -1] = (2**62, -(2**63), case.N)[len(runs) % 3]
                    if case.k > 2 and len(runs) % 2:
                        index[:, 0] = index[:, 1] = 0  # the first token loses its place to the second
                number = len(runs)
                shape = (case.B, case.prefix + case.N, case.C)
                arrays[f"base{number}"] = random.standard_normal(shape).astype(dtype)
                arrays[f"tokens{number}"] = random.standard_normal((case.B, carried + case.k, case.C)).astype(dtype)
                arrays[f"dy{number}"] = random.standard_normal(shape).astype(dtype)
                arrays[f"index{number}"] = index
                arrays[f"old{number}"] = random.standard_normal((case.B, case.N)).astype(dtype)
                arrays[f"new{number}"] = random.standard_normal((case.B, case.k)).astype(dtype)
                runs.append((carried, case.prefix, layout, MULTIPROCESSORS[number % 4], SEED + number))
    results = emulate("restore_tokens", arrays, runs)
    for number, (_, prefix, *_) in enumerate(runs):
        names = (f"{name}{number}" for name in ("base", "tokens", "dy", "index", "old", "new"))
        base, tokens, dy, index, old, new = (torch.from_numpy(arrays[name]) for name in names)
        kept = last_of_equals(index, base.shape[1] - prefix)
        leaves = [t.requires_grad_() for t in (base, tokens, old, new)]
        y, (found,) = reference.restore_tokens(base, tokens, kept, prefix=prefix, companions=((old, new),))
        gradients = torch.autograd.grad((y, found), leaves, (dy, old.detach()), materialize_grads=True)
        results_of = zip(("y", "companion", "dbase", "dtokens", "dold", "dnew"), (y, found, *gradients), strict=True)
        for name, expected in ((name, value.detach()) for name, value in results_of):
            with told(name, number, runs[number], base.shape, base.dtype):
                ours = torch.from_numpy(results[f"{name}{number}"])
                assert torch.equal(ours, expected)
    assert {int(results[f"width{n}"]) for n in range(len(runs))} == {2, 4, 8, 16}  # every kernel has run


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def test_select_tokens(emulate):
    """Every option and dtype, accesses of 16 bytes and of one element, slices of both kinds, rows of fewer threads."""
    arrays, runs, kept = {}, [], []
    for case in (*SELECT, *SELECT_LARGE):
        for option in OPTIONS if case.B else ():
            rest, normalize, order, counts, norm = option
            n = len(runs)
            dtype = DTYPES[n % 4]
            score_dtype = (torch.float32, dtype, torch.float64)[n % 3]
            tensors = inputs(case, dtype, score_dtype, "cpu", counts, norm)
            wide = reference.accumulation_dtype(dtype)
            tensors |= {name: tensors[name].to(wide) for name in ("weight", "bias") if name in tensors}
            if rest == "none" or n % 5 == 0:  # ties, and what is no number
                special = torch.tensor([0.5, 0.25, 0.0, -0.0, -np.inf, np.nan][: 6 if rest == "none" else 2])
                tensors["scores"] = special[torch.randint(len(special), (case.B, case.N))].to(score_dtype)
            upstream = {
                "tokens": torch.randn(case.B, case.prefix + case.k + (rest != "none"), case.C).to(dtype),
                "size": torch.zeros(case.B, case.k, dtype=dtype),
            }
            upstream["normed"] = torch.zeros_like(upstream["tokens"])  # its gradient is torch's own
            kept.append((tensors, option, upstream, case))
            given = {name: t for name, t in tensors.items() if name not in ("size", "source")}
            given |= {"dtokens": upstream["tokens"], "companion": tensors["size"]}
            arrays |= {f"{name}{n}": bits(t.contiguous()) for name, t in given.items()}
            layout = LAYOUTS[n // 2 % 4]
            code = ("none", "weighted", "normalized", "mean").index(
                "normalized" if rest == "weighted" and normalize else rest
            )
            grid = MULTIPROCESSORS[n % 4], SEED + n
            runs.append((case.prefix, case.k, code, order == "score", norm, EPS, n % 3 == 1, layout, *grid))
    results = emulate("select_tokens", arrays, runs)
    for n, (tensors, option, upstream, case) in enumerate(kept):
        with told(n, runs[n], case, option):
            dtype, made = tensors["x"].dtype, {}
            for name in ("tokens", "index", "normed", "mean", "deviation", "dx", "dscores", "companion", "dcompanion"):
                if f"{name}{n}" in results:
                    made[name] = tensor(results[f"{name}{n}"])
            *plain, _ = select(reference.select_tokens, tensors, case.k, case.prefix, option, upstream)
            truth = select(reference.select_tokens, double(tensors), case.k, case.prefix, option, upstream)
            results_of = {name: made[name] for name in ("tokens", "normed", "index") if name in made}
            results_of |= {"size": made["companion"]}
            results_of |= {name: plain[0][name] for name in ("source", "lengths") if name in plain[0]}
            gradients = {name: plain[1][name] for name in plain[1]} | {"dx": made["dx"]}
            if option[0] == "weighted":
                gradients["dscores"] = made["dscores"]
            weighted = option[0] == "weighted" and option[1] and case.N and case.C
            compare(
                (results_of, gradients), plain, truth, terms(tensors, truth, upstream, case.prefix) if weighted else 0.0
            )
            chosen = torch.zeros(case.B, case.N + 1, dtype=torch.bool).scatter(1, made["index"] % (case.N + 1), True)[
                :, : case.N
            ]
            assert torch.equal(made["dcompanion"], tensors["size"].masked_fill(~chosen, 0))
            if "mean" in made and case.C:
                wide = truth[0]["tokens"]
                torch.testing.assert_close(made["mean"].double(), wide.mean(dim=2), rtol=1e-2, atol=1e-2)
                deviation = (wide.var(dim=2, unbiased=False) + EPS).rsqrt()
                torch.testing.assert_close(made["deviation"].double(), deviation, rtol=2e-2, atol=1e-2)
    assert {int(results[f"width{n}"]) for n in range(len(runs))} >= {2, 4, 8, 16}
    assert max(int(results[f"slices{n}"]) for n in range(len(runs))) > 4


LONG = (
    Merge(1, 66, 66, 1, 0, "blocks whose rows fill their table"),
    Merge(1, 2, 3, 2104, 1, "more channels than shared memory keeps factors"),
)


def with_a_number(x, grid, axis, weights, **options):
    return reference.merge_neighbours(x, grid, axis, (weights[0], 0.75), **options)


def test_merge_neighbours(emulate):
    """Every kind of weights in every dtype, along both axes, with accesses of 16 bytes and of one element."""
    torch.manual_seed(0)
    arrays, runs, kept = {}, [], []
    for case in (*MERGE, *MERGE_LARGE, *LONG):
        for option, axis in itertools.product(neighbours.OPTIONS, neighbours.AXES):
            (kind, sized, norm), n = option, len(runs)
            dtype = DTYPES[(n + n // 16) % 4]
            other = (torch.float32, dtype, torch.float64)[n % 3]  # of what comes along
            tensors = neighbours.inputs(case, dtype, "cpu", option)
            for name in ("logits", "sizes"):  # some count nothing, now and then both of a pair
                if name in tensors:
                    tensors[name][torch.rand_like(tensors[name]) < 0.3] = 0 if name == "sizes" else -np.inf
            tensors |= {name: t.to(other) for name, t in tensors.items() if name not in ("x", "weight", "bias")}
            function = with_a_number if kind in ("scalars", "channels") and n % 3 == 0 else reference.merge_neighbours
            plain = neighbours.run(function, tensors, case, axis, option)
            upstream = plain[2] | ({"normed": torch.zeros_like(plain[2]["normed"])} if norm else {})  # torch's own
            kept.append((function, tensors, case, axis, option, upstream))
            wide = reference.accumulation_dtype(dtype)
            given = {name: t.to(wide) if name in ("weight", "bias") else t for name, t in tensors.items()}
            numbers = {"numbers": (0.25, 0.5), "scalars": (1, 1), "channels": (1, 1)}.get(kind, (0.5, 0.5))
            if function is with_a_number:
                numbers = (1, 0.75)
                del given["second"]
            arrays |= {f"{name}{n}": bits(t.contiguous()) for name, t in given.items()}
            arrays[f"dy{n}"] = bits(upstream["y"])
            learned = kind in ("scalars", "channels", "logits") and n % 5 != 0
            layout = LAYOUTS[n // 2 % 4]
            grid = case.H, case.W, axis == "vertical", case.prefix
            runs.append((*grid, *numbers, norm, neighbours.EPS, learned, layout, MULTIPROCESSORS[n // 3 % 4], SEED + n))
    results = emulate("merge_neighbours", arrays, runs)
    for n, (function, tensors, case, axis, option, upstream) in enumerate(kept):
        with told(n, runs[n], case, axis, option):
            dtype, (kind, sized, norm), learned = tensors["x"].dtype, option, runs[n][8]
            plain = neighbours.run(function, tensors, case, axis, option, upstream)
            truth = neighbours.run(function, double(tensors), case, axis, option, upstream)
            ours = {"y": tensor(results[f"y{n}"])}
            if sized:
                ours["sizes"] = tensor(results[f"merged{n}"])
            if norm:
                ours["normed"] = tensor(results[f"normed{n}"])
            gradients = plain[1] | {"dx": tensor(results[f"dx{n}"])}
            cancels = 0.0
            if learned and kind == "logits":
                gradients["dlogits"] = tensor(results[f"dlogits{n}"])
            elif learned:
                sums = tensor(results[f"sums{n}"]).sum(dim=0)
                for name, mine in zip(
                    ("first", "second"), sums if function is reference.merge_neighbours else sums[:1]
                ):
                    mine = mine if tensors[name].shape == mine.shape else mine.sum().reshape(1)
                    gradients[f"d{name}"] = mine.to(tensors[name].dtype)
            if learned:  # rounded as sums are
                small = gradients["dlogits" if kind == "logits" else "dfirst"].dtype
                cancels = neighbours.cancelling(tensors, {"y": upstream["y"]})
                cancels *= torch.finfo(reference.accumulation_dtype(dtype)).eps / torch.finfo(small).eps
                if kind != "logits":  # and as often as there are pairs
                    cancels *= upstream["y"].shape[:2].numel() ** 0.5 / (case.C if kind == "channels" and case.C else 1)
            neighbours.compare((ours, gradients), plain, truth, cancels)
            if option == ("average", False, False):  # exact but for the rounding to nearest
                assert torch.equal(ours["y"], plain[0]["y"])
            if norm and case.C:
                wide = truth[0]["y"]
                mean, deviation = (torch.from_numpy(results[f"{name}{n}"]).double() for name in ("mean", "deviation"))
                torch.testing.assert_close(mean, wide.mean(dim=2), rtol=1e-2, atol=1e-2)
                expected = ((wide - wide.mean(dim=2, keepdim=True)).square().mean(dim=2) + neighbours.EPS).rsqrt()
                torch.testing.assert_close(deviation, expected, rtol=2e-2, atol=1e-2)
    assert {int(results[f"width{n}"]) for n in range(len(runs))} >= {2, 4, 8, 16}
    assert {int(results[f"threads{n}"]) for n, run in enumerate(runs) if run[6]} >= {8, 16, 32}
