"""What a source may be: files, tars with and without labels, manifests with speakers, and the layouts of known data
sets.
"""

import io
import json
import os
import tarfile

import pytest

from ssast.engine.data.layouts import LAYOUTS
from ssast.engine.data.record import Record
from ssast.engine.data.sources import read_source
from ssast.engine.errors import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def found(root, layout="auto"):
    """(how it was read, {path relative to the root: (label, speaker, split)}, remarks)."""
    source = read_source(str(root), layout)
    assert all((r.path, r.offset, r.size) == (r.source, -1, -1) for r in source.records)
    return (
        source.kind,
        {os.path.relpath(r.path, root): (r.label_text, r.speaker, r.split_text) for r in source.records},
        source.remarks,
    )


def message(source, layout="auto"):
    with pytest.raises(UserError) as caught:
        read_source(str(source), layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def esc50(root):
    touch(root, "audio/1-2-A-0.wav", "audio/5-9-B-3.wav")
    (root / "meta").mkdir()
    header = "filename,fold,target,category,esc10,src_file,take"
    rows = f"{header}\n1-2-A-0.wav,1,0,dog,True,2,A\n5-9-B-3.wav,5,3,rain,False,9,B\n"
    (root / "meta" / "esc50.csv").write_text(rows)
    return {"audio/1-2-A-0.wav": ("dog", "", "fold1"), "audio/5-9-B-3.wav": ("rain", "", "fold5")}


def librispeech(root):
    names = [
        "train-clean-100/103/1240/103-1240-0000.flac",
        "dev-other/116/2/116-2-0001.flac",
        "test-clean/61/70/61-70-0002.flac",
    ]
    touch(root / "LibriSpeech", *names, "SPEAKERS.TXT", "train-clean-100/103/1240/103-1240.trans.txt")
    notes = [("", "103", "train"), ("", "116", "valid"), ("", "61", "test")]
    return {f"LibriSpeech/{name}": note for name, note in zip(names, notes, strict=True)}


def speech_commands(root):
    touch(
        root,
        "yes/0a7c2a8d_nohash_0.wav",
        "yes/1b_nohash_1.wav",
        "no/1b_nohash_0.wav",
        "_background_noise_/pink_noise.wav",
    )
    (root / "validation_list.txt").write_text("yes/1b_nohash_1.wav\n")
    (root / "testing_list.txt").write_text("no/1b_nohash_0.wav\n")
    return {
        "yes/0a7c2a8d_nohash_0.wav": ("yes", "0a7c2a8d", "train"),
        "yes/1b_nohash_1.wav": ("yes", "1b", "valid"),
        "no/1b_nohash_0.wav": ("no", "1b", "test"),
    }


def voxceleb1(root):
    names = [f"wav/id{10000 + n}/vid_{n}/0000{n}.wav" for n in (1, 2, 3, 4)]
    touch(root, *names, "wav/stray.wav")
    (root / "iden_split.txt").write_text("".join(f"{n} {name[4:]}\n" for n, name in enumerate(names[:3], 1)))
    return {
        name: (name[4:11], name[4:11], split) for name, split in zip(names, ("train", "valid", "test", ""), strict=True)
    }


def iemocap(root):
    turns = [("Ses01F_impro01_F000", "neu"), ("Ses01F_impro01_M001", "exc"), ("Ses01F_impro01_M002", "xxx")]
    lines = [
        f"[{n}.2901 - {n}.8357]\t{turn}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()"
        for n, (turn, label) in enumerate(turns)
    ]
    for number, script in ((1, "Ses01F_impro01"), (5, "Ses05M_script01_1b")):
        names = [turn for turn, _ in turns] if number == 1 else [f"{script}_F003"]
        touch(root, *(f"Session{number}/sentences/wav/{script}/{name}.wav" for name in names))
        (root / f"Session{number}/dialog/EmoEvaluation").mkdir(parents=True)
    (root / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt").write_text(
        "% [START_TIME - END_TIME] TURN_NAME\n\n" + "\n\n".join(lines)
    )
    last = "[0.1 - 2.0]\tSes05M_script01_1b_F003\tang\t[1.0, 4.0, 4.0]\n"
    (root / "Session5/dialog/EmoEvaluation/Ses05M_script01_1b.txt").write_text(last)
    base = "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01"
    return {
        f"{base}_F000.wav": ("neu", "Ses01F", "fold1"),
        f"{base}_M001.wav": ("hap", "Ses01M", "fold1"),
        "Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_F003.wav": ("ang", "Ses05F", "fold5"),
    }


def audioset(root):
    names = [
        "a/--PJHxphWEs.wav",
        "a/Y-0RWZT-miFs.m4a",
        "a/YAbcdefghij_30.000_40.000.flac",
        "b/Y1YAbcdefghi_30000.wav",
        "b/unheard_of_1.wav",
    ]
    touch(root, *names)
    rows = [
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
        '-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"',
        'gone_gone_1, 0, 10, "/m/1"',
    ]
    heads = [
        "# Segments csv created Sun Mar  5 10:54:31 2017",
        "# num_ytids=22160, num_segs=22160",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    (root / "balanced_train_segments.csv").write_text("\n".join([*heads, *rows]) + "\n")
    (root / "eval_segments.csv").write_text(
        '# a\nYAbcdefghij, 30.000, 40.000, "/m/2"\n1YAbcdefghi, 30.000, 40.000, "/m/3"\n'
    )
    notes = (
        ("/m/09x0r,/t/dd00088", "", "train"),
        ("/m/03v3yw,/m/0k4j", "", "train"),
        ("/m/2", "", "test"),
        ("/m/3", "", "test"),
    )
    return dict(zip(names, notes, strict=False))


REMARKS = {
    "speech_commands": ["1 files of background noise left out"],
    "voxceleb1": ["1 audio files outside folders of speakers (idXXXXX) left out"],
    "iemocap": ["1 turns of other emotions left out; the classes are ang, hap, neu, sad"],
    "audioset": ["1 audio files left out: not in the lists", "1 of 5 listed segments have no audio file"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised_and_carry_labels_speakers_and_splits(tmp_path, name):
    expected = globals()[name](tmp_path)
    assert found(tmp_path) == found(tmp_path, name) == (name, expected, REMARKS.get(name, []))
    kind, plain, _ = found(tmp_path, "plain")
    assert kind == "folder" and set(expected) <= set(plain) and set(plain.values()) == {("", "", "")}
    for other in set(LAYOUTS) - {name}:
        assert f"does not look like {other}" in message(tmp_path, other)


def test_an_unknown_layout_is_named(tmp_path):
    touch(tmp_path, "a.wav")
    assert message(tmp_path, "esc51").startswith("layout 'esc51' is none of auto, plain, esc50, ")


def test_a_part_of_librispeech_alone(tmp_path):
    librispeech(tmp_path)
    part = tmp_path / "LibriSpeech" / "dev-other"
    assert found(part) == ("librispeech", {"116/2/116-2-0001.flac": ("", "116", "valid")}, [])


def test_voxceleb_without_its_list(tmp_path):
    touch(tmp_path, "vox1_dev_wav/wav/id10001/v/00001.wav")
    expected = {"vox1_dev_wav/wav/id10001/v/00001.wav": ("id10001", "id10001", "")}
    assert found(tmp_path) == ("voxceleb1", expected, ["no iden_split.txt: no splits"])


def test_manifests_carry_speakers(tmp_path):
    (tmp_path / "m.csv").write_text("path,speaker,label,split\na.wav,anna,x,valid\nb.wav,,y,\n")
    (tmp_path / "m.json").write_text(json.dumps({"data": [{"wav": "a.wav", "labels": "x", "speaker": 7}]}))
    a, b = str(tmp_path / "a.wav"), str(tmp_path / "b.wav")
    assert read_source(str(tmp_path / "m.csv")).records == [Record(a, ("x",), "valid", "anna"), Record(b, ("y",))]
    assert read_source(str(tmp_path / "m.json")).records == [Record(a, ("x",), "", "7")]


def test_tars(tmp_path):
    path = tmp_path / "set.tar"
    contents = {
        "a/one.flac": b"first", "a/one.json": b'{"label": "x", "speaker": "s", "split": "valid", "text": "so it goes"}',
        "a/two.cls": b"7\n", "a/two.wav": b"second", "two.txt": b" dog ", "two.ogg": b"third",
        "plain.mp3": b"fourth", "broken.json": b"{",
        "broken.opus": b"",
        "a/pictures.png": b"no audio", "list.json": b'{"labels": ["x", "y"], "speaker": '
                                                    b'null}', "list.seg0.wav": b"sixth",
    }  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("folder.wav")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = read_source(str(path))
    assert source.kind == "tar"
    raw = path.read_bytes()
    for r in source.records:
        name = r.source.removeprefix(f"{path}/")
        assert r.path == str(path) and raw[r.offset : r.offset + r.size] == contents[name]
    notes = {r.source.removeprefix(f"{path}/"): (r.label_text, r.speaker, r.split_text) for r in source.records}
    assert notes == {
        "a/one.flac": ("x", "s", "valid"), "a/two.wav": ("7", "", ""), "two.ogg": ("dog", "", ""), "plain.mp3": ("",
        "", ""),
        "broken.opus": ("", "", ""), "list.seg0.wav": ("x,y", "", ""),
    }  # fmt: skip


def test_single_files_are_sources_and_errors_say_what_to_do(tmp_path):
    touch(tmp_path, "a.wav", "b.tar", "c.tar.gz", "d.zip", "e/notes.md")
    assert found(tmp_path / "a.wav") == ("file", {".": ("", "", "")}, [])
    assert "no such file or folder" in message(tmp_path / "gone.wav")
    assert "no such file or folder" in message(tmp_path / "gone.tar")
    assert "cannot be read as an uncompressed tar" in message(tmp_path / "b.tar")
    assert "unpack it first" in message(tmp_path / "c.tar.gz") and "unpack it first" in message(tmp_path / "d.zip")
    assert "no audio files found" in message(tmp_path / "e")
    assert "is for folders" in message(tmp_path / "a.wav", "esc50")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "e" / "notes.md", "notes.md")
    assert "no audio files found (1 other members seen)" in message(tmp_path / "b.tar")
