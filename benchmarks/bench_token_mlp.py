"""token_mlp: the token MLP of SiT's reverse module, at its three numbers of slim tokens."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from comparison import PASSES, nbytes
from tokenops import reference, token_mlp


class Case(NamedTuple):
    M: int
    C: int = 384
    batch: str = "batch"
    main: bool = False

    def __str__(self):
        return f"M{self.M}-C{self.C}" + (f"-{self.batch}" if self.batch != "batch" else "")


CASES = (
    Case(98, main=True),
    Case(98, batch="single"),
    Case(98, batch="middle"),
    Case(49),
    Case(24),
    Case(98, C=192),
)


def published(z, w1, b1, w2, b2):
    """SiT: tokens last, two linear layers, and tokens back."""
    return F.linear(F.gelu(F.linear(z.transpose(2, 1), w1, b1)), w2, b2).transpose(2, 1)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_mlp(bench, compare, case, passes):
    B, N, M, C = bench.batch(case.batch), *((24, 12, 32) if bench.quick else (196, case.M, case.C))
    R = 4 * N

    def inputs():
        return (
            bench.random(B, M, C),
            bench.random(R, M, scale=M**-0.5),
            bench.random(R),
            bench.random(N, R, scale=R**-0.5),
            bench.random(N),
        )

    tensors = inputs()
    y = tensors[0].new_empty(B, N, C)
    forward, backward = nbytes(*tensors, y), nbytes(y, *tensors, *tensors)
    product = 2 * B * C * R * (M + N)  # one forward; backward needs two, and as many again as it computes twice
    peers = {"reference": reference.token_mlp, "published": published}
    if bench.wants_compiled(case.main):
        peers["compiled"] = torch.compile(published, dynamic=False, fullgraph=True)
    compare(
        "token_mlp",
        passes=passes,
        shape=dict(B=B, M=M, N=N, C=C),
        inputs=inputs,
        ours=token_mlp,
        peers=peers,
        bytes=forward + (backward if passes != "forward" else 0),
        flops=product * (1 if passes == "forward" else 3),
    )
