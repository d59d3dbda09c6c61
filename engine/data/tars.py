"""Tars of audio with notes beside it, as WebDataset has them."""

from __future__ import annotations

import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from typing import Any

from ssast.engine.errors import UserError, first_line

from .folder import AUDIO_EXTENSIONS, METADATA, by_folders, stray_split, strays_beside_splits
from .names import is_hidden
from .record import Record, labels_of, split_and_fold

_NOTES = ("json", "cls", "txt")
_NOTE_LIMIT = 1 << 20  # bytes of a note


def each_member(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in their order, none of which is kept."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined] # a public attribute, which typeshed does not have
        yield member


def read_tar(path: str, remarks: list[str]) -> list[Record]:
    """The audio members of a tar, each with what stands beside it under its name: .json (label, speaker, split), .cls
    or .txt (one label). Where no note says it, the folders in the tar say the split.

    A note belongs to the audio of the same name without extension. Audio that has none takes the note of the longest
    name that its own begins with, up to a dot, as WebDataset groups members.

    Raises:
        UserError: it cannot be read as a tar, has no audio, a member comes twice, or a note may belong to several.
    """
    notes: dict[str, dict[str, str]] = {}
    audio: list[tuple[str, int, int]] = []
    others, hidden = 0, 0
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar:
            for member in each_member(tar):
                if not member.isreg():
                    continue
                name = _plain(member.name)
                stem, extension = _parted(name)
                if any(map(is_hidden, name.split("/"))):
                    hidden += 1
                    continue
                if name in seen and extension in (*_NOTES, *AUDIO_EXTENSIONS):
                    raise UserError(f"{path}: {name} is there twice, and may have another label each time: keep one")
                seen.add(name)
                if extension in _NOTES and member.size <= _NOTE_LIMIT:
                    content = tar.extractfile(member)
                    text = b"" if content is None else content.read()
                    notes.setdefault(stem, {})[extension] = _text(text)
                elif os.path.basename(name).lower() in METADATA:
                    remarks.append(f"{name} is not read: unpack the tar, and give the folder")
                elif extension in AUDIO_EXTENSIONS and member.issparse():
                    raise UserError(
                        f"{path}: {member.name} is a sparse member, which cannot be read in place: unpack the tar first"
                    )
                elif extension in AUDIO_EXTENSIONS:
                    audio.append((member.name, member.offset_data, member.size))
                else:
                    others += 1
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar: {first_line(error)}") from error
    if not audio:
        rest = f"{others} other members seen" + (f", {hidden} hidden or system ones passed over" if hidden else "")
        raise UserError(f"{path}: no audio files found ({rest})")
    if hidden:
        remarks.append(f"{hidden} hidden or system files passed over")
    return list(_records(path, audio, notes, remarks))


def _records(
    path: str, audio: list[tuple[str, int, int]], notes: dict[str, dict[str, str]], remarks: list[str]
) -> Iterator[Record]:
    names = [name for name, _, _ in audio]
    beside = _paired(path, names, notes)
    unused = sorted(set(notes) - set(beside.values()))
    if unused:
        first = f"{unused[0]}.{next(iter(notes[unused[0]]))}"
        remarks.append(f"{len(unused)} notes belong to no audio member and are not read, the first is {first}")
    folders = [_plain(name).split("/")[:-1] for name in names]
    for stray, marked, is_typo in strays_beside_splits(folders):
        if is_typo:
            raise stray_split(path, stray, marked)
        remarks.append(f"the folder {stray} lies beside {marked}, and is named after no split: it is trained on")
    by_folder = by_folders(folders)
    damaged = 0
    for (name, offset, size), (_, folder_split, folder_fold) in zip(audio, by_folder, strict=True):
        source = f"{path}/{name}"
        note = notes.get(beside.get(name, ""), {})
        content = _object(note.get("json", ""))
        damaged += "json" in note and content is None
        labels, speaker, split_text, fold = _said(content or {}, note, f"{path}: {beside.get(name)}.json")
        split, split_fold = split_and_fold(split_text)
        if not split_text:
            split, split_fold = folder_split, folder_fold
        yield Record(path, labels, split, speaker, fold or split_fold, source, offset, size)
    if damaged:
        remarks.append(f"{damaged} notes are no JSON objects and are not read")


def _paired(path: str, names: list[str], notes: dict[str, dict[str, str]]) -> dict[str, str]:
    """The name of the notes that belong to each member; audio without notes is left out."""
    stems = {name: _parted(_plain(name))[0] for name in names}
    paired = {name: stem for name, stem in stems.items() if stem in notes}
    # a.wav.json is that of a.wav alone, a.json also that of a.flac
    paired |= {name: _plain(name) for name in names if _plain(name) in notes}
    taken = set(paired.values())
    users: dict[str, str] = {}
    for name, stem in stems.items():
        if name in paired:
            continue
        key = next((key for key in _shorter(stem) if key in notes and key not in taken), None)
        if key is None:
            continue
        if key in users and stems[users[key]] != stem:
            note = f"{key}.{next(iter(notes[key]))}"
            raise UserError(
                f"{path}: {note} may belong to {users[key]} or to {name}; give every clip a note of its own name"
            )
        users[key] = name
        paired[name] = key
    return paired


def _shorter(stem: str) -> Iterator[str]:
    """What the name begins with, up to each of its dots, the longest first."""
    folder, slash, file = stem.rpartition("/")
    while "." in file:
        file = file.rpartition(".")[0]
        yield f"{folder}{slash}{file}"


def _plain(name: str) -> str:
    """A member's name as others are compared with: without leading ./ and /, in Unicode's composed form."""
    return unicodedata.normalize("NFC", re.sub(r"^(\.?/+)+", "", name))


def _text(content: bytes) -> str:
    """Of a note: UTF-8, or UTF-16, with or without a byte order mark; other bytes become surrogate escapes."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _parted(name: str) -> tuple[str, str]:
    """(name without its extension, extension without its dot in small letters)."""
    stem, extension = os.path.splitext(name)
    return stem, extension[1:].lower()


def _object(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _said(content: dict[str, Any], note: dict[str, str], where: str) -> tuple[tuple[str, ...], str, str, str]:
    """(labels, speaker, split as it is written, fold) out of what stands beside a member; `where` names the .json.

    Raises:
        UserError: a label that is none.
    """

    def get(*names: str) -> Any:
        return next((content[name] for name in names if content.get(name) not in (None, "")), "")

    labels = labels_of(get("label", "labels", "category"), where)
    if not labels:  # one label a note: commas are a part of it
        single = note.get("cls", "").strip() or note.get("txt", "").strip()
        labels = (single,) if single else ()
    return labels, str(get("speaker", "speaker_id")).strip(), str(get("split")).strip(), str(get("fold")).strip()
