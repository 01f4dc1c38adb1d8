"""Figures over tasks: one group of bars for each."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from lvlm_prune.report.figures.style import SERIES, house_style, legend_above, new_figure


@house_style()
def task_bars(values: Mapping[str, Mapping[str, float]], label: str, whole: float) -> Figure:
    """Horizontal bars, one group for each task, first task on top.

    Args:
        values: Checkpoint -> task -> value; tasks may be missing.
        label: What the values are, with their unit.
        whole: Where a line is drawn, and how far the axis reaches at least.

    Example:
        >>> figure = task_bars({"pruned": {"colour": 98.0, "count": 51.5}}, "retained (%)", 100.0)
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
            end = whole if 0.88 * whole < value < whole else value  # the line does not go through the number
            axes.annotate(f"{value:.1f}", (end, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(whole, color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    largest = max([whole, *(value for of in values.values() for value in of.values())])
    axes.set_xlim(0, 1.12 * largest)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    if len(values) > 1:
        legend_above(figure, axes)
    return figure
