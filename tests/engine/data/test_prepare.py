"""`ssast prepare`: what goes in comes out, in any number of processes, after any interruption; and whatever is wrong is
said.
"""

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from ssast.engine.data import extract, prepare, prepared_folder
from ssast.engine.data.extract import Extraction, cut, to_int16
from ssast.engine.data.prepare import Settings, main
from ssast.engine.data.probe import Reject
from ssast.engine.data.shards import load_index, verify
from ssast.engine.errors import UserError

RATE = 16_000


def noise(seconds, seed=0, rate=RATE):
    return np.random.default_rng(seed).integers(-9000, 9000, round(seconds * rate), dtype=np.int16)


def encode(path, signal, rate, codec):
    """Writes `signal` [n] by FFmpeg's encoder `codec` into the container that the name asks for."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", bit_rate=96_000)
        frame = av.AudioFrame.from_ndarray(signal[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format.name, "mono", rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def run(out, *sources, **changes):
    """Prepares `sources` into `out` by one process."""
    limits = {name: changes.pop(name) for name in ("workers", "timeout_s", "memory") if name in changes}
    settings = Settings([str(source) for source in sources], **{"max_length": 60.0, **changes})
    return prepare.prepare(settings, out, **{"workers": 1, "progress": False, **limits})


def refused(out, *sources, **changes):
    with pytest.raises(UserError) as caught:
        run(out, *sources, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(out):
    """Rows of the index, by its definition: numbers and texts by name."""
    index = {path.name: np.load(path, mmap_mode="r") for path in (out / "index").iterdir()}
    rows = []
    for row in range(len(index["shard.npy"])):
        numbers = {name: int(index[f"{name}.npy"][row]) for name in ("shard", "offset", "size", "samples", "crc32")}
        spans = {
            name: index[f"{name}.offsets.npy"][row : row + 2] for name in ("key", "label", "speaker", "split", "source")
        }
        texts = {
            name: bytes(index[f"{name}.utf8.npy"][a:b]).decode("utf-8", "surrogateescape")
            for name, (a, b) in spans.items()
        }
        rows.append(numbers | texts)
    return rows


def audio(out, row):
    """int16 [S] of a row of the index."""
    with open(out / "shards" / f"{row['shard']:05d}.tar", "rb") as file:
        file.seek(row["offset"])
        content = file.read(row["size"])
    assert zlib.crc32(content) == row["crc32"]
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == json.loads((out / "dataset.json").read_text())["sample_rate"] and samples.shape == (row["samples"],)
    return samples


def rejected(out):
    with open(out / "rejected.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "reason"]
    return {os.path.basename(path): reason for path, reason in rows}


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture
def recordings(tmp_path):
    """Twelve recordings of two seconds, stereo at 44.1 kHz, so that they take a while."""
    for n in range(12):
        soundfile.write(
            tmp_path / f"src {n}.wav", np.stack([noise(2, n, 44_100), noise(2, -n % 97, 44_100)], axis=1), 44_100
        )
    (tmp_path / "m.csv").write_text("path,label\n" + "".join(f"src {n}.wav,class {n % 3}\n" for n in range(12)))
    return tmp_path / "m.csv"


EACH_ALONE = {"shard_size": 1}


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_round_trip(tmp_path, codec):
    exact = {"a.wav": noise(0.5), "b.flac": noise(1.2, 1)}
    for name, samples in exact.items():
        soundfile.write(tmp_path / name, samples, RATE)
    t = np.arange(2 * 44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * (300 + 100 * t) * t)
    stereo = np.stack([1.6 * tone, 0.4 * tone], axis=1)  # the first clips in no file of floats
    soundfile.write(tmp_path / "c.ogg", tone, 44_100)
    soundfile.write(tmp_path / "d.wav", stereo, 44_100, subtype="FLOAT")
    encode(tmp_path / "e.mp3", tone, 44_100, "libmp3lame")
    encode(tmp_path / "f.m4a", tone, 44_100, "aac")
    awkward = os.fsdecode(b"g \xff \"',.wav")
    with open(tmp_path / awkward, "wb") as file:
        soundfile.write(file, 1.5 * np.ones(8000), RATE, format="WAV", subtype="FLOAT")
    (tmp_path / "h.wav").write_bytes(b"RIFF")
    names = ["a.wav", "b.flac", "c.ogg", "d.wav", "e.mp3", "f.m4a", awkward, "h.wav", "gone.wav"]
    rows = [[name, f"label {n},übel", f"speaker {n}", "valid" if n % 2 else "train"] for n, name in enumerate(names)]
    with open(tmp_path / "m.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["path", "label", "speaker", "split"], *rows])
    out = tmp_path / "out"
    summary = run(out, tmp_path / "m.csv", codec=codec)
    assert (summary["clips"], summary["sources"], summary["rejected"], summary["shards"]) == (7, 7, 2, 1)
    assert rejected(out) == {"gone.wav": "no such file", "h.wav": "not audio: format not recognised"}

    found = {os.path.basename(row["source"]): row for row in table(out)}
    assert list(found) == sorted(names[:7])
    for n, name in enumerate(names[:7]):
        row = found[name]
        assert row["source"] == str(tmp_path / name)
        assert (row["label"], row["speaker"], row["split"]) == tuple(rows[n][1:])
    for name, samples in exact.items():
        np.testing.assert_array_equal(audio(out, found[name]), samples)
    assert (audio(out, found[awkward]) == 32767).all(), "saturated, not wrapped round"
    want = soxr.resample(tone, 44_100, RATE, "VHQ") * 32768
    assert np.abs(audio(out, found["d.wav"]) - want).max() < 1
    for name in ("c.ogg", "e.mp3", "f.m4a"):
        got = audio(out, found[name])
        assert abs(len(got) - 2 * RATE) < 0.05 * RATE
        assert max(
            np.correlate(got[5000:25000] / 32768, want[5000 + shift : 25000 + shift] / 32768)[0]
            for shift in range(-1200, 1200, 4)
        ) > 0.9 * (np.square(want[5000:25000] / 32768).sum())

    # As tar and webdataset see it: groups of members of the same key, which has no dots.
    with tarfile.open(out / "shards" / "00000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    groups = [
        {name.partition(".")[2]: content for name, content in group}
        for _, group in itertools.groupby(members, lambda m: m[0].partition(".")[0])
    ]
    assert [set(group) for group in groups] == [{"json", codec}] * 7
    assert subprocess.run(["tar", "tf", out / "shards" / "00000.tar"], capture_output=True, check=True).stderr == b""
    for row, group in zip(table(out), groups, strict=True):
        note = json.loads(group["json"])
        assert note == {name: row[name] for name in ("label", "speaker", "split", "source")} | {
            "start_s": 0,
            "seconds": row["samples"] / RATE,
        }
        if codec == "wav":
            np.testing.assert_array_equal(np.frombuffer(group["wav"][44:], dtype="<i2"), audio(out, row))

    described, stats = (json.loads((out / name).read_text()) for name in ("dataset.json", "stats.json"))
    seconds = np.array([row["samples"] for row in table(out)]) / RATE
    assert (
        described["format"] == 1
        and described["codec"] == codec
        and described["clips"] == sum(s["clips"] for s in described["shards"]) == 7
    )
    assert stats["hours"] == described["hours"] == pytest.approx(seconds.sum() / 3600, abs=1e-4)
    assert (
        stats["seconds"]["median"] == pytest.approx(np.median(seconds), abs=1e-4)
        and sum(stats["histogram"]["clips"]) == 7
    )
    assert len(stats["histogram"]["edges_s"]) == len(stats["histogram"]["clips"]) + 1
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json",
        "index",
        "rejected.csv",
        "shards",
        "stats.json",
    ]
    assert verify(out, 1, progress=False) == (7, [])

    # Again: nothing changes. And a folder of shards is a source like any other.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(out, tmp_path / "m.csv", codec=codec) is None
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    run(tmp_path / "again", out / "shards" / "00000.tar")
    for old, new in zip(table(out), table(tmp_path / "again"), strict=True):
        assert (old["label"], old["speaker"], old["split"]) == (new["label"], new["speaker"], new["split"])
        assert new["source"] == f"{out}/shards/00000.tar/{old['key']}.{codec}"
        np.testing.assert_array_equal(audio(out, old), audio(tmp_path / "again", new))


def test_statistics_are_those_of_the_features(tmp_path):
    import torch

    from ssast.kernels import fbank

    clips = [noise(0.3, 1), noise(0.7, 2), noise(12, 3)]
    for n, samples in enumerate(clips):
        soundfile.write(tmp_path / f"{n}.wav", samples, RATE)
    run(tmp_path / "out", tmp_path / "0.wav", tmp_path / "1.wav", tmp_path / "2.wav")
    heads = [torch.from_numpy(samples[None, : round(10.24 * RATE)]) for samples in clips]
    values = torch.cat([fbank(head, sample_rate=RATE, num_mel_bins=128).flatten() for head in heads]).double()
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["mean"] == pytest.approx(values.mean().item(), abs=2e-4)
    assert stats["std"] == pytest.approx(values.std(correction=0).item(), abs=2e-4)


def pieces(total, segment, hop, min_length, block=7):
    """(number, first sample, samples) of the pieces of 0, 1, 2 ... coming in blocks that share their memory."""
    settings = Extraction(RATE, "wav", segment, hop, min_length, 1000, 0)

    def blocks():
        memory = np.zeros(block, dtype=np.int16)
        for start in range(0, total, block):
            part = memory[: min(block, total - start)]
            part[:] = np.arange(start, start + len(part))
            yield part

    return [(number, start, samples.tolist()) for number, start, samples in cut(blocks(), settings)]


@pytest.mark.parametrize(
    ("total", "segment", "hop", "min_length", "expected"),
    [
        (25, 10, 10, 3, [(0, 10), (10, 20), (20, 25)]),
        (22, 10, 10, 3, [(0, 10), (10, 20)]),  # what is left is too short
        (20, 10, 10, 1, [(0, 10), (10, 20)]),
        (9, 10, 10, 3, [(0, 9)]),
        (25, 10, 5, 3, [(0, 10), (5, 15), (10, 20), (15, 25)]),  # nothing is left that is not in the last piece
        (26, 10, 5, 3, [(0, 10), (5, 15), (10, 20), (15, 25), (20, 26)]),
        (50, 5, 20, 1, [(0, 5), (20, 25), (40, 45)]),
        (42, 5, 20, 1, [(0, 5), (20, 25), (40, 42)]),
        (40, 5, 20, 1, [(0, 5), (20, 25)]),
    ],
)
def test_segments(total, segment, hop, min_length, expected):
    want = [(number, start, list(range(start, stop))) for number, (start, stop) in enumerate(expected)]
    for block in (1, 3, 7, 100):
        assert pieces(total, segment, hop, min_length, block) == want


def test_whole_recordings_and_limits():
    assert pieces(25, 0, 0, 1) == [(-1, 0, list(range(25)))]
    with pytest.raises(Reject, match="too short: 2 samples at 16000 Hz, the least is 3"):
        pieces(2, 0, 0, 3)
    with pytest.raises(Reject, match=r"longer than 0\.0625 s: cut it up by --segment, or raise --max-length"):
        pieces(1001, 0, 0, 3)
    with pytest.raises(Reject, match=r"longer than 0\.0625 s: raise --max-length"):
        pieces(1001, 10, 10, 3)


def test_segments_in_the_folder(tmp_path):
    samples = noise(2.6)
    soundfile.write(tmp_path / "long.flac", samples, RATE)
    soundfile.write(tmp_path / "short.wav", samples[:100], RATE)
    summary = run(
        tmp_path / "out", tmp_path / "long.flac", tmp_path / "short.wav", segment=1.0, hop=0.5, min_length=0.2
    )
    assert (summary["clips"], summary["sources"]) == (5, 1) and rejected(tmp_path / "out")["short.wav"].startswith(
        "too short"
    )
    rows = table(tmp_path / "out")
    assert len({row["key"] for row in rows}) == 5 and all(re.fullmatch(r"\w+", row["key"]) for row in rows)
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(audio(tmp_path / "out", row), samples[8000 * n : 8000 * n + 16000])


def test_the_resampler_keeps_levels_and_lets_nothing_alias():
    def resampled(hz, rate, block=5000):
        signal = (0.5 * np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate)).astype(np.float32)
        got = np.concatenate(
            list(to_int16(((rate, signal[i : i + block]) for i in range(0, len(signal), block)), RATE))
        )
        assert abs(len(got) - 2 * RATE) <= 1
        return got[RATE // 2 : -RATE // 2] / 32768

    for rate in (44_100, 48_000, 22_050, 8000):
        assert abs(20 * np.log10(resampled(1000, rate).std() * np.sqrt(8))) < 0.001
    for hz in (8050, 8200, 10_000, 15_000, 21_000):
        for rate in (44_100, 48_000):
            assert not resampled(hz, rate).any(), f"{hz} Hz has an image above -96 dB"
    assert abs(20 * np.log10(resampled(7200, 44_100).std() * np.sqrt(8))) < 0.05


def test_samples_that_need_no_change_are_not_changed():
    ramp = np.arange(-32768, 32768, dtype=np.int16)
    np.testing.assert_array_equal(np.concatenate(list(to_int16([(RATE, ramp)], RATE))), ramp)
    (rounded,) = to_int16([(RATE, np.array([0.5, 1.5, -1.6, 40_000, -40_000], dtype=np.float32) / 32768)], RATE)
    assert rounded.tolist() == [0, 2, -2, 32767, -32768]


def test_processes_make_no_difference(tmp_path, recordings):
    one = run(tmp_path / "one", recordings, **EACH_ALONE)
    two = run(tmp_path / "two", recordings, **EACH_ALONE, workers=2)
    assert one == two and one["shards"] == 12
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# Without the model, which takes seconds to import.
KILLED = """
import sys, types
from pathlib import Path
package = sys.modules["ssast.engine"] = types.ModuleType("ssast.engine")
package.__path__ = [{folder!r}]
from ssast.engine.data.prepare import Settings, prepare
prepare(Settings([{source!r}], max_length=60.0, shard_size=1), Path({out!r}), workers=2, progress=False)
"""


def test_kill_9_and_again(tmp_path, recordings):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(whole, recordings, **EACH_ALONE)
    code = KILLED.format(folder=str(Path(prepare.__file__).parents[1]), source=str(recordings), out=str(out))
    kept = {}
    for wanted in (2, 5):  # twice, at different places
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while (
            len(list((out / "shards").glob(".*.json"))) < wanted
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and children
        while any(
            Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()
            for child in children
        ):
            assert time.monotonic() < deadline, "workers outlive their parent"
        assert not (out / "dataset.json").exists()
        for path, before in kept.items():
            assert path.stat().st_mtime_ns == before, "a finished shard was made again"
        kept = {path.with_name(f"{path.stem[1:]}.tar"): 0 for path in (out / "shards").glob(".*.json")}
        kept = {path: path.stat().st_mtime_ns for path in kept}
        assert wanted <= len(kept) < 12
    with pytest.raises(UserError, match=r"is not finished, dataset\.json is missing"):
        verify(out, 1)
    assert f"{out} was made with codec 'wav', now 'flac': choose another folder" in refused(
        out, recordings, **EACH_ALONE, codec="flac"
    )
    assert run(out, recordings, **EACH_ALONE)["clips"] == 12
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert contents(out) == contents(whole)


def test_interrupted_at_the_very_end(tmp_path, recordings, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [str(recordings), "--workers", "1", "--out"]
    assert main([*command, str(whole)]) == 0

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared_folder, "_feature_statistics", interrupt)
        assert main([*command, str(out)]) == 130
    assert "the same command resumes" in capsys.readouterr().err and not (out / "dataset.json").exists()
    monkeypatch.setattr(prepare.Pool, "start", lambda _: pytest.fail("nothing is left to decode"))
    assert main([*command, str(out)]) == 0
    assert contents(out) == contents(whole)


def test_another_run_on_the_same_folder_is_refused(tmp_path, recordings):
    out = tmp_path / "out"
    run(out, recordings)
    before = contents(out)
    message = refused(out, recordings, segment=1.0, hop=1.0, codec="flac")
    assert "codec 'wav', now 'flac'; segment 0.0, now 1.0" in message and "choose another folder" in message
    assert "sources" in refused(out, tmp_path / "src 0.wav")
    recordings.write_text(recordings.read_text().replace("src 3.wav,class 0", "src 3.wav,other"))
    assert "with other names or labels" in refused(out, recordings)
    recordings.write_text(recordings.read_text() + "src 0.wav,more\n")
    assert re.search(r"the recordings: 12 files of \d+ bytes, now 13 of \d+", refused(out, recordings))
    assert contents(out) == before


def test_two_runs_at_once_are_refused(tmp_path, recordings):
    out, settings = tmp_path / "out", Settings([str(recordings)], max_length=60.0)
    first = prepare.Folder(out, settings, prepare.make_plan(settings))
    assert first.begin()
    assert f"another ssast prepare is at work on {out}" in refused(out, recordings)
    first.close()
    assert run(out, recordings)["clips"] == 12


def test_a_run_killed_before_it_wrote_anything_can_be_repeated(tmp_path, recordings):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    assert run(tmp_path / "out", recordings)["clips"] == 12


def test_a_folder_that_another_run_finishes_first_is_left_alone(tmp_path, recordings, monkeypatch):
    out, acquire = tmp_path / "out", prepare.Folder._acquire

    def finish_first(folder):
        monkeypatch.setattr(prepare.Folder, "_acquire", acquire)
        assert run(out, recordings)["clips"] == 12
        acquire(folder)

    monkeypatch.setattr(prepare.Folder, "_acquire", finish_first)
    assert run(out, recordings) is None
    assert {"unfinished.json", ".lock"}.isdisjoint(os.listdir(out))


SABOTEUR = """
import json, os, resource, sys, time, types
package = sys.modules["ssast.engine"] = types.ModuleType("ssast.engine")
package.__path__ = [{folder!r}]
import numpy as np
from ssast.engine.data import extract
decode = extract.decode
def sabotaged(path, size, ear):
    name = os.path.basename(path)
    for samples in decode(path, size, ear):
        yield samples  # half a clip has come when it happens
        if "crash" in name:
            os.abort()
        if "hang" in name:
            time.sleep(100)
        if "greedy" in name:
            np.ones(1 << 33, dtype=np.uint8)
        if "raises" in name:
            raise KeyError("odd")
    if "once" in name and not os.path.exists(path + ".seen"):
        open(path + ".seen", "w").close()
        os.abort()
extract.decode = sabotaged
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
extract._main(extract.Extraction(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def sabotage(tmp_path, monkeypatch):
    """Has workers fail on files of certain names, and write no file longer than `limit` bytes."""

    def arm(limit=0):
        script = tmp_path / "saboteur.py"
        script.write_text(SABOTEUR.format(folder=str(Path(prepare.__file__).parents[1]), limit=limit))
        monkeypatch.setattr(extract, "__file__", str(script))

    return arm


def test_a_crash_a_hang_or_greed_costs_one_file(tmp_path, sabotage):
    names = ["a.wav", "b crash.wav", "c.wav", "d hang.wav", "e greedy.wav", "f once.wav", "g raises.wav", "h.wav"]
    (tmp_path / "src").mkdir()
    for n, name in enumerate(names):
        soundfile.write(tmp_path / "src" / name, noise(1, n), RATE)
    sabotage()
    # of a broken file, no piece stays
    run(tmp_path / "out", tmp_path / "src", workers=2, timeout_s=2, segment=0.3, hop=0.3)
    assert rejected(tmp_path / "out") == {
        "b crash.wav": "decoder crashed (SIGABRT), twice",
        "d hang.wav": "took longer than 2 s, twice",
        "e greedy.wav": "needs more than 4.0 GiB of memory to decode",
        "g raises.wav": "cannot be decoded: KeyError: 'odd'",
    }
    rows = table(tmp_path / "out")
    for n in (0, 2, 5, 7):
        parts = [audio(tmp_path / "out", row) for row in rows if os.path.basename(row["source"]) == names[n]]
        np.testing.assert_array_equal(np.concatenate(parts), noise(1, n))
    assert len(rows) == 4 * len(parts) and verify(tmp_path / "out", 1, progress=False) == (len(rows), [])


def test_a_full_disk_is_one_line_and_costs_nothing_finished(tmp_path, recordings, sabotage, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    soundfile.write(tmp_path / "src 9.wav", noise(9, 0, 44_100), 44_100)  # the last of all, and longer than the others
    run(whole, recordings, **EACH_ALONE)
    original = extract.__file__
    sabotage(limit=200_000)
    message = refused(out, recordings, **EACH_ALONE)
    monkeypatch.setattr(extract, "__file__", original)
    assert re.fullmatch(
        rf"cannot write to {out}/shards: File too large \(\d+ MiB free\): .*run the same command again to resume",
        message,
    )
    finished = {
        path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.tar") if not path.name.startswith(".")
    }
    assert len(finished) == 11
    run(out, recordings, **EACH_ALONE)
    assert contents(out) == contents(whole) and all(
        path.stat().st_mtime_ns == before for path, before in finished.items()
    )


def test_folders_that_cannot_be_used(tmp_path, recordings):
    (tmp_path / "file").write_text("")
    assert f"cannot write to {tmp_path}/file/out: Not a directory" in refused(tmp_path / "file" / "out", recordings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "holds thesis.tex, which no ssast prepare has begun" in refused(tmp_path / "full", recordings)
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    (tmp_path / "empty.wav").write_text("")
    message = refused(tmp_path / "out", tmp_path / "empty.wav")
    assert "none of 1 recordings can be used" in message and f"{tmp_path}/empty.wav: empty file" in message
    assert not (tmp_path / "out" / "dataset.json").exists() and rejected(tmp_path / "out") == {
        "empty.wav": "empty file"
    }


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(1), RATE)
    soundfile.write(tmp_path / "b.wav", noise(1), RATE)
    make_plan = prepare.make_plan

    def late(settings):
        plan = make_plan(settings)
        soundfile.write(tmp_path / "b.wav", noise(2), RATE)
        return plan

    monkeypatch.setattr(prepare, "make_plan", late)
    run(tmp_path / "out", tmp_path / "a.wav", tmp_path / "b.wav")
    assert rejected(tmp_path / "out") == {"b.wav": "changed while it was being read: 64044 bytes instead of 32044"}


def test_verify_finds_whatever_was_changed(tmp_path, recordings):
    out = tmp_path / "out"
    run(out, recordings, shard_size=2 << 20)
    pristine = contents(out)
    shard, row = out / "shards" / "00001.tar", next(row for row in table(out) if row["shard"] == 1)
    faults = []

    def check(*patterns):
        faults[:] = verify(out, 2, progress=False)[1]
        assert len(faults) == len(patterns) and all(map(re.search, patterns, faults)), faults
        for name, content in pristine.items():
            (out / name).write_bytes(content)

    def flip(path, at):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    check()
    flip(shard, row["offset"] + 1000)
    check(rf"00001.tar: {row['key']}: crc32 is \d+, the index says {row['crc32']}", "00001.tar: sha256 differs")
    flip(shard, -1)  # in the padding at the end
    check("00001.tar: sha256 differs")
    flip(shard, row["offset"] - 512)  # the name of a member
    check("00001.tar: .*", "00001.tar: sha256 differs")
    shard.write_bytes(shard.read_bytes()[: row["offset"] + 5000])
    check(
        rf"00001.tar: {row['offset'] + 5000} bytes instead of",
        "00001.tar: (damaged tar|.*crc32).*",
        "00001.tar: sha256 differs",
    )
    shard.unlink()
    check("00001.tar: cannot be read: No such file")
    (out / "shards" / "00009.tar").write_bytes(b"")
    check("00009.tar: not in dataset.json")
    (out / "shards" / "00009.tar").unlink()
    for name, column in [(name, np.array(column)) for name, column in load_index(out)[0].items() if name != "shard"]:
        was, column[-1] = column[-1], column[-1] + 1
        np.save(out / "index" / f"{name}.npy", column)
        also = [f"json: seconds is {was}, the index says {column[-1]}"] * (name == "samples")
        check(f": {name} is {was}, the index says {column[-1]}", *also)
    flip(out / "index" / "label.utf8.npy", -1)
    check(r"json: label is b'class .', the index says b'class .'")
    np.save(out / "index" / "samples.npy", np.zeros(3, dtype=np.int64))
    check(r"samples.npy: int64 \[3\] instead of int64 \[12\]")
    flip(out / "index" / "crc32.npy", 3)
    check("crc32.npy: the index cannot be read")
    assert main(["--verify", str(out), "--workers", "1"]) == 0
    flip(shard, 600)
    assert main(["--verify", str(out), "--workers", "1"]) == 1


def test_command_line(tmp_path, recordings, capsys):
    out = str(tmp_path / "out")
    (tmp_path / "bad.wav").write_text("no audio")
    command = [
        str(recordings),
        str(tmp_path / "bad.wav"),
        "--out",
        out,
        "--segment",
        "0.75",
        "--hop",
        ".5",
        "--shard-size",
        "1M",
        "--workers",
        "1",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "48 clips of 12 recordings, 0.01 hours, 6 shards" in printed
        and f"1 recordings rejected: {out}/rejected.csv" in printed
    )
    assert re.search(r"\n +1 not audio\n", printed)
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    for wrong in (["--out", out], [str(recordings)], ["--verify", out, "--out", out], [str(recordings), "--out", out,
    "--hop", "1"],
                  [str(recordings), "--out", out, "--segment", "nan"], [str(recordings), "--out", out,
                  "--shard-size", "1X"]):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
    assert "--sample-rate 1" in refused(tmp_path / "new", recordings, sample_rate=1)
    assert "--segment is shorter than --min-length" in refused(
        tmp_path / "new", recordings, segment=0.1, hop=0.1, min_length=1.0
    )
    assert not (tmp_path / "new").exists()


def test_corrupt_files_end_as_a_row_or_as_audio(tmp_path, real_audio):
    files = sorted(path for path in (real_audio / "corrupt").iterdir() if path.is_file())
    began = time.monotonic()
    run(tmp_path / "out", real_audio / "corrupt", workers=2, timeout_s=20)
    assert time.monotonic() - began < 60
    reasons = rejected(tmp_path / "out")
    kept = {os.path.basename(row["source"]): audio(tmp_path / "out", row) for row in table(tmp_path / "out")}
    assert set(reasons) | set(kept) == {path.name for path in files} and not set(reasons) & set(kept)
    assert not any(
        "crashed" in reason or "took longer" in reason or "cannot be decoded" in reason for reason in reasons.values()
    )
    for row in csv.DictReader((real_audio / "manifests" / "corrupt.csv").open(encoding="utf-8", newline="")):
        name = os.path.basename(row["path"].rstrip("/"))
        if (
            row["expect"] in ("reject", "reject cleanly")
            or "never train on NaN" in row["expect"]
            or "zero samples" in row["expect"]
        ):
            # FFmpeg finds the rate of this one in the frames; the last is a folder, which holds no audio.
            assert name in reasons or name in ("rate_zero.flac", "directory.wav"), (name, len(kept.get(name, ())))
    for name in ("riff_size_wrong.wav", "wrong_md5.flac"):  # odd, but whole
        np.testing.assert_array_equal(kept[name], soundfile.read(real_audio / "corrupt" / name, dtype="int16")[0])
