"""Resampling: levels below and above the new Nyquist frequency on every way that sound comes in, from every rate, and
the same samples whichever way and whichever part is asked for.
"""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssast.engine.data import probe
from ssast.engine.data.check import check_clips
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import clip_statistics
from ssast.engine.data.decode import AudioDecoder
from ssast.engine.data.prepare import Settings, prepare
from ssast.engine.data.record import Record
from ssast.engine.data.remarks import Ear
from ssast.engine.data.resample import Span, resampled_length, rounded, to_int16
from ssast.engine.data.shards import open_shards
from ssast.engine.data.sound import find_recordings, read_recordings
from ssast.engine.inference.waveforms import as_clips

PEAK = 0.4
SECONDS = 0.6
FINE = 16
# Suffix, soundfile's subtype, sample rates if not all, and how far a level may be off in dB: lossy codecs change it.
FORMATS = {
    "wav 16": ("wav", "PCM_16", None, 0.02),
    "wav 24": ("wav", "PCM_24", None, 0.02),
    "wav 8": ("wav", "PCM_U8", None, 0.3),
    "wav float": ("wav", "FLOAT", None, 0.02),  # converted: DALI returns silence
    "flac": ("flac", "PCM_16", None, 0.02),
    "aiff": ("aiff", "PCM_16", None, 0.02),  # converted
    "vorbis": ("ogg", "VORBIS", (22_050, 44_100, 48_000), 1.0),
    "opus": ("opus", "OPUS", (48_000,), 1.0),
}


def tone(frequency: float, rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Float64 [n], faded in and out, so that its spectrum is a line."""
    time = np.arange(round(seconds * rate)) / rate
    fade = np.clip(20 * np.minimum(time, seconds - time), 0, 1)
    return PEAK * np.sin(2 * np.pi * frequency * time) * np.sin(fade * np.pi / 2) ** 2


def spectrum(samples: np.ndarray) -> np.ndarray:
    """Levels in dB of the middle of `samples`, int16 [n], against a tone of `PEAK`; `FINE` lines a bin."""
    middle = samples[len(samples) // 4 :][: len(samples) // 2] / 32768
    window = np.blackman(len(middle))
    return 20 * np.log10(np.abs(np.fft.rfft(middle * window, FINE * len(middle))) / (window.sum() * PEAK / 2) + 1e-9)


def level(samples: np.ndarray) -> float:
    """The loudest line, but for the lowest bins, which hold what 8 bits add to all frequencies as a constant."""
    return float(spectrum(samples)[8 * FINE :].max())


def write(folder: Path, kind: str, name: str, signal: np.ndarray, rate: int) -> Path:
    suffix, subtype, _, _ = FORMATS[kind]
    path = folder / f"{name}.{suffix}"
    soundfile.write(path, signal, rate, subtype=subtype, format="OGG" if suffix in ("ogg", "opus") else None)
    return path


def checked(paths: list[Path], cache: Path) -> Clips:
    clips, skipped = check_clips([Record(str(path)) for path in paths], cache_dir=cache, progress=False)
    assert not skipped
    return clips


def inspected(path: Path, folder: Path) -> Clips:
    """As the check has it, without a process of its own."""
    copy = folder / "copy.flac"
    (frames, rate, channels, copy_size, _), _ = probe._inspect(str(path), path.stat().st_size, str(copy))
    numbers = ([frames], np.array([rate], dtype=np.int32), [channels])
    read, size = (copy, copy_size) if copy_size >= 0 else (path, path.stat().st_size)
    arrays = [np.asarray(column) for column in (*numbers, [size], [0])]
    return Clips([str(read)], [str(path)], [""], [""], *arrays)


def loaded(clips: Clips, rate: int, start: int = 0, window: int = 0) -> list[np.ndarray]:
    """Windows of all clips as the loader has them, int16."""
    lengths = [
        resampled_length(n, int(r), rate) for n, r in zip(clips.frames.tolist(), clips.sample_rates, strict=True)
    ]
    decoder = AudioDecoder(
        clips, num_samples=window or max(lengths), sample_rate=rate, batch_size=len(clips), num_threads=2
    )
    decoded = decoder.decode(np.arange(len(clips)), np.full(len(clips), start))
    decoder.close()
    assert not decoded.broken
    return [row[:n] for row, n in zip(decoded.waveform, decoded.lengths, strict=True)]


def prepared(path: Path, rate: int) -> np.ndarray:
    """As `ssast prepare` and the reading of `embed` and `predict` have it, in this process."""
    blocks = to_int16(probe.decode(str(path), path.stat().st_size, Ear()), rate)
    return np.concatenate([block.copy() for block in blocks])  # the decoder uses its memory again


def require_level(samples: np.ndarray, frequency: float, rate: int, source: int, off: float) -> None:
    """A tone of `frequency` Hz and `PEAK` at `source` Hz, resampled to `rate`: there below the new Nyquist frequency,
    gone from just above it, and never elsewhere.
    """
    low, found = min(rate, source), level(samples)
    if frequency <= 0.45 * low:
        assert abs(found) < off
        lines = spectrum(samples)
        peak = round(frequency / rate * 2 * (len(lines) - 1))
        if off < 0.3:  # codecs and 8 bits add something of their own
            lines[max(0, peak - 20 * FINE) : peak + 20 * FINE] = -180
            assert lines[8 * FINE :].max() < -80
    elif frequency < 0.5 * low:
        assert found < off
    else:
        assert found < (-45 if off >= 0.3 else -85)


rates = st.sampled_from([8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000])


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from(list(FORMATS)),
    rates | st.integers(8_000, 96_000),
    st.sampled_from([8_000, 16_000, 22_050, 32_000]),
    st.sampled_from([0.45, 0.49, 0.51, 0.55, 0.7]),
    st.integers(1, 2),
)
@example("wav 16", 44_100, 16_000, 0.5625, 1)
@example("opus", 48_000, 16_000, 0.55, 1)
@example("flac", 48_000, 16_000, 0.51, 2)
@example("vorbis", 44_100, 16_000, 0.7, 2)
@example("wav 16", 8_000, 16_000, 0.225, 2)
def test_levels_of_any_format_and_rate(tmp_path_factory, kind, source, rate, fraction, channels):
    """0.0 dB up to 0.45 of the new rate (of the old one, if that is less), silence from 0.5 on, from the loader and
    from `prepare`; and the two within a step of 16 bits.
    """
    folder = tmp_path_factory.mktemp("levels")
    allowed = FORMATS[kind][2]
    if allowed is not None and source not in allowed:
        source = min(allowed, key=lambda known: abs(known - source))
    frequency = fraction * rate
    if frequency >= 0.5 * source:  # cannot be in the file: the image of what can is looked for instead
        frequency = 0.45 * source
    signal = tone(frequency, source)
    path = write(folder, kind, "tone", signal if channels == 1 else np.stack([1.5 * signal, 0.5 * signal], 1), source)
    clips = inspected(path, folder)
    copied = clips.converted[0] and rate < probe.COPY_RATE  # resampled twice: the level holds, the samples differ
    samples = loaded(clips, rate)[0]
    if clips.converted[0] and rate > probe.COPY_RATE:
        frequency = min(frequency, 0.5 * source)
        if frequency > 0.45 * probe.COPY_RATE:
            return  # copies are of 16 kHz, and data.sample_rate above that is refused with them
    require_level(samples, frequency, rate, source, FORMATS[kind][3])
    whole = prepared(path, rate)
    require_level(whole, frequency, rate, source, FORMATS[kind][3])
    if not copied and (not clips.converted[0] or rate == probe.COPY_RATE):
        assert len(samples) == len(whole)
        assert np.abs(samples.astype(int) - whole).max() <= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rates | st.integers(8_000, 96_000),
    st.sampled_from([8_000, 16_000, 44_100]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 40),
)
def test_a_part_is_a_part_of_the_whole(source, rate, start, length, seconds):
    """Whatever window is asked for, and whatever blocks the whole comes in: the same to a step of 16 bits."""
    frames = 1 + round(seconds * source)
    noise = np.random.default_rng(frames).uniform(-0.9, 0.9, frames).astype(np.float32)
    blocks = ((source, noise[at : at + 30_001]) for at in range(0, frames, 30_001))
    whole = np.concatenate(list(to_int16(blocks, rate)) or [np.zeros(0, np.int16)])
    total = resampled_length(frames, source, rate)
    assert len(whole) == total
    if total == 0 or source == rate:
        return
    first = round(start * (total - 1))
    last = min(total, first + 1 + round(length * 10 * rate))
    span = Span.of(first, last, frames, source, rate)
    assert span.last - span.first <= (last - first) * source / rate + 2 * 256 * max(1, source / rate) + source + 2
    part = rounded(span.resample(noise[span.first : span.last]))
    assert len(part) == last - first
    assert np.abs(part.astype(int) - whole[first:last]).max() <= 1


@pytest.mark.parametrize("kind", ["wav 16", "wav 24", "flac", "vorbis", "opus"])
def test_windows_of_long_files_are_decoded_where_they_lie(tmp_path, kind, monkeypatch):
    """Of 40 s at 48 kHz, windows of 1 s from anywhere: the samples of the whole, of little more than the window."""
    rng = np.random.default_rng(5)
    noise = np.stack([tone(700, 48_000, 40.0), rng.uniform(-0.3, 0.3, 40 * 48_000)], 1)
    clips = checked([write(tmp_path, kind, "long", noise, 48_000)], tmp_path / "cache")
    whole = prepared(tmp_path / f"long.{FORMATS[kind][0]}", 16_000)
    decoded = []
    read_into = soundfile.SoundFile.buffer_read_into

    def counted(self, block, kind):
        got = read_into(self, block, kind)
        decoded.append(got)
        return got

    monkeypatch.setattr(soundfile.SoundFile, "buffer_read_into", counted)
    for start in (0, 1, 12_345, 300_001, 639_990, 624_000):
        decoded.clear()
        window = loaded(clips, 16_000, start, 16_000)[0]
        assert len(window) == min(16_000, 640_000 - start)
        assert np.abs(window.astype(int) - whole[start : start + 16_000]).max() <= 1
        assert sum(decoded) < 3 * 48_000 or kind == "opus"


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> list[tuple[Path, float]]:
    """Files at 44.1 and 48 kHz of tones at 7.2, 7.84, 8.16, 8.8 and 11.2 kHz, with their frequencies."""
    folder = tmp_path_factory.mktemp("tones")
    kinds = ["wav 16", "flac", "wav float", "aiff", "wav 24"]
    return [
        (write(folder, kind, f"{number}", tone(fraction * 16_000, rate), rate), fraction * 16_000)
        for number, (kind, fraction) in enumerate(zip(kinds, (0.45, 0.49, 0.51, 0.55, 0.7), strict=True))
        for rate in [(44_100, 48_000)[number % 2]]
    ]


def test_every_way_in_hears_the_same(tones, tmp_path):
    """The loader from files and from shards, what `embed` and `predict` read, waveforms in memory, statistics."""
    paths = [path for path, _ in tones]
    clips = checked(paths, tmp_path / "cache")
    ways = {"files": loaded(clips, 16_000)}
    sources = [str(path) for path in paths]
    prepare(Settings(sources, max_length=60.0), tmp_path / "shards", workers=1, progress=False)
    shards = open_shards(tmp_path / "shards")
    order = np.argsort(list(shards.sources))
    ways["shards"] = loaded(shards.subset(order), 16_000)
    streams = read_recordings(find_recordings(sources), 16_000)
    ways["embed"] = [np.concatenate(list(blocks)) for blocks in streams]
    ways["memory"] = [rounded(as_clips(*soundfile.read(path, dtype="float32"), 16_000)[0]) for path in paths]
    for way, found in ways.items():
        for (_, frequency), samples, first in zip(tones, found, ways["files"], strict=True):
            require_level(samples, frequency, 16_000, 44_100, 0.02)
            assert len(samples) == len(first) and np.abs(samples.astype(int) - first).max() <= 1, way
    ours, theirs = (clip_statistics(some, 16_000, 128, 9_600, 1) for some in (clips, shards))
    assert ours == pytest.approx(theirs, abs=0.02)
