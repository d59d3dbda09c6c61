"""Weights in and out: our safetensors, and the checkpoints of the official code (https://github.com/YuanGongND/ssast).

A file always loads whole or not at all: a tensor that is missing, left over or of another shape is an error that names
it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ssast.engine.errors import UserError
from ssast.engine.files import atomic_write, expand_path, permit_as_usual

from .adapt import init_classifier, resize
from .config import ModelCard, ModelConfig
from .official import load_official, to_official
from .ssast import SSAST
from .tensors import check_weights

log = logging.getLogger("ssast")

WEIGHTS_FILE = "model.safetensors"
FORMAT = "ssast-engine/1"


def load_model(
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    input_frames: int | None = None,
    stride: int | tuple[int, int] | None = None,
    input_bins: int | None = None,
    heads: int | None = None,
    position_resize: str = "exact",
) -> SSAST:
    """Load a model, on the CPU, in evaluation mode.

    Args:
        path: an official `.pth` (pretrained or fine-tuned), a `.safetensors` of ours, a run folder, or one of its
            checkpoints.
        num_classes: build a model for fine-tuning: a freshly initialised classifier takes the place of the pretraining
            heads. A trained classifier with this very number of classes is kept.
        input_frames, input_bins: T and F of the features; default as saved. The position embedding is fitted to them.
        stride: of the patches, one number or (mel bins, frames); default as saved. Below the patch shape, patches
            overlap.
        heads: attention heads, which official files do not hold; default width / 64.
        position_resize: "exact" or "official", see `ssast.engine.model.adapt.resize_position`.

    An official fine-tuned file does not say for which stride and input it was made. `stride` is then taken as what it
    *was* made for; left out, the paper's fine-tuning stride is assumed where it fits the number of tokens, which is
    logged. The input follows from the number of tokens; another `input_frames` is fitted as for any other model.

    Raises:
        UserError: no such file, not a checkpoint, tensors missing, left over or of another shape (each is named), or
            settings that contradict the file.
    """
    file = find_weights(Path(expand_path(os.fspath(path))))
    if is_safetensors(file):
        model = _load_safetensors(file)
        if heads is not None and heads != model.config.heads:
            raise UserError(f"{file}: was trained with {model.config.heads} attention heads, not {heads}")
    else:
        model = load_official(file, heads, _pair(stride), input_frames, input_bins)
    config = _adapted(model.config, num_classes, input_frames, _pair(stride), input_bins)
    if config != model.config:
        try:
            extras, had_classes = model.unused, model.config.num_classes
            model = resize(model, config, position_resize)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
        model.unused = extras
        if num_classes is not None and had_classes != num_classes:
            init_classifier(model)
            model.card = dataclasses.replace(model.card, labels=None, multi_label=False)
            log.info("%s: a fresh classifier for %d classes was added", file, num_classes)
    return model.eval()


def save_model(model: SSAST, path: str | os.PathLike[str], format: str = "safetensors") -> None:
    """Write the model's weights; the file appears whole or not at all.

    Args:
        format: "safetensors", or "official": what the official code loads.

    Raises:
        UserError: an unknown format, a model that the official format cannot hold, or a file that cannot be written.
    """
    if format not in ("safetensors", "official"):
        raise UserError(f"format must be 'safetensors' or 'official', not {format!r}")
    path = Path(expand_path(os.fspath(path)))
    try:
        with atomic_write(path) as aside:
            if format == "official":
                torch.save(to_official(model), aside)
            else:
                save_weights({k: v.detach() for k, v in model.state_dict().items()}, model, aside)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise UserError(f"{path}: could not be written: {error}") from None


def save_weights(weights: dict[str, torch.Tensor], model: SSAST, path: Path) -> None:
    """Write named tensors as safetensors, with the shape and the card of the model they belong to."""
    tensors = {name: value.contiguous().cpu() for name, value in weights.items()}
    described = {
        "config": json.dumps(dataclasses.asdict(model.config)),
        "card": json.dumps(dataclasses.asdict(model.card)),
    }
    save_file(tensors, path, metadata={"format": FORMAT, **described})
    permit_as_usual(path)


def is_write_error(error: Exception) -> bool:
    """Whether a full disk or the like speaks: Python, safetensors, or torch, whose zip writer raises a plain
    RuntimeError.
    """
    return (
        isinstance(error, OSError | SafetensorError)
        or "PytorchStreamWriter" in str(error)
        or "inline_container" in str(error)
    )


def find_weights(path: Path) -> Path:
    """The file with the weights: `path` itself, or in a run folder those of the best checkpoint, else of the last.

    Raises:
        UserError: nothing there.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    candidates = sorted(
        (path / "checkpoints").glob(f"step-*/{WEIGHTS_FILE}"), key=lambda p: int(p.parent.name.split("-")[1])
    )
    if not candidates:
        raise UserError(
            f"{path}: neither a checkpoint ({WEIGHTS_FILE}) nor a run folder with checkpoints/step-N/{WEIGHTS_FILE}"
        )
    best = path / "checkpoints" / "best" / WEIGHTS_FILE
    return best if best.is_file() else candidates[-1]


def is_safetensors(file: Path) -> bool:
    """A safetensors file starts with the length of its JSON header, and then that header."""
    with open(file, "rb") as stream:
        start = stream.read(9)
    return start[8:9] == b"{" and not start.startswith(b"PK")


def _load_safetensors(file: Path) -> SSAST:
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            weights = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file}: was not written by this engine (its metadata lacks format={FORMAT!r})")
    config = ModelConfig(**_as_tuples(json.loads(metadata["config"])))
    model = SSAST(config, ModelCard(**_as_tuples(json.loads(metadata.get("card", "{}")))))
    check_weights(weights, model.state_dict(), file)
    model.load_state_dict(weights)
    return model


def _as_tuples(saved: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}


def _adapted(
    config: ModelConfig, num_classes: int | None, frames: int | None, stride: tuple[int, int] | None, bins: int | None
) -> ModelConfig:
    changes: dict[str, object] = {}
    if num_classes is not None:
        changes.update(num_classes=num_classes, pretraining_heads=False)
    if frames is not None:
        changes["input_frames"] = frames
    if bins is not None:
        changes["num_mel_bins"] = bins
    if stride is not None:
        changes["stride"] = stride
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None


def _pair(stride: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (stride, stride) if isinstance(stride, int) else tuple(stride) if stride is not None else None
