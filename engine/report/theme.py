"""How every report and picture looks: colours for light and dark pages, sizes, axes, pictures as small PNG files."""

from __future__ import annotations

import io
import re
from typing import Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

WIDTH, DENSITY = 4.2, 200  # inches, and dots per inch: twice the 100 CSS pixels that a reader sees per inch
PICTURE_BYTES = 120_000
SPECTROGRAM = colormaps["magma"]


class Theme(NamedTuple):
    """Colours of a page's pictures. The page itself has the same ones in frame.html.j2."""

    paper: str
    ink: str
    soft: str
    grid: str
    train: str
    valid: str
    hidden: str
    found: str
    missed: str


LIGHT = Theme("#ffffff", "#1d1d1f", "#6e6e73", "#e8e8ea", "#2f6db3", "#cf6a1f", "#c9c9ce", "#2f9e68", "#d14b45")
DARK = Theme("#1c1c1f", "#ececee", "#9b9ba1", "#303035", "#78aef0", "#f2a25c", "#5b5b62", "#4cc38a", "#f0716a")

PALETTE = {
    "red": "#d1495b",
    "orange": "#e58a5a",
    "yellow": "#e0b13c",
    "olive": "#a3b944",
    "blue": "#4a90d9",
    "cyan": "#62bccb",
    "navy": "#3a6cb5",
    "violet": "#9168ba",
    "green": "#3f9e72",
    "brown": "#94714f",
    "grey": "#9a9aa1",
}
"""For parts and competitors side by side, on light and dark pages alike."""


def style_axes(axes: Axes, theme: Theme = LIGHT, *, grid: Literal["x", "y", "both"] | None = None) -> None:
    """No frame and no ticks; `grid` draws lines behind what is shown."""
    axes.set_facecolor(theme.paper)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=theme.soft, labelsize=8.5, length=0, which="both")
    if grid:
        axes.grid(True, axis=grid, color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG with a palette, of as many colours as keep the file small."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    for colours in (64, 32, 24, 16, 8):
        packed = io.BytesIO()
        # Other methods spend the palette on the most frequent colours, and lose those of thin lines and text.
        palette = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, kmeans=2000)
        palette.save(packed, format="PNG", dpi=(DENSITY, DENSITY))
        if packed.tell() < PICTURE_BYTES:
            break
    return packed.getvalue()


def printable(text: str) -> str:
    """The text with U+FFFD in place of lone surrogates, which no font can draw and no UTF-8 can hold: they stand for
    bytes of a file's name that are not UTF-8.
    """
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
