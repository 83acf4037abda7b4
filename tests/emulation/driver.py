"""Runs the emulated kernels in a process of its own, which has the sanitizers preloaded; see test_emulation.py.

python driver.py FOLDER_OF_THE_MODULE FUNCTION IN.npz OUT.npz | planted BUG
"""

import json
import sys

import numpy as np


def lay(array, layout):
    """The same values behind another layout, in memory that ends where the array does."""
    if layout == "channels first":
        return array.transpose(0, 2, 1).copy().transpose(0, 2, 1)
    if layout == "rows apart":
        room = np.zeros((array.shape[0], array.shape[1], array.shape[2] + 3), array.dtype)
        room[..., : array.shape[2]] = array
        return room[..., : array.shape[2]]
    shift = int(layout)  # bytes beyond the alignment of a fresh allocation
    room = np.zeros(array.nbytes + shift, np.uint8)[shift:]
    placed = np.ndarray(array.shape, array.dtype, buffer=room) if array.nbytes else array.copy()
    placed[...] = array
    return placed


def apart(array):
    """The same values, every other element of their memory."""
    room = np.zeros((*array.shape, 2), array.dtype)
    room[..., 0] = array
    return room[..., 0]


def poison(shape, dtype):
    """NaN, or where these are the bits of bfloat16, its NaN."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0x7FC0, dtype)


def restore_tokens(source, target):
    data, results = np.load(source), {}
    for number, (carried, prefix, layout, multiprocessors, seed) in enumerate(json.loads(str(data["runs"]))):
        base, tokens, dy, index = (data[f"{name}{number}"] for name in ("base", "tokens", "dy", "index"))
        y = lay(poison(base.shape, base.dtype), layout if layout.isdigit() else "0")
        old, new = data[f"old{number}"], data[f"new{number}"]
        made = poison(old.shape, old.dtype)
        arguments = [(old, new, made)], prefix, False, multiprocessors, seed
        width, *_ = emulated.restore_tokens(lay(base, layout), lay(tokens, layout), y, index, *arguments)
        given = (base.shape[0], carried + index.shape[1], base.shape[2])
        dbase, dtokens = poison(base.shape, base.dtype), poison(given, base.dtype)
        dold, dnew = poison(old.shape, old.dtype), poison(new.shape, new.dtype)
        arguments = [(dold, dnew, old)], prefix, True, multiprocessors, seed
        emulated.restore_tokens(dbase, dtokens, lay(dy, layout), index, *arguments)
        made = {"y": y, "dbase": dbase, "dtokens": dtokens, "width": width, "companion": made}
        made |= {"dold": dold, "dnew": dnew}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def select_tokens(source, target):
    """Forward and backward of every run; `companion` stands for its own gradient."""
    data, results = np.load(source), {}
    for number, run in enumerate(json.loads(str(data["runs"]))):
        prefix, k, rest, best_first, norm, dtype, score_dtype, layout, multiprocessors, seed, eps = run
        x, scores, dtokens = (data[f"{name}{number}"] for name in ("x", "scores", "dtokens"))
        B, _, C = x.shape
        wide = np.float64 if dtype == "float64" else np.float32
        rows = prefix + k + (rest != 0)
        made = {
            "tokens": lay(poison((B, rows, C), x.dtype), layout if layout.isdigit() else "0"),
            "index": np.full((B, k), 2**40),
        }
        if norm:
            made |= {
                "normed": poison((B, rows, C), x.dtype),
                "mean": poison((B, rows), wide),
                "deviation": poison((B, rows), wide),
            }
        if rest == 2:
            made["fused"] = poison((B, 1 + C), wide)
        given = {name: data[f"{name}{number}"] for name in ("weight", "bias", "counts") if f"{name}{number}" in data}
        companion = data[f"companion{number}"]
        followed = np.full((B, k), 77, companion.dtype)
        arguments = dtype, score_dtype, rest, best_first, prefix, eps
        forward = {"x": lay(x, layout), "scores": scores, **made, **given, "from": [companion], "to": [followed]}
        width, slices = emulated.select_tokens(forward, *arguments, False, multiprocessors, seed)
        gradients = {"dx": poison(x.shape, x.dtype), "dscores": poison(scores.shape, scores.dtype)}
        returned = np.full(companion.shape, 77, companion.dtype)
        backward = {"tokens": lay(dtokens, layout), "scores": scores, "index": made["index"], "dx": gradients["dx"]}
        if rest in (1, 2):
            backward |= {"x": lay(x, layout), "dscores": gradients["dscores"]}
        if rest == 2:
            backward["fused"] = made["fused"]
        if "counts" in given:
            backward["counts"] = given["counts"]
        backward |= {"from": [followed], "to": [returned]}
        emulated.select_tokens(backward, *arguments, True, multiprocessors, seed)
        made |= {**gradients, "companion": followed, "dcompanion": returned, "width": width, "slices": slices}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def merge_neighbours(source, target):
    """Forward and backward of every run; of the gradients of first and second what each block adds to them."""
    data, results = np.load(source), {}
    for number, run in enumerate(json.loads(str(data["runs"]))):
        *options, learned, layout, multiprocessors, seed = run
        norm, x, dy = options[-2], data[f"x{number}"], data[f"dy{number}"]
        wide = np.float64 if x.dtype == np.float64 else np.float32
        weights, given = {}, {}
        for name in ("first", "second", "logits", "sizes", "weight", "bias"):
            if f"{name}{number}" in data:
                (given if name in ("weight", "bias") else weights)[name] = data[f"{name}{number}"]
        if number % 2:
            weights = {name: apart(value) for name, value in weights.items()}
        made = {"y": lay(poison(dy.shape, x.dtype), layout if layout.isdigit() else "0")}
        if norm:
            statistics = {name: poison(dy.shape[:2], wide) for name in ("mean", "deviation")}
            made |= {"normed": poison(dy.shape, x.dtype), **statistics}
        if "sizes" in weights:
            made["merged"] = poison((dy.shape[0], dy.shape[1] - options[3]), weights["sizes"].dtype)
        forward = {"x": lay(x, layout), **made, **weights, **given}
        width, blocks, threads, _ = emulated.merge_neighbours(forward, *options, False, multiprocessors, seed)
        gradients = {"dx": poison(x.shape, x.dtype)}
        if learned and "logits" in weights:
            gradients["dlogits"] = poison(weights["logits"].shape, weights["logits"].dtype)
        backward = {"y": lay(dy, layout), **weights, **gradients} | ({"x": lay(x, layout)} if learned else {})
        *_, sums = emulated.merge_neighbours(backward, *options, True, multiprocessors, seed)
        made |= {**gradients, "sums": sums, "width": width, "blocks": blocks, "threads": threads}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def match_bipartite(source, target):
    data, results = np.load(source), {}
    for number, (r, prefix, layout, multiprocessors, seed) in enumerate(json.loads(str(data["runs"]))):
        metric = data[f"metric{number}"]
        (B, rows, _), wide = metric.shape, np.float64 if metric.dtype == np.float64 else np.float32
        index = np.full((B, rows - prefix), 2**40)
        edges = poison((B, (rows + 1) // 2 - (prefix + 1) // 2), wide)
        arguments = index, edges, prefix, r, multiprocessors, seed
        width, blocks = emulated.match_bipartite(lay(metric, layout), *arguments)
        results |= {f"index{number}": index, f"width{number}": width, f"blocks{number}": blocks}
    np.savez(target, **results)


def merge_bipartite(source, target):
    """Of every run the merge and its gradient, the way back from dy (`unmerged`) and its gradient (`sums`)."""
    data, results = np.load(source), {}
    for number, (prefix, eps, norm, layout, multiprocessors, seed) in enumerate(json.loads(str(data["runs"]))):
        x, dy, index = (data[f"{name}{number}"] for name in ("x", "dy", "index"))
        if number % 2:
            index = apart(index)
        shape, wide = dy.shape[:2], np.float64 if x.dtype == np.float64 else np.float32
        given = {name: data[f"{name}{number}"] for name in ("weight", "bias") if f"{name}{number}" in data}
        sizes = {"sizes": apart(data[f"sizes{number}"])} if f"sizes{number}" in data else {}
        made = {"y": lay(poison(dy.shape, x.dtype), layout if layout.isdigit() else "0")}
        made |= {name: poison(shape, wide) for name in ("totals", "logs")}
        if norm:
            made |= {name: poison(shape, wide) for name in ("mean", "deviation")}
            made["normed"] = poison(dy.shape, x.dtype)
        grid = multiprocessors, seed
        forward = {"x": lay(x, layout), "index": index, **made, **sizes, **given}
        width, blocks, threads = emulated.merge_bipartite(forward, prefix, True, eps, False, *grid)
        dx, unmerged, sums = (poison(t.shape, x.dtype) for t in (x, x, dy))
        gradient = {"x": dx, "y": lay(dy, layout), "index": index, "merged": made["totals"], **sizes}
        emulated.merge_bipartite(gradient, prefix, False, eps, True, *grid)
        emulated.merge_bipartite({"x": unmerged, "y": lay(dy, layout), "index": index}, prefix, False, eps, True, *grid)
        emulated.merge_bipartite({"x": lay(x, layout), "y": sums, "index": index}, prefix, False, eps, False, *grid)
        made |= {"dx": dx, "unmerged": unmerged, "sums": sums, "width": width, "blocks": blocks, "threads": threads}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def planted(bug):
    out = np.zeros(64, np.int32)
    for seed in range(3):
        emulated.planted(out, int(bug), seed)
    print(out[:32].tolist())


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import emulated

    globals()[sys.argv[2]](*sys.argv[3:])
