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
        samples = _as_float(waveform, "the waveform")  # of one scale, whichever clip is the loudest
        clips = [samples] if samples.ndim == 1 else list(samples)
    else:
        clips = [_as_float(clip, f"clip {number}") for number, clip in enumerate(waveform)]
    if not clips:
        raise ValueError("no clips were given")
    return [_as_clip(clip, number, sample_rate, wanted_rate) for number, clip in enumerate(clips)]


def _as_float(waveform: Waveform, name: str) -> np.ndarray:
    """Samples as float32 or float64 of full scale 1, whatever their shape.

    Raises:
        ValueError: a type that is no sound, or integers whose full scale is not plain.
    """
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu()
        # NumPy does not have all of torch's types
        samples = waveform.float().numpy() if waveform.is_floating_point() else waveform.numpy()
    else:
        samples = np.asarray(waveform)
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(_full_scale(samples, name))
    if samples.dtype.kind != "f":
        raise ValueError(f"{name}: samples must be float or signed integers, not {samples.dtype}")
    return samples


def _full_scale(samples: np.ndarray, name: str) -> float:
    """Of 8- and 16-bit integers that of their type. Wider ones often hold samples of 16 or 24 bits, so theirs is that
    of 32 bits where only 32 bits can hold what is there, and nothing where it might be another.

    Raises:
        ValueError: it might be another.
    """
    if samples.dtype.itemsize <= 2:
        return -float(np.iinfo(samples.dtype).min)
    peak = max(int(samples.max(initial=0)), -int(samples.min(initial=0)))
    if peak == 0 or 1 << 23 < peak <= 1 << 31:
        return float(1 << 31)
    bits = "16, 24 or 32" if peak <= 1 << 15 else "24 or 32" if peak <= 1 << 23 else "more than 32"
    raise ValueError(
        f"{name}: {samples.dtype} samples of peak {peak} may be of {bits} bits, so their full scale is not plain: give "
        "int16, or floats divided by their full scale (32768 for 16 bits, 2147483648 for 32)"
    )


def _as_clip(samples: np.ndarray, number: int, sample_rate: int, wanted_rate: int) -> np.ndarray:
    if samples.ndim not in (1, 2):
        raise ValueError(f"clip {number} must be [S] or [C, S], not of shape {samples.shape}")
    if samples.ndim == 2 and not 1 <= len(samples) <= MOST_CHANNELS:
        raise ValueError(f"clip {number} of shape {samples.shape} has {len(samples)} channels: they come first, [C, S]")
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
