"""Every operator at DeiT-S sizes, forward and backward, in bf16 and fp32, on every backend, against fp64.

One process an operator; what torch.empty gives is poisoned; at most twice the error of plain PyTorch is allowed.
"""

import sys

from . import options, sessions

#: the benchmarks at these sizes
SIZES = (
    "batch-C384 or deit-small-forward or received or bias or (M98-C384 and not single and not middle)"
    " or windows-scores or equal-soft_aggregate"
)


def main() -> int:
    device = options(__doc__).device
    only = "single or M98-C384-single" if device == "cpu" else SIZES
    for dtype in ("bfloat16", "float32"):
        choice = ("--do", "check", "--dtype", dtype, "--compile", "none", "-k", only)
        processes = [sessions.OPERATORS] if device == "cpu" else [(file,) for file in sessions.OPERATORS]
        sessions.run("smoke", *(sessions.command("smoke", device, *choice, *files) for files in processes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
