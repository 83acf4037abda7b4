"""masked_channel_attention of packed sequences: each is attended to as if it were alone, whatever is around it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.attention import (
    EVERYTHING,
    INF,
    SCORES,
    as_good_as_plain,
    attention,
    boundaries,
    packed_inputs,
    run,
)
from support.cases import DTYPES, QUICK
from tokenops.ops.backends import use_backend
from tokenops.ops.schemas import kernel

OPERATOR = "masked_channel_attention"  # of the `backend` fixture
#: empty ones at the edges and within, single rows, whole and broken tiles
LENGTHS = (0, 5, 1, 0, 64, 33, 17, 0)


def each(tensors, of_keys=None):
    """The arguments of every sequence alone, as one image."""
    of_q = tensors["cu_seqlens"].tolist()
    of_k = tensors.get("cu_seqlens_k", tensors["cu_seqlens"]).tolist()
    for m, m_end, n, n_end in zip(of_q, of_q[1:], of_k, of_k[1:]):
        q, k, v = (
            tensors[name][a:b].transpose(0, 1).unsqueeze(0)
            for name, a, b in (("q", m, m_end), ("k", n, n_end), ("v", n, n_end))
        )
        alone = {"q": q, "k": k, "v": v} | {name: tensors[name] for name in ("qk_mask", "v_mask") if name in tensors}
        if "key_bias" in tensors:
            alone["key_bias"] = tensors["key_bias"][:, n:n_end].unsqueeze(1).unsqueeze(0)
        yield alone, slice(m, m_end), slice(n, n_end)


# What it means.


def test_a_table(backend, device):
    """Two sequences of equal logits: the mean of their own values, and of what each key received."""
    zeros = torch.zeros(4, 1, 1, device=device)
    v = torch.tensor([2.0, 4.0, 9.0, math.nan], device=device).reshape(4, 1, 1)
    cu = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    out, scores, lse, key_mean = attention(
        zeros, zeros, v, cu_seqlens=cu, max_seqlen=2, scores="received", heads="mean", **EVERYTHING
    )
    assert out.flatten().tolist() == [3.0, 3.0, 9.0, 0.0]
    assert scores.tolist() == [0.5, 0.5, 1.0, 0.0]
    assert lse[0].tolist() == pytest.approx([math.log(2), math.log(2), 0.0, -INF])
    assert key_mean.shape == (4, 1)


def test_reference_is_attention_with_a_mask_of_blocks():
    t = packed_inputs((3, 0, 4), torch.float64, "cpu")
    sequence = torch.tensor([0] * 3 + [1] * 4)
    q, k, v = (t[name].transpose(0, 1) for name in "qkv")
    mask = sequence[:, None] == sequence[None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    weights = torch.softmax((q @ k.transpose(1, 2) * 8**-0.5).masked_fill(~mask, -INF), dim=2)
    with use_backend("reference"):
        out, received = attention(**t, scores="received")
        _, of_first = attention(**t, scores="class")
    torch.testing.assert_close(out.transpose(0, 1), expected)
    torch.testing.assert_close(received, weights.sum(dim=1) / torch.tensor([3.0] * 3 + [4.0] * 4))
    torch.testing.assert_close(of_first, weights[:, 0] + weights[:, 3])


@pytest.mark.parametrize("scores, heads", SCORES)
def test_sequences_are_as_if_alone(scores, heads, backend, device):
    """Values and gradients are those of the same kernels on each."""
    t = packed_inputs(LENGTHS, torch.float32, device, slack=7, everything=True)
    options = dict(scores=scores, heads=heads, **EVERYTHING)
    whole, upstream = run(attention, t, **options)
    dims = [0, *([whole["result 1"].dim() - 1] if scores else []), 1, 0]
    masks = {"dqk_mask": 0.0, "dv_mask": 0.0}
    for alone, queries, keys in each(t):
        if queries.stop == queries.start:
            continue
        rows = [queries, *([keys] if scores else []), queries, keys]
        cut = [u.narrow(d, r.start, r.stop - r.start) for u, d, r in zip(upstream, dims, rows)]
        given = [cut[0].transpose(0, 1).unsqueeze(0), *(u.unsqueeze(0) for u in cut[1:])]
        one, _ = run(attention, alone, given, **options)
        for i, (dim, of) in enumerate(zip(dims, rows)):
            found = whole[f"result {i}"].narrow(dim, of.start, of.stop - of.start)
            expected = one[f"result {i}"][0]
            torch.testing.assert_close(found, expected.transpose(0, 1) if i == 0 else expected, atol=1e-6, rtol=1e-5)
        for what in ("dq", "dk", "dv"):
            found = whole[what][queries].transpose(0, 1)
            torch.testing.assert_close(found, one[what][0], atol=2e-6, rtol=1e-5)
        found = whole["dkey_bias"][:, keys]
        torch.testing.assert_close(found, one["dkey_bias"][0, :, 0], atol=2e-6, rtol=1e-5)
        masks = {name: sum + one[name] for name, sum in masks.items()}
    for name, expected in masks.items():
        torch.testing.assert_close(whole[name], expected, atol=1e-4, rtol=1e-4)


CASES = [
    (dict(lengths=LENGTHS, slack=3), ("received", "mean")),
    (dict(lengths=LENGTHS, slack=3), ("class", "each")),
    (dict(lengths=(5, 0, 40, 1), of_keys=(9, 3, 70, 0), slack=2), ("received", "each")),
    (dict(lengths=(5, 0, 40, 1), of_keys=(9, 3, 70, 0), slack=2), ("class", "mean")),
    (dict(lengths=(64, 64), DK=80, DV=80), ("received", "mean")),
    (dict(lengths=(20, 70), DK=72, DV=40, slack=1), (None, "each")),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow_interpreted(quick=lambda case, dtype: dtype in QUICK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_as_good_as_plain(case, dtype, backend, device):
    """Everything, with masks, bias, and boundaries of keys that are other rows."""
    given, (scores, heads) = CASES[case]
    as_good_as_plain(
        lambda: packed_inputs(dtype=dtype, device=device, everything=True, **given), dtype, scores, heads, draws=2
    )


def test_equal_lengths_are_images(backend, device):
    t = packed_inputs((19,) * 3, torch.float32, device)
    found = attention(**t, scores="class", heads="mean", **EVERYTHING)
    images = {name: t[name].unflatten(0, (3, 19)).transpose(1, 2) for name in "qkv"}
    expected = attention(**images, scores="class", heads="mean", **EVERYTHING)
    flat = [expected[0].transpose(1, 2), expected[1], expected[2].transpose(0, 1), expected[3]]
    for value, right, dims in zip(found, flat, ((0, 1), (0, 1), (1, 2), (0, 1))):
        torch.testing.assert_close(value, right.flatten(*dims), atol=1e-6, rtol=1e-5)


# Whatever is around it.


def test_other_rows_change_nothing(backend, device):
    """Neither the order of the sequences, nor rows behind them, to the bit; nor is their NaN read."""
    lengths = (5, 33, 1, 17)
    t = packed_inputs(lengths, torch.float32, device, everything=True)
    options = dict(scores="received", heads="each", **EVERYTHING)
    whole, upstream = run(attention, t, **options)
    order = (2, 0, 3, 1)
    place = torch.cat([torch.arange(sum(lengths[:i]), sum(lengths[: i + 1])) for i in order]).to(device)
    slack = torch.full((6,), 0, device=device)
    moved = torch.cat((place, slack))
    rows = {name: t[name][moved].clone() for name in "qkv"}
    for value in rows.values():
        value[-6:] = math.nan
    bias = t["key_bias"][:, moved].clone()
    bias[:, -6:] = math.nan
    other = t | rows | {"key_bias": bias, "cu_seqlens": boundaries([lengths[i] for i in order], device)}
    dims = (0, 1, 1, 0)
    given = [u.index_select(d, moved) for u, d in zip(upstream, dims)]
    found, _ = run(attention, other, given, **options)
    T = sum(lengths)
    for i, dim in enumerate(dims):
        assert torch.equal(found[f"result {i}"].narrow(dim, 0, T), whole[f"result {i}"].index_select(dim, place)), i
        rest = found[f"result {i}"].narrow(dim, T, 6)
        assert (rest == (-INF if i == 2 else 0)).all()
    for what, dim in (("dq", 0), ("dk", 0), ("dv", 0), ("dkey_bias", 1)):
        assert torch.equal(found[what].narrow(dim, 0, T), whole[what].index_select(dim, place)), what
        assert (found[what].narrow(dim, T, 6) == 0).all(), what


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_at_all(lengths, backend, device):
    t = packed_inputs(lengths, torch.float32, device, slack=3)
    results = attention(**t, scores="class", **EVERYTHING)
    assert [r.shape for r in results] == [(3, 2, 8), (2, 3), (2, 3), (3, 8)]
    assert all((r == (-INF if i == 2 else 0)).all() for i, r in enumerate(results))


@pytest.mark.parametrize("bias", [(2, 0), (0,)])
def test_a_bias_of_no_rows(bias, backend, device):
    q, cu = torch.zeros(0, 2, 8, device=device), boundaries((), device)
    assert attention(q, q, q, cu_seqlens=cu, max_seqlen=0, key_bias=torch.zeros(bias, device=device)).shape == q.shape


def test_windows_beside_a_long_sequence(backend, device):
    """Boundaries are all there is of windows; max_seqlen may be more than the longest."""
    t = packed_inputs((64,) * 3 + (130,) + (64,), torch.float32, device, H=1)
    out, scores = attention(**t | {"max_seqlen": 4096}, scores="received", heads="mean")
    for alone, rows, _ in each(t):
        one, received = attention(**alone, scores="received", heads="mean")
        torch.testing.assert_close(out[rows].transpose(0, 1), one[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(scores[rows], received[0], atol=1e-7, rtol=1e-5)


def test_a_sequence_of_65536_keys():
    """Within compiled code; of a few queries, as the reference has the matrix."""
    t = packed_inputs((3, 40), torch.float32, "cpu", of_keys=(65536, 10), H=1)
    out, scores = attention(**t, scores="received", heads="mean")
    with use_backend("reference"):
        expected = attention(**t, scores="received", heads="mean")
    torch.testing.assert_close(out, expected[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores, expected[1], atol=1e-7, rtol=1e-4)


# In use.


def test_gradients_of_gradients():
    t = packed_inputs((3, 0, 2), torch.float64, "cpu", H=1, DK=2, DV=2, slack=1)
    bounds = {name: t.pop(name) for name in ("cu_seqlens", "max_seqlen")}
    leaves = [torch.nan_to_num(value).requires_grad_() for value in t.values()]

    def f(q, k, v):
        out, scores, key_mean = attention(q, k, v, **bounds, scores="received", return_key_mean=True)
        return out, scores, key_mean

    torch.autograd.gradcheck(f, leaves)
    torch.autograd.gradgradcheck(f, leaves)


def test_compiled_whole(device):
    """For other boundaries, too."""
    torch._dynamo.reset()
    f = torch.compile(lambda **t: attention(**t, scores="received", heads="mean"), fullgraph=True, backend="aot_eager")
    for lengths in ((3, 9, 5), (8, 1, 8)):
        t = packed_inputs(lengths, torch.float32, device)
        for found, expected in zip(f(**t), attention(**t, scores="received", heads="mean")):
            torch.testing.assert_close(found, expected)


def test_no_value_reaches_the_host():
    """Of fake tensors there is none."""
    with FakeTensorMode():
        t = packed_inputs((3, 9, 5), torch.bfloat16, "cpu")
        for path in ("native", "triton"):
            q = t["q"].transpose(0, 1).unsqueeze(0)
            cu = t["cu_seqlens"]
            call = kernel("masked_channel_attention_fwd", path)
            out, scores, *_ = call(
                q, q, q, None, None, None, None, 1.0, "received", True, False, 0, 0, True, cu, cu, 9, 9
            )
            assert out.shape == (1, 2, 17, 8) and scores.shape == (1, 17)
        q, k, v = (t[name].requires_grad_() for name in "qkv")
        out, scores = attention(q, k, v, cu_seqlens=cu, max_seqlen=9, scores="class")
        (out.sum() + scores.sum()).backward()
        assert q.grad.shape == (17, 2, 8)


def test_vmap_takes_a_sample_at_a_time():
    t = packed_inputs((3, 4), torch.float32, "cpu")
    q = torch.randn(2, *t["q"].shape)
    found = torch.vmap(lambda q: attention(**t | {"q": q}))(q)
    expected = torch.stack([attention(**t | {"q": one}) for one in q])
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu_only
def test_a_graph_runs_other_boundaries(device):
    """Captured for so many rows, it never waits for the device, and replays with any sequences in them."""
    t = packed_inputs((100, 400, 12), torch.bfloat16, device, slack=88, H=4, DK=64, DV=64)
    t = {
        name: torch.nan_to_num(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in t.items()
    }
    t["max_seqlen"] = 600
    attention(**t, scores="received", heads="mean")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, scores = attention(**t, scores="received", heads="mean")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for lengths in ((100, 400, 12), (1, 0, 599), (64, 64, 64)):
        t["cu_seqlens"].copy_(boundaries(lengths, device))
        graph.replay()
        expected = attention(**t, scores="received", heads="mean")
        torch.testing.assert_close((out, scores), expected)


# What is refused.


@pytest.mark.parametrize(
    "given, error, words",
    [
        (dict(cu_seqlens=[0, 3]), TypeError, "cu_seqlens must be a tensor"),
        (dict(cu_seqlens=torch.tensor([0, 3])), TypeError, "cu_seqlens must be int32, but got torch.int64"),
        (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), ValueError, "is empty"),
        (dict(max_seqlen=None), ValueError, "cu_seqlens needs max_seqlen"),
        (dict(max_seqlen=4.0), TypeError, "max_seqlen must be an int, but got 4.0"),
        (dict(max_seqlen=3), ValueError, "max_seqlen=3, but sequence 1 has 4 rows"),
        (
            dict(cu_seqlens=boundaries([3, 9]), max_seqlen=9),
            ValueError,
            r"cu_seqlens\[-1\]=12, but there are 7 rows of q",
        ),
        (dict(cu_seqlens=boundaries([3, -1])), ValueError, r"cu_seqlens\[2\]=2, but it must be at least the 3"),
        (dict(cu_seqlens=1 + boundaries([3])), ValueError, r"cu_seqlens\[0\]=1, but it must be 0"),
        (dict(key_lengths=torch.tensor([3])), ValueError, "key_lengths is not taken with cu_seqlens"),
        (dict(cu_seqlens=None), ValueError, "max_seqlen=4, but it needs cu_seqlens"),
        (dict(cu_seqlens=None, max_seqlen=None, cu_seqlens_k=boundaries([3])), ValueError, "cu_seqlens_k needs"),
        (dict(max_seqlen_k=3), ValueError, "max_seqlen_k=3, but it needs cu_seqlens_k"),
        (
            dict(cu_seqlens_k=boundaries([3]), max_seqlen_k=3),
            ValueError,
            "cu_seqlens_k has 1 sequences, but cu_seqlens",
        ),
        (dict(q=torch.zeros(1, 2, 7, 8)), ValueError, r"q must have shape \(T,H,Dk\)"),
        (dict(k=torch.zeros(6, 2, 8)), ValueError, "k has 6 rows, but q has 7"),
        (dict(key_bias=torch.zeros(6)), ValueError, "key_bias must"),
        (dict(key_bias=torch.zeros(1, 1, 1, 7)), ValueError, r"key_bias must be a tensor \(7,\) or \(2, 7\)"),
        (dict(key_bias=1.0), TypeError, "key_bias must be a tensor"),
    ],
)
def test_bad_input(given, error, words):
    t = packed_inputs((3, 4), torch.float32, "cpu")
    with pytest.raises(error, match=words):
        attention(**t | given)


class Ran(TorchDispatchMode):
    """The overloads of attention that run in the block."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "masked_channel_attention" in str(function):
            self.found.add(str(function).removeprefix("tokenops.masked_channel_attention_"))
        return function(*args, **(kwargs or {}))


def test_one_kernel_runs_all_sequences(backend, device):
    t = packed_inputs((3, 4), torch.float32, device)
    t["q"].requires_grad_()
    with Ran() as ran:
        out = attention(**t)
        out.sum().backward()
    assert ran.found == {f"fwd.{backend}", f"bwd.{backend}"}
