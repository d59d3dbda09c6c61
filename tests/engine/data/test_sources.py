"""What names, tables, tars and folders say of clips, in the forms in which people have them; an error where they say
nothing.
"""

import csv
import io
import json
import tarfile
import unicodedata

import numpy as np
import pytest
import soundfile

from ssast.engine.data.prepare import main as prepare
from ssast.engine.data.record import Record, join_labels, split_labels
from ssast.engine.data.shards import open_shards
from ssast.engine.data.sound import find_recordings, read_recordings
from ssast.engine.data.sources import read_all, read_source
from ssast.engine.errors import UserError
from ssast.engine.finetune.labels import read_labelled
from ssast.engine.twins import missing_file

RATE = 16_000


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def write_wav(path, seconds=1.0):
    """A ramp, whose values say where they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.arange(round(seconds * RATE)).astype(np.int16), RATE, subtype="PCM_16")


def tar(path, **members):
    """Members are named by the keys of a dict, in their order."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def labels(source):
    return {r.source.rsplit("/", 1)[1]: r.labels for r in source.records}


def by_name(records, root):
    return {r.path.removeprefix(f"{root}/"): (r.labels, r.split, r.fold) for r in records}


def message(call, *arguments, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*arguments, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Labels


@pytest.mark.parametrize(
    "one", [("dog",), ("a", "b"), ("Male speech, man speaking", "Rain"), ('5" disc', "x"), ('a,"b"',), ()]
)
def test_labels_are_the_same_after_a_way_through_text(one):
    assert split_labels(join_labels(one)) == one


def test_commas_separate_in_tables_and_not_in_lists(tmp_path):
    rows = [{"wav": "a.wav", "labels": "x, y"}, {"wav": "b.wav", "labels": ["x, y", "z"]}]
    (tmp_path / "m.json").write_text(json.dumps({"data": rows}))
    assert labels(read_source(str(tmp_path / "m.json"))) == {"a.wav": ("x", "y"), "b.wav": ("x, y", "z")}


def test_a_class_with_a_comma_survives_preparing(tmp_path):
    write_wav(tmp_path / "a.wav")
    write_wav(tmp_path / "b.wav")
    rows = [{"wav": "a.wav", "labels": ["dog, big"]}, {"wav": "b.wav", "labels": ["cat", "quiet"]}]
    (tmp_path / "m.json").write_text(json.dumps({"data": rows}))
    assert prepare([str(tmp_path / "m.json"), "--out", str(tmp_path / "p"), "--workers", "1"]) == 0
    assert [r.labels for r in read_labelled([str(tmp_path / "p")])] == [("dog, big",), ("cat", "quiet")]


@pytest.mark.parametrize("form", ["m.json", "m.jsonl", "a.tar", "metadata.jsonl"])
@pytest.mark.parametrize("label", [{"x": 1}, [["a"]], [{"x": 1}], True, False, [True], float("inf")])
def test_labels_that_are_no_text_are_refused(tmp_path, form, label):
    assert "is no label: a label is a text or a number" in (
        told := message(read_source, labelled(tmp_path, form, label))
    )
    assert {"m.json": "entry 0", "a.tar": "a.tar: a.json"}.get(form, "line 1") in told


@pytest.mark.parametrize("form", ["m.json", "m.jsonl", "a.tar", "metadata.jsonl"])
@pytest.mark.parametrize(
    ("label", "expected"),
    [(3, ("3",)), (0, ("0",)), (1.5, ("1.5",)), (["x", 2, None], ("x", "2")), (None, ()), ("", ()), ([], ())],
)
def test_labels_may_be_numbers_and_none(tmp_path, form, label, expected):
    assert [record.labels for record in read_source(labelled(tmp_path, form, label)).records] == [expected]


def labelled(folder, form, label):
    """A source of one clip, a.wav, with a label as JSON has it."""
    row = json.dumps({"file_name": "a.wav", "label": label})
    if form == "a.tar":
        return tar(folder / form, **{"a.wav": b"x", "a.json": row.encode()})
    touch(folder, "a.wav")
    (folder / form).write_text(f'{{"data": [{row}]}}' if form == "m.json" else row)
    return str(folder if form == "metadata.jsonl" else folder / form)


# Tars


def test_notes_of_names_with_dots_belong_to_their_own_audio(tmp_path):
    numbered = {f"g.{n}.wav": b"a" for n in range(3)} | {f"g.{n}.json": b'{"label": "%d"}' % n for n in range(3)}
    assert labels(read_source(tar(tmp_path / "a.tar", **numbered))) == {f"g.{n}.wav": (str(n),) for n in range(3)}
    versions = {"take 2.0 (clean).wav": b"a", "take 2.0 (clean).cls": b"dog"}
    versions |= {"take 2.1 (clean).wav": b"a", "take 2.1 (clean).cls": b"cat, big"}
    found = labels(read_source(tar(tmp_path / "b.tar", **versions)))
    assert found == {"take 2.0 (clean).wav": ("dog",), "take 2.1 (clean).wav": ("cat, big",)}


def test_a_note_of_a_longer_name_is_none(tmp_path):
    members = {"a.wav": b"a", "a.json": b'{"label": "dog"}', "a.meta.json": b'{"gain": 3}', "b.wav": b"a"}
    members |= {"b.meta.json": b'{"label": "cat"}'}
    source = read_source(tar(tmp_path / "a.tar", **members))
    assert labels(source) == {"a.wav": ("dog",), "b.wav": ()}
    assert source.remarks == ["2 notes belong to no audio member and are not read, the first is a.meta.json"]


def test_a_note_that_two_clips_may_have_is_an_error(tmp_path):
    path = tar(tmp_path / "a.tar", **{"g.0.wav": b"a", "g.1.wav": b"a", "g.json": b"{}"})
    assert "g.json may belong to g.0.wav or to g.1.wav" in message(read_source, path)
    own = tar(tmp_path / "b.tar", **{"g.wav": b"a", "g.1.wav": b"a", "g.json": b'{"label": "x"}'})
    assert labels(read_source(own)) == {"g.wav": ("x",), "g.1.wav": ()}


def test_a_note_may_be_named_after_the_whole_name(tmp_path):
    members = {"a.wav": b"a", "a.wav.json": b'{"label": "dog"}', "a.flac": b"a", "a.flac.cls": b"cat"}
    assert labels(read_source(tar(tmp_path / "a.tar", **members))) == {"a.wav": ("dog",), "a.flac": ("cat",)}


def test_hidden_members_are_no_clips_and_leading_dots_no_names(tmp_path):
    members = {"./x.wav": b"a", "./x.cls": b"dog", "._x.wav": b"a", "__MACOSX/x.wav": b"a", "._x.cls": b"\0\1"}
    source = read_source(tar(tmp_path / "a.tar", **members))
    assert labels(source) == {"x.wav": ("dog",)} and source.remarks == ["3 hidden or system files passed over"]


def test_a_member_that_comes_twice_is_an_error(tmp_path):
    path = str(tmp_path / "a.tar")
    with tarfile.open(path, "w") as file:
        for label in (b"dog", b"cat"):
            for name, content in (("a.wav", b"a"), ("./a.cls", label), ("README", b"x")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    assert "a.wav is there twice" in message(read_source, path)


def test_notes_and_names_in_other_encodings(tmp_path):
    note = '{"label": "caf\u00e9"}'
    members = {"a.wav": b"a", "a.json": note.encode("utf-8-sig"), "b.wav": b"a", "b.json": note.encode("utf-16")}
    members |= {"e\u0301.wav": b"a", "\u00e9.cls": b"dog", "/x/c.wav": b"a", "x/c.cls": b"cat", "metadata.csv": b""}
    source = read_source(tar(tmp_path / "a.tar", **members))
    expected = {"a.wav": ("caf\u00e9",), "b.wav": ("caf\u00e9",), "e\u0301.wav": ("dog",), "c.wav": ("cat",)}
    assert labels(source) == expected
    assert source.remarks == ["metadata.csv is not read: unpack the tar, and give the folder"]


def test_folders_in_a_tar_say_splits(tmp_path):
    typo = tar(tmp_path / "b.tar", **{"train/a.wav": b"a", "tset/b.wav": b"a"})
    assert "the folder tset lies beside train" in message(read_source, typo)
    source = read_source(tar(tmp_path / "a.tar", **{"train/a.wav": b"a", "test/b.wav": b"a"}))
    assert [r.split for r in source.records] == ["train", "test"]


# Tables


def table(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", 'path,labels\na.wav,"dog,loud"\n'),
        ("m.csv", 'path, labels\r\na.wav, "dog,loud"\r\n'),
        ("m.csv", "\ufeffpath;labels\na.wav;dog,loud\n"),
        ("m.csv", 'sep=;\npath;labels\na.wav;"dog, loud"\n'),
        ("m.csv", "path\tlabels\na.wav\tdog,loud\n"),
        ("m.csv", 'path,labels\na.wav,"dog,loud"\n'.encode("utf-16")),
        ("m.tsv", "path\tlabels\na.wav\tdog,loud\r\n"),
        ("m.tsv", '\ufeffpath\tlabels\na.wav\t"dog,loud"\n'),
        ("m.jsonl", '{"file_name": "a.wav", "labels": ["dog", "loud"]}\n\n'),
    ],
)
def test_dialects_of_tables(tmp_path, name, content):
    assert read_source(table(tmp_path, name, content)).records == [Record(f"{tmp_path}/a.wav", ("dog", "loud"))]


def test_a_lone_quote_is_text_where_the_dialect_has_no_quotes(tmp_path):
    lines = 'path\tsentence\tlabel\na.wav\t"Well, he said\tdog\nb.wav\tno quote\tcat\n'
    source = read_source(table(tmp_path, "m.tsv", lines))
    assert labels(source) == {"a.wav": ("dog",), "b.wav": ("cat",)}
    assert source.unread == ("sentence",) and source.notes == ["columns that are not read: sentence"]
    assert "malformed table" in message(
        read_source, table(tmp_path, "m.csv", lines.replace("\t", ",").replace("Well,", ","))
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.csv", "path,labels\na.wav,dog,loud\n", "line 2: 3 fields under 2 columns"),
        ("m.csv", 'path,labels\n\na.wav,"dog,\nloud"\nb.wav\n', "line 5: 1 fields under 2 columns"),
        ("m.tsv", "path\tlabels\na.wav\tx\nb.wav\tx\ty\n", "line 3: 3 fields under 2 columns"),
        ("m.csv", "path,label,label\na.wav,dog,cat\n", "the column label is there twice"),
        ("m.csv", "path,start,end\na.wav,1.5,1\n", "line 2: the clip ends at 1 s"),
        ("m.csv", "path,start,end\na.wav,0:05,0:10\n", "line 2: '0:05' is no number of seconds"),
        ("m.csv", "path,start,end\na.wav,nan,10\n", "'nan' is no number of seconds"),
        ("m.csv", "path,start_sample,num_frames\na.wav,1,2\n", "the column start_sample is not read"),
        ("m.csv", "clip,label\na.wav,dog\n", "its columns are clip, label"),
        ("m.jsonl", '{"path": "a.wav"}\n{\n', "line 2"),
        ("m.jsonl", "[1]\n", "line 1: no JSON object"),
    ],
)
def test_tables_that_mean_nothing_are_errors_with_a_line(tmp_path, name, content, expected):
    assert expected in message(read_source, table(tmp_path, name, content))


def test_a_table_without_labels_lists_its_columns(tmp_path):
    path = table(tmp_path, "m.csv", "path,klass,age\na.wav,dog,3\n")
    assert "its columns are path, klass, age" in message(read_labelled, [path])


@pytest.mark.parametrize(
    ("header", "row", "span"),
    [
        ("start,end", "0.5,1", (0.5, 1.0)),
        ("offset,duration", "0.25,0.5", (0.25, 0.75)),
        ("onset,offset", "0.25,0.5", (0.25, 0.5)),
        ("start_time,duration", "1,2", (1.0, 3.0)),
        ("Start,End", ",", (0.0, float("inf"))),
        ("duration,age", "3,4", (0.0, float("inf"))),
    ],
)
def test_spans_of_files(tmp_path, header, row, span):
    (record,) = read_source(table(tmp_path, "m.csv", f"path,{header}\na.wav,{row}\n")).records
    assert (record.start, record.end) == span and record.is_segment == (span != (0.0, float("inf")))


def test_only_the_named_part_of_a_file_is_used(tmp_path):
    write_wav(tmp_path / "a.wav")
    path = table(
        tmp_path, "m.csv", "path,start,end,label\na.wav,0,0.5,x\na.wav,0.5,1,y\na.wav,0.5,1.05,z\na.wav,0,3,w\n"
    )
    records = find_recordings([path])
    sounds = []
    for blocks in read_recordings(records[:3], RATE):
        sounds.append(np.concatenate(list(blocks)))
    whole = np.arange(RATE).astype(np.int16)
    for sound, (first, last) in zip(sounds, [(0, 8000), (8000, 16000), (8000, 16000)], strict=True):
        assert np.array_equal(sound, whole[first:last])
    assert prepare([path, "--out", str(tmp_path / "p"), "--workers", "1"]) == 0
    clips = open_shards(tmp_path / "p")
    found = sorted(
        (record.labels[0], int(frames)) for record, frames in zip(clips.records(), clips.frames, strict=True)
    )
    assert found == [("x", 8000), ("y", 8000), ("z", 8000)]
    with open(tmp_path / "p" / "rejected.csv") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == [
            "the clip is named as from 0 s to 3 s, but the file has 1 s"
        ]


# Folders


def test_what_is_hidden_is_no_clip_and_counted(tmp_path):
    touch(tmp_path, "dog/1.wav", "cat/2.wav", "dog/.ipynb_checkpoints/1.wav", ".Trash-1000/files/3.wav", "@eaDir/1.wav")
    touch(tmp_path, "__MACOSX/dog/._1.wav", "dog/._1.wav", "lost+found/x.wav", "#recycle/y.wav", "Thumbs.db")
    touch(tmp_path, "dog/1.wav~", "$RECYCLE.BIN/z.wav")
    source = read_source(str(tmp_path), classes=True)
    assert by_name(source.records, tmp_path) == {"dog/1.wav": (("dog",), "", ""), "cat/2.wav": (("cat",), "", "")}
    assert source.remarks == ["10 hidden or system files and folders passed over"]
    (tmp_path / "list.txt").write_text("dog/1.wav\ndog/._1.wav\n./.Trash-1000/files/3.wav\n")
    listed = read_source(str(tmp_path / "list.txt"))
    assert [r.path for r in listed.records] == [f"{tmp_path}/dog/1.wav"]
    assert listed.remarks == ["2 hidden or system files passed over"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/dog/x.wav", (("dog",), "train", "")),
        ("dog/Validation/x.wav", (("dog",), "valid", "")),
        ("dog/fold_3/x.wav", (("dog",), "", "3")),
        ("fold2/eval/dog/deep/x.wav", (("dog",), "test", "2")),
        ("folder1/x.wav", (("folder1",), "", "")),
    ],
)
def test_names_of_splits_and_folds_are_no_classes(tmp_path, name, expected):
    touch(tmp_path, name, "rain/y.wav")
    assert by_name(read_source(str(tmp_path), classes=True).records, tmp_path)[name] == expected


def test_splits_within_one_folder(tmp_path):
    touch(tmp_path, "data/train/dog/a.wav", "data/test/cat/b.wav")
    found = by_name(read_source(str(tmp_path), classes=True).records, tmp_path)
    assert found == {"data/train/dog/a.wav": (("dog",), "train", ""), "data/test/cat/b.wav": (("cat",), "test", "")}


def test_splits_without_classes_or_in_one_another_are_errors(tmp_path):
    touch(tmp_path / "a", "train/x.wav", "test/y.wav")
    assert "in that of no class" in message(read_labelled, [str(tmp_path / "a")])
    touch(tmp_path / "b", "train/dog/x.wav", "train/dog/test/y.wav")
    assert "train/dog/test/y.wav: split 'train/test' is none of train" in message(read_labelled, [str(tmp_path / "b")])


@pytest.mark.parametrize("stray", ["tset", "vaild", "devel", "holdout", "extra"])
def test_a_folder_beside_splits_that_is_none_is_no_class(tmp_path, stray):
    touch(tmp_path, "data/train/dog/a.wav", f"data/{stray}/cat/b.wav", "data/train/cat/c.wav")
    expected = f"the folder data/{stray} lies beside train, but its name is none of train, training"
    assert expected in message(read_source, str(tmp_path), classes=True)
    if stray in ("tset", "vaild"):  # nobody names anything else so
        assert expected in message(read_source, str(tmp_path))
    else:
        assert f"the folder data/{stray} lies beside train" in read_source(str(tmp_path)).remarks[0]


def test_classes_that_are_called_like_splits_are_refused(tmp_path):
    touch(tmp_path, "train_set/dog/a.wav", "TestSet/dog/b.wav")
    assert "TestSet, train_set look like splits" in message(read_source, str(tmp_path), classes=True)
    touch(tmp_path, "boat_set/c.wav")
    assert len(read_source(str(tmp_path), classes=True).rows) == 3


def test_metadata_without_labels_is_named_where_classes_are_missing(tmp_path):
    touch(tmp_path, "train/a.wav")
    (tmp_path / "metadata.csv").write_text("file_name,class\ntrain/a.wav,dog\n")
    assert "none of its columns file_name, class is one of label" in message(read_source, str(tmp_path), classes=True)


def test_absent_files_of_metadata_are_named_as_they_are_written(tmp_path):
    touch(tmp_path, "in/a.wav")
    for name, shown in (("/elsewhere/a.wav", "/elsewhere/a.wav"), ("sub/x.wav", "sub/x.wav")):
        (tmp_path / "in" / "metadata.csv").write_text(f"file_name,label\n{name},dog\n")
        assert f"have an audio file, {shown} has none" in message(read_source, str(tmp_path / "in"))


def test_metadata_of_audio_folders(tmp_path):
    for split in ("train", "test"):
        touch(tmp_path / "a" / split, "1.wav", "2.wav")
        (tmp_path / "a" / split / "metadata.csv").write_text("file_name,label\n1.wav,dog\n2.wav,cat\n")
    assert by_name(read_labelled([str(tmp_path / "a")]), tmp_path / "a") == {
        f"{split}/{n}.wav": ((label,), split, "")
        for split in ("train", "test")
        for n, label in ((1, "dog"), (2, "cat"))
    }
    touch(tmp_path / "b", "data/1.flac", "data/2.wav", "data/3.wav")
    rows = [
        {"file_name": "data/1.wav", "label": "dog", "split": "Dev"},
        {"file_name": ".\\data\\2.WAV", "label": "cat"},
    ]
    (tmp_path / "b" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = read_source(str(tmp_path / "b"))
    assert by_name(source.records, tmp_path / "b") == {
        "data/1.flac": (("dog",), "valid", ""),
        "data/2.wav": (("cat",), "", ""),
        "data/3.wav": ((), "", ""),
    }
    assert source.remarks == ["1 audio files are in no metadata list"]
    (tmp_path / "b" / "metadata.jsonl").write_text(
        '{"file_name": "x.wav"}\n{"file_name": "y.wav"}\n{"file_name": "data/2.wav"}'
    )
    assert "only 1 of 3 names that it lists have an audio file, x.wav has none" in message(
        read_source, str(tmp_path / "b")
    )
    (tmp_path / "b" / "metadata.jsonl").unlink()
    (tmp_path / "b" / "metadata.csv").write_text("LJ001-0001|in being comparatively modern.|x\n")
    assert "is not read: it has no column file_name" in read_source(str(tmp_path / "b")).remarks[0]
    touch(tmp_path / "b", "metadata.parquet")
    assert "metadata.parquet is not read: write what it says" in read_source(str(tmp_path / "b")).remarks[0]


def test_a_layout_says_splits_where_no_labels_are_wanted(tmp_path):
    touch(tmp_path, "yes/a_nohash_0.flac", "yes/b_nohash_0.flac", "_background_noise_/n.wav")
    (tmp_path / "validation_list.txt").write_text("")
    (tmp_path / "testing_list.txt").write_text("\ufeff.\\yes\\b_nohash_0.wav\r\n")
    found = {path: split for path, (_, split, _) in by_name(read_all(str(tmp_path)).records, tmp_path).items()}
    assert found == {"yes/a_nohash_0.flac": "train", "yes/b_nohash_0.flac": "test", "_background_noise_/n.wav": ""}
    (tmp_path / "testing_list.txt").write_text("no/b_nohash_0.wav\n")
    assert "testing_list.txt: only 0 of 1 names" in message(read_source, str(tmp_path))


# Names


def test_names_in_another_unicode_form_are_read(tmp_path):
    name = "für_été.wav"
    touch(tmp_path, unicodedata.normalize("NFD", f"é/{name}"))
    path = table(tmp_path, "m.csv", unicodedata.normalize("NFC", f"path\né/{name}\n"))
    (record,) = read_source(path).records
    there = unicodedata.normalize("NFD", f"{tmp_path}/é/{name}")
    assert record.path == there
    assert [r.path for r in read_source(unicodedata.normalize("NFC", there)).records] == [there]
    assert [r.path for r in read_source(f"{tmp_path}/é").records] == [there]


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("A0.WAV", "in other case"),
        ("a0.wav ", "without blanks around it"),
        (".\\a0.wav", "with / for \\"),
        ("sub\\b.wav", "with / for \\"),
        ("Sub/B.wav", "in other case"),
    ],
)
def test_a_missing_file_names_its_twin(tmp_path, name, difference):
    touch(tmp_path, "a0.wav", "sub/b.wav")
    twin = "sub/b.wav" if "ub" in name else "a0.wav"
    assert missing_file(f"{tmp_path}/{name}") == f"no such file: there is {tmp_path}/{twin}, {difference}"
    assert missing_file(f"{tmp_path}/c.wav") == "no such file"


# Splits


@pytest.mark.parametrize("name", ["subset", "Set", "partition", "phase"])
@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "metadata.csv"])
def test_other_names_of_the_split_column(tmp_path, name, form):
    touch(tmp_path, "0.wav", "1.wav", "2.wav")

    def source(*values, **more):
        rows = [{"file_name": f"{n}.wav", name: value, **more} for n, value in enumerate(values)]
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        text = {"json": json.dumps({"data": rows}), "jsonl": "\n".join(map(json.dumps, rows))}.get(
            form, "\n".join(lines)
        )
        path = tmp_path / (form if "." in form else f"m.{form}")
        path.write_text(text)
        return read_source(str(tmp_path if "." in form else path))

    assert [r.split for r in source("Training", "", "eval").records] == ["train", "", "test"]
    assert [r.fold for r in source("fold1", "fold2", "fold1").records] == ["1", "2", "1"]
    for other in (source("train", "small", "test"), source("train", "", "test", split="")):
        assert {r.split for r in other.records} == {""}
        assert form == "metadata.csv" or other.unread == (name,)


def test_slices_are_whole_files(tmp_path):
    lines = ["slice_file_name,fsID,start,end,fold,class", "1-0.wav,1,4.5,8.5,5,siren"]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    (record,) = (source := read_source(str(tmp_path / "m.csv"))).records
    assert (record.path, record.fold, record.is_segment) == (str(tmp_path / "1-0.wav"), "5", False)
    assert source.unread == ("fsID", "start", "end", "class")


def test_one_folder_around_folds_is_no_class(tmp_path):
    touch(tmp_path, "audio/fold1/a.wav", "audio/fold2/b.wav")
    assert "lies in the folder of a split or fold" in message(read_source, str(tmp_path), classes=True)
    touch(tmp_path, "speech/fold1/a.wav", "speech/fold2/b.wav")
    assert {r.labels for r in read_source(str(tmp_path), classes=True).records} == {("audio",), ("speech",)}


def test_one_file_under_two_names_is_one_clip(tmp_path):
    touch(tmp_path, "a/x.wav", "b/y.wav")
    (tmp_path / "m.csv").write_text("path,label,split\na/x.wav,dog,train\n./b/../a/x.wav,dog,test\nb/y.wav,cat,train\n")
    assert read_source(str(tmp_path / "m.csv")).rows[1].path == str(tmp_path / "a" / "x.wav")
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b" / "deep", target_is_directory=True)
    (tmp_path / "m.csv").write_text("path\nlink/../y.wav\n")
    assert read_source(str(tmp_path / "m.csv")).rows[0].path == f"{tmp_path}/link/../y.wav"


@pytest.mark.parametrize("form", ["m.csv", "shards"])
def test_a_split_that_is_none_is_an_error_where_it_matters(tmp_path, form):
    for number in range(3):
        write_wav(tmp_path / f"{number}.wav", 0.1)
    path = table(tmp_path, "m.csv", "path,label,split\n0.wav,a,train\n1.wav,b,tset\n2.wav,b, Testing \n")
    if form == "shards":
        assert prepare([path, "--out", str(tmp_path / "p"), "--workers", "1"]) == 0
        path = str(tmp_path / "p")
    source = read_source(path)
    assert [r.split for r in source.records] == ["train", "tset", "test"]
    told = message(source.check_splits)
    assert "1.wav: split 'tset' is none of train, training; valid, validation, val, dev; test, testing, eval" in told
    assert message(read_labelled, [path]) == told
