"""The operators that kernels are registered as, called past the public functions: what torch is told of them holds, and
the compiled ones check what they read."""

import pytest
import torch
from torch import Tensor

from support.compiled import ABSENT, needs_amx
from tokenops.ops.backends import COMPILED, COMPILED_ON_CPU, TABLE
from tokenops.ops.schemas import KERNELS, kernel


def given(device):
    """Arguments of each forward kernel, by name; those of the backward kernels follow from them."""
    x, metric, n = (torch.randn(shape, device=device) for shape in ((2, 5, 3), (2, 5, 4), (2, 4)))
    one, channels, wide = (torch.rand(shape, device=device) for shape in (1, 3, (2, 5)))
    index = torch.arange(4, device=device).expand(2, 4).contiguous()
    q, masks, rows = (torch.rand(shape, device=device) for shape in ((2, 2, 4, 3), (2, 3), (2, 2, 4)))
    weights = ((5, 4), (5,), (6, 5), (6,))
    w1, b1, w2, b2 = (torch.rand(shape, device=device) for shape in weights)
    norm = dict(weight=channels, bias=channels)
    return {
        "soft_aggregate_fwd": dict(
            x=x, w=metric[:, 1:], scale=one, factor=1.0, mask=n > 0, prefix=1, cu_seqlens=None, max_seqlen=0
        ),
        "token_mlp_fwd": dict(z=x[:, 1:], w1=w1, b1=b1, w2=w2, b2=b2),
        "masked_channel_attention_fwd": dict(
            q=q, k=q, v=q, qk_mask=masks, v_mask=masks, bias=rows, lengths=torch.tensor([3, 4], device=device),
            scale=1.0, scores="received", mean=False, key_mean=True, heads=0, channels=0, keep=True,
        ),
        "select_tokens_fwd": dict(
            x=x, scores=n, k=2, counts=torch.tensor([1, 2], device=device), companions=[n], **norm, prefix=1,
            rest="normalized", best_first=True, norm=True, eps=1e-5,
        ),
        "restore_tokens_fwd": dict(
            base=x.mT.contiguous().mT, tokens=x[:, 1:3], index=index[:, :2], prefix=1, olds=[n], news=[n[:, :2]]
        ),
        "merge_neighbours_fwd": dict(
            x=x, first=channels, second=one, logits=None, sizes=n, **norm, height=2, width=2, vertical=True, prefix=1,
            alpha=1.0, beta=1.0, norm=True, eps=1e-5,
        ),
        "match_bipartite_fwd": dict(metric=metric, r=1, prefix=1),
        "match_packed_fwd": dict(
            metric=metric.flatten(0, 1), cu_seqlens=torch.tensor([0, 3, 10], device=device).int(), max_seqlen=7,
            prefix=1,
        ),
        "match_packed_places": dict(
            best=metric.flatten(0, 1)[:, 0].contiguous(), target=torch.arange(10, device=device) // 2 * 2 + 1,
            counts=torch.tensor([1, 2], device=device), cu_seqlens=torch.tensor([0, 4, 10], device=device).int(),
            prefix=0,
        ),
        "merge_bipartite_fwd": dict(x=x, index=index, tokens=4, sizes=wide, **norm, prefix=1, norm=True, eps=1e-5),
        "merge_bipartite_matched": dict(x=x, metric=metric, r=2, sizes=wide, **norm, prefix=1, norm=True, eps=1e-5),
        "unmerge_bipartite_fwd": dict(y=x, index=index, prefix=1),
        "sum_rows_fwd": dict(
            x=metric[0], dest=torch.tensor([1, 0, -1, 1, 2], device=device), rows=3, weight=wide[0],
            order=torch.tensor([1, 0, 3, 4, 2], device=device), offsets=torch.tensor([0, 1, 3, 4], device=device),
            most=5, factor=n[0], bias=n[1], mean=True, norm=True, eps=1e-5,
        ),
    }  # fmt: skip


#: with other options: some are not there
ALONE = dict(weight=None, bias=None, norm=False)
VARIANTS = {
    "soft_aggregate_fwd": [
        dict(
            x=torch.randn(1, 12, 3),
            w=torch.randn(1, 12, 4),
            mask=torch.arange(12)[None] != 2,
            cu_seqlens=torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32),
            max_seqlen=7,
        ),
        dict(w=torch.randn(2, 4, 4).mT, scale=None, mask=None),
    ],
    "token_mlp_fwd": [dict(b1=None, b2=None)],
    "masked_channel_attention_fwd": [
        dict(qk_mask=None, v_mask=None, bias=None, lengths=None, scores="class", key_mean=False),
        dict(qk_mask=None, bias=None, scores="class", mean=True),
        dict(
            q=torch.randn(1, 2, 7, 3),
            k=torch.randn(1, 2, 7, 3),
            v=torch.randn(1, 2, 7, 3),
            v_mask=None,
            bias=torch.randn(1, 2, 7),
            lengths=None,
            cu_q=torch.tensor([0, 3, 3, 6], dtype=torch.int32),
            cu_k=torch.tensor([0, 2, 5, 6], dtype=torch.int32),
            max_q=3,
            max_k=3,
        ),
        dict(q=torch.randn(2, 4, 18), k=None, v=None, v_mask=None, bias=None, heads=2, channels=3, mean=True),
    ],
    "select_tokens_fwd": [dict(rest="none", counts=None, **ALONE), dict(rest="mean", bias=None, best_first=False)],
    "merge_neighbours_fwd": [dict(first=None, second=None, sizes=None, alpha=0.5, beta=0.5, **ALONE)],
    "merge_bipartite_fwd": [dict(sizes=None, **ALONE), dict(weight=None, bias=None)],
    "merge_bipartite_matched": [dict(sizes=None, **ALONE)],
    "sum_rows_fwd": [
        dict(weight=None, factor=None, bias=None, norm=False, mean=False, order=torch.arange(5)),
        dict(bias=None, order=torch.arange(4)),
    ],
}


def arguments(name, backend, device, change):
    """By name, of one of `given` with a change; those of a backward kernel are its forward one's, and the results."""
    forward = name if name in given("cpu") else name.replace("_bwd", "_fwd")
    values = given(device)[forward] | change
    values = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
    if forward == name:
        return values
    made = kernel(forward, backend)(*values.values())
    made = (
        dict(zip((r.name or "y" for r in kernel(forward, backend)._schema.returns), made))
        if isinstance(made, (tuple, list))
        else {"y": made}
    )
    if values.get("rest") not in (None, "normalized"):
        values["x"] = made["fused"] = None
    known = made | {f"d{n}": v for n, v in made.items()} | {"carried": 0, "tokens": 4, "merged": made.get("sizes")}
    known |= dict(cu_q=None, cu_k=None, max_q=0, max_k=0) | values | {"dx": made.get("y")}
    return {a.name: known[a.name] for a in kernel(name, backend)._schema.arguments}


def without_images(values):
    """The same of no images, or rows."""
    if "offsets" in values:  # as many places as before, to which nothing goes
        values = values | {"offsets": torch.zeros_like(values["offsets"])}
    alone = {"offsets", "factor", "scale", "first", "second", "weight", "qk_mask", "v_mask", "w1", "b1", "w2", "b2"}
    alone |= {"bias"} if "weight" in values else set()
    alone -= {"weight"} if "dest" in values else set()

    def cut(value):
        return [cut(v) for v in value] if isinstance(value, list) else value[:0] if isinstance(value, Tensor) else value

    bounds = {n: v[:1] for n, v in values.items() if n in ("cu_seqlens", "cu_q", "cu_k") and v is not None}
    return {n: v if n in alone else cut(v) for n, v in values.items()} | bounds


def paths(device):
    """(name, backend) of every kernel that runs on a device."""
    stems = {name: name.rpartition("_")[0] for name, _ in KERNELS}
    return [path for path in KERNELS if path[1] in (*TABLE[stems[path[0]]][device], "composed" * (device == "cpu"))]


def compiled(device):
    """Names of those that are compiled code there."""
    there = COMPILED if device == "cuda" else COMPILED_ON_CPU
    return [name for name, backend in KERNELS if backend == "native" and name.rpartition("_")[0] in there]


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", paths(device), ids="-".join)
    if "compiled_name" in metafunc.fixturenames:
        metafunc.parametrize("compiled_name", compiled(device))


def test_opcheck(path, device):
    """Schema, fake, and what torch.compile makes of it."""
    name, backend = path
    for change in ({}, *VARIANTS.get(name.replace("_bwd", "_fwd"), ())):
        values = arguments(name, backend, device, change)
        torch.library.opcheck(kernel(name, backend), tuple(values.values()))
    torch.library.opcheck(kernel(name, backend), tuple(without_images(values).values()))


def spoilt(value):
    """What a tensor may be replaced by that is none of its kind: with a row less, without a dimension, of integers."""
    for dim in range(value.dim()):
        yield dim, value.narrow(dim, 0, value.shape[dim] - 1)
    yield "no images", value[0]
    yield "int16", value.short()


#: (kernel, argument, what) that is taken: what is made is as large and nothing else is read, or it is converted
TAKEN = {
    *(("soft_aggregate_fwd", *free) for free in (("x", 2), ("w", 2), ("scale", "no images"))),
    ("soft_aggregate_bwd", "scale", "no images"),
    *(("soft_aggregate_bwd", "y", what) for what in (0, 1, 2, "no images", "int16")),  # not read on a CPU
    ("masked_channel_attention_fwd", "q", 2),
    ("masked_channel_attention_fwd", "lengths", "int16"),
    *(("masked_channel_attention_bwd", name, "int16") for name in ("dscores", "dlse", "lengths", "lse")),
    *(("masked_channel_attention_bwd", "out", what) for what in (0, 1, 2, 3, "no images", "int16")),  # nor is it
    ("select_tokens_fwd", "companions", "int16"),
    ("select_tokens_bwd", "dcompanions", "int16"),
    *(("restore_tokens_bwd", *free) for free in (("dy", 2), ("dy", "int16"), ("index", 1), ("dcompanions", "int16"))),
    *(("match_bipartite_fwd", "metric", dim) for dim in range(3)),
    *(("match_packed_fwd", *free) for free in (("metric", 1), ("cu_seqlens", 0))),
    ("merge_bipartite_matched", "metric", 2),
    ("merge_bipartite_bwd", "dy", 2),
    *(("unmerge_bipartite_fwd", *free) for free in (("y", 2), ("index", 1))),
    ("unmerge_bipartite_bwd", "dx", 2),
    ("sum_rows_fwd", "order", 0),  # the last row goes nowhere
    *(("token_mlp_tiles_fwd", "z", dim) for dim in (0, 2)),
}


def refuses_what_is_spoilt(call, good):
    call(*good.values())
    for name, value in good.items():
        inside = isinstance(value, list)
        for what, wrong in spoilt(value[0]) if inside else spoilt(value) if isinstance(value, Tensor) else ():
            if (call._opname, name, what) not in TAKEN:
                with pytest.raises((RuntimeError, ValueError, IndexError)):
                    call(*{**good, name: [wrong] if inside else wrong}.values())
                    pytest.fail(f"{call}: {name} was taken ({what})")


@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_compiled_code_checks_tensors(compiled_name, device):
    refuses_what_is_spoilt(kernel(compiled_name, "native"), arguments(compiled_name, "native", device, {}))


REFUSED = {
    "select_tokens_fwd": [dict(k=6), dict(k=-1), dict(prefix=9), dict(rest="some"), dict(companions=5)],
    "select_tokens_bwd": [dict(x=None), dict(prefix=-1)],
    "restore_tokens_fwd": [dict(prefix=7), dict(prefix=-1), dict(news=0)],
    "restore_tokens_bwd": [dict(carried=2), dict(prefix=9)],
    "merge_neighbours_fwd": [
        dict(prefix=2), dict(prefix=-1), dict(height=-2, width=-2), dict(second=torch.ones(2, 4)),
        dict(logits=torch.ones(2, 4)),
    ],
    "merge_neighbours_bwd": [dict(first=torch.ones(2, 4)), dict(x=torch.ones(2, 5, 3).half())],
    "match_bipartite_fwd": [dict(r=3), dict(r=-1), dict(prefix=8), dict(prefix=-1)],
    "match_packed_fwd": [
        dict(prefix=-1), *(dict(cu_seqlens=torch.tensor(ends).int()) for ends in ([1, 3], [0, 3, 2], [0, 11], []))
    ],
    "match_packed_places": [
        dict(prefix=-1), dict(prefix=3), *(dict(counts=torch.tensor(r)) for r in ([-1, 2], [1, 4], [1, 2, 0])),
    ],
    "merge_bipartite_fwd": [dict(tokens=-1), dict(prefix=2)],
    "merge_bipartite_matched": [dict(r=3), dict(r=-1), dict(prefix=8)],
    "merge_bipartite_bwd": [dict(merged=torch.ones(2, 5).double()), dict(prefix=8)],
    "unmerge_bipartite_fwd": [dict(prefix=-1)],
    "unmerge_bipartite_bwd": [dict(tokens=-1), dict(prefix=2)],
    "sum_rows_fwd": [dict(rows=-1), dict(rows=2), dict(weight=torch.ones(5).double())],
    "sum_rows_bwd": [dict(x=torch.ones(5, 4).half()), dict(totals=torch.ones(3).double())],
}  # fmt: skip


@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
@pytest.mark.parametrize("name", REFUSED)
def test_compiled_code_checks_numbers(name, device):
    """And what does not go together."""
    good = arguments(name, "native", device, {})
    for change in REFUSED[name]:
        wrong = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in change.items()}
        wrong |= {n: good[n] * v for n, v in change.items() if isinstance(good[n], list)}  # so many times
        with pytest.raises(RuntimeError, match="must|exclude"):
            kernel(name, "native")(*{**good, **wrong}.values())
            pytest.fail(f"{name} took {change}")


@needs_amx
def test_parts_of_the_cpu_path_check_tensors():
    """Those that operators call."""
    shapes = dict(dy=(2, 6, 3), z=(2, 4, 3), w1=(5, 4), b1=(5,), w2=(6, 5), b2=(6,))
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    for part in (torch.ops.tokenops.token_mlp_tiles_fwd, torch.ops.tokenops.token_mlp_tiles_bwd):
        call = part.default
        refuses_what_is_spoilt(call, {a.name: tensors[a.name] for a in call._schema.arguments})
