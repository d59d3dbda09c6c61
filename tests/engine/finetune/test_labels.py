"""Labels: read from every kind of source, turned into targets, and what is wrong with them said in a line."""

import json
import warnings

import numpy as np
import pytest
import soundfile

from ssast.engine.data.check import check_clips
from ssast.engine.data.layouts import WANTED_WORDS
from ssast.engine.data.prepare import main as prepare
from ssast.engine.data.record import Record, split_labels
from ssast.engine.data.shards import open_shards
from ssast.engine.data.sources import read_source
from ssast.engine.errors import UserError
from ssast.engine.finetune.labels import Vocabulary, examine, of_clips, read_labelled
from ssast.engine.finetune.splits import Split, check_leaks, split_clips


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def message(call, *arguments, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*arguments, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def notes(root, **kwargs):
    """{path relative to the root: (labels, split, speaker, fold)}."""
    found = read_labelled([str(root)], **kwargs)
    base = root if root.is_dir() else root.parent
    return {item.path.removeprefix(f"{base}/"): (item.labels, item.split, item.speaker, item.fold) for item in found}


# Sources


def test_manifests(tmp_path):
    table = tmp_path / "m.csv"
    table.write_text(
        'path,labels,split,fold,speaker\na.wav,"dog, cat",train,fold1,anna\nb.wav,,fold2,,\nc.wav,dog,,3,\n'
    )
    assert notes(table) == {
        "a.wav": (("dog", "cat"), "train", "anna", "1"),
        "b.wav": ((), "", "", "2"),
        "c.wav": (("dog",), "", "", "3"),
    }
    (tmp_path / "m.json").write_text(json.dumps({"data": [{"wav": "a.wav", "labels": "/m/1,/m/2", "fold": 4}]}))
    (tmp_path / "n.tsv").write_text("path\tcategory\nz.wav\tdog\n")
    assert notes(tmp_path / "m.json") == {"a.wav": (("/m/1", "/m/2"), "", "", "4")}
    assert [item.path[-5:] for item in read_labelled([str(tmp_path / "m.json"), str(tmp_path / "n.tsv")])] == [
        "a.wav",
        "z.wav",
    ]
    # `ssast prepare` keeps folds as splits, for its shards have no column of them
    assert [r.split_text for r in read_source(str(table)).records] == ["train", "fold2", "fold3"]


def test_folders(tmp_path):
    touch(tmp_path / "classes", "dog/1.wav", "rain/deep/2.wav", "3.wav")
    labelled = {
        "dog/1.wav": (("dog",), "", "", ""),
        "rain/deep/2.wav": (("rain",), "", "", ""),
        "3.wav": ((), "", "", ""),
    }
    assert notes(tmp_path / "classes") == labelled
    touch(tmp_path / "splits", "train/dog/1.wav", "val/dog/2.wav")
    assert notes(tmp_path / "splits") == {
        "train/dog/1.wav": (("dog",), "train", "", ""),
        "val/dog/2.wav": (("dog",), "valid", "", ""),
    }
    touch(tmp_path / "esc", "audio/1-2-A-0.wav")
    (tmp_path / "esc" / "meta").mkdir()
    (tmp_path / "esc" / "meta" / "esc50.csv").write_text("filename,fold,category\n1-2-A-0.wav,1,dog\n")
    assert notes(tmp_path / "esc") == {"audio/1-2-A-0.wav": (("dog",), "", "", "1")}


def test_sources_without_labels_are_errors(tmp_path):
    touch(tmp_path, "flat/a.wav", "one.wav", "LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac")
    (tmp_path / "m.csv").write_text("path\na.wav\n")
    assert "none of 1 clips has a label; it needs a column" in message(read_labelled, [str(tmp_path / "m.csv")])
    assert "needs a sub-folder for each class" in message(read_labelled, [str(tmp_path / "flat")])
    assert "librispeech comes without" in message(read_labelled, [str(tmp_path / "LibriSpeech")])
    assert "carries no labels" in message(read_labelled, [str(tmp_path / "one.wav")])
    assert "no such file or folder" in message(read_labelled, [str(tmp_path / "gone")])


def test_a_file_named_twice(tmp_path):
    table = tmp_path / "m.csv"
    table.write_text("path,label,fold\na.wav,dog,1\nb.wav,cat,1\na.wav,dog,1\n")
    with pytest.warns(UserWarning, match="1 repeated rows left out; the first is of .*/a.wav"):
        assert [item.path[-5:] for item in read_labelled([str(table)])] == ["a.wav", "b.wav"]
    table.write_text("path,label,fold\na.wav,dog,1\na.wav,cat,1\n")
    assert "a.wav: named twice with different labels, dog and cat" in message(read_labelled, [str(table)])
    table.write_text("path,label,fold\na.wav,dog,1\na.wav,dog,2\n")
    assert "named twice, in split '' and fold '1' and in split '' and fold '2'" in message(read_labelled, [str(table)])


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Two classes of two short clips each, and a manifest of them with folds."""
    folder = tmp_path_factory.mktemp("tones")
    rows = []
    for number in range(4):
        sound = 0.3 * np.sin(np.arange(8000) * (0.1 + 0.05 * number))
        soundfile.write(folder / f"{number}.wav", sound, 16_000, subtype="PCM_16")
        rows.append(f"{number}.wav,{'low' if number < 2 else 'high'},{number % 2 + 1},s{number}")
    (folder / "m.csv").write_text("\n".join(["path,label,fold,speaker", *rows]) + "\n")
    return folder


def test_from_a_manifest_and_from_shards_to_targets(tones, tmp_path):
    assert (
        prepare([str(tones / "m.csv"), "--out", str(tmp_path / "prepared"), "--segment", "0.25", "--workers", "1"]) == 0
    )
    labelled = read_labelled([str(tones / "m.csv"), str(tmp_path / "prepared")])
    files, pieces = labelled[:4], labelled[4:]
    assert [item.fold for item in files] == ["1", "2", "1", "2"] and len(pieces) == 8
    assert {(item.source, item.labels, item.fold, item.speaker) for item in pieces} == {
        (item.path, item.labels, item.fold, item.speaker) for item in files
    }
    assert {item.source for item in pieces} == {item.path for item in files}
    clips, skipped = check_clips(files[::-1], cache_dir=tmp_path, progress=False)
    assert not skipped and of_clips(clips, files) == files[::-1]
    assert of_clips(open_shards(tmp_path / "prepared"), []) == pieces
    vocabulary = Vocabulary.from_clips([record.labels for record in clips.records()])
    assert vocabulary.labels == ("high", "low")
    assert [vocabulary.numbers(record.labels) for record in clips.records()] == [([n], []) for n in (0, 0, 1, 1)]
    with pytest.raises(KeyError):
        of_clips(clips, files[:3])


# Speech Commands as twelve classes


def test_speech_commands_as_twelve_classes(tmp_path):
    root, cache = tmp_path / "sc", tmp_path / "cache"
    words = [*WANTED_WORDS, "bed", "cat"]
    files = [f"{word}/{number:02d}_nohash_0.wav" for word in words for number in range(12)]
    touch(root, *files)
    (root / "validation_list.txt").write_text("".join(f"{name}\n" for name in files if name[-15:-13] in ("02", "03")))
    (root / "testing_list.txt").write_text(
        "".join(f"{name}\n" for name in files if name[-15:-13] in ("04", "05", "06"))
    )
    (root / "_background_noise_").mkdir()
    noise = np.arange(10 * 16_000, dtype=np.int16)  # wraps, and tells by its values where it is from
    soundfile.write(root / "_background_noise_" / "hum.wav", noise, 16_000)
    with pytest.warns(UserWarning) as told:
        found = read_labelled([str(root)], layout="speech_commands_12", cache_dir=cache)
    assert [str(item.message) for item in told] == [
        f"{root}: {n} unknown words kept in {part}" for n, part in ((2, "valid"), (3, "test"))
    ]
    by_split = {split: [item for item in found if item.split == split] for split in ("train", "valid", "test")}
    for split, per_word, unknown, silence in (("train", 7, 14, 1), ("valid", 2, 2, 3), ("test", 3, 3, 3)):
        counts = {
            label: sum(item.labels == (label,) for item in by_split[split]) for label in (*WANTED_WORDS, "_unknown_")
        }
        assert counts == dict.fromkeys(WANTED_WORDS, per_word) | {"_unknown_": unknown}
        pieces = [item.path for item in by_split[split] if item.labels == ("_silence_",)]
        assert len(pieces) == silence and all(path.startswith(str(cache)) for path in pieces)
        begin, end = {"train": (0.0, 6.0), "valid": (6.0, 8.0), "test": (8.0, 10.0)}[split]
        for path in pieces:
            sound = soundfile.read(path, dtype="int16")[0]
            place = np.flatnonzero(
                (noise[: len(noise) - len(sound) + 1] == sound[0]) & (noise[len(sound) - 1 :] == sound[-1])
            )
            assert ((place >= begin * 16_000) & (place + len(sound) <= end * 16_000)).any()
    assert {item.speaker for item in found if item.labels == ("_unknown_",)} <= {
        f"{number:02d}" for number in range(12)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = read_labelled([str(root)], layout="speech_commands_12", cache_dir=cache)
    assert again == found
    assert "needs a folder to keep the pieces in" in message(read_labelled, [str(root)], layout="speech_commands_12")
    touch(tmp_path / "test", "_silence_/a.wav", "_unknown_/b.wav", "yes/c.wav")
    assert notes(tmp_path / "test", layout="speech_commands_12") == {
        "_silence_/a.wav": (("_silence_",), "test", "", ""),
        "_unknown_/b.wav": (("_unknown_",), "test", "", ""),
        "yes/c.wav": (("yes",), "test", "", ""),
    }
    assert "does not look like speech_commands" in message(read_labelled, [str(tmp_path)], layout="speech_commands_12")


# Classes


def test_the_order_of_the_classes():
    assert Vocabulary.from_clips([("b", "a"), (), ("c",)]).labels == ("a", "b", "c")
    assert Vocabulary.from_clips([("10",), ("9",), ("2", "10")]).labels == ("2", "9", "10")
    assert Vocabulary.from_clips([("10",), ("9",), ("x",)]).labels == ("10", "9", "x")
    assert Vocabulary.from_clips([("a",)], ["z", "a"]).labels == ("z", "a")
    assert "'a' named twice" in message(Vocabulary, ("a", "b", "a"))


def test_classes_of_audioset_go_by_mid_and_by_name(tmp_path):
    path = tmp_path / "class_labels_indices.csv"
    path.write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd1,"Rain"\n'
    )
    vocabulary = Vocabulary.from_clips([], path)
    assert vocabulary.labels == ("Speech", "Male speech, man speaking", "Rain")
    texts = ["/m/05zppz,/t/dd1", "Male speech, man speaking,Speech", "Rain,/m/09x0r", ""]
    numbers = [vocabulary.numbers(split_labels(text)) for text in texts]
    assert numbers == [([1, 2], []), ([1, 0], []), ([2, 0], []), ([], [])]
    assert vocabulary.numbers(("Male speech", "Rain")) == ([2], ["Male speech"])
    assert vocabulary.numbers(("Male speech, man speaking",)) == ([1], []), "as a JSON list or quotes have it"
    path.write_text("index,mid,display_name\n0,/m/1,Bass\n1,/m/2,Bass\n")
    assert Vocabulary.read(path).labels == ("/m/1", "/m/2")
    path.write_text("index,mid,display_name\n1,/m/1,Bass\n")
    assert "must count the rows from 0" in message(Vocabulary.read, path)
    path.write_text("mid,name\n/m/1,Bass\n")
    assert "expected a header and rows of index, mid and display_name" in message(Vocabulary.read, path)
    assert "cannot be read" in message(Vocabulary.read, tmp_path / "gone.csv")
    (tmp_path / "labels.txt").write_text("b\n\na\n")
    assert Vocabulary.read(tmp_path / "labels.txt").labels == ("b", "a")


# Looking them over


def looked(texts, train, valid=(), test=(), given=None, multi_label=False, **kwargs):
    split = Split(*(np.array(part, dtype=np.int64) for part in (train, valid, test)))
    sources = [f"/{number}.wav" for number in range(len(texts))]
    labels = [split_labels(text) for text in texts]
    return examine(labels, sources, Vocabulary.from_clips(labels, given), split, multi_label=multi_label, **kwargs)


def test_clips_without_labels_are_left_out_and_counted():
    texts = ["a", "", "b", " , ", "a", "b"]
    found = looked(texts, [0, 1, 2], [3, 4], [5])
    assert [part.tolist() for part in found.split.parts] == [[0, 2], [4], [5]]
    assert found.targets.dtype == bool and found.targets.astype(int).tolist() == [
        [1, 0],
        [0, 0],
        [0, 1],
        [0, 0],
        [1, 0],
        [0, 1],
    ]
    assert found.remarks[0] == "clips without a label: 1 in train, 1 in valid; the first is /1.wav; they are left out"
    assert found.remarks[1] == "2 classes have one training clip: 'a', 'b'"
    assert "clips without a label" in message(looked, texts, [0, 1, 2], [3, 4], [5], strict=True)
    assert looked(["a", "b", "a", "b"], [0, 1, 2, 3]).remarks == []


def test_labels_that_training_never_sees():
    texts = ["a", "b", "a", "b", "c", "a,c"]
    several = {"multi_label": True}
    assert "no training clip has: 'c', in 2 clips, the first /4.wav" in message(
        looked, texts, [0, 1, 2, 3], [4], [5], **several
    )
    found = looked(texts, [0, 1, 2, 3], [4], [5], unseen="drop", **several)
    assert [part.tolist() for part in found.split.parts] == [[0, 1, 2, 3], [], [5]]
    assert found.targets[5].tolist() == [True, False, False] and "and 1 clips with them" in found.remarks[0]
    assert "labels that are no class: 'c'; the first is /4.wav" in message(
        looked, texts, [0, 1, 2, 3], [4], [5], given=["a", "b"], **several
    )
    found = looked(texts, [0, 1, 2, 3], [4], [5], given=["a", "b"], unseen="drop", **several)
    assert [part.tolist() for part in found.split.parts] == [[0, 1, 2, 3], [], [5]] and len(found.remarks) == 2
    # What is in neither part is not looked at: the other folds of a large data set may hold what they like.
    assert looked(texts, [0, 1, 2, 3]).remarks == []


def test_tasks_that_cannot_be_learned():
    assert "all 2 training clips are of one class, 'a'" in message(looked, ["a", "a"], [0, 1])
    assert "all 2 training clips are of one class, 'a'" in message(looked, ["a", "a"], [0, 1], given=["a", "b"])
    assert "3 classes but 2 training clips" in message(looked, ["a", "b"], [0, 1], given=["a", "b", "c"])
    assert "no training clip has a label" in message(looked, ["", "a"], [0], [1])
    told = message(looked, ["a", "b", "a,b", "b, a"], [0, 1], [2, 3])
    assert "/2.wav: has several labels, 'a', 'b' (2 such clips)" in told
    assert looked(["a", "b", "a,b"], [0, 1], [2], multi_label=True).targets[2].all()
    assert looked(["a", "b", "a,a"], [0, 1], [2]).targets[2].tolist() == [True, False]


def test_real_audio(real_audio):
    """ESC-10 by folds of its manifest, spoken digits by speaker."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        digits = read_labelled([str(real_audio / "manifests" / "fsdd.csv")])
        sounds = read_labelled([str(real_audio / "manifests" / "esc10.csv")])
    assert Vocabulary.from_clips([item.labels for item in digits]).labels == tuple("0123456789")

    def parts(items: list[Record], **kwargs):
        columns = zip(*((i.split, i.fold, i.path, i.speaker, i.labels) for i in items), strict=True)
        return split_clips(*columns, valid_fraction=0.0, seed=0, **kwargs)

    by_speaker = parts([Record(i.path, i.labels, "", i.speaker) for i in digits], fold="1", folds=3, group="speaker")
    assert check_leaks(by_speaker, [i.path for i in digits], [i.speaker for i in digits], by_speaker=True) == []
    by_column = parts(digits, fold=None, folds=None)
    assert (len(by_column.train), len(by_column.valid)) == (600, 300)
    assert (
        "speakers" in check_leaks(by_column, [i.path for i in digits], [i.speaker for i in digits], by_speaker=True)[0]
    )
    folds = parts(sounds, fold="1", folds=None, valid_fold=True)
    texts = [item.labels for item in sounds]
    found = examine(texts, [i.path for i in sounds], Vocabulary.from_clips(texts), folds, multi_label=False)
    assert found.remarks == [] and found.targets[folds.test].sum(axis=0).min() > 0
