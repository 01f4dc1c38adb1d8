"""The results file of an evaluation harness as scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_prune.errors import RunError
from lvlm_prune.evaluation.scores import Scores


def read_results(
    found: Mapping[str, Any], tasks: Sequence[str], metrics: Mapping[str, str], harness: str = "the harness"
) -> Scores:
    """Scores from the content of a results file of `lm_eval` or `lmms_eval`.

    Args:
        found: What the harness wrote, as plain data.
        tasks: Tasks or groups that must be there.
        metrics: Task -> metric that counts, `a+b` for a sum, `a,b` for two scores, `task:a` and `task:b`; of other
            tasks the first one reported. A group without metrics of its own scores the mean of its members.
        harness: Name of the harness, for what is said about its results.

    Raises:
        RunError: A task or a metric is missing, or is no number.

    Example:
        >>> results = {"mme": {"mme_cognition_score,none": 300.0, "mme_perception_score,none": 1500.0}}
        >>> scores = read_results({"results": results}, ["mme"], {"mme": "mme_perception_score+mme_cognition_score"})
        >>> scores.tasks
        {'mme': 1800.0}
        >>> read_results({"results": results}, ["mme"], {"mme": "mme_perception_score,mme_cognition_score"}).tasks
        {'mme:mme_perception_score': 1500.0, 'mme:mme_cognition_score': 300.0}
    """
    scores, counts, chosen = {}, {}, {}
    for task in tasks:
        members = _measured(found, task)
        if not members:
            raise RunError(f"{harness} has no results for the task {task}")
        wanted = metrics.get(task, "")
        for name, metric in zip(score_names(task, wanted), wanted.split(",")):
            named = [_value(values, metric, task, harness) for values in members]
            chosen[name], scores[name] = named[0][0], sum(value for _, value in named) / len(named)
            counts[name] = _count(found, task)
    return Scores(scores, counts, dict.fromkeys(scores, harness), chosen)


def score_names(task: str, metric: str) -> list[str]:
    """Under what names a task is scored: its own, or one for each of several metrics.

    Example:
        >>> score_names("gqa", "exact_match"), score_names("mme", "perception,cognition")
        (['gqa'], ['mme:perception', 'mme:cognition'])
    """
    return [f"{task}:{one}" for one in metric.split(",")] if "," in metric else [task]


def _measured(found: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Metric -> value of a task; of a group that has no metrics of its own, those of each member."""
    values: dict[str, Any] = {}
    for section in ("results", "groups"):
        for key, value in (found.get(section, {}).get(task) or {}).items():
            # `exact_match,none`: the metric and the filter that answers went through; the first filter counts.
            name, comma, _ = key.partition(",")
            if comma and not name.endswith("_stderr"):
                values.setdefault(name, value)
    if values:
        return [values]
    members = [member for member in found.get("group_subtasks", {}).get(task, []) if member != task]
    return [values for member in members for values in _measured(found, member)]


def _value(values: Mapping[str, Any], wanted: str, task: str, harness: str) -> tuple[str, float]:
    """The metric that counts, and its value.

    Raises:
        RunError: It is missing, or is no number.
    """
    name = wanted or next(iter(values))
    parts = [values.get(part) for part in name.split("+")]
    if any(isinstance(part, bool) or not isinstance(part, (int, float)) or math.isnan(part) for part in parts):
        reported = ", ".join(f"{name} {value}" for name, value in values.items())
        raise RunError(f"{harness} has no metric {name} for the task {task}; it reports {reported}")
    return name, float(sum(part for part in parts if part is not None))


def _count(found: Mapping[str, Any], task: str) -> int:
    """Questions of a task; of a group those of its members."""
    samples = found.get("n-samples", {})
    if task in samples:
        return int(samples[task]["effective"])
    return sum(_count(found, member) for member in found.get("group_subtasks", {}).get(task, []) if member != task)
