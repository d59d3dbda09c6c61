"""A process of the engine and what surrounds it: where caches go, streams that can write any name, and how it ends.

Imports nothing heavy: the front door reads it.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from .errors import UserError

HOMELESS_VARIABLE = "SSAST_HAS_NO_HOME"
"""Set where HOME is a stand-in, so that `~` in a path is still an error."""


def settle_process() -> None:
    """To be called before anything else is done. Gives this process, its children and the libraries that they use a
    place for caches where the account has no home folder, or none that can be written, and a name where it has none;
    and lets output show names that the terminal's encoding lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    home = os.path.expanduser("~")
    if os.path.isabs(home) and _can_be_written(Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache")):
        return
    try:
        folder = _temporary_home()
    except (OSError, UserError):
        return  # what needs a cache says so
    if not os.path.isabs(home):
        os.environ["HOME"], os.environ[HOMELESS_VARIABLE] = str(folder), "1"
    os.environ["XDG_CACHE_HOME"] = str(folder / ".cache")
    for variable in ("MPLCONFIGDIR", "TRITON_HOME"):
        os.environ.setdefault(variable, str(folder))


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ssast`, `~/.cache/ssast`, or a folder below the temporary one, of which a notice tells.

    Raises:
        UserError: there is neither a home folder nor a temporary one that can be written.
    """
    settle_process()
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise UserError("no home folder, and no temporary folder that can be written: set data.cache_dir")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "ssast"
    if folder.parent.parent.name == _temporary_name():
        print(
            f"note: no home folder that can be written; the cache is {folder}, or what data.cache_dir names",
            file=sys.stderr,
        )
    return folder


def leave(status: int) -> NoReturn:
    """End this process, whose work is done, with that exit status.

    Exit handlers run; the interpreter is not taken down, because the threads that gloo and others still have now and
    then abort the process while that happens, and a status of -6 would be all that a caller sees.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)


def _temporary_name() -> str:
    return f"ssast-{os.getuid()}"


def _temporary_home() -> Path:
    """A folder below the temporary one that is this user's alone.

    Raises:
        OSError: it cannot be made.
        UserError: it is another's.
    """
    folder = Path(tempfile.gettempdir()) / _temporary_name()
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user")
    return folder


def _can_be_written(folder: Path) -> bool:
    """Whether the folder can be written, or made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return False
    try:  # what the system says of rights is not all: a file system may be mounted to be read only
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
