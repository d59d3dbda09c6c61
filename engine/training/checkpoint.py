"""Checkpoints of a run: `checkpoints/step-N/`, whole or not there at all, and `checkpoints/best/`.

A step folder holds the engine's own files (weights, optimizer state, this engine's small state) and
`model.safetensors`, the fp32 weights free of ranks and ZeRO stages, which `load_model` reads. It is written under
another name and renamed when every rank is done, so a process killed at any moment leaves only whole checkpoints
behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import atomic_write, sync_folder, write_whole
from ssast.engine.model.weights import WEIGHTS_FILE, is_write_error, save_weights

from .backends import Backend, Engine

_STEP = re.compile(r"step-(\d+)")
_ASIDE = "incomplete-"
STATE_FILE = "state.json"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def save_checkpoint(engine: Engine, run_dir: Path, step: int, state: dict[str, Any], keep_last: int) -> None:
    """Write `checkpoints/step-N`; every rank calls it.

    Raises:
        UserError: on rank 0 and elsewhere, if it could not be written; earlier checkpoints stay.
    """
    folder = run_dir / "checkpoints"
    name, aside = f"step-{step}", f"{_ASIDE}step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        _check_space(engine, folder)
    weights = engine.full_weights()
    if broken := next((name for name, value in (weights or {}).items() if not value.isfinite().all()), None):
        raise UserError(
            f"{folder / name}: not written: {broken} is not finite after step {step}; earlier ones are whole",
            every_rank=True,
        )
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(folder / aside, ignore_errors=True)
        dist.barrier()
        engine.save(folder, aside, state)
        if weights is not None:
            save_weights(weights, engine.module, folder / aside / WEIGHTS_FILE)
            (folder / aside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            sync_folder(folder / aside)
    except Exception as error:
        if not is_write_error(error):
            raise
        free = shutil.disk_usage(folder).free / 2**30
        raise UserError(
            f"{folder / name}: the checkpoint could not be written ({first_line(error)}; {free:.1f} GiB free); "
            "earlier ones are whole",
            every_rank=True,
        ) from None
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / name, ignore_errors=True)
        os.rename(folder / aside, folder / name)
        for old in checkpoint_steps(run_dir)[:-keep_last]:
            os.rename(folder / f"step-{old}", folder / f"{_ASIDE}old-{old}")  # half deleted, it must not count as whole
            shutil.rmtree(folder / f"{_ASIDE}old-{old}")
    dist.barrier()


def load_checkpoint(engine: Engine, run_dir: Path, name: str) -> None:
    """Put the engine where `save_checkpoint` left it; every rank calls it.

    Raises:
        UserError: this engine did not write it, or it is damaged.
    """
    if not engine.load(run_dir / "checkpoints", name):
        raise UserError(
            f"{run_dir / 'checkpoints' / name}: could not be loaded; it was written by another step.engine, or is "
            "damaged"
        )


def read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """What the trainer gave `save_checkpoint` to keep."""
    return json.loads((run_dir / "checkpoints" / f"step-{step}" / STATE_FILE).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from."""

    name: str
    """Of the folder in checkpoints/."""
    state: dict[str, Any]
    """What the trainer gave to keep."""

    @property
    def is_converted(self) -> bool:
        """It is a copy made for this number of ranks."""
        return self.name.startswith(_ASIDE)


def last_checkpoint(run_dir: Path, backend: Backend, *, ranks: int, zero_stage: int) -> ResumePoint | None:
    """The last one, converted first if the backend could not load it on this number of ranks; on rank 0."""
    steps = checkpoint_steps(run_dir)
    if not steps:
        return None
    state = read_state(run_dir, steps[-1])
    saved_ranks = state["world_size"]
    name = backend.loadable(run_dir, steps[-1], saved_ranks=saved_ranks, ranks=ranks, zero_stage=zero_stage)
    return ResumePoint(name, state)


def save_best(engine: Engine, run_dir: Path, step: int, metric: str, value: float) -> None:
    """Keep the weights of the best validation; every rank calls it."""
    weights = engine.full_weights()
    if weights is not None:
        folder = run_dir / "checkpoints" / "best"
        _write_weights(weights, engine, folder / WEIGHTS_FILE)
        write_whole(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}) + "\n")
    dist.barrier()


def save_epoch(engine: Engine, run_dir: Path, epoch: int) -> None:
    """Keep the weights at the end of an epoch in `checkpoints/epochs/`; every rank calls it."""
    weights = engine.full_weights()
    if weights is not None:
        _write_weights(weights, engine, run_dir / "checkpoints" / "epochs" / f"{epoch}.safetensors")
    dist.barrier()


def _write_weights(weights: dict[str, torch.Tensor], engine: Engine, file: Path) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        UserError: it could not be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as aside:
            save_weights(weights, engine.module, aside)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise UserError(f"{file}: could not be written ({first_line(error)})", every_rank=True) from None


def remove_incomplete(run_dir: Path) -> None:
    """Delete what a process that was killed left half-written or half-deleted."""
    for path in (run_dir / "checkpoints").glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def _check_space(engine: Engine, folder: Path) -> None:
    """Before anything is written: weights, master weights and two moments in fp32, and the fp32 copy for
    `load_model`.
    """
    needed, free = 20 * engine.num_parameters(), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; make room "
            "and run the same "
            "command again, training resumes from the last checkpoint"
        )
