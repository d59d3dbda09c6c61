"""Weights in and out: our safetensors, and the checkpoints of the official code (https://github.com/YuanGongND/ssast).

A file always loads whole or not at all: a tensor that is missing, left over or of another shape is an error that names
it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import permit_as_usual

from .ssast import HEAD_DIM, NUM_PREFIX, SSAST, ModelCard, ModelConfig, init_classifier, resize

log = logging.getLogger("ssast")

WEIGHTS_FILE = "model.safetensors"
FORMAT = "ssast-engine/1"
# DeiT's own heads: saved, never used
UNUSED_OFFICIAL = (
    "v.head.weight",
    "v.head.bias",
    "v.head_dist.weight",
    "v.head_dist.bias",
)
UNUSED_CLASSES = 1000
# the paper's fine-tuning stride first
FINETUNE_STRIDES = {
    (16, 16): ((10, 10), (16, 16)),
    (128, 2): ((128, 1), (128, 2)),
}


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
        position_resize: "exact" or "official", see `ssast.engine.model.ssast.resize_position`.

    An official fine-tuned file does not say for which stride and input it was made. `stride` is then taken as what it
    *was* made for; left out, the paper's fine-tuning stride is assumed where it fits the number of tokens, which is
    logged. The input follows from the number of tokens; another `input_frames` is fitted as for any other model.

    Raises:
        UserError: no such file, not a checkpoint, tensors missing, left over or of another shape (each is named), or
            settings that contradict the file.
    """
    file = find_weights(Path(path))
    if is_safetensors(file):
        model = _load_safetensors(file)
        if heads is not None and heads != model.config.heads:
            raise UserError(f"{file}: was trained with {model.config.heads} attention heads, not {heads}")
    else:
        model = _load_official(file, heads, _pair(stride), input_frames, input_bins)
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
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if format == "official":
            torch.save(_to_official(model), aside)
        else:
            save_weights({k: v.detach() for k, v in model.state_dict().items()}, model, aside)
        os.replace(aside, path)
    except Exception as error:
        aside.unlink(missing_ok=True)
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


def check_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: Path) -> None:
    """Raise UserError that names every tensor that is missing, left over or of another shape."""
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in wanted]
    for key, value in found.items():
        if key in wanted and value.shape != wanted[key].shape:
            problems.append(f"{key} is {list(value.shape)}, the model needs {list(wanted[key].shape)}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{where}: does not fit the model: {shown}")


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


def _load_official(
    file: Path, heads: int | None, stride: tuple[int, int] | None, input_frames: int | None, input_bins: int | None
) -> SSAST:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a checkpoint that can be loaded safely: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{file}: not an official SSAST checkpoint (a flat dictionary of tensors was expected)")
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    config = _official_config(file, tensors, heads, stride, input_frames, input_bins)
    model = SSAST(config)
    model.unused = {key: tensors[key] for key in UNUSED_OFFICIAL if key in tensors}
    wanted = _to_official(model, prefix="")
    known = {key: value for key, value in tensors.items() if key not in UNUSED_OFFICIAL}
    check_weights(known, {key: value for key, value in wanted.items() if key not in UNUSED_OFFICIAL}, file)
    model.load_state_dict(_from_official(known))
    return model


def _official_config(
    file: Path,
    tensors: dict[str, torch.Tensor],
    heads: int | None,
    stride: tuple[int, int] | None,
    input_frames: int | None,
    input_bins: int | None,
) -> ModelConfig:
    if "v.pos_embed" not in tensors or "v.patch_embed.proj.weight" not in tensors:
        raise UserError(
            f"{file}: not an official SSAST checkpoint (no v.pos_embed and v.patch_embed.proj.weight in it)"
        )
    if "v.dist_token" not in tensors:
        raise UserError(
            f"{file}: has no v.dist_token (a model of one prefix token, base_nokd, which SSAST cannot pretrain either)"
        )
    width = tensors["v.pos_embed"].shape[-1]
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"v\.blocks\.(\d+)\.", key))}
    patch_shape = tuple(tensors["v.patch_embed.proj.weight"].shape[2:])
    pretraining = "p_input_tdim" in tensors
    if heads is None and width % HEAD_DIM:
        raise UserError(
            f"{file}: width {width} is no multiple of {HEAD_DIM}, so the number of attention heads must be given "
            "(heads=...)"
        )
    if pretraining:
        bins, frames, own_stride = int(tensors["p_input_fdim"]), int(tensors["p_input_tdim"]), patch_shape
    else:
        patches = tensors["v.pos_embed"].shape[1] - NUM_PREFIX
        bins, frames, own_stride = _finetuned_input(file, patches, patch_shape, stride, input_frames, input_bins)
    try:
        return ModelConfig(
            width=width,
            depth=max(blocks, default=-1) + 1,
            heads=heads or width // HEAD_DIM,
            num_mel_bins=bins,
            input_frames=frames,
            patch_shape=patch_shape,
            stride=own_stride,
            num_classes=tensors["mlp_head.1.weight"].shape[0] if "mlp_head.1.weight" in tensors else None,
            pretraining_heads=pretraining,
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _finetuned_input(
    file: Path,
    patches: int,
    patch_shape: tuple[int, int],
    stride: tuple[int, int] | None,
    frames: int | None,
    bins: int | None,
) -> tuple[int, int, tuple[int, int]]:
    """(mel bins, frames, stride) that a fine-tuned file was made for, from its number of patches and what the caller
    knows.
    """
    bins = bins or 128
    fitting = []  # (whether `frames` is what it was made for, shortest input, stride)
    for guess in (stride,) if stride else FINETUNE_STRIDES.get(patch_shape, (patch_shape,)):
        rows = (bins - patch_shape[0]) // guess[0] + 1
        if rows > 0 and patches % rows == 0:
            shortest = (patches // rows - 1) * guess[1] + patch_shape[1]
            fitting.append((frames is not None and shortest <= frames < shortest + guess[1], shortest, guess))
    if not fitting:
        raise UserError(
            f"{file}: its {patches} patches fit neither {'the' if stride else 'a usual'} stride "
            f"{stride or ''} nor {bins} mel bins; give the stride and input_bins it was fine-tuned with"
        )
    exact, shortest, own_stride = max(fitting, key=lambda fit: fit[0])  # the first one where several are as good
    if not exact or stride is None:
        log.info("%s: taken as fine-tuned with stride %dx%d on %d or more frames", file, *own_stride, shortest)
    return bins, frames if exact and frames is not None else shortest, own_stride


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


def _from_official(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {
        "embedding.weight": tensors["v.patch_embed.proj.weight"].flatten(1),
        "embedding.bias": tensors["v.patch_embed.proj.bias"],
        "embedding.position": tensors["v.pos_embed"][0],
        "embedding.prefix": torch.cat((tensors["v.cls_token"], tensors["v.dist_token"]), dim=1)[0],
    }
    if "mask_embed" in tensors:
        weights["embedding.mask_token"] = tensors["mask_embed"][0, 0]
    renamed = {"v.blocks.": "blocks.", "v.norm.": "norm.", "cpredlayer.": "class_head.", "gpredlayer.": "recon_head."}
    renamed["mlp_head."] = "classifier."
    for key, value in tensors.items():
        for theirs, ours in renamed.items():
            if key.startswith(theirs):
                weights[ours + key.removeprefix(theirs)] = value
    return weights


def _to_official(model: SSAST, prefix: str = "module.") -> dict[str, torch.Tensor]:
    """The official state dict, in the order in which the official code writes it."""
    config, weights = model.config, {key: value.detach().cpu() for key, value in model.state_dict().items()}
    if config.layer_weights:
        raise UserError("the official format holds no classifier over weighted layers; keep it as safetensors")
    if config.pretraining_heads and (config.stride != config.patch_shape or config.num_classes is not None):
        raise UserError(
            "the official format holds pretraining models without overlap or classifier, or fine-tuned ones "
            "(num_classes=...)"
        )
    tensors: dict[str, torch.Tensor] = {}
    if config.pretraining_heads:
        tensors["p_input_fdim"] = torch.tensor(config.num_mel_bins)
        tensors["p_input_tdim"] = torch.tensor(config.input_frames)
        tensors["mask_embed"] = weights["embedding.mask_token"][None, None]
    tensors["v.cls_token"] = weights["embedding.prefix"][None, :1]
    tensors["v.pos_embed"] = weights["embedding.position"][None]
    tensors["v.dist_token"] = weights["embedding.prefix"][None, 1:]
    tensors["v.patch_embed.proj.weight"] = weights["embedding.weight"].view(config.width, 1, *config.patch_shape)
    tensors["v.patch_embed.proj.bias"] = weights["embedding.bias"]
    tensors |= {f"v.{key}": value for key, value in weights.items() if key.startswith(("blocks.", "norm."))}
    for key in UNUSED_OFFICIAL:
        shape = (UNUSED_CLASSES, config.width) if key.endswith("weight") else (UNUSED_CLASSES,)
        tensors[key] = model.unused.get(key, torch.zeros(shape))
    for ours, theirs in (("class_head.", "cpredlayer."), ("recon_head.", "gpredlayer."), ("classifier.", "mlp_head.")):
        tensors |= {theirs + key.removeprefix(ours): value for key, value in weights.items() if key.startswith(ours)}
    # views would be saved with all their storage
    return {prefix + key: value.clone() for key, value in tensors.items()}
