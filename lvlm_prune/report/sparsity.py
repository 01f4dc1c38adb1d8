"""Sparsity of kinds of Linears over blocks: a heat map where it differs, a sentence where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lvlm_prune.report.figures.blocks import heat_map
from lvlm_prune.report.page import PageFigure, Table, show
from lvlm_prune.report.uniform import is_uniform


def sparsity_span(run: Mapping[str, Any]) -> Markup:
    """`summary` / `sparsity_range` of a run for a sentence: two numbers, or one where they look the same."""
    low, high = (show(run, "summary", "sparsity_range", end, unit="sparsity") for end in ("lowest", "highest"))
    return high if low.striptags() == high.striptags() else Markup("{} to {}").format(low, high)


def sparsity_figure(run: dict[str, Any], caption: str) -> PageFigure | None:
    """A heat map of `summary` / `sparsity` of a run; None where it is uniform, which a sentence says better."""
    values = run["summary"]["sparsity"]
    if is_uniform(values):
        return None
    percent = {kind: {block: 100 * value for block, value in of.items()} for kind, of in values.items()}
    drawing = heat_map(percent, "sparsity (%)", "{:.1f}", least_span=10, most=100)
    return PageFigure("sparsity", drawing, caption, table_by_kind(run, "summary", "sparsity", unit="sparsity"))


def table_by_kind(record: Mapping[str, Any], *path: str | int, unit: str = "share") -> Table:
    """The numbers behind a heat map: a row for each block, a column for each kind of Linear.

    Args:
        record: Where the numbers stand.
        path: Keys down to kind of Linear -> block -> value.
        unit: See `show`.
    """
    values: Any = record
    for key in path:
        values = values[key]
    blocks = sorted({block for of in values.values() for block in of}, key=int)
    rows = [
        [block, *(show(record, *path, kind, block, unit=unit) if block in values[kind] else "–" for kind in values)]
        for block in blocks
    ]
    return Table(["block", *values], rows)
