"""The evidence run: everything worth knowing of the kernels on a GPU, in minutes. benchmarks/GPU.md says how."""

import argparse


def options(what: str | None, *extra: tuple[str, dict]) -> argparse.Namespace:
    """The options of a step."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal at tiny sizes")
    for name, how in extra:
        parser.add_argument(name, **how)
    return parser.parse_args()
