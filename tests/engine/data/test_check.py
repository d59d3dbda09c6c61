"""The check of clips: every reason to skip, conversions, workers that crash or hang, the cache, and agreement with
NVIDIA DALI.
"""

import csv
import json
import os
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssast.engine.data import check, probe, workers
from ssast.engine.data.check import Skipped, check_clips, write_skipped
from ssast.engine.data.record import Record
from ssast.engine.errors import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "audio"
RATE = 16_000


def tone(seconds=0.5, rate=RATE, peak=0.5):
    """A chirp from 300 to 900 Hz with a soft beginning: one shift only aligns it."""
    t = np.arange(round(seconds * rate)) / rate
    return peak * np.sin(2 * np.pi * (300 + 300 * t / seconds) * t) * np.minimum(1, 10 * t)


def wav(path, data=None, **kwargs):
    soundfile.write(path, tone() if data is None else data, kwargs.pop("rate", RATE), **kwargs)
    return str(path)


def run(tmp_path, *paths, **kwargs):
    """Checks the paths; clips, and reasons by file name."""
    entries = [path if isinstance(path, Record) else Record(str(path)) for path in paths]
    clips, skipped = check_clips(entries, cache_dir=tmp_path / "cache", **{"workers": 1, **kwargs})
    return clips, {os.path.basename(item.path): item.reason for item in skipped}


def encode(path, signal, rate, codec, bit_rate=96_000):
    """Writes `signal` [n] by FFmpeg's encoder `codec` into the container that the name asks for."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", bit_rate=bit_rate)
        frame = av.AudioFrame.from_ndarray(signal[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format.name, "mono", rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return str(path)


def patched(content, at, new):
    return content[:at] + new + content[at + len(new) :]


@pytest.fixture
def whole(tmp_path):
    """The bytes of a whole WAV, FLAC and OGG file of 8000 samples."""
    wav(tmp_path / "whole.wav", subtype="PCM_16")
    wav(tmp_path / "whole.flac")
    wav(tmp_path / "whole.ogg")
    return {kind: (tmp_path / f"whole.{kind}").read_bytes() for kind in ("wav", "flac", "ogg")}


def test_every_reason(tmp_path, whole):
    broken = tone()
    broken[[3, 5, 7]] = np.nan, np.inf, -np.inf
    absurd = tone()
    absurd[5] = 1e30
    content = {
        "empty.wav": b"",
        "text.wav": b"hello, this is no sound at all\n" * 20,
        "riff.wav": b"RIFF\x04\0\0\0WAVE",
        "page.flac": b"<html>404</html>" * 9,
        "cut.wav": whole["wav"][: 44 + 7000],
        "cut.flac": whole["flac"][: len(whole["flac"]) // 2],
        "cut.ogg": whole["ogg"][: len(whole["ogg"]) // 2],
        "rate.wav": patched(whole["wav"], 24, struct.pack("<I", 1)),
        "bits.wav": patched(whole["wav"], 34, struct.pack("<H", 17)),
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    wav(tmp_path / "nothing.wav", np.zeros(0))
    wav(tmp_path / "short.wav", np.zeros(4))
    wav(tmp_path / "nan.wav", broken, subtype="FLOAT")
    wav(tmp_path / "absurd.wav", absurd, subtype="FLOAT")
    wav(tmp_path / "whole.aiff", tone(3), subtype="PCM_16")
    aiff = (tmp_path / "whole.aiff").read_bytes()
    (tmp_path / "cut.aiff").write_bytes(aiff[: len(aiff) // 8])
    wav(tmp_path / "adpcm.wav", subtype="IMA_ADPCM")
    (tmp_path / "adpcm.wav").write_bytes((tmp_path / "adpcm.wav").read_bytes()[:2000])
    encode(tmp_path / "long.mp3", tone(3), RATE, "libmp3lame")
    (tmp_path / "cut.mp3").write_bytes((tmp_path / "long.mp3").read_bytes()[:9000])
    (tmp_path / "link.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    expected = {
        "empty.wav": "empty file",
        "text.wav": "not audio: format not recognised",
        "riff.wav": "not audio: .*No 'data' chunk.*",
        "page.flac": "not audio: format not recognised",
        "cut.wav": "truncated: header says 8000 samples, file holds 3500",
        "cut.flac": "truncated or damaged: header says 8000 samples, decoding failed .*",
        "cut.ogg": "truncated: the end of the Ogg stream is missing",
        "cut.aiff": r"truncated: header says 3\.0 s, 0\.4 s can be decoded",
        "cut.mp3": r"truncated: header says 3\.0 s, 0\.\d s can be decoded",
        "adpcm.wav": r"truncated: header says \d+ bytes, file holds \d+",
        "rate.wav": "sample rate of 1 Hz, outside 1000 to 768000",
        "bits.wav": "contradictory header: 1 channels of 17 bits in 2 bytes",
        "nothing.wav": "no samples",
        "short.wav": "too short: 4 samples, one frame needs 400",
        "nan.wav": r"NaN or infinite samples \(3\)",
        "absurd.wav": r"absurd samples: peak 1e\+30 where 1 is full scale",
        "link.wav": "broken symbolic link",
        "pipe.wav": "not a regular file",
        "folder.wav": "a folder",
        "gone.wav": "no such file",
        "null\0.wav": "unreadable: embedded null byte",
    }
    clips, reasons = run(tmp_path, *(tmp_path / name for name in expected), workers=2)
    assert len(clips) == 0 and clips.hours == 0
    assert list(reasons) == list(expected), "every file is skipped, in the order given"
    for name, pattern in expected.items():
        assert re.fullmatch(pattern, reasons[name]), (name, reasons[name])


def test_wav_headers_of_streams_and_of_strange_writers(tmp_path, whole):
    data = whole["wav"]
    after = b"LIST\x04\0\0\0abcd"
    rf64 = b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, len(data) + 28, 16_000, 8_000, 0)
    sizes = {"ones": 0xFFFFFFFF, "half": 0x7FFFFFFF, "sox": 0x7FFFF024, "arecord": 0x80000000}
    files = {
        name: patched(patched(data, 4, struct.pack("<I", n)), 40, struct.pack("<I", n)) for name, n in sizes.items()
    }
    files["zero"] = patched(patched(data, 4, bytes(4)), 40, bytes(4))
    files["crashed writer"] = patched(patched(data, 4, struct.pack("<I", 36)), 40, bytes(4))
    files["chunk before"] = data[:36] + b"JUNK\x03\0\0\0abc\0" + data[36:]
    files["chunk after"] = data + after
    files["riff too small"] = patched(data, 4, struct.pack("<I", 100))
    files["rf64"] = rf64 + data[12:40] + b"\xff\xff\xff\xff" + data[44:]
    files["empty"] = patched(data[:44], 40, bytes(4)) + after  # no samples: the rest is another chunk
    files["empty"] = patched(files["empty"], 4, struct.pack("<I", len(files["empty"]) - 8))
    files["odd"] = patched(data, 40, struct.pack("<I", 15_999)) + b"\0"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    clips, reasons = run(tmp_path, *(tmp_path / name for name in files))
    assert reasons == {"empty": "no samples"}
    frames = {os.path.basename(path): n for path, n in zip(clips.sources, clips.frames.tolist(), strict=True)}
    assert frames.pop("odd") == 7999
    assert set(frames.values()) == {8000}
    copied = {os.path.basename(s) for p, s in zip(clips.paths, clips.sources, strict=True) if p != s}
    assert copied == {"zero", "crashed writer"}, "libsndfile, and so DALI, sees no samples there"


def test_columns_order_duplicates_and_subsets(tmp_path):
    a, b = wav(tmp_path / "a.wav"), wav(tmp_path / "b.flac", np.zeros((4410, 2)), rate=44_100)
    gone = str(tmp_path / "gone.wav")
    entries = [
        Record(b, ("dog", "cat"), "train"),
        Record(gone, ("x",)),
        Record(a, (), "valid"),
        Record(b, ("dog",), "valid"),
        Record(gone),
    ]
    clips, skipped = check_clips(entries, cache_dir=tmp_path / "cache", workers=2)
    assert skipped == [Skipped(gone, "no such file")] * 2
    assert clips.paths == clips.sources == [b, a, b]
    assert clips.labels == ["dog,cat", "", "dog"] and clips.splits == ["train", "valid", "valid"]
    assert clips.frames.tolist() == [4410, 8000, 4410] and clips.frames.dtype == np.int64
    assert clips.sample_rates.tolist() == [44_100, RATE, 44_100] and clips.sample_rates.dtype == np.int32
    assert clips.channels.tolist() == [2, 1, 2] and clips.channels.dtype == np.int32
    assert clips.sizes.tolist() == [os.path.getsize(path) for path in clips.paths] and clips.sizes.dtype == np.int64
    assert len(clips) == 3 and clips.hours == pytest.approx(0.7 / 3600)
    assert clips.subset(np.array([2, 1])).labels == ["dog", ""] and clips.subset(np.array([2, 1])).frames.tolist() == [
        4410,
        8000,
    ]
    assert clips.subset(clips.channels == 1).paths == [a] and len(clips.subset(np.array([], dtype=np.int64))) == 0
    # The least length is applied to cached verdicts too.
    assert [item.reason for item in check_clips(entries[:1], cache_dir=tmp_path / "cache", min_seconds=0.5)[1]] == [
        "too short: 4410 samples, one frame needs 22050"
    ]
    assert len(check_clips([], cache_dir=tmp_path / "cache")[0]) == 0


def test_awkward_names(tmp_path):
    names = [
        "new\nline.wav",
        "quo\"te's.wav",
        "-dash.wav",
        os.fsdecode(b"bad\xff.wav"),
        "語 %d.wav",
        "a:b.wav",
        "x" * 200 + ".wav",
    ]
    for name in names:
        for n, kwargs in enumerate(({}, {"subtype": "FLOAT"})):  # the second is opened by FFmpeg as well
            folder = tmp_path / str(n)
            folder.mkdir(exist_ok=True)
            with open(folder / name, "wb") as file:
                soundfile.write(file, tone(), RATE, format="WAV", **kwargs)
    paths = [str(tmp_path / str(n) / name) for name in names for n in range(2)]
    clips, reasons = run(tmp_path, *paths)
    assert reasons == {} and clips.sources == paths and set(clips.frames.tolist()) == {8000}
    write_skipped(tmp_path / "skipped.csv", [Skipped(path, 'a "reason", of\nsorts') for path in paths])
    with open(tmp_path / "skipped.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *([path, 'a "reason", of\nsorts'] for path in paths)]
    assert os.listdir(tmp_path).count("skipped.csv") == 1 and not list(tmp_path.glob("*.tmp"))


def test_conversion_keeps_the_signal(tmp_path):
    codecs = {
        "mp3": ("libmp3lame", 44_100),
        "m4a": ("aac", 44_100),
        "webm": ("libopus", 48_000),
        "wma": ("wmav2", 22_050),
    }
    paths = [encode(tmp_path / f"a.{kind}", tone(2, rate), rate, codec) for kind, (codec, rate) in codecs.items()]
    clips, reasons = run(tmp_path, *paths)
    assert reasons == {} and clips.sources == paths
    assert set(clips.sample_rates.tolist()) == {RATE} and set(clips.channels.tolist()) == {1}
    for path, frames, size in zip(clips.paths, clips.frames, clips.sizes, strict=True):
        assert Path(path).parent == tmp_path / "cache" / "converted" and size == os.path.getsize(path)
        info = soundfile.info(path)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", RATE, 1)
        got, want = soundfile.read(path)[0], tone(2)
        assert got.size == frames and abs(got.size / want.size - 1) < 0.05
        shift = int(np.correlate(got, want, mode="full").argmax()) - want.size + 1
        assert abs(shift) < 0.1 * RATE
        got, want = got[max(0, shift) :], want[max(0, -shift) :]
        n = min(got.size, want.size)
        assert np.corrcoef(got[:n], want[:n])[0, 1] > 0.9


def test_what_dali_gets_wrong_as_int16_is_converted(tmp_path, dali):
    """One-channel float comes back from DALI as silence, and loud one-channel Vorbis and Opus wrap around."""
    both = np.stack([tone(), 0.5 * tone()[::-1]], axis=1)
    loud = np.clip(9 * tone(2, 48_000), -1, 1)
    wav(tmp_path / "mono.wav", 4 * tone(), subtype="FLOAT")  # beyond full scale: to be clipped
    wav(tmp_path / "stereo.wav", both, subtype="DOUBLE")
    wav(tmp_path / "stereo.aiff", both, subtype="PCM_24")
    wav(tmp_path / "loud.ogg", loud, rate=48_000)
    wav(tmp_path / "loud.opus", loud, rate=48_000, format="OGG", subtype="OPUS")
    wav(tmp_path / "quiet.ogg", 0.1 * loud, rate=48_000)
    names = ["mono.wav", "stereo.wav", "stereo.aiff", "loud.ogg", "loud.opus", "quiet.ogg"]
    clips, reasons = run(tmp_path, *(tmp_path / name for name in names))
    assert reasons == {}
    assert [path != source for path, source in zip(clips.paths, clips.sources, strict=True)] == [True] * 5 + [False]
    step = 1.5 / 32768
    np.testing.assert_allclose(soundfile.read(clips.paths[0])[0], np.clip(4 * tone(), -1, 1), atol=step)
    for path in clips.paths[1:3]:
        np.testing.assert_allclose(soundfile.read(path)[0], both.mean(axis=1), atol=step)
    assert dali(clips.paths) == clips.frames.tolist()
    assert dali([str(tmp_path / "mono.wav")], peak=True)[0] < 10, "if this fails, DALI has been mended: convert less"
    assert dali(clips.paths[:1], peak=True)[0] >= 32767


def test_workers_do_not_load_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", "-P", probe.__file__, str(1 << 32)]
    path = wav(tmp_path / "a.wav")
    status = os.stat(path)
    line = json.dumps([path, status.st_size, status.st_mtime_ns, str(tmp_path / "copy.flac")]).encode() + b"\n"
    done = subprocess.run(command, input=line, capture_output=True, timeout=30, check=True)
    assert [json.loads(answer) for answer in done.stdout.splitlines()] == [
        None,
        {"sound": [8000, RATE, 1, -1, 0], "remark": ""},
    ]
    assert not re.search(rb"\| +(torch|av)$", done.stderr, re.M)


@pytest.fixture
def sabotage(monkeypatch):
    """Lets a worker be stopped, and perhaps killed, when it is sent a certain file."""
    send = workers.Worker.send

    def arm(name, *signals):
        def armed(self, number, job):
            mine = job[0].endswith(name)
            if mine:
                os.kill(self.process.pid, signal.SIGSTOP)
            send(self, number, job)
            for signal_number in signals if mine else ():
                os.kill(self.process.pid, signal_number)

        monkeypatch.setattr(workers.Worker, "send", armed)

    return arm


@pytest.mark.parametrize(
    ("signals", "reason"), [((), "took longer than 2 s"), ((signal.SIGKILL,), "decoder crashed (SIGKILL)")]
)
def test_a_hang_or_a_crash_costs_one_file(tmp_path, sabotage, signals, reason):
    paths = [wav(tmp_path / f"{n:02}.wav") for n in range(20)]
    sabotage("00.wav", *signals)
    clips, reasons = run(tmp_path, *paths, timeout_s=60 if signals else 2)
    assert reasons == {"00.wav": reason}
    assert clips.sources == paths[1:]


def test_verdicts_that_may_pass_are_not_cached(tmp_path, monkeypatch):
    path = wav(tmp_path / "00.wav")
    with monkeypatch.context() as patch:
        send = workers.Worker.send
        patch.setattr(
            workers.Worker, "send", lambda self, *job: (os.kill(self.process.pid, signal.SIGKILL), send(self, *job))
        )
        assert run(tmp_path, path)[1] == {"00.wav": "decoder crashed (SIGKILL)"}
    assert run(tmp_path, path)[1] == {}


def test_a_worker_that_cannot_start_is_an_error_not_a_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        run(tmp_path, wav(tmp_path / "a.wav"))


def test_what_a_worker_makes_of_errors(tmp_path, monkeypatch):
    def raising(error):
        def inspect(*_):
            raise error

        monkeypatch.setattr(probe, "_inspect", inspect)
        return probe._verdict("/a.wav", 1, 1, str(tmp_path / "copy.flac"), 3 << 30)

    assert raising(MemoryError()) == {"reason": "needs more than 3.0 GiB of memory to decode", "transient": True}
    assert raising(OSError(5, "Input/output error")) == {"reason": "unreadable: Input/output error", "transient": True}
    assert raising(ValueError("odd")) == {"reason": "cannot be decoded: ValueError: odd", "transient": True}
    assert "cannot import" in raising(ImportError("no av"))["fatal"], "what no file is to blame for ends the check"


def test_a_file_that_changes_meanwhile(tmp_path):
    path = wav(tmp_path / "a.wav")
    verdict = probe._verdict(path, 1, 2, str(tmp_path / "copy.flac"), 0)
    assert verdict == {"reason": "changed while it was being checked", "transient": True}


def count_decoded(monkeypatch):
    decoded = []
    send = workers.Worker.send
    monkeypatch.setattr(
        workers.Worker, "send", lambda self, number, job: (decoded.append(job[0]), send(self, number, job))
    )
    return decoded


def test_cache(tmp_path, monkeypatch):
    good, bad, soft = wav(tmp_path / "a.wav"), tmp_path / "b.wav", wav(tmp_path / "c.wav", subtype="FLOAT")
    bad.write_bytes(b"x")
    decoded = count_decoded(monkeypatch)
    first = run(tmp_path, good, bad, soft)
    assert decoded == [good, str(bad), soft]
    again = run(tmp_path, good, bad, soft)
    assert len(decoded) == 3, "nothing is decoded twice"
    assert again[1] == first[1] and again[0].paths == first[0].paths
    for column in ("frames", "sample_rates", "channels", "sizes"):
        np.testing.assert_array_equal(getattr(again[0], column), getattr(first[0], column))
    os.utime(good, ns=(0, 5))
    wav(bad)
    os.unlink(first[0].paths[1])  # a converted copy that is gone is made again
    clips, reasons = run(tmp_path, good, bad, soft)
    assert decoded[3:] == [good, str(bad), soft] and reasons == {} and len(clips) == 3
    with open(clips.paths[2], "ab") as copy:  # and one that was touched
        copy.write(b"x")
    run(tmp_path, good, bad, soft)
    assert decoded[6:] == [soft]
    monkeypatch.setattr(check._Cache, "_TABLE", "checked_later")
    run(tmp_path, good)
    assert decoded[7:] == [good], "another version of the check does not trust these verdicts"


def test_a_useless_cache_is_a_warning(tmp_path):
    path, database = wav(tmp_path / "a.wav"), tmp_path / "cache" / "checked.sqlite"
    database.parent.mkdir()
    database.write_bytes(b"this is no database" * 100)
    with pytest.warns(UserWarning, match=r"checked\.sqlite cannot be used .*delete it"):
        assert len(run(tmp_path, path)[0]) == 1
    assert database.read_bytes() == b"this is no database" * 100


def test_a_locked_cache_is_a_warning(tmp_path, monkeypatch):
    path = wav(tmp_path / "a.wav")
    run(tmp_path, path)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.1))
    lock = connect(tmp_path / "cache" / "checked.sqlite")
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.warns(UserWarning, match="locked.*going on without"):
        assert len(run(tmp_path, path)[0]) == 1
    lock.close()


def test_verdicts_survive_a_kill(tmp_path):
    """What was decided more than a few seconds before a kill -9 is in the cache."""
    cache = check._Cache(tmp_path / "checked.sqlite")
    cache._committed -= 3
    cache.put("/a.wav", [1, 2, 3, 4, 5, -1, 0, None, ""])
    assert list(check._Cache(tmp_path / "checked.sqlite").rows(["/a.wav", "/b.wav"])) == [
        (1, 2, 3, 4, 5, -1, 0, None, ""),
        None,
    ]


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    path = wav(tmp_path / "a.wav")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/cache cannot be written: Not a directory"):
        check_clips([Record(path)], cache_dir=tmp_path / "file" / "cache")


SCRIPT = """
import resource, signal, sys, types
from pathlib import Path
# without the model, which takes seconds to import
package = sys.modules["ssast.engine"] = types.ModuleType("ssast.engine")
package.__path__ = [{folder!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)
from ssast.engine.data.check import check_clips
from ssast.engine.data.record import Record
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
clips, skipped = check_clips([Record({path!r})], cache_dir=Path({cache!r}), workers=1)
print(len(clips), skipped)
"""


def script(tmp_path, path, limit=0):
    """The check called from a script on standard input, which has no file that a worker could import."""
    folder = str(Path(check.__file__).parents[1])
    code = SCRIPT.format(path=path, cache=str(tmp_path / "cache"), limit=limit, folder=folder)
    process = subprocess.Popen([sys.executable, "-"], stdin=-1, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    process.stdin.write(code)
    process.stdin.close()
    process.stdin = None
    return process


def test_a_full_disk_is_an_error_and_scripts_on_standard_input_work(tmp_path):
    rng = np.random.default_rng(0)
    path = wav(tmp_path / "noise.wav", rng.uniform(-0.5, 0.5, 200_000), subtype="FLOAT")
    full = script(tmp_path, path, limit=100_000)
    fine = script(tmp_path, wav(tmp_path / "a.wav"))
    assert fine.communicate(timeout=60)[0] == "1 []\n"
    error = full.communicate(timeout=60)[1]
    assert re.search(
        rf"UserError: cannot write converted clips to {tmp_path}/cache/converted: .* \(\d+ MiB free\)", error
    ), error
    assert os.listdir(tmp_path / "cache" / "converted") == []


def test_ctrl_c_leaves_no_worker(tmp_path):
    process = script(tmp_path, wav(tmp_path / "long.wav", np.tile(tone(4), 100), subtype="FLOAT"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    limits = ""
    while time.monotonic() < deadline and str(4 << 30) not in limits:  # set just before the work begins
        workers = children.read_text().split()
        limits = Path(f"/proc/{workers[0]}/limits").read_text() if workers else ""
    os.kill(int(workers[0]), signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert not Path(f"/proc/{workers[0]}").exists()


# Agreement with DALI, which runs in a process of its own: a decoder that crashes on a damaged file must not take pytest
# along.

DALI = """
import json, sys
import numpy as np
from nvidia.dali import fn, pipeline_def, types

@pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
def decoder():
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.audio(encoded, dtype=types.INT16, downmix=True)[0]

pipeline = None
for line in sys.stdin:
    answers = []
    path_list, peak = json.loads(line)
    for path in path_list:
        if pipeline is None:
            pipeline = decoder()
            pipeline.build()
        try:
            pipeline.feed_input("encoded", [np.fromfile(path, dtype=np.uint8)])
            audio = pipeline.run()[0].as_array()[0]
            answers.append(int(np.abs(audio.astype(int)).max()) if peak else len(audio))
        except RuntimeError as error:
            pipeline = None
            answers.append(str(error).strip().splitlines()[-1])
    print(json.dumps(answers), flush=True)
"""


@pytest.fixture(scope="module")
def dali():
    """A function of paths: samples that DALI decodes of each (or their peak), or its message."""
    pytest.importorskip("nvidia.dali")
    process = subprocess.Popen([sys.executable, "-c", DALI], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)

    def decode(paths, peak=False):
        process.stdin.write(json.dumps([list(paths), peak]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield decode
    process.stdin.close()
    process.wait(10)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """All of the shared audio files checked once: clips, reasons by path, seconds taken, peak memory of a worker in
    bytes.
    """
    if not SHARED.is_dir():
        pytest.skip(f"no audio files in {SHARED}")
    peaks = []
    stop = workers.Worker.stop

    def measured(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            peaks.extend(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        with open(f"/proc/{self.process.pid}/limits") as limits:
            assert re.search(rf"Max address space +{4 << 30} +{4 << 30} ", limits.read())
        return stop(self)

    entries = [
        Record(str(SHARED / row["path"].rstrip("/")), (row["label"],), row["split"]) for row in rows("manifest.csv")
    ]
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.Worker, "stop", measured)
        clips, skipped = check_clips(entries, cache_dir=tmp_path_factory.mktemp("cache"))
    return clips, {item.path: item.reason for item in skipped}, time.monotonic() - began, max(peaks)


def rows(name):
    with open(SHARED / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_whole_files_are_kept(shared):
    clips, reasons, seconds, memory = shared
    kept = set(clips.sources)
    for row in rows("manifest.csv"):
        path = str(SHARED / row["path"].rstrip("/"))
        if row["dataset"] not in ("messy", "corrupt"):
            assert path in kept, reasons[path]
    for row in rows("manifests/messy.csv"):
        path = str(SHARED / row["path"])
        if row["expect"] == "decode" and float(row["duration_s"] or 1) >= 0.025:
            assert path in kept, reasons[path]
        elif row["expect"] == "decode":
            assert reasons[path].startswith("too short: ")
    assert memory < 300 << 20 and seconds < 60


def test_corrupt_files_are_skipped_or_whole(shared):
    clips, reasons, _, _ = shared
    frames = dict(zip(clips.sources, clips.frames.tolist(), strict=True))
    for row in rows("manifests/corrupt.csv"):
        path = str(SHARED / row["path"].rstrip("/"))
        assert (path in frames) != (path in reasons)
        if (
            row["expect"] in ("reject", "reject cleanly")
            or "never train on NaN" in row["expect"]
            or "zero samples" in row["expect"]
        ):
            # FFmpeg finds the rate of this one in the frames.
            assert path in reasons or path.endswith("rate_zero.flac"), (path, frames.get(path))
    assert not any("decoder crashed" in reason or "took longer" in reason for reason in reasons.values())


def test_dali_decodes_every_accepted_file_in_full(shared, dali):
    clips = shared[0]
    got = dali(clips.paths)
    assert [(p, n) for p, n, m in zip(clips.paths, got, clips.frames.tolist(), strict=True) if n != m] == []


mutations = st.lists(
    st.tuples(
        st.sampled_from(["wav", "flac", "ogg"]),
        st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.binary(min_size=1, max_size=8)), max_size=4),
        st.floats(0.1, 1),
    ),
    min_size=30,
    max_size=60,
)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations)
def test_damaged_files_never_hurt(tmp_path_factory, dali, batch):
    """Bytes overwritten (half of them in the first hundred) and ends cut off: what is accepted, DALI decodes to the
    same length.
    """
    folder = tmp_path_factory.mktemp("damaged")
    for kind in ("wav", "flac", "ogg"):
        wav(folder / f"whole.{kind}", tone(0.2))
    paths = []
    for number, (kind, edits, kept) in enumerate(batch):
        content = (folder / f"whole.{kind}").read_bytes()
        for at, in_header, new in edits:
            content = patched(content, int(at * (min(100, len(content)) if in_header else len(content))), new)
        paths.append(folder / f"{number}.{kind}")
        paths[-1].write_bytes(content if kept > 0.5 else content[: int(kept * len(content))])
    clips, reasons = run(folder, *paths, timeout_s=20)
    assert len(clips) + len(reasons) == len(paths)
    assert not any(
        "crashed" in reason or "took longer" in reason or "cannot be decoded" in reason for reason in reasons.values()
    )
    got = dali(clips.paths)
    assert [(p, n, m) for p, n, m in zip(clips.sources, got, clips.frames.tolist(), strict=True) if n != m] == []
