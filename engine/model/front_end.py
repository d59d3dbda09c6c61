"""Waveforms to what a model is given: the one place that calls `ssast.kernels.fbank` for a model.

Training, validation, pictures, inference and exports go through here, so that none of them can hear other sound than
the rest. Statistics of data are measured below, in `ssast.engine.data`, by the kernel itself: they come before any
model, and are what its card is made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssast.kernels import fbank

from .config import ModelCard, ModelConfig


@dataclass(frozen=True)
class FrontEnd:
    """Log-mel features as one model takes them.

    Frames past the end of a clip are zero before `(x - mean) / (2 std)`, as the official loader has them.
    """

    sample_rate: int  # Hz
    num_mel_bins: int  # F
    num_frames: int  # T
    mean: float
    std: float

    @classmethod
    def of(cls, config: ModelConfig, card: ModelCard) -> FrontEnd:
        """What a model of this shape and card takes."""
        return cls(card.sample_rate, config.num_mel_bins, config.input_frames, card.mean, card.std)

    def features(
        self,
        waveform: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        patch: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Normalised log-mel features.

        Args:
            waveform: [B, S] at `sample_rate`, int16 or float32 in [-1, 1].
            lengths: [B] samples of each clip that are sound; None: all.
            dtype: of the result.
            patch: (mel bins, frames) of patches that do not overlap: the kernel then writes patch order.
            backend: as `ssast.kernels.fbank` takes it.

        Returns:
            [B, T, F], with `patch` [B, P, K]; on the waveform's device.

        Raises:
            ValueError: a waveform of another shape or type, or a patch that no input can fill.
        """
        return fbank(
            waveform,
            sample_rate=self.sample_rate,
            num_mel_bins=self.num_mel_bins,
            lengths=lengths,
            num_frames=self.num_frames,
            mean=self.mean,
            std=self.std,
            dtype=dtype,
            patch=patch,
            backend=backend,
        )
