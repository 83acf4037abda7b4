"""What fidelity refuses, in words, and what it makes of compiled models and of other dtypes."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import tokenops
from support.fidelity import IMAGES, UNIT, Dense, Table, images, small
from tokenops import fidelity
from tokenops.patching.fidelity import fidelities

# ---- torch.compile


@pytest.fixture
def clean():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Within(nn.Module):
    """A model, and one that holds it."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


DENSE = [[1, 0.2], [0.3, 1], [3, 0], [2, 1.5]]
REDUCED = [[4, 0], [1, 0.1], [1, 1.5], [0, -3]]


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("how", ["torch.compile", "compile()", "both"])
def test_a_compiled_model_answers_as_the_one_within(how, ran, clean):
    dense, model = Table(DENSE, UNIT), Table(REDUCED, UNIT)
    expected = fidelity(dense, copy.deepcopy(model), [IMAGES])
    assert expected.top1 == 0.5, "the classes are 0 1 0 0 and 0 0 1 0"
    if how != "torch.compile":
        model.compile(backend="eager")
    compiled = model if how == "compile()" else torch.compile(model, backend="eager")
    if ran:
        compiled(IMAGES)
    called = vars(model).get("_compiled_call_impl")
    modes = [module.training for module in compiled.modules()]
    assert fidelity(dense, compiled, [IMAGES]) == expected
    assert fidelity(compiled, dense, [IMAGES]).top1 == 0.5 and fidelity(dense, compiled, [IMAGES], "head") == expected
    assert vars(model).get("_compiled_call_impl") is called and (called is None) is (how == "torch.compile")
    assert [module.training for module in compiled.modules()] == modes
    assert not any(module._forward_pre_hooks for module in compiled.modules())
    assert torch.equal(compiled(IMAGES), model(IMAGES))


def compiled_part(body):
    return Within(torch.compile(body, backend="eager")), "'body'"


def compiled_in_place(body):
    body.compile(backend="eager")
    return Within(body), "'body'"


def compiled_forward(body):
    body.forward = torch.compile(body.forward, backend="eager")
    return body, "'its forward'"


@pytest.mark.parametrize("make", [compiled_part, compiled_in_place, compiled_forward])
def test_a_compiled_part_that_hides_the_classifier_is_an_error(make, clean):
    model, part = make(Table(DENSE, UNIT))
    for sides, name in (((model, Table(DENSE, UNIT)), "dense"), ((Table(DENSE, UNIT), model), "reduced")):
        with pytest.raises(ValueError) as error:
            fidelity(*sides, [IMAGES])
        assert str(error.value) == (
            f"fidelity: {name} has its classifier in what torch.compile made of {part}, which hides what goes into it:"
            " give the model as it was before torch.compile"
        )


def test_compiled_parts_beside_the_classifier_are_no_error(clean):
    dense, reduced = small(depth=1), small(depth=1)
    reduced.blocks[0].mlp.compile(backend="eager")
    reduced.blocks[0].norm1 = torch.compile(reduced.blocks[0].norm1, backend="eager")
    reduced(images(2))
    found = fidelity(dense, reduced, [images(4)])
    assert found.top1 == 1 and found.cosine == pytest.approx(1)


# ---- classifiers that are not called


class Aside(Table):
    """A table whose head nobody calls."""

    def forward(self, images):
        return self.rows[images] @ self.head.weight.T


def test_a_classifier_that_is_not_called_is_an_error():
    table, aside = Table(DENSE, UNIT), Aside(DENSE, UNIT)
    for sides, name in (((aside, table), "dense"), ((table, aside), "reduced")):
        for given in (None, "head"):
            with pytest.raises(ValueError) as error:
                fidelity(*sides, [IMAGES], given)
            assert str(error.value) == (
                f"fidelity: {name} did not call its classifier 'head' (classifier={given!r}): classifier must name the"
                " module that makes the logits"
            )


def test_a_classifier_may_take_its_input_by_name():
    class Named(Table):
        def forward(self, images):
            return self.head(input=self.rows[images])

    assert fidelity(Table(DENSE, UNIT), Named(REDUCED, UNIT), [IMAGES]).top1 == 0.5


def test_logits_of_one_model_alone_are_an_error():
    table, bare = Table(DENSE, UNIT), Dense(DENSE)
    for sides, words in (
        ((table, bare), "dense has logits, but reduced has none"),
        ((bare, table), "reduced has logits, but dense has none"),
    ):
        with pytest.raises(ValueError, match=f"^fidelity: {words}: both must have a classifier, or neither"):
            fidelity(*sides, [IMAGES])


# ---- what is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error(value):
    good = Table(DENSE, UNIT)
    one, all_of_them = copy.deepcopy(good), copy.deepcopy(good)
    with torch.no_grad():
        one.rows[2, 0] = value
        all_of_them.head.weight.fill_(math.nan)
    for dense, reduced, words in (
        (good, one, "reduced for 1 of 4 images"),
        (one, good, "dense for 1 of 4 images"),
        (good, all_of_them, "reduced for 4 of 4 images"),
        (one, all_of_them, "dense for 1 of 4 images, of reduced for 4 of 4 images"),
    ):
        with pytest.raises(ValueError) as error:
            fidelity(dense, reduced, [IMAGES[:3], IMAGES[3:]])
        assert str(error.value) == f"fidelity: outputs or embeddings are not finite of {words}"
    with pytest.raises(ValueError, match="not finite of r=3 for 1 of 4 images$"):
        fidelities(good, {"r=2": copy.deepcopy(good), "r=3": one}, [IMAGES])


def test_classes_that_are_ruled_out_are_logits():
    """Behind the head a third class gets -inf: answers are those of the other two."""

    class Masked(Table):
        def forward(self, images):
            return super().forward(images).masked_fill(torch.tensor([False, False, True]), -math.inf)

    three = [*UNIT, [9, 9]]
    assert fidelity(Masked(DENSE, three), Masked(REDUCED, three), [IMAGES]).top1 == 0.5


def test_dense_outputs_that_are_not_finite_are_an_error():
    y = torch.ones(3, 4, 2)
    y[1, 3, 0] = math.nan
    with pytest.raises(ValueError, match="not finite of reduced for 1 of 3 images$"):
        fidelity(Dense(torch.ones(3, 4, 2)), Dense(y), [torch.arange(3)])


# ---- misuse


def test_the_same_model_twice_is_an_error(clean):
    dense = small(depth=1)
    reduced = tokenops.apply_patch(dense, "tome", r=2)
    assert reduced is dense
    for other in (reduced, torch.compile(reduced, backend="eager")):
        with pytest.raises(ValueError) as error:
            fidelity(dense, other, [images()])
        assert str(error.value) == (
            "fidelity: dense and reduced are the same model: apply_patch works in place, so copy.deepcopy first"
        )
    with pytest.raises(ValueError, match="dense and r=2 are the same model"):
        fidelities(dense, {"r=2": dense}, [images()])
    with pytest.raises(TypeError, match="^fidelity: reduced is a function, but it must be a torch.nn.Module$"):
        fidelity(dense, lambda x: x, [images()])
    with pytest.raises(ValueError, match="no reduced model can have the name 'dense'"):
        fidelities(dense, {"dense": small(depth=1)}, [images()])


ALLOWED = "images (B, ...), a tensor, or a tuple or list that begins with one"


@pytest.mark.parametrize(
    ("batches", "kind", "words"),
    [
        (torch.ones(2, 3, 8, 8), TypeError, "batches is a tensor of shape (2, 3, 8, 8), but it must be an iterable"),
        ({"images": IMAGES}, TypeError, "batches is a dict, but it must be an iterable, each of it"),
        (5, TypeError, "batches is a int, but it must be an iterable, each of it"),
        ([IMAGES, {"images": IMAGES}], TypeError, "batches[1] is a dict, but it must be"),
        (np.arange(8).reshape(2, 4), TypeError, "batches[0] is a ndarray, but it must be"),
        ([None, np.arange(4)], TypeError, "batches[1] is a ndarray, but it must be"),
        ([(np.arange(4), IMAGES)], TypeError, "batches[0][0] is a ndarray, but it must be"),
        ([()], ValueError, "batches[0] is an empty tuple, but it must be"),
        ([IMAGES, []], ValueError, "batches[1] is an empty list, but it must be"),
        ([torch.tensor(3)], ValueError, "batches[0] is a tensor of shape (), but it must be"),
    ],
)
def test_batches_that_are_none(batches, kind, words):
    with pytest.raises(kind) as error:
        fidelity(Table(DENSE, UNIT), Table(REDUCED, UNIT), batches)
    assert str(error.value).startswith(f"fidelity: {words}") and str(error.value).endswith(f" {ALLOWED}")


def test_an_image_without_its_batch_is_an_error():
    with pytest.raises(ValueError) as error:
        fidelity(small(depth=1), small(depth=1), [images(2), images(2)[0]])
    words = str(error.value)
    assert words.startswith("fidelity: batches[1] is a tensor of shape (3, 64, 64), which dense does not take (")
    assert words.endswith("): it must be images (B, ...); of one image (C, H, W) it is image[None]")
    flat = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())  # torch's convolutions take one image
    with pytest.raises(ValueError) as error:
        fidelity(flat, copy.deepcopy(flat), [torch.ones(3, 8, 8)])
    assert str(error.value) == (
        "fidelity: of batches[0], a tensor of shape (3, 8, 8), dense gives a tensor of shape (4, 1) and embeddings of"
        " shape (4, 1), but images, outputs and embeddings must be (B, ...) of the same B"
    )


def test_images_are_cast_to_each_models_dtype():
    dense = small()
    reduced = copy.deepcopy(dense).bfloat16()
    x = images(8)
    found = fidelity(dense, reduced, [x])
    with torch.no_grad():
        y, z = (
            model.forward_head(model.forward_features(i), pre_logits=True).double()
            for model, i in ((dense, x), (reduced, x.bfloat16()))
        )
        same = dense(x).argmax(dim=1) == reduced(x.bfloat16()).argmax(dim=1)
    assert found.cosine == pytest.approx(nn.functional.cosine_similarity(y, z).mean().item(), abs=1e-12)
    assert 0.99 < found.cosine < 1 and found.top1 == same.float().mean().item()
    assert fidelity(dense, copy.deepcopy(dense), [x.double()]).top1 == 1
    seen = []
    handle = dense.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fidelity(dense, copy.deepcopy(dense), [x.bfloat16()])
    handle.remove()
    assert seen[0] == torch.bfloat16, "autocast casts"
