"""The shape of a model, and what using it takes beside its weights. Plain values: nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Mean and standard deviation of the log-mel features of AudioSet-2M + LibriSpeech-960 (the paper's).
PAPER_MEAN, PAPER_STD = -4.2677393, 4.5689974
WIDTHS = {"tiny": 192, "small": 384, "base": 768}
PATCH_VALUES = 256
HEAD_DIM = 64


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shape of the model."""

    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: int = 4
    num_mel_bins: int = 128
    input_frames: int = 1024
    patch_shape: tuple[int, int] = (16, 16)  # mel bins x frames
    stride: tuple[int, int] = (16, 16)
    num_classes: int | None = None
    """None: no classifier."""
    pretraining_heads: bool = True
    layer_weights: bool = False
    """Classify a learned weighted sum of what every block gives, as SUPERB does, instead of what the last one gives."""
    encoder_tokens: str = "all"
    """What the encoder reads in pretraining. all: every token, mask tokens among them (SSAST); visible: the tokens of
    visible patches, and a decoder puts mask tokens in before the heads (MAE-AST). A model without pretraining heads has
    no decoder; this then says how its encoder was pretrained."""
    decoder_depth: int = 2
    """Blocks of the decoder."""
    decoder_width: int | None = None
    """None: the encoder's. Heads are as wide as the encoder's."""

    def __post_init__(self) -> None:
        least = {"width": 1, "depth": 0, "heads": 1, "mlp_ratio": 1, "num_classes": 1}
        for name, value in least.items():
            if (number := getattr(self, name)) is not None and number < value:
                raise ValueError(f"{name} must be at least {value}, not {number}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.encoder_tokens not in ("all", "visible"):
            raise ValueError(f"encoder_tokens must be 'all' or 'visible', not {self.encoder_tokens!r}")
        if self.has_decoder and self.decoder_depth < 1:
            raise ValueError(
                f"decoder_depth {self.decoder_depth}: mask tokens need at least one block to learn of the visible ones"
            )
        if self.has_decoder and (self.head_width < 1 or self.head_width % (self.width // self.heads)):
            raise ValueError(
                f"decoder_width {self.head_width} is not a multiple of {self.width // self.heads}, the width of a head"
            )
        if min(self.stride) < 1 or min(self.patch_shape) < 1:
            raise ValueError(f"patch shape {self.patch_shape} and stride {self.stride} must be at least 1")
        if self.num_mel_bins < self.patch_shape[0] or self.input_frames < self.patch_shape[1]:
            raise ValueError(
                f"an input of {self.num_mel_bins} mel bins x {self.input_frames} frames is smaller than one patch of "
                f"{self.patch_shape[0]}x{self.patch_shape[1]}"
            )
        if self.pretraining_heads and self.patch_values != PATCH_VALUES:
            raise ValueError(
                f"patches must hold {PATCH_VALUES} values to be pretrained on, {self.patch_shape} holds "
                f"{self.patch_values}"
            )

    @property
    def has_decoder(self) -> bool:
        """Pretraining puts mask tokens in behind the encoder."""
        return self.pretraining_heads and self.encoder_tokens == "visible"

    @property
    def head_width(self) -> int:
        """Width of the tokens that the pretraining heads read."""
        return (self.decoder_width or self.width) if self.has_decoder else self.width

    @property
    def decoder_heads(self) -> int:
        """Attention heads of the decoder."""
        return self.head_width // (self.width // self.heads)

    @property
    def patch_values(self) -> int:
        """K, values of a patch."""
        return self.patch_shape[0] * self.patch_shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (frequency, time); mel bins and frames that do not fill a patch are left out."""
        return (
            (self.num_mel_bins - self.patch_shape[0]) // self.stride[0] + 1,
            (self.input_frames - self.patch_shape[1]) // self.stride[1] + 1,
        )

    @property
    def num_patches(self) -> int:
        """P, patches of an input."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ModelCard:
    """What using a model takes beside its weights: how its features are made, and what its classes are."""

    sample_rate: int = 16000  # Hz
    mean: float = PAPER_MEAN
    std: float = PAPER_STD
    """Of the log-mel features; the model is given (x - mean) / (2 std)."""
    labels: tuple[str, ...] | None = None
    """Of the classes, in the order of the logits; None: not known."""
    multi_label: bool = False
    """A clip may have several labels: probabilities are sigmoids, otherwise a softmax."""
    pool: str = "mean"
    """What the classifier was trained on, as in `SSAST.classify`."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ValueError(f"mean and std of features must be finite, std positive, not {self.mean} and {self.std}")
        if self.pool not in ("mean", "cls"):
            raise ValueError(f"pool must be 'mean' or 'cls', not {self.pool!r}")


OBJECTIVES = ("joint", "discriminative", "generative")


@dataclass(frozen=True)
class LossConfig:
    """Which pretraining loss is computed of masked patches, as one value for all that hand it on.

    Raises:
        ValueError: an unknown objective.
    """

    objective: str = "joint"
    """joint: InfoNCE + recon_weight x MSE; discriminative: InfoNCE alone; generative: MSE alone."""
    softmax_over: str = "predictions"
    """As in `ssast.kernels.mspm_loss`."""
    recon_weight: float = 10.0
    """Lambda of the joint loss."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
