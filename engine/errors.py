"""The one kind of error that a user is meant to read."""


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
