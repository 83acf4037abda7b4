"""python -m fuzz BACKEND OPERATOR SEED [WAY]: one call again; python -m fuzz BACKEND all COUNT: so many of each.

From the repository's root, with PYTHONPATH=.:tests.
"""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

if __name__ == "__main__":
    from support.interpreter import patch_once

    patch_once()
    from fuzz import suite

    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    backend, operator, number, *way = sys.argv[1:]
    suite.poisoned()
    run = suite.Run()
    if operator == "all":
        suite.many(run, backend, int(number), *way)
    elif way == ["refusal"]:
        run.refusal(backend, operator, int(number))
    else:
        print(suite.Check(backend, operator, int(number), suite.MOST[backend], *way))
        run(backend, operator, int(number), *way)
    print(run.summary(backend), flush=True)
    for calls in run.failed.values():
        print(f"\n{len(calls)} times:\n{calls[0]}")
    raise SystemExit(bool(run.failed))
