"""What no operator takes is refused in words that name the argument; the compiled operators check what they read."""

import inspect

import pytest
import torch
from torch import Tensor

import tokenops

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


def spoilt(value):
    """What no tensor is replaced by: each with the kind of error and its words."""
    other = torch.int64 if value.is_floating_point() else torch.float32
    yield [1.0], TypeError, r"must be (a tensor \(.*|None, a pair .*), but got (list|\[1.0\])"
    yield value[0], ValueError, rf"must have shape \(.*\), but got \({', '.join(map(str, value.shape[1:]))},?\)"
    yield value.to(other), TypeError, f"must be (bool|float16.*|int64.*), but got {other}"
    yield (
        value[:1],
        ValueError,
        r"(has 1 (images|columns|elements), but .* has \d|must have shape \(2, 4\), but got \(1, 4\))",
    )
    yield value.to("meta"), ValueError, "is on meta, but the other tensors are on cpu"


#: of which the first row alone is no mistake, or another's
OF_ONE = ("w1", "w2", "qk_mask", "v_mask", "key_bias")


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_tensors_of_another_kind(operator):
    tensors = {name: value for name, value in good(operator).items() if isinstance(value, Tensor) and value.dim()}
    for number, (name, value) in enumerate(tensors.items()):
        for wrong, error, words in list(spoilt(value))[: 5 if number else 3]:  # the first says what the others must be
            if name in OF_ONE and "images" in words:
                continue
            with pytest.raises(error, match=f"^{operator.__name__}: {name} {words}"):
                operator(**{**good(operator), name: wrong})


HUGE, MORE = 10**400, "one more than there are rows"
#: of every operator that has such an argument
VALUES = {
    "prefix": (
        (MORE, ValueError, r"prefix=\d, but it must be between 0 and the \d tokens"),
        (-1, ValueError, "prefix=-1"),
        (HUGE, ValueError, "prefix=1000"),
        (1.0, TypeError, "prefix must be an int, but got 1.0"),
        (True, TypeError, "prefix must be an int"),
    ),
    "scale": (
        ("1", TypeError, "scale must be a number.* but got '1'"),
        (HUGE, ValueError, "scale is an int of 401 digits"),
    ),
    "norm": (
        (torch.ones(3), TypeError, r"norm must be \(weight, bias, eps\)"),
        ((torch.ones(4), None, 1e-5), ValueError, "norm's weight has 4 channels, but x has 3"),
        ((None, torch.ones(1, 3), 1e-5), ValueError, "norm's bias must have shape"),
        ((None, None, -1.0), ValueError, "norm's eps must be a number of at least 0"),
        ((None, None, "a"), TypeError, "norm's eps must be a number of at least 0"),
        ((None, None, float("nan")), ValueError, "norm's eps must be a number"),
        ((None, None, HUGE), ValueError, "norm's eps is an int of 401 digits"),
    ),
    "r": (
        (2.0, TypeError, "r must be an int, but got 2.0"),
        (-1, ValueError, "r=-1, but of 4 tokens after a prefix of 1 at most 2 can be merged: 0 to 2 is allowed"),
        (3, ValueError, "r=3, but of 4 tokens after a prefix of 1 at most 2 can be merged"),
        (HUGE, ValueError, "r=1000"),
    ),
    "grid": (
        (6, TypeError, r"grid must be \(height, width\), but got 6"),
        ((2, 2.0), TypeError, "grid must be two ints"),
        ((-2, -2), ValueError, r"grid=\(-2, -2\), but its sizes must be at least 0"),
    ),
}


@pytest.mark.parametrize("argument", VALUES)
def test_values_of_what_several_take(argument):
    for operator in OPERATORS:
        for value, error, words in VALUES[argument] if argument in inspect.signature(operator).parameters else ():
            given = good(operator)
            rows = next(iter(given.values())).shape[1]
            with pytest.raises(error, match=f"^{operator.__name__}: {words}"):
                operator(**{**given, argument: rows + 1 if value is MORE else value})


def pairs(*pairs):
    return {"companions": tuple((torch.zeros(2, old), torch.zeros(2, new)) for old, new in pairs)}


Q, WIDE = torch.rand(2, 1, 4, 3), torch.rand(2, 1, 4, 136)
BAD = {
    tokenops.soft_aggregate: [
        ({"prefix": 1}, ValueError, "w has 4 tokens, but x after a prefix of 1 has 3"),
        ({"mask": torch.ones(2, 5) > 0}, ValueError, "mask has 5 tokens, but w has 4"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have one element, but got shape \(2,\)"),
        ({"scale": torch.ones(1).long()}, TypeError, "scale must be a float tensor or a number, but got torch.int64"),
        ({"scale": torch.ones(1).to("meta")}, ValueError, "scale is on meta, but x is on cpu"),
    ],
    tokenops.soft_scatter: [({"z": torch.rand(2, 5, 3)}, ValueError, "w has 2 slim tokens, but z has 5")],
    tokenops.token_mlp: [
        ({"w1": torch.rand(5, 3)}, ValueError, r"w1 has 3 columns, but z \(its tokens\) has 4"),
        ({"w2": torch.rand(6, 4)}, ValueError, r"w2 has 4 columns, but w1 \(its rows\) has 5"),
        ({"b1": torch.rand(6)}, ValueError, r"b1 has 6 elements, but w1 \(its rows\) has 5"),
        ({"b2": torch.rand(5)}, ValueError, r"b2 has 5 elements, but w2 \(its rows\) has 6"),
        ({"w2": torch.rand(6, 5).double()}, TypeError, "w2 must have z's dtype torch.float32, but got torch.float64"),
    ],
    tokenops.masked_channel_attention: [
        ({"k": Q.double()}, TypeError, "k must have q's dtype torch.float32, but got torch.float64"),
        ({"v": Q.repeat(1, 2, 1, 1)}, ValueError, "v has 2 heads, but q has 1"),
        ({"k": Q[..., :2]}, ValueError, "k has 2 channels, but q has 3"),
        ({"v": Q[:, :, :3]}, ValueError, "v has 3 keys, but k has 4"),
        ({"q": Q[:, :0]}, ValueError, "q has no heads"),
        ({"q": WIDE, "k": WIDE, "qk_mask": None}, ValueError, "q has heads of 136 channels, but 1 to 128 are possible"),
        ({"v": Q[..., :0]}, ValueError, "v has heads of 0 channels, but 1 to 128"),
        ({"qk_mask": torch.ones(1, 6)}, ValueError, "qk_mask has 6 channels, but q has 3"),
        ({"v_mask": torch.ones(2, 3)}, ValueError, "v_mask has 2 heads, but v has 1"),
        ({"v_mask": torch.ones(1, 3) > 0}, TypeError, "v_mask must be float16, .* but got torch.bool"),
        ({"key_bias": torch.ones(2, 1, 4, 4)}, ValueError, r"key_bias must have shape \(2 or 1, 1 or 1, 1, 4\), but"),
        ({"key_bias": torch.ones(2, 1, 1, 1)}, ValueError, r"key_bias must have shape .* but got \(2, 1, 1, 1\)"),
        ({"scores": "cls"}, ValueError, "scores='cls', but it must be None, 'class' or 'received'"),
        ({"heads": "all"}, ValueError, "heads='all', but it must be 'each' or 'mean'"),
        ({"q": Q[:, :, :0], "scores": "class"}, ValueError, "scores='class' needs a query, but q has none"),
        ({"return_key_mean": "yes"}, TypeError, "return_key_mean must be True or False"),
        ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
    ],
    tokenops.select_tokens: [
        ({"scores": torch.zeros(2, 6)}, ValueError, "scores has 6 tokens, but x has 5 tokens, 4 after a prefix of 1"),
        ({"k": 300}, ValueError, "k=300, but x has 4 tokens after a prefix of 1: 0 to 4 is allowed"),
        ({"k": -1}, ValueError, "k=-1"),
        ({"k": HUGE}, ValueError, "k=1000"),
        ({"k": 2.0}, TypeError, "k must be an int, but got 2.0"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"rest": "sum"}, ValueError, "rest='sum', but it must be one of 'none', 'weighted', 'mean'"),
        ({"order": "best"}, ValueError, "order='best', but it must be one of 'score', 'index'"),
        ({"normalize": None}, TypeError, "normalize must be True or False"),
        ({"companions": torch.zeros(2, 4)}, TypeError, "companions must be a tuple of tensors, but got Tensor"),
        ({"companions": (torch.zeros(2, 4),) * 5}, ValueError, "companions has 5 entries, but at most 4"),
        ({"companions": (Q[:, 0, 0],)}, ValueError, r"companions\[0\] must have shape \(2, 4\), but got \(2, 3\)"),
        ({"companions": (torch.zeros(2, 4).cfloat(),)}, TypeError, r"companions\[0\] must be real"),
        ({"x": torch.zeros(2, 16386, 1), "scores": torch.zeros(2, 16385)}, ValueError, "at most 16384 are allowed"),
    ],
    tokenops.restore_tokens: [
        ({"tokens": torch.zeros(2, 4, 3).half()}, TypeError, "tokens must have base's dtype"),
        ({"tokens": torch.zeros(2, 4, 2)}, ValueError, "tokens has 2 channels, but base has 3"),
        ({"tokens": torch.zeros(2, 6, 3)}, ValueError, "tokens has 6 rows, but index has 4"),
        ({"index": MADE["index"].int()}, TypeError, "index must be int64, but got torch.int32"),
        ({"companions": Q}, TypeError, r"companions must be a tuple of pairs \(old, new\), but got Tensor"),
        (pairs(*((4, 4),) * 5), ValueError, "companions has 5 entries, but at most 4"),
        (pairs((6, 4)), ValueError, r"companions\[0\]\[0\] must have shape \(2, 4\)"),
        (pairs((4, 3)), ValueError, r"companions\[0\]\[1\] must have shape \(2, 4\)"),
        ({"companions": ((Q[:, 0, :, 0], MADE["index"]),)}, TypeError, r"companions\[0\] must have one dtype"),
    ],
    tokenops.merge_neighbours: [
        ({"grid": (3, 3)}, ValueError, r"grid=\(3, 3\) has 9 tokens, but x has 5 tokens, 4 after a prefix of 1"),
        ({"prefix": 0}, ValueError, "has 4 tokens, but x has 5 tokens, 5 after a prefix of 0"),
        ({"axis": "diagonal"}, ValueError, "axis='diagonal', but it must be one of 'horizontal', 'vertical'"),
        ({"weights": 0.5}, TypeError, r"weights must be None, a pair or logits \(B,H\*W\), but got 0.5"),
        ({"weights": (0.5,)}, TypeError, "weights must be None, a pair or logits"),
        ({"weights": (0.5, "1")}, TypeError, r"weights\[1\] must be a number or a tensor, but got '1'"),
        ({"weights": (HUGE, 1)}, ValueError, r"weights\[0\] is an int of 401 digits"),
        ({"weights": (torch.ones(2), 1)}, ValueError, r"weights\[0\] must have one element or 3, but got 2"),
        ({"weights": (torch.ones(3, 2), 1)}, ValueError, r"weights\[0\] must have shape \(C\)"),
        ({"weights": (torch.ones(3).int(), 1)}, TypeError, r"weights\[0\] must be float16"),
        ({"weights": torch.zeros(2, 5)}, ValueError, r"weights must have shape \(2, 4\), but got \(2, 5\)"),
    ],
    tokenops.unmerge_neighbours: [
        ({"grid": (2, 9)}, ValueError, r"x has 3 tokens, 2 after a prefix of 1, but the grid \(2, 9\) merged .* has 9"),
        ({"merges": "horizontal"}, TypeError, "merges must be a tuple of axes, but got 'horizontal'"),
        ({"merges": ("horizontal", 1)}, ValueError, r"merges\[1\]=1, but it must be one of"),
        ({"mode": "cubic"}, ValueError, "mode='cubic', but it must be one of 'repeat', 'bilinear'"),
    ],
    tokenops.match_bipartite: [
        ({"prefix": 4}, ValueError, "r=1, but of 1 tokens after a prefix of 4 at most 0 can be merged"),
    ],
    tokenops.merge_bipartite: [
        ({"prefix": 4}, ValueError, "r=1, but of 1 tokens after a prefix of 4 at most 0 can be merged"),
        ({"metric": torch.zeros(2, 6, 4)}, ValueError, "metric has 6 tokens, but x has 5"),
        ({"sizes": torch.ones(2, 6)}, ValueError, "sizes has 6 tokens, but x has 5"),
    ],
    tokenops.unmerge_bipartite: [
        ({"index": MADE["index"].int()}, TypeError, "index must be int64, but got torch.int32"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("operator", BAD, ids=lambda operator: operator.__name__)
def test_what_does_not_fit(operator):
    for change, error, words in BAD[operator]:
        with pytest.raises(error, match=f"^{operator.__name__}: .*{words}"):
            operator(**{**good(operator), **change})
            pytest.fail(f"{operator.__name__} took {change}")


def test_every_tensor_argument_is_tried():
    for operator, arguments in OPERATORS.items():
        signature = inspect.signature(operator).parameters
        tensors = {name for name, parameter in signature.items() if "Tensor" in str(parameter.annotation)}
        elsewhere = {"companions", "norm", "scale", "cu_seqlens", "cu_seqlens_k", "r"}
        assert tensors - elsewhere <= set(arguments), operator.__name__
