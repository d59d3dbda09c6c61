"""What FFmpeg reads: where Opus begins in other containers, and samples without a header."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from ssast.engine.data import probe
from ssast.engine.data.check import check_clips
from ssast.engine.data.remarks import Ear
from ssast.engine.data.resample import to_int16
from ssast.engine.data.sources import read_source


def decoded(path: Path, rate: int) -> np.ndarray:
    """int16 [n] of all ways in at `rate` Hz."""
    blocks = to_int16(probe.decode(str(path), path.stat().st_size, Ear()), rate)
    return np.concatenate([block.copy() for block in blocks])


@pytest.fixture(scope="module")
def opus(tmp_path_factory) -> Path:
    """A second of noise at 48 kHz as Opus in Ogg."""
    path = tmp_path_factory.mktemp("opus") / "a.opus"
    noise = np.convolve(np.random.default_rng(6).normal(0, 0.3, 48_000), np.ones(8) / 8, "same")
    soundfile.write(path, np.clip(noise, -0.9, 0.9), 48_000, format="OGG", subtype="OPUS")
    return path


def remuxed(path: Path, out: Path) -> Path:
    """The same packets in another container."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out


@pytest.mark.parametrize("delay_ns", [6_500_000, 3_250_000, 2_166_667, 1_083_333, 0, 13_000_000])
@pytest.mark.parametrize("suffix", ["webm", "mka"])
def test_opus_begins_where_it_does_in_ogg(opus, tmp_path, suffix, delay_ns):
    """Whatever CodecDelay the track names: sample for sample the same as from Ogg, which libsndfile reads."""
    path = remuxed(opus, tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    named = b"\x56\xaa\x83" + (6_500_000).to_bytes(3, "big")  # 312 samples at 48 kHz
    assert content.count(named) == 1
    path.write_bytes(content.replace(named, named[:3] + delay_ns.to_bytes(3, "big")))
    ogg, other = decoded(opus, 48_000), decoded(path, 48_000)
    common = min(len(ogg), len(other))
    # FFmpeg's decoder and libopus round differently; a shift by one sample would differ by thousands.
    assert np.abs(ogg[:common].astype(int) - other[:common]).max() < 300
    assert len(other) - len(ogg) in range(-49, 49)  # the end is in the container's milliseconds


@pytest.mark.parametrize("name", ["a.raw", "a.pcm", "a.S16LE", "a.ulaw"])
def test_samples_without_a_header_are_named(tmp_path, name):
    """In a folder they are candidates, and the check says what they lack."""
    (tmp_path / name).write_bytes(np.random.default_rng(0).integers(-9000, 9000, 8000, dtype=np.int16).tobytes())
    soundfile.write(tmp_path / "b.wav", np.zeros(8000), 16_000)
    records = read_source(str(tmp_path)).records
    assert len(records) == 2
    clips, skipped = check_clips(records, cache_dir=tmp_path.parent / f"{tmp_path.name} cache", progress=False)
    assert [Path(path).name for path in clips.sources] == ["b.wav"]
    assert [(Path(item.path).name, item.reason) for item in skipped] == [
        (name, "no header says its rate and format: convert it to WAV first")
    ]


def test_a_wav_that_is_named_raw_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.25), 16_000)
    path = (tmp_path / "a.wav").rename(tmp_path / "a.raw")
    assert len(decoded(path, 16_000)) == 8000
