"""DeepSpeed's waits for the device, taken out of the step.

In every step DeepSpeed reads numbers back from the device, for which the host has to wait until all that it has queued
is done: a timer of its throughput, and, in bf16, whether the norm of the gradients is finite. The first has a switch
(`timers.throughput`), the others have none at the stages that use them. What this engine does about gradients that are
not finite is in the trainer and in checkpoint.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

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
