"""A reproduced table as Markdown, for people, and as CSV, one row per number."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace

from lvlm_prune.output.markdown import markdown_table
from lvlm_prune.runs.reproduce.outcome import Cell, PartOutcome, RowOutcome
from lvlm_prune.runs.reproduce.published import PAPERS
from lvlm_prune.runs.reproduce.tables import Table

_HEADS = ("published", "measured", "difference")
_SAME_COLUMNS = "published, same columns"


def heading(table: Table) -> str:
    """Paper, table and title in a line."""
    paper, _, name = table.name.partition("/")
    return f"{PAPERS[paper]}, {name.replace('_', ' ')}: {table.title}"


def csv_text(outcomes: Sequence[PartOutcome]) -> str:
    """One row per model, row of the table and column; `average` is the retention in percent.

    Where the printed average is of other columns than the measured one, `average of the same columns` follows, with the
    difference. What is not there is an empty cell.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "checkpoint", "row", "column", *_HEADS, "spread", "seeds"])
    for part in outcomes:
        for name, cell in part.dense.items():
            writer.writerow([part.of, part.model, "dense", name, *_numbers(cell), ""])
        for row in part.rows:
            averages = {"average": row.average}
            if row.average.alike is not None:
                same = Cell(*row.average.alike)
                averages = {"average": replace(row.average, alike=(None, None)), "average of the same columns": same}
            for name, cell in {**row.cells, **averages}.items():
                writer.writerow([part.of, part.model, row.label, name, *_numbers(cell), row.seeds])
    return text.getvalue()


def _numbers(cell: Cell) -> list[float | str]:
    values = (cell.published, cell.measured, cell.difference, cell.spread)
    return ["" if value is None else value for value in values]


def markdown_text(table: Table, outcomes: Sequence[PartOutcome]) -> str:
    """Retention of each row, and then every column, published beside measured."""
    parts = [f"# {heading(table)}"]
    for part in outcomes:
        parts += [f"## {part.of}", f"Measured on `{part.model}`." if part.model != part.of else ""]
        parts += [
            "Retention in percent: mean over the benchmarks of pruned / dense.",
            markdown_table(*average_rows(part, table.labels)),
        ]
        columns = markdown_table(*column_rows(part, table.labels))
        parts += ["Every column: published / measured (difference).", columns, *notes(part)]
    return "\n\n".join(part for part in parts if part) + "\n"


def average_rows(part: PartOutcome, labels: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of retentions; `labels` says what those of a row are."""
    heads, more = [labels, *_HEADS], []
    if part.is_partial:
        heads.insert(2, _SAME_COLUMNS)
        more = [[_number(row.average.compared[0])] for row in part.rows]
    return heads, [
        [row.label, _number(row.average.published), *same, measured_text(row.average), _signed(row.average.difference)]
        for row, same in zip(part.rows, more or [[]] * len(part.rows))
    ]


def column_rows(part: PartOutcome, labels: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of all columns; the dense model comes first."""
    rows = [["dense", *(_pair(part.dense.get(name, Cell())) for name in part.columns)]]
    rows += [[row.label, *(_pair(row.cells[name]) for name in part.columns)] for row in part.rows]
    return [labels, *part.columns], rows


def notes(part: PartOutcome) -> list[str]:
    """What has to be known to read the numbers."""
    found = list(part.stand_ins)
    if part.missing:
        found.append(f"{part.missing} of {len(part.rows)} rows are still to be done.")
    if part.unmeasured:
        names = ", ".join(part.unmeasured)
        found.append(f"Not measured, and not in the measured retention: {names}.")
    if part.is_partial:
        found.append(
            "The published retention is over all columns of the paper. The difference is over those both printed "
            f"and measured; `{_SAME_COLUMNS}` is the paper's average over them, where it prints them."
        )
    if part.text:
        found.append(f"The paper says: {part.text}.")
    found += [_oddity(row) for row in part.rows if row.follows is not None]
    return found


def _oddity(row: RowOutcome) -> str:
    printed, follows = _number(row.average.published), _number(row.follows)
    return f"The average printed for {row.label}, {printed}, does not follow from its row, which gives {follows}."


def measured_text(cell: Cell) -> str:
    """What was measured, with its spread over seeds where there are several."""
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f}"
    return _number(cell.measured) + spread


def _pair(cell: Cell) -> str:
    if cell.published is None and cell.measured is None:
        return ""
    difference = "" if cell.difference is None else f" ({_signed(cell.difference)})"
    return f"{_number(cell.published) or '–'} / {_number(cell.measured) or '–'}{difference}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
