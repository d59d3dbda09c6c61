import contextlib
from types import SimpleNamespace

import pytest
import torch

from ssast.benchmarks import timing
from ssast.benchmarks.timing import Job, measure

CPU = torch.device("cpu")


def test_jobs_take_turns_over_all_their_inputs():
    calls = []
    jobs = [Job(name, sets=3, run=lambda i, _, name=name: calls.append((name, i))) for name in "ab"]
    timings = measure(jobs, CPU, seconds=0.001)
    timed = calls[2:]  # after one warm-up each
    assert [name for name, _ in timed[: 2 * timing.FEWEST]] == ["a", "b"] * timing.FEWEST
    assert {i for _, i in timed} == {0, 1, 2}
    assert all(len(timings[name].samples) >= timing.FEWEST for name in "ab")
    assert timings["a"].quantile(0.2) <= timings["a"].quantile(0.5) <= timings["a"].quantile(0.8)


def test_preparing_is_not_timed(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def spend(seconds):
        clock.now += seconds
        return seconds

    job = Job("a", sets=1, prepare=lambda i: spend(10.0), run=lambda i, prepared: spend(prepared / 100))
    assert measure([job], CPU, seconds=1.0)["a"].samples == pytest.approx([0.1] * timing.FEWEST)


def test_a_slow_job_does_not_cost_the_others_their_samples(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def spend(seconds):
        clock.now += seconds

    jobs = [Job("slow", 1, lambda i, _: spend(1.0)), Job("quick", 1, lambda i, _: spend(0.01))]
    timings = measure(jobs, CPU, seconds=2.0)
    assert len(timings["slow"].samples) == timing.FEWEST and 99 <= len(timings["quick"].samples) <= 101


class Device:
    """A stand-in for torch.cuda that only keeps a clock: the host queues, the device works."""

    def __init__(self):
        self.now, self.capturing, self.refuses = 0.0, None, False

    def work(self, seconds):
        if self.capturing is None:
            self.now += seconds
        else:
            self.capturing.append(seconds)

    def install(self, monkeypatch):
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self): ...

            def elapsed_time(self, other):
                return (other.at - self.at) * 1000

        class CUDAGraph:
            def __init__(self):
                self.work = []

            def pool(self):
                return "pool"

            def replay(self):
                device.now += sum(self.work)

        @contextlib.contextmanager
        def graph(into, pool=None, stream=None):
            device.capturing = into.work
            try:
                if device.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                yield
            finally:
                device.capturing = None

        fake = SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            graph=graph,
            synchronize=lambda: None,
            current_stream=lambda: None,
            get_device_properties=lambda _: SimpleNamespace(L2_cache_size=1024),
        )
        monkeypatch.setattr(torch, "cuda", fake)
        monkeypatch.setattr(timing, "SCRATCH_BYTES", 4096)
        monkeypatch.setattr(torch.Tensor, "sum", lambda tensor: device.work(1e-5))
        monkeypatch.setattr(timing, "WARM_UP", 0.0)
        return lambda jobs, seconds=1e-9: {
            sampler.job.name: (sampler.method, pytest.approx(sampler.sample()))
            for sampler in timing._cuda_samplers(jobs, CPU)
        }


def test_short_calls_are_captured_and_all_with_them(monkeypatch):
    device = Device()
    samples = device.install(monkeypatch)
    quick = Job("quick", 4, prepare=lambda i: device.work(5e-4), run=lambda i, _: device.work(2e-5))
    long = Job("long", 4, run=lambda i, _: device.work(3e-4))
    loop = Job("loop", 4, run=lambda i, _: device.work(4e-4), loops_on_host=True)
    assert samples([quick, long, loop]) == {"quick": ("graph", 2e-5), "long": ("graph", 3e-4), "loop": ("events", 4e-4)}
    assert samples([long, loop]) == {"long": ("events", 3e-4), "loop": ("events", 4e-4)}


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(monkeypatch):
    device = Device()
    device.install(monkeypatch)
    device.refuses = True
    sampler = timing._cuda_samplers([Job("quick", 2, run=lambda i, _: device.work(2e-5))], CPU)[0]
    assert (
        sampler.method == "events"
        and sampler.remark == "no CUDA graph: operation not permitted when stream is capturing"
    )
    assert sampler.sample() == pytest.approx(2e-5)
