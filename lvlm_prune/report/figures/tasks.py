"""Figures over tasks: one group of bars for each."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from lvlm_prune.report.figures.style import SERIES, house_style, legend_above, new_figure

_WHOLE = 100.0  # where a line is drawn, and how far the axis reaches at least


@house_style()
def task_bars(values: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """Horizontal bars, one group for each task, first task on top.

    Args:
        values: Checkpoint -> task -> value; tasks may be missing.
        label: What the values are, with their unit.

    Example:
        >>> figure = task_bars({"pruned": {"colour": 98.0, "count": 51.5}}, "retained (%)")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['colour', 'count']
    """
    tasks = list(dict.fromkeys(task for of in values.values() for task in of))
    thickness = 0.8 / len(values)
    figure, axes = new_figure(height=0.9 + 0.16 * len(tasks) * (0.6 + len(values)))
    for number, (name, of) in enumerate(values.items()):
        places = [
            place + (number - (len(values) - 1) / 2) * thickness for place, task in enumerate(tasks) if task in of
        ]
        shown = [of[task] for task in tasks if task in of]
        axes.barh(places, shown, thickness, label=name, color=SERIES[number % len(SERIES)])
        for place, value in zip(places, shown, strict=True):
            end = _WHOLE if 0.88 * _WHOLE < value < _WHOLE else value  # the line does not go through the number
            axes.annotate(f"{value:.1f}", (end, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(_WHOLE, color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    largest = max([_WHOLE, *(value for of in values.values() for value in of.values())])
    axes.set_xlim(0, 1.12 * largest)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    if len(values) > 1:
        legend_above(figure, axes)
    return figure
