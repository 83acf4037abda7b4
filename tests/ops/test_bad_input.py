"""What no operator takes is refused in words that name the argument; the compiled operators check what they read."""

import inspect

import pytest
import torch
from torch import Tensor

import tokenops
from support.compiled import needs_amx, needs_compiled
from tokenops.ops.schemas import KERNELS

OPERATORS = {
    tokenops.soft_aggregate: dict(x=(2, 4, 3), w=(2, 4, 2), scale=(), mask="bool"),
    tokenops.soft_scatter: dict(z=(2, 2, 3), w=(2, 4, 2)),
    tokenops.token_mlp: dict(z=(2, 4, 3), w1=(5, 4), b1=(5,), w2=(6, 5), b2=(6,)),
    tokenops.masked_channel_attention: dict(
        q=(2, 1, 4, 3), k=(2, 1, 4, 3), v=(2, 1, 4, 3), qk_mask=(1, 3), v_mask=(1, 3), key_bias=(2, 1, 1, 4),
        key_lengths="lengths",
    ),
    tokenops.select_tokens: dict(x=(2, 5, 3), scores=(2, 4), k=2, counts="lengths"),
    tokenops.restore_tokens: dict(base=(2, 5, 3), tokens=(2, 4, 3), index="index"),
    tokenops.merge_neighbours: dict(x=(2, 5, 3), grid=(2, 2), axis="vertical", weights=(2, 4), sizes=(2, 4)),
    tokenops.unmerge_neighbours: dict(x=(2, 3, 3), grid=(2, 2), merges=("vertical",)),
    tokenops.match_bipartite: dict(metric=(2, 5, 3), r=1),
    tokenops.merge_bipartite: dict(x=(2, 5, 3), metric=(2, 5, 3), r=1, sizes=(2, 5)),
    tokenops.unmerge_bipartite: dict(y=(2, 5, 3), index="index"),
}  # fmt: skip
MADE = {"bool": torch.ones(2, 4).bool(), "lengths": torch.ones(2).long(), "index": torch.arange(4).expand(2, 4)}


def good(operator):
    """Arguments that it takes, by name."""

    def value(name, given):
        if isinstance(given, str) and given in MADE:
            return MADE[given]
        of_numbers = isinstance(given, tuple) and all(isinstance(n, int) for n in given)
        return torch.rand(given) if of_numbers and name != "grid" else given

    return {name: value(name, given) for name, given in OPERATORS[operator].items()}


class Wrapped(Tensor):
    """A tensor that decides for itself what an operator does with it."""

    @staticmethod
    def __new__(cls, tensor):
        return Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise AssertionError("nobody asked before")


def nested(tensor, layout):
    return torch.nested.nested_tensor([tensor, tensor], layout=layout)


KINDS = {
    "sparse": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda t: t.float().reshape(t.shape or 1).to_mkldnn(),
    "nested": lambda t: nested(t, torch.strided),
    "nested jagged": lambda t: nested(t.reshape(-1, 1), torch.jagged),
    "Wrapped": Wrapped,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_tensors_that_are_not_dense(operator, kind):
    operator(**good(operator))
    for name, value in good(operator).items():
        if not isinstance(value, Tensor):
            continue
        word = "Wrapped has a dispatch of its own" if kind == "Wrapped" else f"got a {kind.split()[0]}"
        with pytest.raises(TypeError, match=rf"{operator.__name__}: {name} must be .*{word}"):
            operator(**{**good(operator), name: KINDS[kind](value)})


HUGE = 10**400
NUMBERS = (
    (tokenops.soft_aggregate, "scale", HUGE, ValueError, "scale is an int of 401 digits"),
    (tokenops.soft_scatter, "scale", HUGE, ValueError, "scale is an int of 401 digits"),
    (tokenops.masked_channel_attention, "scale", HUGE, ValueError, "scale is an int of 401 digits"),
    (tokenops.merge_neighbours, "weights", (HUGE, 1), ValueError, r"weights\[0\] is an int of 401 digits"),
    (tokenops.merge_neighbours, "norm", (None, None, HUGE), ValueError, "norm's eps is an int of 401 digits"),
    (tokenops.merge_neighbours, "prefix", HUGE, ValueError, "prefix=1000"),
    (tokenops.select_tokens, "k", HUGE, ValueError, "k=1000"),
    (tokenops.match_bipartite, "r", HUGE, ValueError, "r=1000"),
    (tokenops.masked_channel_attention, "return_key_mean", "yes", TypeError, "return_key_mean must be True or False"),
    (tokenops.masked_channel_attention, "return_lse", 1, TypeError, "return_lse must be True or False"),
    (tokenops.select_tokens, "normalize", "yes", TypeError, "normalize must be True or False"),
    (tokenops.select_tokens, "norm", (None, None, "a"), TypeError, "norm's eps must be a number of at least 0"),
    (tokenops.select_tokens, "norm", (None, None, float("nan")), ValueError, "norm's eps must be a number"),
)


@pytest.mark.parametrize("operator, name, value, error, words", NUMBERS)
def test_numbers_and_flags(operator, name, value, error, words):
    with pytest.raises(error, match=f"{operator.__name__}: {words}"):
        operator(**{**good(operator), name: value})


def test_every_tensor_argument_is_tried():
    for operator, arguments in OPERATORS.items():
        signature = inspect.signature(operator).parameters
        tensors = {name for name, parameter in signature.items() if "Tensor" in str(parameter.annotation)}
        assert tensors - {"companions", "norm", "scale"} <= set(arguments), operator.__name__


# The compiled operators by themselves: whoever calls torch.ops meets no check in Python.

x, index = torch.randn(2, 5, 3), torch.arange(4).expand(2, 4).contiguous()
n, wide = torch.randn(2, 4), torch.randn(2, 5)
q, masks, rows, lengths = torch.randn(2, 2, 4, 3), torch.ones(2, 3), torch.zeros(2, 2, 4), torch.ones(2).long()
CALLS = {
    "select_tokens_fwd": (
        x, n, 2, torch.ones(2).long(), [n], torch.ones(3), torch.ones(3), 1, "mean", True, True, 1e-5
    ),
    "soft_aggregate_fwd": (x, x[:, 1:], None, 1.0, n > 0, 1),
    "soft_aggregate_bwd": (x[:, :4], x, x[:, 1:], None, 1.0, n > 0, None, x[:, 1:], 1),
    "select_tokens_bwd": (
        x[:, :4], [n[:, :2]], index[:, :2], n, torch.ones(2).long(), x, torch.ones(2, 4), 1, "normalized"
    ),
    "restore_tokens_fwd": (x, x[:, 1:3], index[:, :2], 1, [n], [n[:, :2]]),
    "restore_tokens_bwd": (x, index[:, :2], 1, 0, [n]),
    "merge_neighbours_fwd": (
        x, torch.ones(3), torch.ones(1), None, n, torch.ones(3), torch.ones(3), 2, 2, True, 1, 1.0, 1.0, True, 1e-5
    ),
    "merge_neighbours_bwd": (x[:, :3], x, torch.ones(3), torch.ones(1), None, n, 2, 2, True, 1, 1.0, 1.0),
    "merge_bipartite_fwd": (x, index, 4, wide, torch.ones(3), torch.ones(3), 1, True, 1e-5),
    "merge_bipartite_matched": (x, x, 2, wide, torch.ones(3), torch.ones(3), 1, True, 1e-5),
    "merge_bipartite_bwd": (x, index, wide, wide, 1),
    "unmerge_bipartite_fwd": (x, index, 1),
    "unmerge_bipartite_bwd": (x, index, 4, 1),
    "masked_channel_attention_fwd": (q, q, q, masks, masks, rows, lengths, 1.0, "received", False, True),
    "masked_channel_attention_bwd": (
        q, rows, rows, q, q, q, masks, masks, rows, lengths, q, rows, 1.0, "received", False
    ),
}  # fmt: skip
#: (operator, argument, dimension) that is free: what is made is as large, and nothing else is read
FREE = {
    ("masked_channel_attention_fwd", 0, 2),  # queries
    *(("masked_channel_attention_bwd", 10, dim) for dim in range(4)),  # out is not read on a CPU
    ("soft_aggregate_fwd", 0, 2),
    ("soft_aggregate_fwd", 1, 2),
    ("token_mlp_tiles_fwd", 0, 0),
    ("token_mlp_tiles_fwd", 0, 2),
    ("restore_tokens_bwd", 0, 2),
    ("restore_tokens_bwd", 1, 1),
    ("merge_bipartite_matched", 1, 2),
    ("merge_bipartite_bwd", 0, 2),
    ("unmerge_bipartite_fwd", 0, 2),
    ("unmerge_bipartite_fwd", 1, 1),
    ("unmerge_bipartite_bwd", 0, 2),
}


def smaller(value):
    """Each tensor an argument may be replaced by: with one row less of a dimension; (dimension, tensor)."""
    for dim in range(value.dim()):
        yield dim, value.narrow(dim, 0, value.shape[dim] - 1)


@needs_compiled
@pytest.mark.parametrize("name", CALLS)
def test_compiled_operators_check_sizes(name):
    kernel, arguments = KERNELS[name, "native"], CALLS[name]
    kernel(*arguments)
    tried = 0
    for place, value in enumerate(arguments):
        inside = isinstance(value, list)
        for dim, wrong in smaller(value[0]) if inside else smaller(value) if isinstance(value, Tensor) else ():
            changed = [*arguments]
            changed[place] = [wrong] if inside else wrong
            if (name, place, dim) in FREE:
                continue
            tried += 1
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                kernel(*changed)
                pytest.fail(f"{name}: argument {place} with one less in dimension {dim} was taken")
    assert tried


@needs_amx
def test_parts_of_the_cpu_path_check_sizes():
    """Those that operators call."""
    part = torch.ops.tokenops
    z, w1, w2 = (torch.randn(shape).bfloat16() for shape in ((2, 4, 3), (5, 4), (6, 5)))
    dy, b1, b2 = (torch.randn(shape).bfloat16() for shape in ((2, 6, 3), (5,), (6,)))
    calls = {part.token_mlp_tiles_fwd: (z, w1, b1, w2, b2), part.token_mlp_tiles_bwd: (dy, z, w1, b1, w2)}
    for kernel, arguments in calls.items():
        kernel(*arguments)
        for place, value in enumerate(arguments):
            for dim, wrong in smaller(value) if isinstance(value, Tensor) else ():
                if (kernel.__name__, place, dim) in FREE:
                    continue
                with pytest.raises(RuntimeError):
                    kernel(*arguments[:place], wrong, *arguments[place + 1 :])
                    pytest.fail(f"{kernel}: argument {place} with one less in dimension {dim} was taken")
            if isinstance(value, Tensor) and value.is_floating_point():
                with pytest.raises(RuntimeError):
                    kernel(*arguments[:place], value.double(), *arguments[place + 1 :])
