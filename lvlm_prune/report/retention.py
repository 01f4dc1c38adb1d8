"""What is left of each task's score, as bars."""

from __future__ import annotations

from collections.abc import Mapping

from lvlm_prune.report.figures.tasks import task_bars
from lvlm_prune.report.page import PageFigure


def retained_figure(name: str, retained: Mapping[str, Mapping[str, float | None]]) -> PageFigure | None:
    """Bars of each task, those that nothing can be said of left out.

    Args:
        name: Name of the figure.
        retained: Checkpoint, for example `pruned` -> task -> score over the dense model's; None where that is zero.

    Returns:
        The figure; None where there are no tasks.
    """
    tasks = {task for of in retained.values() for task, share in of.items() if share is not None}
    if not tasks:
        return None
    percent = {
        checkpoint: {task: 100 * share for task, share in of.items() if share is not None}
        for checkpoint, of in retained.items()
    }
    caption = "What is left of the dense model's score in each task; the line is all of it."
    return PageFigure(name, task_bars(percent, "retained (%)"), caption)
