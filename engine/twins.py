"""What else the name of a missing file may be: the same text in another Unicode form, case or with other slashes."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Callable


def unicode_twin(path: str) -> str | None:
    """A file or folder whose path is the same text in another Unicode form, as macOS and Linux write accents; None for
    none.
    """
    if path.isascii():
        return None
    return _twin(path, _composed)


def missing_file(path: str, reason: str = "no such file") -> str:
    """Why a file of an absolute path that is not there may not be found: `reason`, with its twin under another
    spelling if it has one.
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
                return f"{reason}: there is {twin}, {slashes if same else difference}"
    return reason


def _twin(path: str, key: Callable[[str], str]) -> str | None:
    """The file that is found at `path` where names are compared by `key`; None if there is none."""
    place = "/"
    for name in path.split("/"):
        if name in ("", "."):
            continue
        exact = os.path.join(place, name)
        if not os.path.lexists(exact):
            target = key(name)
            exact = next((os.path.join(place, other) for other in _names(place) if key(other) == target), "")
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
