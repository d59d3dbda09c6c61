"""Models that are fresh or follow another one: initial weights, and weights fitted to another input or head."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from ssast.kernels import NUM_PREFIX

from .config import ModelConfig
from .ssast import SSAST


def init_weights(model: SSAST, generator: torch.Generator | None = None) -> None:
    """Initial values with the distributions of the official code (DeiT's for the encoder, PyTorch's defaults for the
    heads).
    """
    for name, parameter in model.named_parameters():
        _init_parameter(name, parameter, model.config, generator)


def init_classifier(model: SSAST, generator: torch.Generator | None = None) -> None:
    """Initial values of a model's classifier, as `init_weights` gives them."""
    for name, parameter in model.classifier.named_parameters(prefix="classifier"):
        _init_parameter(name, parameter, model.config, generator)


@torch.no_grad()
def _init_parameter(name: str, parameter: torch.Tensor, config: ModelConfig, generator: torch.Generator | None) -> None:
    if "norm" in name or name.startswith("classifier.0"):
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    elif name.endswith((".position", ".prefix")) or ("blocks." in name and name.endswith("weight")):
        nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
    elif name == "layer_weights":
        parameter.zero_()  # The softmax of zeros weights all layers equally.
    elif name.endswith(".mask_token"):
        # Xavier normal of a [1, 1, D] tensor
        parameter.normal_(0.0, math.sqrt(1.0 / parameter.numel()), generator=generator)
    elif "blocks." in name:
        parameter.zero_()
    else:  # PyTorch's default of Linear and Conv2d
        fan_in = {
            "embedding": config.patch_values,
            "class_head": config.head_width,
            "recon_head": config.head_width,
        }.get(name.split(".")[0], config.width)
        bound = 1.0 / math.sqrt(fan_in)
        parameter.uniform_(-bound, bound, generator=generator)


def build_model(config: ModelConfig, seed: int = 0) -> SSAST:
    """A freshly initialised model; the same weights for the same seed wherever it is built."""
    model = SSAST(config)
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def resize(model: SSAST, config: ModelConfig, position_resize: str = "exact") -> SSAST:
    """The same weights in a model for another input size, stride, decoder or set of heads. What `model` lacks of the
    decoder and heads, or has in another shape, stays freshly initialised (`unshared_parts` names it).

    Raises:
        ValueError: a change that weights cannot follow (width, depth, patch shape), or an unknown `position_resize`.
    """
    fixed = ("width", "depth", "heads", "mlp_ratio", "patch_shape")
    changed = [key for key in fixed if getattr(config, key) != getattr(model.config, key)]
    if changed:
        raise ValueError(f"weights cannot follow a change of {', '.join(changed)}")
    new = build_model(config)
    new.card = model.card
    weights = new.state_dict()
    keeps_classifier = config.num_classes == model.config.num_classes
    for key, value in model.state_dict().items():
        if key.endswith(".position"):
            value = resize_position(value, model.config.grid, config.grid, position_resize)
        fits = key in weights and weights[key].shape == value.shape
        if fits and (keeps_classifier or not key.startswith("classifier")):
            weights[key] = value
    new.load_state_dict(weights)
    return new


def unshared_parts(model: SSAST, other: SSAST) -> list[str]:
    """Names of the parts of `model` that `other` lacks or has in another shape; positions fit any grid."""
    theirs = _shapes(other)
    names = (name for name, shape in _shapes(model).items() if theirs.get(name) != shape)
    part = r"embedding\.\w+|\w+" if other.decoder is None else r"embedding\.\w+|decoder\.blocks\.\d+|\w+"
    return list(dict.fromkeys(match[0] for name in names if (match := re.match(part, name))))


def _shapes(model: SSAST) -> dict[str, torch.Size]:
    weights = model.state_dict().items()
    return {name: value.shape[1:] if name.endswith(".position") else value.shape for name, value in weights}


def resize_position(
    position: torch.Tensor, old: tuple[int, int], new: tuple[int, int], method: str = "exact"
) -> torch.Tensor:
    """Fit a position embedding [2 + f t, D] to another grid: along each axis cut out the middle if shorter, interpolate
    if longer.

    Args:
        method: "exact" does just that. "official" reproduces the authors' code, which passes the rows through a height
            of 8 whenever the grid is not cut in time, and cuts in frequency by the length in time.

    Raises:
        ValueError: an unknown method, or a case in which the official code fails.
    """
    if method not in ("exact", "official"):
        raise ValueError(f"position_resize must be 'exact' or 'official', not {method!r}")
    prefix, patches = position[:NUM_PREFIX], position[NUM_PREFIX:]
    image = patches.T.reshape(1, -1, *old)  # [1, D, f, t]
    if method == "official":
        image = _resize_official(image, old, new)
    else:
        for axis in (0, 1):
            image = _resize_axis(image, axis + 2, new[axis])
    return torch.cat((prefix, image.reshape(image.shape[1], -1).T), dim=0)


def _resize_axis(image: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    old = image.shape[dim]
    if length <= old:
        return image.narrow(dim, old // 2 - length // 2, length)
    size = (length, image.shape[3]) if dim == 2 else (image.shape[2], length)
    return _interpolate(image, size)


def _resize_official(image: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    if new[1] < old[1]:
        image = image.narrow(3, old[1] // 2 - new[1] // 2, new[1])
    else:
        image = _interpolate(image, (8, new[1]))
    if new[0] < old[0]:
        start = old[0] // 2 - new[0] // 2
        image = image[:, :, start : start + new[1]]
    else:
        image = _interpolate(image, new)
    if image.shape[2:] != new:
        raise ValueError(
            f"position_resize='official': the official code fails on a grid of {old} for {new}; use 'exact'"
        )
    return image


def _interpolate(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return nn.functional.interpolate(image.float(), size=size, mode="bilinear", align_corners=False).to(image.dtype)
