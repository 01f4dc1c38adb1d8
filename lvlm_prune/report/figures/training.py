"""Figures of training."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lvlm_prune.report.figures.style import house_style, legend_above, new_figure


@house_style()
def loss_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Losses over optimizer steps.

    Args:
        history: Name of a loss -> its points, step and value.
    """
    figure, axes = new_figure()
    for name, points in history.items():
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        marker = "" if len(points) > 40 else "o"
        axes.plot(steps, losses, label=name.replace("_", " "), marker=marker)
    # With room above the largest loss, which is mostly the first one: a line at the very edge is cut in half.
    axes.set_ylim(0, 1.06 * max((loss for points in history.values() for _, loss in points), default=1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats)")
    legend_above(figure, axes)
    return figure
