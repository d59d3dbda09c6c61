"""How long calls take, measured side by side.

All jobs are timed in turn, round after round, so that what the machine does to one it does to all: clocks that rise or
fall, neighbours. Each call works on another set of inputs than the one before.

On a GPU every measurement starts with caches cold: a buffer several times the size of L2 is read first. (Read, not
written: lines to be written back would be charged to the call.) It is read again and again until the host has had the
time to queue the whole call, so that events around it time the device's work and not the host's. Where any job takes
less than GRAPH_BELOW, all that can be are captured as CUDA graphs, of one call on each set of inputs, so that the start
of a graph weighs little on a short call, and all are treated alike. Only jobs that loop in Python are timed with the
host's part, which is theirs. What a call leaves in cache at its end, not yet written to memory, is not charged to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

GRAPH_BELOW = 100e-6  # seconds
FEWEST, MOST = 5, 1000  # samples of a job
WARM_UP = 0.2  # seconds on a GPU, for its clocks
SCRATCH_BYTES = 256 << 20
LONGEST_LEAD = 2e-3  # seconds that the device is kept busy at most while the host queues a call


@dataclass(eq=False)
class Job:
    """`run(i, prepare(i))` for input set i; only `run` is timed."""

    name: str
    sets: int
    run: Callable[[int, Any], Any]
    prepare: Callable[[int], Any] | None = None
    loops_on_host: bool = False

    def prepared(self, which: int) -> Any:
        """What `prepare` makes for an input set; None without it."""
        return self.prepare(which) if self.prepare else None


@dataclass
class Timing:
    """Seconds of one call. Of a graph's samples each is the mean over its calls."""

    method: str
    remark: str = ""
    samples: list[float] = field(default_factory=list)

    def quantile(self, fraction: float) -> float:
        """Seconds that this fraction of the samples stays within."""
        return float(np.quantile(self.samples, fraction))


def measure(jobs: Sequence[Job], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time the jobs in turn for about so many seconds altogether; a job slower than its part of them still gets FEWEST
    samples.

    On a GPU, a stream that is not the default one must be current, and the jobs' tensors made on it: a graph can hold
    no other.
    """
    if device.type == "cuda":
        samplers = _cuda_samplers(jobs, device)
        until = time.perf_counter() + min(WARM_UP, seconds)
        while time.perf_counter() < until:
            for sampler in samplers:
                sampler.sample()
    else:
        samplers = [_HostSampler(job) for job in jobs]
    timings = {sampler.job.name: Timing(sampler.method, sampler.remark) for sampler in samplers}
    spent = dict.fromkeys(timings, 0.0)
    while True:
        rounds = {name: len(timing.samples) for name, timing in timings.items()}
        turn = [
            sampler
            for sampler in samplers
            if rounds[sampler.job.name] < FEWEST
            or (rounds[sampler.job.name] < MOST and spent[sampler.job.name] < seconds / len(jobs))
        ]
        if not turn:
            return timings
        for sampler in turn:
            began = time.perf_counter()
            timings[sampler.job.name].samples.append(sampler.sample())
            spent[sampler.job.name] += time.perf_counter() - began


class _Sampler:
    """Takes one sample at a time."""

    method = ""

    def __init__(self, job: Job, remark: str = "") -> None:
        self.job, self.remark, self._turn = job, remark, 0

    def next_set(self) -> int:
        self._turn = (self._turn + 1) % self.job.sets
        return self._turn

    def sample(self) -> float:
        raise NotImplementedError


class _HostSampler(_Sampler):
    method = "perf_counter"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.sample()  # warm

    def sample(self) -> float:
        which = self.next_set()
        prepared = self.job.prepared(which)
        began = time.perf_counter()
        result = self.job.run(which, prepared)
        elapsed = time.perf_counter() - began
        del result  # freeing it is not timed
        return elapsed


class _Cold:
    """Cold caches, and a device kept busy for a while."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.zeros(max(SCRATCH_BYTES, 4 * l2) // 4, device=device)
        self._seconds = 1e-3
        self.keep_busy(0)
        self._seconds = _between(lambda: self._read(10)) / 10

    def keep_busy(self, seconds: float) -> None:
        self._read(2 + math.ceil(min(seconds, LONGEST_LEAD) / self._seconds))

    def _read(self, times: int) -> None:
        for _ in range(times):
            self._scratch.sum()


class _EventSampler(_Sampler):
    method = "events"

    def __init__(self, job: Job, cold: _Cold, remark: str = "") -> None:
        super().__init__(job, remark)
        self._cold, self._lead = cold, 0.0
        self.sample()  # warm
        prepared = job.prepared(0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        job.run(0, prepared)
        if not job.loops_on_host:
            self._lead = 1.5 * (time.perf_counter() - began)

    def sample(self) -> float:
        which = self.next_set()
        prepared = self.job.prepared(which)
        self._cold.keep_busy(self._lead)
        return _between(lambda: self.job.run(which, prepared))


class _GraphSampler(_Sampler):
    method = "graph"

    def __init__(self, job: Job, cold: _Cold) -> None:
        super().__init__(job)
        self._cold, sets, stream = cold, range(job.sets), torch.cuda.current_stream()
        self._before, self._timed, pool = None, torch.cuda.CUDAGraph(), None
        prepared = [None] * job.sets
        if job.prepare is not None:
            self._before = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._before, stream=stream):
                prepared = [job.prepare(i) for i in sets]
            pool = self._before.pool()
        with torch.cuda.graph(self._timed, pool=pool, stream=stream):
            # so that no call writes over the last one's results, still in cache
            results = [job.run(i, prepared[i]) for i in sets]
        del results

    def sample(self) -> float:
        if self._before is not None:
            self._before.replay()
        self._cold.keep_busy(0)
        return _between(self._timed.replay) / self.job.sets


def _cuda_samplers(jobs: Sequence[Job], device: torch.device) -> list[_Sampler]:
    cold = _Cold(device)
    samplers: list[_Sampler] = [_EventSampler(job, cold) for job in jobs]
    if all(min(sampler.sample() for _ in range(3)) >= GRAPH_BELOW for sampler in samplers):
        return samplers
    return [sampler if sampler.job.loops_on_host else _captured(sampler.job, cold) for sampler in samplers]


def _captured(job: Job, cold: _Cold) -> _Sampler:
    try:
        return _GraphSampler(job, cold)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return _EventSampler(job, cold, remark=f"no CUDA graph: {str(error).splitlines()[0]}")


def _between(call: Callable[[], Any]) -> float:
    """Seconds of the device from before the call to after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1000
