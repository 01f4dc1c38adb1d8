"""Sparsity of kinds of Linears over blocks: a heat map where it differs, a sentence where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lvlm_prune.report.figures.blocks import heat_map
from lvlm_prune.report.page import PageFigure, Table, show

_SAME = 0.02
"""Shares of zeros that differ by less are those of one target: rows of different widths round it to whole weights."""


def sparsity_range(sparsity: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The lowest and the highest share of zeros.

    Args:
        sparsity: Kind of Linear -> block -> share of zeros.

    Example:
        >>> sparsity_range({"q_proj": {0: 0.59, 1: 0.6}, "up_proj": {0: 0.61}})
        {'lowest': 0.59, 'highest': 0.61}
    """
    shares = [share for blocks in sparsity.values() for share in blocks.values()]
    return {"lowest": min(shares, default=0.0), "highest": max(shares, default=0.0)}


def is_uniform(sparsity: Mapping[str, Mapping[int, float]]) -> bool:
    """Whether a heat map of it would be one colour.

    Example:
        >>> is_uniform({"q_proj": {0: 0.59, 1: 0.6}}), is_uniform({"q_proj": {0: 0.5, 1: 0.6}})
        (True, False)
    """
    found = sparsity_range(sparsity)
    return found["highest"] - found["lowest"] < _SAME


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
