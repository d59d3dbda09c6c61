"""Weights in and out: our safetensors, and the checkpoints of the official code (https://github.com/YuanGongND/ssast).

A file always loads whole or not at all: a tensor that is missing, left over or of another shape is an error that names
it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import atomic_write, expand_path, permit_as_usual
from ssast.engine.twins import missing_file

from .adapt import init_classifier, resize
from .config import ModelCard, ModelConfig
from .official import load_official, to_official
from .ssast import SSAST
from .tensors import check_weights, unwrapped_names

log = logging.getLogger("ssast")

D = TypeVar("D", ModelConfig, ModelCard)

WEIGHTS_FILE = "model.safetensors"
FORMAT = "ssast-engine/1"
LONGEST_HEADER = 100_000_000  # bytes of JSON, the limit of safetensors itself


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
        raise UserError(f"{path}: {missing_file(os.path.abspath(path), 'no such file or folder')}")
    if kind := hf_model_type(path):
        raise UserError(
            f"{path}: is a Hugging Face folder of the type {kind!r}: `ssast export {path} --out NAME.safetensors` "
            "converts an audio spectrogram transformer, ssast.engine.inference.export.from_hf loads it in Python"
        )
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    files = (path / "checkpoints").glob(f"step-*/{WEIGHTS_FILE}")
    numbered = [file for file in files if file.parent.name.removeprefix("step-").isdecimal()]  # not a copy of one
    candidates = sorted(numbered, key=lambda file: int(file.parent.name.removeprefix("step-")))
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
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def _load_safetensors(file: Path) -> SSAST:
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            names = list(stream.keys())
            plain_names = unwrapped_names(names)
            config, card = _read_description(file, metadata, list(plain_names.values()))
            weights = {plain_names[name]: stream.get_tensor(name) for name in names}
    except UserError:
        raise
    except Exception as error:  # of damaged files, its reader raises all kinds
        raise UserError(f"{file}: not a readable safetensors file, cut off or damaged: {first_line(error)}") from None
    if len(weights) < len(names):
        raise UserError(f"{file}: holds a tensor twice, wrapped and plain")
    try:
        with torch.device("meta"):  # the shapes alone: what metadata say may be of any size
            model = SSAST(config, card)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{file}: its metadata describe no model: {first_line(error)}") from None
    check_weights(weights, model.state_dict(), file)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model


def _read_description(file: Path, metadata: dict[str, str], names: list[str]) -> tuple[ModelConfig, ModelCard]:
    """Shape and card out of a file's metadata, checked against each other and the names of its tensors.

    Raises:
        UserError: another program's file, or metadata that describe no model.
    """
    if metadata.get("format") != FORMAT:
        hint = (
            f": it lies in a Hugging Face folder, which `ssast export {file.parent} --out NAME.safetensors` converts"
            if hf_model_type(file.parent)
            else ""
        )
        raise UserError(f"{file}: was not written by this engine (its metadata lacks format={FORMAT!r}){hint}")
    try:
        config = _from_json(ModelConfig, metadata["config"])
        card = _from_json(ModelCard, metadata.get("card", "{}"))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = first_line(error) if not isinstance(error, ValidationError) else _shortly(error)
        raise UserError(f"{file}: its metadata describe no model: {reason}") from None
    for stack, depth in (("", config.depth), ("decoder.", config.decoder_depth if config.has_decoder else 0)):
        pattern = re.compile(rf"{re.escape(stack)}blocks\.(\d+)\.")
        blocks = {match[1] for name in names if (match := pattern.match(name))}
        if depth != len(blocks):  # before as many are built
            raise UserError(f"{file}: its metadata say {depth} {stack}blocks, it holds {len(blocks)}")
    if card.labels is not None and len(card.labels) != config.num_classes:
        raise UserError(f"{file}: names {len(card.labels)} classes, its model has {config.num_classes or 0}")
    return config, card


def _from_json(kind: type[D], text: str) -> D:
    """A dataclass of plain values, as `save_weights` wrote it.

    Raises:
        TypeError, ValueError: it is not one.
    """
    saved = json.loads(text)
    if not isinstance(saved, dict):
        raise ValueError(f"{kind.__name__} is {type(saved).__name__}")
    unknown = saved.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"unknown {sorted(unknown)[0]!r}, perhaps of a later version of this engine")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    labels = values.get("labels")
    if labels is not None and not (isinstance(labels, tuple) and all(isinstance(label, str) for label in labels)):
        raise ValueError("labels are no list of texts")
    # labels may hold names that are not UTF-8, which pydantic refuses
    plain = {key: value for key, value in saved.items() if key != "labels"}
    TypeAdapter(kind).validate_json(json.dumps(plain), strict=True)
    return kind(**values)


def _shortly(error: ValidationError) -> str:
    """The first of pydantic's complaints in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}"[:200]


def hf_model_type(folder: Path) -> str | None:
    """The `model_type` of a Hugging Face model folder; None for any other folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def _adapted(
    config: ModelConfig, num_classes: int | None, frames: int | None, stride: tuple[int, int] | None, bins: int | None
) -> ModelConfig:
    changes: dict[str, Any] = {}
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
    if stride is None or isinstance(stride, int):
        return None if stride is None else (stride, stride)
    bins, frames = stride
    return bins, frames
