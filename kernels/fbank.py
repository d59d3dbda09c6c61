"""Kaldi-compatible log-mel filter banks of a whole batch.

What is computed, and where each step comes from: Kaldi's `compute-fbank-feats` as torchaudio's `compliance.kaldi.fbank`
exposes it, with the options of SSAST: 25 ms Hann window, 10 ms shift, per-frame DC removal, pre-emphasis 0.97, no
dither, no energy, the waveform left in [-1, 1], natural logarithm floored at float32 epsilon, `snip_edges` (only whole
frames), mel range 20 Hz to the Nyquist frequency. The loader's mean subtraction is not repeated: per-frame DC removal
makes it immaterial.
"""

import functools
import math
from typing import overload

import torch
import triton
import triton.language as tl

from .backend import capability, last_dim_contiguous, resolve_backend
from .embed import patchify

FRAME_SECONDS, SHIFT_SECONDS = 0.025, 0.010
PRE_EMPHASIS = 0.97
LOW_HZ = 20.0
LOWEST_RATE = 1000  # below, a window is no more than a few samples
LOG_FLOOR = torch.finfo(torch.float32).eps  # ln = -15.9424
# clips with larger samples are computed at another level: 2^127 becomes 2^47, of which 512 squares add up to 2^103
_LOUD, _LOUD_BITS = 2.0**40, 80
_PIECE = 512  # frames at a time on a CPU: 4 MB of intermediates at 16 kHz; 256 and 1,024 measured the same


def frame_geometry(sample_rate: int) -> tuple[int, int, int]:
    """Window, shift and FFT length in samples."""
    window, shift = int(sample_rate * FRAME_SECONDS), int(sample_rate * SHIFT_SECONDS)
    return window, shift, 1 << (window - 1).bit_length()


@overload
def count_frames(samples: int, sample_rate: int) -> int: ...
@overload
def count_frames(samples: torch.Tensor, sample_rate: int) -> torch.Tensor: ...
def count_frames(samples: int | torch.Tensor, sample_rate: int) -> int | torch.Tensor:
    """Whole frames in so many samples."""
    window, shift, _ = frame_geometry(sample_rate)
    if isinstance(samples, torch.Tensor):
        return torch.where(samples >= window, 1 + (samples - window).clamp_min(0) // shift, 0)
    return 1 + (samples - window) // shift if samples >= window else 0


def samples_of(frames: int, sample_rate: int) -> int:
    """Samples that so many frames take: the fewest of which `count_frames` is that."""
    window, shift, _ = frame_geometry(sample_rate)
    return window + (frames - 1) * shift


def mel_filters(num_mel_bins: int, fft_length: int, sample_rate: int) -> torch.Tensor:
    """[F, fft_length / 2 + 1] float64 triangles of Kaldi's mel scale, 1127 ln(1 + f / 700), in mel between neighbouring
    centres.

    The Nyquist bin feeds no filter. Narrow filters may hold no FFT bin at all (filter 3 of 128 at 16 kHz): their output
    is the floor.
    """
    edges_mel = torch.linspace(_mel(LOW_HZ), _mel(sample_rate / 2), num_mel_bins + 2, dtype=torch.float64)
    bin_mel = torch.tensor([_mel(k * sample_rate / fft_length) for k in range(fft_length // 2)], dtype=torch.float64)
    left, centre, right = edges_mel[:-2, None], edges_mel[1:-1, None], edges_mel[2:, None]
    triangles = torch.minimum((bin_mel - left) / (centre - left), (right - bin_mel) / (right - centre)).clamp_min(0)
    return torch.nn.functional.pad(triangles, (0, 1))


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)


def _reference(
    waveform: torch.Tensor,
    lengths: torch.Tensor | None,
    sample_rate: int,
    num_mel_bins: int,
    num_frames: int,
    mean: float | None,
    std: float | None,
    dtype: torch.dtype,
    patch: tuple[int, int] | None,
) -> torch.Tensor:
    if waveform.dtype == torch.int16:
        waveform = waveform.float() / 32768.0
    features = _log_mel(waveform, sample_rate, num_mel_bins)
    features = _fit_frames(features, waveform.shape[1], lengths, num_frames, sample_rate)
    if mean is not None and std is not None:
        features = (features - mean) / (2 * std)
    features = features.to(dtype)
    return features if patch is None else patchify(features, patch, patch)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # they are kept, and may be needed for a gradient later
def _constants(
    sample_rate: int, num_mel_bins: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    window, _, fft_length = frame_geometry(sample_rate)
    hann = torch.hann_window(window, periodic=False, dtype=torch.float64)
    filters = mel_filters(num_mel_bins, fft_length, sample_rate)
    return hann.to(device, dtype), filters.to(device, dtype)


def _log_mel(waveform: torch.Tensor, sample_rate: int, num_mel_bins: int) -> torch.Tensor:
    if waveform.shape[1] < frame_geometry(sample_rate)[0]:
        return waveform.new_zeros(waveform.shape[0], 0, num_mel_bins)
    # Exported programs do without the second level: sound in files is no louder than 1.
    if waveform.dtype != torch.float32 or torch.compiler.is_exporting():
        return _log_power(waveform, sample_rate, num_mel_bins, LOG_FLOOR)
    is_loud = _is_loud(waveform)
    if waveform.device.type == "cpu" and not torch.compiler.is_compiling() and not is_loud.any():
        return _log_power(waveform, sample_rate, num_mel_bins, LOG_FLOOR)
    # A clip that is not loud is multiplied by one and raised by zero: to the bit what it was.
    quiet = waveform * torch.where(is_loud, 2.0**-_LOUD_BITS, 1.0)[:, None]
    log_power = _log_power(quiet, sample_rate, num_mel_bins, torch.where(is_loud, 0.0, LOG_FLOOR))
    level = torch.where(is_loud, 2 * _LOUD_BITS * math.log(2.0), 0.0)
    return (log_power + level[:, None, None]).clamp_min(math.log(LOG_FLOOR))


def _is_loud(waveform: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [B] whether the power of a clip may overflow float32, as it does of samples from 1e17 on."""
    peak = waveform.detach().abs().amax(dim=1)
    return (peak > _LOUD) & (peak < math.inf)  # false for NaN


def _log_power(
    waveform: torch.Tensor, sample_rate: int, num_mel_bins: int, floor: float | torch.Tensor
) -> torch.Tensor:
    """[B, S] -> [B, T, F] logarithm of the mel filters' power, at least that of `floor`, a number or one a clip [B]."""
    window, shift, fft_length = frame_geometry(sample_rate)
    hann, filters = _constants(sample_rate, num_mel_bins, waveform.dtype, waveform.device)
    frames = waveform.unfold(1, window, shift)  # [B, T, window]
    needs_graph = (waveform.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling()
    if waveform.device.type == "cpu" and not needs_graph:
        return _log_power_in_pieces(frames, hann, filters, fft_length, floor)
    frames = frames - frames.mean(dim=2, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=2)  # Kaldi repeats the first sample of each frame
    frames = (frames - PRE_EMPHASIS * previous) * hann
    spectrum = torch.fft.rfft(frames, n=fft_length)
    power = spectrum.real.square() + spectrum.imag.square()  # [B, T, fft_length / 2 + 1]
    least = floor[:, None, None] if isinstance(floor, torch.Tensor) else floor
    return (power @ filters.T).clamp_min(least).log()


def _log_power_in_pieces(
    frames: torch.Tensor,  # [B, T, window]
    hann: torch.Tensor,  # [window]
    filters: torch.Tensor,  # [F, fft_length / 2 + 1]
    fft_length: int,
    floor: float | torch.Tensor,  # [B], or one for all
) -> torch.Tensor:  # [B, T, F]
    """The same in place, a piece of a clip at a time: what the steps hand on stays in the cache, and is never as large
    as the batch. 0.2 to 0.4 of the time on a CPU.
    """
    batch, num_frames, window = frames.shape
    piece = min(_PIECE, num_frames)
    features = frames.new_empty(batch, num_frames, filters.shape[0])
    centred = frames.new_empty(piece, window)
    padded = frames.new_zeros(piece, fft_length)
    power = frames.new_empty(piece, fft_length // 2 + 1)
    for clip in range(batch):
        least = floor[clip] if isinstance(floor, torch.Tensor) else floor
        for first in range(0, num_frames, piece):
            x = frames[clip, first : first + piece]
            x = torch.sub(x, x.mean(dim=1, keepdim=True), out=centred[: len(x)])
            y, p, out = padded[: len(x)], power[: len(x)], features[clip, first : first + piece]
            torch.sub(x[:, 1:], x[:, :-1], alpha=PRE_EMPHASIS, out=y[:, 1:window])
            torch.mul(x[:, 0], 1 - PRE_EMPHASIS, out=y[:, 0])  # Kaldi repeats the first sample of each frame
            y[:, :window].mul_(hann)
            spectrum = torch.fft.rfft(y)
            torch.square(spectrum.real, out=p).addcmul_(spectrum.imag, spectrum.imag)
            torch.mm(p, filters.T, out=out).clamp_min_(least).log_()
    return features


def _fit_frames(
    features: torch.Tensor, samples: int, lengths: torch.Tensor | None, num_frames: int, sample_rate: int
) -> torch.Tensor:
    frames = features.shape[1]
    if lengths is not None:
        whole = count_frames(lengths.to(features.device).clamp_max(samples), sample_rate)  # [B]
        row = torch.arange(frames, device=features.device)
        features = features.masked_fill((row[None, :] >= whole[:, None])[..., None], 0.0)
    return torch.nn.functional.pad(features, (0, 0, 0, num_frames - frames))  # negative padding cuts


# --- the kernel -------------------------------------------------------------------------------------------------------
#
# The power spectrum does not change when a frame is shifted in time, so the phase is counted from the middle of the
# frame: the cosines then see only the even half y[c + m] + y[c - 1 - m] of the windowed frame, the sines only the odd
# half. About m = N / 4 the cosine of bin k is even for even k and odd for odd k, the sine the other way round: a second
# fold. What is left are four products of [frames, N / 4] by [N / 4, N / 4] (even and odd bins, cosines and sines), a
# quarter of the direct transform.
#
# The products run on matrix units in float16 without losing float32's accuracy: frame = high + low and cosine = high +
# low, each pair exact to 22 bits or more, and three of the four products are summed in float32 (low x low is below the
# last bit). Each frame is scaled so that it fills float16's range, whatever its level.

_BIN_TILE = 128  # even (and as many odd) bins at a time: all of a 512-point transform
# of the folded frame, the dimension that is summed over; 32 spills registers where S is no multiple of 16
_SUM_TILE = 16
_WARPS, _STAGES = 8, 2
_MAX_MEL_BINS = 256  # the filters of 512 take 296 KB of shared memory, more than any GPU has for a block


def _frame_tile(waveform: torch.Tensor, fft_length: int) -> int:
    """Frames a program. 64 fill the registers with four accumulators of [128, 64], beside 16-bit samples and one block
    of bins; float32 samples and longer transforms leave room for 32. On Blackwell accumulators live in tensor memory,
    where each product of a chain gets one of its own, and 32 fill its 512 columns.
    """
    has_room = waveform.dtype == torch.int16 and fft_length <= 4 * _BIN_TILE and capability(waveform.device) < (10, 0)
    return 64 if has_room else 32


@triton.jit
def _fbank_kernel(
    wave_ptr,  # [B, S] int16 or float32
    lengths_ptr,  # [B] int64, or None
    hann_ptr,  # [WINDOW] float32
    basis_ptr,  # [2 even and odd bins, 2 cosine and sine, 2 high and low, Q bins, Q] float16
    filters_ptr,  # [2 even and odd bins, F_2, Q] float32
    out_ptr,  # [B, T, F], or [B, P, K]
    S,
    wave_stride_b,
    T,
    mean,
    inverse_spread,  # 1 / (2 std)
    unit,  # value of a sample of 1
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    Q: tl.constexpr,  # a quarter of the FFT length, at least 16
    QUARTER: tl.constexpr,  # a quarter of the FFT length
    F: tl.constexpr,
    F_2: tl.constexpr,  # the next power of two
    PATCH_F: tl.constexpr,  # 0: no patch order
    PATCH_T: tl.constexpr,
    PRE: tl.constexpr,
    FLOOR: tl.constexpr,
    MEL_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
):
    """One program for BLOCK_T frames of one clip, all mel bins. Frames are columns: the basis is then the left factor
    of the products, whose rows are never fewer than the matrix instruction takes.
    """
    MIDDLE: tl.constexpr = (WINDOW + 1) // 2
    clip = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + clip), S).to(tl.int32)
    whole_frames = tl.where(length >= WINDOW, 1 + (length - WINDOW) // SHIFT, 0)
    is_frame = (t < whole_frames) & (t < T)

    clip_ptr = wave_ptr + clip * wave_stride_b
    start = t * SHIFT  # [BLOCK_T]; 32-bit offsets from one pointer take half the registers of pointers
    mel = tl.zeros((F_2, BLOCK_T), tl.float32)
    power_unit = tl.zeros((BLOCK_T,), tl.float32)  # value of 1 in the scaled frames
    if tl.program_id(0) * BLOCK_T < whole_frames:
        dc, gain, inverse = _level(clip_ptr, start, is_frame, WINDOW)
        power_unit = unit * inverse
        for j0 in tl.static_range(0, Q, BLOCK_BINS):
            re_even = tl.zeros((BLOCK_BINS, BLOCK_T), tl.float32)
            im_even = tl.zeros((BLOCK_BINS, BLOCK_T), tl.float32)
            re_odd = tl.zeros((BLOCK_BINS, BLOCK_T), tl.float32)
            im_odd = tl.zeros((BLOCK_BINS, BLOCK_T), tl.float32)
            for m0 in range(0, Q, BLOCK_SAMPLES):
                m = m0 + tl.arange(0, BLOCK_SAMPLES)
                right = _windowed(clip_ptr, start, is_frame, dc, gain, hann_ptr, MIDDLE + m, WINDOW, PRE)
                left = _windowed(clip_ptr, start, is_frame, dc, gain, hann_ptr, MIDDLE - 1 - m, WINDOW, PRE)
                # where the second fold lays m' = N / 2 - 1 - m over m
                right_far = _windowed(
                    clip_ptr, start, is_frame, dc, gain, hann_ptr, MIDDLE + 2 * QUARTER - 1 - m, WINDOW, PRE
                )
                left_far = _windowed(
                    clip_ptr, start, is_frame, dc, gain, hann_ptr, MIDDLE - 2 * QUARTER + m, WINDOW, PRE
                )
                even, even_far = right + left, right_far + left_far
                odd, odd_far = right - left, right_far - left_far
                place = (j0 + tl.arange(0, BLOCK_BINS))[:, None] * Q + m[None, :]  # [BLOCK_BINS, BLOCK_SAMPLES]
                re_even = _dot_split(basis_ptr, place, even + even_far, re_even, Q)
                im_even = _dot_split(basis_ptr + 2 * Q * Q, place, odd - odd_far, im_even, Q)
                re_odd = _dot_split(basis_ptr + 4 * Q * Q, place, even - even_far, re_odd, Q)
                im_odd = _dot_split(basis_ptr + 6 * Q * Q, place, odd + odd_far, im_odd, Q)
            j = j0 + tl.arange(0, BLOCK_BINS)
            filter_ptrs = filters_ptr + tl.arange(0, F_2)[:, None] * Q + j[None, :]  # [F_2, BLOCK_BINS]
            mel = tl.dot(
                tl.load(filter_ptrs), re_even * re_even + im_even * im_even, mel, input_precision=MEL_PRECISION
            )
            mel = tl.dot(
                tl.load(filter_ptrs + Q * F_2), re_odd * re_odd + im_odd * im_odd, mel, input_precision=MEL_PRECISION
            )

    power = mel * power_unit[None, :] * power_unit[None, :]
    log_mel = tl.log(tl.maximum(power, FLOOR, propagate_nan=tl.PropagateNan.ALL))
    # of samples from 1e17 on the power overflows, its logarithm does not
    overflows = power == float("inf")
    log_mel = tl.where(overflows, tl.log(tl.where(overflows, mel, 1.0)) + 2.0 * tl.log(power_unit)[None, :], log_mel)
    log_mel = tl.where(is_frame[None, :], log_mel, 0.0)  # before normalising, as the official loader does
    log_mel = (log_mel - mean) * inverse_spread

    f = tl.arange(0, F_2)
    if PATCH_F == 0:
        place = t.to(tl.int64)[None, :] * F + f[:, None]
        keep = (t < T)[None, :] & (f < F)[:, None]
        clip_size = T * F
    else:
        columns = T // PATCH_T
        patch = (f // PATCH_F)[:, None] * columns + (t // PATCH_T)[None, :]
        place = patch.to(tl.int64) * (PATCH_F * PATCH_T) + (f % PATCH_F)[:, None] * PATCH_T + (t % PATCH_T)[None, :]
        keep = (t < columns * PATCH_T)[None, :] & (f < F // PATCH_F * PATCH_F)[:, None]
        clip_size = columns * PATCH_T * (F // PATCH_F * PATCH_F)
    tl.store(out_ptr + clip * clip_size + place, log_mel.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _level(clip_ptr, start, is_frame, WINDOW: tl.constexpr):
    """Of each frame [BLOCK_T]: its mean, the power of two that brings its largest sample to between 2048 and 4096, and
    the inverse of that.

    Folded, such samples stay below float16's 65504: four of them, each up to 2 x 1.97 after DC removal and
    pre-emphasis, under window values that sum to at most 2.
    """
    CHUNK: tl.constexpr = 128
    # what differs from it is summed: exact for a large DC
    first = tl.load(clip_ptr + start, mask=is_frame, other=0).to(tl.float32)
    total = tl.zeros((start.shape[0], CHUNK), tl.float32)
    largest = tl.zeros((start.shape[0], CHUNK), tl.float32)
    for n0 in range(0, WINDOW, CHUNK):
        n = n0 + tl.arange(0, CHUNK)
        mask = is_frame[:, None] & (n < WINDOW)[None, :]
        x = tl.load(clip_ptr + (start[:, None] + n[None, :]), mask=mask, other=0).to(tl.float32)
        total += tl.where(mask, x - first[:, None], 0.0)
        largest = tl.maximum(largest, tl.abs(x))
    exponent = tl.max(largest, axis=1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 27), 253)  # from 2**-100: below, all is silence
    gain, inverse = ((127 + 11 + 127 - exponent) << 23), ((exponent - 11) << 23)
    return (
        first + tl.sum(total, axis=1) / WINDOW,
        gain.to(tl.float32, bitcast=True),
        inverse.to(tl.float32, bitcast=True),
    )


@triton.jit
def _windowed(clip_ptr, start, is_frame, dc, gain, hann_ptr, n, WINDOW: tl.constexpr, PRE: tl.constexpr):
    """Samples n [BLOCK_SAMPLES] of the frames without DC, pre-emphasised, scaled and under the window: [BLOCK_T,
    BLOCK_SAMPLES], zero where n is outside. Samples run along the rows, so that threads beside each other read samples
    beside each other.
    """
    inside = (n >= 0) & (n < WINDOW)
    mask = is_frame[:, None] & inside[None, :]
    x = tl.load(clip_ptr + (start[:, None] + n[None, :]), mask=mask, other=0).to(tl.float32)
    n_before = tl.maximum(n - 1, 0)  # Kaldi repeats the first sample of each frame
    before = tl.load(clip_ptr + (start[:, None] + n_before[None, :]), mask=mask, other=0).to(tl.float32)
    hann = tl.load(hann_ptr + n, mask=inside, other=0.0)
    return ((x - dc[:, None]) - PRE * (before - dc[:, None])) * (hann[None, :] * gain[:, None])


@triton.jit
def _dot_split(basis_ptr, place, x, accumulator, Q: tl.constexpr):
    """accumulator + basis @ x^T in three float16 products; `basis_ptr` points to the high part, the low part lies Q * Q
    further.
    """
    x = tl.trans(x)  # [BLOCK_SAMPLES, BLOCK_T]
    x_high = x.to(tl.float16)
    x_low = (x - x_high.to(tl.float32)).to(tl.float16)
    high, low = tl.load(basis_ptr + place), tl.load(basis_ptr + Q * Q + place)
    accumulator = tl.dot(low, x_high, accumulator)
    accumulator = tl.dot(high, x_low, accumulator)
    return tl.dot(high, x_high, accumulator)


@functools.lru_cache(maxsize=16)
def _kernel_constants(
    sample_rate: int, num_mel_bins: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Window, cosines and sines, mel filters as the kernel wants them, computed in float64."""
    window, _, fft_length = frame_geometry(sample_rate)
    quarter = fft_length // 4
    size = max(quarter, 16)  # the least that a matrix product takes; the rest is zero
    m, j = torch.arange(quarter, dtype=torch.float64), torch.arange(quarter, dtype=torch.float64)
    basis = torch.zeros(2, 2, 2, size, size, dtype=torch.float16)
    for parity in (0, 1):
        angle = 2 * math.pi / fft_length * (2 * j + parity)[:, None] * (m + 0.5)[None, :]
        for part, values in enumerate((angle.cos(), angle.sin())):
            high = values.to(torch.float16)
            basis[parity, part, 0, :quarter, :quarter] = high
            basis[parity, part, 1, :quarter, :quarter] = (values - high.double()).to(torch.float16)
    # [F, bins] without the Nyquist bin, which feeds no filter
    by_bin = mel_filters(num_mel_bins, fft_length, sample_rate)[:, :-1]
    filters = torch.zeros(2, _mel_width(num_mel_bins), size)
    for parity in (0, 1):
        filters[parity, :num_mel_bins, :quarter] = by_bin[:, parity::2]
    hann = torch.hann_window(window, periodic=False, dtype=torch.float64).float()
    return hann.to(device), basis.to(device), filters.to(device)


def _mel_width(num_mel_bins: int) -> int:
    return max(triton.next_power_of_2(num_mel_bins), 16)


@torch.library.custom_op("ssast::fbank", mutates_args=())
def _fbank_op(
    waveform: torch.Tensor,
    lengths: torch.Tensor | None,
    sample_rate: int,
    num_mel_bins: int,
    num_frames: int,
    mean: float | None,
    std: float | None,
    dtype: torch.dtype,
    patch: list[int],
) -> torch.Tensor:
    """`patch` empty: no patch order."""
    out = _new_output(waveform, num_mel_bins, num_frames, dtype, patch)
    window, shift, fft_length = frame_geometry(sample_rate)
    size = max(fft_length // 4, 16)
    frame_tile = _frame_tile(waveform, fft_length)
    waveform = last_dim_contiguous(waveform)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(waveform):
        _fbank_kernel[(triton.cdiv(num_frames, frame_tile), waveform.shape[0])](
            waveform,
            None if lengths is None else lengths.to(waveform.device, torch.int64).contiguous(),
            *_kernel_constants(sample_rate, num_mel_bins, waveform.device),
            out,
            waveform.shape[1],
            waveform.stride(0),
            num_frames,
            0.0 if mean is None else mean,
            1.0 if std is None else 1.0 / (2.0 * std),
            1.0 / 32768.0 if waveform.dtype == torch.int16 else 1.0,
            WINDOW=window,
            SHIFT=shift,
            Q=size,
            QUARTER=fft_length // 4,
            F=num_mel_bins,
            F_2=_mel_width(num_mel_bins),
            PATCH_F=patch[0] if patch else 0,
            PATCH_T=patch[1] if patch else 0,
            PRE=PRE_EMPHASIS,
            FLOOR=LOG_FLOOR,
            MEL_PRECISION="tf32"
            if dtype.itemsize == 2
            else "ieee",  # tf32's 11 bits are as many as float16 keeps of the result
            BLOCK_T=frame_tile,
            BLOCK_BINS=min(_BIN_TILE, size),
            BLOCK_SAMPLES=_SUM_TILE,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return out


@_fbank_op.register_fake
def _(waveform, lengths, sample_rate, num_mel_bins, num_frames, mean, std, dtype, patch):
    return _new_output(waveform, num_mel_bins, num_frames, dtype, patch)


def _new_output(
    waveform: torch.Tensor, num_mel_bins: int, num_frames: int, dtype: torch.dtype, patch: list[int]
) -> torch.Tensor:
    batch = waveform.shape[0]
    if not patch:
        return waveform.new_empty(batch, num_frames, num_mel_bins, dtype=dtype)
    patches = (num_mel_bins // patch[0]) * (num_frames // patch[1])
    return waveform.new_empty(batch, patches, patch[0] * patch[1], dtype=dtype)


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
    patch: tuple[int, int] | None = None,
    backend: str | None = None,
) -> torch.Tensor:  # [B, T, F], or [B, P, K]
    """Log-mel filter banks, one row each 10 ms.

    Args:
        waveform: [B, S] float32 in [-1, 1], or int16 (divided by 32768).
        sample_rate: in Hz; window and shift in samples are rounded down, the FFT length up to a power of two.
        num_mel_bins: F.
        lengths: [B] samples of each clip that are sound; frames that reach past the end are zero rows. None: all S
            samples.
        num_frames: T; rows past what S gives are zero, surplus rows are cut. None: what S gives.
        mean, std: normalise to (x - mean) / (2 std). The zero rows are put in before, as the official loader does, so
            after it they hold -mean / (2 std).
        dtype: of the result. All arithmetic is as accurate as float32 (float64 for a float64 waveform).
        patch: (mel bins, frames) of a patch: the result comes in patch order, as `ssast.kernels.patchify` would give
            it.
        backend: None, "torch" or "triton". The kernel has no gradient; None picks PyTorch for a waveform that requires
            one.

    Returns:
        [B, T, F], or [B, P, K] with `patch`, on the waveform's device. A clip shorter than one window has only zero
        rows.

    Raises:
        ValueError: a waveform of another shape or type, one of `mean` and `std` without the other, a negative
            `num_frames`, a patch that no frame can fill, backend="triton" for a waveform that requires a gradient, or
            more than 256 mel bins for the kernel.
    """
    if waveform.ndim != 2:
        raise ValueError(f"waveform must be [B, S], not of shape {tuple(waveform.shape)}")
    if waveform.dtype not in (torch.int16, torch.float32, torch.float64):
        raise ValueError(f"waveform must be int16 or float32, not {waveform.dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither")
    if lengths is not None and lengths.shape != waveform.shape[:1]:
        raise ValueError(f"lengths is {tuple(lengths.shape)} for {waveform.shape[0]} clips")
    if sample_rate < LOWEST_RATE:
        raise ValueError(f"sample_rate must be at least {LOWEST_RATE} Hz, not {sample_rate}")
    if num_mel_bins < 1:
        raise ValueError(f"num_mel_bins must be positive, not {num_mel_bins}")
    if std is not None and std <= 0:
        raise ValueError(f"std must be positive, not {std}")
    if num_frames is None:
        num_frames = count_frames(waveform.shape[1], sample_rate)
    if num_frames < 0:
        raise ValueError(f"num_frames must not be negative: {num_frames}")
    if patch is not None and not (1 <= patch[0] <= num_mel_bins and 1 <= patch[1] <= num_frames):
        raise ValueError(f"patch must be (mel bins, frames) from (1, 1) to ({num_mel_bins}, {num_frames}), not {patch}")
    needs_gradient = waveform.requires_grad and torch.is_grad_enabled()
    if backend == "triton" and needs_gradient:
        raise ValueError("backend='triton' has no gradient for the waveform; use backend='torch'")

    if needs_gradient or resolve_backend(backend, waveform) == "torch":
        return _reference(waveform, lengths, sample_rate, num_mel_bins, num_frames, mean, std, dtype, patch)
    if num_mel_bins > _MAX_MEL_BINS:
        raise ValueError(
            f"the kernel computes up to {_MAX_MEL_BINS} mel bins, not {num_mel_bins}; for more use backend='torch'"
        )
    return _fbank_op(waveform, lengths, sample_rate, num_mel_bins, num_frames, mean, std, dtype, list(patch or ()))
