"""Figures over the blocks of a decoder: block number from left to right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lvlm_prune.report.figures.style import SEQUENTIAL, SERIES, WIDTH, house_style, ink_on, legend_above, new_figure

_HATCHES = ("", "//", "..", "xx", "\\\\", "++")
_MOST_PICTURES = 12
_FADED = 0.7 * 215.0  # a light grey lies over what does not count


@house_style()
def heat_map(
    values: Mapping[str, Mapping[int, float]],
    label: str,
    number_format: str = "{:.2f}",
    least_span: float = 0.0,
    span: tuple[float, float] | None = None,
    most: float = math.inf,
) -> Figure:
    """One row per kind of Linear, one column per block; missing values stay empty.

    Args:
        values: Kind of Linear -> block -> value.
        label: What the colour means, with its unit.
        number_format: How values are written into the cells, where there is room for it.
        least_span: Least width of the colour scale, so that differences that do not matter look alike.
        span: Ends of the colour scale, where several maps are to share one; default: those of the values.
        most: The largest value that there can be; the smallest is 0.
    """
    kinds, blocks = list(values), sorted({block for row in values.values() for block in row})
    grid = np.array([[values[kind].get(block, np.nan) for block in blocks] for kind in kinds], dtype=float)
    low, high = span or (float(np.nanmin(grid)), float(np.nanmax(grid)))
    low, high = _widened(low, high, max(least_span, 1e-6), most)
    figure, axes = new_figure(height=max(1.2 + 0.27 * len(kinds), 1.6))
    axes.grid(False)
    edges_x, edges_y = np.arange(len(blocks) + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5
    mesh = axes.pcolormesh(
        edges_x, edges_y, grid, cmap=SEQUENTIAL, vmin=low, vmax=high, linewidth=0.3, edgecolor="none"
    )
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_yticks(range(len(kinds)), kinds)
    _block_ticks(axes, blocks)
    if len(blocks) <= 8:
        for (row, column), value in np.ndenumerate(grid):
            if not math.isnan(value):
                colour = ink_on(mesh.cmap(mesh.norm(value)))
                text = number_format.format(value)
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5)
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", location="top", aspect=40, pad=0.03)
    bar.set_label(label)
    bar.outline.set_linewidth(0)
    return figure


def _widened(low: float, high: float, span: float, most: float) -> tuple[float, float]:
    """A range at least so wide, about its middle where no end of it leaves 0 to `most`.

    Example:
        >>> _widened(2.0, 3.0, 2.0, math.inf), _widened(0.0, 0.5, 1.0, math.inf), _widened(99.0, 99.0, 10.0, 100.0)
        ((1.5, 3.5), (0.0, 1.0), (90.0, 100.0))
    """
    missing = span - (high - low)
    if missing <= 0:
        return low, high
    lowest = min(max(low - missing / 2, min(low, 0.0)), max(most, high) - span)
    return lowest, lowest + span


@house_style()
def curves(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    least_span: float | None = None,
    names: Mapping[int, str] = {},
) -> Figure:
    """Lines over blocks, one panel under the other.

    Args:
        panels: Label of a vertical axis, with its unit -> name of a line -> block -> value.
        least_span: Least height of an axis that shows only the range of its values; None: axes start at zero.
        names: What blocks are called, where that is not their number.
    """
    figure = Figure(figsize=(WIDTH, 0.5 + 1.45 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(rows, panels.items()):
        for number, (name, points) in enumerate(lines.items()):
            axes.plot(list(points), list(points.values()), label=name, color=SERIES[number % len(SERIES)])
        axes.set_ylabel(label)
        if least_span is None:
            highest = max(axes.dataLim.y1, 0.0)
            axes.set_ylim(0, 1.06 * highest if math.isfinite(highest) and highest else None)  # no marker is cut off
        else:
            values = [value for points in lines.values() for value in points.values()]
            middle, span = (max(values) + min(values)) / 2, max(1.2 * (max(values) - min(values)), least_span)
            axes.set_ylim(middle - span / 2, middle + span / 2)
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    blocks = sorted({block for lines in panels.values() for points in lines.values() for block in points})
    if any(names.get(block, str(block)) != str(block) for block in blocks):
        _block_ticks(rows[-1], blocks, names, blocks)
    rows[-1].set_xlabel("block")
    figure.align_ylabels()
    if max(len(lines) for lines in panels.values()) > 1:
        legend_above(figure, rows[0], columns=3)
    return figure


@house_style()
def shares(parts: Mapping[str, Mapping[int, float]], label: str, names: Mapping[int, str] = {}) -> Figure:
    """Stacked bars over blocks.

    Args:
        parts: Name of a part -> block -> its share, between 0 and 1.
        label: What the shares are of.
        names: As for `curves`.
    """
    figure, axes = new_figure()
    blocks = sorted({block for part in parts.values() for block in part})
    bottom = np.zeros(len(blocks))
    for number, (name, part) in enumerate(parts.items()):
        height = 100 * np.array([part.get(block, 0.0) for block in blocks])
        colour, hatch = SERIES[number % len(SERIES)], _HATCHES[number % len(_HATCHES)]
        axes.bar(range(len(blocks)), height, bottom=bottom, label=name, color=colour, hatch=hatch, edgecolor="white")
        bottom += height
    axes.set_ylim(0, 100)
    axes.set_ylabel(f"{label} (%)")
    _block_ticks(axes, blocks, names)
    axes.grid(axis="x", visible=False)
    legend_above(figure, axes, columns=4)
    return figure


@house_style()
def score_distribution(
    histograms: Mapping[int, Mapping[str, Sequence[float]]], bins_per_decade: int, names: Mapping[int, str] = {}
) -> Figure:
    """Where the scores of each block lie, and where the threshold runs between what went and what stayed.

    Args:
        histograms: Block -> `first` (lower edge of the first bin, in parts of a decade), `pruned` and `kept` (weights
            per bin), `threshold` (10%, 50%, 90% quantile over rows).
        bins_per_decade: Number of bins in a factor of ten.
        names: As for `curves`.
    """
    blocks = sorted(histograms)
    spans = {block: (int(h["first"]), int(h["first"]) + len(h["kept"])) for block, h in histograms.items()}  # type: ignore[call-overload]
    low, high = min(first for first, _ in spans.values()), max(last for _, last in spans.values())
    grid = np.zeros((high - low, len(blocks)))
    for column, block in enumerate(blocks):
        counts = np.add(histograms[block]["pruned"], histograms[block]["kept"])
        grid[spans[block][0] - low : spans[block][1] - low, column] = 100 * counts / counts.sum()
    # A few lost weights far below all others would leave the picture empty.
    filled = np.flatnonzero((grid > 0.02).any(axis=1))
    low, grid = low + int(filled[0]), grid[filled[0] : filled[-1] + 1]
    figure, axes = new_figure(height=3.1)
    axes.grid(False)
    edges = 10.0 ** ((low + np.arange(len(grid) + 1)) / bins_per_decade)
    shown = np.ma.masked_equal(grid, 0)
    # With edges, since browsers leave a bright seam between cells that only touch.
    columns = np.arange(len(blocks) + 1) - 0.5
    mesh = axes.pcolormesh(columns, edges, shown, cmap=SEQUENTIAL, vmin=0, edgecolor="face", linewidth=0.4)
    axes.set_yscale("log")
    thresholds = np.array([histograms[block]["threshold"] for block in blocks], dtype=float)
    spread = np.abs(thresholds[:, [0, 2]] - thresholds[:, [1]]).T
    axes.errorbar(
        range(len(blocks)),
        thresholds[:, 1],
        yerr=spread,
        color=SERIES[1],
        linestyle="none",
        marker="_",
        markersize=10,
        markeredgewidth=2,
        label="threshold (median of the rows, 10 to 90%)",
    )
    axes.set_ylabel("score of a weight (log scale)")
    axes.set_ylim(edges[0], edges[-1])
    _block_ticks(axes, blocks, names)
    figure.colorbar(mesh, ax=axes, label="weights of the block (%)", aspect=30, pad=0.02).outline.set_linewidth(0)
    legend_above(figure, axes)
    return figure


@house_style()
def bars(values: Mapping[str, float], label: str) -> Figure:
    """Horizontal bars, first on top.

    Args:
        values: Name -> value.
        label: What the values are, with their unit.
    """
    figure, axes = new_figure(height=0.7 + 0.24 * len(values))
    drawn = axes.barh(range(len(values)), list(values.values()), color=SERIES[0])
    axes.bar_label(drawn, [f"{value:.3g}" for value in values.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    return figure


@house_style()
def tokens_on_picture(
    picture: Image.Image, grid: tuple[int, int], weights: Mapping[int, Sequence[float]], names: Mapping[int, str] = {}
) -> Figure:
    """Which visual tokens count in which block, over the picture: what does not count is faded.

    Args:
        picture: The picture.
        grid: Rows and columns of its visual tokens, which cover it evenly in reading order.
        weights: Block -> weight of each visual token, between 0 and 1.
        names: As for `curves`.
    """
    blocks = sorted(weights)
    if len(blocks) > _MOST_PICTURES:
        blocks = [blocks[round(place)] for place in np.linspace(0, len(blocks) - 1, _MOST_PICTURES)]
    columns = max(2, min(4, len(blocks)))
    rows = -(-len(blocks) // columns)
    shape = picture.height / picture.width
    figure = Figure(figsize=(WIDTH, rows * (WIDTH / columns * shape + 0.25)), layout="constrained")
    small = picture.convert("RGB")
    small.thumbnail((240, 240))
    for number, block in enumerate(blocks, start=1):
        axes = figure.add_subplot(rows, columns, number)
        counts = Image.fromarray((255 * np.reshape(weights[block], grid)).astype(np.uint8))
        share = np.asarray(counts.resize(small.size, Image.Resampling.NEAREST), dtype=float)[..., None] / 255
        colours = np.asarray(small, dtype=float)
        axes.imshow((colours * share + (0.3 * colours + _FADED) * (1 - share)).astype(np.uint8))
        axes.set_title(f"block {names.get(block, block)}", pad=2, fontsize=9)
        axes.set_axis_off()
    return figure


def _block_ticks(
    axes: Axes, blocks: Sequence[int], names: Mapping[int, str] = {}, places: Sequence[int] | None = None
) -> None:
    """Name some of the blocks under an axis, at their places; by default one stands beside the other from 0 on."""
    step = -(-len(blocks) // 12)
    written = [names.get(block, str(block)) for block in blocks[::step]]
    axes.set_xticks((range(len(blocks)) if places is None else places)[::step], written)
    if any(map(str.isalpha, "".join(written))):  # longer than a number
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_xlabel("block")
