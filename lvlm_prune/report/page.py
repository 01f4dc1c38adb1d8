"""Self-contained pages: a record of a run, a template, figures drawn into it; no script, nothing from outside.

record ──► show(record, "blocks", 0, "mean_drift") ──► <data value="0.01234" data-path="blocks/0/mean_drift">0.0123
figure ──► PageFigure: drawing, caption, numbers behind it ──► <figure> in the page, and a PNG in a folder beside it

Every number on a page knows where it comes from, so a page can be held against the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lvlm_prune.checkpoints.hub import hub_name
from lvlm_prune.demo import NAMES
from lvlm_prune.errors import InputError, first_line
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.names import FIGURE_FOLDER, PAGE_NAME
from lvlm_prune.output.private import is_left_out, left_out_options
from lvlm_prune.output.units import readable_percent, readable_size
from lvlm_prune.report.figures.style import inline_svg, png_bytes, theme_css

_LONGEST_WORD = 24
"""Characters of a word in a table that are kept together."""

_UNITS = {
    "count": lambda value: f"{value:,.0f}".replace(",", "\u202f"),
    "number": lambda value: f"{value:,.1f}".removesuffix(".0").replace(",", "\u202f"),
    "percent": lambda value: f"{100 * value:.1f}%",
    "sparsity": readable_percent,
    "share": lambda value: f"{value:.4f}",
    "small": lambda value: f"{value:.3g}",
    "measure": lambda value: f"{value:.4g}",
    "seconds": lambda value: f"{value:.1f} s",
    "bytes": readable_size,
}


_drawn: ContextVar[Mapping[str, tuple[Markup, bytes]]] = ContextVar("drawn", default=MappingProxyType({}))


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
        if self.name in (drawn := _drawn.get()):
            return drawn[self.name][0]
        plain = self.caption.striptags() if isinstance(self.caption, Markup) else self.caption
        return inline_svg(self.drawing, plain)

    @cached_property
    def png(self) -> bytes:
        """The drawing as a file of its own."""
        if self.name in (drawn := _drawn.get()):
            return drawn[self.name][1]
        return png_bytes(self.drawing)

    def draw(self) -> None:
        """Draw it both ways now; later it costs nothing."""
        self.svg, self.png  # noqa: B018


def draw_all(page_figures: Mapping[str, PageFigure]) -> None:
    """Draw the figures of a page now."""
    for page_figure in page_figures.values():
        page_figure.draw()


def show(record: Any, *path: str | int, unit: str = "small") -> Markup:
    """A number of a record for a page, which tells where it stands in the record.

    Args:
        record: Nested mappings and lists.
        path: Keys and indices down to the number.
        unit: `count`, `number` (one decimal, where it is not whole), `percent` (of a share), `sparsity` (in percent,
            two decimals at most), `share`, `small` (three digits), `measure` (four digits, as perplexity and KL on the
            screen), `seconds`, or `bytes`.

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


def model_name(record: Mapping[str, Any]) -> str:
    """What a model is called on a page: the last part of its path, or its name on the hub where it lies in a cache.

    Args:
        record: A record of a run, with the entry `model`.

    Example:
        >>> model_name({"model": {"path": "/home/me/my-llava"}}), model_name({"model": {"path": "llava-hf/next"}})
        ('my-llava', 'next')
    """
    model = record["model"]
    cached = hub_name("", model.get("folder") or "")
    return cached or PurePath(model["path"]).name or "model"


def repeat_command(verb: str, record: Mapping[str, Any]) -> str:
    """The command that repeats a run; it asks for what was left out of `config.yaml` beside the page.

    Example:
        >>> repeat_command("prune", {"config": {"data": {"path": "(left out)"}}})
        'lvlm-prune prune --config config.yaml --output NEW_FOLDER --data.path ...'
        >>> repeat_command("sweep", {"config": {"table": "atv/table_2"}})  # of a part of a table
        'lvlm-prune reproduce --config config.yaml --output NEW_FOLDER'
    """
    config = record.get("config") or {}
    verb = "reproduce" if "table" in config else verb
    wanted = [option for option in left_out_options(config) if option != "output"]
    model = (config.get("model") or {}).get("path", "")
    if is_left_out(record) and model not in NAMES and hub_name(model) is None:
        wanted.insert(0, "model.path")  # its last name stands there
    return " ".join(
        [f"lvlm-prune {verb} --config config.yaml --output NEW_FOLDER", *(f"--{name} ..." for name in wanted)]
    )


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
    environment.filters["breakable"] = _breakable
    environment.filters["coded"] = _coded
    return _with_contents(
        environment.get_template(template).render(title=title, theme_css=Markup(theme_css()), **values)
    )


def _breakable(value: Any) -> Any:
    """A name that a narrow screen breaks between its words, and not in the middle of one; numbers stay in one piece.

    What has no words, as a digest has none, may break after every so many characters.

    Example:
        >>> print(_breakable("layers.0.self_attn"), _breakable("UniformAllocation"), _breakable("0.5"))
        layers.<wbr>0.<wbr>self_<wbr>attn Uniform<wbr>Allocation 0.5
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    without_words = rf"\w{{{_LONGEST_WORD}}}(?=\w)"
    behind_letter, before_letter, inside = r"(?<=[^\W\d])[._](?=\w)", r"[._](?=[^\W\d])", r"(?<=[a-z])(?=[A-Z])"
    text = str(escape(value)).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return Markup(re.sub(f"{without_words}|{behind_letter}|{before_letter}|{inside}", r"\g<0><wbr>", text))


def _coded(text: str) -> Markup:
    """A sentence of Markdown in a page: what stands between backticks is code.

    Example:
        >>> print(_coded("ChartQA is `color` & more"))
        ChartQA is <code>color</code> &amp; more
    """
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _with_contents(page: str) -> str:
    """A page whose sections have anchors, and a list of them below its heading; as it is where there are two or fewer.

    Example:
        >>> print(_with_contents("<h1>A run</h1><h2>What</h2><h2>When</h2><h2>Why, then</h2>").replace("<h2", "\\n<h2"))
        <h1>A run</h1>
        <nav ...><a href="#what">What</a> <a href="#when">When</a> <a href="#why-then">Why, then</a></nav>
        <h2 id="what">What</h2>
        <h2 id="when">When</h2>
        <h2 id="why-then">Why, then</h2>
    """
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    if len(titles) <= 2:
        return page
    anchors = {title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles}
    page = re.sub(r"<h2>(.*?)</h2>", lambda found: f'<h2 id="{anchors[found[1]]}">{found[1]}</h2>', page)
    links = " ".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items())
    return page.replace("</h1>", f'</h1>\n<nav aria-label="Contents">{links}</nav>', 1)


@contextmanager
def drawn_again(folder: Path) -> Iterator[None]:
    """While the context is open, figures are those that are on the page in a folder already: drawing takes longest.

    Args:
        folder: The page there was made from the same numbers.
    """
    text = (folder / PAGE_NAME).read_text(encoding="utf-8")
    drawn: dict[str, tuple[Markup, bytes]] = {}
    for found in re.finditer(r'<figure id="([\w-]+)">\n(<svg.*?</svg>)\n<figcaption>', text, re.DOTALL):
        png = folder / FIGURE_FOLDER / f"{found[1]}.png"
        if png.is_file():
            drawn[found[1]] = Markup(found[2]), png.read_bytes()
    token = _drawn.set(drawn)
    try:
        yield
    finally:
        _drawn.reset(token)


@contextmanager
def read_from(folder: Path, name: str, is_read: bool) -> Iterator[None]:
    """While the context is open, a page is made of a record of an earlier run, maybe of another version.

    Args:
        folder: Folder of the record.
        name: File name of the record.
        is_read: Whether it was read; what a run cannot make of its own numbers is an error of the program.

    Raises:
        InputError: No page can be made of it.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError) as error:
        if not is_read:
            raise
        problem = f"no page can be made of its {name}, which is not as a run writes it ({first_line(error)})"
        raise InputError("output", folder, problem) from error


def write_page(folder: Path, page: str, page_figures: Sequence[PageFigure] | Mapping[str, PageFigure]) -> None:
    """Write `report.html` into a folder, and its figures as PNG into `report/` beside it."""
    drawn = list(page_figures.values()) if isinstance(page_figures, Mapping) else list(page_figures)
    figures = folder / FIGURE_FOLDER
    if figures.is_symlink():  # what it leads to is somebody else's
        figures.unlink()
    if drawn:
        figures.mkdir(exist_ok=True)
    for page_figure in drawn:
        (figures / f"{page_figure.name}.png").unlink(missing_ok=True)
        (figures / f"{page_figure.name}.png").write_bytes(page_figure.png)
    replace_durably(folder / PAGE_NAME, page.encode())
