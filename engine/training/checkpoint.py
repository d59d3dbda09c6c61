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
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import atomic_write, sync_folder, write_whole
from ssast.engine.model.ssast import SSAST
from ssast.engine.model.weights import WEIGHTS_FILE, is_write_error, save_weights

from .backends.ddp import PlainEngine

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    Engine = DeepSpeedEngine | PlainEngine

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
    weights = full_weights(engine)
    if broken := next((name for name, value in (weights or {}).items() if not value.isfinite().all()), None):
        raise UserError(
            f"{folder / name}: not written: {broken} is not finite after step {step}; earlier ones are whole",
            every_rank=True,
        )
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(folder / aside, ignore_errors=True)
        dist.barrier()
        engine.save_checkpoint(str(folder), tag=aside, client_state=state, save_latest=False)
        if weights is not None:
            save_weights(weights, _model(engine), folder / aside / WEIGHTS_FILE)
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
    """Put the engine where `save_checkpoint` left it; every rank calls it."""
    path, _ = engine.load_checkpoint(str(run_dir / "checkpoints"), tag=name)
    if path is None:
        raise UserError(
            f"{run_dir / 'checkpoints' / name}: could not be loaded; it was written by another step.engine, or is "
            "damaged"
        )


def read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """What the trainer gave `save_checkpoint` to keep."""
    return json.loads((run_dir / "checkpoints" / f"step-{step}" / STATE_FILE).read_text(encoding="utf-8"))


def convert_for_other_ranks(run_dir: Path, step: int) -> str:
    """Make a copy of a ZeRO checkpoint that any number of ranks can load (DeepSpeed's universal checkpoint); return its
    name.

    Raises:
        UserError: DeepSpeed's converter failed.
    """
    folder, name = run_dir / "checkpoints", f"{_ASIDE}universal-{step}"
    shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / f"step-{step}"), "--output_folder", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{folder / f'step-{step}'}: could not be converted for another number of ranks: {reason}")
    return name


def save_best(engine: Engine, run_dir: Path, step: int, metric: str, value: float) -> None:
    """Keep the weights of the best validation; every rank calls it."""
    weights = full_weights(engine)
    if weights is not None:
        folder = run_dir / "checkpoints" / "best"
        _write_weights(weights, engine, folder / WEIGHTS_FILE)
        write_whole(folder / "best.json", json.dumps({"step": step, "metric": metric, "value": value}) + "\n")
    dist.barrier()


def save_epoch(engine: Engine, run_dir: Path, epoch: int) -> None:
    """Keep the weights at the end of an epoch in `checkpoints/epochs/`; every rank calls it."""
    weights = full_weights(engine)
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
            save_weights(weights, _model(engine), aside)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise UserError(f"{file}: could not be written ({first_line(error)})", every_rank=True) from None


def remove_incomplete(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def full_weights(engine: Engine) -> dict[str, torch.Tensor] | None:
    """Every parameter whole and in fp32, on rank 0 (None elsewhere); every rank calls it. Taken from the optimizer's
    master weights where there are any.
    """
    weights = {}
    whole_of = _as_it_is if isinstance(engine, PlainEngine) else _gathered
    for name, parameter in _model(engine).named_parameters():
        whole = whole_of(parameter)
        whole = parameter if whole is None else whole  # plain fp32 training has no copy
        if dist.get_rank() == 0:
            weights[name] = whole.detach().float().cpu().view(getattr(parameter, "ds_shape", parameter.shape)).clone()
    return weights if dist.get_rank() == 0 else None


def _as_it_is(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _gathered(parameter: torch.Tensor) -> torch.Tensor | None:
    """The fp32 master weights; of what is not trained there are none, and ZeRO 3 holds it in parts."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(parameter, "ds_id") and not parameter.requires_grad:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return safe_get_full_fp32_param(parameter)


def _model(engine: Engine) -> SSAST:
    return engine.module


def _check_space(engine: Engine, folder: Path) -> None:
    """Before anything is written: weights, master weights and two moments in fp32, and the fp32 copy for
    `load_model`.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in _model(engine).parameters())
    needed, free = 20 * parameters, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; make room "
            "and run the same "
            "command again, training goes on from the last checkpoint"
        )
