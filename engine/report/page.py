"""Reports as self-contained HTML pages: the frame that all share, and a page of sections with pictures and tables."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from matplotlib.figure import Figure

from ssast.engine.files import write_whole

from .theme import DARK, LIGHT, Theme, png, printable


def render(template: Path, *, undefined: type[Undefined] = StrictUndefined, **values: Any) -> str:
    """The HTML of a template that extends frame.html.j2. Pages need no other file and no network.

    Raises:
        jinja2.TemplateError: the template and the values do not fit together.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=undefined)
    return printable(environment.get_template(template.name).render(**values))


def save_picture(path: Path, draw: Callable[[Theme], Figure]) -> dict[str, str]:
    """Write the picture for a light page to a PNG file; "light" and "dark" as base64, to put into a page.

    Raises:
        OSError: the file cannot be written.
    """
    images = {"light": png(draw(LIGHT)), "dark": png(draw(DARK))}
    write_whole(path, images["light"])
    return {name: base64.b64encode(image).decode() for name, image in images.items()}


class Tile(NamedTuple):
    """One figure of the row at the top."""

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
    """A heading, then in this order: `text`, `pictures` beside `tables`, `code`, `after`."""

    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    code: list[Code] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """What a page says, in plain text; escaping is the template's part."""

    title: str
    kind: str
    lead: str
    tiles: list[Tile]
    sections: list[Section]
    footer: str


def write_page(page: Page, folder: Path, name: str) -> Path:
    """Write `name`.html and pictures/`name`-*.png into the folder, in place of earlier ones; the path of the HTML.

    Raises:
        OSError: the folder cannot be written.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for earlier in pictures.glob(f"{name}-*.png"):
        earlier.unlink()
    embedded = {
        picture.file: save_picture(pictures / f"{name}-{picture.file}.png", picture.draw)
        for section in page.sections
        for picture in section.pictures
    }
    path = folder / f"{name}.html"
    write_whole(path, render(Path(__file__).with_name("page.html.j2"), page=page, embedded=embedded))
    return path
