"""Kaldi-compatible log-mel filter banks of a whole batch.

What is computed, and where each step comes from: Kaldi's `compute-fbank-feats` as torchaudio's `compliance.kaldi.fbank` exposes it,
with the options of SSAST: 25 ms Hann window, 10 ms shift, per-frame DC removal, pre-emphasis 0.97, no dither, no energy, the waveform
left in [-1, 1], natural logarithm floored at float32 epsilon, `snip_edges` (only whole frames), mel range 20 Hz to the Nyquist
frequency. The loader's mean subtraction is not repeated: per-frame DC removal makes it immaterial.
"""

import functools
import math

import torch

from .backend import resolve_backend

FRAME_SECONDS, SHIFT_SECONDS = 0.025, 0.010
PRE_EMPHASIS = 0.97
LOW_HZ = 20.0
LOG_FLOOR = torch.finfo(torch.float32).eps  # ln = -15.9424


def fbank(
    waveform: torch.Tensor,  # [B, S]
    *,
    sample_rate: int = 16000,
    num_mel_bins: int = 128,
    lengths: torch.Tensor | None = None,  # [B]
    num_frames: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> torch.Tensor:  # [B, T, F]
    """Log-mel filter banks, one row each 10 ms.

    Args:
        waveform: [B, S] float32 in [-1, 1], or int16 (divided by 32768).
        sample_rate: in Hz; window and shift in samples are rounded down, the FFT length up to a power of two.
        num_mel_bins: F.
        lengths: [B] samples of each clip that are sound; frames that reach past the end are zero rows. None: all S samples.
        num_frames: T; rows past what S gives are zero, surplus rows are cut. None: what S gives.
        mean, std: normalise to (x - mean) / (2 std). The zero rows are put in before, as the official loader does, so after it they
            hold -mean / (2 std).
        dtype: of the result. All arithmetic is float32 (float64 for a float64 waveform).
        backend: None, "torch" or "triton".

    Returns:
        [B, T, F] on the waveform's device. A clip shorter than one window has only zero rows.

    Raises:
        ValueError: a waveform of another shape or type, or one of `mean` and `std` without the other.
    """
    if waveform.ndim != 2:
        raise ValueError(f"waveform must be [B, S], not of shape {tuple(waveform.shape)}")
    if waveform.dtype not in (torch.int16, torch.float32, torch.float64):
        raise ValueError(f"waveform must be int16 or float32, not {waveform.dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither")
    resolve_backend(backend, waveform.device, has_triton=False)

    if waveform.dtype == torch.int16:
        waveform = waveform.float() / 32768.0
    features = _log_mel(waveform, sample_rate, num_mel_bins)
    features = _fit_frames(features, waveform.shape[1], lengths, num_frames, sample_rate)
    if mean is not None and std is not None:
        features = (features - mean) / (2 * std)
    return features.to(dtype)


def frame_geometry(sample_rate: int) -> tuple[int, int, int]:
    """Window, shift and FFT length in samples."""
    window, shift = int(sample_rate * FRAME_SECONDS), int(sample_rate * SHIFT_SECONDS)
    return window, shift, 1 << (window - 1).bit_length()


def count_frames(samples: int | torch.Tensor, sample_rate: int) -> int | torch.Tensor:
    """Whole frames in so many samples."""
    window, shift, _ = frame_geometry(sample_rate)
    if isinstance(samples, torch.Tensor):
        return torch.where(samples >= window, 1 + (samples - window).clamp_min(0) // shift, 0)
    return 1 + (samples - window) // shift if samples >= window else 0


def mel_filters(num_mel_bins: int, fft_length: int, sample_rate: int) -> torch.Tensor:
    """[F, fft_length / 2 + 1] float64 triangles of Kaldi's mel scale, 1127 ln(1 + f / 700), in mel between neighbouring centres.

    The Nyquist bin feeds no filter. Narrow filters may hold no FFT bin at all (filter 3 of 128 at 16 kHz): their output is the floor.
    """
    edges_mel = torch.linspace(_mel(LOW_HZ), _mel(sample_rate / 2), num_mel_bins + 2, dtype=torch.float64)
    bin_mel = torch.tensor([_mel(k * sample_rate / fft_length) for k in range(fft_length // 2)], dtype=torch.float64)
    left, centre, right = edges_mel[:-2, None], edges_mel[1:-1, None], edges_mel[2:, None]
    triangles = torch.minimum((bin_mel - left) / (centre - left), (right - bin_mel) / (right - centre)).clamp_min(0)
    return torch.nn.functional.pad(triangles, (0, 1))


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)


@functools.lru_cache(maxsize=16)
def _constants(sample_rate: int, num_mel_bins: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    window, _, fft_length = frame_geometry(sample_rate)
    hann = torch.hann_window(window, periodic=False, dtype=torch.float64)
    filters = mel_filters(num_mel_bins, fft_length, sample_rate)
    return hann.to(device, dtype), filters.to(device, dtype)


def _log_mel(waveform: torch.Tensor, sample_rate: int, num_mel_bins: int) -> torch.Tensor:
    window, shift, fft_length = frame_geometry(sample_rate)
    if waveform.shape[1] < window:
        return waveform.new_zeros(waveform.shape[0], 0, num_mel_bins)
    hann, filters = _constants(sample_rate, num_mel_bins, waveform.dtype, waveform.device)
    frames = waveform.unfold(1, window, shift)  # [B, T, window]
    frames = frames - frames.mean(dim=2, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=2)  # Kaldi repeats the first sample of each frame
    frames = (frames - PRE_EMPHASIS * previous) * hann
    spectrum = torch.fft.rfft(frames, n=fft_length)
    power = spectrum.real.square() + spectrum.imag.square()  # [B, T, fft_length / 2 + 1]
    return (power @ filters.T).clamp_min(LOG_FLOOR).log()


def _fit_frames(
    features: torch.Tensor, samples: int, lengths: torch.Tensor | None, num_frames: int | None, sample_rate: int
) -> torch.Tensor:
    frames = features.shape[1]
    if lengths is not None:
        whole = count_frames(lengths.to(features.device).clamp_max(samples), sample_rate)  # [B]
        row = torch.arange(frames, device=features.device)
        features = features.masked_fill((row[None, :] >= whole[:, None])[..., None], 0.0)
    if num_frames is not None and num_frames != frames:
        features = torch.nn.functional.pad(features, (0, 0, 0, num_frames - frames))  # negative padding cuts
    return features
