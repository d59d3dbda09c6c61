"""Windows of sound out of files: which samples they hold, and what is said of files that have changed since."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.engine.data.check import check_clips
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.record import Record

WINDOW = 4000


def write_clips(folder: Path, count: int = 8) -> list[Path]:
    """Noise of different lengths, some shorter than the window, WAV and FLAC in turn."""
    rng = np.random.default_rng(0)
    paths = [folder / f"clip {number}.{'wav' if number % 2 else 'flac'}" for number in range(count)]
    for number, path in enumerate(paths):
        soundfile.write(path, rng.integers(-9000, 9000, 1500 + 1000 * number, dtype=np.int16), 16000)
    return paths


def open_decoder(paths: list[Path], cache: Path, window: int = WINDOW) -> AudioDecoder:
    clips, skipped = check_clips([Record(str(path)) for path in paths], cache_dir=cache, progress=False)
    assert not skipped
    return AudioDecoder(clips, num_samples=window, sample_rate=16000, batch_size=8, num_threads=2)


def samples(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def padded(values: np.ndarray) -> np.ndarray:
    return np.pad(values[:WINDOW], (0, max(0, WINDOW - len(values))))


def test_windows_are_the_samples_of_the_files(tmp_path):
    paths = write_clips(tmp_path)
    start = np.array([0, 0, 0, 100, 1500, 0, 3500, 4000])
    decoded = open_decoder(paths, tmp_path / "cache").decode(np.arange(8), start)
    for row, path in enumerate(paths):
        assert np.array_equal(decoded.waveform[row], padded(samples(path)[start[row] :]))
        assert decoded.lengths[row] == min(WINDOW, len(samples(path)) - start[row])
    assert decoded.waveform.dtype == np.int16 and not decoded.broken


def test_stereo_is_averaged_and_other_rates_resampled(tmp_path):
    time = np.arange(44100) / 44100
    left, right = 0.5 * np.sin(2 * np.pi * 440 * time), 0.3 * np.sin(2 * np.pi * 1000 * time)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 44100)
    decoded = open_decoder([tmp_path / "stereo.wav"], tmp_path / "cache", 16000).decode(np.array([0]), np.array([0]))
    at_16k = np.arange(16000) / 16000
    expected = (0.25 * np.sin(2 * np.pi * 440 * at_16k) + 0.15 * np.sin(2 * np.pi * 1000 * at_16k)) * 32768
    inner = slice(200, -200)
    assert np.abs(decoded.waveform[0][inner] - expected[inner]).max() < 0.01 * 32768
    assert decoded.lengths[0] == 16000


def test_a_window_beyond_the_end_is_silence(tmp_path):
    paths = write_clips(tmp_path, 2)
    decoded = open_decoder(paths, tmp_path / "cache").decode(np.array([0, 1]), np.array([1500, 2500]))  # their lengths
    assert decoded.lengths.tolist() == [0, 0] and not decoded.waveform.any() and not decoded.broken


def test_batches_that_are_begun_together_are_finished_apart(tmp_path):
    """The second is read while the first waits; rows may come again, in any order."""
    paths = write_clips(tmp_path)
    decoder = open_decoder(paths, tmp_path / "cache")
    indices = [np.array([5, 5, 0, 3]), np.array([7, 2, 4, 2])]
    starts = [np.array([0, 900, 100, 7]), np.array([10, 0, 20, 30])]
    pending = [decoder.begin(index, start) for index, start in zip(indices, starts, strict=True)]
    for batch, index, start in zip(reversed(pending), reversed(indices), reversed(starts), strict=True):
        decoded = decoder.finish(batch)
        for row, (clip, first) in enumerate(zip(index, start, strict=True)):
            assert np.array_equal(decoded.waveform[row], padded(samples(paths[clip])[first:]))
    decoder.close()


@pytest.mark.parametrize(
    ("frames", "rate", "reason"),
    [(1000, 16000, "changed since it was checked"), (2500, 8000, "8000 Hz instead of 16000")],
    ids=["another length", "another rate"],
)
def test_a_file_that_was_replaced_is_broken(tmp_path, frames, rate, reason):
    """Its window is silence, and the others of the batch are what they were."""
    paths = write_clips(tmp_path, 4)
    decoder = open_decoder(paths, tmp_path / "cache")
    soundfile.write(paths[1], np.zeros(frames, dtype=np.int16), rate)
    decoded = decoder.decode(np.arange(4), np.zeros(4, dtype=np.int64))
    assert list(decoded.broken) == [1] and reason in decoded.broken[1]
    assert decoded.lengths[1] == 0 and not decoded.waveform[1].any()
    for row in (0, 2, 3):
        assert np.array_equal(decoded.waveform[row], padded(samples(paths[row])))
