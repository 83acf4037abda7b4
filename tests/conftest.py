"""Fixtures every test shares. Without a GPU the Triton kernels run interpreted; `--device cuda` runs them for real."""

import inspect
import os

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("tokenops")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the kernels run")
    group.addoption("--seeds", type=int, default=1, help="run every test with random numbers of so many seeds")
    group.addoption(
        "--margins", metavar="FILE", help="note how near each comparison with plain PyTorch came: JSON lines"
    )


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was asked for, but torch sees no GPU")
    if config.getoption("--device") == "cpu":
        from support.interpreter import patch_once

        patch_once()
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    if config.getoption("--margins"):
        from support import tolerance

        tolerance.NOTED_IN = config.getoption("--margins")


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


def pytest_generate_tests(metafunc):
    """A test that takes `backend` runs on every backend that its module's OPERATOR has on the device."""
    seeds = metafunc.config.getoption("--seeds")
    if seeds > 1:
        metafunc.parametrize("seeded", range(seeds), indirect=True, ids="seed{}".format)
    if "backend" in metafunc.fixturenames:
        from tokenops._backends import TABLE

        operator, device = metafunc.module.OPERATOR, metafunc.config.getoption("--device")
        paths = TABLE[operator][device]
        if device == "cpu" and operator in COMPOSED:
            paths = (*paths, "composed")
        metafunc.parametrize("backend", paths, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        mark_slow_ones(items)
        return
    of_the_device = [item for item in items if takes_the_device(item)]
    config.hook.pytest_deselected(items=[item for item in items if not takes_the_device(item)])
    items[:] = sorted(of_the_device, key=order_on_a_gpu)


def mark_slow_ones(items):
    """`slow_interpreted(quick=None)` is slow where Triton's interpreter runs the kernels, but for the parameters that
    the function `quick` says are quick (it takes those that it names)."""
    for item in items:
        marker, params = (
            item.get_closest_marker("slow_interpreted"),
            getattr(getattr(item, "callspec", None), "params", {}),
        )
        if marker is None or params.get("backend") != "triton":
            continue
        quick = marker.kwargs.get("quick")
        if quick is None or not quick(*(params[name] for name in inspect.signature(quick).parameters)):
            item.add_marker(pytest.mark.slow)


def takes_the_device(item):
    """Whether a test has anything to say of a GPU."""
    return "device" in getattr(item, "fixturenames", ()) and item.get_closest_marker("cpu_only") is None


#: what a test's name begins with -> when it runs on a GPU, where a run may be cut: the most telling first
FIRST = ("test_forward_and_backward", "test_as_good_as_plain", "test_scatter_as_good_as_plain", "test_everything")
LATER = ("test_layouts", "test_packed", "test_gradcheck", "test_opcheck", "test_compile", "test_inductor")


def order_on_a_gpu(item):
    return 0


#: operators whose CPU path is torch's own kernels with compiled code between them, or without it: "composed"
COMPOSED = ("soft_aggregate", "masked_channel_attention")


@pytest.fixture
def backend(request, device, monkeypatch):
    """The name of the backend that runs the module's OPERATOR; what cannot run fails the test, unless it was not built
    for want of a compiler."""
    import torch

    import tokenops
    from tokenops import _backends

    operator, name = request.module.OPERATOR, request.param
    if name == "composed":
        monkeypatch.setattr(f"tokenops._cpu.{operator}._compiled", lambda *tensors: False)
        name = "native"
    reason = _backends.why_not(operator, name, device, torch.float32)
    if reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    with tokenops.use_backend(name):
        yield name


@pytest.fixture(params=["quick", pytest.param("whole", marks=pytest.mark.slow)])
def gradcheck(request, backend, device):
    """gradcheck(function, leaves) against finite differences in fp64: of every element, or, quick and interpreted, in a
    random direction for each leaf and each result."""
    import torch

    interpreted = backend == "triton" and device == "cpu"

    def check(function, leaves):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted and request.param == "quick")

    return check


@pytest.fixture(autouse=True)
def seeded(request):
    import torch

    torch.manual_seed(getattr(request, "param", 0))


@pytest.fixture
def emulate(request, tmp_path, tmp_path_factory):
    """emulate(operator, arrays, runs) runs CUDA kernels on the host; see support/emulation.py."""
    from support.emulation import Emulation

    cache = getattr(request.config, "cache", None)
    builds = cache.mkdir("emulation") if cache else tmp_path_factory.getbasetemp() / "emulation"
    builds.mkdir(exist_ok=True)
    return Emulation(builds, tmp_path)


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN (ints: the largest value), so an element that no kernel wrote is seen."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def ran_kernels():
    """`with ran_kernels() as names:` collects the tokenops kernels that ran: {"soft_aggregate_fwd.triton", ...}."""
    from contextlib import contextmanager

    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "tokenops":
                self.names.add(str(func).removeprefix("tokenops."))
            return func(*args, **(kwargs or {}))

    @contextmanager
    def record():
        with Recorder() as recorder:
            yield recorder.names

    return record
