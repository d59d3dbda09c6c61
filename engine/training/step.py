"""Which implementation serves where there are several: optimizer and layer norms. The results are the same up to
rounding.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ssast.engine.errors import UserError, first_line
from ssast.engine.model.ssast import SSAST


def build_optimizer(
    groups: list[dict[str, Any]], section: dict[str, Any], backend: str, device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """The paper's Adam (weight decay added to the gradient) or AdamW, from DeepSpeed's `optimizer` section, and the
    backend's name.

    Args:
        groups: of parameters.
        backend: as in `StepSection.optimizer`.

    Raises:
        UserError: a backend that is not installed, or cannot be built here.
    """
    name = choose_optimizer(backend, device)
    params = {key: tuple(value) if key == "betas" else value for key, value in section["params"].items()}
    decoupled = section["type"] == "AdamW"
    if name in ("torch", "torch-fused"):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return kind(groups, fused=name == "torch-fused" or None, **params), name
    if name == "apex":
        fused_adam = _feature("apex.optimizers", "FusedAdam", "step.optimizer")
    else:
        fused_adam = _feature("deepspeed.ops.adam", "FusedAdam", "step.optimizer")
    try:
        return fused_adam(groups, adam_w_mode=decoupled, **params), name
    except Exception as error:  # both build or load an extension here
        raise UserError(f"step.optimizer: {name} cannot be used: {first_line(error)}") from None


def choose_optimizer(backend: str, device: torch.device) -> str:
    if backend != "auto":
        return backend
    if device.type != "cuda":
        return "torch"
    return "apex" if _find("apex.optimizers", "FusedAdam") else "torch-fused"


def use_norms(model: SSAST, backend: str, *, device: torch.device, compiled: bool) -> str:
    """Give the model's layer norms to a backend, as in `StepSection.norm`; its name. Parameters keep their names and
    values.

    Raises:
        UserError: apex is asked for and is not installed, or is another project of that name.
    """
    if backend == "auto":
        fits = device.type == "cuda" and not compiled
        backend = "apex" if fits and _find("apex.normalization", "FusedLayerNorm") else "torch"
    if backend == "apex":
        fused_norm = _feature("apex.normalization", "FusedLayerNorm", "step.norm")
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm) is nn.LayerNorm:
                    fused = fused_norm(norm.normalized_shape, eps=norm.eps)
                    fused.weight, fused.bias = norm.weight, norm.bias
                    setattr(parent, name, fused)
    return backend


def _find(module: str, feature: str) -> Any | None:
    """The feature, judged by itself: the `apex` of PyPI is another project."""
    try:
        return getattr(importlib.import_module(module), feature, None)
    except Exception:  # a broken build may raise anything
        return None


def _feature(module: str, feature: str, key: str) -> Any:
    found = _find(module, feature)
    if found is None:
        raise UserError(f"{key}: there is no {module}.{feature}; `ssast doctor` says which optional parts are there")
    return found
