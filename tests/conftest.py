"""Fixtures every test shares. Without a GPU the Triton kernels run interpreted; `--device cuda` runs them for real."""

import contextlib
import inspect
import os
import re

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
    else:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes that run tests are enough
    import torch

    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was asked for, but torch sees no GPU")
    if config.getoption("--device") == "cpu":
        from support.interpreter import patch_once

        patch_once()
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    if config.getoption("--device") == "cuda":
        torch.set_num_threads(1)  # the other cores compile
        torch.backends.cudnn.allow_tf32 = False  # by default convolutions are rounded to 10 bits
    if config.getoption("--margins"):
        from support import tolerance

        tolerance.NOTED_IN = config.getoption("--margins")


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def on_device(device):
    """Tensors and models are made on the device where no other is said."""
    import torch

    if device == "cpu":
        yield
    else:
        with torch.device(device):
            yield


@pytest.fixture
def chosen(device):
    """chosen("token_mlp_fwd", ...): the kernels that run where nobody asks for a backend."""
    import torch

    from tokenops.ops import backends

    def names(*operators):
        return {f"{name}.{backends.choose(name.rpartition('_')[0], device, torch.float32)}" for name in operators}

    return names


def pytest_generate_tests(metafunc):
    """A test that takes `backend` runs on every backend that its module's OPERATOR has on the device; one that takes
    `call` too, on those that each of support/calls.py has."""
    seeds = metafunc.config.getoption("--seeds")
    if seeds > 1:
        metafunc.parametrize("seeded", range(seeds), indirect=True, ids="seed{}".format)
    if "backend" not in metafunc.fixturenames:
        return
    from support.calls import CALLS
    from tokenops.ops.backends import TABLE

    device = metafunc.config.getoption("--device")

    def paths(operator):
        found = TABLE[operator][device]
        return (*found, "composed") if device == "cpu" and operator in COMPOSED else found

    if "call" in metafunc.fixturenames:
        rows = [(call, path) for call in CALLS for path in paths(CALLS[call].operator)]
        metafunc.parametrize("call, backend", rows, indirect=True)
    else:
        metafunc.parametrize("backend", paths(metafunc.module.OPERATOR), indirect=True)


def pytest_ignore_collect(collection_path, config):
    """Files without a test of the device are not imported where it is a GPU: what they need may not be there."""
    if config.getoption("--device") == "cuda" and collection_path.name.startswith("test_"):
        return None if OF_THE_DEVICE.search(collection_path.read_text()) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        of_a_gpu = [item for item in items if item.get_closest_marker("gpu_only")]
        config.hook.pytest_deselected(items=of_a_gpu)
        items[:] = [item for item in items if item not in of_a_gpu]
        mark_slow_ones(items)
        return
    kept = sorted(filter(takes_the_device, items), key=turn_on_a_gpu)
    left_out = [item for item in items if not takes_the_device(item)]
    config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = len(left_out)
    # pytest-xdist cuts the list into as many pieces as there are processes: each piece begins with what is telling
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [item for first in reversed(range(processes)) for item in kept[first::processes]]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", None) or node.config.stash.get(LEFT_OUT, {})


def pytest_terminal_summary(terminalreporter, config):
    """What pytest-xdist does not tell: how many tests its processes have left out."""
    left_out = config.stash.get(LEFT_OUT, {}).get("left_out")
    if left_out is not None:
        terminalreporter.write_line(f"{left_out} tests that have nothing to say of a GPU were left out")


LEFT_OUT = pytest.StashKey[dict]()


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


OF_THE_DEVICE = re.compile(r"^def test_\w+\([^)]*\b(device|backend)\b|on_device", re.MULTILINE)


def takes_the_device(item):
    """Whether a test has something to say of a GPU."""
    if "device" not in getattr(item, "fixturenames", ()) or item.get_closest_marker("cpu_only") is not None:
        return False
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "gradcheck" in params and "call" in params:  # in fp64, which the Triton matrix kernels do not take on a GPU
        from support.calls import CALLS

        if CALLS[params["call"]].operator in COMPOSED:
            return False
    return params.get("gradcheck") != "whole"  # both are there


#: names of tests in the order they run in on a GPU, where a run may be cut: the most telling first
TELLING = ("forward_and_backward|as_good_as_plain", "layouts|expanded|packed|any_index", "grad|autograd", "models")
LAST = ("opcheck|compile|inductor|graph", "offsets_beyond")


def turn_on_a_gpu(item):
    order = (*TELLING, "rest", *LAST)
    name = item.originalname if item.path.parent.name == "ops" else "models"
    found = [i for i, words in enumerate(order) if re.search(words, name)]
    wide = "float64" in item.name  # rarely used, slow, and of one kernel's dtypes the least telling
    return item.get_closest_marker("slow") is not None, wide, min(found, default=order.index("rest"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Where a GPU was asked for, nothing is skipped."""
    report = yield
    if report.skipped and item.config.getoption("--device") == "cuda":
        report.outcome, report.longrepr = "failed", f"skipped, though a GPU was asked for: {report.longrepr}"
    return report


#: operators whose CPU path has two forms: torch's own kernels with compiled code between them, or without it; with code
#: for AVX-512 and AMX, or without it. "composed" is without
COMPOSED = ("soft_aggregate", "soft_scatter", "token_mlp", "masked_channel_attention")


@pytest.fixture
def call(request):
    """One of support/calls.py."""
    from support.calls import CALLS

    return CALLS[request.param]


@pytest.fixture
def backend(request, device, monkeypatch):
    """The name of the backend that runs the call, or the module's OPERATOR; what cannot run fails the test, unless it
    was not built for want of a compiler."""
    import torch

    import tokenops
    from tokenops.ops import backends, native

    called = "call" in request.fixturenames
    operator, name = request.getfixturevalue("call").operator if called else request.module.OPERATOR, request.param
    asked = "native" if name == "composed" else name
    limited = contextlib.nullcontext()
    if name == "composed" and operator in backends.COMPOSED:  # an overload of its own
        monkeypatch.setattr("tokenops.ops.native.attention_isa", lambda dtype: None)
    elif name == "composed":
        name = "native"
        if native.why_not("cpu") is None:
            limited = native.limit_cpu_isa("avx2")
    reason = backends.why_not(operator, asked, device, torch.float32)
    if name == "native" and operator in backends.COMPOSED:
        reason = native.why_not(device)
    if device == "cpu" and reason is not None and "no C++ compiler" in reason:
        pytest.skip(reason)
    with limited, tokenops.use_backend(asked):
        yield name


@pytest.fixture(params=["quick", pytest.param("whole", marks=pytest.mark.slow)])
def gradcheck(request, backend, device):
    """gradcheck(function, leaves) against finite differences in fp64: of every element, or, quick and interpreted, in a
    random direction for each leaf and each result."""
    import torch

    interpreted = backend == "triton" and device == "cpu"

    def check(function, leaves):
        quick = interpreted and request.param == "quick"
        # torch's own layer norm need not sum in one order on a GPU
        assert torch.autograd.gradcheck(function, leaves, fast_mode=quick, nondet_tol=0.0 if device == "cpu" else 1e-9)

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
def much_memory(device):
    """What a test of many gigabytes reserves, other processes may have after it."""
    import torch

    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def ran_kernels():
    """`with ran_kernels() as names:` collects the tokenops kernels that ran: {"soft_aggregate_fwd.triton", ...}."""
    from tokenops.measuring.timing import recorded_kernels

    return recorded_kernels
