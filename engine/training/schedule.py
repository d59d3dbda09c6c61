"""The learning rate: linear warm-up, then halving on a plateau of the validation metric, a cosine, a decay by epochs,
or constant.
"""

import math
from typing import Any

from ssast.engine.config import TrainSection


class Schedule:
    """`lr(step)` for optimizer step `step`, counted from 0.

    The plateau rule is that of `torch.optim.lr_scheduler.ReduceLROnPlateau` with mode "max", which the official code
    uses: a validation is better if it beats the best one by a share of 1e-4; after more than `plateau_patience` that do
    not, the rate is multiplied by `plateau_factor`.
    """

    THRESHOLD = 1e-4

    def __init__(self, train: TrainSection, peak_lr: float) -> None:
        self.train, self.peak_lr = train, peak_lr
        self.factor, self.best, self.bad_validations = 1.0, -math.inf, 0

    def lr(self, step: int) -> float:
        warmup = self.train.warmup_steps
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        if (
            self.train.schedule == "decay"
        ):  # torch.optim.lr_scheduler.MultiStepLR with a milestone every `decay_every` epochs
            past = step // self.train.steps_per_epoch - self.train.decay_from
            return self.peak_lr * self.train.decay ** max(0, past // self.train.decay_every + 1)
        if self.train.schedule != "cosine":
            return self.peak_lr * self.factor
        done = (step - warmup) / max(1, self.train.steps - warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
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
        return {"factor": self.factor, "best": self.best, "bad_validations": self.bad_validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.best, self.bad_validations = state["factor"], state["best"], state["bad_validations"]
