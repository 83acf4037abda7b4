"""Patched models elsewhere: programs of torch.export and ONNX files give what the model gives, for any batch."""

import itertools

import pytest
import torch
from torch import nn

import tokenops
from support.patched_models import METHODS, images, model_of, patched
from tokenops import apply_patch, trace

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = {0: torch.export.Dim("batch")}


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def exported(model, x, strict=False, dynamic=True):
    """A program of standard operators alone."""
    shapes = (BATCH,) if dynamic else None
    with tokenops.use_backend("reference"):
        program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
    namespaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces == {"aten"}
    return program


def to_file(model, x, path, dynamic):
    """A model, or a program of it, as an ONNX file."""
    pytest.importorskip("onnxscript")
    shapes = (BATCH,) * len(x) if dynamic and isinstance(model, nn.Module) else None
    with tokenops.use_backend("reference"):
        torch.onnx.export(model, x, path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    return path


def run_file(path, *x):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, {name: t.numpy() for name, t in zip(names, x, strict=True)})]


def check_any_batch(model, x, path, strict=False):
    """A program and a file made of it, with batches of other sizes than the one they were made with."""
    program = exported(model, x[:2], strict)
    expected = model(x)
    for few in (x[:1], x):
        close(program.module()(few), expected[: few.shape[0]])
    to_file(program, (x[:2],), path, dynamic=True)
    for few in (x[:1], x):
        close(run_file(path, few)[0], expected[: few.shape[0]], 1e-4)


def tied(model):
    """All keys of the first block are the same, so that every score in it ties: exactly, in any order of summation."""
    qkv, C = model.blocks[0].attn.qkv, model.embed_dim
    with torch.no_grad():
        qkv.weight[C : 2 * C] = 0
        qkv.bias[C : 2 * C] = torch.eye(1, C // 2).repeat(1, 2)
    return model


#: the token behind the first step that each patch is in, where all scores tie: the first are chosen, or merged
FIRST = {
    "tome": [5, 5, 6, 5, 7, 5, 8, 0, 9, 1, 10, 2, 11, 3, 12, 4],
    "evit": [*range(8), *[-1] * 8],
    "evo_vit": [*range(8), *[-1] * 8],
}


@torch.no_grad()
@pytest.mark.parametrize("method", [m if m in FIRST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_exports_for_any_batch(method, tmp_path):
    model, x = tied(patched(method)), images(3)
    if method in FIRST:
        assert trace(model, x).steps[0].sources.tolist() == [FIRST[method]] * 3
    check_any_batch(model, x, tmp_path / "model.onnx")


QUICK = [("evit", True, True), *((method, False, True) for method in ("patch_slimming", "sit", "cait"))]
WAYS = list(itertools.product(METHODS, (False, True), (False, True)))


@torch.no_grad()
@pytest.mark.parametrize(
    "method, strict, dynamic", [way if way in QUICK else pytest.param(*way, marks=pytest.mark.slow) for way in WAYS]
)
def test_exports_strict_or_not(method, strict, dynamic):
    model, x = patched(method), images(3 if dynamic else 2)
    close(exported(model, x[:2], strict, dynamic).module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_onnx_of_the_model_itself(method, dynamic, tmp_path):
    model, x = patched(method), images(3)  # with gradients on, as people do
    path, expected = to_file(model, (x[:2],), tmp_path / "model.onnx", dynamic), model(x).detach()
    close(run_file(path, x[:2])[0], expected[:2], 1e-4)
    if dynamic:
        close(run_file(path, x)[0], expected, 1e-4)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    "family, method",
    [
        ("average", "tome"),  # brought back
        ("dynamic", "tome"),
        ("registers", "evit"),
        ("average", "evo_vit"),
        *(("rope", method) for method in METHODS),
        ("grouped", "evit"),
    ],
)
def test_other_families(family, method, tmp_path):
    model = model_of(family)
    apply_patch(model, method, **METHODS[method][1])
    check_any_batch(model, images(3), tmp_path / "model.onnx")


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("points", [{"kind": ["scalar", "content"]}, {"kind": ["linear", "channel"]}])
def test_every_merge_of_neighbours(points, tmp_path):
    options = dict(METHODS["cait"][1], layout="block", **points)
    check_any_batch(apply_patch(model_of("plain"), "cait", **options), images(3), tmp_path / "model.onnx")


@torch.no_grad()
@pytest.mark.slow
def test_places_of_their_own_for_every_image(tmp_path):
    model = apply_patch(model_of("plain"), "dps", counts=[17, 9, 4], after=1)
    with torch.no_grad():
        model.blocks[1].scorer.out.weight.normal_()
    assert len(set(map(tuple, trace(model, images(3)).steps[0].sources.tolist()))) == 3
    check_any_batch(model, images(3), tmp_path / "model.onnx")


class Pooled(nn.Module):
    """A model of transformers as a function of images alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask=None):
        return self.model(x, attention_mask=mask).pooler_output


def transformers_vit():
    pytest.importorskip("transformers")
    from support import hf_models

    return Pooled(hf_models.model_of("vit"))


@torch.no_grad()
def test_transformers_mask_of_ones_is_none():
    """Their ViT makes one where it is exported; one that is given is refused there too."""
    model, x = transformers_vit(), images(3)
    apply_patch(model.model, "evit", **METHODS["evit"][1])
    close(exported(model, x[:2]).module()(x), model(x))
    with pytest.raises(ValueError, match="attention_mask was given to a patched model"):
        torch.export.export(model, (x, torch.ones(3, 17)))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("method, strict", [("tome", False), ("evit", True)])
def test_transformers_in_onnx(method, strict, tmp_path):
    model = transformers_vit()
    apply_patch(model.model, method, **METHODS[method][1])
    check_any_batch(model, images(3), tmp_path / "model.onnx", strict)


class Choices(nn.Module):
    """All that is chosen by: places of tokens, and what they are merged into."""

    def forward(self, x, scores):
        best = tokenops.select_tokens(x, scores, 24, rest="mean", companions=(scores,))
        kept = tokenops.select_tokens(x, scores, 24, order="index")
        merged = tokenops.merge_bipartite(x, x, 9)
        return best.tokens, best.index, best.companions[0], kept.index, merged.index, merged.tokens


@torch.no_grad()
def test_onnx_chooses_as_every_backend(tmp_path):
    """Ties, both zeros, infinities and what is no number."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (6, 34, 4), generator=generator).float()  # cosines of few values, rows of zeros
    x[5, 3] = x[5, 8] = float("nan")
    scores = torch.randint(-1, 3, (6, 33), generator=generator).float()
    for i, value in enumerate((-0.0, float("inf"), float("-inf"), float("nan"))):
        scores[2 + i, torch.rand(33, generator=generator) < 0.5] = value
    scores[1], scores[5, ::5] = float("nan"), float("-inf")
    assert len(set(scores[0].tolist())) == 4
    model = Choices()
    path = to_file(model, (x[:2], scores[:2]), tmp_path / "model.onnx", dynamic=True)
    for found, y in zip(run_file(path, x, scores), model(x, scores), strict=True):
        if y.dtype == torch.int64:
            assert torch.equal(found, y)
        else:
            torch.testing.assert_close(found, y, equal_nan=True)
