"""All that knows DeepSpeed: its configuration, its engine, its checkpoints, and its waits for the device.

In every step DeepSpeed reads numbers back from the device, for which the host has to wait until all that it has queued
is done: a timer of its throughput, and, in bf16, whether the norm of the gradients is finite. The first has a switch
(`timers.throughput`), the others have none at the stages that use them and are taken out here. What this engine does
about gradients that are not finite is in the trainer and in checkpoint.py.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import ValidationError

from ssast.engine.config import RunConfig
from ssast.engine.deepspeed_section import BATCH_KEYS
from ssast.engine.environment import settle_accelerator
from ssast.engine.errors import UserError, first_line
from ssast.engine.model.ssast import SSAST

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")


def _import_deepspeed() -> ModuleType:
    """DeepSpeed, with its log kept to errors.

    Raises:
        UserError: it is not installed, or does not load.
    """
    settle_accelerator()
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({first_line(error)}): pip install deepspeed, or set step.engine=ddp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def describe(config: RunConfig) -> str:
    """For the log."""
    return f"DeepSpeed, ZeRO {config.zero_stage}"


def check(config: RunConfig) -> None:
    """Have DeepSpeed read its section before anything is opened, whether ranks have joined or not.

    Raises:
        UserError: what DeepSpeed says is wrong.
    """
    deepspeed = _import_deepspeed()
    # batch sizes have been checked against the number of ranks, which DeepSpeed knows only once they have joined
    section = {key: value for key, value in deepspeed_config(config).items() if key not in BATCH_KEYS}
    try:
        deepspeed.DeepSpeedConfig(
            {**section, "bf16": config.deepspeed.get("bf16", {}), "train_micro_batch_size_per_gpu": 1}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"deepspeed: {error.title}: {key}: {problem['msg']}, not {problem['input']!r}") from None
    except Exception as error:  # assertions, ValueErrors: one for each way of being wrong
        raise UserError(f"deepspeed: {' '.join(str(error).split())[:400]}") from None


def deepspeed_config(config: RunConfig, *, is_converted: bool = False) -> dict[str, Any]:
    """The run's DeepSpeed section, less the optimizer that we build, with gradients accumulated in fp32 unless told
    otherwise; `is_converted`: to load a checkpoint that was converted for another number of ranks.
    """
    section = copy.deepcopy(config.deepspeed)
    if is_converted:
        section.setdefault("checkpoint", {})["load_universal"] = True
    section.pop("optimizer")
    section.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    bf16 = section.setdefault("bf16", {})
    bf16["enabled"] = config.bf16 and not config.uses_autocast
    # its own default has the host wait for the device in every step, to skip a step whose gradients are not finite; the
    # metrics and the weights to be saved tell of those anyway
    bf16.setdefault("check_grad_overflow", False)
    section.setdefault("gradient_clipping", 0.0)  # DeepSpeed's own default clips at 1
    if config.zero_stage == 3:
        # its own linear layer adds up bias gradients in another order, so that stage 3 would drift from the others
        section["zero_optimization"].setdefault("memory_efficient_linear", False)
    section.setdefault("steps_per_print", 10**9)
    # it waits for the device twice in every micro-batch
    section.setdefault("timers", {"throughput": {"enabled": False}})
    section["zero_allow_untested_optimizer"] = True
    section.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading with PyTorch's Adam: nothing to compile
    return section


def loadable(run_dir: Path, step: int, *, saved_ranks: int, ranks: int, zero_stage: int) -> str:
    """The checkpoint as it is or, where ZeRO has divided it among another number of ranks, a copy that any number can
    load (DeepSpeed's universal checkpoint).

    Raises:
        UserError: it could not be converted.
    """
    if zero_stage == 0 or saved_ranks == ranks:
        return f"step-{step}"
    print(f"converting the checkpoint from {saved_ranks} ranks to {ranks}", flush=True)
    folder, name = run_dir / "checkpoints", f"incomplete-universal-{step}"
    shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / f"step-{step}"), "--output_folder", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{folder / f'step-{step}'}: could not be converted for another number of ranks: {reason}")
    return name


def build(
    model: SSAST,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    *,
    accumulation: int,
    all_used: bool,
    is_converted: bool,
) -> ZeroEngine:
    """DeepSpeed reads the accumulation from its section, and finds unused parameters by itself."""
    deepspeed = _import_deepspeed()
    # DeepSpeed would compile a shared-memory all-reduce with g++ for a minute; gloo gives the same sums at once
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)  # it takes the process group that there is
    settings = deepspeed_config(config, is_converted=is_converted)
    remove_waits(keeps_check=settings["bf16"]["enabled"] and settings["bf16"]["check_grad_overflow"])
    with contextlib.redirect_stdout(io.StringIO()):  # ZeRO prints a page of memory figures
        return ZeroEngine(
            deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
        )


class ZeroEngine:
    """DeepSpeed's engine, by the words of `backends.Engine`."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self.module: SSAST = engine.module
        self.optimizer = engine.optimizer
        self._keeps_norm = engine.zero_optimization() or engine.bfloat16_enabled()

    def __call__(self, compute: Callable[[SSAST], T], /) -> T:
        return self._engine(compute)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's part to the gradients."""
        self._engine.backward(loss)

    def step(self) -> torch.Tensor | None:
        """Update after the last micro-batch of a step; the norm of the last step's gradients before clipping."""
        if self._keeps_norm or not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return self._engine.get_global_grad_norm()
        # in plain fp32 training DeepSpeed keeps none
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self._engine.step()
        return norm

    def train(self, mode: bool = True) -> None:
        """Put the model into training mode."""
        self._engine.train(mode)

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self._engine.eval()

    def save(self, folder: Path, name: str, state: dict[str, Any]) -> None:
        """Every rank writes its part."""
        self._engine.save_checkpoint(str(folder), tag=name, client_state=state, save_latest=False)

    def load(self, folder: Path, name: str) -> bool:
        """Every rank reads its part; False if there is none."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=name)
        return path is not None

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Taken from the optimizer's master weights where there are any."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            whole = _gathered(parameter)
            if dist.get_rank() == 0:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                weights[name] = whole.detach().float().cpu().view(shape).clone()
        return weights if dist.get_rank() == 0 else None

    def num_parameters(self) -> int:
        """Of the whole model; ZeRO 3 leaves only parts of the tensors on a rank."""
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.module.parameters())

    def release(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self._engine.destroy()


def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 master weights. Of what is not trained there are none, and ZeRO 3 holds it in parts; plain fp32 training
    has no copy.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(parameter, "ds_id") and not parameter.requires_grad:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    master = safe_get_full_fp32_param(parameter)
    return parameter if master is None else master


# --- waits for the device ---------------------------------------------------------------------------------------------

WAITING = {
    "deepspeed.runtime.utils": ("mask_nan_or_inf_with_val_inplace",),
    "deepspeed.runtime.bf16_optimizer": ("is_invalid_grad_norm",),
    "deepspeed.runtime.zero.stage_1_and_2": ("mask_nan_or_inf_with_val_inplace", "is_invalid_grad_norm"),
    "deepspeed.runtime.zero.stage3": ("mask_nan_or_inf_with_val_inplace", "is_invalid_grad_norm"),
}
"""Modules of DeepSpeed 0.19, and the functions that wait, by the names under which these modules call them."""
_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def remove_waits(*, keeps_check: bool) -> None:
    """For the engines of this process. `keeps_check`: the config asks to skip steps whose gradients are not finite,
    which means waiting.
    """
    for module, names in WAITING.items():
        namespace = vars(importlib.import_module(module))
        for name in names:
            if name not in namespace:  # another DeepSpeed: it may wait, and works all the same
                continue
            original = _originals.setdefault((module, name), namespace[name])
            if name == "mask_nan_or_inf_with_val_inplace":
                namespace[name] = _mask_without_waiting
            else:
                namespace[name] = original if keeps_check else _nothing_is_invalid


def _mask_without_waiting(input: torch.Tensor, device: object = None, val: float = -1.0) -> None:
    """As DeepSpeed's, which makes a tensor of `val` and reads it back."""
    input.masked_fill_(~input.isfinite(), val)


def _nothing_is_invalid(norm: object) -> bool:
    return False
