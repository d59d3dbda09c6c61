"""The one kind of error that a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right: one line saying what is wrong, where, and what to do.

    Command-line entry points print it without a traceback and exit with `exit_code`. Under a launcher only rank 0
    prints, since all ranks meet the same mistake, unless `every_rank` says that this one was met on one rank alone.
    """

    exit_code = 2

    def __init__(self, message: str, *, every_rank: bool = False) -> None:
        super().__init__(message)
        self.every_rank = every_rank


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """What follows "unknown key NAME": the one of `names` that is spelled most like it, after `prefix`; "" for none."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
