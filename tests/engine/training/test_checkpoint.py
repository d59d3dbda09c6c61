"""Checkpoints of a run: whole or not there at all, the last ones kept, and nobody else's files touched."""

import errno
import json
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssast.engine import load_model
from ssast.engine.errors import UserError
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelConfig
from ssast.engine.training import checkpoint
from ssast.engine.training.backends import choose_backend
from ssast.engine.training.backends.ddp import PlainEngine
from ssast.engine.training.checkpoint import (
    checkpoint_steps,
    last_checkpoint,
    load_checkpoint,
    remove_incomplete,
    save_best,
    save_checkpoint,
    save_epoch,
)

STATE = {"step": 0, "samples": 24, "world_size": 1}


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A world of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def new_engine(seed: int = 0) -> PlainEngine:
    model = build_model(ModelConfig(depth=1, input_frames=64), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return PlainEngine(model, optimizer, accumulation=1, clipping=0.0, all_used=True)


@pytest.fixture(scope="module")
def engine() -> PlainEngine:
    return new_engine()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def save(engine: PlainEngine, run_dir: Path, step: int, keep_last: int = 9) -> None:
    save_checkpoint(engine, run_dir, step, {**STATE, "step": step}, keep_last)


def test_steps_are_numbers_in_order_and_foreign_names_are_passed_over(tmp_path):
    assert checkpoint_steps(tmp_path) == []
    for name in ("step-9", "step-10", "step-1", "best", "incomplete-step-12", "step-11 (copy)", "step-", "old-step-3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == [1, 9, 10]


def test_the_last_ones_are_kept_by_number_beside_what_is_not_a_checkpoint_of_a_step(engine, tmp_path):
    (tmp_path / "checkpoints" / "step-8 (copy)").mkdir(parents=True)
    save_best(engine, tmp_path, 8, "accuracy", 0.5)
    for step in (8, 9, 10):
        save(engine, tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["best", "step-10", "step-8 (copy)", "step-9"]


def test_a_checkpoint_takes_the_place_of_the_one_of_its_step(tmp_path):
    save(new_engine(), tmp_path, 4)
    (tmp_path / "checkpoints" / "incomplete-step-4").mkdir()
    (tmp_path / "checkpoints" / "incomplete-step-4" / "half").write_text("of a process that was killed")
    second = new_engine(seed=1)
    save(second, tmp_path, 4)
    assert names(tmp_path) == ["step-4"] and not (tmp_path / "checkpoints" / "step-4" / "half").exists()
    kept = load_model(tmp_path / "checkpoints" / "step-4").state_dict()
    assert all(value.equal(kept[name]) for name, value in second.module.state_dict().items())


def test_what_was_saved_is_loaded_and_its_state_is_told(engine, tmp_path):
    ddp = choose_backend("ddp")
    assert last_checkpoint(tmp_path, ddp, ranks=1, zero_stage=0) is None
    for step in (4, 12):
        save(engine, tmp_path, step)
    point = last_checkpoint(tmp_path, ddp, ranks=2, zero_stage=0)
    assert point is not None and point.name == "step-12" and not point.is_converted
    assert point.state == {**STATE, "step": 12}
    other = new_engine(seed=1)
    load_checkpoint(other, tmp_path, point.name)
    weights = other.module.state_dict()
    assert all(value.equal(weights[name]) for name, value in engine.module.state_dict().items())


def test_another_engines_checkpoint_is_refused_in_a_line(engine, tmp_path):
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"step-4: could not be loaded; it was written by another step\.engine"):
        load_checkpoint(engine, tmp_path, "step-4")


def full_disk(*about: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_and_does_not_count(engine, tmp_path, monkeypatch):
    save(engine, tmp_path, 4, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full_disk)
        with pytest.raises(UserError, match=r"step-8: the checkpoint could not be written \(.*No space left"):
            save(engine, tmp_path, 8, keep_last=1)
        save_best_of(engine, tmp_path)
    assert checkpoint_steps(tmp_path) == [4]
    save(engine, tmp_path, 8, keep_last=1)
    assert names(tmp_path) == ["step-8"]


def save_best_of(engine: PlainEngine, run_dir: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        save_best(engine, run_dir, 8, "accuracy", 0.5)
    (run_dir / "checkpoints" / "best").rmdir()  # empty


def test_nothing_is_begun_where_there_is_no_room(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match=r"a checkpoint needs .* GiB and 0\.00 GiB are free"):
        save(engine, tmp_path, 4)
    assert names(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    engine = new_engine()
    save(engine, tmp_path, 4, keep_last=1)
    with torch.no_grad():
        engine.module.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"step-8: not written: norm\.bias is not finite after step 8"):
        save(engine, tmp_path, 8, keep_last=1)
    assert names(tmp_path) == ["step-4"]


def test_the_best_weights_replace_those_before_and_say_what_they_are(engine, tmp_path):
    better = new_engine(seed=1)
    save_best(engine, tmp_path, 2, "accuracy", 0.25)
    save_best(better, tmp_path, 6, "accuracy", 0.5)
    best = tmp_path / "checkpoints" / "best"
    assert json.loads((best / "best.json").read_text()) == {"step": 6, "metric": "accuracy", "value": 0.5}
    assert sorted(path.name for path in best.iterdir()) == ["best.json", "model.safetensors"]
    weights = load_model(best).state_dict()
    assert all(value.equal(weights[name]) for name, value in better.module.state_dict().items())
    assert checkpoint_steps(tmp_path) == []


def test_an_epochs_weights_are_a_model(engine, tmp_path):
    save_epoch(engine, tmp_path, 3)
    weights = load_model(tmp_path / "checkpoints" / "epochs" / "3.safetensors").state_dict()
    assert all(value.equal(weights[name]) for name, value in engine.module.state_dict().items())


def test_only_what_is_incomplete_is_removed(tmp_path):
    remove_incomplete(tmp_path)  # of a run without checkpoints
    for name in ("step-4", "best", "incomplete-step-8", "incomplete-universal-4", "incomplete-old-1", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "file").write_text("")
    (tmp_path / "incomplete-thesis").mkdir()
    remove_incomplete(tmp_path)
    assert names(tmp_path) == ["best", "notes", "step-4"] and (tmp_path / "incomplete-thesis").is_dir()
