import numpy as np
import pytest
import torch

from ssast.kernels import fbank
from ssast.kernels.fbank import count_frames, mel_filters

WAVES = """
chirp_16k_10s chirp_8k_1s dc_only_16k_1s dc_plus_sine_16k_1s impulse_16k_1s len_400_16k len_559_16k noise_16k_1s noise_44k1_1s
pink_16k_10p24s silence_16k_1s sine_m90dbfs_16k_1s speech_16k square_fullscale_16k_1s stereo_16k_1s
"""


def noise(clips: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", WAVES.split())
def test_golden_waves(reference, name):
    """Within what two existing programs keep to: 1.2e-3 + 2e-6 exp(D / 2), D nats below the frame's largest value. Ours must keep to a
    fifth of it, float32 FFT rounding in deep valleys being all that is left."""
    golden = np.load(reference / "fbank" / f"{name}.npz")
    wave = torch.from_numpy(np.atleast_2d(golden["wave"]))[:1]
    ours = fbank(wave, sample_rate=int(golden["sample_rate"]))[0].double().numpy()[golden["ref64_frames"]]
    exact = golden["ref64"]
    tolerance = 1.2e-3 + 2e-6 * np.exp((exact.max(axis=1, keepdims=True) - exact) / 2)
    assert (np.abs(ours - exact) / tolerance).max() < 0.2


@pytest.mark.parametrize("name", ["speech_16k", "pink_16k_10p24s", "noise_16k_1s"])
def test_golden_padding_and_normalisation(reference, name):
    golden = np.load(reference / "fbank" / f"{name}.npz")
    wave = torch.from_numpy(np.atleast_2d(golden["wave"]))
    ours = fbank(wave, num_frames=1024, mean=-4.2677393, std=4.5689974)[0].numpy()[golden["norm1024_rows"]]
    np.testing.assert_allclose(ours, golden["norm1024"], atol=2e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_golden_mel_filters(reference, rate):
    golden = np.load(reference / "fbank" / f"melbank_{rate}.npz")
    ours = mel_filters(128, {8000: 256, 16000: 512, 44100: 2048}[rate], rate).numpy()
    dense = np.zeros_like(ours)
    dense[golden["row"], golden["col"]] = golden["weight64"]
    np.testing.assert_allclose(ours, dense, atol=1e-9)


def test_float64_is_exact_arithmetic():
    """The same program in float64 is the oracle of the float32 one."""
    wave = noise(2, 16000)
    assert (fbank(wave).double() - fbank(wave.double(), dtype=torch.float64)).abs().max() < 2e-3


def test_int16_equals_scaled_float():
    ints = (noise(2, 8000) * 32767).round().to(torch.int16)
    torch.testing.assert_close(fbank(ints), fbank(ints.float() / 32768), rtol=0, atol=0)


@pytest.mark.parametrize(("length", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)])
def test_lengths_zero_the_padding_before_normalisation(length, frames):
    """Below one window, exactly one, one sample short of two, two, and all: what follows the last whole frame is -mean / (2 std)."""
    wave = noise(2, 16000)
    got = fbank(wave, lengths=torch.tensor([length, 16000]), num_frames=100, mean=-4.0, std=2.0)
    assert got.shape == (2, 100, 128)
    assert count_frames(length, 16000) == frames
    torch.testing.assert_close(got[0, frames:], torch.full((100 - frames, 128), 1.0))
    torch.testing.assert_close(got[0, :frames], fbank(wave[:1], mean=-4.0, std=2.0)[0, :frames], rtol=0, atol=0)
    assert (got[1, 98:] == 1.0).all() and (got[1, :98] != 1.0).any()


def test_padding_beyond_the_length_does_not_leak():
    wave = noise(1, 16000)
    dirty = wave.clone()
    dirty[:, 8000:] = 100.0
    lengths = torch.tensor([8000])
    torch.testing.assert_close(fbank(wave, lengths=lengths), fbank(dirty, lengths=lengths), rtol=0, atol=0)


def test_num_frames_cuts_and_short_clips_are_zero():
    assert fbank(noise(1, 16000), num_frames=10).shape == (1, 10, 128)
    assert (fbank(noise(1, 399), num_frames=4) == 0).all()
    assert fbank(noise(1, 399)).shape == (1, 0, 128)


def test_strided_input():
    wave = noise(4, 8000)
    torch.testing.assert_close(fbank(wave[::2, ::2]), fbank(wave[::2, ::2].contiguous()), rtol=0, atol=5e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        fbank(torch.zeros(100))
    with pytest.raises(ValueError, match="int16 or float32"):
        fbank(torch.zeros(1, 800, dtype=torch.int32))
    with pytest.raises(ValueError, match="go together"):
        fbank(torch.zeros(1, 800), mean=0.0)
    with pytest.raises(ValueError, match="backend"):
        fbank(torch.zeros(1, 800), backend="cuda")
