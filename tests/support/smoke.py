"""What every installed tokenops does, whatever the wheel, the Python and the torch: `python smoke.py native`, or, where
there is no compiled code, `python smoke.py reference WHY`. Needs no other package; prints where tokenops is installed.
"""

import subprocess
import sys

import torch

import tokenops
from tokenops.measuring.timing import recorded_kernels


def main(backend: str, why: str = "built with") -> None:
    base, tokens = torch.zeros(1, 4, 2, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)
    upstream = torch.arange(8.0).view(1, 4, 2)
    with recorded_kernels() as ran:
        y = tokenops.restore_tokens(base, tokens, torch.tensor([[1]]))
        y.backward(upstream)
    assert y[0].tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]], y
    assert base.grad[0].tolist() == [[0, 1], [2, 3], [0, 0], [6, 7]], base.grad
    assert tokens.grad[0].tolist() == [[4, 5]], tokens.grad
    assert ran == ({"restore_tokens_fwd.native", "restore_tokens_bwd.native"} if backend == "native" else set()), ran
    info = subprocess.run([sys.executable, "-m", "tokenops", "info"], check=True, stdout=subprocess.PIPE, text=True)
    said = " ".join(info.stdout.split())
    assert tokenops.__version__ in said and why in said, info.stdout
    print(tokenops.__file__)


if __name__ == "__main__":
    main(*sys.argv[1:])
