"""Folders of audio: which files are clips, and what the names of folders and lists of metadata say of them."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from ssast.engine.errors import UserError

from .manifest import LABEL_COLUMNS, Columns, json_lines, json_lines_splits, open_table
from .names import bare_name, is_hidden
from .record import SPLITS, Record, find_split
from .table import open_text

CACHE_FILE = "checked.sqlite"  # beside it, the folder of converted copies is no part of a data set
CONVERTED = "converted"
_NUMBERED_FOLD = re.compile(r"fold[ _-]?(\d+)", re.IGNORECASE)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
"""Lists of the files below their folder, as the audio folders of Hugging Face have them."""

_KNOWN = """
3gp aac ac3 aif aifc aiff amr ape asf au avi caf flac flv gsm m4a m4b m4v mka mkv mov mp2 mp3 mp4 mpc mpeg
mpg nist oga ogg ogv opus ra rf64 rm sph spx tta voc w64 wav wave webm wma wmv wv
"""
# Samples without a header: no clips, but the check says so of each, where they would else vanish silently.
HEADERLESS_EXTENSIONS = frozenset("al alaw pcm raw s16 s16le s24le s32le sln ul ulaw vox".split())
AUDIO_EXTENSIONS = frozenset(_KNOWN.split()) | HEADERLESS_EXTENSIONS

# The starts of audio containers; EBML is Matroska and WebM, 30 26 B2 75 is ASF (wma).
_MAGIC = (
    *(b"RIFF", b"RF64", b"RIFX", b"BW64", b"riff", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff", b"NIST_1A"),
    *(b"\x1aE\xdf\xa3", b"0&\xb2u", b"wvPk", b"MAC ", b"TTA1", b"#!AMR"),
)
# The second byte after FF: MPEG audio layers III and II, and ADTS. FF FE is left out: it is the byte order mark of
# UTF-16 text.
_MPEG_SYNC = frozenset(b"\xfb\xfa\xf3\xf2\xe3\xe2\xfd\xfc\xf5\xf4\xf1\xf9\xf0\xf8")


@dataclass
class Listing:
    """What is below a folder: candidates for clips and lists of metadata, paths sorted; other files and hidden ones are
    counted.
    """

    clips: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: int = 0
    hidden: int = 0
    unreadable: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """What people should know of the listing."""
        remarks = []
        if self.hidden:
            remarks.append(f"{self.hidden} hidden or system files and folders passed over")
        if self.unreadable:
            first = self.unreadable[0]
            remarks.append(f"{len(self.unreadable)} unreadable folders left out, the first is {first}")
        remarks += [f"{path} is not read: write what it says to a metadata.csv" for path in self.parquet]
        return remarks


def list_folder(root: str) -> Listing:
    """The audio files below a folder, told by extension, or by their first bytes where the extension says nothing.

    Symbolic links are followed. Files and folders that are hidden, or that systems leave beside data, are no clips.

    Raises:
        UserError: there is no audio file.
    """
    listing = Listing()
    for path in _walk(root, listing):
        if _may_be_clip(path):
            listing.clips.append(path)
        elif os.path.basename(path).lower() in METADATA:
            listing.metadata.append(path)
        else:
            listing.others += 1
            if os.path.basename(path).lower() == "metadata.parquet":
                listing.parquet.append(path)
    listing.clips.sort()
    listing.metadata.sort()
    if not listing.clips:
        seen = f"{listing.others + len(listing.metadata)} other files seen"
        seen += f", {listing.hidden} hidden or system ones passed over" if listing.hidden else ""
        raise UserError(f"no audio files found in {root} ({seen})")
    return listing


def _walk(root: str, listing: Listing) -> Iterator[str]:
    """Every file below `root` that is not hidden. Each folder is entered once, however many links lead to it."""
    seen: set[tuple[int, int]] = set()
    # Real folders are taken before linked ones, each in the order of names: which path a folder is met by is the same
    # everywhere.
    real, linked = [root], deque[str]()
    while real or linked:
        folder = real.pop() if real else linked.popleft()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            items = sorted(os.scandir(folder), key=lambda item: item.name, reverse=True)
        except OSError:
            listing.unreadable.append(folder)
            continue
        listing.hidden += sum(is_hidden(item.name) for item in items)
        is_cache = any(item.name == CACHE_FILE for item in items)
        items = [item for item in items if not is_hidden(item.name) and not (is_cache and item.name == CONVERTED)]
        below = [item.path for item in items if item.is_dir(follow_symlinks=False)]
        links = [item.path for item in reversed(items) if item.is_symlink() and os.path.isdir(item.path)]
        real.extend(below)
        linked.extend(links)
        folders = {*below, *links}
        yield from (item.path for item in items if item.path not in folders)


def _may_be_clip(path: str) -> bool:
    # With an audio extension, dangling links and pipes are candidates too: the check names them, here they would vanish
    # silently.
    if os.path.splitext(path)[1][1:].lower() in AUDIO_EXTENSIONS:
        return True
    try:
        if not os.path.isfile(path):  # opening a pipe would block
            return False
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return (
        head.startswith(_MAGIC)
        or head[4:8] == b"ftyp"
        or (head[:1] == b"\xff" and head[1:2] != b"" and head[1] in _MPEG_SYNC)
    )


def by_folders(names: Sequence[Sequence[str]]) -> list[tuple[tuple[str, ...], str, str]]:
    """(labels, split, fold) of files by the names of the folders [N][depth] that they lie in, from the outermost on,
    without the source itself.

    Names of splits and folds are never classes. A class is the outermost folder of the others; where splits lie within
    one folder that is the same for all files, it is the next one. Folders of two splits, one in the other, give a split
    that is the name of none. One folder around those of folds, with none inside of them, is no class either.
    """
    distinct = dict.fromkeys(map(tuple, names))
    rests = {folders: tuple(n for n in folders if not find_split(n) and not _fold(n)) for folders in distinct}
    wrapped = all(
        rest[:1] == folders[:1] and len(rest) < len(folders) and (len(rest) > 1 or any(map(_fold, folders)))
        for folders, rest in rests.items()
    )
    if wrapped and len({rest[0] for rest in rests.values()}) == 1:
        rests = {folders: rest[1:] for folders, rest in rests.items()}
    said = {folders: (rest[:1], *_split_and_fold(folders)) for folders, rest in rests.items()}
    return [said[tuple(folders)] for folders in names]


def strays_beside_splits(names: Sequence[Sequence[str]]) -> list[tuple[str, str, bool]]:
    """Folders that lie beside those of splits or folds, are named after none and hold folders themselves, as those of
    splits hold classes: (path, names of the splits beside it, whether its name is that of a split with letters
    exchanged, as `tset`; such ones count without folders in them, too).
    """
    beside: dict[tuple[str, ...], dict[str, bool]] = {}
    for folders in dict.fromkeys(map(tuple, names)):
        for depth, name in enumerate(folders):
            inside = beside.setdefault(folders[:depth], {})
            inside[name] = inside.get(name, False) or len(folders) > depth + 1
    strays = []
    for above, inside in beside.items():
        marked = sorted(name for name in inside if find_split(name) or _fold(name))
        for name, holds_folders in inside.items() if marked else ():
            is_typo = sorted(name.strip().lower()) in _LETTERS
            if name not in marked and (holds_folders or is_typo):
                strays.append(("/".join((*above, name)), ", ".join(marked), is_typo))
    return strays


_LETTERS = [sorted(spelling) for spellings in SPLITS.values() for spelling in spellings]


def stray_split(root: str, stray: str, marked: str) -> UserError:
    """What is raised where a folder beside those of splits may be a split or a class."""
    names = "; ".join(", ".join(spellings) for spellings in SPLITS.values())
    return UserError(
        f"{root}: the folder {stray} lies beside {marked}, but its name is none of {names}, fold1, fold2 ...; rename it"
        " to the split that it is, or move it out"
    )


_LIKE_SPLITS = re.compile(r"(.+?)[ _-]?(set|data|split|files|audio|clips|wavs?)")


def is_like_split(name: str) -> bool:
    """Whether the name of a folder is that of a split with a word behind it: test_set, traindata."""
    matched = _LIKE_SPLITS.fullmatch(name.strip().lower())
    return bool(matched and find_split(matched[1]))


def _split_and_fold(folders: Sequence[str]) -> tuple[str, str]:
    splits = list(dict.fromkeys(split for name in folders if (split := find_split(name))))
    folds = list(dict.fromkeys(fold for name in folders if (fold := _fold(name))))
    if len(folds) > 1:
        splits, folds = [f"fold{fold}" for fold in folds], []
    return "/".join(splits), "".join(folds)


def _fold(name: str) -> str:
    """The number of a fold that a folder is named after, "" for none: folder1 is no fold."""
    numbered = _NUMBERED_FOLD.fullmatch(name.strip())
    return numbered[1] if numbered else ""


def read_metadata(listing: Listing, remarks: list[str]) -> dict[str, list[Record]]:
    """What the lists of metadata below a folder say of its clips, by path. A list that lies deeper says more.

    Raises:
        UserError: a list that cannot be understood, or of whose files most are not there.
    """
    by_name = {bare_name(path): path for path in listing.clips} | {path: path for path in listing.clips}
    records: dict[str, list[Record]] = {}
    for path in sorted(listing.metadata, key=lambda path: (path.count("/"), path)):
        found: dict[str, list[Record]] = {}
        listed, matched, absent = 0, 0, ""
        try:
            with open_text(path) as file:
                for record in _metadata_rows(path, file, remarks):
                    listed += 1
                    clip = by_name.get(record.path) or by_name.get(bare_name(record.path))
                    if clip is None:
                        absent = absent or record.path.removeprefix(f"{os.path.dirname(path)}/")
                    else:
                        matched += 1
                        found.setdefault(clip, []).append(replace(record, path=clip, source=clip))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        require_most(path, matched, listed, absent)
        records |= found
    return records


def _metadata_rows(path: str, file: TextIO, remarks: list[str]) -> Iterator[Record]:
    base = os.path.dirname(path)
    if path.lower().endswith(".jsonl"):
        splits = json_lines_splits(path, file)
        for where, row in json_lines(path, file):
            yield Columns(row, where, splits).record(row, base, where)
        return
    columns, header, rows = open_table(path, file)
    if not columns.has_path:
        remarks.append(f"{path} is not read: it has no column file_name, its columns are {', '.join(header)}")
        return
    if not columns.has_label:
        known = ", ".join(LABEL_COLUMNS)
        remarks.append(f"{path} has no labels: none of its columns {', '.join(header)} is one of {known}")
    for where, row in rows:
        yield columns.record(row, base, where)


def require_most(path: str, matched: int, listed: int, absent: str) -> None:
    """Of the names in a list, most must have a file; `absent` is an example of those that have none.

    Raises:
        UserError: most have none.
    """
    if 2 * matched < listed:
        raise UserError(
            f"{path}: only {matched} of {listed} names that it lists have an audio file, {absent} has none; is the "
            "list that of these files? Correct it, or take it out of the folder"
        )
