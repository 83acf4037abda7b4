"""masked_channel_attention in use: layouts, dtypes, autograd and compile modes, memory, and its errors."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tokenops
from support.attention import EVERYTHING, FLOATS, SCORES, attention, check, inputs, limited, run
from support.cases import ATTEND, DTYPES, Attend
from support.compiled import needs_compiled
from support.made import Sizes
from support.runs import double
from support.threads import by_threads
from tokenops import reference
from tokenops.ops import native

OPERATOR = "masked_channel_attention"  # of the `backend` fixture


# Layouts, dtypes, modes.


def test_packed_projections_are_read_in_place(backend, device):
    """q, k and v as views of one projection, with head dims that differ, and of other layouts."""
    case = ATTEND[4]
    t = inputs(case, torch.float32, device)
    expected, upstream = run(attention, t, scores="class")
    packed = torch.cat([t[name].transpose(1, 2).flatten(2) for name in "qkv"], dim=2)
    q, k, v = packed.split([2 * 40, 2 * 40, 2 * 52], dim=2)
    views = {name: x.unflatten(2, (2, -1)).transpose(1, 2) for name, x in zip("qkv", (q, k, v))}
    turned = {name: x.transpose(2, 3).contiguous().transpose(2, 3) for name, x in t.items()}
    wide = {}
    for name, x in t.items():
        wide[name] = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"), device=device)[..., 1::2]
        wide[name].copy_(x)
    for layout in (views, turned, wide):
        results = attention(**layout, scores="class")
        torch.testing.assert_close(results[0], expected["result 0"])
        torch.testing.assert_close(results[1], expected["result 1"])
        again, _ = run(attention, layout, [upstream[0].transpose(1, 2).contiguous().transpose(1, 2), upstream[1]],
                       scores="class")  # fmt: skip
        for what, right in expected.items():
            torch.testing.assert_close(again[what], right)
    assert attention(**t).transpose(1, 2).is_contiguous()  # heads are put side by side without a copy


def test_offsets_beyond_32_bits(backend, device, much_memory):
    """Keys 2**31 elements apart: memory of which only a few pages are touched."""
    step = 2**31
    k = torch.empty(step + 4, dtype=torch.float32, device=device).as_strided((1, 1, 2, 4), (0, 0, step, 1))
    k.copy_(torch.randn(1, 1, 2, 4))
    q, v = torch.randn(1, 1, 2, 4, device=device), torch.randn(1, 1, 2, 4, device=device)
    torch.testing.assert_close(attention(q, k, v), attention(q, k.contiguous(), v))


def test_tf32_where_torch_allows_it(backend, device):
    t, matmul = inputs(ATTEND[4], torch.float32, device), torch.backends.cuda.matmul
    exact, before = attention(**t), matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        found = attention(**t)
    finally:
        matmul.fp32_precision = before
    assert (found - exact).norm() <= 2e-3 * exact.norm()
    assert torch.equal(found, exact) == (device == "cpu")


def test_masks_and_bias_of_another_dtype(backend, device):
    """fp32 gates on bf16 tokens: each gradient has its own tensor's dtype."""
    t = inputs(ATTEND[3], torch.float32, device, everything=True)
    t = {name: value.bfloat16() if name in "qkv" else value for name, value in t.items()}
    results, _ = run(attention, t, scores="class", **EVERYTHING)
    assert [results[f"result {i}"].dtype for i in range(4)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]
    for name in FLOATS:
        assert results[f"d{name}"].dtype == t[name].dtype and results[f"d{name}"].shape == t[name].shape
    truth = reference.masked_channel_attention(**double(t), scores="class")[0]
    torch.testing.assert_close(results["result 0"].double(), truth, rtol=3e-2, atol=3e-2)


@pytest.mark.slow_interpreted
def test_deterministic(backend, device):
    t = inputs(ATTEND[4], torch.float32, device, everything=True)
    first, upstream = run(attention, t, scores="received", heads="mean", **EVERYTHING)
    second, _ = run(attention, t, upstream, scores="received", heads="mean", **EVERYTHING)
    assert all(torch.equal(first[what], second[what]) for what in first)


@pytest.mark.parametrize(("scores", "heads"), SCORES)
def test_the_matrix_never_exists(scores, heads, backend, device):
    """No tensor of H * Nq * Nk elements is made, forward or backward; plain PyTorch makes several."""
    case = Attend(1, 1, 1024, 1500, 2, 2, "the matrix is by far the largest")
    t = inputs(case, torch.float32, device)
    if backend == "triton":  # interpreted: only the sizes matter
        case = Attend(1, 1, 100, 200, 1, 1, "as above, in few tiles")
        t = inputs(case, torch.float32, device)
    q, k, v = t.values()
    rest = (None,) * 4
    room = "triton" if backend == "triton" else "cpu"  # of native code no memory is seen: composed in its place
    forward = import_module(f"tokenops.ops.{room}.masked_channel_attention").masked_channel_attention_fwd
    behind = "_bwd" * (backend == "triton")
    backward = import_module(f"tokenops.ops.{room}.masked_channel_attention{behind}").masked_channel_attention_bwd
    kind = scores or "none"
    with Sizes() as sizes:
        out, score, lse, _ = forward(q, k, v, *rest, 1.0, kind, heads == "mean", False)
        backward(out, score if scores else None, None, q, k, v, *rest, out, lse, 1.0, kind, heads == "mean")
    assert 0 < max(sizes.found) <= case.M * case.N // 3
    with Sizes() as sizes:
        reference.masked_channel_attention(q, k, v)
    assert max(sizes.found) >= case.M * case.N


def test_compiled_attention_is_used(ran_kernels):
    """Where there is compiled code the CPU path runs it, in the dtypes it takes."""
    there = native.why_not("cpu") is None
    for dtype in (*DTYPES, torch.float64):
        with ran_kernels() as names, tokenops.use_backend("native"):
            run(attention, inputs(ATTEND[0], dtype, "cpu"))
        path = "native" if there and dtype != torch.float64 else "composed"
        assert names == {f"masked_channel_attention_fwd.{path}", f"masked_channel_attention_bwd.{path}"}


ISAS = [(isa, torch.bfloat16) for isa in ("amx", "avx512bf16")]  # which serve no other
ISAS += [(isa, dtype) for isa in ("avx512", "avx2", "baseline") for dtype in DTYPES]


@pytest.mark.parametrize("isa, dtype", ISAS, ids=str)
def test_every_instruction_set(isa, dtype):
    """Of those this machine has, each is as good as plain PyTorch; a thousand keys are summed in parts."""
    long = Attend(1, 1, 3, 1100, 9, 11, "keys in several chunks")
    few = (2, 7) if dtype == torch.float32 else ()  # so few numbers that plain PyTorch may be right by luck
    with limited(isa, dtype):
        for case in (*(ATTEND[i] for i in (*few, 3, 4, 8, 9, 10)), long):
            check(case, dtype, "cpu", "received" if case.M else None, "each", everything=True, draws=8)


@needs_compiled
def test_an_instruction_set_is_one_there_is():
    before = native.attention_isa(torch.float32)
    with pytest.raises(ValueError, match="'sse9', but it must be one of amx, .*baseline"):
        native.limit_cpu_isa("sse9").__enter__()
    with native.limit_cpu_isa("baseline"):
        assert native.attention_isa(torch.float32) == "baseline"
    assert native.attention_isa(torch.float32) == before and native.attention_isa(torch.float64) is None


@needs_compiled
def test_the_best_instruction_set_that_the_machine_has():
    """By what Linux says of the processor: each runs where it is the best allowed, and floats by the best of theirs."""
    cpuinfo, compiler = Path("/proc/cpuinfo"), re.search(r"\) (\d+)\.\d+\.\d+$", native.info()["compiler"])
    if not cpuinfo.exists() or compiler is None or int(compiler[1]) < 11:
        pytest.skip("what the processor has is not known here, or the compiler does not take all of it")
    flags = {"amx": "amx_bf16", "avx512bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}
    found = cpuinfo.read_text().split()
    for isa in (isa for isa, flag in flags.items() if flag in found):
        with native.limit_cpu_isa(isa):
            assert native.attention_isa(torch.bfloat16) == isa
            for dtype in (torch.float32, torch.float16):
                assert native.attention_isa(dtype) == ("avx2" if isa == "avx2" else "avx512")


def test_threads_change_nothing():
    """Few heads are split between threads: bit for bit the same."""
    t = inputs(Attend(1, 1, 150, 70, 24, 40, "one head, many queries"), torch.float32, "cpu")
    by_threads(lambda: attention(**t, scores="class", return_lse=True), 1, 3)


PACKED = Attend(2, 3, 17, 17, 6, 10, "a packed projection whose v is wider")


def packed(case, dtype, device):
    """Arguments of both entries: q, k and v, and the same side by side."""
    t = inputs(case, dtype, device, everything=True)
    q, k, v = (t.pop(name) for name in "qkv")
    return (q, k, v), torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=2), t


@pytest.mark.parametrize("case", [PACKED, Attend(2, 2, 5, 5, 8, 8, "of one width")], ids=str)
def test_a_packed_projection_is_the_same(case, backend, device):
    """Values, and one gradient of all three; by the reference and without gradients too."""
    (q, k, v), qkv, rest = packed(case, torch.float32, device)
    options = dict(rest, scale=0.3, scores="received", heads="mean", return_lse=True, return_key_mean=True)
    apart = [t.requires_grad_() for t in (q, k, v)]
    together = qkv.requires_grad_()
    right = attention(*apart, **options)
    found = tokenops.masked_channel_attention_qkv(together, q.shape[1], head_dim=q.shape[3], **options)
    upstream = [torch.randn_like(t) for t in right]
    expected = torch.autograd.grad(right, apart, upstream)
    (gradient,) = torch.autograd.grad(found, together, upstream)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gradient, torch.cat([g.transpose(1, 2).flatten(2) for g in expected], dim=2), rtol=1e-5, atol=1e-6
    )
    with torch.inference_mode():
        plain = tokenops.masked_channel_attention_qkv(qkv, q.shape[1], head_dim=q.shape[3])
        torch.testing.assert_close(plain, attention(q, k, v), rtol=1e-6, atol=1e-6)


def test_a_packed_projection_says_what_it_must_be():
    qkv = torch.randn(2, 5, 36)
    attend = tokenops.masked_channel_attention_qkv
    for arguments, options, error, words in (
        ((qkv, 5), {}, ValueError, "num_heads=5 does not divide the 36 channels"),
        ((qkv, 0), {}, ValueError, "num_heads=0"),
        ((qkv, True), {}, TypeError, "num_heads must be an int"),
        ((qkv, None), {}, TypeError, "num_heads must be an int, but got None"),
        ((qkv, 9), {}, ValueError, "4 channels a head, which are not q, k and v of one width"),
        ((qkv, 3), {"head_dim": 6}, ValueError, "head_dim=6 leaves 0 of 12 channels a head for v"),
        ((qkv, 3), {"head_dim": 1.0}, TypeError, "head_dim must be an int"),
        ((qkv[0], 3), {}, ValueError, r"qkv must have shape \(B,N,C\)"),
        ((qkv.long(), 3), {}, TypeError, "qkv must be float16"),
        ((qkv, 3), {"key_bias": torch.zeros(2, 1, 1, 4)}, ValueError, "key_bias must have shape"),
        ((qkv, 3), {"v_mask": torch.ones(2, 4)}, ValueError, "v_mask has 2 heads, but qkv has 3"),
        ((qkv, 3), {"key_lengths": torch.ones(3).long()}, ValueError, "key_lengths has 3 images, but qkv has 2"),
        ((qkv[:, :0], 3), {"scores": "class"}, ValueError, "needs a query, but qkv has none"),
        ((torch.randn(1, 2, 3 * 129), 1), {}, ValueError, "heads of 129 channels"),
    ):
        with pytest.raises(error, match=words):
            attend(*arguments, **options)


@pytest.mark.gpu_only
def test_cuda_graph(device):
    t = inputs(ATTEND[4], torch.bfloat16, device, everything=True)
    call = lambda: attention(**t, scores="class", heads="mean", **EVERYTHING)  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.parametrize("wrong", [-1, 6])
def test_lengths_out_of_range(wrong, backend, device):
    lengths, t = torch.tensor([5, wrong], device=device), inputs(ATTEND[0], torch.float32, device)
    if backend == "triton":  # a GPU cannot look without waiting: nothing is read out of bounds
        assert torch.equal(attention(**t, key_lengths=lengths), attention(**t, key_lengths=lengths.clamp(0, 5)))
    else:
        words = f"key_lengths has {wrong}, but it must be between 0 and the 5 keys"
        with pytest.raises(ValueError, match=words):
            attention(**t, key_lengths=lengths)
        with tokenops.use_backend("reference"), pytest.raises(ValueError, match=words):
            attention(**t, key_lengths=lengths)


class Kernels(Exception):
    """Ours were chosen."""


def test_on_a_gpu_what_asks_for_nothing_else_is_torchs_attention(monkeypatch):
    """Without a GPU: fake tensors say that they are on one."""
    module, asked = tokenops.ops.masked_channel_attention, []

    def torchs(q, k, v, scale):
        asked.append((scale, torch.is_autocast_enabled("cuda")))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    def ours(*which):
        raise Kernels

    monkeypatch.setattr(module, "_sdpa", reference.keeps_dtypes(torchs))
    monkeypatch.setattr(module, "choose", ours)
    with FakeTensorMode():
        q, v = (torch.empty(2, 3, 5, D, device="cuda", dtype=torch.float16) for D in (64, 32))
        with torch.autocast("cuda", torch.bfloat16):
            out = attention(q, q, q, scale=2)
        assert asked == [(2.0, False)] and out.dtype == torch.float16 and out.transpose(1, 2).is_contiguous()
        mask, bias = torch.empty(3, 64, device="cuda"), torch.empty(1, 1, 1, 5, device="cuda")
        lengths = torch.empty(2, dtype=torch.int64, device="cuda")
        for options in (
            {"scores": "class"}, {"return_lse": True}, {"return_key_mean": True}, {"qk_mask": mask},
            {"v_mask": mask}, {"key_bias": bias}, {"key_lengths": lengths}, {"v": v}, {"q": q[:, :, :0]}, {"k": q[:0]},
        ):  # fmt: skip
            given = {"q": q, "k": q, "v": q, **options}
            given["q"] = given["q"][:0] if "k" in options else given["q"]
            given["v"] = given["v"][:0] if "k" in options else given["v"]
            with pytest.raises(Kernels):
                attention(**given)
        for backend in ("triton", "native", "reference"):
            with tokenops.use_backend(backend), pytest.raises(Kernels):
                attention(q, q, q)
    assert len(asked) == 1
