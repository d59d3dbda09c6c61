"""The system: config, data, model, training, inference, reports, command line.

What it offers is imported when it is first asked for: torch takes seconds, and worker processes that decode audio do
without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.embed import embed
    from .inference.model import AudioModel, load_model
    from .inference.predict import predict
    from .model.config import ModelConfig
    from .model.ssast import SSAST
    from .model.weights import save_model

__all__ = ["SSAST", "AudioModel", "ModelConfig", "embed", "load_model", "predict", "save_model"]
_HOMES = {
    "AudioModel": "inference.model",
    "SSAST": "model.ssast",
    "embed": "inference.embed",
    "predict": "inference.predict",
    "ModelConfig": "model.config",
    "load_model": "inference.model",
    "save_model": "model.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
