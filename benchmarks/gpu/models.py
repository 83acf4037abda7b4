"""Whole models, dense and slimmed, ours and as published: eager, compiled, and each as a CUDA graph."""

import sys

from . import options, sessions

#: of a rehearsal
FORMS = "deit_small_patch16_224-tome-B1 or deit_small_patch16_224-sit-B1"


def main() -> int:
    device = options(__doc__).device
    only = ("-k", f"({FORMS}) and not compiled", "--compile", "none") if device == "cpu" else ()
    sessions.run("models", sessions.command("models", device, *only, sessions.MODELS, timeout=200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
