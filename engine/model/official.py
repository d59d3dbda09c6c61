"""Checkpoints of the official code (https://github.com/YuanGongND/ssast): what is in them, read and written."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from ssast.engine.errors import UserError, first_line
from ssast.kernels import NUM_PREFIX

from .config import HEAD_DIM, ModelConfig
from .ssast import SSAST
from .tensors import check_weights, read_state_dict

log = logging.getLogger("ssast")

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


def load_official(
    file: Path, heads: int | None, stride: tuple[int, int] | None, input_frames: int | None, input_bins: int | None
) -> SSAST:
    """An official checkpoint, pretrained or fine-tuned; what its file does not say is given, else derived or assumed.

    Raises:
        UserError: not such a checkpoint, tensors that are missing, left over, of another shape or not finite, or
            arguments that contradict it.
    """
    tensors = read_state_dict(file)
    if "embedding.position" in tensors:
        raise UserError(
            f"{file}: holds weights of this engine without the shape that belongs to them: write them with "
            "ssast.engine.save_model"
        )
    try:
        config = _official_config(file, tensors, heads, stride, input_frames, input_bins)
    except (ValueError, IndexError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{file}: its tensors describe no model: {first_line(error)}") from None
    model = SSAST(config)
    model.unused = {key: tensors[key] for key in UNUSED_OFFICIAL if key in tensors}
    expected = to_official(model, prefix="")
    weights = {key: value for key, value in tensors.items() if key not in UNUSED_OFFICIAL}
    check_weights(weights, {key: value for key, value in expected.items() if key not in UNUSED_OFFICIAL}, file)
    model.load_state_dict(from_official(weights))
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
    blocks = {match[1] for key in tensors if (match := re.match(r"v\.blocks\.(\d+)\.", key))}
    patch_bins, patch_frames = tensors["v.patch_embed.proj.weight"].shape[2:]
    patch_shape = (patch_bins, patch_frames)
    pretraining = "p_input_tdim" in tensors
    # the encoder of a model that was pretrained on visible patches only: `to_official` leaves its decoder out
    is_encoder = pretraining and not any(key.startswith(("mask_embed", "cpredlayer", "gpredlayer")) for key in tensors)
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
    config = ModelConfig(
        width=width,
        depth=len(blocks),  # not the highest number, which any file can write
        heads=heads or width // HEAD_DIM,
        num_mel_bins=bins,
        input_frames=frames,
        patch_shape=patch_shape,
        stride=own_stride,
        num_classes=tensors["mlp_head.1.weight"].shape[0] if "mlp_head.1.weight" in tensors else None,
        pretraining_heads=pretraining and not is_encoder,
        encoder_tokens="visible" if is_encoder else "all",
    )
    position = tensors["v.pos_embed"]
    if position.shape != (1, NUM_PREFIX + config.num_patches, width):  # before anything of that size is made
        needed = [1, NUM_PREFIX + config.num_patches, width]
        raise UserError(
            f"{file}: does not fit the model: v.pos_embed is {list(position.shape)}, the model needs {needed}"
        )
    return config


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


def from_official(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official state dict, less `UNUSED_OFFICIAL`, by our names."""
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


def to_official(model: SSAST, prefix: str = "module.") -> dict[str, torch.Tensor]:
    """The official state dict, in the order in which the official code writes it.

    A model of `encoder_tokens` "visible" goes in without its decoder and heads, which the official code has no names
    for: its fine-tuning reads the encoder and does not miss the rest.

    Raises:
        UserError: the official format has no names for the parts of this model.
    """
    config, weights = model.config, {key: value.detach().cpu() for key, value in model.state_dict().items()}
    if config.layer_weights:
        raise UserError("the official format holds no classifier over weighted layers; keep it as safetensors")
    if config.pretraining_heads and (config.stride != config.patch_shape or config.num_classes is not None):
        raise UserError(
            "the official format holds pretraining models without overlap or classifier, or fine-tuned ones "
            "(num_classes=...)"
        )
    tensors: dict[str, torch.Tensor] = {}
    is_visible = config.encoder_tokens == "visible"
    is_encoder = is_visible and config.num_classes is None and config.stride == config.patch_shape
    if config.pretraining_heads or is_encoder:
        tensors["p_input_fdim"] = torch.tensor(config.num_mel_bins)
        tensors["p_input_tdim"] = torch.tensor(config.input_frames)
    if config.pretraining_heads and not config.has_decoder:
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
    parts = (("class_head.", "cpredlayer."), ("recon_head.", "gpredlayer."), ("classifier.", "mlp_head."))
    for ours, theirs in parts[2:] if config.has_decoder else parts:
        tensors |= {theirs + key.removeprefix(ours): value for key, value in weights.items() if key.startswith(ours)}
    # views would be saved with all their storage
    return {prefix + key: value.clone() for key, value in tensors.items()}
