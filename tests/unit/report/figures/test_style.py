"""Figures go into a page or a file, and look the same wherever they were made."""

import math
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from lvlm_prune.report.figures.blocks import curves
from lvlm_prune.report.figures.style import (
    SERIES,
    house_style,
    ink_on,
    inline_svg,
    legend_above,
    new_figure,
    save_png,
    theme_css,
)
from lvlm_prune.report.figures.training import loss_curves


@house_style()
def _lines():
    figure, axes = new_figure()
    for number in range(len(SERIES)):
        axes.plot([0, 1, 2], [number, 1, 2], label=f"line {number}")
    axes.set_xlabel("block")
    legend_above(figure, axes, columns=3)
    return figure


def test_a_figure_in_a_page_follows_the_theme_and_keeps_its_text():
    svg = inline_svg(_lines(), 'six lines < "seven"')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'six lines < "seven"'
    assert "width" not in root.attrib
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "block" in texts
    assert "line 5" in texts
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", svg))
    declared = re.findall(r"(--[a-z0-9-]+):", theme_css())
    assert {f"--series-{n}" for n in range(1, 7)} | {"--ink", "--line"} == used
    # Once for light and once for dark.
    assert all(declared.count(name) == 2 for name in used)
    assert not re.findall(r"#[0-9a-f]{6}", svg)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_label_with_signs_that_xml_has_not_is_drawn():
    figure = _lines()
    figure.axes[0].set_xlabel("a\x1b[31mred\x00\uffff")
    texts = [element.text for element in ElementTree.fromstring(inline_svg(figure, "lines")).iter()]
    assert any("[31mred" in (text or "") for text in texts)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    assert inline_svg(_lines(), "lines") == inline_svg(_lines(), "lines")
    for name in ("one.png", "two.png"):
        save_png(_lines(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert Image.open(tmp_path / "one.png").convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_figures_of_one_page_do_not_share_names():
    names = re.findall(r'<g id="', inline_svg(_lines(), "lines"))
    assert not names


@pytest.mark.parametrize(("colour", "ink"), [("white", "black"), ("#00224e", "white"), ("#fee838", "black")])
def test_text_on_a_colour_can_be_read(colour, ink):
    assert ink_on(colour) == ink


def test_no_loss_is_cut_at_the_edge_of_its_figure():
    figure = loss_curves({"train_loss": [(1, 4.9), (2, 4.7)], "validation_loss": [(2, 5.2)]})
    low, high = figure.axes[0].get_ylim()
    assert low == 0
    assert high > 5.2 * 1.03


def test_no_marker_of_a_curve_over_blocks_is_cut_off():
    figure = curves({"relative error": {"before": {0: 0.0146, 1: 0.0201}, "after": {0: 0.0129, 1: 0.019}}})
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == 0
    assert top >= 1.04 * 0.0201
    for nothing in ({0: 0.0, 1: 0.0}, {0: math.nan}):
        assert curves({"drift": {"text": nothing}}).axes[0].get_ylim()[0] == 0
