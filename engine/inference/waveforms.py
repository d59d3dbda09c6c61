"""Waveforms as people have them - arrays or tensors, any type, shape and rate - to mono clips at a model's rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import soxr
import torch

from ssast.engine.data.resample import QUALITY
from ssast.kernels.fbank import LOWEST_RATE

MAX_PEAK = 1000.0  # where full scale is 1: beyond it samples are integers that were never divided
MOST_CHANNELS = 64

Waveform = torch.Tensor | np.ndarray


def as_clips(waveform: Waveform | Sequence[Waveform], sample_rate: int, wanted_rate: int) -> list[np.ndarray]:
    """Clips float32 [S] at `wanted_rate` Hz, of what `embed` takes.

    Raises:
        ValueError: as `embed` does.
    """
    if not LOWEST_RATE <= sample_rate < float("inf"):
        raise ValueError(f"sample_rate must be at least {LOWEST_RATE} Hz, not {sample_rate}")
    if isinstance(waveform, torch.Tensor | np.ndarray):
        if not 1 <= waveform.ndim <= 3:
            raise ValueError(f"a waveform must be [S], [B, S] or [B, C, S], not of shape {tuple(waveform.shape)}")
        if waveform.ndim > 1 and waveform.shape[-1] <= MOST_CHANNELS < waveform.shape[-2]:
            raise ValueError(f"samples come last, [B, S] or [B, C, S]: this is of shape {tuple(waveform.shape)}")
        clips = [waveform] if waveform.ndim == 1 else list(waveform)
    else:
        clips = list(waveform)
    if not clips:
        raise ValueError("no clips were given")
    return [_as_clip(clip, number, sample_rate, wanted_rate) for number, clip in enumerate(clips)]


def _as_clip(clip: Waveform, number: int, sample_rate: int, wanted_rate: int) -> np.ndarray:
    samples = (
        clip.detach().cpu().float().numpy()
        if _is_float(clip)
        else np.asarray(clip.cpu() if torch.is_tensor(clip) else clip)
    )
    if samples.ndim not in (1, 2):
        raise ValueError(f"clip {number} must be [S] or [C, S], not of shape {samples.shape}")
    if samples.ndim == 2 and not 1 <= len(samples) <= MOST_CHANNELS:
        raise ValueError(f"clip {number} of shape {samples.shape} has {len(samples)} channels: they come first, [C, S]")
    if samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype.kind != "f":
        raise ValueError(f"clip {number}: samples must be float or signed integers, not {samples.dtype}")
    mono = samples.astype(np.float32) if samples.ndim == 1 else samples.mean(axis=0, dtype=np.float32)
    peak = float(np.abs(mono).max(initial=0.0))
    if not np.isfinite(peak):
        raise ValueError(f"clip {number}: NaN or infinite samples ({np.count_nonzero(~np.isfinite(mono))})")
    if peak > MAX_PEAK:
        raise ValueError(
            f"clip {number}: peak {peak:.3g}, where float samples have a full scale of 1 (int16 ones are divided by "
            "32768)"
        )
    if sample_rate == wanted_rate or not len(mono):
        return mono
    return soxr.resample(mono, sample_rate, wanted_rate, quality=QUALITY)


def _is_float(clip: Waveform) -> bool:
    """Whether it is a floating tensor, of which some types are unknown to NumPy."""
    return torch.is_tensor(clip) and clip.is_floating_point()
