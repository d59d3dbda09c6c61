"""The run folder: whose it is, whether its run is finished, and what is written down before the first step."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml
from filelock import FileLock, Timeout

from ssast.engine.config import RunConfig, differences, dump_config
from ssast.engine.environment import describe_environment, source_diff
from ssast.engine.errors import UserError
from ssast.engine.files import PROFILE_FOLDER, write_whole

from .checkpoint import checkpoint_steps, read_state, remove_incomplete
from .runlog import read_rows
from .schedule import Progress

if TYPE_CHECKING:
    from ssast.engine.data.dataset import Dataset

C = TypeVar("C", bound=RunConfig)

# What may differ between the config of a run folder and that of the command that resumes it.
_MAY_CHANGE = """
run.name run.folder run.wandb train.steps train.minutes train.log_every train.keep_last data.num_threads data.prefetch
data.cache_dir data.max_bad_fraction step.compile step.compile_mode step.activation_checkpointing
deepspeed.steps_per_print deepspeed.wall_clock_breakdown
"""
LOCK_FILE = ".lock"
LOCK_PATIENCE_S = 60.0
MAY_CHANGE = frozenset(_MAY_CHANGE.split())


def settle_precision(config: C) -> C:
    """With `step.precision` bf16 or fp32, where the config leaves it to the device: as the run in this folder began, or
    as the device of this process does best.
    """
    is_open = config.step.precision == "auto" and "enabled" not in config.deepspeed.get("bf16", {})
    saved = _saved_config(config) if is_open else None
    if saved is None or saved.bf16 == config.bf16:
        return _with_precision(config, config.bf16)
    began, here = ("bf16", "fp32") if saved.bf16 else ("fp32", "bf16")
    print(
        f"note: {config.run_dir}: the run began in {began} and keeps it; for a new run this device would take {here}",
        flush=True,
    )
    return _with_precision(config, saved.bf16)


def _with_precision(config: C, bf16: bool) -> C:
    """Said in one place, `step.precision`, so that two configs compare."""
    section = {key: value for key, value in config.deepspeed.items() if key != "bf16"}
    if others := {key: value for key, value in config.deepspeed.get("bf16", {}).items() if key != "enabled"}:
        section["bf16"] = others
    step = config.step.model_copy(update={"precision": "bf16" if bf16 else "fp32"})
    return config.model_copy(update={"step": step, "deepspeed": section})


def check_run_dir(config: RunConfig) -> None:
    """Of a folder for a run: it is new, empty, or holds this very run.

    Raises:
        UserError: it holds another run, or something that is no run.
    """
    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: is a file; choose another run.name or run.folder")
    if not run_dir.is_dir() or not any(path.name not in (LOCK_FILE, PROFILE_FOLDER) for path in run_dir.iterdir()):
        return
    saved = run_dir / "config.yaml"
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints}: is a file; choose another run.name, or move that folder away")
    rows = read_rows(run_dir / "metrics.jsonl")
    if saved.is_file() and (run_dir / "environment.json").is_file() and not rows and not checkpoint_steps(run_dir):
        return  # a run that failed before its first step
    last_saved = max((row["step"] for row in rows if row.get("event") == "checkpoint"), default=0)
    if last_saved and not checkpoint_steps(run_dir):
        raise UserError(
            f"{run_dir}: its log says that step {last_saved} was saved, but {checkpoints} holds no checkpoint, and "
            "starting at step 0 would overwrite the log; put the checkpoints back, or choose another run.name"
        )
    if not saved.is_file() or not (run_dir / "environment.json").is_file():
        raise UserError(
            f"{run_dir}: holds files but no run (no config.yaml and environment.json); choose another run.name or "
            "run.folder"
        )
    before = _saved_config(config)
    if before is None:
        raise UserError(
            f"{saved}: cannot be read as the config of a run; choose another run.name, or move that folder away"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # said when the run begins
        now = settle_precision(config)
    old = _with_precision(before, before.bf16).model_dump(mode="json")
    new = now.model_dump(mode="json")
    may_change = set(MAY_CHANGE)
    if old.get("deepspeed", {}).get("train_batch_size") is not None:  # the batch itself stays
        may_change |= {"deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps"}
    changed = [
        f"{key} was {before}, is now {after}" for key, before, after in differences(old, new) if key not in may_change
    ]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"{run_dir}: holds a run with another config ({'; '.join(changed[:4])}{more}); "
            "choose another run.name, or move that folder away"
        )


def _saved_config(config: C) -> C | None:
    """Of the run in the folder, with today's defaults for keys that are younger than it; None if there is none that can
    be read.
    """
    try:
        tree = yaml.safe_load((config.run_dir / "config.yaml").read_text(encoding="utf-8"))
        return type(config).model_validate(tree or {})
    except (OSError, ValueError, yaml.YAMLError):  # pydantic's ValidationError and UnicodeDecodeError are ValueErrors
        return None


def is_finished(config: RunConfig) -> bool:
    """Whether the run folder holds all the steps of this config. Raises UserError if it holds something else."""
    check_run_dir(config)
    steps = checkpoint_steps(config.run_dir)
    if not steps or not (config.run_dir / "report.html").is_file():
        return False
    seconds = read_state(config.run_dir, steps[-1]).get("seconds", 0.0)
    return Progress(config.train, steps[-1], seconds).is_done


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process alone; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it for longer than ranks need that save and leave because their launcher was
            killed.
    """
    lock = FileLock(run_dir / LOCK_FILE)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that is training in {run_dir}", flush=True)
            lock.acquire(timeout=LOCK_PATIENCE_S, poll_interval=0.5)
    except Timeout:
        raise UserError(f"{run_dir}: another process is training in this run folder") from None
    except OSError as error:
        raise UserError(f"{run_dir}: the run folder cannot be made or locked: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def measured_statistics(config: RunConfig) -> tuple[float, float] | None:
    """Mean and standard deviation that the run in this folder measured when it began: it goes on with the same."""
    if not (config.run_dir / "metrics.jsonl").is_file():
        return None
    try:
        data = json.loads((config.run_dir / "data.json").read_text(encoding="utf-8"))
        return data["mean"], data["std"]
    except (OSError, ValueError, KeyError):
        return None


def sound_version(config: RunConfig, data: Dataset) -> int:
    """The oldest version of the resampler (data/resample.py) that any step of the run has heard, or will.

    A warning says where a run that resumes has heard files resampled by another one, which aliased.
    """
    from ssast.engine.data.resample import SOUND_VERSION

    if not (config.run_dir / "metrics.jsonl").is_file():
        return SOUND_VERSION
    try:
        before = int(json.loads((config.run_dir / "data.json").read_text(encoding="utf-8")).get("sound", 1))
    except (OSError, ValueError, AttributeError):
        before = 1
    lowered = sum(int((clips.sample_rates > config.data.sample_rate).sum()) for clips in data.parts())
    if before < SOUND_VERSION and lowered:
        print(
            f"warning: earlier steps of {config.run_dir} heard aliases in {lowered} clips above "
            f"{config.data.sample_rate} Hz, which were resampled without a low-pass filter; from here on they are "
            "filtered (docs/data.md). For a clean comparison, train anew under another run.name"
        )
    return min(before, SOUND_VERSION) if lowered else SOUND_VERSION


def prepare_run_dir(config: RunConfig, data: Dataset, world_size: int) -> None:
    """Make the run folder, clear what a killed process left half-written, and write down what the run is made of.

    Raises:
        UserError: the folder cannot be written.
    """
    from ssast.engine.data.check import write_skipped

    check_run_dir(config)  # once more: this process may have waited while another trained

    run_dir = config.run_dir
    contents = {
        "config.yaml": dump_config(config),
        "environment.json": json.dumps(describe_environment(world_size), indent=2) + "\n",
        "source.diff": source_diff(),
        "data.json": json.dumps(data.summary() | {"sound": sound_version(config, data)}, indent=2) + "\n",
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_incomplete(run_dir)
        for name, content in contents.items():
            write_whole(run_dir / name, content)
        write_skipped(run_dir / "skipped.csv", data.skipped)
    except OSError as error:
        raise UserError(f"{run_dir}: the run folder cannot be written: {error.strerror}") from None
    print(
        f"{len(data.train)} clips to train on and {len(data.valid)} to validate on, "
        f"{data.train.hours + data.valid.hours:.2f} h; "
        f"mean {data.mean:.4f}, std {data.std:.4f}"
    )
    if data.skipped:
        print(f"warning: {len(data.skipped)} clips cannot be used; {run_dir / 'skipped.csv'} says why")
