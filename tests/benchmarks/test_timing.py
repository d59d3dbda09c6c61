"""Timing on this machine's own clock; test_on_gpu.py sees events and graphs."""

import time

import numpy as np
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


def test_samples_are_seconds_of_the_call_without_its_preparation():
    job = Job("a", sets=1, prepare=lambda i: time.sleep(0.05) or 0.002, run=lambda i, prepared: time.sleep(prepared))
    samples = measure([job], CPU, seconds=0.01)["a"].samples
    assert len(samples) == timing.FEWEST and min(samples) >= 0.002
    assert np.median(samples) < 0.05, "the preparation alone takes as long"


def test_a_slow_job_does_not_cost_the_others_their_samples():
    jobs = [Job("slow", 1, lambda i, _: time.sleep(0.05)), Job("quick", 1, lambda i, _: time.sleep(0.001))]
    timings = measure(jobs, CPU, seconds=0.4)
    assert len(timings["slow"].samples) == timing.FEWEST < len(timings["quick"].samples)


def test_no_job_is_sampled_without_end():
    assert len(measure([Job("nothing", 1, lambda i, _: None)], CPU, seconds=5.0)["nothing"].samples) == timing.MOST
