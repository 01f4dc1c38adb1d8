"""What came out of a table: for each row and column what was published, what was measured, and the difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.runs.reproduce.published import PublishedRow, Values, oddity, retention_of
from lvlm_prune.runs.reproduce.tables import Part, Row
from lvlm_prune.runs.sweep.results import FinishedRun

_COSTS = ("seconds", "relative", "gain")


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Args:
        published: As printed; None where nothing is.
        measured: Mean over the calibration seeds; None where nothing is.
        spread: Standard deviation over the seeds; None with fewer than two.
        alike: What can be held against each other, where these two cannot: both again, over the columns that are
            printed and measured; None where there are no such columns, or the paper does not print them.

    Example:
        >>> Cell(90.0, 80.0).difference, Cell(90.0, 80.0, alike=(85.0, 80.0)).difference
        (-10.0, -5.0)
    """

    published: float | None = None
    measured: float | None = None
    spread: float | None = None
    alike: tuple[float | None, float | None] | None = None

    @property
    def compared(self) -> tuple[float | None, float | None]:
        """Published and measured, of the same columns."""
        return (self.published, self.measured) if self.alike is None else self.alike

    @property
    def difference(self) -> float | None:
        """Measured less published, of the same columns."""
        published, measured = self.compared
        if published is None or measured is None:
            return None
        return measured - published


@dataclass(frozen=True)
class RowOutcome:
    """One row of a table.

    Args:
        label: What the paper calls the row.
        average: Retention in percent.
        cells: Name of each column -> published and measured.
        follows: The average that follows from the printed row, where another one is printed.
        seeds: Number of runs behind what is measured.
        drift: Block -> mean drift of visual tokens, of the first run.
        sparsity: Kind of Linear -> its sparsity in each block, of the first run.
    """

    label: str
    average: Cell
    cells: Mapping[str, Cell]
    follows: float | None = None
    seeds: int = 0
    drift: Sequence[float] = ()
    sparsity: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PartOutcome:
    """The rows of one model.

    Args:
        model: Path of the checkpoint that was measured.
        of: The model of the paper.
        columns: Names of the columns.
        dense: The dense model's own values.
        rows: What came out for each row of the table, in its order.
        text: What the paper says in words.
        unmeasured: Columns that the harness has no task for.
        stand_ins: What was not as in the paper, in sentences.
    """

    model: str
    of: str
    columns: Sequence[str]
    dense: Mapping[str, Cell]
    rows: Sequence[RowOutcome]
    text: str = ""
    unmeasured: Sequence[str] = ()
    stand_ins: Sequence[str] = ()

    @property
    def is_partial(self) -> bool:
        """Whether an average that is printed is of other columns than the measured one."""
        return any(row.average.alike is not None for row in self.rows)

    @property
    def missing(self) -> int:
        """Rows without a finished run."""
        return sum(not row.seeds for row in self.rows)


def part_outcome(
    part: Part, model: str, tasks: Mapping[str, str], runs: Sequence[Sequence[FinishedRun]], dense: Scores | None
) -> PartOutcome:
    """Hold the runs of one model against what was published.

    Args:
        part: What was to be done.
        model: Path of the checkpoint.
        tasks: Benchmark -> name under which the engine scores it.
        runs: The finished runs of each row, one for each seed.
        dense: Scores of the dense model; None while there are none.
    """
    dense_values = {} if dense is None else _in_print(part, tasks, dense)
    printed = [[_in_print(part, tasks, run.scores) for run in row] for row in runs]
    averages = [[retention_of(values, dense_values) for values in row] for row in printed]
    columns = list(dict.fromkeys([*part.published.columns, *(benchmark.name for benchmark in part.benchmarks)]))
    reference = (runs[0], averages[0]) if runs else ([], [])
    rows = [
        _row(part, row, columns, values, dense_values, found, kept, reference)
        for row, values, found, kept in zip(part.rows, printed, runs, averages)
    ]
    whole = {name: Cell(part.dense.get(name), dense_values.get(name)) for name in columns if name not in _COSTS}
    unmeasured = [benchmark.name for benchmark in part.benchmarks if benchmark.name not in tasks]
    return PartOutcome(model, part.model.path, columns, whole, rows, part.published.text, unmeasured)


def _in_print(part: Part, tasks: Mapping[str, str], scores: Scores) -> dict[str, float | None]:
    """Scores of the benchmarks as the papers print them."""
    return {
        benchmark.name: scores.shares[tasks[benchmark.name]] * benchmark.scale
        for benchmark in part.benchmarks
        if benchmark.name in tasks
    }


def _row(
    part: Part,
    row: Row,
    columns: Sequence[str],
    values: Sequence[Values],
    dense: Values,
    runs: Sequence[FinishedRun],
    averages: Sequence[float | None],
    reference: tuple[Sequence[FinishedRun], Sequence[float | None]],
) -> RowOutcome:
    printed = part.published.rows.get(row.labels, PublishedRow({}))
    cells = {name: _cell(printed.values.get(name), [found.get(name) for found in values]) for name in columns}
    if runs and not set(_COSTS).isdisjoint(columns):
        costs = _costs(runs, averages, *reference)
        cells |= {name: Cell(printed.values.get(name), costs[name]) for name in columns if name in _COSTS}
        if len(dense) < len(part.benchmarks) and "gain" in cells:
            # The points that the paper gains are of all its benchmarks.
            cells["gain"] = replace(cells["gain"], alike=(None, None))
    first = runs[0].record if runs else {}
    average = _cell(printed.average, averages)
    return RowOutcome(
        row.label,
        replace(average, alike=_alike(part, printed, values, dense)) if average.difference is not None else average,
        cells,
        oddity(printed, part.dense),
        len(runs),
        first.get("drift", ()),
        first.get("sparsity_by_kind", {}),
    )


def _alike(
    part: Part, printed: PublishedRow, values: Sequence[Values], dense: Values
) -> tuple[float | None, float | None] | None:
    """Both averages of a row over the columns that are printed and measured; None where those are all there are."""
    measured = {name for name, value in dense.items() if value}
    shown = {name for name, value in printed.values.items() if value is not None and part.dense.get(name)}
    # Where only an average is printed it is taken to be over all benchmarks of the table.
    if measured == (shown or {benchmark.name for benchmark in part.benchmarks}):
        return None
    both = shown & measured
    found = [retention_of({name: each.get(name) for name in both}, dense) for each in values]
    published = retention_of({name: printed.values[name] for name in both}, part.dense)
    return published, _cell(None, found).measured


def _cell(published: float | None, measured: Sequence[float | None]) -> Cell:
    found = [value for value in measured if value is not None]
    if not found:
        return Cell(published)
    return Cell(published, statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None)


def _costs(
    runs: Sequence[FinishedRun],
    averages: Sequence[float | None],
    first_runs: Sequence[FinishedRun],
    first_averages: Sequence[float | None],
) -> dict[str, float | None]:
    """Seconds, their ratio to the first row's, and the points of retention gained on it."""
    seconds, kept = _seconds(runs), _cell(None, averages).measured
    beside, first = _seconds(first_runs), _cell(None, first_averages).measured
    return {
        "seconds": seconds,
        "relative": seconds / beside if seconds is not None and beside else None,
        "gain": kept - first if kept is not None and first is not None else None,
    }


def _seconds(runs: Sequence[FinishedRun]) -> float | None:
    return statistics.mean(run.record["cost"]["seconds"] for run in runs) if runs else None
