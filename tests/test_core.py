"""The core, quick enough for every torch: each operator forward and backward on each backend, each method on a model
that people have, one compilation, one step of training, the command line's account of the machine."""

import pytest
import torch

import tokenops
from tokenops import reference
from tokenops.ops import backends, match_packed, reference_packed
from tokenops.ops.sum_rows import sum_rows

B, N, M, C = 2, 12, 5, 16


def tokens(rows=1 + N, width=C):
    return torch.randn(B, rows, width)


def merged(function):
    return lambda x, metric: function(x, metric, 3)[0]


def reference_merge(x, metric, r):
    index = reference.match_bipartite(metric, r)
    return reference.merge_bipartite(x, index, index.shape[1] - r)


INDEX = torch.tensor([[0, 4, 2, 3, 1, 4, 6, 5, 8, 7, 3, 2], [3, 1, 2, 0, 4, 4, 5, 6, 7, 8, 8, 1]])
ENDS = torch.tensor([0, 5, 5, 14], dtype=torch.int32)
CHOSEN = torch.stack([torch.arange(M) * 2, torch.arange(M) + 3])

#: operator -> (ours, the reference, what makes its inputs); all inputs of floats get gradients, unless they are last
OPERATORS = {
    "soft_aggregate": (
        lambda x, w: tokenops.soft_aggregate(x, w, prefix=1),
        lambda x, w: reference.soft_aggregate(x, w, prefix=1),
        lambda: (tokens(), tokens(N, M)),
    ),
    "soft_scatter": (tokenops.soft_scatter, reference.soft_scatter, lambda: (tokens(M), tokens(N, M))),
    "token_mlp": (
        tokenops.token_mlp,
        reference.token_mlp,
        lambda: (tokens(M), torch.randn(20, M), torch.randn(20), torch.randn(N, 20), torch.randn(N)),
    ),
    "masked_channel_attention": (
        lambda q, k, v: tokenops.masked_channel_attention(q, k, v, scores="received")[0],
        lambda q, k, v: reference.masked_channel_attention(q, k, v, scores="received")[0],
        lambda: tuple(torch.randn(B, 3, rows, width) for rows, width in ((N, 8), (M, 8), (M, 6))),
    ),
    "select_tokens": (
        lambda x, s: tokenops.select_tokens(x, s, M, rest="weighted").tokens,
        lambda x, s: reference.select_tokens(x, s, M, rest="weighted")[0],
        lambda: (tokens(), torch.rand(B, N)),
    ),
    "restore_tokens": (
        lambda x, y: tokenops.restore_tokens(x, y, CHOSEN),
        lambda x, y: reference.restore_tokens(x, y, CHOSEN),
        lambda: (tokens(), tokens(M)),
    ),
    "merge_neighbours": (
        lambda x, w: tokenops.merge_neighbours(x, (3, 4), "horizontal", w),
        lambda x, w: reference.merge_neighbours(x, (3, 4), "horizontal", w),
        lambda: (tokens(), torch.randn(B, N)),
    ),
    "match_bipartite": (
        lambda m: tokenops.match_bipartite(m, 3),
        lambda m: reference.match_bipartite(m, 3),
        lambda: (tokens(),),
    ),
    "match_packed": (
        lambda m: tokenops.match_bipartite(m, 3, cu_seqlens=ENDS, max_seqlen=9).index,
        lambda m: match_packed.one_by_one(m, 3, ENDS, 1).index,
        lambda: (torch.randn(15, C),),
    ),
    "merge_bipartite": (
        lambda x: merged(tokenops.merge_bipartite)(x, x.detach()),
        lambda x: merged(reference_merge)(x, x.detach()),
        lambda: (tokens(),),
    ),
    "unmerge_bipartite": (
        lambda y: tokenops.unmerge_bipartite(y, INDEX),
        lambda y: reference.unmerge_bipartite(y, INDEX),
        lambda: (tokens(1 + 9),),
    ),
    "sum_rows": (
        lambda x, w: sum_rows(x, INDEX[0], 9, weight=w, mean=True)[0],
        lambda x, w: reference_packed.sum_rows(x, INDEX[0], 9, weight=w, mean=True)[0],
        lambda: (torch.randn(N, C), torch.rand(N) + 0.5),
    ),
}
PATHS = [(op, path) for op in OPERATORS for path in (*backends.TABLE[op]["cpu"], "reference")]


def run(function, tensors, upstream):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    if not y.is_floating_point():
        return (y,)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def test_every_operator_is_here():
    assert set(OPERATORS) == set(backends.TABLE)


@pytest.mark.parametrize(("operator", "path"), PATHS, ids=lambda value: value)
def test_operator(operator, path, ran_kernels, poisoned):
    ours, plain, make = OPERATORS[operator]
    reason = backends.why_not(operator, path, "cpu", torch.float32)
    if reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    tensors = make()
    upstream = torch.randn_like(plain(*tensors), dtype=torch.float32)
    with tokenops.use_backend(path), ran_kernels() as names:
        found = run(ours, tensors, upstream)
    if path == "reference":
        assert names == set()
    else:
        alone = dict.fromkeys(("match_bipartite", "match_packed"), ("fwd",))
        passes = {**alone, "merge_bipartite": ("matched", "bwd")}.get(operator, ("fwd", "bwd"))
        shared = "soft_aggregate" if operator == "soft_scatter" else operator
        assert {f"{shared}_{name}.{path}" for name in passes} <= names
        assert {name.rpartition(".")[2] for name in names} == {path}
    truth = run(plain, [t.double() for t in tensors], upstream)
    for a, right in zip(found, truth, strict=True):
        torch.testing.assert_close(a, right.to(a.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", [op for op in OPERATORS if op not in backends.TRITON_FLOAT64])
def test_float64_is_served_everywhere(operator, device, ran_kernels):
    """By the reference where no kernel takes it: on a GPU the matrix kernels do not."""
    ours, plain, make = OPERATORS[operator]
    tensors = [t.double().to(device) for t in make()]
    upstream = torch.randn_like(plain(*tensors))
    with ran_kernels() as names:
        found = run(ours, tensors, upstream)
    path = "composed" if operator in backends.COMPOSED else "native"
    assert {name.rpartition(".")[2] for name in names} == (set() if device == "cuda" else {path})
    torch.testing.assert_close(found, run(plain, tensors, upstream), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("method", ["tome", "evit", "evo_vit", "patch_slimming", "sit", "cait"])
def test_method(method, ran_kernels):
    """Where nothing is reduced the model is the one it was; where something is, our kernels do it; and back."""
    pytest.importorskip("timm")
    from support.models import close
    from support.patched_models import METHODS, images, model_of

    idle, busy = METHODS[method]
    x = images()
    dense = model_of("plain")(x)
    model = model_of("plain")
    tokenops.apply_patch(model, method, **idle)
    close(model(x), dense)
    tokenops.remove_patch(model)
    assert torch.equal(model(x), dense)
    tokenops.apply_patch(model, method, **busy)
    with ran_kernels() as names:
        logits = model(x)
        logits.square().sum().backward()
    assert names and logits.isfinite().all() and not torch.allclose(logits, dense)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.usefixtures("on_device")
def test_compile():
    def f(x, scores, weight):
        chosen = tokenops.select_tokens(x * 2, scores, M, rest="weighted", norm=(weight, None, 1e-6))
        half = tokenops.merge_neighbours(chosen.tokens[:, :M], (2, 2), "vertical")
        return half.sin(), chosen.normed

    given = (tokens().requires_grad_(), torch.rand(B, N), torch.rand(C).requires_grad_())
    results = []
    for function in (f, torch.compile(f, fullgraph=True, dynamic=True)):
        half, normed = function(*given)
        loss = half.square().sum() + normed.square().sum()
        results.append((half, normed, *torch.autograd.grad(loss, (given[0], given[2]))))
    torch.testing.assert_close(*results)


def test_a_step_of_training():
    pytest.importorskip("accelerate")
    timm = pytest.importorskip("timm")
    from torch.utils.data import DataLoader, TensorDataset

    from tokenops.training import Plain, fit

    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model = timm.models.vision_transformer.VisionTransformer(**sizes)
    tokenops.apply_patch(model, "evit", keep_rate=0.5, reduction_loc=(0,))
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4) % 3)
    fit(Plain(model), DataLoader(data, 4), epochs=1, lr=1e-2, progress=False, device="cpu")
    for name, value in model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


def test_info(capsys):
    from tokenops.__main__ import main

    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for word in (tokenops.__version__, torch.__version__, "native", *backends.TABLE):
        assert word in said
