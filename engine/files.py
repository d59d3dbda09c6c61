"""Writing files so that a reader, or the next process, never meets half of one."""

import contextlib
import csv
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UserError
from .process import HOMELESS_VARIABLE

PROFILE_FOLDER = "profile"
"""In a run folder: what `ssast profile` wrote, which may come before the run."""


def path_argument(text: str) -> Path:
    """The type of an argument of a command line that names a file or a folder.

    Raises:
        UserError: as `expand_path`.
    """
    return Path(expand_path(text))


_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def expand_path(text: str) -> str:
    """A path that a user has written, with `~`, `~NAME`, `$NAME` and `${NAME}` expanded: no shell does it behind an
    equals sign or in YAML. A path that exists as it is written is taken as it is written.

    Raises:
        UserError: a variable that is not set, a user that there is not, or no home folder.
    """
    if ("$" not in text and not text.startswith("~")) or os.path.lexists(text):
        return text

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{text}: the environment variable {name} is not set")
        return os.environ[name]

    tilde, slash, rest = text.partition("/")
    if tilde.startswith("~"):
        home = os.path.expanduser(tilde)
        if home == tilde or (tilde == "~" and HOMELESS_VARIABLE in os.environ):
            raise UserError(
                f"{text}: there is no home folder: HOME is not set; write the whole path"
                if tilde == "~"
                else f"{text}: there is no user {tilde[1:]} here; write the whole path, or ./{text}"
            )
        return home + slash + _VARIABLE.sub(value_of, rest)
    return _VARIABLE.sub(value_of, text)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], suffix: str = ".tmp") -> Iterator[Path]:
    """A path beside `path`, to write a file or a folder to. It takes the name `path` when the block ends, and is
    removed if the block fails: nobody ever reads half of it.

    Args:
        suffix: of the path to write to, for writers that choose a format by it; files left by a killed process are
            found by ".tmp".

    Raises:
        OSError: it could not be renamed.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # what failed is the story
                aside.unlink(missing_ok=True)
        raise


def encode_text(text: str) -> bytes:
    """UTF-8, with the bytes that were none in a file name as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return text.encode("utf-8", "replace")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, safe from a power cut.

    Raises:
        OSError: as `open` and `write` do; nothing is left behind.
    """
    with atomic_write(path) as aside, open(aside, "wb") as file:
        file.write(encode_text(content) if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_reasons(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write a CSV of files that are not used: (path, reason) each. It appears whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("path", "reason"), *rows])
    write_whole(path, encode_text(table.getvalue()))


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
