"""Names of files: which are no data, and which are the same name written otherwise."""

from __future__ import annotations

import os
import re
import unicodedata

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
