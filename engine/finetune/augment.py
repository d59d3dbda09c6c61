"""What training does to its clips: mixing, masking, noise. All on the device, a batch at a time, without a wait of the
host.

Random numbers come from counters (kernels/random.py): those of row b depend on (seed, offset + b) alone, where `offset`
is the position in training of the first row. So a clip at a position is treated alike whatever the batch size, the rank
or the device. The one thing that does depend on the batch is with which clip another is mixed, for it must be in the
same micro-batch.
"""

from __future__ import annotations

import torch

from ssast.engine.random_streams import Stream
from ssast.kernels.random import below, philox

FULL_SCALE = 32768.0  # of int16
BETA = 10  # both parameters of the Beta distribution that fractions of mixtures are drawn from


def mixup(
    waveform: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, rate: float, seed: int, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix each clip, with probability `rate`, with another one of the batch: x = fraction * a + (1 - fraction) * b, and
    targets likewise.

    As in the official loader, the fraction is drawn from Beta(10, 10), the mean of a clip is taken off it before, and
    that of the mix after. Two things differ from it. The other clip is drawn from the micro-batch, evenly among all but
    the clip itself, not from the data set; in a batch of one nothing is mixed. And a mix is as long as the longer of
    the two, where the official code cuts or pads the other clip to the first one's length.

    Args:
        waveform: [B, S] int16, or float in [-1, 1]; zero past `lengths` [B], in samples.
        targets: [B, C] float, at least 0.

    Returns:
        (waveform float32 [B, S] in [-1, 1], lengths [B], targets [B, C]). Rows that are not mixed come as they are, bit
        for bit.

    Raises:
        ValueError: a rate outside 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate of mixing must be between 0 and 1, not {rate}")
    scaled = waveform.float() / FULL_SCALE if waveform.dtype == torch.int16 else waveform.float()
    batch, samples = scaled.shape
    if rate == 0 or batch < 2:
        return scaled, lengths, targets
    clip = _clips(batch, offset, scaled.device)
    chance, other, _, _ = _words(seed, clip, 1, Stream.MIXUP_PARTNER)  # each [B, 1]
    is_mixed = chance < round(rate * 2**32)  # [B, 1]
    partner = (torch.arange(batch, device=clip.device) + 1 + below(other[:, 0], batch - 1)) % batch
    fraction = beta_shares(seed, clip)[:, None]  # [B, 1]

    place = torch.arange(samples, device=clip.device)[None, :]
    centred = _centred(scaled, place < lengths[:, None], lengths)
    longer = torch.maximum(lengths, lengths[partner])
    mixed = fraction * centred + (1 - fraction) * centred[partner]
    mixed = _centred(mixed, place < longer[:, None], longer)
    mixed_targets = fraction.to(targets.dtype) * targets + (1 - fraction).to(targets.dtype) * targets[partner]
    return (
        torch.where(is_mixed, mixed, scaled),
        torch.where(is_mixed[:, 0], longer, lengths),
        torch.where(is_mixed, mixed_targets, targets),
    )


def beta_shares(seed: int, clip: torch.Tensor) -> torch.Tensor:
    """float32 [B] from Beta(10, 10), which is the distribution of the 10th smallest of 19 even numbers between 0 and
    1.
    """
    words = torch.stack(_words(seed, clip, 5, Stream.MIXUP_FRACTION), dim=2).flatten(1)[:, : 2 * BETA - 1]  # [B, 19]
    return ((words.sort(dim=1).values[:, BETA - 1].double() + 0.5) / 2**32).float()


def _centred(waveform: torch.Tensor, is_sound: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The waveform [B, S] less the mean of each row's sound; zero elsewhere."""
    mean = torch.where(is_sound, waveform, 0).sum(dim=1, keepdim=True) / lengths.clamp(min=1)[:, None]
    return torch.where(is_sound, waveform - mean, 0)


def spec_augment(
    features: torch.Tensor,
    freq_mask: int,
    time_mask: int,
    seed: int,
    offset: int,
    lengths: torch.Tensor | None = None,
    *,
    value: float,
) -> torch.Tensor:
    """Overwrite one band of mel bins and one stretch of frames in each clip with `value`; as torchaudio's masks are
    drawn.

    A width is u * parameter with u even in [0, 1), and the start even in [0, size - width); both are rounded down. So 0
    or 1 masks nothing. The official loader masks with 0 before it normalises: on normalised features the same is
    `value` = -mean / (2 std).

    Args:
        features: [B, T, F].
        freq_mask, time_mask: the parameters, at most F and T.
        lengths: [B] frames in which the stretch is placed, and which it does not exceed; all T by default, as in the
            official loader.

    Raises:
        ValueError: a mask may be larger than the features.
    """
    batch, frames, bins = features.shape
    if not (0 <= freq_mask <= bins and 0 <= time_mask <= frames):
        raise ValueError(
            f"masks of up to {freq_mask} bins and {time_mask} frames do not fit features of {bins} bins, {frames} "
            "frames"
        )
    words = _words(seed, _clips(batch, offset, features.device), 1, Stream.SPEC_AUGMENT_BANDS)  # four [B, 1]
    sizes = torch.full_like(words[0], frames) if lengths is None else lengths[:, None].to(torch.int64)
    bands = _span(words[0], words[1], torch.full_like(sizes, freq_mask), torch.full_like(sizes, bins), bins)  # [B, F]
    stretches = _span(words[2], words[3], sizes.clamp(max=time_mask), sizes, frames)  # [B, T]
    return features.masked_fill(bands[:, None, :] | stretches[:, :, None], value)


def _span(
    width: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, size: torch.Tensor, count: int
) -> torch.Tensor:
    """Bool [B, count]: a span of up to `limit` in the first `size` [B, 1]. In integers, so that all devices agree on
    the last bit.
    """
    wide = (width >> 8) * limit  # in 2**-24
    first = ((start >> 8) * ((size << 24) - wide)) >> 48
    place = torch.arange(count, device=width.device)[None, :]
    return (place >= first) & (place < first + (wide >> 24))


def noise_and_roll(
    features: torch.Tensor, *, seed: int, offset: int, noise: float = 0.1, roll: int = 10
) -> torch.Tensor:
    """Add noise to each clip and shift it in time, round the end, as the official loader does with normalised features.

    The noise is even in [0, a), where a is drawn for each clip, even in [0, noise); the shift is even in [-roll, roll)
    frames.

    Args:
        features: [B, T, F].
    """
    batch, frames, bins = features.shape
    clip = _clips(batch, offset, features.device)
    amplitude, shift, _, _ = _words(seed, clip, 1, Stream.ROLL)  # each [B, 1]
    added = features
    if noise:
        # [B, at least T * F / 2]
        words = torch.stack(_words(seed, clip, -(-frames * bins // 8), Stream.NOISE_VALUES), dim=2).flatten(1)
        # 16 bits are plenty for noise
        halves = torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten(1)[:, : frames * bins]
        even = (halves.float() / 2**16).view(batch, frames, bins)
        added = (features.float() + even * (amplitude.float() * (noise / 2**32))[:, :, None]).to(features.dtype)
    if not roll:
        return added
    source = (torch.arange(frames, device=clip.device)[None, :] - (below(shift, 2 * roll) - roll)) % frames  # [B, T]
    return added.gather(1, source[:, :, None].expand(-1, -1, bins))


def _clips(batch: int, offset: int, device: torch.device) -> torch.Tensor:
    return torch.arange(batch, device=device, dtype=torch.int64) + offset  # [B]


def _words(seed: int, clip: torch.Tensor, count: int, stream: int) -> tuple[torch.Tensor, ...]:
    """Four [B, count] tensors of 32-bit words; counters are (index, low and high half of the clip number, stream)."""
    index = torch.arange(count, device=clip.device, dtype=torch.int64)[None, :]
    return philox(seed, index, (clip & 0xFFFFFFFF)[:, None], (clip >> 32)[:, None], torch.full_like(index, stream))
