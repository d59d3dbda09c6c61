"""The system: config, data, model, objectives, trainer, checkpoints, command line."""

from .model import SSAST, ModelConfig
from .weights import load_model, save_model

__all__ = ["SSAST", "ModelConfig", "load_model", "save_model"]
