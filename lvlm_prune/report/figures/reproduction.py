"""The figure of a reproduced table."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from lvlm_prune.report.figures.style import SERIES, house_style, legend_above, new_figure


@house_style()
def published_and_measured(rows: Mapping[str, tuple[float | None, float | None]]) -> Figure:
    """Two dots in each row, and a line between them; first row on top.

    Args:
        rows: Name -> retention that is published, and that was measured, in percent; None where there is none.

    Example:
        >>> figure = published_and_measured({"ATV": (94.0, 93.5), "Wanda": (88.4, None)})
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['ATV', 'Wanda']
    """
    figure, axes = new_figure(height=1.0 + 0.26 * len(rows))
    for place, (published, measured) in enumerate(rows.values()):
        if published is not None and measured is not None:
            axes.plot([published, measured], [place, place], "-", color=SERIES[0], alpha=0.35, linewidth=2)
    for name, which, colour in (("published", 0, SERIES[1]), ("measured", 1, SERIES[0])):
        dots = [(pair[which], place) for place, pair in enumerate(rows.values()) if pair[which] is not None]
        if dots:
            axes.plot(*zip(*dots), "o", color=colour, label=name)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("retained (%)")
    legend_above(figure, axes)
    return figure
