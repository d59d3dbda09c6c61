"""Silence and channels that cancel: found in every format, counted, named once, and kept."""

import json

import numpy as np
import pytest
import soundfile

from ssast.engine.data import prepare as prepare_command
from ssast.engine.data.check import check_clips
from ssast.engine.data.clips import Clips
from ssast.engine.data.dataset import clip_statistics
from ssast.engine.data.prepare import Settings, prepare
from ssast.engine.data.record import Record
from ssast.engine.data.remarks import CANCELLED, FLAT, SILENT, Ear, Remarks
from ssast.engine.data.shards import open_shards, print_remarks
from ssast.engine.data.sound import find_recordings, read_recordings

RATE = 16_000
NOISE = np.random.default_rng(4).uniform(-0.4, 0.4, RATE // 2)
STEP = 1 / 32768
SOUNDS = {
    "sound": (NOISE, []),
    "faint": (NOISE * 1e-3, []),
    "one channel of two": (np.stack([NOISE, 0 * NOISE], 1), []),
    "one channel of eight": (np.stack([NOISE, *[0 * NOISE] * 7], 1), []),
    "nearly cancelling": (np.stack([NOISE, -0.9 * NOISE], 1), []),
    "silence": (0 * NOISE, [SILENT]),
    "silent stereo": (np.zeros((len(NOISE), 2)), [SILENT]),
    "an offset alone": (0 * NOISE + 0.25, [SILENT]),
    "the last bit": (np.sign(NOISE) * STEP, [SILENT]),
    "inverted": (np.stack([NOISE, -NOISE], 1), [CANCELLED]),
    "inverted, to a step": (np.stack([NOISE, -NOISE + STEP * np.sign(NOISE)], 1), [CANCELLED]),
    "all but inverted": (np.stack([NOISE, -0.99 * NOISE], 1), [CANCELLED]),
}


@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.parametrize("kind", ["int16", "float32"])
def test_what_is_remarked(name, kind):
    sound, remarks = SOUNDS[name]
    block = sound.reshape(len(sound), -1)
    mono = block.mean(axis=1)
    if kind == "int16":
        block = np.rint(block * 32768).astype(np.int16)
    ear = Ear()
    for start in range(0, len(block), 1000):
        part = block[start : start + 1000]
        ear.hear(part.astype(kind), mono[start : start + 1000] if block.shape[1] > 1 else None)
    assert ear.remarks() == remarks


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Files of silence and of channels that cancel, in formats that are read natively and converted, and of sound."""
    folder = tmp_path_factory.mktemp("quiet")
    inverted = np.stack([NOISE, -NOISE], 1)
    tone = 0.4 * np.sin(np.arange(len(NOISE)) / 5)
    for name, sound, subtype in [
        ("a.wav", 0 * NOISE, None),
        ("b.flac", np.zeros((len(NOISE), 2)), None),
        ("c.wav", 0 * NOISE, "FLOAT"),
        ("d.wav", inverted, None),
        ("e.aiff", inverted, None),
        ("f.flac", inverted, None),
        ("g.wav", NOISE, None),
        ("h.ogg", np.stack([tone, -tone], 1), None),  # of noise, Vorbis keeps no phase
    ]:
        soundfile.write(folder / name, sound, RATE, subtype=subtype)
    return [str(path) for path in sorted(folder.iterdir())]


def require_lines(text: str, what: str, folder: str) -> None:
    """Of three silent and four cancelling recordings."""
    lines = [line for line in text.splitlines() if line.startswith("warning")]
    assert lines == [
        f"warning: 3 {what}, {folder}/a.wav for one: {SILENT}",
        f"warning: 4 {what}, {folder}/d.wav for one: {CANCELLED}",
    ]


def test_the_check_names_them_also_from_its_cache(quiet, tmp_path, capsys):
    folder = quiet[0].rpartition("/")[0]
    for _ in range(2):
        clips, skipped = check_clips([Record(path) for path in quiet], cache_dir=tmp_path / "cache", progress=False)
        assert len(clips) == len(quiet) and not skipped
        require_lines(capsys.readouterr().err, "clips", folder)


def test_prepare_and_training_from_shards_name_them(quiet, tmp_path, capsys):
    folder = quiet[0].rpartition("/")[0]
    assert prepare_command.main([*quiet, "--out", str(tmp_path / "shards"), "--workers", "1"]) == 0
    require_lines(capsys.readouterr().err, "recordings", folder)
    assert len(json.loads((tmp_path / "shards" / "stats.json").read_text())["remarks"]) == 2
    print_remarks(tmp_path / "shards")
    require_lines(capsys.readouterr().err, "recordings", folder)
    (tmp_path / "shards" / "stats.json").write_text("[]")
    print_remarks(tmp_path / "shards")
    assert capsys.readouterr().err == ""


def test_embed_names_them(quiet, capsys):
    for blocks in read_recordings(find_recordings(quiet), RATE):
        assert sum(map(len, blocks)) == len(NOISE)
    require_lines(capsys.readouterr().err, "recordings", quiet[0].rpartition("/")[0])


def test_data_without_deviation(quiet, tmp_path, capsys):
    silent = quiet[:3]
    prepare(Settings(silent, max_length=60.0), tmp_path / "shards", workers=1, progress=False)
    clips: Clips = open_shards(tmp_path / "shards")
    assert clip_statistics(clips, RATE, 128, 8_000, 1)[1] > 0
    assert FLAT in capsys.readouterr().err
    assert prepare_command.main([*silent, "--out", str(tmp_path / "again"), "--workers", "1"]) == 0
    assert FLAT in capsys.readouterr().err


def test_counts_survive_being_written_down():
    remarks, again = Remarks(), Remarks()
    remarks.add("a", ["no size in the header: 1"])
    remarks.add("b", ["no size in the header: 2", SILENT])
    again.add_json(json.loads(json.dumps(remarks.as_json())))
    assert again.lines() == remarks.lines()
    assert remarks.lines()[0] == "warning: 2 recordings, a for one: no size in the header: 1"
    for damaged in (None, 3, [3], [{"text": 1}], {"text": "x"}):
        again.add_json(damaged)
    assert again.lines() == remarks.lines()
