"""Self-contained pages: a record of a run, a template, figures drawn into it; no script, nothing from outside.

record ──► show(record, "blocks", 0, "mean_drift") ──► <data value="0.01234" data-path="blocks/0/mean_drift">0.0123
figure ──► PageFigure: drawing, caption, numbers behind it ──► <figure> in the page, and a PNG in a folder beside it

Every number on a page knows where it comes from, so a page can be held against the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.names import FIGURE_FOLDER, PAGE_NAME
from lvlm_prune.report.figures.style import inline_svg, save_png, theme_css

_UNITS = {
    "count": lambda value: f"{value:,.0f}".replace(",", "\u202f"),
    "number": lambda value: f"{value:.1f}",
    "percent": lambda value: f"{100 * value:.1f}%",
    "share": lambda value: f"{value:.4f}",
    "small": lambda value: f"{value:.3g}",
    "seconds": lambda value: f"{value:.1f} s",
    "megabytes": lambda value: f"{value / 1e6:.1f} MB",
}


@dataclass(frozen=True)
class Table:
    """A table of a page: names of columns, and rows of text and `show`n numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class PageFigure:
    """A figure of a page.

    Args:
        name: Name of its PNG without the suffix, and its anchor in the page.
        drawing: The figure.
        caption: What it shows, in a sentence or two; `Markup` where a number in it is `show`n.
        table: The numbers that it is drawn from; None where the page shows them elsewhere.
    """

    name: str
    drawing: Figure
    caption: str
    table: Table | None = None

    @cached_property
    def svg(self) -> Markup:
        """The drawing as part of a page."""
        plain = self.caption.striptags() if isinstance(self.caption, Markup) else self.caption
        return inline_svg(self.drawing, plain)


def show(record: Any, *path: str | int, unit: str = "small") -> Markup:
    """A number of a record for a page, which tells where it stands in the record.

    Args:
        record: Nested mappings and lists.
        path: Keys and indices down to the number.
        unit: `count`, `number` (one decimal), `percent` (of a share), `share`, `small` (three digits), `seconds`, or
            `megabytes` (of bytes).

    Example:
        >>> show({"sparsity": {"achieved": 0.59375}}, "sparsity", "achieved", unit="percent")
        Markup('<data value="0.59375" data-path="sparsity/achieved" data-unit="percent">59.4%</data>')
    """
    value = record
    for key in path:
        value = value[key]
    text = _UNITS[unit](value)
    where = escape("/".join(map(str, path)))
    return Markup(f'<data value="{value!r}" data-path="{where}" data-unit="{unit}">{text}</data>')


def render_page(template: str, title: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        template: Name of a template of this package, which extends `base.html.j2`.
        title: Title and heading.
        values: What else the template wants; names of files and models are escaped.
    """
    environment = Environment(
        loader=PackageLoader("lvlm_prune.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(title=title, theme_css=Markup(theme_css()), **values)


def write_page(folder: Path, page: str, plates: Sequence[PageFigure] | Mapping[str, PageFigure]) -> None:
    """Write `report.html` into a folder, and its figures as PNG into `report/` beside it."""
    drawn = list(plates.values()) if isinstance(plates, Mapping) else list(plates)
    if drawn:
        (folder / FIGURE_FOLDER).mkdir(exist_ok=True)
    for plate in drawn:
        save_png(plate.drawing, folder / FIGURE_FOLDER / f"{plate.name}.png")
    replace_durably(folder / PAGE_NAME, page.encode())
