"""What is measured while training goes on: rates, and metrics that are read one step late, so that the host never waits
for the step that it has just launched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ssast.engine.distributed.ranks import Ranks


class Clock:
    """Rates since the row before: clips a second, seconds of audio a second, and the fraction of time spent waiting for
    data.
    """

    def __init__(self, clips_per_step: int, seconds_per_clip: float) -> None:
        self.clips_per_step, self.seconds_per_clip = clips_per_step, seconds_per_clip
        self.began = self.since = time.perf_counter()
        self.steps, self.waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def tick(self) -> None:
        """Count a step."""
        self.steps += 1

    def elapsed(self) -> float:
        """Seconds since training began in this process."""
        return time.perf_counter() - self.began

    def rates(self) -> dict[str, float]:
        """Rates since the last call, with which a new interval begins. `data_stall` is the fraction of it spent waiting
        for data; `seconds` are those since the clock was made.
        """
        now = time.perf_counter()
        elapsed = max(now - self.since, 1e-9)
        clips_per_s = self.steps * self.clips_per_step / elapsed
        rates = {
            "clips_per_s": round(clips_per_s, 3),
            "audio_s_per_s": round(clips_per_s * self.seconds_per_clip, 2),
            "data_stall": round(min(self.waited / elapsed, 1.0), 4),
            "seconds": round(now - self.began, 3),
        }
        self.since, self.steps, self.waited = now, 0, 0.0
        return rates


class ChanceWatch:
    """Counts the validations at the level of chance from the beginning of a run until one is above it."""

    patience: ClassVar[int] = 5
    """So many of them are a reason to warn."""

    def __init__(self) -> None:
        self.count: int | None = 0
        """None once a validation was above the level of chance."""

    def after_validation(self, at_chance: bool) -> bool:
        """Whether it is time to warn, which it is once in a run at most."""
        self.count = None if self.count is None or not at_chance else self.count + 1
        return self.count == self.patience


@dataclass(frozen=True)
class StepMetrics:
    """What all ranks know of one optimizer step."""

    step: int
    losses: dict[str, float]
    """Means over all clips."""
    stop: bool
    """Whether any rank was asked to stop during it."""
    elapsed: float
    """Seconds since training began, by the first rank's clock at the end of the step."""
    row: dict[str, Any] | None
    """What else is logged of it, on the first rank."""


@dataclass(frozen=True)
class _Sent:
    step: int
    values: torch.Tensor  # [metrics + 2 or 3]
    arrive: Callable[[], object]
    row: dict[str, Any] | None


class MetricsExchange:
    """Sums of a step's metrics over the ranks, sent when the step is launched and read when the next one is."""

    def __init__(self, names: Sequence[str], ranks: Ranks) -> None:
        self.names, self.ranks = names, ranks
        self._sent: _Sent | None = None

    def send(
        self, step: int, losses: torch.Tensor, *, stop: bool, elapsed: float, row: dict[str, Any] | None
    ) -> StepMetrics | None:
        """Send a step's metrics [len(names)] round; return those of the step before."""
        previous = self.collect()
        # filled on the device: a copy from the host would wait
        flags = [float(stop), elapsed if self.ranks.is_first else 0.0]
        summed = torch.cat([losses, *(torch.full((1,), flag, device=losses.device) for flag in flags)])
        work = dist.all_reduce(summed, async_op=True)
        arrive: Callable[[], object] = work.wait
        if summed.is_cuda:
            work.wait()  # makes the stream wait, not the host
            if row is not None and isinstance(row["grad_norm"], torch.Tensor):  # reading it by itself would wait
                summed = torch.cat((summed, row.pop("grad_norm").detach().float().reshape(1)))
            summed = torch.empty(summed.shape, pin_memory=True).copy_(summed, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            arrive = copied.synchronize
        self._sent = _Sent(step, summed, arrive, row)
        return previous

    def collect(self) -> StepMetrics | None:
        """The metrics on their way, if there are any."""
        if self._sent is None:
            return None
        sent, self._sent = self._sent, None
        sent.arrive()
        count = len(self.names)
        values = sent.values.tolist()
        if sent.row is not None and len(values) > count + 2:
            sent.row["grad_norm"] = values[-1]
        means = (value / self.ranks.world_size for value in values[:count])
        losses = dict(zip(self.names, means, strict=True))
        return StepMetrics(sent.step, losses, values[count] > 0, values[count + 1], sent.row)
