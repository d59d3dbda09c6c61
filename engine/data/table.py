"""Tables of text as their dialects really are.

CSV (RFC 4180): fields between commas, or semicolons as spreadsheets of half of Europe write them; quotes around a
field, also after a blank, as AudioSet's lists have them. TSV (IANA text/tab-separated-values): fields between tabs, and
a quote is a letter like any other; only a field that is wholly between quotes is taken out of them. In both, a byte
order mark, UTF-16 with one, and any line ends.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from typing import TextIO

from ssast.engine.errors import UserError

_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def open_text(path: str) -> TextIO:
    """A file of text in UTF-8, with or without a byte order mark, or in UTF-16 with one. Bytes that are not UTF-8
    become surrogate escapes.

    Raises:
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    return open(path, encoding=encoding, errors="replace" if is_utf16 else "surrogateescape", newline="")


def read_table(path: str, file: TextIO) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """(header, rows) of a table; each row comes with the number of its line. Empty lines are passed over.

    Raises:
        UserError: while rows are read, one of more or fewer fields than the header has, or a quote that is never
            closed.
    """
    first = file.readline()
    delimiter = "\t" if path.lower().endswith((".tsv", ".tab")) else max(",;\t", key=first.count)
    skipped = 0
    if re.fullmatch(r"sep=.\s*", first, re.IGNORECASE):  # as spreadsheets say it
        delimiter, first, skipped = first[4], file.readline(), 1
    lines = chain([first], file)
    rows = _literal_rows(lines) if delimiter == "\t" else _quoted_rows(path, lines, delimiter, skipped)
    _, header = next(rows, (0, []))
    return [name.strip() for name in header], _even(path, rows, len(header))


def _literal_rows(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]


def _unquoted(field: str) -> str:
    if '"' in field and (quoted := _QUOTED.fullmatch(field.strip())):
        return quoted[1].replace('""', '"')
    return field


def _quoted_rows(path: str, lines: Iterator[str], delimiter: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    # Strict: a quote that is never closed would otherwise swallow the rest of the file without a word.
    rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for row in rows:
            if any(row):
                yield rows.line_num + skipped, row
    except csv.Error as error:
        raise UserError(f"malformed table {path}, line {rows.line_num + skipped}: {error}") from error


def _even(path: str, rows: Iterator[tuple[int, list[str]]], columns: int) -> Iterator[tuple[int, list[str]]]:
    for number, row in rows:
        if len(row) != columns:
            fields = f"{len(row)} fields under {columns} columns"
            advice = "put a field that has the separator in it between double quotes" if len(row) > columns else ""
            raise UserError(f"{path}, line {number}: {fields}; {advice or 'give every row as many as the header has'}")
        yield number, row
