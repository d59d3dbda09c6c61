"""Mixing, masks and noise: their distributions, that they depend on seed and position alone, and what they leave
alone.
"""

import math

import pytest
import torch

from ssast.engine.finetune.augment import beta_shares, mixup, noise_and_roll, spec_augment

MANY = 20_000
HIDDEN = -7.0


def clips(batch=6, samples=400, classes=3):
    torch.manual_seed(1)
    lengths = torch.randint(samples // 2, samples + 1, (batch,))
    waveform = torch.randint(-20_000, 20_000, (batch, samples), dtype=torch.int16)
    waveform[torch.arange(samples)[None, :] >= lengths[:, None]] = 0
    return waveform, lengths, torch.eye(classes)[torch.arange(batch) % classes]


def test_shares_are_beta_10_10_and_clips_are_mixed_at_the_rate():
    shares = beta_shares(7, torch.arange(MANY)).double()
    assert shares.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 84 / MANY))
    assert shares.var().item() == pytest.approx(1 / 84, rel=0.04)  # a b / (a + b)**2 / (a + b + 1)
    within = ((shares > 0.4) & (shares < 0.6)).double().mean().item()
    assert within == pytest.approx(0.6284, abs=0.015)  # scipy.stats.beta(10, 10): cdf(0.6) - cdf(0.4)
    waveform, lengths = torch.ones(MANY, 4), torch.full((MANY,), 4)
    _, _, targets = mixup(waveform, lengths, torch.eye(2).repeat(MANY // 2, 1), 0.3, 7, 0)
    mixed = (targets.max(dim=1).values < 1).double().mean().item()  # half of the partners are of the same class
    assert mixed == pytest.approx(0.15, abs=0.011)


def test_a_mix_is_what_the_official_loader_makes_of_two_clips():
    waveform, lengths, _ = clips()
    targets = torch.eye(len(waveform))  # tells who was mixed with whom
    mixed, mixed_lengths, mixed_targets = mixup(waveform, lengths, targets, 1.0, 3, 100)
    assert mixed.dtype == torch.float32
    partners = set()
    for row in range(len(waveform)):
        share = mixed_targets[row, row].double()
        partner = int(torch.cat([mixed_targets[row, :row], torch.zeros(1), mixed_targets[row, row + 1 :]]).argmax())
        partners.add((partner - row) % len(waveform))
        assert partner != row and mixed_targets[row].sum() == pytest.approx(1) and 0.1 < share < 0.9
        length = int(max(lengths[row], lengths[partner]))
        assert mixed_lengths[row] == length and not mixed[row, length:].any()
        expected = torch.zeros(waveform.shape[1], dtype=torch.float64)
        for weight, clip in ((share, row), (1 - share, partner)):
            sound = waveform[clip, : lengths[clip]].double() / 32768
            expected[: lengths[clip]] += weight * (sound - sound.mean())
        expected[:length] -= expected[:length].mean()
        torch.testing.assert_close(mixed[row].double(), expected, rtol=0, atol=1e-6)
    assert len(partners) > 1


def test_what_is_not_mixed_is_left_alone_bit_for_bit():
    waveform, lengths, targets = clips()
    for batch, rate in ((6, 0.0), (1, 1.0)):
        same = mixup(waveform[:batch], lengths[:batch], targets[:batch], rate, 3, 0)
        for got, expected in zip(same, (waveform.float() / 32768, lengths, targets), strict=True):
            assert torch.equal(got, expected[:batch])
    mixed, mixed_lengths, mixed_targets = mixup(waveform, lengths, targets, 0.5, 3, 0)
    untouched = (mixed == waveform.float() / 32768).all(dim=1)
    assert 0 < untouched.sum() < 6
    assert torch.equal(mixed_targets[untouched], targets[untouched]) and torch.equal(
        mixed_lengths[untouched], lengths[untouched]
    )
    with pytest.raises(ValueError, match="rate"):
        mixup(waveform, lengths, targets, 1.5, 3, 0)


def test_masks_are_drawn_as_torchaudio_draws_them():
    """Widths are floor(u * parameter), starts floor(v * (size - u * parameter)); one span each."""
    features = torch.ones(MANY, 30, 20)
    masked = spec_augment(features, 8, 12, 5, 0, value=HIDDEN) == HIDDEN
    for rows, limit, size in ((masked.all(dim=1), 8, 20), (masked.all(dim=2), 12, 30)):  # [N, F] and [N, T]
        width = rows.sum(dim=1)
        assert ((rows[:, 1:] != rows[:, :-1]).sum(dim=1) <= 2).all()
        shares = torch.bincount(width, minlength=limit).double() / MANY
        assert len(shares) == limit  # never the parameter itself
        assert shares.sub(1 / limit).abs().max() < 4 * math.sqrt(1 / limit / MANY)
        start = torch.where(width > 0, rows.double().argmax(dim=1), -1)
        for wide in (1, limit - 1):
            starts = start[width == wide]
            assert starts.double().mean().item() == pytest.approx((size - wide - 0.5) / 2 - 0.5, abs=0.4)
            assert starts.min() == 0 and starts.max() >= size - wide - 1
    assert torch.equal(masked, masked.all(dim=1)[:, None, :] | masked.all(dim=2)[:, :, None])
    assert torch.equal(spec_augment(features[:9], 0, 1, 5, 0, value=HIDDEN), features[:9])
    with pytest.raises(ValueError, match="do not fit"):
        spec_augment(features[:2], 21, 0, 5, 0, value=HIDDEN)


def test_stretches_stay_within_short_clips():
    lengths = torch.arange(40) % 11
    masked = spec_augment(torch.ones(40, 30, 5), 0, 12, 5, 0, lengths, value=HIDDEN)[:, :, 0] == HIDDEN
    assert not (masked & (torch.arange(30)[None, :] >= lengths[:, None])).any()
    assert (masked.sum(dim=1) <= lengths).all() and masked.any()


def test_noise_and_roll_are_those_of_the_official_loader():
    features = torch.zeros(3000, 25, 4)
    noise = noise_and_roll(features, seed=2, offset=0, roll=0)
    assert noise.min() >= 0 and noise.max() < 0.1
    top = noise.flatten(1).max(dim=1).values  # nearly the amplitude of each clip, which is even in [0, 0.1)
    assert top.mean().item() == pytest.approx(0.05 * 100 / 101, abs=0.003)
    assert (noise.flatten(1).mean(dim=1) / top).mean().item() == pytest.approx(0.505, abs=0.005)
    column = (noise / top[:, None, None]).flatten(1)
    assert abs(torch.corrcoef(column.T)[0, 1:]).max() < 0.08  # elements do not follow each other
    steps = torch.arange(25.0)[None, :, None].expand(3000, -1, 4)
    rolled = noise_and_roll(steps, seed=2, offset=0, noise=0)
    shift = (-rolled[:, 0, 0]).remainder(25).long()
    assert torch.equal(rolled[7], torch.roll(steps[7], int(shift[7]), 0))
    signed = torch.where(shift > 12, shift - 25, shift)
    assert signed.min() == -10 and signed.max() == 9
    assert torch.bincount(signed + 10).double().div(3000).sub(1 / 20).abs().max() < 0.017
    assert noise_and_roll(features[:2].bfloat16(), seed=2, offset=0).dtype == torch.bfloat16
    assert torch.equal(noise_and_roll(steps, seed=2, offset=0, noise=0, roll=0), steps)


def test_each_clip_is_treated_by_seed_and_position_whatever_the_batch():
    features = torch.randn(8, 33, 17)
    waveform, lengths, targets = clips(8)

    def masks(rows, offset, seed=9):
        return spec_augment(features[rows], 9, 12, seed, offset, value=HIDDEN)

    def noises(rows, offset, seed=9):
        return noise_and_roll(features[rows], seed=seed, offset=offset)

    for treat in (masks, noises):
        for offset in (0, 2**40):  # beyond 32 bits
            whole = treat(slice(0, 8), offset)
            assert torch.equal(whole, torch.cat([treat(slice(0, 3), offset), treat(slice(3, 8), offset + 3)]))
            assert not torch.equal(whole, treat(slice(0, 8), offset, seed=10))
        assert not torch.equal(treat(slice(0, 8), 0), treat(slice(0, 8), 8))
    # Whether and by what share a clip is mixed does not depend on the batch; with whom, does.
    targets = torch.arange(8.0)[:, None] * 0 + torch.eye(8)
    whole = mixup(waveform, lengths, targets, 0.5, 9, 64)[2].diagonal()
    parts = [mixup(waveform[r], lengths[r], targets[r], 0.5, 9, 64 + r.start)[2] for r in (slice(0, 3), slice(3, 8))]
    assert torch.equal(whole, torch.cat([parts[0].diagonal(), parts[1].diagonal(3)]))


def test_nothing_waits_for_the_device():
    """On the meta device there are no values: whatever asks for one fails."""
    waveform = torch.empty(4, 100, dtype=torch.int16, device="meta")
    lengths, targets = torch.empty(4, dtype=torch.int64, device="meta"), torch.empty(4, 3, device="meta")
    features = torch.empty(4, 20, 10, device="meta")
    assert [t.shape for t in mixup(waveform, lengths, targets, 0.5, 1, 0)] == [(4, 100), (4,), (4, 3)]
    assert spec_augment(features, 4, 4, 1, 0, lengths, value=0.0).shape == features.shape
    assert noise_and_roll(features, seed=1, offset=0).shape == features.shape
