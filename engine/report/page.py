"""A report as a self-contained HTML page and as Markdown, both from one description of what it says."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

import ssast.engine.report.run
from ssast.engine.files import write_whole
from ssast.engine.report.run import DARK, LIGHT, Theme, png


class Tile(NamedTuple):
    label: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """`align`: "l" or "r" for each column. `code`: the first column holds names out of code."""

    head: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]
    code: bool = False


class Picture(NamedTuple):
    """`file`: its name without ".png"."""

    file: str
    alt: str
    draw: Callable[[Theme], Figure]


class Code(NamedTuple):
    """Text to be shown as it is, folded away if it is long."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    code: list[Code] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    title: str
    kind: str
    lead: str
    tiles: list[Tile]
    sections: list[Section]
    footer: str


def write_page(page: Page, folder: Path, name: str) -> Path:
    """Write `name`.html, `name`.md and pictures/`name`-*.png into the folder, in place of earlier ones; the path of the
    HTML.

    Raises:
        OSError: the folder cannot be written.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for earlier in pictures.glob(f"{name}-*.png"):
        earlier.unlink()
    embedded = {}
    for picture in (picture for section in page.sections for picture in section.pictures):
        light, dark = png(picture.draw(LIGHT)), png(picture.draw(DARK))
        write_whole(pictures / f"{name}-{picture.file}.png", light)
        embedded[picture.file] = {"light": base64.b64encode(light).decode(), "dark": base64.b64encode(dark).decode()}
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    html = templates.get_template("page.html.j2").render(page=page, embedded=embedded, style=_style_of_runs())
    write_whole(folder / f"{name}.html", html)
    return folder / f"{name}.html"


def _style_of_runs() -> str:
    """The style sheet of a run's report: the two look alike."""
    template = Path(ssast.engine.report.run.__file__).with_name("run.html.j2").read_text(encoding="utf-8")
    return template.partition("<style>")[2].partition("</style>")[0]
