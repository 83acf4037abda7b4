"""A patched model compiles whole or block by block, each graph once."""

import pytest
import torch
from torch import nn

import tokenops
from support.patched_models import METHODS, images, model_of, patched
from tokenops import apply_patch

pytestmark = pytest.mark.filterwarnings("ignore")

#: torch 2.11 compiles no view of a module, and breaks the graph there
TOO_OLD = torch.__version__ < "2.12"
#: twelve blocks, most of them with a number of their own
MANY = {
    "tome": dict(r=[12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
    "evit": dict(keep_rate=[1, 0.95, 0.9, 1, 0.85, 0.8, 1, 0.75, 0.7, 1, 0.65, 0.6]),
    "evo_vit": dict(stages=(2, 4, 6, 8, 10), prune_ratio=[1, 1, *(0.9 - 0.05 * i for i in range(10))]),
    "patch_slimming": dict(schedule=[101, 101, 95, 90, 80, 70, 65, 60, 50, 40, 30, 20]),
    "sit": dict(keeping_ratio=0.8, locations=(1, 3, 5, 7, 9, 10)),
    "cait": dict(points={2: "horizontal", 5: "vertical", 8: "horizontal"}),
}


#: the same with few numbers
FEW = {
    "tome": dict(r=3),
    "evit": dict(keep_rate=0.8),
    "evo_vit": dict(),
    "patch_slimming": dict(schedule=[101] * 4 + [60] * 4 + [30] * 4),
    "sit": dict(),
    "cait": dict(),
}


def methods(*quick):
    """All of them; those that are not quick are slow."""
    return pytest.mark.parametrize(
        "method", [m if m in quick else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
    )


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        torch.compiler.reset()
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(y, expected):
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("numbers", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@methods("tome", "evit")
def test_twelve_blocks_compiled_each_by_itself(method, numbers):
    model, x = model_of("plain", depth=12, img_size=80), images(side=80)
    apply_patch(model, method, **numbers[method])
    expected, backend = model(x), Counting()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    close(model(x), expected)  # fullgraph raises where there are more variants of a code than allowed
    assert backend.graphs <= 12
    graphs = backend.graphs
    close(model(-x), model(-x))
    assert backend.graphs == graphs


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    "method", ["tome", *(pytest.param(m, marks=pytest.mark.slow) for m in ("evit", "evo_vit", "patch_slimming"))]
)
def test_settings_may_change(method, whole):
    """As often as a training sets them: more often than variants of one code are kept, where a block is compiled."""
    values = {
        "tome": [1, 2, 3, (3, -1), 4],
        "evit": [0.95, 0.9, 0.85, 0.8, 0.7],
        "evo_vit": [False, True, False],
        "patch_slimming": [[17, 9, 5], [12, 12, 3], [13, 5, 2]],
    }
    model, twin = (patched(method) for _ in range(2))
    x, backend = images(), Counting()
    if whole:
        run = torch.compile(model, fullgraph=True, backend=backend)
    else:
        run = model
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
    for value in values[method]:
        for one in (model, twin):
            setattr(one, one.tokenops_patch.method.setting, value)
        close(run(x), twin(x))


@methods("tome", "evit", "sit")
def test_with_weights_as_constants(method):
    """Dynamo then keeps every module as a new one of its class, made by `__new__` without arguments."""
    model, x = patched(method).eval(), images()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend=Counting())(x), model(x))


@methods("tome")
def test_one_graph_for_batches_of_any_size(method):
    """torch makes a second one, where the size is a variable, as of any model."""
    model, backend = patched(method), Counting()
    compiled, counts = torch.compile(model, fullgraph=True, backend=backend), []
    for size in (2, 3, 5, 7, 4):
        x = images(size)
        close(compiled(x), model(x))
        counts.append(backend.graphs)
    assert counts == [1, 2, 2, 2, 2]
    setting = model.tokenops_patch.method.setting
    if setting is not None:
        other = dict(tome=[1, 0, 2], evit=[0.9, 1, 0.6], evo_vit=False, patch_slimming=[15, 9, 4])
        setattr(model, setting, other[method])
        for size in (2, 3, 6):
            close(compiled(images(size)), model(images(size)))
        assert backend.graphs <= 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "evit", "evo_vit"])
def test_images_of_any_size(method):
    model, backend = patched(method, "dynamic"), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for side in (32, 48, 64, 40):
        close(compiled(images(side=side)), model(images(side=side)))


class Features(nn.Module):
    def __init__(self, model, options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        return self.model.forward_intermediates(x, intermediates_only=True, **self.options)


@methods("evo_vit")
def test_intermediate_features_compile(method):
    model, x = patched(method), images()
    forms = [dict(output_fmt="NLC"), dict(output_fmt="NLC", norm=True, return_prefix_tokens=True)]
    if method in ("tome", "evo_vit", "cait"):
        forms.append(dict(norm=True))
    for options in forms:
        features, backend = Features(model, options), Counting()
        compiled = torch.compile(features, fullgraph=True, backend=backend)
        if TOO_OLD:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                compiled(x)
            continue
        close(compiled(x), features(x))
        close(compiled(-x), features(-x))
        assert backend.graphs == 1


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@methods("tome")
def test_intermediate_features_export(method, strict):
    model, x = patched(method), images()
    features = Features(model, dict(output_fmt="NLC"))
    with tokenops.use_backend("reference"):
        if strict and TOO_OLD:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                torch.export.export(features, (x,), strict=strict)
            return
        program = torch.export.export(features, (x,), strict=strict)
        close(program.module()(-x), features(-x))
