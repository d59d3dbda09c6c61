"""What a source of recordings may be: an audio file, a tar, a manifest, or a folder, in one of the layouts of known
data sets or plain.

A layout knows where a data set keeps its labels, speakers and splits. Splits are train, valid and test, or fold1, fold2
... where a data set is made for cross-validation.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import soundfile

from ssast.engine.errors import UserError, first_line
from ssast.engine.files import write_whole

from .manifest import AUDIO_EXTENSIONS, Entry, read_manifest
from .shards import encode_audio

_MANIFESTS = (".json", ".csv", ".tsv", ".txt", ".lst")
_PACKED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".zip",
    ".7z",
    ".rar",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
)
_NOTE_LIMIT = 1 << 20  # bytes of what stands beside the audio in a tar


class Recording(NamedTuple):
    """`size` bytes at `offset` in the file `path`, or all of that file where offset is -1; `source` is its name for
    people.
    """

    source: str
    path: str
    offset: int
    size: int
    label: str
    speaker: str
    split: str


@dataclass
class Source:
    """What was found: how it was read, its recordings, and what people should know about the reading."""

    kind: str
    recordings: list[Recording]
    remarks: list[str] = field(default_factory=list)


def read_source(source: str, layout: str = "auto") -> Source:
    """The recordings of a file, tar, manifest or folder; the layout of a folder is told by the files it has if `layout`
    is "auto".

    Raises `UserError` if there is nothing of the kind, or no recording in it.
    """
    path = os.path.abspath(source)
    if os.path.isdir(path):
        return _read_folder(Path(path), layout)
    if layout not in ("auto", "plain"):
        raise UserError(f"{source}: --layout {layout} is for folders; this is none")
    name = path.lower()
    if name.endswith(_MANIFESTS):
        return Source("manifest", [_whole(entry) for entry in read_manifest(path)])
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}")
    if name.endswith(".tar"):
        return _read_tar(path)
    if name.endswith(_PACKED):
        raise UserError(f"{path} is compressed, so that nothing can be read from its middle: unpack it first")
    return Source("file", [_whole(Entry(path))])


def _read_folder(root: Path, layout: str) -> Source:
    if layout == "auto":
        layout = next((name for name, (is_one, _) in LAYOUTS.items() if is_one(root)), "plain")
    elif layout != "plain" and not LAYOUTS[layout][0](root):
        raise UserError(
            f"{root} does not look like {layout}: see docs/data.md for what is expected, or use --layout plain"
        )
    if layout == "plain":
        return Source("folder", [_whole(entry) for entry in read_manifest(root)])
    remarks: list[str] = []
    recordings = [_whole(entry) for entry in LAYOUTS[layout][1](root, remarks)]
    if not recordings:
        raise UserError(f"{root}: laid out like {layout}, but there is no recording in it")
    return Source(layout, recordings, remarks)


def _whole(entry: Entry) -> Recording:
    fold = f"fold{entry.fold.removeprefix('fold')}" if entry.fold else ""
    return Recording(entry.path, entry.path, -1, -1, entry.label, entry.speaker, entry.split or fold)


# Tars


def _read_tar(path: str) -> Source:
    """The audio members of a tar. Files of the same name beside them give labels: .json (label, speaker, split), .cls
    or .txt.
    """
    notes: dict[str, dict[str, str]] = {}
    found: list[tuple[str, int, int]] = []
    others = 0
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar:
            for member in tar:
                tar.members.clear()  # it would keep them all
                stem, extension = _split_member(member.name)
                if not member.isreg():
                    continue
                if extension in ("json", "cls", "txt") and member.size <= _NOTE_LIMIT:
                    content = tar.extractfile(member).read()
                    notes.setdefault(stem, {})[extension] = content.decode("utf-8", "surrogateescape")
                elif extension in AUDIO_EXTENSIONS and member.issparse():
                    raise UserError(
                        f"{path}: {member.name} is a sparse member, which cannot be read in place: unpack the tar first"
                    )
                elif extension in AUDIO_EXTENSIONS:
                    found.append((member.name, member.offset_data, member.size))
                else:
                    others += 1
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar: {first_line(error)}") from error
    if not found:
        raise UserError(f"{path}: no audio files found ({others} other members seen)")
    recordings = []
    for name, offset, size in found:
        label, speaker, split = _noted(notes.get(_split_member(name)[0], {}))
        recordings.append(Recording(f"{path}/{name}", path, offset, size, label, speaker, split))
    return Source("tar", recordings)


def _split_member(name: str) -> tuple[str, str]:
    """(what groups members: all up to the first dot of the file's name, extension)."""
    folder, _, file = name.rpartition("/")
    stem, _, extensions = file.partition(".")
    return f"{folder}/{stem}", extensions.rpartition(".")[2].lower()


def _noted(notes: dict[str, str]) -> tuple[str, str, str]:
    """(label, speaker, split) out of what stands beside a member, by extension."""
    try:
        content = json.loads(notes.get("json", "{}"))
    except (ValueError, RecursionError):
        content = {}
    content = content if isinstance(content, dict) else {}

    def get(*names: str) -> str:
        value = next((content[name] for name in names if content.get(name) not in (None, "")), "")
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    label = get("label", "labels", "category") or notes.get("cls", "").strip() or notes.get("txt", "").strip()
    return label, get("speaker", "speaker_id"), get("split")


# Folders: for each layout whether a folder has it, and its recordings. What is left out is said in `remarks`.


def _audio_files(root: Path) -> list[str]:
    """Paths of audio files below a folder, relative to it."""
    return [os.path.relpath(entry.path, root) for entry in read_manifest(root)]


def _rows(path: Path, **kwargs: str) -> Iterator[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from csv.DictReader(file, restval="", **kwargs)
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _is_esc50(root: Path) -> bool:
    return (root / "meta" / "esc50.csv").is_file()


def _esc50(root: Path, remarks: list[str]) -> Iterator[Entry]:
    """audio/*.wav with meta/esc50.csv: filename, fold, category."""
    for row in _rows(root / "meta" / "esc50.csv"):
        if not all(row.get(name) for name in ("filename", "fold", "category")):
            raise UserError(f"{root / 'meta' / 'esc50.csv'}: a row without filename, fold or category")
        yield Entry(str(root / "audio" / row["filename"]), row["category"], f"fold{row['fold']}")


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


def _librispeech(root: Path, remarks: list[str]) -> Iterator[Entry]:
    """PART/SPEAKER/CHAPTER/*.flac, where PART is train-clean-100, dev-other and the like."""
    for part in _librispeech_parts(root):
        split = {"train": "train", "dev": "valid", "test": "test"}[part.name.partition("-")[0]]
        for name in _audio_files(part):
            yield Entry(str(part / name), "", split, name.partition("/")[0])


def _is_speech_commands(root: Path) -> bool:
    return (root / "validation_list.txt").is_file() and (root / "testing_list.txt").is_file()


def _speech_commands(root: Path, remarks: list[str]) -> Iterator[Entry]:
    """LABEL/SPEAKER_nohash_N.wav with validation_list.txt and testing_list.txt; _background_noise_ is left out."""
    splits = dict.fromkeys(_lines(root / "validation_list.txt"), "valid") | dict.fromkeys(
        _lines(root / "testing_list.txt"), "test"
    )
    background = 0
    for name in _audio_files(root):
        label, _, file = name.partition("/")
        if label == "_background_noise_" or not file:
            background += 1
            continue
        speaker, is_named, _ = file.partition("_nohash_")
        yield Entry(str(root / name), label, splits.get(name, "train"), speaker if is_named else "")
    if background:
        remarks.append(f"{background} files of background noise left out")


WANTED_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
# of each file of noise, from where to where
_NOISE_SHARES = {
    "train": (0.0, 0.6),
    "valid": (0.6, 0.8),
    "test": (0.8, 1.0),
}
_PIECE_SECONDS, _PIECE_HOP = 1.0, 0.5  # of silence that is measured on


def speech_commands_12(root: Path, remarks: list[str], cache_dir: Path | None) -> Iterator[Entry]:
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
            Entry(str(root / name), name.partition("/")[0], "test") for name in _audio_files(root) if "/" in name
        )
        return
    if not _is_speech_commands(root):
        raise UserError(
            f"{root} does not look like speech_commands: it has no validation_list.txt and testing_list.txt"
        )
    entries = list(_speech_commands(root, []))
    wanted = [entry for entry in entries if entry.label in WANTED_WORDS]
    yield from wanted
    unknown = [replace(entry, label=UNKNOWN) for entry in entries if entry.label not in WANTED_WORDS]
    for split in _NOISE_SHARES:
        others = [entry for entry in unknown if entry.split == split]
        if split != "train":
            kept = round(sum(entry.split == split for entry in wanted) / len(WANTED_WORDS))
            others = sorted(others, key=lambda entry: _name_hash(entry.path, root))[:kept]
            remarks.append(f"{len(others)} unknown words kept in {split}")
        yield from sorted(others, key=lambda entry: entry.path)
    yield from _silence(root, cache_dir)


def _name_hash(path: str, root: Path) -> bytes:
    return hashlib.blake2b(os.fsencode(os.path.relpath(path, root))).digest()


def _silence(root: Path, cache_dir: Path | None) -> Iterator[Entry]:
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
            for split, (first, last) in _NOISE_SHARES.items():
                part = sound[round(first * len(sound)) : round(last * len(sound)), 0]
                length, hop = (
                    (len(part), 1) if split == "train" else (round(_PIECE_SECONDS * rate), round(_PIECE_HOP * rate))
                )
                for number, start in enumerate(range(0, len(part) - length + 1, hop)):
                    path = folder / f"{noise.stem}_{split}_{number:03d}.wav"
                    if not path.is_file():
                        write_whole(path, encode_audio(part[start : start + length], rate, "wav"))
                    yield Entry(str(path), SILENCE, split)
        except (OSError, soundfile.LibsndfileError) as error:
            raise UserError(f"{noise}: cannot be cut into pieces in {folder}: {first_line(error)}") from error


_VOXCELEB_SPEAKER = re.compile(r"id\d{5}")


def _is_voxceleb1(root: Path) -> bool:
    places = (root, root / "wav", *(folder / "wav" for folder in _folders(root)))
    return (root / "iden_split.txt").is_file() or any(
        _VOXCELEB_SPEAKER.fullmatch(path.name) for place in places for path in _folders(place)
    )


def _voxceleb1(root: Path, remarks: list[str]) -> Iterator[Entry]:
    """.../idXXXXX/VIDEO/*.wav, with iden_split.txt: 1, 2 or 3 and a path from idXXXXX on."""
    splits = {}
    if (root / "iden_split.txt").is_file():
        rows = (line.split() for line in _lines(root / "iden_split.txt"))
        splits = {row[1]: {"1": "train", "2": "valid", "3": "test"}.get(row[0], "") for row in rows if len(row) == 2}
    else:
        remarks.append("no iden_split.txt: no splits")
    left_out = 0
    for name in _audio_files(root):
        parts = name.split("/")
        at = next((at for at, part in enumerate(parts) if _VOXCELEB_SPEAKER.fullmatch(part)), None)
        if at is None:
            left_out += 1
        else:
            yield Entry(str(root / name), parts[at], splits.get("/".join(parts[at:]), ""), parts[at])
    if left_out:
        remarks.append(f"{left_out} audio files outside folders of speakers (idXXXXX) left out")


IEMOCAP_CLASSES = {"neu": "neu", "hap": "hap", "exc": "hap", "sad": "sad", "ang": "ang"}
_IEMOCAP_TURN = re.compile(r"\[[\d. -]+\]\t(Ses\d\d[FM]_\w+_([FM])\d+)\t(\w+)\t")


def _is_iemocap(root: Path) -> bool:
    return (root / "Session1" / "dialog" / "EmoEvaluation").is_dir()


def _iemocap(root: Path, remarks: list[str]) -> Iterator[Entry]:
    """SessionN/dialog/EmoEvaluation/*.txt and SessionN/sentences/wav: neutral, happy with excited, sad, angry; fold N
    is session N.
    """
    others = 0
    for session in _folders(root):
        number = session.name.removeprefix("Session")
        for evaluation in sorted((session / "dialog" / "EmoEvaluation").glob("Ses*.txt")) if number.isdigit() else ():
            for turn, gender, emotion in _IEMOCAP_TURN.findall("\n".join(_lines(evaluation))):
                if emotion in IEMOCAP_CLASSES:
                    path = session / "sentences" / "wav" / evaluation.stem / f"{turn}.wav"
                    yield Entry(str(path), IEMOCAP_CLASSES[emotion], f"fold{number}", f"Ses{int(number):02d}{gender}")
                else:
                    others += 1
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


def _audioset(root: Path, remarks: list[str]) -> Iterator[Entry]:
    """*_segments.csv (YTID, start, end, labels), and audio anywhere below, named YTID, with or without a Y before and
    times after it.
    """
    known: dict[str, tuple[str, str]] = {}
    for path in _audioset_lists(root):
        split = "test" if path.name.startswith("eval") else "train"
        rows = _rows(path, fieldnames=("id", "start", "end", "labels"), skipinitialspace=True)
        known |= {row["id"]: (row["labels"], split) for row in rows if row["id"] and not row["id"].startswith("#")}
    unknown, found = 0, set()
    for name in _audio_files(root):
        stem = os.path.splitext(os.path.basename(name))[0]
        matches = (pattern.fullmatch(stem) for pattern in (_AUDIOSET_PLAIN, _AUDIOSET_NAME))
        video = next((match[1] for match in matches if match and match[1] in known), None)
        if video is None:
            unknown += 1
        else:
            found.add(video)
            yield Entry(str(root / name), *known[video])
    if unknown:
        remarks.append(f"{unknown} audio files left out: not in the lists")
    if len(found) < len(known):
        remarks.append(f"{len(known) - len(found)} of {len(known)} listed segments have no audio file")


LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, list[str]], Iterator[Entry]]]] = {
    "esc50": (_is_esc50, _esc50),
    "librispeech": (_is_librispeech, _librispeech),
    "speech_commands": (_is_speech_commands, _speech_commands),
    "voxceleb1": (_is_voxceleb1, _voxceleb1),
    "iemocap": (_is_iemocap, _iemocap),
    "audioset": (_is_audioset, _audioset),
}
