"""How far a run has come, in steps or in time, and the learning rate that follows from it: linear warm-up, then halving
on a plateau of the validation metric, a cosine, a decay by epochs, or constant.
"""

import math
from typing import Any

from ssast.engine.config import TrainSection

# Of a run that is given minutes: warm-up, the time between validations, the time between checkpoints.
WARMUP_FRACTION, VALID_FRACTION = 0.05, 0.1
MOST_MINUTES_BETWEEN_CHECKPOINTS = 10.0


class Progress:
    """Steps done and seconds used, the same on every rank, and what is due by them.

    A run of `train.minutes` counts the seconds of its first rank's clock, validations and checkpoints included, also
    those before it was interrupted. All ranks learn of them with the metrics of a step, which arrive one step late.
    """

    def __init__(self, train: TrainSection, step: int = 0, seconds: float = 0.0) -> None:
        self.train, self.step, self.seconds = train, step, seconds
        self._before = seconds  # used before this process
        self._limit = 60.0 * train.minutes if train.minutes is not None else None
        between = VALID_FRACTION
        self._validation = _Recurrence(train.valid_every, between, self.fraction)
        if train.minutes is not None:
            between = min(between, MOST_MINUTES_BETWEEN_CHECKPOINTS / train.minutes)
        self._checkpoint = _Recurrence(train.checkpoint_every, between, self.fraction)

    @property
    def is_timed(self) -> bool:
        """Whether the run ends by the clock (`train.minutes`)."""
        return self._limit is not None

    @property
    def fraction(self) -> float:
        """Of the run that is done, from 0 to 1."""
        if self._limit is not None:
            return min(self.seconds / self._limit, 1.0)
        return min(self.step / (self.train.steps or 1), 1.0)

    @property
    def is_done(self) -> bool:
        """Whether the last step has been made."""
        return self.fraction >= 1.0

    def note_time(self, elapsed: float) -> None:
        """Seconds since training began in this process."""
        self.seconds = max(self.seconds, self._before + elapsed)

    def is_validation_due(self) -> bool:
        """Whether to validate after the last step made."""
        return self.is_done or self._validation.is_due(self.step, self.fraction)

    def is_checkpoint_due(self) -> bool:
        """Whether to save after the last step made."""
        return self.is_done or self._checkpoint.is_due(self.step, self.fraction)

    def after_validation(self, began: float) -> None:
        """A validation that began when `began` of the run was done has ended."""
        self._validation.done(began, self.fraction)

    def after_checkpoint(self, began: float) -> None:
        """As `after_validation`, of a checkpoint."""
        self._checkpoint.done(began, self.fraction)

    def at(self, step: int) -> str:
        """For the person watching: that step, and how much of the run it is."""
        if self._limit is None:
            return f"step {step} of {self.train.steps}"
        return f"step {step}, {self.fraction:.0%} of {self.train.minutes:g} minutes"


class _Recurrence:
    """Due every so many steps or, without a number of them, at every multiple of a fraction of the run; at least as
    much training lies between two as the first of them took.
    """

    def __init__(self, steps: int | None, fraction: float, now: float) -> None:
        self.steps, self.fraction = steps, fraction
        self._next = self._multiple_after(now)

    def is_due(self, step: int, now: float) -> bool:
        return step % self.steps == 0 if self.steps is not None else now >= self._next

    def done(self, began: float, ended: float) -> None:
        self._next = max(self._multiple_after(ended), 2 * ended - began)

    def _multiple_after(self, now: float) -> float:
        return (math.floor(now / self.fraction + 1e-9) + 1) * self.fraction


class Schedule:
    """`lr(step)` for optimizer step `step`, counted from 0. In a run of `train.minutes`, `fraction` of them is used.

    The plateau rule is that of `torch.optim.lr_scheduler.ReduceLROnPlateau` with mode "max", which the official code
    uses: a validation is better if it beats the best one by a fraction of 1e-4; after more than `plateau_patience` that
    do not, the rate is multiplied by `plateau_factor`.
    """

    THRESHOLD = 1e-4

    def __init__(self, train: TrainSection, peak_lr: float) -> None:
        self.train, self.peak_lr = train, peak_lr
        self.factor, self.best, self.bad_validations = 1.0, -math.inf, 0

    def lr(self, step: int, fraction: float = 0.0) -> float:
        """The learning rate of `step`; `fraction` in [0, 1] is how much of the run has passed; it counts where a run
        ends by the clock.
        """
        warmup = self.train.warmup_steps
        if self.train.minutes is not None:
            warm = fraction / WARMUP_FRACTION if warmup is None else (step + 1) / max(warmup, 1)
            return self._after_warmup(step, (fraction - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)) * min(warm, 1.0)
        warmup = warmup or 0
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        return self._after_warmup(step, (step - warmup) / max(1, (self.train.steps or 0) - warmup))

    def _after_warmup(self, step: int, done: float) -> float:
        """`done`: fraction of what follows the warm-up."""
        if self.train.schedule == "decay":
            return self.peak_lr * self.train.step_decay(step)
        if self.train.schedule != "cosine":
            return self.peak_lr * self.factor
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
        return self.peak_lr * (self.train.min_lr_share + (1.0 - self.train.min_lr_share) * cosine)

    def after_validation(self, metric: float) -> bool:
        """Take in a validation metric (higher is better); return whether it is the best so far."""
        better = (
            metric > self.best + self.THRESHOLD * abs(self.best) if math.isfinite(self.best) else math.isfinite(metric)
        )
        if better:
            self.best, self.bad_validations = metric, 0
            return True
        self.bad_validations += 1
        if self.train.schedule == "plateau" and self.bad_validations > self.train.plateau_patience:
            self.factor *= self.train.plateau_factor
            self.bad_validations = 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"factor": self.factor, "best": self.best, "bad_validations": self.bad_validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.factor, self.best, self.bad_validations = state["factor"], state["best"], state["bad_validations"]
