"""The page of a sweep: retention against the swept option, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.runs.sweep.grid import SPARSITY
from lvlm_prune.runs.sweep.results import FinishedRun
from lvlm_prune.runs.sweep.tables import curves, summary, table_rows

TEMPLATE = "sweep.html.j2"


def write_sweep_page(
    folder: Path, model: str, runs: Sequence[FinishedRun], dense: Scores, across: str, note: str = ""
) -> None:
    """Write `report.html` and the figure `report/retention.png`.

    Args:
        folder: The sweep's folder.
        model: Name of the model.
        runs: What is finished.
        dense: Scores of the dense model.
        across: The option on the horizontal axis.
        note: What is still to be said, for example that runs are missing.
    """
    from lvlm_prune.report.figures.sweeps import retention_curve
    from lvlm_prune.report.page import PageFigure, Table, render_page, write_page

    heads, rows = table_rows(runs, across)
    label = "sparsity (%)" if across == SPARSITY else across.rpartition(".")[2].replace("_", " ")
    plates = []
    if lines := curves(runs, across):
        caption = (
            f"Retained accuracy against {label}, one line per method: mean over the calibration seeds, "
            "and the range from the lowest to the highest."
        )
        plates.append(PageFigure("retention", retention_curve(lines, label), caption))
    page = render_page(
        TEMPLATE,
        f"{model}: sweep of {len(runs)} runs",
        summary=summary(dense),
        table=Table(heads, rows),
        plates=plates,
        note=note,
    )
    write_page(folder, page, plates)
