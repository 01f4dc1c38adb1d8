"""The page of a reproduced table: published beside measured, and the figures that there are data for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_prune.output.provenance import versions
from lvlm_prune.runs.reproduce.outcome import PartOutcome
from lvlm_prune.runs.reproduce.tables import Table
from lvlm_prune.runs.reproduce.text import average_rows, column_rows, heading, notes

if TYPE_CHECKING:
    from lvlm_prune.report.page import PageFigure

TEMPLATE = "reproduction.html.j2"


def write_table_page(
    folder: Path, table: Table, outcomes: Sequence[PartOutcome], config: Mapping[str, Any] | None
) -> None:
    """Write `report.html` and its figures.

    Args:
        folder: Where the table is written.
        table: What was to be done.
        outcomes: What came out for each model.
        config: What repeats the command; None where nothing does.
    """
    from lvlm_prune.report.page import Table as PageTable
    from lvlm_prune.report.page import render_page, repeat_command, write_page

    figures: list[PageFigure] = []
    sections = []
    for number, part in enumerate(outcomes):
        drawn = _figures(table, part, f"-{number + 1}" if len(outcomes) > 1 else "")
        figures += drawn
        sections.append(
            {
                "name": part.of,
                "checkpoint": part.model,
                "averages": PageTable(*average_rows(part, table.labels)),
                "columns": PageTable(*column_rows(part, table.labels)),
                "notes": notes(part),
                "figures": drawn,
            }
        )
    repeat = repeat_command("reproduce", {"config": config}) if config else ""
    page = render_page(TEMPLATE, heading(table), sections=sections, runs=table.runs, repeat=repeat, versions=versions())
    write_page(folder, page, figures)


def _figures(table: Table, part: PartOutcome, suffix: str) -> list[PageFigure]:
    from lvlm_prune.report.figures.blocks import curves, heat_map
    from lvlm_prune.report.figures.reproduction import published_and_measured
    from lvlm_prune.report.figures.sweeps import retention_curve
    from lvlm_prune.report.page import PageFigure

    found = []
    averages = {
        row.label: (row.average.compared[0], row.average.measured)
        for row in part.rows
        if row.average.compared[0] is not None or row.average.measured is not None
    }
    if averages:
        printed = any(published is not None for published, _ in averages.values())
        of = ", over the columns that were measured" if part.is_partial else ""
        caption = f"Retention as the paper prints it{of}, and as it was measured."
        caption = caption if printed else "Retention as it was measured; the paper prints none."
        found.append(PageFigure(f"retention{suffix}", published_and_measured(averages), caption))
    if table.axis:
        lines = _along_axis(part)
        if lines:
            caption = f"Retention against {table.axis}."
            found.append(PageFigure(f"axis{suffix}", retention_curve(lines, table.axis), caption))
    drift = {row.label: dict(enumerate(row.drift)) for row in part.rows if row.drift}
    if drift:
        caption = "Mean drift of the visual tokens at each block, while the blocks before it were pruned."
        found.append(PageFigure(f"drift{suffix}", curves({"mean drift": drift}), caption))
    for number, row in enumerate(row for row in part.rows if row.sparsity):
        kinds = {kind: {block: 100 * share for block, share in enumerate(of)} for kind, of in row.sparsity.items()}
        caption = f"{row.label}: sparsity of each kind of Linear at each block."
        drawing = heat_map(kinds, "sparsity (%)", "{:.1f}", least_span=10, most=100)
        found.append(PageFigure(f"sparsity{suffix}-{number + 1}", drawing, caption))
    return found


def _along_axis(part: PartOutcome) -> dict[str, dict[float, list[float]]]:
    """Published and measured retention (shares) at each place of the axis; rows that are no number are left out."""
    lines: dict[str, dict[float, list[float]]] = {"published": {}, "measured": {}}
    for row in part.rows:
        try:
            place = float(row.label)
        except ValueError:
            continue
        for name, value in (("published", row.average.compared[0]), ("measured", row.average.measured)):
            if value is not None:
                lines[name][place] = [value / 100]
    return {name: points for name, points in lines.items() if points}
