"""masked_channel_attention in use: layouts, dtypes, autograd and compile modes, memory, and its errors."""

import re
from pathlib import Path

import pytest
import torch
from torch import library
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokenops
from support.attention import EVERYTHING, FLOATS, SCORES, attention, check, double, inputs, limited, run
from support.cases import ATTEND, DTYPES, Attend
from support.compiled import needs_compiled
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


def test_expanded_tensors(backend, device):
    """Strides of 0: one image's keys for all, and the gradient of a sum."""
    t = inputs(ATTEND[0], torch.float32, device)
    t["k"] = t["k"][:1].expand(2, -1, -1, -1)
    leaves = [value.requires_grad_() for value in t.values()]
    results = attention(*leaves, scores="class")
    grads = torch.autograd.grad([r.sum() for r in results], leaves)
    expected = reference.masked_channel_attention(*leaves, scores="class")
    for a, b in zip(grads, torch.autograd.grad([r.sum() for r in expected], leaves)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


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
def test_autocast_changes_nothing(backend, device):
    t = inputs(ATTEND[3], torch.float32, device, everything=True)
    expected, upstream = run(attention, t, scores="received")
    with torch.autocast(device, dtype=torch.bfloat16):
        again, _ = run(attention, t, upstream, scores="received")
    assert all(torch.equal(again[what], value) for what, value in expected.items())


@pytest.mark.slow_interpreted
def test_deterministic(backend, device):
    t = inputs(ATTEND[4], torch.float32, device, everything=True)
    first, upstream = run(attention, t, scores="received", heads="mean", **EVERYTHING)
    second, _ = run(attention, t, upstream, scores="received", heads="mean", **EVERYTHING)
    assert all(torch.equal(first[what], second[what]) for what in first)


@pytest.mark.parametrize(("scores", "heads"), SCORES)
def test_the_matrix_never_exists(scores, heads, backend, device):
    """No tensor of H * Nq * Nk elements is made, forward or backward; plain PyTorch makes several."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [r for r in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(r)]
            sizes.extend(r.untyped_storage().size() // r.element_size() for r in made)
            return out

    case = Attend(1, 1, 1024, 1500, 2, 2, "the matrix is by far the largest")
    t = inputs(case, torch.float32, device)
    if backend == "triton":  # interpreted: only the sizes matter
        case = Attend(1, 1, 100, 200, 1, 1, "as above, in few tiles")
        t = inputs(case, torch.float32, device)
    q, k, v = t.values()
    rest = (None,) * 4
    room = "triton" if backend == "triton" else "cpu"  # of native code no memory is seen: composed in its place
    forward = __import__(f"tokenops.ops.{room}.masked_channel_attention", fromlist=["x"]).masked_channel_attention_fwd
    backward = __import__(
        f"tokenops.ops.{room}.masked_channel_attention" + "_bwd" * (backend == "triton"), fromlist=["x"]
    ).masked_channel_attention_bwd
    kind = scores or "none"
    with Sizes():
        out, score, lse, _ = forward(q, k, v, *rest, 1.0, kind, heads == "mean", False)
        backward(out, score if scores else None, None, q, k, v, *rest, out, lse, 1.0, kind, heads == "mean")
    assert 0 < max(sizes) <= case.M * case.N // 3
    sizes.clear()
    with Sizes():
        reference.masked_channel_attention(q, k, v)
    assert max(sizes) >= case.M * case.N


def test_the_kernel_that_was_asked_for_runs(backend, ran_kernels, device):
    t = inputs(ATTEND[0], torch.float32, device)
    with ran_kernels() as names:
        attention(**{name: value.requires_grad_() for name, value in t.items()}).sum().backward()
    assert names == {f"masked_channel_attention_fwd.{backend}", f"masked_channel_attention_bwd.{backend}"}
    with ran_kernels() as names, torch.inference_mode():
        attention(**{name: value.detach() for name, value in t.items()}, scores="class")
    assert names == {f"masked_channel_attention_fwd.{backend}"}


def test_compiled_attention_is_used(ran_kernels):
    """Where there is compiled code the CPU path runs it, in the dtypes it takes."""
    there = native.why_not("cpu") is None
    for dtype in (*DTYPES, torch.float64):
        with ran_kernels() as names, tokenops.use_backend("native"):
            run(attention, inputs(ATTEND[0], dtype, "cpu"))
        path = "native" if there and dtype != torch.float64 else "composed"
        assert names == {f"masked_channel_attention_fwd.{path}", f"masked_channel_attention_bwd.{path}"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["amx", "avx512bf16", "avx512", "avx2", "baseline"])
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
    before = torch.get_num_threads()
    t = inputs(Attend(1, 1, 150, 70, 24, 40, "one head, many queries"), torch.float32, "cpu")
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(attention(**t, scores="class", return_lse=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


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


@pytest.mark.slow_interpreted
def test_opcheck(backend, device):
    t = inputs(ATTEND[3], torch.float32, device, everything=True)
    q, k, v, qk_mask, v_mask, bias, lengths = t.values()
    forward = getattr(torch.ops.tokenops.masked_channel_attention_fwd, backend)
    backward = getattr(torch.ops.tokenops.masked_channel_attention_bwd, backend)
    bias = bias.expand(2, 3, 1, 17).squeeze(2)
    _, together, rest = packed(PACKED, torch.float32, device)
    together_mask = rest["qk_mask"]
    for tensors, kind, mean in (
        ((q, k, v, qk_mask, v_mask, bias, lengths), "received", True),
        ((q, k, v, None, None, None, None), "class", False),
        ((q, k, v, None, v_mask, None, lengths), "class", True),
        ((q[:0], k[:0], v[:0], None, None, None, None), "none", False),
        ((together, None, None, together_mask, None, None, lengths), "received", True),
    ):
        heads = (PACKED.H, PACKED.DK) if tensors[1] is None else (0, 0)
        arguments = (*tensors, 0.3, kind, mean, True, *heads)
        library.opcheck(forward, arguments)
        out, score, lse, _ = forward(*arguments)
        given = None if kind == "none" else torch.randn_like(score)
        dlse = torch.randn_like(lse) if mean else None
        library.opcheck(backward, (torch.randn_like(out), given, dlse, *tensors, out, lse, 0.3, kind, mean, *heads))


@pytest.mark.slow_interpreted
def test_compile(backend, device):
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**tensors):
        return attention(**tensors, scores="received", return_lse=True)

    for case in (ATTEND[2], ATTEND[3]):
        t = inputs(case, torch.float32, device, everything=True)
        expected, upstream = run(lambda **t: attention(**t, scores="received", return_lse=True), t)
        again, _ = run(compiled, t, upstream)
        for what, right in expected.items():
            torch.testing.assert_close(again[what], right)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inductor(device, dynamic):
    def f(qkv, bias):
        q, k, v = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        out, scores = attention(q, k, v, key_bias=bias.log(), scores="class", heads="mean")
        return out.transpose(1, 2).flatten(2) * scores.unsqueeze(-1)

    qkv, bias = torch.randn(2, 5, 48, device=device), torch.rand(2, 1, 1, 5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]
    expected = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_functional_gradient(backend, device):
    q, k, v = inputs(ATTEND[0], torch.float32, device).values()
    g = torch.func.grad(lambda q: attention(q, k, v).square().sum())(q)
    torch.testing.assert_close(
        g, torch.func.grad(lambda q: reference.masked_channel_attention(q, k, v).square().sum())(q)
    )


def test_cuda_graph(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    t = inputs(ATTEND[4], torch.bfloat16, device, everything=True)
    call = lambda: attention(**t, scores="class", heads="mean", **EVERYTHING)  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


# Errors in words.

Q = torch.zeros(2, 3, 4, 8)
K, V = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=[1]), TypeError, "q must be a tensor .B,H,Nq,Dk., but got list"),
        (dict(q=Q[0]), ValueError, r"q must have shape .B,H,Nq,Dk., but got .3, 4, 8."),
        (dict(q=Q.long()), TypeError, "q must be float16, .* but got torch.int64"),
        (dict(k=K.double()), TypeError, "k must have q's dtype torch.float32, but got torch.float64"),
        (dict(k=K[:1]), ValueError, "k has 1 images, but q has 2"),
        (dict(v=V[:, :2]), ValueError, "v has 2 heads, but q has 3"),
        (dict(k=K[..., :7]), ValueError, "k has 7 channels, but q has 8"),
        (dict(v=V[:, :, :4]), ValueError, "v has 4 keys, but k has 5"),
        (dict(v=V.to("meta")), ValueError, "v is on meta, but the other tensors are on cpu"),
        (dict(q=Q[:, :0]), ValueError, "q has no heads"),
        (
            dict(q=Q.expand(2, 3, 4, 8).repeat(1, 1, 1, 17), k=K.repeat(1, 1, 1, 17)),
            ValueError,
            "q has heads of 136 channels, but 1 to 128 are possible",
        ),
        (dict(v=V[..., :0]), ValueError, "v has heads of 0 channels, but 1 to 128"),
        (dict(qk_mask=torch.ones(3, 6)), ValueError, "qk_mask has 6 channels, but q has 8"),
        (dict(qk_mask=torch.ones(8)), ValueError, r"qk_mask must have shape .H,D., but got .8,."),
        (dict(v_mask=torch.ones(2, 6)), ValueError, "v_mask has 2 heads, but v has 3"),
        (dict(v_mask=torch.ones(3, 6) > 0), TypeError, "v_mask must be float16, .* but got torch.bool"),
        (
            dict(key_bias=torch.ones(2, 3, 4, 5)),
            ValueError,
            r"key_bias must have shape .2 or 1, 3 or 1, 1, 5., but got",
        ),
        (dict(key_bias=torch.ones(2, 3, 1, 1)), ValueError, r"key_bias must have shape .* but got .2, 3, 1, 1."),
        (dict(key_lengths=torch.ones(2)), TypeError, "key_lengths must be int64 or int32, but got torch.float32"),
        (dict(key_lengths=torch.ones(3).long()), ValueError, "key_lengths has 3 images, but q has 2"),
        (dict(scale="1"), TypeError, "scale must be a number or None, but got '1'"),
        (dict(scores="cls"), ValueError, "scores='cls', but it must be None, 'class' or 'received'"),
        (dict(heads="all"), ValueError, "heads='all', but it must be 'each' or 'mean'"),
        (dict(q=Q[:, :, :0], scores="class"), ValueError, "scores='class' needs a query, but q has none"),
    ],
)
def test_errors(changes, error, words):
    with pytest.raises(error, match=f"masked_channel_attention: {words}"):
        attention(**(dict(q=Q, k=K, v=V) | changes))


@pytest.mark.parametrize("wrong", [-1, 6])
def test_lengths_out_of_range(wrong, backend, device):
    lengths = torch.tensor([5, wrong], device=device)
    if backend == "triton":  # a GPU cannot look without waiting: nothing is read out of bounds
        t = {name: value.to(device) for name, value in dict(q=Q + 1, k=K + 1, v=V + 1).items()}
        assert torch.equal(attention(**t, key_lengths=lengths), attention(**t, key_lengths=lengths.clamp(0, 5)))
    else:
        with pytest.raises(ValueError, match=f"key_lengths has {wrong}, but it must be between 0 and the 5 keys"):
            attention(Q, K, V, key_lengths=lengths)


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
