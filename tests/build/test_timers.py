"""benchmarks/timers.py: the GPU's clocks on a GPU that only says whether it has waited."""

import contextlib

import pytest
import torch

import timers


class Gpu:
    """Sleeps as it is told, is busy for a millisecond a call, and needs `host` cycles of the host to queue one."""

    def __init__(self, monkeypatch, host):
        self.host, self.slept, self.calls, self.modes = host, [], 0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.calls = gpu.calls

            def query(self):
                return gpu.slept[-1] < gpu.host * gpu.calls

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return float(end.calls - self.calls)  # milliseconds

        class Stream:
            def wait_stream(self, other):
                pass

        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "synchronize": lambda: None,
            "_sleep": self.sleep,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "set_sync_debug_mode": self.modes.append,
            "CUDAGraph": lambda: self,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def sleep(self, cycles):
        self.slept.append(cycles)
        self.calls = 0

    def call(self):
        self.calls += 1
        return self.calls

    @contextlib.contextmanager
    def graph(self, graph):
        self.modes.append("capturing")
        yield

    def replay(self):
        self.modes.append("replayed")


def test_the_gpu_sleeps_until_everything_is_queued(monkeypatch):
    gpu = Gpu(monkeypatch, host=10**6)
    assert timers.GpuClock().queued(gpu.call) == 1e-3 and gpu.slept == [4 * 10**6]


def test_it_sleeps_longer_for_a_slow_host(monkeypatch):
    gpu = Gpu(monkeypatch, host=5 * 10**6)
    assert timers.GpuClock().queued(gpu.call) == 1e-3 and gpu.slept == [4 * 10**6, 4 * 10**7]


def test_what_cannot_be_queued_is_not_timed_as_if_it_were(monkeypatch):
    gpu = Gpu(monkeypatch, host=10**9)
    with pytest.raises(RuntimeError, match="could not queue a sample"):
        timers.GpuClock().queued(gpu.call)


def test_a_call_is_warm_before_it_is_captured(monkeypatch):
    gpu = Gpu(monkeypatch, host=1)
    replay = timers.GpuClock().graphed(gpu.call)
    assert gpu.modes == ["error", "default", "capturing"] and gpu.calls == 5
    assert replay() == 5 and gpu.modes[-1] == "replayed"


def test_what_waits_for_the_device_is_not_captured(monkeypatch):
    """A capture that it breaks would leave torch's generator capturing."""
    gpu = Gpu(monkeypatch, host=1)

    def waits():
        if gpu.modes == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        timers.GpuClock().graphed(waits)
    assert gpu.modes == ["error", "default"]


def test_a_graphed_module_takes_new_inputs():
    module = timers.Graphed(lambda x: 2 * x, timers.Clock())
    for value in (1.0, 3.0):
        assert module(torch.full((2,), value)).tolist() == [2 * value] * 2


def test_a_frozen_module_is_a_copy_with_constant_weights():
    module, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval(), torch.randn(2, 8)
    before, expected = {name: t.clone() for name, t in module.state_dict().items()}, module(x).detach()
    frozen = timers.Frozen(module)
    torch.testing.assert_close(frozen(x), expected)
    assert not torch._inductor.config.freezing, "only while it is compiled"
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    with torch.no_grad():
        for parameter in (*module.parameters(), *frozen.compiled.parameters()):
            parameter.zero_()
    linear = torch.nn.functional.linear(-x, before["0.weight"], before["0.bias"])
    torch.testing.assert_close(frozen(-x), torch.nn.functional.gelu(linear))


def test_a_pulse_moves_where_its_thirds_do():
    pulse = timers.Pulse(timers.Clock(), torch.float32, quick=True)
    pulse.beat()
    pulse.beat_again()
    assert all(len(rates) == 1 and rates[0] > 0 for rates in pulse.rates.values()), "the last beat was just now"
    pulse.rates = {
        "spikes": [1.0, 10.0, 10.0, 99.0, 10.0, 10.0, 10.0, 11.0, 10.0],
        "drift": [8.0, 8.0, 10.0, 10.0, 10.0],
    }
    assert pulse.found() == {
        "spikes": {"median": 10.0, "moved": 0.0},
        "drift": {"median": 10.0, "moved": pytest.approx(0.25)},
    }
