"""What the operators are measured against besides their own references: the official training code's way of doing the
same, clip by clip in Python, and what a practised PyTorch user would write in its place.

The first are written anew after what the official code does, on the device that is measured; where that code does
something wasteful that is no part of the method, they are kinder to it, and say so.
"""

from __future__ import annotations

import functools
import random

import torch

from ssast.kernels.fbank import mel_filters

from .formulas import FFT, SHIFT, WINDOW

SAMPLE_RATE, MEL_BINS = 16000, 128
PRE_EMPHASIS, LOG_FLOOR = 0.97, torch.finfo(torch.float32).eps


@functools.lru_cache(maxsize=4)
def _window_and_filters(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)
    return window.to(device, torch.float32), mel_filters(MEL_BINS, FFT, SAMPLE_RATE).to(device, torch.float32)


def _fit_and_normalise(features: torch.Tensor, num_frames: int, mean: float, std: float) -> torch.Tensor:
    """[..., T, F] -> [..., num_frames, F]; the padding is zeros before the normalisation."""
    features = torch.nn.functional.pad(features, (0, 0, 0, num_frames - features.shape[-2]))
    return (features - mean) / (2 * std)


def official_fbank(
    waveform: torch.Tensor, *, num_frames: int, mean: float, std: float, dtype: torch.dtype
) -> torch.Tensor:
    """[B, S] int16 -> [B, T, F], as the official loader prepares a clip: subtract the mean, Kaldi's filter bank, pad,
    normalise.

    Kinder than the original in one thing: window and mel filters are made once, not for every clip.
    """
    window, filters = _window_and_filters(waveform.device)
    clips = []
    for clip in waveform:
        wave = clip.float() / 32768.0
        wave = wave - wave.mean()
        frames = wave.unfold(0, WINDOW, SHIFT)  # [T, window]
        frames = frames - frames.mean(dim=1, keepdim=True)
        shifted = torch.nn.functional.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
        frames = (frames - PRE_EMPHASIS * shifted) * window
        power = torch.fft.rfft(torch.nn.functional.pad(frames, (0, FFT - WINDOW))).abs().pow(2.0)
        features = (power @ filters.T).clamp_min(LOG_FLOOR).log()
        clips.append(_fit_and_normalise(features, num_frames, mean, std))
    return torch.stack(clips).to(dtype)


def stft_fbank(waveform: torch.Tensor, *, num_frames: int, mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    """[B, S] int16 -> [B, T, F] by torch.stft and a matrix product: near Kaldi's, without its per-frame DC removal."""
    window, filters = _window_and_filters(waveform.device)
    wave = waveform.float() / 32768.0
    wave = torch.cat((wave[:, :1], wave[:, 1:] - PRE_EMPHASIS * wave[:, :-1]), dim=1)
    side = (FFT - WINDOW) // 2  # stft puts the window in the middle of the FFT's samples, Kaldi at their start
    wave = torch.nn.functional.pad(wave, (side, side))
    spectrum = torch.stft(wave, FFT, SHIFT, WINDOW, window, center=False, return_complex=True)  # [B, FFT / 2 + 1, T]
    features = (filters @ spectrum.abs().square()).clamp_min(LOG_FLOOR).log().transpose(1, 2)
    return _fit_and_normalise(features, num_frames, mean, std).to(dtype)


def official_mask(
    batch: int,
    *,
    grid: tuple[int, int],
    num_masked: int,
    cluster: tuple[int, ...],
    device: torch.device,
    generator: random.Random,
) -> torch.Tensor:
    """[B, M] as the official model draws: squares growing right and down from random corners into a set, until it is
    large enough.
    """
    patches, clips = grid[0] * grid[1], []
    for _ in range(batch):
        side = generator.choice(cluster)
        patches_masked: set[int] = set()
        while len(patches_masked) <= num_masked:
            corner = generator.randrange(patches)
            for down in range(side):
                for right in range(side):
                    number = corner + grid[1] * down + right
                    if 0 < number < patches:
                        patches_masked.add(number)
        clips.append(list(patches_masked)[:num_masked])
    return torch.tensor(clips, device=device)


def official_loss(
    class_pred: torch.Tensor, recon_pred: torch.Tensor, target: torch.Tensor, recon_weight: float = 10.0
) -> tuple[torch.Tensor, ...]:
    """(loss, nce, mse, accuracy) as the official model computes them: one clip at a time, in float32."""
    batch, masked, _ = target.shape
    arange = torch.arange(masked, device=target.device)
    nce, correct = target.new_zeros((), dtype=torch.float32), target.new_zeros((), dtype=torch.float32)
    for clip in range(batch):
        scores = target[clip].float() @ class_pred[clip].float().T
        correct += (scores.softmax(dim=1).argmax(dim=0) == arange).sum()
        nce = nce - scores.log_softmax(dim=1).diagonal().sum()
    nce, accuracy = nce / (batch * masked), correct / (batch * masked)
    mse = torch.nn.functional.mse_loss(recon_pred.float(), target.float())
    return nce + recon_weight * mse, nce, mse, accuracy


def bmm_loss(
    class_pred: torch.Tensor, recon_pred: torch.Tensor, target: torch.Tensor, recon_weight: float = 10.0
) -> tuple[torch.Tensor, ...]:
    """(loss, nce, mse): a batched product in the tensors' own dtype, log-softmax in float32. Meant to be compiled. No
    accuracy.
    """
    log_probability = torch.bmm(target, class_pred.transpose(1, 2)).float().log_softmax(dim=2)
    nce = -log_probability.diagonal(dim1=1, dim2=2).mean()
    mse = (recon_pred.float() - target.float()).square().mean()
    return nce + recon_weight * mse, nce, mse
