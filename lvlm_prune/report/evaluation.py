"""What `lvlm-prune evaluate` found, on the page of the run that made the checkpoint: where both lie in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_prune.evaluation.record import evaluation_notes, read_record
from lvlm_prune.report.page import PageFigure, Table, show
from lvlm_prune.report.retention import retained_figure

_KEY = "evaluated"
# Of the tokens of right answers; what a run measures itself, on tokens of text, stands beside it.
_MORE = {
    "baseline_perplexity": "perplexity of answers, dense",
    "perplexity": "perplexity of answers",
    "kl": "KL per answer token",
}


def with_evaluation(run: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The record of a run and, under a key of its own, the evaluation that lies beside it."""
    found = None if folder is None else read_record(folder)
    return run if found is None else run | {_KEY: found}


def evaluated_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the headline says of the evaluation; empty without one."""
    found = run.get(_KEY)
    if found is None:
        return {}
    name, key = ("retained", "retention") if found["retention"] is not None else ("average score", "average")
    facts = {f"{name}, evaluated": show(run, _KEY, key, unit="percent")}
    return facts | {
        name: show(run, _KEY, key, unit="measure") for key, name in _MORE.items() if found.get(key) is not None
    }


def evaluated_table(run: Mapping[str, Any]) -> Table | None:
    """Every task of the evaluation, and their mean; None without one."""
    found = run.get(_KEY)
    if found is None:
        return None
    rows = []
    for name, task in found["tasks"].items():
        units = dict.fromkeys(("score", "baseline"), "percent" if "full_mark" not in task else "number")
        cells = [
            show(run, _KEY, "tasks", name, key, unit=units.get(key, "percent")) if task[key] is not None else "–"
            for key in ("baseline", "score", "retention")
        ]
        rows.append([name, task.get("metric", "–"), *cells])
    keys = ("baseline_average", "average", "retention")
    cells = [show(run, _KEY, key, unit="percent") if found[key] is not None else "–" for key in keys]
    rows.append(["average", "", *cells])
    return Table(["task", "metric", "dense", "score", "retained"], rows)


def evaluated_notes(run: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores must know; empty without an evaluation."""
    found = run.get(_KEY)
    return [] if found is None else evaluation_notes(found)


def evaluated_figure(run: Mapping[str, Any]) -> PageFigure | None:
    """Retention of every task of the evaluation; None without one, or without a dense model."""
    found = run.get(_KEY)
    if found is None:
        return None
    retained = {name: task["retention"] for name, task in found["tasks"].items()}
    return retained_figure("retention-evaluated", {"evaluated": retained})
