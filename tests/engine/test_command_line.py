"""What users and other programs rely on: the command lines, and the names of the public packages.

`python tests/engine/test_command_line.py` writes command_line.txt anew; what changed in it is a change for users, and
belongs into CHANGELOG.md.
"""

import contextlib
import inspect
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ssast.engine
import ssast.kernels
from ssast.engine.cli import main, verbs

FROZEN = Path(__file__).with_name("command_line.txt")
METHODS = ("encode", "pretrain", "classify")


def help_of(*words: str) -> str:
    """What `ssast WORDS --help` prints, without what depends on the machine."""
    output = io.StringIO()
    environment = {"COLUMNS": "100", "NO_COLOR": "1"}
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return re.sub(r"\d+ here\)", "N here)", output.getvalue())


def signature(function: Callable[..., Any]) -> str:
    """Parameters and defaults; how types are written depends on the version of Python."""
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))


def public_names() -> str:
    lines = []
    for package in (ssast.engine, ssast.kernels):
        for name in sorted(package.__all__):
            value = getattr(package, name)
            lines.append(f"{package.__name__}.{name}{signature(value) if inspect.isfunction(value) else ''}")
    for name in METHODS:
        lines.append(f"SSAST.{name}{signature(getattr(ssast.engine.SSAST, name))}")
    return "\n".join(lines) + "\n"


def current() -> str:
    parts = [("ssast", help_of())]
    parts += [(f"ssast {verb}", help_of(verb)) for verb in sorted(verbs())]
    parts += [("names", public_names())]
    return "\n".join(f"==== {title}\n\n{text}" for title, text in parts)


def test_command_lines_and_public_names_are_what_they_were():
    """Compared word by word: Python versions break lines in different places."""
    frozen, now = (
        {part.partition("\n")[0]: part.split() for part in text.split("==== ")[1:]}
        for text in (FROZEN.read_text(encoding="utf-8"), current())
    )
    assert frozen.keys() == now.keys()
    for title, words in frozen.items():
        assert now[title] == words, f"{title} has changed; `python {Path(__file__).name}` renews command_line.txt"


if __name__ == "__main__":
    FROZEN.write_text(current(), encoding="utf-8")
