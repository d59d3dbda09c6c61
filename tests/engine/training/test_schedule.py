import random

import pytest
import torch

from ssast.engine.config import TrainSection
from ssast.engine.training.schedule import Progress, Schedule


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


def timed(**settings) -> TrainSection:
    return TrainSection(minutes=10, schedule="cosine", **settings)


def test_a_run_of_minutes_warms_up_and_decays_by_the_time_used():
    schedule = Schedule(timed(min_lr_share=0.1), 2.0)
    assert [schedule.lr(step, fraction) for step, fraction in ((0, 0.0), (3, 0.025), (9, 0.05))] == [
        0.0,
        pytest.approx(1.0, rel=1e-2),
        2.0,
    ]
    assert schedule.lr(1, 0.525) == pytest.approx(1.1) and schedule.lr(1, 1.0) == pytest.approx(0.2)
    in_steps = Schedule(timed(warmup_steps=4), 2.0)
    assert in_steps.lr(0, 0.01) == 0.5 and in_steps.lr(4, 0.01) == 2.0


def test_a_run_of_minutes_validates_every_tenth_of_them_and_ends_with_the_last():
    progress, validations = Progress(timed()), []
    for second in range(0, 700, 7):
        progress.step += 1
        progress.note_time(second)
        if progress.is_validation_due():
            validations.append(second)
            progress.after_validation(progress.fraction)
        if progress.is_done:
            break
    assert len(validations) == 10 and validations[0] == 63 and validations[-1] == second == 602


def test_as_much_training_as_validation_where_validation_is_slow():
    progress, training = Progress(timed()), 0.0
    elapsed = 0.0
    while not progress.is_done:
        elapsed += 5.0
        training += 5.0
        progress.note_time(elapsed)
        if progress.is_validation_due():
            began = progress.fraction
            elapsed += 150.0
            progress.note_time(elapsed)
            progress.after_validation(began)
    assert training >= 200.0


def test_time_used_before_an_interruption_counts():
    progress = Progress(timed(), step=50, seconds=540.0)
    assert progress.fraction == pytest.approx(0.9) and not progress.is_validation_due()
    progress.note_time(30.0)
    progress.note_time(20.0)  # a step's time that arrives late does not turn the clock back
    assert progress.seconds == 570.0 and not progress.is_done
    progress.note_time(60.0)
    assert progress.is_done and progress.is_checkpoint_due()


def test_checkpoints_of_long_runs_lie_ten_minutes_apart():
    progress = Progress(TrainSection(minutes=600, schedule="cosine"))
    progress.note_time(599.0)
    assert not progress.is_checkpoint_due()
    progress.note_time(600.0)
    assert progress.is_checkpoint_due() and not progress.is_validation_due()
