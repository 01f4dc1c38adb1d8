"""`evaluation.json` and `evaluation.md`: what a checkpoint scores, and what is left of the dense one's scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_prune.evaluation.engine import Measurement
from lvlm_prune.evaluation.scores import retention
from lvlm_prune.output import reading
from lvlm_prune.output.manifest import replace_durably
from lvlm_prune.output.markdown import markdown_table
from lvlm_prune.output.names import EVALUATION_RECORD, EVALUATION_TABLE
from lvlm_prune.output.score_records import EvaluationRecord


def evaluation_record(measured: Measurement) -> dict[str, Any]:
    """What was measured, as it stands in `evaluation.json`.

    Returns:
        `tasks`: task -> `score`, `baseline`, `retention`, `questions`, and `metric` and `full_mark` where they are
        known; `average` and `baseline_average`: mean over tasks of the share of the full mark; `retention`: mean over
        tasks of score / baseline. Without a baseline, and for tasks in which it is never right, null.

    Raises:
        RunError: The baseline was asked something else.

    Example:
        >>> from lvlm_prune.evaluation.scores import Scores
        >>> pruned, dense = (Scores({"color": share}, {"color": 8}, {"color": "vision"}) for share in (0.5, 0.625))
        >>> record = evaluation_record(Measurement(pruned, dense))
        >>> record["tasks"]["color"]["retention"], record["retention"], record["average"]
        (0.8, 0.8, 0.5)
    """
    scores, dense = measured.scores, measured.baseline
    kept = None
    if dense is not None and any(dense.tasks.values()):
        kept = retention(scores, dense)
    tasks: dict[str, dict[str, Any]] = {}
    for task, score in scores.tasks.items():
        tasks[task] = {
            "score": score,
            "baseline": None if dense is None else dense.tasks[task],
            "retention": None if kept is None else kept.tasks.get(task),
            "questions": scores.counts[task],
        }
        for name, values in (("metric", scores.metrics), ("full_mark", scores.full_marks)):
            if task in values:
                tasks[task][name] = values[task]
    return {
        "tasks": tasks,
        "average": scores.average,
        "baseline_average": None if dense is None else dense.average,
        "retention": None if kept is None else kept.average,
        **measured.more,
    }


def evaluation_table(record: Mapping[str, Any]) -> str:
    """Markdown: one row per task; shares in percent, scores with another full mark as they are.

    Example:
        >>> task = {"score": 0.5, "baseline": 0.625, "retention": 0.8, "questions": 8, "metric": "exact_match"}
        >>> print(evaluation_table({"tasks": {"color": task}, "average": 0.5, "baseline_average": 0.625,
        ...                         "retention": 0.8}))
        | task | questions | metric | score | baseline | retained |
        |---|---|---|---|---|---|
        | color | 8 | exact_match | 50.0 | 62.5 | 80.0% |
        | average | 8 |  | 50.0 | 62.5 | 80.0% |
    """
    compared = record["baseline_average"] is not None
    heads = ["task", "questions", "metric", "score", *(["baseline", "retained"] if compared else [])]
    rows = []
    for name, task in record["tasks"].items():
        scale = 100 if "full_mark" not in task else 1
        row = [name, str(task["questions"]), task.get("metric", ""), _number(task["score"], scale)]
        rows.append(row + ([_number(task["baseline"], scale), _percent(task["retention"])] if compared else []))
    questions = sum(task["questions"] for task in record["tasks"].values())
    row = ["average", str(questions), "", _number(record["average"], 100)]
    rows.append(row + ([_number(record["baseline_average"], 100), _percent(record["retention"])] if compared else []))
    return "\n\n".join([markdown_table(heads, rows), *evaluation_notes(record), *_likelihood(record)])


def evaluation_notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores must know, a sentence each.

    Example:
        >>> evaluation_notes({"baseline_average": 0})
        ['the baseline gets none of these questions right, so no share of it can be retained']
    """
    nothing = ["the baseline gets none of these questions right, so no share of it can be retained"]
    notes = nothing if record["baseline_average"] == 0 else []
    if record.get("joined_prompts"):
        notes.append(
            "what the chat template puts before an answer ends within a token of the whole conversation (mostly with a "
            "space, which the tokenizer joins with the answer's first word): models answer behind tokens that they "
            "were not trained on, so scores may be lower than the model is able to; likelihoods are not "
            "concerned. A template whose generation prompt ends without the space avoids it"
        )
    return notes


def _likelihood(record: Mapping[str, Any]) -> list[str]:
    if "no_likelihood" in record:
        return [f"answers are compared as text only, without perplexity and KL: {record['no_likelihood']}"]
    if "perplexity" not in record:
        return []
    parts = [f"perplexity of the right answers {_small(record['perplexity'])}"]
    if "baseline_perplexity" in record:
        parts.append(f"baseline {_small(record['baseline_perplexity'])}")
    if "kl" in record:
        parts.append(f"KL(baseline ‖ model) {_small(record['kl'])} nats per token")
    lines = [" · ".join(parts)]
    if (without := record.get("likelihood_without")) is not None:
        lines.append(f"without {without} questions, where the right answer is not found: {record['likelihood_cause']}")
    return lines


def _number(value: float | None, scale: float) -> str:
    return "–" if value is None else f"{scale * value:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _small(value: float | None) -> str:
    return "infinite or NaN" if value is None else f"{value:.4g}"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write both files into a folder."""
    replace_durably(folder / EVALUATION_TABLE, (evaluation_table(record) + "\n").encode())
    replace_durably(folder / EVALUATION_RECORD, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an earlier `evaluate` found of the checkpoint in a folder; None where there is nothing readable."""
    return reading.read_record(folder / EVALUATION_RECORD, EvaluationRecord)
