"""Where the samples of a WAV lie: sizes that count, placeholders, sizes that wrapped, truncated files, and kin."""

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.engine.data import probe
from ssast.engine.data.check import check_clips
from ssast.engine.data.prepare import Settings, prepare
from ssast.engine.data.record import Record
from ssast.engine.data.remarks import Ear
from ssast.engine.data.sound import find_recordings, read_recordings
from ssast.engine.data.wav import HEADER_BYTES, WavError, read_layout, wav_header

RATE = 16_000
SAMPLES = np.random.default_rng(3).integers(-9000, 9000, 8000, dtype=np.int16)
BODY = SAMPLES.astype("<i2").tobytes()
PCM = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
EXTENSIBLE = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4)
EXTENSIBLE += struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
LIST = b"LIST\x0c\0\0\0INFOIART\0\0\0\0"


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(content) if size is None else size) + content + bytes(len(content) % 2)


def wav(data_size: int, riff: int | None = None, *, form=PCM, before=b"", after=b"", body=BODY, magic=b"RIFF") -> bytes:
    """`riff` None: as a writer that counts on `data_size` has it; -1: as it is."""
    chunks = b"WAVE" + before + chunk(b"fmt ", form) + b"data" + struct.pack("<I", data_size) + body + after
    counted = len(chunks) - len(body) + data_size if riff is None else len(chunks) if riff == -1 else riff
    return magic + struct.pack("<I", counted & 0xFFFFFFFF) + chunks


def rf64(long_size: int, data_size: int = 0xFFFFFFFF, magic: bytes = b"RF64", body: bytes = BODY) -> bytes:
    numbers = chunk(b"ds64", struct.pack("<QQQI", min(long_size, 1 << 63) + 72, long_size, 0, 0))
    return wav(data_size, 0xFFFFFFFF, before=numbers, magic=magic, body=body)


WHOLE = {
    "counted": wav(16_000),
    "list before data": wav(16_000, before=LIST),
    "list between": wav(16_000, form=PCM, before=b"", after=LIST),
    "odd chunk, padded": wav(16_000, before=chunk(b"JUNK", b"abc")),
    "odd chunk, not padded": wav(16_000, before=chunk(b"JUNK", b"abc")[:-1]),
    "extensible": wav(16_000, form=EXTENSIBLE),
    "riff too small": wav(16_000, 100),
    "riff 0": wav(16_000, 0),
    "rf64": rf64(16_000),
    "rf64 with a size of 32 bits": rf64(0, 16_000),
}
PLACEHOLDERS = {
    "ffffffff": wav(0xFFFFFFFF, 0xFFFFFFFF),
    "ffffffff less the header": wav(0xFFFFFFFF - 36, 0xFFFFFFFF),
    "fffffffe": wav(0xFFFFFFFE, 0xFFFFFFFE),
    "7fffffff": wav(0x7FFFFFFF, 0x7FFFFFFF),
    "7fffffff less the header": wav(0x7FFFFFFF - 36, 0x7FFFFFFF),
    "sox": wav(0x7FFFF000, 0x7FFFF024),
    "80000000": wav(0x80000000),
    "1e9": wav(1_000_000_000),
    "2e9": wav(2_000_000_000),
    "3e9, of the riff": wav(3_000_000_000 - 36, 3_000_000_000),
    "4e9 under a right riff": wav(4_000_000_000, -1),
    "any size under a right riff": wav(123_456_789, -1),
    "0, 0": wav(0, 0),
    "0 under a riff of nothing": wav(0, 36),
    "0 under a right riff": wav(0, -1),
    "0 under ffffffff": wav(0, 0xFFFFFFFF),
    "0, extensible": wav(0, -1, form=EXTENSIBLE),
    "0, after a list": wav(0, -1, before=LIST),
    "2e9, extensible, after an odd chunk": wav(2_000_000_000, form=EXTENSIBLE, before=chunk(b"JUNK", b"abc")),
    "rf64 of no size": rf64(0),
    "rf64 of all ones": rf64((1 << 64) - 1),
    "bw64 of no size": rf64(0, magic=b"BW64"),
}
EMPTY = {
    "nothing": wav(0, body=b""),
    "nothing, then a list": wav(0, -1, body=b"", after=LIST),
    "nothing, then an unknown chunk": wav(0, -1, body=b"", after=chunk(b"zzzz", b"abcd")),
    "nothing, then a cut list": wav(0, -1, body=b"", after=LIST[:-3]),
    "ffffffff and nothing": wav(0xFFFFFFFF, 0xFFFFFFFF, body=b""),
    "rf64 and nothing": rf64(0, body=b""),
}
TRUNCATED = {
    "half": (wav(32_000), "16000 samples, file holds 8000"),
    "a quarter, extensible": (wav(64_000, form=EXTENSIBLE), "32000 samples, file holds 8000"),
    "of an hour": (wav(115_200_000), "57600000 samples, file holds 8000"),
    "of two hours at 100 MB": (wav(100_000_000), "50000000 samples, file holds 8000"),
    "rf64": (rf64(5_000_000_000), "2500000000 samples, file holds 8000"),
    "rf64, round": (rf64(1_000_000_000), "500000000 samples, file holds 8000"),
    "rf64 of 32 bits": (rf64(0, 32_000), "16000 samples, file holds 8000"),
}


def layout(content: bytes):
    return read_layout(io.BytesIO(content), len(content))


def decoded(path: Path) -> np.ndarray:
    return np.concatenate([block.copy() for _, block in probe.decode(str(path), path.stat().st_size, Ear())])


@pytest.mark.parametrize("name", WHOLE)
def test_sizes_that_count(name, tmp_path):
    found = layout(WHOLE[name] + LIST)
    assert (found.length, found.frames, found.remark) == (16_000, 8_000, "")
    assert (WHOLE[name] + LIST)[found.start :][:16_000] == BODY
    path = tmp_path / "a.wav"
    path.write_bytes(WHOLE[name])
    assert np.array_equal(decoded(path), SAMPLES)


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_placeholders_are_read_by_what_is_there(name, tmp_path):
    found = layout(PLACEHOLDERS[name])
    assert (found.length, found.frames) == (16_000, 8_000)
    assert re.fullmatch(r"no size in the header: it says \d+ samples, all 8000 to the end are read", found.remark)
    path = tmp_path / "a.wav"
    path.write_bytes(PLACEHOLDERS[name])
    ear = Ear()
    blocks = [block.copy() for _, block in probe.decode(str(path), path.stat().st_size, ear)]
    assert np.allclose(np.concatenate(blocks) * (1 if blocks[0].dtype == np.int16 else 32768), SAMPLES)
    assert ear.remarks() == [found.remark] or name.startswith("bw64")


@pytest.mark.parametrize("name", EMPTY)
def test_no_samples(name, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(EMPTY[name])
    with pytest.raises(probe.Reject, match="no samples"):
        decoded(path)


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_files_stay_truncated(name):
    content, told = TRUNCATED[name]
    with pytest.raises(WavError, match=f"^truncated: header says {told}$"):
        layout(content)


@pytest.mark.parametrize("missing", [1, 2, 3, 1000])
def test_a_file_that_lost_its_end_is_truncated(missing):
    if missing > 1:
        with pytest.raises(WavError, match="truncated: header says 8000 samples"):
            layout(wav(16_000)[:-missing])
    with pytest.raises(WavError, match="contradictory header: 2 channels of 16 bits in 2 bytes"):
        layout(wav(16_000, form=struct.pack("<HHIIHH", 1, 2, RATE, 2 * RATE, 2, 16)))


def sparse(path: Path, header: bytes, length: int, last: np.ndarray) -> None:
    """A file of `header` and `length` bytes of silence, but for the end; it takes no space."""
    with open(path, "wb") as file:
        file.write(header)
        file.seek(len(header) + length - last.nbytes)
        file.write(last.tobytes())


@pytest.mark.parametrize("times", [1, 2])
def test_sizes_that_wrapped(tmp_path, times):
    """Beyond 4 GiB a size of 32 bits is what is left over; the last samples are there all the same."""
    length = (times << 32) + 32_000
    path = tmp_path / "long.wav"
    sparse(path, wav(length & 0xFFFFFFFF, body=b""), length, SAMPLES)
    with open(path, "rb") as file:
        found = read_layout(file, path.stat().st_size)
    assert (found.start, found.length, found.frames) == (HEADER_BYTES, length, length // 2)
    assert found.remark == f"size wrapped at 4 GiB: header says 16000 samples, {length // 2} are read"
    with probe.open_native(str(path), path.stat().st_size) as native:
        assert native.is_mended and native.sound.frames == length // 2
        native.sound.seek(length // 2 - 8000)
        assert np.array_equal(native.sound.read(dtype="int16"), SAMPLES)


def test_rf64_beyond_4_gib(tmp_path):
    length = (1 << 32) + 32_000
    path = tmp_path / "long.wav"
    sparse(path, rf64(length, body=b""), length, SAMPLES)
    with probe.open_native(str(path), path.stat().st_size) as native:
        assert not native.is_mended and native.remark == "" and native.sound.frames == length // 2


def test_the_header_that_is_written_is_the_one_that_is_read():
    content = wav_header(8000, RATE) + BODY
    assert layout(content).frames == 8000
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == RATE and np.array_equal(samples, SAMPLES)


def test_every_way_in_reads_placeholders(tmp_path, capsys):
    """The check (whose copies training reads), `prepare` and what `embed` reads: all of the samples, and one line."""
    paths = []
    for number, content in enumerate(PLACEHOLDERS.values()):
        paths.append(tmp_path / f"{number:02d}.wav")
        paths[-1].write_bytes(content)
    sources = [str(path) for path in paths]
    clips, skipped = check_clips([Record(source) for source in sources], cache_dir=tmp_path / "cache", progress=False)
    assert not skipped and clips.frames.tolist() == [8000] * len(paths)
    for path in clips.paths:
        assert np.array_equal(soundfile.read(path, dtype="int16")[0], SAMPLES)
    warned = capsys.readouterr().err
    assert re.search(
        r"warning: \d+ clips, .*00\.wav for one: no size in the header: it says 4294967295 bytes|samples", warned
    )
    assert warned.count("warning") == 1
    summary = prepare(Settings(sources, max_length=60.0), tmp_path / "shards", workers=1, progress=False)
    assert summary["clips"] == len(paths) and summary["hours"] == pytest.approx(len(paths) / 7200, abs=1e-4)
    streams = read_recordings(find_recordings(sources), RATE)
    assert all(np.array_equal(np.concatenate(list(blocks)), SAMPLES) for blocks in streams)


def test_the_cases(cases):
    folder = cases / "09-wav-placeholder"
    for path in sorted(folder.glob("*.wav")):
        assert len(decoded(path)) == 32_000, path
