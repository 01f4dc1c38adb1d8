"""What stands in `evaluation.json` and in the lines of `sweep.jsonl`, as far as it is read again; see `records`."""

from typing import Required, TypedDict

from lvlm_prune.output.records import Count, PluginRecord, ScoresRecord, Share


class TaskRecord(TypedDict):
    """A task in `evaluation.json`."""

    score: float
    baseline: float | None
    retention: float | None
    questions: Count


class EvaluationRecord(TypedDict, total=False):
    """`evaluation.json`; `asked` tells questions apart that come from elsewhere, as a file that may change."""

    tasks: Required[dict[str, TaskRecord]]
    average: Required[float]
    baseline_average: Required[float | None]
    retention: Required[float | None]
    engine: PluginRecord
    asked: str


class DenseRecord(TypedDict):
    """The line of `sweep.jsonl` about the dense model."""

    identity: str
    scores: ScoresRecord


class ReachedSparsity(TypedDict):
    """What was to go, and what went."""

    target: Share
    achieved: Share


class MethodCost(TypedDict):
    """What the method alone took."""

    seconds: float


class SweptRecord(DenseRecord):
    """A line of `sweep.jsonl`: a run that is finished; there is more in it."""

    method: str
    sparsity: ReachedSparsity
    seconds: float
    cost: MethodCost
