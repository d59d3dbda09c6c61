"""Our step and the baselines' in turns, on one device: `python -m ssast.benchmarks.throughput.baseline_race OUT CONFIG
...`, started by `ssast profile`. Writes OUT, a JSON file of the rows of profile.json's "baselines".

All start from the same weights and are fed the same noise, int16 in the host's memory, so that what differs is the step
alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssast.benchmarks.turns import median_ratio, take_turns
from ssast.engine.config import Config
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.model.adapt import build_model
from ssast.engine.process import leave
from ssast.engine.training.pretraining import Pretraining
from ssast.engine.training.trainer import Trainer

from .measure import in_memory, in_scratch, measurement_parser, nothing_to_read, time_steps, undisturbed
from .step_baselines import StepBaseline, step_baselines

TURNS = 5
TURN_SECONDS = 1.0  # at least one step
WARM_UP = 3  # steps; what compiles is done by then
NAMES = ("official way", "eager", "torch.compile")


@dataclass
class Runner:
    """One that takes turns."""

    name: str
    what: str
    clips: int
    """Of one step."""
    step: Callable[[], object]
    device: torch.device
    peak_bytes: int | None = None

    def clips_per_s(self, seconds: float) -> float:
        """Over about so many seconds, at least one step."""
        (first,) = time_steps(self.step, 1, self.device)
        steps = max(1, round(seconds / first) - 1)
        return steps * self.clips / sum(time_steps(self.step, steps, self.device))


def race(runners: list[Runner], turns: int = TURNS, seconds: float = TURN_SECONDS) -> list[dict[str, Any]]:
    """The first is ours. Ratios are taken within each turn, and their median is given."""
    ours, *others = take_turns(runners, turns, lambda runner, _: runner.clips_per_s(seconds))
    return [
        {
            "name": runner.name,
            "what": runner.what,
            "clips_per_s": statistics.median(rates),
            "ratio": median_ratio(ours, rates),
            "clips": runner.clips,
            "peak_bytes": runner.peak_bytes,
        }
        for runner, rates in zip(runners[1:], others, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    """One process on one device; exit status 0, or that of a mistake in the config."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)

    def measure(config: Config, ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
        config = undisturbed(config, folder)
        data, model = nothing_to_read(config), build_model(config.architecture, config.run.seed)
        baselines = step_baselines(config, model, ranks.device, mean=data.mean, std=data.std, names=arguments.names)
        trainer = Trainer(config, data, model, ranks, Pretraining(config, data, ranks))
        waveforms = in_memory(trainer, torch.device("cpu")).waveforms
        runners = [_ours(trainer)] + [baseline_runner(each, waveforms, ranks.device) for each in baselines]
        return race(runners, arguments.turns)

    return in_scratch(arguments, measure)


def _ours(trainer: Trainer) -> Runner:
    batches, clock = iter(in_memory(trainer, torch.device("cpu"))), trainer.new_clock()
    runner = Runner(
        "this engine", "", trainer.training_step.clips, lambda: trainer.run_step(batches, clock), trainer.ranks.device
    )
    time_steps(runner.step, WARM_UP, runner.device)
    return runner


def baseline_runner(baseline: StepBaseline, waveforms: list[torch.Tensor], device: torch.device) -> Runner:
    """A baseline that is warm, on batches [B, S] in the host's memory, halved as often as it takes to fit."""
    on_gpu, clips = device.type == "cuda", len(waveforms[0])
    turn = itertools.cycle(waveforms)
    while True:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:

            def step(clips: int = clips) -> torch.Tensor:
                return baseline.step(next(turn)[:clips])

            runner = Runner(baseline.name, baseline.what, clips, step, device)
            time_steps(runner.step, WARM_UP, device)
            break
        except torch.OutOfMemoryError:
            if clips == 1:
                raise
            clips //= 2
            torch.cuda.empty_cache()
    runner.peak_bytes = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return runner


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = measurement_parser("baseline_race", __doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--names", nargs="+", default=list(NAMES), help="baselines, of " + ", ".join(NAMES))
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    leave(main())
