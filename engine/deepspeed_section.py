"""The `deepspeed` section of a config: DeepSpeed's own keys, as far as they can be checked without DeepSpeed.

What only DeepSpeed itself knows of its values is found by having it read the section, before anything is opened
(`ssast.engine.training.backends.deepspeed`).
"""

from __future__ import annotations

import math
from typing import Any

from .errors import did_you_mean

# Top-level keys that DeepSpeed reads. DeepSpeed itself passes over an unknown one in silence.
_KEYS = """
activation_checkpointing aio amp autotuning bf16 checkpoint comms_logger communication_data_type compile
compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather
dump_state elasticity eigenvalue flops_profiler fp16 fp32_allreduce gradient_accumulation_steps gradient_clipping
gradient_predivide_factor memory_breakdown optimizer prescale_gradients progressive_layer_drop
seq_parallel_communication_data_type sparse_gradients steps_per_print tensorboard timers torch_autocast
train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
KEYS = frozenset(_KEYS.split())
SECTIONS = frozenset(("optimizer", "zero_optimization", "bf16", "fp16", "data_types", "checkpoint", "timers"))
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LARGEST_COUNT = 2**31 - 1
"""Of steps, clips, threads and the like: far beyond any run, and what kernels and other libraries count to."""
OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay")

# Switches, at the top and in any section. DeepSpeed takes many of them as they come: any text is true to it.
_SWITCHES = """
enabled prescale_gradients disable_allgather dump_state wall_clock_breakdown memory_breakdown dataloader_drop_last
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer use_data_before_expert_parallelism fp32_allreduce
sparse_gradients
"""
SWITCHES = frozenset(_SWITCHES.split())
_TEXTS_FOR_SWITCHES = frozenset(("true", "false", "yes", "no", "on", "off", "y", "n"))


def check_section(section: dict[str, Any]) -> None:
    """Check keys and values.

    Raises:
        ValueError: the first thing that is wrong, with its dotted key.
    """
    _check_keys(section)
    _check_values(section, "deepspeed")
    for key in (*BATCH_KEYS, "steps_per_print", "gradient_clipping", "gradient_predivide_factor"):
        value, is_number = section.get(key, 1), key.startswith("gradient_") and key != "gradient_accumulation_steps"
        if not _is_number(value, int | float if is_number else int) or value < (not is_number):
            kind = "number of at least 0" if is_number else "positive whole number"
            raise ValueError(f"deepspeed.{key}: must be a {kind}, not {value!r}")
        if value > LARGEST_COUNT and not is_number:
            raise ValueError(f"deepspeed.{key}: must be at most {LARGEST_COUNT}, not {value}")
    _check_optimizer(section.get("optimizer", {}))
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if not _is_number(stage, int) or stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, not {stage!r}")
    if section.get("fp16", {}).get("enabled"):
        raise ValueError("deepspeed.fp16: this engine trains in bf16 or fp32; set deepspeed.bf16.enabled instead")


def micro_batch(section: dict[str, Any], world_size: int) -> tuple[int, int]:
    """(micro-batch of a rank, accumulation steps) by DeepSpeed's rule: batch = micro-batch x accumulation x ranks.

    Raises:
        ValueError: sizes that do not multiply out.
    """
    batch, micro, steps = (section.get(key) for key in BATCH_KEYS)
    if micro is None:
        if batch is None:
            raise ValueError("deepspeed: train_batch_size or train_micro_batch_size_per_gpu must be given")
        micro = batch // (steps or 1) // world_size
    elif steps is None:
        steps = 1 if batch is None else batch // micro // world_size
    steps = steps or 1
    if micro < 1 or steps < 1 or (batch is not None and micro * steps * world_size != batch):
        sizes = ", ".join(f"{key} {section[key]}" for key in BATCH_KEYS if key in section)
        raise ValueError(
            f"deepspeed: {sizes} on {world_size} ranks do not fit: "
            "train_batch_size must be train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks"
        )
    return micro, steps


def _check_keys(section: dict[str, Any]) -> None:
    for key in section:
        if key not in KEYS:
            raise ValueError(f"unknown key deepspeed.{key}" + did_you_mean(str(key), KEYS, prefix="deepspeed."))
    if not {"train_micro_batch_size_per_gpu", "train_batch_size"} & section.keys():
        raise ValueError("deepspeed.train_micro_batch_size_per_gpu or deepspeed.train_batch_size is missing")
    for key in SECTIONS & section.keys():
        if not isinstance(section[key], dict):
            raise ValueError(f"deepspeed.{key}: is a section of its own, not {section[key]!r}")


def _check_values(value: Any, key: str) -> None:
    """Of every key at any depth: numbers are finite, switches are true or false and no text that looks like them."""
    leaf = key.rpartition(".")[2]
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: must be a finite number, not {value}")
    elif value == "auto" and "zenflow" not in key:
        raise ValueError(f"{key}: 'auto' is Hugging Face's word, which DeepSpeed does not know; give a value")
    elif leaf in SWITCHES and not isinstance(value, bool):
        raise ValueError(f"{key}: must be true or false without quotes, not {value!r}")
    elif isinstance(value, str) and value.strip("'\"").lower() in _TEXTS_FOR_SWITCHES:
        raise ValueError(
            f"{key}: {value!r} is text, which DeepSpeed may read as true; write true or false without quotes"
        )


def _check_optimizer(optimizer: dict[str, Any]) -> None:
    if optimizer.get("type") not in ("Adam", "AdamW"):
        raise ValueError(
            "deepspeed.optimizer.type: must be Adam (L2 weight decay, the paper's) or AdamW, not "
            f"{optimizer.get('type')!r}"
        )
    params = optimizer.get("params") or {}
    if not isinstance(params, dict):
        raise ValueError(f"deepspeed.optimizer.params: is a section of its own, not {params!r}")
    if "lr" not in params:
        raise ValueError("deepspeed.optimizer.params.lr is missing")
    if unknown := [name for name in params if name not in OPTIMIZER_PARAMS]:
        raise ValueError(
            f"unknown key deepspeed.optimizer.params.{unknown[0]}; there are {', '.join(OPTIMIZER_PARAMS)}"
        )
    for name, value in params.items():
        if name == "betas":
            if not (
                isinstance(value, list)
                and len(value) == 2
                and all(_is_number(beta, int | float) and 0 <= beta < 1 for beta in value)
            ):
                raise ValueError(
                    f"deepspeed.optimizer.params.betas: must be two numbers from 0 to below 1, not {value!r}"
                )
        elif not _is_number(value, int | float) or value < 0:
            raise ValueError(f"deepspeed.optimizer.params.{name}: must be a number of at least 0, not {value!r}")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
