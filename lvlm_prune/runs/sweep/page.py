"""The page of a sweep: retention against the swept option, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.output.provenance import versions
from lvlm_prune.runs.sweep.grid import SPARSITY
from lvlm_prune.runs.sweep.results import FinishedRun
from lvlm_prune.runs.sweep.tables import curves, summary, table_rows

TEMPLATE = "sweep.html.j2"


def write_sweep_page(
    folder: Path,
    model: str,
    runs: Sequence[FinishedRun],
    dense: Scores,
    across: str,
    note: str,
    config: Mapping[str, Any],
) -> None:
    """Write `report.html` and the figure `report/retention.png`.

    Args:
        folder: The sweep's folder.
        model: Name of the model.
        runs: What is finished.
        dense: Scores of the dense model.
        across: The option on the horizontal axis.
        note: What is still to be said, for example that runs are missing.
        config: What repeats the command.
    """
    from lvlm_prune.report.figures.sweeps import retention_curve
    from lvlm_prune.report.figures.tasks import task_bars
    from lvlm_prune.report.page import PageFigure, Table, render_page, repeat_command, write_page

    heads, rows = table_rows(runs, across)
    label = "sparsity (%)" if across == SPARSITY else across.rpartition(".")[2].replace("_", " ")
    page_figures = []
    if lines := curves(runs, across):
        places = {place for points in lines.values() for place in points}
        if len(places) > 1:
            caption = (
                f"Retained accuracy against {label}, one line per method: mean over the calibration seeds, "
                "and the range from the lowest to the highest."
            )
            drawing = retention_curve(lines, label)
        else:  # no line goes through one place
            place = f"{places.pop():g}"
            where = f"{place}% sparsity" if across == SPARSITY else f"{label} {place}"
            means = {name: 100 * fmean(next(iter(points.values()))) for name, points in lines.items()}
            caption = f"Retained accuracy at {where}, mean over the calibration seeds; the line is all of it."
            drawing = task_bars({"retained": means}, "retained accuracy (%)")
        page_figures.append(PageFigure("retention", drawing, caption))
    page = render_page(
        TEMPLATE,
        f"{model}: sweep of {len(runs)} runs",
        repeat=repeat_command("sweep", {"config": config}),
        versions=versions(),
        summary=summary(dense),
        table=Table(heads, rows),
        page_figures=page_figures,
        note=note,
    )
    write_page(folder, page, page_figures)
