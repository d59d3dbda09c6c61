"""Mean and standard deviation of log-mel features, as normalisation takes them: over frames of sound alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NUM_MEL_BINS = 128
"""Of the features that `ssast prepare` measures; its stats.json names them."""


def evenly_picked(count: int, most: int) -> np.ndarray:
    """Up to `most` of the numbers below `count`, evenly spaced, ascending: int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def feature_statistics(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], sample_rate: int, num_mel_bins: int
) -> tuple[float, float]:
    """(mean, standard deviation) of the features of all frames, rounded to 4 digits; (0, 0) where there is no frame.

    Args:
        batches: pairs of waveform int16 [B, S] and lengths int64 [B] in samples; what lies beyond them is padding.
        sample_rate: of the waveforms, in Hz.
        num_mel_bins: of the features.
    """
    import torch  # takes seconds, and `ssast prepare` comes here last

    from ssast.kernels import fbank
    from ssast.kernels.fbank import count_frames

    count, total, squares = 0, 0.0, 0.0
    for waveform, samples in batches:
        lengths = torch.from_numpy(samples)
        frames = count_frames(lengths, sample_rate)  # [B]
        if not (frames > 0).any():
            continue
        features = fbank(
            torch.from_numpy(waveform), sample_rate=sample_rate, num_mel_bins=num_mel_bins, lengths=lengths
        )  # [B, T, F]
        is_sound = torch.arange(features.shape[1])[None, :] < frames[:, None]
        values = features[is_sound].double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    mean = total / max(count, 1)
    return round(mean, 4), round(max(squares / max(count, 1) - mean**2, 0.0) ** 0.5, 4)
