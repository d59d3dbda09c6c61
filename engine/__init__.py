"""The system: config, data, model, objectives, trainer, checkpoints, command line.

What it offers is imported when it is first asked for: torch takes seconds, and worker processes that decode audio do
without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model.config import ModelConfig
    from .model.ssast import SSAST
    from .model.weights import load_model, save_model

__all__ = ["SSAST", "ModelConfig", "load_model", "save_model"]
_HOMES = {
    "SSAST": "model.ssast",
    "ModelConfig": "model.config",
    "load_model": "model.weights",
    "save_model": "model.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
