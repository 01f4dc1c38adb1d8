"""Figures of a sweep: what is retained, against the option that was swept."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lvlm_prune.report.figures.style import house_style, legend_above, new_figure


@house_style()
def retention_curve(lines: Mapping[str, Mapping[float, Sequence[float]]], label: str, height: float = 3.0) -> Figure:
    """Retained accuracy against a swept option, one line per method, mean and spread over seeds.

    Against `alpha` this is Fig. 4 of ATV-Pruning (arXiv 2603.16001), against the retained share of text tokens its
    Fig. 5.

    Args:
        lines: Method -> value of the option -> retention of each seed, as a share of the dense model's accuracy.
        label: Name of the option with its unit, for example `sparsity (%)`.
        height: In inches.

    Example:
        >>> figure = retention_curve({"ATV": {50.0: [0.8, 0.9], 60.0: [0.5]}}, "sparsity (%)")
        >>> figure.axes[0].get_ylabel()
        'retained accuracy (%)'
    """
    figure, axes = new_figure(height)
    for name, points in lines.items():
        values = sorted(points)
        means = [100 * sum(points[value]) / len(points[value]) for value in values]
        (line,) = axes.plot(values, means, label=name)
        if any(len(points[value]) > 1 for value in values):
            low = [100 * min(points[value]) for value in values]
            high = [100 * max(points[value]) for value in values]
            axes.fill_between(values, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    ticks = sorted({value for points in lines.values() for value in points})
    if len(ticks) <= 8:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    largest = max(share for points in lines.values() for shares in points.values() for share in shares)
    axes.set_ylim(0, max(106 * largest, 1.0))  # no marker is cut off
    axes.set_xlabel(label)
    axes.set_ylabel("retained accuracy (%)")
    legend_above(figure, axes)
    return figure
