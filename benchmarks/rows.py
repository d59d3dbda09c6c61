"""Results as data: one CSV file a benchmark, one row a measurement, each with the environment it was measured in."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from ssast.engine.errors import UserError

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def append_row(file: Path, row: Row) -> None:
    """Add a row; the columns are those of the first one.

    Raises:
        UserError: the file cannot be written, or has other columns than the row.
    """
    try:
        is_new = not file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = list(row) if is_new else read_columns(file)
        if set(columns) != set(row):
            raise UserError(f"{file}: holds something else than rows of this kind; give another file")
        with open(file, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def read_columns(file: Path) -> list[str]:
    """The names in the file's first line; none of an empty file."""
    with open(file, newline="", encoding="utf-8") as stream:
        return next(csv.reader(stream), [])


def read_rows(file: Path) -> list[dict[str, str]]:
    """All rows, by column."""
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class Sink:
    """Where a command's rows go: to a file as they come, or to stdout at the end."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Raises `UserError` as `append_row` does."""
        self.rows.append(row)
        if self.file is not None:
            append_row(self.file, row)

    def close(self) -> None:
        """Say where the rows are, or print them."""
        if self.file is not None:
            print(f"{len(self.rows)} rows added to {self.file}", file=sys.stderr, flush=True)
        elif self.rows:
            writer = csv.DictWriter(sys.stdout, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
