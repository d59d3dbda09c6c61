"""The manifest reader: every form of source, awkward names, and one-line errors."""

import json
import os
import sys

import pytest

from ssast.engine.data.folder import CACHE_FILE
from ssast.engine.data.record import Record
from ssast.engine.data.sources import read_source
from ssast.engine.errors import UserError

INVALID_UTF8 = os.fsdecode(b"bad\xff\xfename.wav")
AWKWARD = [
    "with space.wav",
    "quo\"te's.wav",
    "ünïcödé_語.wav",
    "-dash.wav",
    "new\nline.wav",
    "a,b;c\t.wav",
    INVALID_UTF8,
]


def read_manifest(source):
    return read_source(str(source)).records


def touch(folder, *names, content=b"x"):
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def names(entries, folder):
    return [os.path.relpath(entry.path, folder) for entry in entries]


def message(source):
    with pytest.raises(UserError) as caught:
        read_manifest(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_is_recursive_sorted_and_absolute(tmp_path, monkeypatch):
    touch(tmp_path, "b/z.wav", "b/a.FLAC", "a.ogg", "c/d/e/f.Mp3", "B.opus", "notes.txt", "c/labels.csv")
    touch(tmp_path, "x.wav/inside.wav")  # a folder named like a clip
    expected = sorted(["b/z.wav", "b/a.FLAC", "a.ogg", "c/d/e/f.Mp3", "B.opus", "x.wav/inside.wav"])
    monkeypatch.chdir(tmp_path.parent)
    entries = read_manifest(tmp_path.name)
    assert entries == [Record(str(tmp_path / name)) for name in expected]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_names_in_every_form(tmp_path, name):
    touch(tmp_path, name)
    path = os.path.join(tmp_path, name)
    assert [e.path for e in read_manifest(tmp_path)] == [path]
    raw = os.fsencode(name)
    quoted = b'"' + raw.replace(b'"', b'""') + b'"'
    (tmp_path / "list.csv").write_bytes(b"label,path\r\ndog," + quoted + b"\r\n")
    assert read_manifest(tmp_path / "list.csv") == [Record(path, ("dog",))]
    (tmp_path / "list.json").write_text(json.dumps({"data": [{"wav": name, "labels": "/m/1,/m/2"}]}))
    assert read_manifest(tmp_path / "list.json") == [Record(path, ("/m/1", "/m/2"))]
    if "\n" not in name:
        (tmp_path / "list.txt").write_bytes(raw + b"\r\n\n")
        assert read_manifest(tmp_path / "list.txt") == [Record(path)]


def test_unknown_extensions_are_told_by_their_first_bytes(tmp_path):
    audio = {
        "riff": b"RIFF\0\0\0\0WAVE", "flac.bin": b"fLaC\0\0", "ogg": b"OggS\0", "id3.x": b"ID3\4",
        "mpeg": b"\xff\xfb\x90\0",
        "adts.1": b"\xff\xf1\x50", "mp4": b"\0\0\0\x20ftypM4A ", "webm.part": b"\x1aE\xdf\xa3",
        "aiff": b"FORM\0\0\0\0AIFF",
    }  # fmt: skip
    other = {"text": b"hello", "utf16": b"\xff\xfeh\0i\0", "jpeg.jpg": b"\xff\xd8\xff\xe0", "none": b"", "one": b"\xff"}
    for name, content in {**audio, **other}.items():
        touch(tmp_path, name, content=content)
    assert names(read_manifest(tmp_path), tmp_path) == sorted(audio)


def test_links_are_followed_once_and_loops_cut(tmp_path):
    touch(tmp_path / "elsewhere", "far.wav")
    root = tmp_path / "root"
    touch(root, "sub/near.wav")
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to(root / "sub")
    (root / "again").symlink_to(root / "sub")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "clip.wav").symlink_to(tmp_path / "elsewhere" / "far.wav")
    (root / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe.wav")
    os.mkfifo(root / "pipe")  # opening it would block
    assert names(read_manifest(root), root) == ["clip.wav", "gone.wav", "out/far.wav", "pipe.wav", "sub/near.wav"]


def test_a_cache_of_converted_copies_is_no_data(tmp_path):
    touch(tmp_path, "a.wav", f"cache/{CACHE_FILE}", "cache/converted/copy.flac")
    assert names(read_manifest(tmp_path), tmp_path) == ["a.wav"]


def test_unreadable_folders_are_a_warning(tmp_path, monkeypatch):
    touch(tmp_path, "a.wav", "locked/b.wav")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = read_source(str(tmp_path))
    assert names(source.records, tmp_path) == ["a.wav"]
    assert source.remarks == [f"1 unreadable folders left out, the first is {tmp_path}/locked"]


@pytest.mark.parametrize("column", ["path", "wav", "file", "filename", "audio", "audio_path", " Path "])
@pytest.mark.parametrize("label", ["label", "labels", "category"])
def test_tables(tmp_path, column, label):
    rows = f'{column},n,{label},split\n"a, b.wav",1,"dog,cat",train\n/abs/c.wav,2,,\n\nd.wav,3,"",valid\n'
    (tmp_path / "m.csv").write_text("\ufeff" + rows)
    expected = [
        Record(f"{tmp_path}/a, b.wav", ("dog", "cat"), "train"),
        Record("/abs/c.wav"),
        Record(f"{tmp_path}/d.wav", (), "valid"),
    ]
    assert read_manifest(tmp_path / "m.csv") == expected
    (tmp_path / "m.tsv").write_text("path\tlabel\na,b.wav\tx\n")
    assert read_manifest(str(tmp_path / "m.tsv")) == [Record(f"{tmp_path}/a,b.wav", ("x",))]


def test_json_forms(tmp_path):
    rows = [
        {"wav": "/a.wav", "labels": "x"},
        {"wav": "sub/b.wav"},
        {"wav": "c.wav", "labels": ["x", "y"]},
        {"wav": "d", "labels": None},
    ]
    (tmp_path / "m.json").write_text("\ufeff" + json.dumps({"data": rows}), encoding="utf-8")
    expected = [
        Record("/a.wav", ("x",)),
        Record(f"{tmp_path}/sub/b.wav"),
        Record(f"{tmp_path}/c.wav", ("x", "y")),
        Record(f"{tmp_path}/d"),
    ]
    assert read_manifest(tmp_path / "m.json") == expected


def test_errors_are_one_line_and_say_what(tmp_path):
    def manifest(name, content):
        (tmp_path / name).write_bytes(content)
        return message(tmp_path / name)

    assert "no such file or folder: /nowhere/x" in message("/nowhere/x")
    assert "no such file or folder" in message("/nowhere/x.csv")
    assert "line 1 column 11" in manifest("m.json", b'{"data": [,]}')
    assert "SSAST form" in manifest("m.json", b"[1]")
    assert 'entry 1 of "data" has no "wav"' in manifest("m.json", b'{"data": [{"wav": "a"}, {"labels": "x"}]}')
    assert "its columns are name, length" in manifest("m.csv", b"name,length\na,1\n")
    assert "line 3: the path is missing" in manifest("m.csv", b"label,path\nx,a.wav\ny,\n")
    assert "line 3: 1 fields under 2 columns" in manifest("m.csv", b"label,path\nx,a.wav\ny\n")
    assert "malformed table" in manifest("m.csv", b'path\n"a.wav\nb.wav\n')
    for empty in (
        ("m.csv", b""),
        ("m.csv", b"path\n"),
        ("m.tsv", b"path\n\n"),
        ("m.txt", b"\n \n"),
        ("m.json", b'{"data": []}'),
    ):
        assert "is empty" in manifest(*empty)
    touch(tmp_path / "f", "a.txt", "b/c.txt")
    assert f"no audio files found in {tmp_path}/f (2 other files seen)" in message(tmp_path / "f")
    deep = b"[" * sys.getrecursionlimit() * 50
    assert "malformed JSON" in manifest("m.json", deep)
