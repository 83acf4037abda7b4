"""Runs the emulated kernels in a process of its own, which has the sanitizers preloaded; see test_emulation.py.

python driver.py FOLDER_OF_THE_MODULE restore_tokens IN.npz OUT.npz | planted BUG
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


def poison(shape, dtype):
    return np.full(shape, np.nan, dtype)


def restore_tokens(source, target):
    data, results = np.load(source), {}
    for number, (carried, prefix, layout, multiprocessors, seed) in enumerate(json.loads(str(data["runs"]))):
        base, tokens, dy, index = (data[f"{name}{number}"] for name in ("base", "tokens", "dy", "index"))
        y = lay(poison(base.shape, base.dtype), layout if layout.isdigit() else "0")
        arguments = prefix, False, multiprocessors, seed
        width, *_ = emulated.restore_tokens(lay(base, layout), lay(tokens, layout), y, index, *arguments)
        given = (base.shape[0], carried + index.shape[1], base.shape[2])
        dbase, dtokens = poison(base.shape, base.dtype), poison(given, base.dtype)
        emulated.restore_tokens(dbase, dtokens, lay(dy, layout), index, prefix, True, multiprocessors, seed)
        made = {"y": y, "dbase": dbase, "dtokens": dtokens, "width": width}
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

    {"restore_tokens": restore_tokens, "planted": planted}[sys.argv[2]](*sys.argv[3:])
