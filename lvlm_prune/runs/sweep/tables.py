"""The outcome of a sweep as CSV (one row per run), as a Markdown table and as lines of a figure (seeds together)."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_prune.errors import InputError
from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.methods.patterns import parse_pattern
from lvlm_prune.output import markdown
from lvlm_prune.runs.sweep.grid import PATTERN, SPARSITY, told_apart
from lvlm_prune.runs.sweep.results import FinishedRun


def swept_option(across: str, grid: Mapping[str, Sequence[Any]]) -> str:
    """The option that columns and horizontal axis stand for: the one asked for, else sparsity.

    Raises:
        InputError: The one asked for is not swept.
    """
    if across and across not in (*grid, SPARSITY):
        raise InputError("across", across, f"is not swept; swept are {', '.join(grid) or 'no options'}")
    return across or SPARSITY


def csv_table(runs: Sequence[FinishedRun]) -> str:
    """One row per run: where in the grid, sparsity, seconds, accuracy and retention on average and per task.

    Shares are fractions of 1.
    """
    names = _names(runs)
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores.tasks))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["target sparsity", "sparsity", "seconds", "accuracy", "retention"]
    writer.writerow(
        ["recipe", "method", *names, "seed", *columns]
        + [f"accuracy {task}" for task in tasks]
        + [f"retention {task}" for task in tasks]
    )
    for run in runs:
        record = run.record
        writer.writerow(
            [run.point.recipe, record["method"], *(_called(names, run, name) for name in names)]
            + ["" if run.point.seed is None else run.point.seed, record["sparsity"]["target"]]
            + [record["sparsity"]["achieved"], record["seconds"], run.scores.average, run.kept.average]
            + [run.scores.tasks.get(task, "") for task in tasks]
            + [run.kept.tasks.get(task, "") for task in tasks]
        )
    return text.getvalue()


def _names(runs: Sequence[FinishedRun]) -> dict[str, dict[str, str]]:
    """Each option that varies -> what its values are called, by their JSON: no two of them alike."""
    options = dict.fromkeys(name for run in runs for name in run.point.options)
    return {name: told_apart(run.point.options[name] for run in runs if name in run.point.options) for name in options}


def _called(names: Mapping[str, Mapping[str, str]], run: FinishedRun, option: str) -> str:
    """What the value of an option of a run is called; empty where the run does without it."""
    if option not in run.point.options:
        return ""
    return names[option][json.dumps(run.point.options[option], sort_keys=True)]


def cells(runs: Sequence[FinishedRun], across: str) -> dict[str, dict[Any, list[FinishedRun]]]:
    """Runs by line (recipe and the options that do not run along the axis) and place on the axis; seeds together.

    The place is a number, or the name of another value, or the pattern (`2:4`) where the axis is sparsity and the
    pattern gives it.
    """
    names = _names(runs)
    table: dict[str, dict[Any, list[FinishedRun]]] = {}
    for run in runs:
        config = run.point.config["pruning"]
        semi_structured = config["pattern"] != "unstructured"
        others = [
            name
            for name in run.point.options
            if name != across and not (across == SPARSITY and name == PATTERN and semi_structured)
        ]
        named = [f"{name.rpartition('.')[2]} {_called(names, run, name)}" for name in others]
        if across == SPARSITY:
            target = run.record["sparsity"]["target"]
            place = target if not semi_structured else pattern_place(config["pattern"], target)
        else:
            value = run.point.options.get(across, "")
            place = value if _is_number(value) else _called(names, run, across)
        line = " · ".join([run.point.recipe, *named])
        table.setdefault(line, {}).setdefault(place, []).append(run)
    return table


def pattern_place(pattern: str, target: float) -> str:
    """What an N:M column is headed: the pattern, and the mean where Linears stay dense.

    Example:
        >>> pattern_place("2:4", 0.5), pattern_place("2:4", 0.4)
        ('2:4', '2:4 at 40%')
    """
    return f"{pattern} at {100 * target:g}%" if parse_pattern(pattern).mixes(target) else pattern


def table_rows(runs: Sequence[FinishedRun], across: str) -> tuple[list[str], list[list[str]]]:
    """Heads of the columns and rows of the table of `markdown_table`, as text."""
    table = cells(runs, across)
    places = sorted({place for line in table.values() for place in line}, key=_order)
    heads = ["method", *(_head(place, across) for place in places)]
    return heads, [[name, *(cell(line.get(place, [])) for place in places)] for name, line in table.items()]


def markdown_table(runs: Sequence[FinishedRun], across: str) -> str:
    """Accuracy in percent, mean over tasks and seeds, and in brackets the retention with its spread over seeds."""
    heads, rows = table_rows(runs, across)
    return markdown.markdown_table(heads, rows)


def _head(place: Any, across: str) -> str:
    if across == SPARSITY and _is_number(place):
        return f"{100 * place:g}%"
    return f"{place:g}" if isinstance(place, float) else str(place) or "without"


def cell(runs: Sequence[FinishedRun]) -> str:
    """`59.0 (59.2 ± 2.0)`: accuracy, retention and its standard deviation over seeds, in percent."""
    if not runs:
        return ""
    kept = [100 * run.kept.average for run in runs]
    spread = f" ± {statistics.stdev(kept):.1f}" if len(kept) > 1 else ""
    accuracy = statistics.mean(100 * run.scores.average for run in runs)
    return f"{accuracy:.1f} ({statistics.mean(kept):.1f}{spread})"


def curves(runs: Sequence[FinishedRun], across: str) -> dict[str, dict[float, list[float]]]:
    """Line -> place on the axis (percent for sparsity) -> retention of each seed; places that are no numbers left out.

    An N:M pattern stands at its sparsity.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for name, line in cells(runs, across).items():
        for place, members in line.items():
            value: Any = 100 * members[0].record["sparsity"]["target"] if across == SPARSITY else place
            if _is_number(value):
                lines.setdefault(name, {})[float(value)] = [run.kept.average for run in members]
    return lines


def summary(dense: Scores) -> str:
    """Accuracy of the dense model in words."""
    groups = ", ".join(f"{name} {100 * value:.1f}%" for name, value in dense.groups.items())
    return (
        f"Accuracy in percent, mean over {len(dense.tasks)} tasks and the calibration seeds; in brackets the share of "
        f"the dense model's accuracy that is retained, ± its standard deviation over seeds. "
        f"Dense accuracy: {100 * dense.average:.1f}% ({groups})."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _order(place: Any) -> tuple[bool, float, str]:
    return (False, float(place), "") if _is_number(place) else (True, 0.0, str(place))
