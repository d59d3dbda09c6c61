import random

import pytest
import torch

from ssast.engine.config import TrainSection
from ssast.engine.training.schedule import Schedule


def test_plateau_is_pytorchs():
    """Step for step the rule of ReduceLROnPlateau(mode="max"), over random metrics."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    for seed in range(20):
        rng = random.Random(seed)
        patience = rng.randrange(4)
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=patience)
        ours = Schedule(TrainSection(steps=100, warmup_steps=0, plateau_patience=patience), 0.1)
        for _ in range(40):
            metric = round(rng.random(), 1)
            theirs.step(metric)
            ours.after_validation(metric)
            # theirs stops at changes of 1e-8
            assert ours.lr(50) == pytest.approx(optimizer.param_groups[0]["lr"], abs=2e-8)


def test_generative_metrics_are_negative_and_still_compare():
    schedule = Schedule(TrainSection(steps=10, warmup_steps=0, plateau_patience=0), 1.0)
    assert schedule.after_validation(-0.5) and schedule.after_validation(-0.4) and not schedule.after_validation(-0.45)
    assert schedule.lr(5) == 0.5


def test_warmup_and_cosine():
    schedule = Schedule(TrainSection(steps=110, warmup_steps=10, schedule="cosine", min_lr_share=0.1), 2.0)
    assert [schedule.lr(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert schedule.lr(10) == 2.0 and schedule.lr(60) == pytest.approx(1.1) and schedule.lr(110) == pytest.approx(0.2)


def test_state_comes_back():
    train = TrainSection(steps=100, warmup_steps=0, plateau_patience=1)
    one = Schedule(train, 1.0)
    for metric in (0.5, 0.4, 0.4, 0.3):
        one.after_validation(metric)
    two = Schedule(train, 1.0)
    two.load_state_dict(one.state_dict())
    for metric in (0.2, 0.1, 0.6, 0.1):
        assert one.after_validation(metric) == two.after_validation(metric) and one.lr(9) == two.lr(9)


def test_a_diverged_model_is_never_the_best():
    schedule = Schedule(TrainSection(steps=10, warmup_steps=0), 1.0)
    nan = float("nan")
    assert not schedule.after_validation(nan)
    assert schedule.after_validation(-2.0) and not schedule.after_validation(nan) and schedule.best == -2.0
