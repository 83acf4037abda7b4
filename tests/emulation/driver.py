"""Runs an emulated operator in a process of its own, which has the sanitizers preloaded; see test_emulation.py.

python driver.py MODULE.so OPERATOR IN.npz OUT.npz | planted BUG SEED... | barriers DROPPED SEED...
"""

import ctypes
import json
import sys

import numpy as np


class Array(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("itemsize", ctypes.c_int64),
        ("dimensions", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
        ("kind", ctypes.c_char),
    ]


def emulated(arrays, **options):
    """Runs the module's operator on arrays, written in place, and numbers; gives what its plan chose."""
    given = arrays | {name: np.array(value, np.float64) for name, value in options.items() if type(value) is float}
    given |= {name: np.array(value, np.int64) for name, value in options.items() if type(value) is not float}
    table = (Array * len(given))()
    for row, (name, array) in zip(table, given.items()):
        row.name, row.data, row.itemsize = name.encode(), array.ctypes.data, array.itemsize
        row.dimensions, row.kind = array.ndim, array.dtype.kind.encode()
        row.shape[: array.ndim], row.strides[: array.ndim] = array.shape, array.strides
    results, error = (ctypes.c_int64 * 4)(), ctypes.create_string_buffer(200)
    if module.call(table, len(table), results, error, len(error)):
        raise RuntimeError(error.value.decode())
    return list(results)


def runs_of(data):
    """(number, run), each told before it begins: a sanitizer ends the process."""
    for number, run in enumerate(json.loads(str(data["runs"]))):
        print(f"run {number}: {run}", file=sys.stderr, flush=True)
        yield number, run


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
    for number, (carried, prefix, layout, multiprocessors, seed) in runs_of(data):
        base, tokens, dy, index = (data[f"{name}{number}"] for name in ("base", "tokens", "dy", "index"))
        y = lay(poison(base.shape, base.dtype), layout if layout.isdigit() else "0")
        old, new = data[f"old{number}"], data[f"new{number}"]
        made = poison(old.shape, old.dtype)
        options = dict(prefix=prefix, multiprocessors=multiprocessors, seed=seed)
        forward = {"base": lay(base, layout), "tokens": lay(tokens, layout), "y": y, "index": index}
        width, *_ = emulated(forward | {"old": old, "fresh": new, "made": made}, backward=False, **options)
        given = (base.shape[0], carried + index.shape[1], base.shape[2])
        dbase, dtokens = poison(base.shape, base.dtype), poison(given, base.dtype)
        dold, dnew = poison(old.shape, old.dtype), poison(new.shape, new.dtype)
        backward = {"base": dbase, "tokens": dtokens, "y": lay(dy, layout), "index": index}
        emulated(backward | {"old": dold, "fresh": dnew, "made": old}, backward=True, **options)
        made = {"y": y, "dbase": dbase, "dtokens": dtokens, "width": width, "companion": made}
        made |= {"dold": dold, "dnew": dnew}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def select_tokens(source, target):
    """Forward and backward of every run; `companion` stands for its own gradient."""
    data, results = np.load(source), {}
    for number, (prefix, k, rest, best_first, norm, eps, narrow, layout, multiprocessors, seed) in runs_of(data):
        x, scores, dtokens = (data[f"{name}{number}"] for name in ("x", "scores", "dtokens"))
        B, _, C = x.shape
        wide = np.float64 if x.dtype == np.float64 else np.float32
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
        options = dict(prefix=prefix, rest=rest, best_first=best_first, eps=eps)
        options |= dict(narrow=narrow, multiprocessors=multiprocessors, seed=seed)
        forward = {"x": lay(x, layout), "scores": scores, **made, **given, "from": companion, "to": followed}
        width, slices, *_ = emulated(forward, backward=False, **options)
        gradients = {"dx": poison(x.shape, x.dtype), "dscores": poison(scores.shape, scores.dtype)}
        returned = np.full(companion.shape, 77, companion.dtype)
        backward = {"tokens": lay(dtokens, layout), "scores": scores, "index": made["index"], "dx": gradients["dx"]}
        if rest in (1, 2):
            backward |= {"x": lay(x, layout), "dscores": gradients["dscores"]}
        if rest == 2:
            backward["fused"] = made["fused"]
        if "counts" in given:
            backward["counts"] = given["counts"]
        emulated(backward | {"from": followed, "to": returned}, backward=True, **options)
        made |= {**gradients, "companion": followed, "dcompanion": returned, "width": width, "slices": slices}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def merge_neighbours(source, target):
    """Forward and backward of every run; of the gradients of first and second what each block adds to them."""
    data, results = np.load(source), {}
    names = ("height", "width", "vertical", "prefix", "alpha", "beta", "norm", "eps")
    for number, (*options, learned, layout, multiprocessors, seed) in runs_of(data):
        options = dict(zip(names, options)) | dict(multiprocessors=multiprocessors, seed=seed)
        x, dy = data[f"x{number}"], data[f"dy{number}"]
        wide = np.float64 if x.dtype == np.float64 else np.float32
        weights, given = {}, {}
        for name in ("first", "second", "logits", "sizes", "weight", "bias"):
            if f"{name}{number}" in data:
                (given if name in ("weight", "bias") else weights)[name] = data[f"{name}{number}"]
        if number % 2:
            weights = {name: apart(value) for name, value in weights.items()}
        made = {"y": lay(poison(dy.shape, x.dtype), layout if layout.isdigit() else "0")}
        if options["norm"]:
            statistics = {name: poison(dy.shape[:2], wide) for name in ("mean", "deviation")}
            made |= {"normed": poison(dy.shape, x.dtype), **statistics}
        if "sizes" in weights:
            made["merged"] = poison((dy.shape[0], dy.shape[1] - options["prefix"]), weights["sizes"].dtype)
        forward = {"x": lay(x, layout), **made, **weights, **given}
        width, blocks, threads, _ = emulated(forward, backward=False, **options)
        gradients = {"dx": poison(x.shape, x.dtype)}
        if learned and "logits" in weights:
            gradients["dlogits"] = poison(weights["logits"].shape, weights["logits"].dtype)
        backward = {"y": lay(dy, layout), **weights, **gradients} | ({"x": lay(x, layout)} if learned else {})
        sums = np.empty((0, 2, x.shape[2]), wide)
        if learned and ("first" in weights or "second" in weights):
            _, summed, *_ = emulated(backward, backward=True, **options)  # runs nothing yet
            sums = backward["sums"] = poison((summed, 2, x.shape[2]), wide)
        emulated(backward, backward=True, **options)
        made |= {**gradients, "sums": sums, "width": width, "blocks": blocks, "threads": threads}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def match_bipartite(source, target):
    data, results = np.load(source), {}
    for number, (r, prefix, layout, multiprocessors, seed) in runs_of(data):
        metric = data[f"metric{number}"]
        (B, rows, _), wide = metric.shape, np.float64 if metric.dtype == np.float64 else np.float32
        index = np.full((B, rows - prefix), 2**40)
        edges = poison((B, (rows + 1) // 2 - (prefix + 1) // 2), wide)
        options = dict(prefix=prefix, r=r, multiprocessors=multiprocessors, seed=seed)
        width, blocks, *_ = emulated({"metric": lay(metric, layout), "index": index, "edges": edges}, **options)
        results |= {f"index{number}": index, f"width{number}": width, f"blocks{number}": blocks}
    np.savez(target, **results)


def merge_bipartite(source, target):
    """Of every run the merge and its gradient, the way back from dy (`unmerged`) and its gradient (`sums`)."""
    data, results = np.load(source), {}
    for number, (prefix, eps, norm, layout, multiprocessors, seed) in runs_of(data):
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

        def launch(back, x, y, weighted=False, **others):
            options = dict(prefix=prefix, eps=eps, multiprocessors=multiprocessors, seed=seed)
            return emulated({"x": x, "y": y, "index": index, **others}, back=back, weighted=weighted, **options)

        width, blocks, threads, _ = launch(False, lay(x, layout), weighted=True, **made, **sizes, **given)
        dx, unmerged, sums = (poison(t.shape, x.dtype) for t in (x, x, dy))
        launch(True, dx, lay(dy, layout), merged=made["totals"], **sizes)
        launch(True, unmerged, lay(dy, layout))
        launch(False, lay(x, layout), sums)
        made |= {"dx": dx, "unmerged": unmerged, "sums": sums, "width": width, "blocks": blocks, "threads": threads}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def sum_rows(source, target):
    """Of every run the sums and their gradients, of x as one image."""
    data, results = np.load(source), {}
    for number, (mean, eps, norm, layout, multiprocessors, seed) in runs_of(data):
        names = ("x", "dy", "dest", "order", "offsets")
        x, dy, dest, order, offsets = (data[f"{name}{number}"] for name in names)
        wide, (_, T, C), M = np.float64 if x.dtype == np.float64 else np.float32, x.shape, dy.shape[1]
        each = {"each": data[f"each{number}"]} if f"each{number}" in data else {}
        made = {"y": lay(poison(dy.shape, x.dtype), layout if layout.isdigit() else "0"), "totals": poison(M, wide)}
        given = {}
        if norm:
            made |= {"normed": poison(dy.shape, x.dtype), "mean": poison(M, wide), "deviation": poison(M, wide)}
            given = {name: data[f"{name}{number}"] for name in ("weight", "bias")}
        windows = order.shape[0] // 128
        parts = {"parts": poison((windows, C), wide), "shares": poison(windows, wide)} if windows else {}
        options = dict(multiprocessors=multiprocessors, seed=seed)
        rows = {"dest": dest, "order": order, "offsets": offsets}
        forward = {"x": lay(x, layout), **rows, **made, **parts, **each, **given}
        width, blocks, threads, _ = emulated(forward, back=False, averaged=mean, eps=eps, **options)
        gradients = {"dx": poison(x.shape, x.dtype), "dots": poison(T, wide)}
        totals = {"totals": made["totals"]} if mean else {}
        backward = {"dy": lay(dy, layout), "dest": dest, **gradients, **each, **totals}
        emulated(backward | {"x": lay(x, layout)}, back=True, **options)
        alone = poison(x.shape, x.dtype)
        emulated({"dy": lay(dy, layout), "dest": dest, "dx": alone}, back=True, **options)
        made |= {**gradients, "gathered": alone, "width": width, "blocks": blocks, "threads": threads}
        results |= {f"{name}{number}": value for name, value in made.items()}
    np.savez(target, **results)


def mma(source, target):
    data, results = np.load(source), {}
    for number, (half, seed) in runs_of(data):
        arrays = {name: data[f"{name}{number}"] for name in ("rows", "places", "words", "a", "b", "sums")}
        emulated(arrays, half=half, seed=seed)
        results |= {f"{name}{number}": arrays[name] for name in ("words", "sums")}
    np.savez(target, **results)


def planted(bug, *seeds, barriers=False):
    """What each run leaves in 64 numbers."""
    for seed in seeds:
        out = np.zeros(64, np.int32)
        emulated({"out": out}, bug=int(bug), barriers=barriers, seed=int(seed))
        print(out.tolist())


def barriers(dropped, *seeds):
    planted(dropped, *seeds, barriers=True)


if __name__ == "__main__":
    module = ctypes.CDLL(sys.argv[1])
    globals()[sys.argv[2]](*sys.argv[3:])
