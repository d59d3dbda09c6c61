"""Names of files: which are no data, which are the same name written otherwise, and what else a missing one may be."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Callable

_SYSTEM = frozenset(("system volume information", "network trash folder", "temporary items")) | frozenset(
    """
    __macosx @eadir @tmp @recycle #recycle #snapshot $recycle.bin lost+found thumbs.db ehthumbs.db desktop.ini
    __pycache__
    """.split()
)


def is_hidden(name: str) -> bool:
    """Whether the name of a file or a folder is that of something hidden or of the system: it begins with a dot, ends
    with the tilde of an editor's copy, or is one that macOS, Windows or network storages leave beside data.
    """
    return (name.startswith(".") and name not in (".", "..")) or name.endswith("~") or name.lower() in _SYSTEM


def bare_name(text: str) -> str:
    """A name in an official list as others are compared with: without byte order mark, leading ./ and extension, with
    forward slashes, in Unicode's composed form.
    """
    text = unicodedata.normalize("NFC", text.lstrip("\ufeff").strip()).replace("\\", "/")
    return os.path.splitext(re.sub(r"(^|/)(\./+)+", r"\1", text))[0]


def unicode_twin(path: str) -> str | None:
    """A file or folder whose path is the same text in another Unicode form, as macOS and Linux write accents; None for
    none.
    """
    if path.isascii():
        return None
    return _twin(path, _composed)


def missing_file(path: str) -> str:
    """Why a file that is not there may not be found: "no such file", with its twin under another spelling if it has
    one.
    """
    keys: dict[str, Callable[[str], str]] = {
        "in another Unicode form": _composed,
        "without blanks around it": lambda name: _composed(name).strip(),
        "in other case": lambda name: _composed(name).strip().casefold(),
    }
    for difference, key in keys.items():
        for spelling, slashes in ((path, ""), (path.replace("\\", "/"), "with / for \\")):
            if slashes and spelling == path:
                continue
            twin = _twin(os.path.normpath(spelling), key)
            if twin is not None:
                same = slashes and twin == os.path.normpath(spelling)
                return f"no such file: there is {twin}, {slashes if same else difference}"
    return "no such file"


def _twin(path: str, key: Callable[[str], str]) -> str | None:
    """The file that is found at `path` where names are compared by `key`; None if there is none."""
    place = "/"
    for name in path.split("/"):
        if name in ("", "."):
            continue
        exact = os.path.join(place, name)
        if not os.path.lexists(exact):
            wanted = key(name)
            exact = next((os.path.join(place, other) for other in _names(place) if key(other) == wanted), "")
            if not exact:
                return None
        place = exact
    return place if os.path.exists(place) else None


@functools.lru_cache(maxsize=64)
def _listed(folder: str, mtime_ns: int) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


def _names(folder: str) -> tuple[str, ...]:
    try:
        return _listed(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return ()


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
