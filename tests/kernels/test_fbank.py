import numpy as np
import pytest
import torch
from law import assert_lawful

from ssast.kernels import fbank, patchify
from ssast.kernels.fbank import count_frames, mel_filters, samples_of

both = pytest.mark.parametrize("backend", ["torch", "triton"])

WAVES = """
chirp_16k_10s chirp_8k_1s dc_only_16k_1s dc_plus_sine_16k_1s impulse_16k_1s len_400_16k len_559_16k noise_16k_1s
noise_44k1_1s pink_16k_10p24s silence_16k_1s sine_m90dbfs_16k_1s speech_16k square_fullscale_16k_1s stereo_16k_1s
"""


def assert_accurate(ours: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, spread: float = 1.0) -> None:
    """The law of law.py for the mean and for all but a thousandth of the elements, twenty at least. The largest errors
    are no measure in float32: they come from the few bins that lie deepest in a null of the spectrum, where what an FFT
    or a product rounds to is chance, and differs from processor to processor. They are held to the tolerance that two
    existing programs keep.
    """
    most = 1 - max(0.001, 20 / ours.numel())
    ulp = 2.0 ** torch.log2(exact.abs().max()).floor() * torch.finfo(ours.dtype).eps
    errors, allowed = (ours - exact).abs().flatten(), (same_dtype - exact).abs().flatten()
    assert errors.mean() <= 2 * allowed.mean() + 2 * ulp
    assert errors.quantile(most) <= 2 * allowed.quantile(most) + 2 * ulp
    depth = (exact.amax(dim=2, keepdim=True) - exact) * spread
    assert ((ours - exact).abs() * spread <= 1.2e-3 + 2e-6 * (depth / 2).exp()).all()


def noise(clips: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.rounding
@both
@pytest.mark.parametrize("name", WAVES.split())
def test_golden_waves(golden_values, name, backend, device):
    """Within what two existing programs keep to: 1.2e-3 + 2e-6 exp(D / 2), D nats below the frame's largest value. Ours
    must keep to a fifth of it, float32 FFT rounding in deep valleys being all that is left.
    """
    golden = np.load(golden_values / "fbank" / f"{name}.npz")
    wave = torch.from_numpy(np.atleast_2d(golden["wave"]))[:1].to(device)
    ours = (
        fbank(wave, sample_rate=int(golden["sample_rate"]), backend=backend)[0]
        .double()
        .cpu()
        .numpy()[golden["ref64_frames"]]
    )
    exact = golden["ref64"]
    tolerance = 1.2e-3 + 2e-6 * np.exp((exact.max(axis=1, keepdims=True) - exact) / 2)
    assert (np.abs(ours - exact) / tolerance).max() < 0.2


@pytest.mark.rounding
@both
@pytest.mark.parametrize("name", ["speech_16k", "pink_16k_10p24s", "noise_16k_1s"])
def test_golden_padding_and_normalisation(golden_values, name, backend, device):
    golden = np.load(golden_values / "fbank" / f"{name}.npz")
    wave = torch.from_numpy(np.atleast_2d(golden["wave"])).to(device)
    ours = (
        fbank(wave, num_frames=1024, mean=-4.2677393, std=4.5689974, backend=backend)[0]
        .cpu()
        .numpy()[golden["norm1024_rows"]]
    )
    np.testing.assert_allclose(ours, golden["norm1024"], atol=2e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_golden_mel_filters(golden_values, rate):
    golden = np.load(golden_values / "fbank" / f"melbank_{rate}.npz")
    ours = mel_filters(128, {8000: 256, 16000: 512, 44100: 2048}[rate], rate).numpy()
    dense = np.zeros_like(ours)
    dense[golden["row"], golden["col"]] = golden["weight64"]
    np.testing.assert_allclose(ours, dense, atol=1e-9)


def test_float64_is_exact_arithmetic():
    """The same program in float64 is the oracle of the float32 one."""
    wave = noise(2, 16000)
    assert (fbank(wave, backend="torch").double() - fbank(wave.double(), dtype=torch.float64)).abs().max() < 2e-3


@pytest.mark.parametrize("rate", [16000, 11025])
@pytest.mark.parametrize("frames", [1, 511, 512, 513])  # a piece, one frame less, one more
def test_pieces_on_the_cpu_are_the_whole(frames, rate):
    """Where a gradient is wanted, PyTorch computes all frames at once: to rounding the same."""
    wave = noise(2, samples_of(frames, rate)).double()
    whole = fbank(wave.clone().requires_grad_(), sample_rate=rate, dtype=torch.float64, backend="torch")
    pieces = fbank(wave, sample_rate=rate, dtype=torch.float64, backend="torch")
    assert whole.requires_grad and pieces.shape == (2, frames, 128)
    torch.testing.assert_close(pieces, whole.detach(), rtol=0, atol=1e-9)


@both
def test_int16_equals_scaled_float(backend, device):
    ints = (noise(2, 4000) * 32767).round().to(torch.int16).to(device)
    same = fbank(ints.float() / 32768, backend=backend)
    torch.testing.assert_close(fbank(ints, backend=backend), same, rtol=0, atol=0)


@both
@pytest.mark.parametrize(("length", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)])
def test_lengths_zero_the_padding_before_normalisation(length, frames, backend, device):
    """Below one window, exactly one, one sample short of two, two, and all: what follows the last whole frame is -mean
    / (2 std).
    """
    wave = noise(2, 16000).to(device)
    options = {"num_frames": 100, "mean": -4.0, "std": 2.0, "backend": backend}
    got = fbank(wave, lengths=torch.tensor([length, 16000], device=device), **options).cpu()
    assert got.shape == (2, 100, 128)
    assert count_frames(length, 16000) == frames
    torch.testing.assert_close(got[0, frames:], torch.full((100 - frames, 128), 1.0))
    alone = fbank(wave[:1], **options).cpu()[0, :frames]
    torch.testing.assert_close(got[0, :frames], alone, rtol=0, atol=0 if backend == "triton" else 5e-4)
    assert (got[1, 98:] == 1.0).all() and (got[1, :98] != 1.0).any()


@both
def test_padding_beyond_the_length_does_not_leak(backend, device):
    wave = noise(1, 8000).to(device)
    dirty = wave.clone()
    dirty[:, 4000:] = float("nan")
    lengths = torch.tensor([4000], device=device)
    clean = fbank(wave, lengths=lengths, backend=backend)
    torch.testing.assert_close(fbank(dirty, lengths=lengths, backend=backend), clean, rtol=0, atol=0)


@both
def test_num_frames_cuts_and_short_clips_are_zero(backend, device):
    assert fbank(noise(1, 16000).to(device), num_frames=10, backend=backend).shape == (1, 10, 128)
    assert (fbank(noise(1, 399).to(device), num_frames=4, backend=backend) == 0).all()


def test_nothing_to_do(device):
    assert fbank(noise(1, 399).to(device)).shape == (1, 0, 128)
    assert fbank(torch.zeros(0, 800, device=device)).shape == (0, 3, 128)


@both
def test_strided_input(backend, device):
    wave = noise(4, 8000).to(device)
    for view in (wave[::2, 1:4000], wave[:, ::2], wave.T.contiguous().T):
        same = fbank(view.contiguous(), backend=backend)
        torch.testing.assert_close(fbank(view, backend=backend), same, rtol=0, atol=0 if backend == "triton" else 5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [None, (16, 16), (128, 2)])
@pytest.mark.parametrize("backend", ["triton"])
def test_law(backend, patch, dtype, device):
    """Levels 100 dB apart in one batch, and a DC offset far above the sound; frames that fill no patch (101 of them)
    are left out.
    """
    level = torch.tensor([0.3, 3e-3, 3e-6])[:, None]
    wave = (noise(3, 16000) * level + torch.tensor([0.0, 0.5, 0.0])[:, None]).to(device)
    options = {
        "num_frames": 101,
        "mean": -4.27,
        "std": 4.57,
        "patch": patch,
        "lengths": torch.tensor([16000, 9000, 16000], device=device),
    }
    ours = fbank(wave, dtype=dtype, **options, backend=backend)
    same, exact = (
        fbank(wave, dtype=dtype, **options, backend="torch"),
        fbank(wave.double(), dtype=torch.float64, **options),
    )
    if dtype == torch.float32:
        assert_accurate(ours, same, exact, spread=2 * 4.57)
    else:
        assert_lawful("fbank", ours, same, exact)
    if patch is not None:
        in_frames = fbank(wave, dtype=dtype, **{**options, "patch": None}, backend=backend)
        assert torch.equal(ours, patchify(in_frames, patch, patch))


# Why each: FFTs of 128 to 2048 points, windows of odd length (11025, 44100) and of a length that fills the FFT (5120:
# 128 of 128), bins that are no power of two, more bins than FFT bins (so that many filters are empty), and the least
# that a matrix product takes (1000 Hz).
@pytest.mark.rounding
@pytest.mark.parametrize(
    ("rate", "bins"),
    [(16000, 128), (16000, 80), (16000, 23), (8000, 128), (11025, 64), (44100, 128), (5120, 40), (1000, 8)],
)
@pytest.mark.parametrize("backend", ["triton"])
def test_law_at_any_rate(backend, rate, bins, device):
    wave = noise(1, rate // 2).to(device)
    ours = fbank(wave, sample_rate=rate, num_mel_bins=bins, backend=backend)
    same = fbank(wave, sample_rate=rate, num_mel_bins=bins, backend="torch")
    assert_accurate(ours, same, fbank(wave.double(), sample_rate=rate, num_mel_bins=bins, dtype=torch.float64))


@both
def test_extreme_samples(backend, device):
    """Silence is the floor, far over full scale is finite, and a broken sample spoils the frames that hold it, not the
    others.
    """
    wave = torch.stack((torch.zeros(2000), 1e4 * noise(1, 2000)[0], noise(1, 2000)[0]))
    wave[2, 600] = float("nan")
    got = fbank(wave.to(device), backend=backend).cpu()
    torch.testing.assert_close(got[0], torch.full((11, 128), -15.942385))
    assert torch.isfinite(got[1]).all()
    assert got[2, 2:4].isnan().all() and torch.isfinite(got[2, [0, 1, *range(4, 11)]]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the power, whose logarithm is taken otherwise
@pytest.mark.parametrize("scale", [1e12, 1e17, 1e19, 1e25, 1e35])
@both
def test_samples_whose_power_overflows(scale, backend, device):
    """Beside a clip at its usual level, which stays to the bit what it is alone."""
    wave = torch.cat((scale * noise(1, 2000), noise(1, 2000, seed=1))).to(device)
    got = fbank(wave, backend=backend)
    exact = fbank(wave.double(), dtype=torch.float64)
    assert (got - exact).abs().max() < 2e-3
    assert torch.equal(got[1], fbank(wave[1:], backend=backend)[0])


@pytest.mark.parametrize("backend", ["triton"])
def test_compiles_into_one_graph(backend, device):
    """The fake operator has the shape, strides and dtype of the real one."""
    wave, lengths = noise(2, 8000).to(device), torch.tensor([8000, 700], device=device)

    def features(wave: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        frames = fbank(wave, lengths=lengths, mean=-4.0, std=2.0, dtype=torch.bfloat16, backend=backend)
        return frames.sum() + fbank(wave, num_frames=64, patch=(16, 16), backend=backend).sum()

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(wave, lengths), features(wave, lengths))


def test_a_waveform_that_requires_a_gradient(device):
    wave = noise(1, 800).to(device).requires_grad_()
    fbank(wave).sum().backward()
    assert wave.grad is not None and torch.isfinite(wave.grad).all()
    with pytest.raises(ValueError, match="no gradient"):
        fbank(wave, backend="triton")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        fbank(torch.zeros(100))
    with pytest.raises(ValueError, match="int16 or float32"):
        fbank(torch.zeros(1, 800, dtype=torch.int32))
    with pytest.raises(ValueError, match="go together"):
        fbank(torch.zeros(1, 800), mean=0.0)
    with pytest.raises(ValueError, match="backend"):
        fbank(torch.zeros(1, 800), backend="cuda")
    with pytest.raises(ValueError, match="num_frames"):
        fbank(torch.zeros(1, 800), num_frames=-1)
    for patch, frames in (((129, 2), None), ((16, 16), 5), ((16, 16), 0), ((0, 2), None)):
        with pytest.raises(ValueError, match="patch must be"):
            fbank(torch.zeros(1, 800), patch=patch, num_frames=frames)
    with pytest.raises(ValueError, match="lengths is"):
        fbank(torch.zeros(2, 800), lengths=torch.tensor([800]))
    with pytest.raises(ValueError, match="std must be positive"):
        fbank(torch.zeros(1, 800), mean=0.0, std=0.0)
    with pytest.raises(ValueError, match="sample_rate"):
        fbank(torch.zeros(1, 800), sample_rate=50)
    with pytest.raises(ValueError, match="num_mel_bins must be positive"):
        fbank(torch.zeros(1, 800), num_mel_bins=0)
    with pytest.raises(ValueError, match="up to 256 mel bins, not 257"):
        fbank(torch.zeros(1, 800), num_mel_bins=257, backend="triton")
    assert fbank(torch.zeros(1, 800), num_mel_bins=257, backend="torch").shape == (1, 3, 257)


def test_inference_mode_leaves_nothing_behind(device):
    wave = noise(1, 1000).to(device)
    with torch.inference_mode():
        fbank(wave, sample_rate=2000, backend="torch")
    fbank(wave.requires_grad_(), sample_rate=2000, backend="torch").sum().backward()


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_samples_of_frames_are_the_fewest(rate):
    for frames in (1, 2, 998, 1024):
        assert count_frames(samples_of(frames, rate), rate) == frames
        assert count_frames(samples_of(frames, rate) - 1, rate) == frames - 1
