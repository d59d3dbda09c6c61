"""The layouts of known data sets: where they keep their labels, speakers and splits.

Splits are train, valid and test; a data set that is made for cross-validation has folds instead. Names in a data set's
own lists are compared without extension, so that audio which was converted is found.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import soundfile

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import write_whole

from .folder import list_folder, require_most
from .names import bare_name, is_hidden
from .record import Record, split_labels
from .shards import encode_audio
from .table import open_text

# For each layout whether a folder has it, and its recordings. What is left out is said in `remarks`.


def _audio_files(root: Path) -> list[str]:
    """Paths of audio files below a folder, relative to it."""
    return [os.path.relpath(path, root) for path in list_folder(str(root)).clips]


def _by_bare_name(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Paths of files below a folder by their names as official lists are compared with."""
    return {bare_name(name): str(root / name) for name in names}


def _rows(path: Path, fieldnames: Sequence[str] | None = None) -> Iterator[dict[str, str]]:
    """Rows of an official CSV; lines that begin with # are comments where its columns have no header."""
    try:
        with open_text(str(path)) as file:
            lines = (line for line in file if fieldnames is None or not line.startswith("#"))
            yield from csv.DictReader(lines, fieldnames, restval="", skipinitialspace=True, strict=True)
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _lines(path: Path) -> list[str]:
    try:
        with open_text(str(path)) as file:
            return file.read().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _require_listed(path: Path, names: Iterable[str], there: Collection[str]) -> None:
    """Raises UserError for a list of whose names most have no audio file; all names are bare ones."""
    listed = list(names)
    absent = [name for name in listed if name not in there]
    require_most(str(path), len(listed) - len(absent), len(listed), absent[0] if absent else "")


def _is_esc50(root: Path) -> bool:
    return (root / "meta" / "esc50.csv").is_file()


def _esc50(root: Path, remarks: list[str]) -> Iterator[Record]:
    """audio/*.wav with meta/esc50.csv: filename, fold, category."""
    path = root / "meta" / "esc50.csv"
    rows = list(_rows(path))
    if not all(row.get(name) for row in rows for name in ("filename", "fold", "category")):
        raise UserError(f"{path}: a row without filename, fold or category")
    there = _by_bare_name(root / "audio", _audio_files(root / "audio"))
    _require_listed(path, (bare_name(row["filename"]) for row in rows), there)
    for row in rows:
        clip = there.get(bare_name(row["filename"]), str(root / "audio" / row["filename"]))
        yield Record(clip, (row["category"],), fold=row["fold"])


_LIBRISPEECH_PART = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?")


def _librispeech_parts(root: Path) -> list[Path]:
    """Folders like train-clean-100: `root` itself, or in it, or in LibriSpeech in it."""
    if _LIBRISPEECH_PART.fullmatch(root.name) and any(path.name.isdigit() for path in _folders(root)):
        return [root]
    inside = [path for folder in (root, root / "LibriSpeech") for path in _folders(folder)]
    return [path for path in inside if _LIBRISPEECH_PART.fullmatch(path.name)]


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []


def _is_librispeech(root: Path) -> bool:
    return bool(_librispeech_parts(root))


def _librispeech(root: Path, remarks: list[str]) -> Iterator[Record]:
    """PART/SPEAKER/CHAPTER/*.flac, where PART is train-clean-100, dev-other and the like."""
    for part in _librispeech_parts(root):
        split = {"train": "train", "dev": "valid", "test": "test"}[part.name.partition("-")[0]]
        for name in _audio_files(part):
            yield Record(str(part / name), (), split, name.partition("/")[0])


def _is_speech_commands(root: Path) -> bool:
    return (root / "validation_list.txt").is_file() and (root / "testing_list.txt").is_file()


def _speech_commands(root: Path, remarks: list[str]) -> Iterator[Record]:
    """LABEL/SPEAKER_nohash_N.wav with validation_list.txt and testing_list.txt; _background_noise_ is left out."""
    names = _audio_files(root)
    there = {bare_name(name) for name in names}
    splits: dict[str, str] = {}
    for split, path in (("valid", root / "validation_list.txt"), ("test", root / "testing_list.txt")):
        listed = [bare_name(line) for line in _lines(path) if line.strip()]
        _require_listed(path, listed, there)
        splits |= dict.fromkeys(listed, split)
    background = 0
    for name in names:
        label, _, file = name.partition("/")
        if label == "_background_noise_" or not file:
            background += 1
            continue
        speaker, separator, _ = file.partition("_nohash_")
        split = splits.get(bare_name(name), "train")
        yield Record(str(root / name), (label,), split, speaker if separator else "")
    if background:
        remarks.append(f"{background} files of background noise left out")


WANTED_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
# The fractions of each file of noise between which a split's pieces lie.
_NOISE_FRACTIONS = {
    "train": (0.0, 0.6),
    "valid": (0.6, 0.8),
    "test": (0.8, 1.0),
}
_PIECE_SECONDS, _PIECE_HOP = 1.0, 0.5  # Pieces of silence to measure on are this long, and this far apart.


def speech_commands_12(root: Path, remarks: list[str], cache_dir: Path | None) -> Iterator[Record]:
    """Speech Commands as ten words, all others as `_unknown_`, and `_silence_` out of the files of background noise.

    As in SUPERB, training has every other word, and the noise in long pieces, from which it cuts at random: it needs
    balanced sampling. Validation and test have as many unknown words as clips of a wanted word on average (those whose
    names hash lowest), as in TensorFlow's recipe. Unlike in both, no noise is in two splits: each file gives its first
    60% to training, and pieces of 1 s of the rest to validation and test. Pieces are written to `cache_dir` once. Where
    the folder has the ten words, `_unknown_` and `_silence_` already, as the test set of version 1 has, it is read as
    it is, for the test.

    Raises:
        UserError: not Speech Commands, no noise, or no folder to keep pieces of it in.
    """
    if (root / SILENCE).is_dir() and (root / UNKNOWN).is_dir():
        yield from (
            Record(str(root / name), (name.partition("/")[0],), "test") for name in _audio_files(root) if "/" in name
        )
        return
    if not _is_speech_commands(root):
        raise UserError(
            f"{root} does not look like speech_commands: it has no validation_list.txt and testing_list.txt"
        )
    entries = list(_speech_commands(root, []))
    target_words = [entry for entry in entries if entry.labels[0] in WANTED_WORDS]
    yield from target_words
    unknown = [replace(entry, labels=(UNKNOWN,)) for entry in entries if entry.labels[0] not in WANTED_WORDS]
    for split in _NOISE_FRACTIONS:
        others = [entry for entry in unknown if entry.split == split]
        if split != "train":
            count = round(sum(entry.split == split for entry in target_words) / len(WANTED_WORDS))
            others = sorted(others, key=lambda entry: _name_hash(entry.path, root))[:count]
            remarks.append(f"{len(others)} unknown words kept in {split}")
        yield from sorted(others, key=lambda entry: entry.path)
    yield from _silence(root, cache_dir)


def _name_hash(path: str, root: Path) -> bytes:
    return hashlib.blake2b(os.fsencode(os.path.relpath(path, root))).digest()


def _silence(root: Path, cache_dir: Path | None) -> Iterator[Record]:
    """Pieces of the files in `_background_noise_`, kept in `cache_dir` under the names and sizes of what they are cut
    from.
    """
    noises = sorted((root / "_background_noise_").glob("*.wav"))
    if not noises:
        raise UserError(
            f"{root / '_background_noise_'}: has no .wav files, of which the class {SILENCE} is made; unpack them"
        )
    if cache_dir is None:
        raise UserError(
            f"{root}: the class {SILENCE} is cut from background noise, which needs a folder to keep the pieces in"
        )
    for noise in noises:
        key = hashlib.blake2b(
            f"{noise}\0{noise.stat().st_size}".encode("utf-8", "surrogateescape"), digest_size=8
        ).hexdigest()
        folder = cache_dir / "silence" / key
        try:
            sound, rate = soundfile.read(noise, dtype="int16", always_2d=True)
            folder.mkdir(parents=True, exist_ok=True)
            for split, (first, last) in _NOISE_FRACTIONS.items():
                part = sound[round(first * len(sound)) : round(last * len(sound)), 0]
                length, hop = (
                    (len(part), 1) if split == "train" else (round(_PIECE_SECONDS * rate), round(_PIECE_HOP * rate))
                )
                for number, start in enumerate(range(0, len(part) - length + 1, hop)):
                    path = folder / f"{noise.stem}_{split}_{number:03d}.wav"
                    if not path.is_file():
                        write_whole(path, encode_audio(part[start : start + length], rate, "wav"))
                    yield Record(str(path), (SILENCE,), split)
        except (OSError, soundfile.LibsndfileError) as error:
            raise UserError(f"{noise}: cannot be cut into pieces in {folder}: {first_line(error)}") from error


_VOXCELEB_SPEAKER = re.compile(r"id\d{5}")
_VOXCELEB_SPLITS = {"1": "train", "2": "valid", "3": "test"}


def _is_voxceleb1(root: Path) -> bool:
    places = (root, root / "wav", *(folder / "wav" for folder in _folders(root)))
    return (root / "iden_split.txt").is_file() or any(
        _VOXCELEB_SPEAKER.fullmatch(path.name) for place in places for path in _folders(place)
    )


def _voxceleb1(root: Path, remarks: list[str]) -> Iterator[Record]:
    """.../idXXXXX/VIDEO/*.wav, with iden_split.txt: 1, 2 or 3 and a path from idXXXXX on."""
    names = _audio_files(root)
    parts_of = {name: name.split("/") for name in names}
    at = {
        name: next((at for at, part in enumerate(parts) if _VOXCELEB_SPEAKER.fullmatch(part)), None)
        for name, parts in parts_of.items()
    }
    inner = {name: "/".join(parts_of[name][place:]) for name, place in at.items() if place is not None}
    path = root / "iden_split.txt"
    splits = {}
    if path.is_file():
        rows = [line.split(maxsplit=1) for line in _lines(path) if line.strip()]
        for number, row in enumerate(rows, 1):
            if len(row) != 2 or row[0].lstrip("\ufeff") not in _VOXCELEB_SPLITS:
                raise UserError(f"{path}, line {number}: expected 1, 2 or 3 and a path")
        splits = {bare_name(row[1]): _VOXCELEB_SPLITS[row[0].lstrip("\ufeff")] for row in rows}
        _require_listed(path, splits, {bare_name(name) for name in inner.values()})
    else:
        remarks.append("no iden_split.txt: no splits")
    left_out = len(names) - len(inner)
    for name, listed in inner.items():
        speaker = listed.partition("/")[0]
        yield Record(str(root / name), (speaker,), splits.get(bare_name(listed), ""), speaker)
    if left_out:
        remarks.append(f"{left_out} audio files outside folders of speakers (idXXXXX) left out")


IEMOCAP_CLASSES = {"neu": "neu", "hap": "hap", "exc": "hap", "sad": "sad", "ang": "ang"}
_IEMOCAP_TURN = re.compile(r"\[[\d. -]+\]\t(Ses\d\d[FM]_\w+_([FM])\d+)\t(\w+)\t")


def _is_iemocap(root: Path) -> bool:
    return (root / "Session1" / "dialog" / "EmoEvaluation").is_dir()


def _iemocap(root: Path, remarks: list[str]) -> Iterator[Record]:
    """SessionN/dialog/EmoEvaluation/*.txt and SessionN/sentences/wav: neutral, happy with excited, sad, angry; fold N
    is session N.
    """
    others, listed, missing = 0, 0, 0
    absent = ""
    for session in _folders(root):
        number = session.name.removeprefix("Session")
        for evaluation in sorted((session / "dialog" / "EmoEvaluation").glob("Ses*.txt")) if number.isdigit() else ():
            for turn, gender, emotion in _IEMOCAP_TURN.findall("\n".join(_lines(evaluation))):
                if emotion in IEMOCAP_CLASSES:
                    folder = session / "sentences" / "wav" / evaluation.stem
                    path = folder / f"{turn}.wav"
                    if not path.exists():  # of another extension
                        path = next((other for other in folder.glob(f"{turn}.*") if not is_hidden(other.name)), path)
                    listed += 1
                    absent = absent or ("" if path.exists() else str(path.relative_to(root)))
                    missing += not path.exists()
                    speaker = f"Ses{int(number):02d}{gender}"
                    yield Record(str(path), (IEMOCAP_CLASSES[emotion],), "", speaker, number)
                else:
                    others += 1
    require_most(str(root / "Session*" / "dialog" / "EmoEvaluation"), listed - missing, listed, absent)
    if others:
        remarks.append(
            f"{others} turns of other emotions left out; the classes are "
            f"{', '.join(sorted(set(IEMOCAP_CLASSES.values())))}"
        )


_AUDIOSET_NAME = re.compile(r"Y?([\w-]{11})(?:_\d+(?:\.\d+)?){0,2}")
_AUDIOSET_PLAIN = re.compile(r"([\w-]{11})(?:_\d+(?:\.\d+)?){0,2}")


def _audioset_lists(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*_segments.csv") if path.is_file())


def _is_audioset(root: Path) -> bool:
    return bool(_audioset_lists(root))


def _audioset(root: Path, remarks: list[str]) -> Iterator[Record]:
    """*_segments.csv (YTID, start, end, labels), and audio anywhere below, named YTID, with or without a Y before and
    times after it.
    """
    lists: dict[Path, list[str]] = {}
    segments: dict[str, tuple[tuple[str, ...], str]] = {}
    for path in _audioset_lists(root):
        split = "test" if path.name.startswith("eval") else "train"
        rows = [row for row in _rows(path, ("id", "start", "end", "labels")) if row["id"]]
        ragged = next((row for row in rows if None in row), None)
        if ragged is not None:
            raise UserError(f"{path}: {ragged['id']} has more than four fields; put its labels between double quotes")
        lists[path] = [row["id"] for row in rows]
        segments |= {row["id"]: (split_labels(row["labels"]), split) for row in rows}
    unknown, videos = 0, {}
    for name in _audio_files(root):
        stem = os.path.splitext(os.path.basename(name))[0]
        matches = (pattern.fullmatch(stem) for pattern in (_AUDIOSET_PLAIN, _AUDIOSET_NAME))
        video = next((match[1] for match in matches if match and match[1] in segments), None)
        if video is None:
            unknown += 1
        else:
            videos[name] = video
    present = set(videos.values())
    for path, ids in lists.items():
        _require_listed(path, ids, present)
    yield from (Record(str(root / name), *segments[video]) for name, video in videos.items())
    if unknown:
        remarks.append(f"{unknown} audio files left out: not in the lists")
    if len(present) < len(segments):
        remarks.append(f"{len(segments) - len(present)} of {len(segments)} listed segments have no audio file")


LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, list[str]], Iterator[Record]]]] = {
    "esc50": (_is_esc50, _esc50),
    "librispeech": (_is_librispeech, _librispeech),
    "speech_commands": (_is_speech_commands, _speech_commands),
    "voxceleb1": (_is_voxceleb1, _voxceleb1),
    "iemocap": (_is_iemocap, _iemocap),
    "audioset": (_is_audioset, _audioset),
}
