"""Writing files so that a reader, or the next process, never meets half of one."""

import os
from pathlib import Path

PROFILE_FOLDER = "profile"
"""In a run folder: what `ssast profile` wrote, which may come before the run."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside and rename it: whatever interrupts this leaves the old file or the new one.

    Raises:
        OSError: as `open` and `write` do; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def permit_as_usual(path: Path) -> None:
    """Give a file the permissions of any new one; safetensors keeps its files to their owner."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync_folder(folder: Path) -> None:
    """Make the files of a folder and its entries safe from a power cut."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
