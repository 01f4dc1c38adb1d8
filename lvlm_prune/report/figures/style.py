"""How every figure looks, and how it gets into a page or a file.

    @house_style()
    def drift(blocks): ──► new_figure() ──► Figure ──┬─► inline_svg()  text stays text, colours follow the page's theme
                                                     └─► save_png()    on white, for papers and READMEs

Figures are as wide as a phone: in a page they are scaled up where there is room, never down. Series differ in colour,
dash and marker; the colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.9
"""Width of a figure in inches; 72 of its units are one inch, and a phone has about 360."""
SEQUENTIAL = "cividis"
"""Colour map of quantities, the same to readers who do not see red or green."""

_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_INK, _LINE = "#1b1f24", "#d0d7de"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#6e7781")
"""Colours of series, in order."""
_SERIES_IN_THE_DARK = ("#58b0e8", "#f08043", "#2dc59b", "#e39cc4", "#f0b840", "#a9b4bf")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "x")
_VARIABLES = {_INK: "--ink", _LINE: "--line"} | {colour: f"--series-{n}" for n, colour in enumerate(SERIES, start=1)}

_STYLE: Any = {  # the stubs of matplotlib want a literal type per key
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=SERIES) + cycler(linestyle=_DASHES) + cycler(marker=_MARKERS),
    "svg.fonttype": "none",
    "svg.hashsalt": "lvlm-prune",
}

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


@contextmanager
def house_style() -> Iterator[None]:
    """The style while the context is open; decorates functions as well.

    Example:
        >>> @house_style()
        ... def line(values):
        ...     figure, axes = new_figure(height=2)
        ...     axes.plot(values)
        ...     return figure
        >>> inline_svg(line([1, 2, 3]), "Three values")[:4]
        Markup('<svg')
    """
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height: float = 2.6, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of the usual width and its axes, made without any global state of pyplot.

    Args:
        height: In inches.
        columns: Number of axes side by side.

    Returns:
        The figure, and its axes: one, or an array of them.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def legend_above(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Put the legend above the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(handles)))


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white, the same bytes for the same figure."""
    path.write_bytes(png_bytes(figure))


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG on white, the same bytes for the same figure."""
    drawn = io.BytesIO()
    with house_style():
        _arrange(figure)
        figure.savefig(drawn, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return drawn.getvalue()


def inline_svg(figure: Figure, description: str) -> Markup:
    """A figure as SVG that can stand in an HTML page.

    It scales to the width that it is given, its text is text, and its colours are the page's variables `--ink`,
    `--line` and `--series-1` to `--series-6` (see `theme_css`).

    Args:
        figure: What to draw.
        description: What it shows, for readers who do not see it.
    """
    drawn = io.BytesIO()
    with house_style():
        _arrange(figure)
        figure.savefig(drawn, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    # Labels may be names of files, and those may have signs in them that XML has not.
    root = ElementTree.fromstring(_NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", drawn.getvalue().decode()))
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    for group in root.iter(f"{{{_SVG}}}g"):
        group.attrib.pop("id", None)  # numbered anew in each figure: two of them on a page would clash
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": description}
    text = ElementTree.tostring(root, encoding="unicode")
    colours = "|".join(_VARIABLES)
    return Markup(re.sub(colours, lambda found: f"var({_VARIABLES[found[0]]})", text))


def _arrange(figure: Figure) -> None:
    """Lay the figure out once; drawing it as SVG and as PNG would do it anew, which takes half of the time."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        # Not "none", which leaves an engine that does nothing, for which every drawing is prepared by another one.
        figure.set_layout_engine(None)


def theme_css() -> str:
    """Declarations of the colours that `inline_svg` uses, for light and for dark pages."""
    light = [f"--series-{n}: {colour};" for n, colour in enumerate(SERIES, start=1)]
    dark = [f"--series-{n}: {colour};" for n, colour in enumerate(_SERIES_IN_THE_DARK, start=1)]
    return (
        f":root {{ color-scheme: light dark; --paper: #ffffff; --ink: {_INK}; --line: {_LINE}; {' '.join(light)} }}\n"
        "@media screen and (prefers-color-scheme: dark) "
        f"{{ :root {{ --paper: #14181d; --ink: #e6edf3; --line: #3a424b; {' '.join(dark)} }} }}"
    )


def ink_on(colour: Any) -> str:
    """Black or white, whichever can be read on this colour (anything that matplotlib takes for one)."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
